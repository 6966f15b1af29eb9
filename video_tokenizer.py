"""The video tokenizer of Open-MAGVIT2 (its code of 2025-02; arXiv 2409.04410 has images only): tokenizer.py made 3D.

    tokenizer = load_tokenizer("video_128")        # of tokenizer.py: it opens the files of either kind
    indices = tokenizer.encode(clips)              # (B, 3, T, H, W) in [-1, 1] -> (B, t, h, w) in 0..2^K-1
    clips = tokenizer.decode(indices)              # unclamped: clamp when you need pixels

For video_128, 17 x 128 x 128 pixels are 5 x 16 x 16 tokens. Any height and width that the factor f divides (8), any T;
but only T = 1 + a multiple of the factor in time (4) comes back whole, see `rebuilt_frames`. Convolutions see no later
frame; normalizations span all frames, so a frame's tokens do depend on later ones.

Letters: B batch, K bits (latent channels), C channels, T H W frames and pixels, t h w latent grid (h = H / f)."""

import math

import torch
from torch import nn
from torch.nn.functional import pad

import fast
from lfq import LFQ, indices_to_codes
from norms import AdaptiveGroupNorm, group_norm, norm_silu
from runtime import UserError


def time_strides(config):
    """What each level but the last divides the number of frames by: 1 where its multiplier is 1, otherwise 2."""
    return [1 if multiplier == 1 else 2 for multiplier in config.channel_multipliers[:-1]]


# --- The network. Module names are those of the released file. --------------------------------------------------------
class CausalConv(nn.Module):
    """Conv3d that sees no later frame: zeros surround height and width, but in time all come before the first frame."""

    def __init__(self, c_in, c_out, kernel, stride=1, bias=True):
        super().__init__()
        self.frames_before, side = kernel - 1, kernel // 2
        self.conv_1 = nn.Conv3d(c_in, c_out, kernel, stride, padding=(0, side, side), bias=bias)

    def forward(self, x):
        return self.conv_1(pad(x, (0, 0, 0, 0, self.frames_before, 0)))  # (width, height, time)


class ResBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))), (B, C_in, T, H, W) -> (B, C_out, T, H, W). No conv has a bias."""

    def __init__(self, c_in, c_out):
        super().__init__()
        self.norm1 = group_norm(c_in)
        self.conv1 = CausalConv(c_in, c_out, 3, bias=False)
        self.norm2 = group_norm(c_out)
        self.conv2 = CausalConv(c_out, c_out, 3, bias=False)
        self.nin_shortcut = CausalConv(c_in, c_out, 1, bias=False) if c_in != c_out else nn.Identity()

    @fast.path("norm.video_res_block")
    def forward(self, x):
        y = self.conv1(norm_silu(self.norm1, x))
        y = self.conv2(norm_silu(self.norm2, y))
        return y + self.nin_shortcut(x)


def res_blocks(c_in, c_out, count):
    return nn.Sequential(*(ResBlock(c_in if i == 0 else c_out, c_out) for i in range(count)))


class Upsampler(nn.Module):
    """Doubles the resolution, (B, C, t, h, w) -> (B, C, t, 2 h, 2 w), or with time_stride 2 (B, C, 2 t - 1, 2 h, 2 w):
    conv to more channels, then depth to space."""

    def __init__(self, channels, time_stride):
        super().__init__()
        self.time_stride = time_stride
        self.conv1 = CausalConv(channels, 4 * time_stride * channels, 3)

    @fast.path("norm.video_upsampler")
    def forward(self, x):
        # Released weights: the convolution's channels are ordered (time, row, column, channel).
        x = self.conv1(x).unflatten(1, (self.time_stride, 2, 2, -1))  # (B, time, row, column, C, t, h, w)
        x = x.permute(0, 4, 5, 1, 6, 2, 7, 3)  # (B, C, t, time, h, row, w, column)
        x = x.flatten(6, 7).flatten(4, 5).flatten(2, 3)  # (B, C, t or 2 t, 2 h, 2 w)
        # Of doubled frames the second one is dropped: the first frame stands for itself alone.
        return x if self.time_stride == 1 else torch.cat([x[:, :, :1], x[:, :, 2:]], 2)


class Encoder(nn.Module):
    """Clips (B, 3, T, H, W) -> latents (B, K, t, h, w)."""

    def __init__(self, config):
        super().__init__()
        widths, blocks, strides = config.widths, config.blocks_per_level, time_strides(config)
        incoming = [config.channels, *widths[:-1]]  # width that enters level i, coming from level i - 1
        self.conv_in = CausalConv(3, config.channels, 3, bias=False)
        self.down = nn.ModuleList()
        for i, width in enumerate(widths):
            level = nn.Sequential()
            level.block = res_blocks(incoming[i], width, blocks)
            if i < len(widths) - 1:
                level.downsample = CausalConv(width, width, 3, stride=(strides[i], 2, 2))
            self.down.append(level)
        self.mid_block = res_blocks(widths[-1], widths[-1], blocks)
        self.norm_out = group_norm(widths[-1])
        self.conv_out = CausalConv(widths[-1], config.bits, 1)

    def forward(self, x):
        x = self.conv_in(x)  # (B, C, T, H, W)
        for level in self.down:
            x = level(x)  # (B, widths[i], n, H / 2^i, W / 2^i), halved at its end; n frames to n or (n + 1) // 2
        x = self.mid_block(x)  # (B, widths[-1], t, h, w)
        return self.conv_out(norm_silu(self.norm_out, x))  # (B, K, t, h, w)


class Decoder(nn.Module):
    """Quantized latents (B, K, t, h, w) -> clips (B, 3, T, H, W), unclamped, with T = 1 + (t - 1) * factor in time."""

    def __init__(self, config):
        super().__init__()
        widths, blocks, strides = config.widths, config.blocks_per_level, time_strides(config)
        incoming = [*widths[1:], widths[-1]]  # width that enters level i, coming from level i + 1
        self.conv_in = CausalConv(config.bits, widths[-1], 3)
        self.mid_block = res_blocks(widths[-1], widths[-1], blocks)
        self.adaptive = nn.ModuleList(AdaptiveGroupNorm(width, config.bits) for width in incoming)
        self.up = nn.ModuleList()
        for i, width in enumerate(widths):
            level = nn.Sequential()
            level.block = res_blocks(incoming[i], width, blocks)
            if i > 0:
                level.upsample = Upsampler(width, strides[i - 1])
            self.up.append(level)
        self.norm_out = group_norm(widths[0])
        self.conv_out = CausalConv(widths[0], 3, 3)

    def forward(self, z):
        if z.shape[2:].numel() < 2:
            raise UserError("the decoder needs at least two tokens a clip (it takes the variance over them)")
        x = self.mid_block(self.conv_in(z))  # (B, K, t, h, w) -> (B, widths[-1], t, h, w)
        for norm, level in zip(reversed(self.adaptive), reversed(self.up), strict=True):
            x = level(norm(x, z))  # (B, widths[i], n, H / 2^i, W / 2^i), doubled at its end; n frames to n or 2 n - 1
        return self.conv_out(norm_silu(self.norm_out, x))  # (B, 3, T, H, W)


class VideoTokenizer(nn.Module):
    """Encoder, quantizer, decoder. State-dict entries: the released `encoder.*` and `decoder.*`, no more.

    `forward(clips)` -> (reconstruction (B, 3, rebuilt_frames(T), H, W) unclamped: the first frames of the clip; indices
    (B, t, h, w); losses of `lfq.LFQ`). Clips are float (B, 3, T, H, W) in [-1, 1]; raises UserError where a side is no
    multiple of `factor`, and for images."""

    def __init__(self, config):
        super().__init__()
        self.config, self.factor, self.time_factor = config, config.factor, math.prod(time_strides(config))
        self.encoder = Encoder(config)
        self.quantizer = LFQ(config.bits)
        self.decoder = Decoder(config)

    def latent_frames(self, frames):
        """t of a clip of T frames."""
        return 1 + (frames - 1) // self.time_factor

    def rebuilt_frames(self, frames):
        """How many of a clip's T frames come back: the last (T - 1) % time_factor are lost."""
        return frames - (frames - 1) % self.time_factor

    def quantize(self, clips):
        """Clips -> (quantized (B, K, t, h, w), indices (B, t, h, w), losses)."""
        if clips.ndim != 5:
            raise UserError("this is a tokenizer of videos, and takes no images")
        height, width = clips.shape[3:]
        if height % self.factor or width % self.factor:
            raise UserError(f"frame size {height}x{width} is not a multiple of {self.factor}, this tokenizer's factor")
        return self.quantizer(self.encoder(clips))

    def encode(self, clips):
        """(B, 3, T, H, W) in [-1, 1] -> indices (B, t, h, w), int64 in 0..2^K-1."""
        return self.quantize(clips)[1]

    def decode(self, indices):
        """Indices (B, t, h, w) -> clips (B, 3, T, H, W), about [-1, 1], unclamped; T = 1 + (t - 1) * time_factor."""
        dtype = self.decoder.conv_in.conv_1.weight.dtype
        codes = indices_to_codes(indices, self.config.bits, dtype)  # (B, t, h, w, K)
        return self.decoder(codes.movedim(-1, 1).contiguous())

    def forward(self, clips):
        quantized, indices, losses = self.quantize(clips)
        return self.decoder(quantized), indices, losses

    def rebuild(self, clips, frames=17):
        """Clips of any T -> (reconstruction (B, 3, T, H, W), indices (B, t, h, w)), in windows of `frames` frames, each
        coded by itself. A window that would lose frames is first lengthened by copies of its last one."""
        parts, indices = [], []
        for x in clips.split(frames, 2):  # (B, 3, frames or fewer, H, W)
            y, i, _ = self(pad(x, (0, 0, 0, 0, 0, (1 - x.shape[2]) % self.time_factor), "replicate"))
            parts.append(y[:, :, : x.shape[2]])
            indices.append(i)
        return torch.cat(parts, 2), torch.cat(indices, 1)


# --- The start of training --------------------------------------------------------------------------------------------
def inflate(tokenizer):
    """The VideoTokenizer, in eval mode, that does with one frame what this image Tokenizer does. The released one was
    trained from 128_L, its moving average from 128_L's."""
    inflated, image_state = VideoTokenizer(tokenizer.config).eval(), tokenizer.state_dict()
    video_state = {}
    for name, value in inflated.state_dict().items():
        weight = image_state[name.replace(".conv_1.", ".")]
        weight = torch.cat([weight] * (len(value) // len(weight)))  # twice for an Upsampler that doubles frames
        if value.ndim == 5:  # (C_out, C_in, h, w) -> (C_out, C_in, t, h, w): sees the frame, nothing of those before it
            weight = pad(weight[:, :, None], (0, 0, 0, 0, value.shape[2] - 1, 0))
        video_state[name] = weight
    inflated.load_state_dict(video_state)
    return inflated
