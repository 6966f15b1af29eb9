"""The image tokenizer of Open-MAGVIT2 (arXiv 2409.04410): convolutional encoder, LFQ, convolutional decoder.

    tokenizer = load_tokenizer("256_L")            # released name, a released or own file, or a run folder
    indices = tokenizer.encode(images)             # (B, 3, H, W) in [-1, 1] -> (B, h, w) in 0..2^K-1
    images = tokenizer.decode(indices)             # unclamped: clamp when you need pixels

Fully convolutional, no attention: any height and width that the factor f divides (16 for 256_L, 8 for 128_L). On a GPU
it is fastest as `tokenizer.to("cuda", memory_format=torch.channels_last)`.

Letters: B batch, K bits (latent channels), C channels, H W pixels, h w latent grid (h = H / f)."""

import re
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.nn.functional import silu

import fast
from checkpoint import entries_of, locate, match, read_weights
from lfq import LFQ, indices_to_codes
from norms import AdaptiveGroupNorm, group_norm, norm_silu
from runtime import UserError, reading
from video_tokenizer import VideoTokenizer


@dataclass(frozen=True)
class TokenizerConfig:
    """`channels` at full resolution; width of level i is channels * channel_multipliers[i]; the resolution halves
    between levels; `blocks_per_level` ResBlocks a level and in the middle; `bits` K, for 2^K codes."""

    channels: int = 128
    channel_multipliers: tuple = (1, 1, 2, 2, 4)
    blocks_per_level: int = 4
    bits: int = 18

    def __post_init__(self):
        object.__setattr__(self, "channel_multipliers", tuple(self.channel_multipliers))
        numbers = (self.channels, *self.channel_multipliers, self.blocks_per_level, self.bits)
        whole = all(type(n) is int and 1 <= n <= 10**6 for n in numbers) and 1 <= len(self.channel_multipliers) <= 10
        if not whole or self.channels % 32 or self.blocks_per_level > 100 or self.bits > 30:
            ranges = "channels must be a multiple of 32, multipliers and blocks must be at least 1"
            raise UserError(f"{ranges}, bits must be 1 to 30, with at most 10 levels of 100 blocks: {self}")

    @property
    def widths(self):
        return [self.channels * multiplier for multiplier in self.channel_multipliers]

    @property
    def factor(self):
        """Pixels a token, in each direction."""
        return 2 ** (len(self.channel_multipliers) - 1)


# 128_L and 256_L are the paper's. tiny is ours, for tests and first runs on a CPU.
TOKENIZER_SIZES = {
    "tiny": TokenizerConfig(32, (1, 2, 2, 2), 1),
    "128_L": TokenizerConfig(128, (1, 2, 2, 4), 4),
    "256_L": TokenizerConfig(128, (1, 1, 2, 2, 4), 4),
}
# Of a VideoTokenizer: video_128 is the released one. video_tiny, ours, is 64 wide: with 32 channels, each would be one
# of GroupNorm's 32 groups, which takes away much of the colours.
VIDEO_SIZES = {"video_tiny": TokenizerConfig(32, (2, 2), 1), "video_128": TokenizerConfig(128, (1, 2, 2, 4), 4)}

HUB = "https://huggingface.co/TencentARC"
RELEASED_TOKENIZERS = {
    "128_L": f"{HUB}/Open-MAGVIT2-Tokenizer-128-resolution/resolve/main/imagenet_128_L.ckpt",
    "256_L": f"{HUB}/Open-MAGVIT2-Tokenizer-256-resolution/resolve/main/imagenet_256_L.ckpt",
    "pretrain_256_16384": f"{HUB}/Open-MAGVIT2-Tokenizer-16384-Pretrain/resolve/main/pretrain256_16384.ckpt",
    "pretrain_256_262144": f"{HUB}/Open-MAGVIT2-Tokenizer-262144-Pretrain/resolve/main/pretrain256_262144.ckpt",
    "video_128": f"{HUB}/Open-MAGVIT2-Tokenizer-262144-Video/resolve/main/video_128_262144.ckpt",
}
RELEASED_AR = {n: f"{HUB}/Open-MAGVIT2-AR-{n}-256-resolution/resolve/main/AR_256_{n}.ckpt" for n in ("B", "L", "XL")}
RELEASED_AR["emoji"] = Path(__file__).with_name("weights") / "emoji64.pt"  # ours: small, of 64x64 emoji, in here
RELEASED = RELEASED_TOKENIZERS | RELEASED_AR  # transformers, too: each carries the tokenizer that it was trained with


# --- The network. Module names are those of the released files. -------------------------------------------------------
class ResBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))), (B, C_in, H, W) -> (B, C_out, H, W). No convolution has a bias."""

    def __init__(self, c_in, c_out):
        super().__init__()
        self.norm1 = group_norm(c_in)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1, bias=False)
        self.norm2 = group_norm(c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1, bias=False)
        self.nin_shortcut = nn.Conv2d(c_in, c_out, 1, bias=False) if c_in != c_out else nn.Identity()

    @fast.path("norm.res_block")
    def forward(self, x):
        y = self.conv1(silu(self.norm1(x)))
        y = self.conv2(silu(self.norm2(y)))
        return y + self.nin_shortcut(x)


def res_blocks(c_in, c_out, count):
    return nn.Sequential(*(ResBlock(c_in if i == 0 else c_out, c_out) for i in range(count)))


class Upsampler(nn.Module):
    """Doubles the resolution, (B, C, h, w) -> (B, C, 2 h, 2 w): conv to 4 C, then depth to space."""

    def __init__(self, channels):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 4 * channels, 3, padding=1)

    @fast.path("norm.upsampler")
    def forward(self, x):
        # Released weights: the 4 C channels are ordered (row, column, channel), not as in PixelShuffle.
        x = self.conv1(x).unflatten(1, (2, 2, -1))  # (B, row, column, C, h, w)
        return x.permute(0, 3, 4, 1, 5, 2).flatten(4, 5).flatten(2, 3)  # (B, C, h, row, w, column) -> (B, C, 2 h, 2 w)


class Encoder(nn.Module):
    """Images (B, 3, H, W) -> latents (B, K, h, w)."""

    def __init__(self, config):
        super().__init__()
        widths, blocks = config.widths, config.blocks_per_level
        incoming = [config.channels, *widths[:-1]]  # width that enters level i, coming from level i - 1
        self.conv_in = nn.Conv2d(3, config.channels, 3, padding=1, bias=False)
        self.down = nn.ModuleList()
        for i, width in enumerate(widths):
            level = nn.Sequential()
            level.block = res_blocks(incoming[i], width, blocks)
            if i < len(widths) - 1:
                level.downsample = nn.Conv2d(width, width, 3, stride=2, padding=1)
            self.down.append(level)
        self.mid_block = res_blocks(widths[-1], widths[-1], blocks)
        self.norm_out = group_norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], config.bits, 1)

    def forward(self, x):
        x = self.conv_in(x)  # (B, C, H, W)
        for level in self.down:
            x = level(x)  # (B, widths[i], H / 2^i, W / 2^i), halved at its end
        x = self.mid_block(x)  # (B, widths[-1], h, w)
        return self.conv_out(norm_silu(self.norm_out, x))  # (B, K, h, w)


class Decoder(nn.Module):
    """Quantized latents (B, K, h, w) -> images (B, 3, H, W), unclamped."""

    def __init__(self, config):
        super().__init__()
        widths, blocks = config.widths, config.blocks_per_level
        incoming = [*widths[1:], widths[-1]]  # width that enters level i, coming from level i + 1
        self.conv_in = nn.Conv2d(config.bits, widths[-1], 3, padding=1)
        self.mid_block = res_blocks(widths[-1], widths[-1], blocks)
        self.adaptive = nn.ModuleList(AdaptiveGroupNorm(width, config.bits) for width in incoming)
        self.up = nn.ModuleList()
        for i, width in enumerate(widths):
            level = nn.Sequential()
            level.block = res_blocks(incoming[i], width, blocks)
            if i > 0:
                level.upsample = Upsampler(width)
            self.up.append(level)
        self.norm_out = group_norm(widths[0])
        self.conv_out = nn.Conv2d(widths[0], 3, 3, padding=1)

    def forward(self, z):
        if z.shape[2] * z.shape[3] < 2:
            raise UserError("the decoder needs at least two tokens an image (it takes the variance over them)")
        x = self.mid_block(self.conv_in(z))  # (B, K, h, w) -> (B, widths[-1], h, w)
        for norm, level in zip(reversed(self.adaptive), reversed(self.up), strict=True):
            x = level(norm(x, z))  # (B, widths[i], H / 2^i, W / 2^i), doubled at its end
        return self.conv_out(norm_silu(self.norm_out, x))  # (B, 3, H, W)


class Tokenizer(nn.Module):
    """Encoder, quantizer, decoder. State-dict entries: the released `encoder.*` and `decoder.*`, no more.

    `forward(images)` -> (reconstruction (B, 3, H, W) unclamped, indices (B, h, w), losses of `lfq.LFQ`). Images are
    float NCHW in [-1, 1]; raises UserError where a side is no multiple of `factor`."""

    def __init__(self, config):
        super().__init__()
        self.config, self.factor = config, config.factor
        self.encoder = Encoder(config)
        self.quantizer = LFQ(config.bits)
        self.decoder = Decoder(config)

    def quantize(self, images):
        """Images -> (quantized (B, K, h, w), indices (B, h, w), losses)."""
        height, width = images.shape[2:]
        if height % self.factor or width % self.factor:
            raise UserError(f"image size {height}x{width} is not a multiple of {self.factor}, this tokenizer's factor")
        return self.quantizer(self.encoder(images))

    def encode(self, images):
        """(B, 3, H, W) in [-1, 1] -> indices (B, h, w), int64 in 0..2^K-1."""
        return self.quantize(images)[1]

    def decode(self, indices):
        """Indices (B, h, w) -> images (B, 3, H, W), about [-1, 1], unclamped."""
        codes = indices_to_codes(indices, self.config.bits, self.decoder.conv_in.weight.dtype)  # (B, h, w, K)
        return self.decoder(codes.movedim(-1, 1).contiguous())

    def forward(self, images):
        quantized, indices, losses = self.quantize(images)
        return self.decoder(quantized), indices, losses


# --- Reading files ----------------------------------------------------------------------------------------------------
def load_tokenizer(path_or_name, ema=True):
    """A Tokenizer in eval mode, on the CPU; a VideoTokenizer, if the entries are those of one ("video_128").
    path_or_name: a released name (of a tokenizer, "256_L", or of a transformer, "B", which carries the tokenizer that
    it was trained with), a released file, this project's own file or run folder, or a bare state dict of any of these.
    ema: the moving average of the weights, where the file has one; False: the training weights. Raises UserError naming
    the file and the entries at fault; nothing is ever loaded in part."""
    path = locate(path_or_name, RELEASED)
    with reading(path, "a tokenizer file"):
        content = read_weights(path)
        if isinstance(content, dict) and content.get("kind") in ("tokenizer", "ar"):
            return own_tokenizer(content, path, ema)
        return _released(entries_of(content, path), path, ema)


def own_tokenizer(content, path, ema=True):
    """The Tokenizer in this project's own file: of stage I, or of stage II, with the one that it was trained with."""
    try:
        if content["kind"] == "tokenizer":
            config, state = content["config"], content["tokenizer"]
            state = content.get("tokenizer_ema", state) if ema else state
        elif content["tokenizer"] is None:
            raise UserError("it is a transformer file that carries no tokenizer")
        else:
            config, state = content["tokenizer"]["config"], content["tokenizer"]["state"]
        config = TokenizerConfig(**config)
    except (KeyError, TypeError, UserError) as error:
        raise UserError(f"{path} is no whole file of this project: {error}") from None
    return tokenizer_from_entries(state, path, config)


# What else a released tokenizer file holds: LPIPS, and a discriminator (another one in those pretrained at scale).
_OF_TRAINING = re.compile(
    r"loss\.perceptual_loss\.(scaling_layer\.(shift|scale)|net\.slice[1-5]\.\d+\.(weight|bias)|lin[0-4]\.model\.1\.weight)"
    r"|loss\.discriminator\.main\.\d+\.(weight|bias|running_mean|running_var|num_batches_tracked)"
    r"|loss\.discriminator\.(block_in\.0|blocks\.[0-2]\.[0-2]|to_logits\.[02])\.(weight|bias|kernel)"
)


def _released(entries, source, ema):
    """The Tokenizer of a released file, or of a bare state dict."""
    if carried := entries_under("first_stage_model.", entries):  # by a transformer
        return tokenizer_from_entries(carried, source)
    weights = {name: value for name, value in entries.items() if name.startswith(("encoder.", "decoder."))}
    for name in entries:
        if not (name in weights or name.startswith("model_ema.") or _OF_TRAINING.fullmatch(name)):
            raise UserError(f"{source} is no tokenizer file: entry {name} is unexpected")
    tokenizer, averages = tokenizer_from_entries(weights, source), entries_under("model_ema.", entries)
    if ema and not averages:
        warnings.warn(f"{source} holds no moving average (model_ema.*): its weights are used as they stand")
    elif ema:
        # Released files: an average is named like its parameter with every dot removed.
        trained = [name for name in entries if re.fullmatch(r"loss\.discriminator\..*\.(weight|bias)", name)]
        expected = {name.replace(".", ""): entries[name] for name in (*weights, *trained)}
        averages = {name: value for name, value in averages.items() if name not in ("decay", "num_updates")}
        match(averages, expected, f"{source} (under model_ema.)", "the moving average of its weights")
        tokenizer = tokenizer_from_entries({name: averages[name.replace(".", "")] for name in weights}, source)
    return tokenizer


def entries_under(prefix, entries):
    """The entries whose names begin with `prefix`, without it."""
    return {name.removeprefix(prefix): value for name, value in entries.items() if name.startswith(prefix)}


def tokenizer_from_entries(entries, source, config=None):
    """A Tokenizer or VideoTokenizer, in eval mode, from its `encoder.*` and `decoder.*` entries, whose names and shapes
    tell which and of what size. Raises UserError naming `source`, the entries at fault and the size."""
    video = any(".conv_1." in str(name) for name in entries)
    config = config or config_of(entries, source, video)
    kind, sizes = (VideoTokenizer, VIDEO_SIZES) if video else (Tokenizer, TOKENIZER_SIZES)
    return model_from_entries(kind, config, sizes, entries, source, "tokenizer")


def model_from_entries(model_class, config, sizes, entries, source, what):
    """A model in eval mode, float32, whose state dict is `entries`. sizes: the configurations that have a name."""
    with torch.device("meta"):  # spends no time and no memory on weights that are replaced at once
        model = model_class(config)
    size = next((name for name, size in sizes.items() if size == config), config)
    match(entries, model.state_dict(), source, f"the {size} {what}")
    model.load_state_dict({name: value.float() for name, value in entries.items()}, assign=True)
    return model.eval()


def config_of(entries, source, video=False):
    """The TokenizerConfig that the entries' names and shapes spell out."""

    def width(name):  # of a convolution's output
        name += ".conv_1.weight" if video else ".weight"
        value = entries.get(name)
        if not isinstance(value, torch.Tensor) or value.ndim < 4 or value.numel() == 0:
            found = f"has shape {tuple(value.shape)}" if isinstance(value, torch.Tensor) else "is missing, or no tensor"
            raise UserError(f"{source} holds no tokenizer: entry {name} {found}")
        return len(value)

    def count(prefix):  # of the numbers behind it
        return len({name.split(".")[0] for name in entries_under(prefix, entries)})

    channels, bits = width("encoder.conv_in"), width("encoder.conv_out")
    multipliers = [width(f"encoder.down.{i}.block.0.conv1") // channels for i in range(count("encoder.down."))]
    try:
        return TokenizerConfig(channels, multipliers, count("encoder.down.0.block."), bits)
    except UserError as error:
        raise UserError(f"{source} holds no tokenizer: {error}") from None
