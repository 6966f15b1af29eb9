"""The normalizations of both tokenizers' networks (tokenizer.py, video_tokenizer.py).

Letters: B batch, C channels, K bits; `...` stands for the pixels, (H, W) of images or (T, H, W) of clips, over all of
which a norm goes."""

import torch
from torch import nn
from torch.nn.functional import silu

import fast


def group_norm(channels, affine=True):
    return nn.GroupNorm(32, channels, eps=1e-6, affine=affine)


@fast.path("norm.norm_silu")
def norm_silu(norm, x):
    return silu(norm(x))


class AdaptiveGroupNorm(nn.Module):
    """GroupNorm of x (B, C, ...) whose scale and bias come from the deviation and the mean, over pixels, of each
    channel of the quantized latent z (B, K, ...)."""

    def __init__(self, channels, bits):
        super().__init__()
        self.norm = group_norm(channels, affine=False)
        self.gamma = nn.Linear(bits, channels)
        self.beta = nn.Linear(bits, channels)

    def forward(self, x, z):
        z = z.to(torch.promote_types(z.dtype, torch.float32)).flatten(2)  # (B, K, pixels)
        scale = self.gamma((z.var(2, unbiased=True) + 1e-6).sqrt())  # (B, K) -> (B, C)
        bias = self.beta(z.mean(2))  # (B, K) -> (B, C)
        return modulated_norm(self.norm, x, scale, bias)


@fast.path("norm.modulated_norm")
def modulated_norm(norm, x, scale, bias):
    y = norm(x.flatten(2)) * scale[:, :, None] + bias[:, :, None]  # (B, C, pixels)
    return y.view_as(x)
