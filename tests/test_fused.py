"""The fused kernels and graphs, on a GPU: against float64, golden files and the plain code. Skipped without a GPU."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from golden_files import fill, load, named_tensor, relative

import lfq
import losses
import tokenizer as tk
from ar_model import AR_SIZES, ARConfig, ARTransformer, cross_entropies, guided, image_uniforms, rotary_table

pytestmark = pytest.mark.gpu
GPU = "cuda"
TINY = ARConfig(64, 4, 3, 2, (6, 12), grid=4, num_classes=10)


@pytest.fixture(autouse=True)
def exact_float32():
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 2e-6), (torch.bfloat16, 6e-3)])
@pytest.mark.parametrize("batch, channels, side", [(2, 32, 5), (3, 128, 64), (8, 256, 33), (2, 512, 16)])
@pytest.mark.parametrize("adaptive, activate", [(False, True), (True, False)])
def test_norm_silu(batch, channels, side, adaptive, activate, dtype, tolerance):
    """Value and every gradient, the residual's included, of inputs whose mean is ten times their deviation."""
    import fused_norm

    torch.manual_seed(0)
    x = torch.randn(batch, channels, side, side, device=GPU) + 10
    x = x.to(dtype, memory_format=torch.channels_last).requires_grad_()
    assert fused_norm.usable(x)
    scale = torch.randn((batch, channels) if adaptive else (channels,), device=GPU).requires_grad_()
    bias = torch.randn_like(scale).requires_grad_()
    to_y, to_x = (torch.randn_like(x) for _ in range(2))
    y, around = fused_norm.norm_silu(x, scale, bias, activate)
    ours = torch.autograd.grad((y.double() * to_y).sum() + (around.double() * to_x).sum(), (x, scale, bias))

    x64, scale64, bias64 = (value.detach().double().requires_grad_() for value in (x, scale, bias))
    n = F.group_norm(x64, 32, eps=1e-6)
    n = n * scale64.view(-1, channels, 1, 1) + bias64.view(-1, channels, 1, 1)
    y64 = F.silu(n) if activate else n
    truth = torch.autograd.grad((y64 * to_y.double()).sum() + (x64 * to_x.double()).sum(), (x64, scale64, bias64))
    assert y.dtype == dtype and y.is_contiguous(memory_format=torch.channels_last)
    for a, b in zip((y, *ours), (y64, *truth)):
        assert relative(a, b) < tolerance


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 2e-6), (torch.bfloat16, 6e-3)])
@pytest.mark.parametrize("width", [64, 1280])
@pytest.mark.parametrize("adds, dropout", [(False, 0.0), (True, 0.0), (True, 0.25)])
def test_add_norm(width, adds, dropout, dtype, tolerance):
    """Values and gradients. What dropout keeps is a function of the seed: a sum of zeros and ones shows it."""
    import fused_training

    def add_norm(x, added):
        torch.manual_seed(1)
        with torch.autocast(GPU, dtype, enabled=dtype != torch.float32):
            return fused_training.add_norm(x, added, weight, dropout)

    torch.manual_seed(0)
    x = torch.randn(5, 500, width, device=GPU, requires_grad=True)
    added = torch.randn_like(x).to(dtype).requires_grad_() if adds else None
    weight = torch.randn(width, device=GPU, requires_grad=True)
    to_total, to_y = torch.randn_like(x), torch.randn_like(x)
    total, y = add_norm(x, added)
    assert y.dtype == dtype and total.dtype == torch.float32
    leaves = [leaf for leaf in (x, weight, added) if leaf is not None]
    ours = torch.autograd.grad((total * to_total).sum() + (y.double() * to_y).sum(), leaves)

    x64, weight64, *added64 = (leaf.detach().double().requires_grad_() for leaf in leaves)
    total64 = x64
    if adds:
        kept = add_norm(torch.zeros_like(x), torch.ones_like(added))[0].detach()
        share = (kept > 0).float()
        assert torch.equal(kept, share * kept.max()) and abs(kept.max().item() * (1 - dropout) - 1) < 1e-6
        assert abs(share.mean().item() - (1 - dropout)) < 0.005
        # 2,500 draws a column, 0.0087 deviation of their mean where 0.25 are dropped
        assert abs(share.mean((0, 1)).std().item() - (0.0087 if dropout else 0)) < 0.002
        total64 = x64 + kept.double() * added64[0]
    y64 = F.rms_norm(total64, (width,), weight64, 1e-5)
    truth = torch.autograd.grad((total64 * to_total).sum() + (y64 * to_y).sum(), (x64, weight64, *added64))
    for a, b in zip((total, y, *ours), (total64, y64, *truth), strict=True):
        assert relative(a, b) < tolerance


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 2e-6), (torch.bfloat16, 6e-3)])
@pytest.mark.parametrize(
    "rows, heads, width, grid, tokens", [(3, 2, 16, 4, 16), (2, 4, 32, 16, 255), (2, 3, 64, 32, 1024)]
)
def test_attend(rows, heads, width, grid, tokens, dtype, tolerance):
    import fused_training

    torch.manual_seed(0)
    qkv = torch.randn(rows, tokens, 3 * heads * width, device=GPU).to(dtype).requires_grad_()
    table = rotary_table(grid, width, GPU)[:, :tokens].contiguous()
    out = fused_training.attend(qkv, table, heads)
    to_out = torch.randn_like(out)
    (ours,) = torch.autograd.grad(out, qkv, to_out)

    qkv64 = qkv.detach().double().requires_grad_()
    query, key, value = qkv64.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)

    def turned(x):  # as complex numbers
        pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
        return torch.view_as_real(pairs * torch.complex(*table.double())).flatten(-2)

    score = turned(query) @ turned(key).mT / width**0.5
    score = score.masked_fill(torch.ones(tokens, tokens, device=GPU).triu(1).bool(), -torch.inf)
    out64 = (score.softmax(-1) @ value).transpose(1, 2).flatten(2)
    (truth,) = torch.autograd.grad(out64, qkv64, to_out.double())
    assert relative(out, out64) < tolerance and relative(ours, truth) < tolerance


def test_gate():
    import fused_training

    h = torch.randn(7, 300, 2 * 704, device=GPU, requires_grad=True)
    y = fused_training.gate(h)
    to_y = torch.randn_like(y)
    h64 = h.detach().double().requires_grad_()
    first, second = h64.chunk(2, -1)
    y64 = F.silu(first) * second
    assert relative(y, y64) < 1e-6
    assert relative(torch.autograd.grad(y, h, to_y)[0], torch.autograd.grad(y64, h64, to_y.double())[0]) < 1e-6


@pytest.mark.parametrize("deviation", [0.01, 0.1, 1.0])  # probabilities 0.5 and around to 0 and 1
@pytest.mark.parametrize("tokens, bits", [(300, 1), (300, 2), (300, 7), (2048, 18), (100, 20)])
def test_entropy_terms(tokens, bits, deviation):
    """Both entropies and the gradient of each, z's rows not contiguous: against the plain code in float64. TF32 is
    allowed, as in training, and must not be used."""
    import fused_entropy

    torch.backends.cuda.matmul.allow_tf32 = True
    torch.manual_seed(0)
    # half a deviation off 0: where all codes are as likely, codebook entropy has its maximum and no gradient
    z = ((torch.randn(bits, tokens, device=GPU) + 0.5) * deviation).T
    assert fused_entropy.usable(z) and not fused_entropy.usable(z.double())

    def terms_and_gradients(z):
        terms = lfq.entropy_terms(z.requires_grad_())
        return *terms, *(torch.autograd.grad(term, z, retain_graph=True)[0] for term in terms)

    for a, b in zip(terms_and_gradients(z.detach()), terms_and_gradients(z.double()), strict=True):
        assert a.dtype == torch.float32 and a.shape == b.shape
        assert relative(a, b) < 5e-6


def test_entropy_terms_of_a_global_batch(monkeypatch):
    """Two processes with the same tokens: what one has alone."""
    z = torch.randn(300, 12, device=GPU, requires_grad=True)

    def terms_and_gradient(global_batch):
        sample, codebook = lfq.entropy_terms(z, global_batch=global_batch)
        return sample, codebook, torch.autograd.grad(sample - codebook, z)[0]

    alone = terms_and_gradient(False)
    monkeypatch.setattr(lfq.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(lfq.dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(lfq.dist, "all_reduce", lambda total: total.mul_(2))
    for a, b in zip(terms_and_gradient(True), alone, strict=True):
        assert relative(a, b) < 1e-6


@pytest.mark.parametrize("kind, tolerance", [("soft", 1e-5), ("hard", 1e-2)])
def test_golden_entropy(kind, tolerance):
    golden = {name: value.to(GPU) for name, value in load(f"lfq_{kind}").items()}
    z = golden["x"].requires_grad_()
    _, _, ours = lfq.LFQ().train()(z)
    assert relative(ours["sample_entropy"], golden["per_sample_entropy"]) < 1e-6
    assert relative(ours["codebook_entropy"], golden["codebook_entropy"]) < 1e-6
    (gradient,) = torch.autograd.grad(ours["entropy"], z)
    assert relative(gradient, golden["grad_entropy_loss"]) < tolerance


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("size", ["tiny16", "tiny8", "256_L", "128_L"])
@torch.no_grad()
def test_golden_tokenizer(size, compiled):
    sizes = {"tiny16": tk.TokenizerConfig(32, (1, 1, 2, 2, 4), 1), "tiny8": tk.TokenizerConfig(32, (1, 2, 2, 4), 2)}
    golden = {name: value.to(GPU) for name, value in load(f"tokenizer_{size}").items()}
    model = fill(tk.Tokenizer(sizes.get(size) or tk.TOKENIZER_SIZES[size])).eval().to(GPU)
    if compiled:
        model.decoder.compile_upsamplers()
    assert relative(model.encoder(golden["image"]), golden["encoder_out"]) < 1e-5
    assert relative(model.decode(golden["indices"]), golden["reconstruction"]) < 1e-5


def test_lpips_compiled():
    golden = {name: value.to(GPU) for name, value in load("lpips_vgg").items()}
    lpips = losses.LPIPS("vgg")
    fill(lpips, "loss.perceptual_loss.", keep=("shift", "scale")).to(GPU).compile()
    assert relative(lpips(golden["image"], golden["other"]).flatten(), golden["distance"].flatten()) < 1e-5


def golden_transformer(name, config):
    model = ARTransformer(config)
    for entry, value in model.state_dict().items():
        value.copy_(named_tensor("transformer." + entry, tuple(value.shape)))
    return model.eval().to(GPU), {key: value.to(GPU) for key, value in load(name).items()}


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(
    "name, config, count",
    [
        ("gpt_tiny", TINY, 16),
        ("gpt_tiny_9_9", ARConfig(64, 2, 2, 1, (9, 9), grid=4, num_classes=10), 16),
        ("gpt_B", AR_SIZES["B"], 24),
    ],
)
@torch.no_grad()
def test_golden_transformer(name, config, count, compiled):
    model, golden = golden_transformer(name, config)
    if compiled:
        model.compile_blocks()
    pre, post = model([golden["index_pre"], golden["index_post"]], golden["class_label"])
    assert relative(pre[:, golden["positions"]], golden["logits_pre"]) < 1e-5
    assert relative(post[:, golden["positions"], :256], golden["logits_post"]) < 1e-5
    import fused_sampling

    assert fused_sampling.usable(model)
    drawn = model.generate(golden["class_label"], (1.9, 2.0), top_k=(1, 1), max_tokens=count)
    assert torch.equal(drawn, golden["argmax_cfg_pre"] + 2 ** config.factorized_bits[0] * golden["argmax_cfg_post"])


@pytest.mark.parametrize("compiled", [False, True])
def test_training_is_that_of_the_plain_code(compiled, monkeypatch):
    import fused_training

    model, golden = golden_transformer("gpt_tiny", dataclasses.replace(TINY, dropout=0.0))
    model.train().class_dropout = 0.0
    tokens = [golden["index_pre"], golden["index_post"]]

    def loss_and_gradients():
        model.zero_grad()
        loss = sum(cross_entropies(model(tokens, golden["class_label"]), tokens))
        loss.backward()
        return [loss.detach(), *(weight.grad for weight in model.parameters())]

    with monkeypatch.context() as patch:
        patch.setattr(fused_training, "ENABLED", False)
        plain = loss_and_gradients()
    if compiled:
        model.compile_blocks()
    for ours, theirs in zip(loss_and_gradients(), plain, strict=True):
        assert relative(ours, theirs) < 1e-5


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"cfg_scale": (1.9, 2.0), "temperature": (1.1, 0.9)},
        {"cfg_scale": (0.0, 2.0), "top_k": (5, 0), "top_p": (1.0, 0.8)},
    ],
)
def test_graph_draws_what_the_plain_code_draws(options, monkeypatch):
    import fused_sampling

    model, _ = golden_transformer("gpt_tiny", TINY)
    labels, seeds = torch.arange(7, device=GPU), range(7)
    first = model.generate(labels, seeds=seeds, **options)
    with torch.no_grad():  # the graph must not keep the old weights
        for weight in model.parameters():
            weight.mul_(1.3)
    ours = model.generate(labels, seeds=seeds, **options)
    monkeypatch.setattr(fused_sampling, "ENABLED", False)
    assert torch.equal(ours, model.generate(labels, seeds=seeds, **options))
    assert not torch.equal(ours, first)


@torch.no_grad()
def test_bfloat16_graph_keeps_the_distribution():
    """The graph's bf16 logits against float32 teacher forcing over the tokens drawn: 2,048 of AR-B, guided."""
    import fused_sampling

    images, scales = 8, (1.9, 2.0)
    model, _ = golden_transformer("gpt_B", AR_SIZES["B"])
    options = [(scale, 1.0, 0, 1.0) for scale in scales]
    decoder = fused_sampling.decoder_for(model, images, True, options, torch.bfloat16)
    labels = torch.cat([torch.arange(images, device=GPU) * 100, torch.full((images,), 1000, device=GPU)])
    decoder.generate(labels, image_uniforms(range(images), 256).to(GPU), 1)
    decoder.x.copy_(decoder.class_table(labels))
    decoder.position.zero_()
    steps = []
    for _ in range(256):
        decoder.graph.replay()
        steps.append([part.double() for part in decoder.logits])
    truth = model([part.repeat(2, 1) for part in decoder.drawn], labels)
    for part, scale in enumerate(scales):
        ours = torch.stack([step[part] for step in steps], 1)
        exact, ours = (guided(*logits.double().chunk(2), scale).log_softmax(-1) for logits in (truth[part], ours))
        divergence = (exact.exp() * (exact - ours)).sum(-1)
        # bf16 weights and products: 2e-4 and 4e-4 measured; a wrong product makes it some nats.
        assert 0 < divergence.mean() < 2e-3
