import copy
import urllib.request

import pytest
import torch
from golden_files import checkpoint_keys, fill, load, named_tensor, relative

import losses
from losses import LPIPS, LeCAM, PatchDiscriminator
from runtime import UserError
from tokenizer import Tokenizer, TokenizerConfig

CONSTANTS = ("scaling_layer.shift", "scaling_layer.scale")


def lpips_filled(network="vgg"):
    prefix = {"vgg": "loss.perceptual_loss.", "alex": "lpips_alex."}[network]
    return fill(LPIPS(network), prefix, keep=CONSTANTS)


def discriminator_filled():
    return fill(PatchDiscriminator(), "loss.discriminator.").train()


@pytest.mark.parametrize("network", ["vgg", "alex"])
@torch.no_grad()
def test_golden_lpips(network):
    golden = load(f"lpips_{network}")
    lpips = lpips_filled(network)
    assert relative(lpips(golden["image"], golden["other"]).flatten(), golden["distance"]) < 1e-5
    assert lpips(golden["image"], golden["image"]).abs().max() == 0


def test_lpips_is_frozen():
    assert not any(p.requires_grad for p in LPIPS().parameters())


def test_golden_objective():
    """Three steps of both losses on one pair, as they were published: every term, the gradient, BatchNorm, LeCAM."""
    golden = load("losses")
    lpips, discriminator, lecam = lpips_filled(), discriminator_filled(), LeCAM()
    x = golden["image"]
    quantizer = {
        "entropy": torch.tensor(-2.5),
        "sample_entropy": torch.tensor(0.0),
        "codebook_entropy": torch.tensor(2.5),
        "commitment": torch.tensor(0.3),
    }
    for step, scale in enumerate((1, 0.9, 0.8)):
        y = (golden["reconstruction"] * scale).requires_grad_()
        loss, terms = losses.generator_loss(x, y, quantizer, lpips, discriminator)
        if step == 0:
            (gradient,) = torch.autograd.grad(loss, y)
            assert relative(gradient, golden["grad_generator_loss_wrt_reconstruction_step0"]) < 1e-5
        logits_real, logits_fake = discriminator(x), discriminator(y.detach())
        d_loss, d_terms = losses.discriminator_loss(logits_real, logits_fake, lecam, 0.05)
        lecam.advance(d_terms["logits_real"], d_terms["logits_fake"])
        nll = terms["l1"] + terms["lpips"]
        ours = [loss, nll, terms["lpips"], 0.1 * terms["gan"], d_loss, d_terms["lecam"], d_terms["hinge"]]
        ours = torch.stack([*ours, d_terms["logits_real"], d_terms["logits_fake"]]).detach().double()
        assert torch.allclose(ours, golden["table"][step], rtol=1e-5, atol=0)
    assert relative(discriminator.main[3].running_mean, golden["bn3_running_mean_after"]) < 1e-5
    assert relative(discriminator.eval()(x), golden["disc_logits_eval_after"]) < 1e-5
    assert lecam.real.item() == pytest.approx(golden["lecam_real_ema"].item(), rel=1e-5)
    assert lecam.fake.item() == pytest.approx(golden["lecam_fake_ema"].item(), rel=1e-5)


def test_lecam_moves_its_means_before_the_term():
    """Closed form with a large step: constant logits a, b from zero means."""
    lecam = LeCAM(decay=0.5)
    real, fake = torch.full((4,), 3.0), torch.full((4,), 1.0)
    # Means become 1.5 and 0.5: relu(3 - 0.5)^2 + relu(1.5 - 1)^2
    assert lecam(real, fake).item() == pytest.approx(2.5**2 + 0.5**2)
    assert lecam.real == 0  # the stored pair moves once a step
    lecam.advance(real.mean(), fake.mean())
    assert (lecam.real.item(), lecam.fake.item()) == (1.5, 0.5)


def test_discriminator_initialisation():
    torch.manual_seed(0)
    main = PatchDiscriminator().main
    for i in (0, 2, 5, 8, 11):
        assert main[i].weight.std().item() == pytest.approx(0.02, rel=0.05)
    for i in (3, 6, 9):
        assert main[i].weight.mean().item() == pytest.approx(1, abs=0.01)
        assert main[i].weight.std().item() == pytest.approx(0.02, rel=0.25)
        assert main[i].bias.abs().max() == 0
    assert 0 < main[0].bias.abs().max() <= 1 / (3 * 16) ** 0.5  # torch's default: uniform in 1/sqrt(fan in)


def test_entries_are_the_released_ones():
    released = {k: v[0] for k, v in checkpoint_keys("imagenet_256_L.ckpt").items() if k.startswith("loss.")}
    ours = {f"loss.perceptual_loss.{k}": tuple(v.shape) for k, v in LPIPS().state_dict().items()}
    ours |= {f"loss.discriminator.{k}": tuple(v.shape) for k, v in PatchDiscriminator().state_dict().items()}
    assert ours == released


# The published trajectory: 4 whole steps in float64 -------------------------------------------------------


def step_losses(x, tokenizer, lpips, discriminator, lecam):
    """Both losses of a step, the discriminator's terms, and the golden table's row."""
    y, _, quantizer = tokenizer(x)
    loss, terms = losses.generator_loss(x, y, quantizer, lpips, discriminator)
    d_loss, d_terms = losses.discriminator_loss(discriminator(x), discriminator(y.detach()), lecam, 0.05)
    names = ("l1", "lpips", "sample_entropy", "codebook_entropy", "commitment")
    row = [loss, *(terms[name] for name in names), d_loss, d_terms["lecam"]]
    return loss, d_loss, d_terms, torch.stack([value.detach().double() for value in row])


@pytest.fixture(scope="module")
def trajectory():
    """tiny16 trained for 4 steps in float64 as the published code does: the golden file, our table, the same table by
    float32 copies of each step's modules, parameters, averages."""
    golden = load("train_tokenizer_tiny")
    tokenizer = fill(Tokenizer(TokenizerConfig(32, (1, 1, 2, 2, 4), 1))).train()
    parts = [part.double() for part in (tokenizer, lpips_filled(), discriminator_filled(), LeCAM())]
    tokenizer, _, discriminator, lecam = parts
    modules = torch.nn.ModuleDict({"tokenizer": tokenizer, "discriminator": discriminator})
    averages = copy.deepcopy(modules)
    optimizers = [torch.optim.Adam(m.parameters(), 1e-4, betas=(0.5, 0.9)) for m in (tokenizer, discriminator)]
    table, table_float32 = [], []
    for x in golden["images"]:
        copies = [copy.deepcopy(part).float() for part in parts]
        table_float32.append(step_losses(x.float(), *copies)[-1])
        loss, d_loss, d_terms, row = step_losses(x.double(), *parts)
        table.append(row)
        lecam.advance(d_terms["logits_real"], d_terms["logits_fake"])
        gradients = torch.autograd.grad(loss, list(tokenizer.parameters()))
        d_gradients = torch.autograd.grad(d_loss, list(discriminator.parameters()))
        for parameter, gradient in zip(modules.parameters(), (*gradients, *d_gradients), strict=True):
            parameter.grad = gradient
        for optimizer in optimizers:
            optimizer.step()
        losses.update_ema(list(averages.parameters()), list(modules.parameters()))
    return golden, torch.stack(table), torch.stack(table_float32), modules, averages


def test_golden_trajectory_in_float64(trajectory):
    golden, table, _, modules, averages = trajectory
    assert torch.allclose(table, golden["table"], rtol=1e-6, atol=0)
    for prefix, module in (("param.", modules), ("ema.", averages)):
        entries = dict(module.named_parameters())
        for name in golden:
            if name.startswith(prefix):
                own = name.removeprefix(prefix).replace("loss.", "")
                own = own if own.startswith("discriminator") else f"tokenizer.{own}"
                ours = entries[own].detach().flatten()[:2000]
                assert relative(ours, golden[name]) < 1e-8, name


def test_golden_losses_in_float32(trajectory):
    """At every step of the float64 run. A run of its own would leave it: a unit of the discriminator lies so close to
    its LeakyReLU's corner that rounding decides on 0.3 % of a gradient, and Adam takes that up."""
    golden, _, table, _, _ = trajectory
    assert torch.allclose(table, golden["table"], rtol=1e-4, atol=0)


# Reading LPIPS weights -------------------------------------------------------------------------------------


def test_load_lpips_from_a_released_tokenizer_file(tmp_path):
    entries = {
        name: named_tensor(name, shape) if name.startswith("loss.perceptual") else torch.zeros(()).expand(shape)
        for name, (shape, _) in checkpoint_keys("imagenet_128_L.ckpt").items()
    }
    torch.save({"state_dict": entries}, tmp_path / "x.ckpt")
    lpips = losses.load_lpips("vgg", tmp_path / "x.ckpt")
    for name, value in lpips.state_dict().items():
        assert torch.equal(value, entries[f"loss.perceptual_loss.{name}"]), name
    del entries["loss.perceptual_loss.net.slice3.12.bias"]
    torch.save({"state_dict": entries}, tmp_path / "x.ckpt")
    with pytest.raises(UserError, match=r"x.ckpt.*net.slice3.12.bias is missing"):
        losses.load_lpips("vgg", tmp_path / "x.ckpt")


def test_load_lpips_from_backbone_and_heads(tmp_path, monkeypatch):
    """The two files as torchvision and LPIPS publish them, in torch's hub cache."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    state = lpips_filled("alex").state_dict()
    backbone = {"features." + n.split(".", 2)[2]: v for n, v in state.items() if n.startswith("net.")}
    torch.save(backbone | {"classifier.1.bias": torch.zeros(2)}, folder / "alexnet-owt-7be5be79.pth")
    torch.save({n: v for n, v in state.items() if n.startswith("lin")}, folder / "alex.pth")
    loaded = losses.load_lpips("alex").state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in state.items())
    monkeypatch.setattr(urllib.request, "urlopen", lambda *a, **k: (_ for _ in ()).throw(OSError("offline")))
    with pytest.raises(UserError, match=r"vgg16-397923af.pth.*put it at"):
        losses.load_lpips("vgg")
