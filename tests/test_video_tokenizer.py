"""The video tokenizer, its discriminator and its losses: golden files, the released names, inflation, plain twins."""

import copy
import dataclasses
import itertools

import pytest
import torch
import torch.nn.functional as F
from golden_files import checkpoint_keys, fill, load, named_tensor, relative

import losses
import tokenizer as tk
from losses import LPIPS, LeCAM, PatchDiscriminator3D
from runtime import UserError
from tokenizer import Tokenizer, TokenizerConfig, load_tokenizer
from video_tokenizer import VideoTokenizer, inflate

TINY8 = TokenizerConfig(32, (1, 2, 2, 4), 1)
SMALL = TokenizerConfig(32, (1, 2, 1), 1)  # halves time between its last two levels
FILE = "video_128_262144.ckpt"


def empty(model_class, config):
    """The module without the cost of random initialisation."""
    with torch.device("meta"):
        module = model_class(config)
    return module.to_empty(device="cpu").eval()


@pytest.fixture(scope="module")
def tiny8():
    return fill(empty(VideoTokenizer, TINY8))


@pytest.mark.parametrize("frames", [17, 5, 1])
@torch.no_grad()
def test_golden(tiny8, frames):
    golden = {name.split("_")[0]: value for name, value in load("video_tiny8").items() if name.endswith(f"_{frames}")}
    assert relative(tiny8.encoder(golden["x"]), golden["z"]) < 1e-5
    reconstruction, indices, _ = tiny8(golden["x"])
    assert torch.equal(indices, golden["indices"])
    assert relative(reconstruction, golden["y"]) < 1e-5
    assert relative(tiny8.decode(tiny8.encode(golden["x"])), golden["y"]) < 1e-5


def test_sizes_and_entries():
    with torch.device("meta"):
        model = VideoTokenizer(tk.VIDEO_SIZES["video_128"])
    for part, count in ((model.encoder, 144.865e6), (model.decoder, 225.682e6)):
        assert sum(p.numel() for p in part.parameters()) == pytest.approx(count, abs=5e2)
    released = {name: shape for name, (shape, _) in checkpoint_keys(FILE).items()}
    assert len(released) == 636
    ours = {k: tuple(v.shape) for k, v in model.state_dict().items()}
    ours |= {f"loss.discriminator.{k}": tuple(v.shape) for k, v in PatchDiscriminator3D().state_dict().items()}
    ours |= {f"loss.perceptual_loss.{k}": tuple(v.shape) for k, v in LPIPS().state_dict().items()}
    assert ours == {name: shape for name, shape in released.items() if not name.startswith("model_ema.")}


@pytest.mark.parametrize("multipliers", [(1, 2, 2, 4), (2, 2), (1, 1, 2), (2, 1, 1)])
@torch.no_grad()
def test_frames_that_come_back(multipliers):
    """Halving n frames leaves (n + 1) // 2, doubling them 2 n - 1; the model itself does as its two functions say."""
    model = VideoTokenizer(TokenizerConfig(32, multipliers, 1)).eval()
    halvings = sum(multiplier != 1 for multiplier in multipliers[:-1])
    for frames in range(1, 12):
        latent = frames
        for _ in range(halvings):
            latent = (latent + 1) // 2
        rebuilt = latent
        for _ in range(halvings):
            rebuilt = 2 * rebuilt - 1
        assert (model.latent_frames(frames), model.rebuilt_frames(frames)) == (latent, rebuilt)
        if frames in (1, 4, 6):
            y, indices, _ = model(torch.zeros(1, 3, frames, 2 * model.factor, model.factor))
            assert indices.shape == (1, latent, 2, 1)
            assert y.shape == (1, 3, rebuilt, 2 * model.factor, model.factor)


def test_the_released_factors():
    with torch.device("meta"):
        model = VideoTokenizer(tk.VIDEO_SIZES["video_128"])
    assert (model.time_factor, model.factor) == (4, 8)
    assert [model.rebuilt_frames(t) for t in (1, 2, 3, 4, 5, 9, 16, 17)] == [1, 1, 1, 1, 5, 9, 13, 17]


@torch.no_grad()
def test_convolutions_see_no_later_frame(tiny8):
    """Output frame t of a stride of 2 sees the input frames 2 t - 2 to 2 t."""
    down = tiny8.encoder.down[1].downsample
    x = torch.randn(1, 64, 9, 4, 4)
    for frame in range(9):
        changed = x.clone()
        changed[:, :, frame] += 1
        differ = (down(changed) != down(x)).any(1).flatten(2).any(2)[0].nonzero().flatten().tolist()
        assert differ == [t for t in range(5) if 2 * t - 2 <= frame <= 2 * t]


def test_wrong_sizes(tiny8):
    with pytest.raises(UserError, match="60x64 is not a multiple of 8"):
        tiny8(torch.zeros(1, 3, 5, 60, 64))
    with pytest.raises(UserError, match="two tokens"):
        tiny8(torch.zeros(1, 3, 1, 8, 8))
    with pytest.raises(UserError, match="videos, and takes no images"):
        tiny8.encode(torch.zeros(1, 3, 64, 64))


# Reading ---------------------------------------------------------------------------------------------------


def test_the_released_file_by_its_name(tmp_path, monkeypatch):
    """Out of the hub's cache: every entry is known, and goes to its own place; the moving average unless asked."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    path = tmp_path / "hub" / "checkpoints" / FILE
    path.parent.mkdir(parents=True)
    entries = {}
    for name, (shape, dtype) in checkpoint_keys(FILE).items():
        entries[name] = named_tensor(name, (1,) * bool(shape)).to(dtype).expand(shape)  # a constant by its name
    torch.save({"state_dict": entries}, path)
    hub = "https://huggingface.co/TencentARC/Open-MAGVIT2-Tokenizer-262144-Video/resolve/main/"
    assert tk.RELEASED_TOKENIZERS["video_128"] == hub + FILE
    for ema in (True, False):
        model = load_tokenizer("video_128", ema=ema)
        assert type(model) is VideoTokenizer and model.config == tk.VIDEO_SIZES["video_128"] and not model.training
        for entry, value in model.state_dict().items():
            due = named_tensor("model_ema." + entry.replace(".", "") if ema else entry, (1,))
            assert torch.equal(value, due.expand(value.shape)), entry
    del entries["encoder.mid_block.1.conv2.conv_1.weight"], entries["model_ema.encodermid_block1conv2conv_1weight"]
    torch.save({"state_dict": entries}, path)
    with pytest.raises(
        UserError, match="the video_128 tokenizer: entry encoder.mid_block.1.conv2.conv_1.weight is mis"
    ):
        load_tokenizer(path)


def test_own_files(tmp_path):
    """A run's file and a bare state dict: told from an image tokenizer's by their entries."""
    model = VideoTokenizer(SMALL)
    average = {name: value + 1 for name, value in model.state_dict().items()}
    content = {"kind": "tokenizer", "config": dataclasses.asdict(SMALL), "tokenizer": model.state_dict()}
    torch.save(content | {"tokenizer_ema": average}, tmp_path / "step_00000003.pt")
    torch.save(model.state_dict(), tmp_path / "bare.pt")
    for source, ema, state in (
        (tmp_path, True, average),
        (tmp_path, False, model.state_dict()),
        (tmp_path / "bare.pt", False, model.state_dict()),
    ):
        loaded = load_tokenizer(source, ema=ema)
        assert type(loaded) is VideoTokenizer and loaded.config == SMALL
        assert all(torch.equal(value, state[name]) for name, value in loaded.state_dict().items())


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda s: s.pop("encoder.conv_in.conv_1.weight"), "entry encoder.conv_in.conv_1.weight is missing"),
        (lambda s: s.update({"encoder.conv_in.weight": torch.ones(1)}), "entry encoder.conv_in.weight is unexpected"),
        (lambda s: s.update({"encoder.conv_in.conv_1.weight": torch.ones(32, 3, 3, 3)}), r"conv_in.* \(32, 3, 3, 3\)"),
    ],
)
def test_a_wrong_entry_is_named(tmp_path, change, words):
    state = VideoTokenizer(SMALL).state_dict()
    change(state)
    torch.save(state, tmp_path / "x.pt")
    with pytest.raises(UserError, match=f"x.pt .*{words}"):
        load_tokenizer(tmp_path / "x.pt", ema=False)


# Inflation -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 3e-6), (torch.float64, 1e-14)])  # on most CPUs 0
@pytest.mark.parametrize("config", [TINY8, SMALL, tk.VIDEO_SIZES["video_tiny"]], ids=str)
@torch.no_grad()
def test_inflated_one_frame_is_the_image(config, dtype, tolerance):
    image_model = fill(empty(Tokenizer, config))
    model, image_model = inflate(image_model).to(dtype), image_model.to(dtype)
    images = torch.rand(2, 3, 32, 32, dtype=dtype) * 2 - 1
    y, indices, _ = model(images[:, :, None])
    image_y, image_indices, _ = image_model(images)
    assert torch.equal(indices[:, 0], image_indices)
    assert relative(y[:, :, 0], image_y) < tolerance


def test_inflated_entries():
    """One by one: each where the released video file has it (this is 128_L, 32 wide instead of 128)."""
    image_model = empty(Tokenizer, TokenizerConfig(32, (1, 2, 2, 4), 4))
    image_state = image_model.state_dict()
    for i, value in enumerate(image_state.values(), 1):
        value.fill_(i)
    state = inflate(image_model).state_dict()
    assert set(state) == {name for name in checkpoint_keys(FILE) if name[:7] in ("encoder", "decoder")}
    for name, value in state.items():
        due = image_state[name.replace("conv_1.", "")].flatten()[0]
        if value.ndim == 5:
            assert (value[:, :, -1] == due).all() and (value[:, :, :-1] == 0).all()
        else:
            assert (value == due).all()


def test_inflated_upsampler():
    """The image's output channels twice over: those of the first and of the second of each two frames."""
    image_model = fill(empty(Tokenizer, SMALL))
    image_state, state = image_model.state_dict(), inflate(image_model).state_dict()
    for level, copies in ((1, 1), (2, 2)):
        weight, bias = (image_state[f"decoder.up.{level}.upsample.conv1.{part}"] for part in ("weight", "bias"))
        inflated = f"decoder.up.{level}.upsample.conv1.conv_1"
        assert torch.equal(state[f"{inflated}.weight"][:, :, 2], weight.repeat(copies, 1, 1, 1))
        assert torch.equal(state[f"{inflated}.bias"], bias.repeat(copies))


# Discriminator and losses ----------------------------------------------------------------------------------


def discriminator_filled():
    return fill(PatchDiscriminator3D(), "loss.discriminator.").train()


@torch.no_grad()
def test_golden_discriminator():
    golden = load("disc3d")
    assert relative(discriminator_filled()(golden["x"]), golden["logits"]) < 1e-5


def test_discriminator_sizes_and_initialisation():
    discriminator = PatchDiscriminator3D()
    assert sum(p.numel() for p in discriminator.parameters()) == 4_665_729
    with torch.device("meta"):
        assert PatchDiscriminator3D()(torch.zeros(1, 3, 17, 128, 128)).shape == (1, 1, 5, 16, 16)
    for i in (0, 2, 5, 8, 11):
        assert discriminator.main[i].weight.std().item() == pytest.approx(0.02, rel=0.05)
    for i in (3, 6, 9):
        assert discriminator.main[i].weight.mean().item() == pytest.approx(1, abs=0.01)
        assert discriminator.main[i].weight.std().item() == pytest.approx(0.02, rel=0.25)


@pytest.fixture(scope="module")
def lpips():
    return fill(LPIPS(), "loss.perceptual_loss.", keep=("scaling_layer.shift", "scaling_layer.scale"))


QUANTIZER = {"entropy": -2.5, "sample_entropy": 0.0, "codebook_entropy": 2.5, "commitment": 0.3}
QUANTIZER = {name: torch.tensor(value) for name, value in QUANTIZER.items()}


@torch.no_grad()
def test_golden_objective(lpips):
    """Three steps of both losses on one pair of clips."""
    golden = load("video_losses")
    discriminator, lecam, x = discriminator_filled(), LeCAM(), golden["x"]
    for step, scale in enumerate((1, 0.9, 0.8)):
        y = golden["reconstruction"] * scale
        loss, terms = losses.generator_loss(x, y, QUANTIZER, lpips, discriminator, gan_weight=0.3)
        d_loss, d_terms = losses.discriminator_loss(discriminator(x), discriminator(y), lecam, 0.05)
        lecam.advance(d_terms["logits_real"], d_terms["logits_fake"])
        nll = terms["l1"] + terms["lpips"]
        ours = [loss, nll, terms["lpips"], 0.3 * terms["gan"], d_loss, d_terms["lecam"], d_terms["hinge"]]
        ours = torch.stack([*ours, d_terms["logits_real"], d_terms["logits_fake"]]).double()
        assert torch.allclose(ours, golden["table"][step], rtol=1e-5, atol=0)
    assert torch.allclose(torch.stack([lecam.real, lecam.fake]).double(), golden["lecam"], rtol=1e-5, atol=0)


def test_golden_gradient(lpips):
    """In float64: in float32, rounding decides on which side of LeakyReLU's corner some of the discriminator's units
    lie, and so on 0.4 % of the gradient."""
    golden = {name: value.double() for name, value in load("video_losses").items()}
    y = golden["reconstruction"].requires_grad_()
    lpips, discriminator = copy.deepcopy(lpips).double(), discriminator_filled().double()
    loss, _ = losses.generator_loss(golden["x"], y, QUANTIZER, lpips, discriminator, gan_weight=0.3)
    assert relative(torch.autograd.grad(loss, y)[0], golden["grad"]) < 1e-5


# A trajectory against plain functions in float64 -----------------------------------------------------------


def plain_tokenizer(p, x, multipliers, bits):
    """Reconstruction and the quantizer's losses by the parameters `p` and the published text, one block a level."""
    strides = [1 if multiplier == 1 else 2 for multiplier in multipliers[:-1]]

    def conv(name, x, stride=1):
        weight = p[f"{name}.conv_1.weight"]
        side = weight.shape[3] // 2
        x = F.pad(x, (side, side, side, side, weight.shape[2] - 1, 0))
        return F.conv3d(x, weight, p.get(f"{name}.conv_1.bias"), stride)

    def norm_silu(name, x):
        x = F.group_norm(x, 32, p[f"{name}.weight"], p[f"{name}.bias"], 1e-6)
        return x / (1 + (-x).exp())

    def block(name, x):
        y = conv(f"{name}.conv1", norm_silu(f"{name}.norm1", x))
        y = conv(f"{name}.conv2", norm_silu(f"{name}.norm2", y))
        return y + (conv(f"{name}.nin_shortcut", x) if f"{name}.nin_shortcut.conv_1.weight" in p else x)

    def upsample(name, x, r):
        x = conv(f"{name}.conv1", x)
        batch, channels, frames, height, width = x.shape
        channels //= 4 * r
        y = x.new_zeros(batch, channels, r * frames, 2 * height, 2 * width)
        for dt, dy, dx in itertools.product(range(r), range(2), range(2)):
            first = ((dt * 2 + dy) * 2 + dx) * channels
            y[:, :, dt::r, dy::2, dx::2] = x[:, first : first + channels]
        return y[:, :, [frame for frame in range(r * frames) if r == 1 or frame != 1]]

    x = conv("encoder.conv_in", x)
    for i in range(len(multipliers)):
        x = block(f"encoder.down.{i}.block.0", x)
        if i < len(strides):
            x = conv(f"encoder.down.{i}.downsample", x, (strides[i], 2, 2))
    z = conv("encoder.conv_out", norm_silu("encoder.norm_out", block("encoder.mid_block.0", x)))

    tokens = z.permute(0, 2, 3, 4, 1).reshape(-1, bits)
    codes = z.new_tensor(list(itertools.product((-1, 1), repeat=bits)))
    assignment = (2 * tokens @ codes.T / 0.01).log_softmax(1)
    mean = assignment.exp().mean(0)
    entropy = -(assignment.exp() * assignment).sum(1).mean() + (mean * (mean + 1e-5).log()).sum()
    signs = z.sign().detach()
    q = z + signs - z.detach()

    x = block("decoder.mid_block.0", conv("decoder.conv_in", q))
    variance, mean = q.flatten(2).var(2, unbiased=True), q.flatten(2).mean(2)
    for i in reversed(range(len(multipliers))):
        name = f"decoder.adaptive.{i}"
        scale = F.linear((variance + 1e-6).sqrt(), p[f"{name}.gamma.weight"], p[f"{name}.gamma.bias"])
        bias = F.linear(mean, p[f"{name}.beta.weight"], p[f"{name}.beta.bias"])
        x = F.group_norm(x, 32, eps=1e-6) * scale[..., None, None, None] + bias[..., None, None, None]
        x = block(f"decoder.up.{i}.block.0", x)
        if i > 0:
            x = upsample(f"decoder.up.{i}.upsample", x, strides[i - 1])
    y = conv("decoder.conv_out", norm_silu("decoder.norm_out", x))
    return y, entropy, (z - signs).square().mean()


def test_three_steps_are_those_of_plain_functions():
    """Losses, weights and averages. Clips of 6 frames, of which 5 come back. LPIPS and D are left to golden files."""
    config = TokenizerConfig(64, (1, 2, 1), 1, bits=6)
    tokenizer = VideoTokenizer(config).double()
    average = copy.deepcopy(tokenizer)
    optimizer = torch.optim.Adam(tokenizer.parameters(), 1e-3, betas=(0.5, 0.9))
    plain = {name: p.detach().clone().requires_grad_() for name, p in tokenizer.named_parameters()}
    plain_average = {name: p.detach().clone() for name, p in plain.items()}
    first, second = ({name: torch.zeros_like(p) for name, p in plain_average.items()} for _ in range(2))
    for step in (1, 2, 3):
        x = torch.rand(2, 3, 6, 8, 8, dtype=torch.float64) * 2 - 1

        y, _, quantizer = tokenizer(x)
        loss, _ = losses.generator_loss(x[:, :, : tokenizer.rebuilt_frames(6)], y, quantizer)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.update_ema(list(average.parameters()), list(tokenizer.parameters()))

        y, entropy, commitment = plain_tokenizer(plain, x, config.channel_multipliers, config.bits)
        plain_loss = (x[:, :, :5] - y).abs().mean() + 0.1 * entropy + 0.25 * commitment
        assert loss.item() == pytest.approx(plain_loss.item(), rel=1e-9)
        for name, gradient in zip(plain, torch.autograd.grad(plain_loss, list(plain.values())), strict=True):
            first[name] = 0.5 * first[name] + 0.5 * gradient
            second[name] = 0.9 * second[name] + 0.1 * gradient**2
            deviation = (second[name] / (1 - 0.9**step)).sqrt() + 1e-8
            plain[name].data -= 1e-3 * first[name] / (1 - 0.5**step) / deviation
            plain_average[name] = 0.999 * plain_average[name] + 0.001 * plain[name].data
    for ours, theirs in ((tokenizer, plain), (average, plain_average)):
        for name, parameter in ours.named_parameters():
            assert relative(parameter, theirs[name].detach()) < 1e-8, name
