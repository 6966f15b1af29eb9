"""Lookup-free quantization (LFQ): a codebook of 2^K codes without a table.

Open-MAGVIT2 (arXiv 2409.04410), the quantizer of MAGVIT-v2 (arXiv 2310.05737): a latent of K channels is
quantized by sign, so a pixel's K signs are its code and, read as bits, its index in 0..2^K-1.

    quantized, indices, losses = LFQ(bits=18)(z)        # z (B, K, h, w)
    codes = indices_to_codes(indices, bits=18)          # (B, h, w) -> (B, h, w, K) in {-1, +1}
    pre, post = split_indices(indices, (6, 12))         # the transformer's two sub-tokens

Letters: B batch, K bits, h w latent grid, N tokens = B*h*w.
"""

import torch
from torch import nn


def codes_to_indices(codes):
    """Index of each code: (..., K) real numbers -> (...) int64, little-endian: sum_i 2^i [codes_i > 0]."""
    weights = 2 ** torch.arange(codes.shape[-1], device=codes.device)
    return ((codes > 0) * weights).sum(-1)


def indices_to_codes(indices, bits=18, dtype=torch.float32):
    """Code of each index: (...) integers in 0..2^bits-1 -> (..., bits) in {-1, +1}, channel i from bit i."""
    places = torch.arange(bits, device=indices.device)
    return ((indices.unsqueeze(-1) >> places & 1) * 2 - 1).to(dtype)


def split_indices(indices, factorized_bits=(6, 12)):
    """Sub-tokens of each index, lowest bits first: (...) -> one (...) a part. For (6, 12): pre 0..63, post 0..4095."""
    parts, shift = [], 0
    for bits in factorized_bits:
        parts.append(indices >> shift & (2**bits - 1))
        shift += bits
    return parts


def merge_indices(sub_indices, factorized_bits=(6, 12)):
    """Undo `split_indices`: for (6, 12), pre + 64 * post."""
    index, shift = torch.zeros_like(sub_indices[0]), 0
    for part, bits in zip(sub_indices, factorized_bits, strict=True):
        index = index + (part << shift)
        shift += bits
    return index


def _pattern_table(log_p, log_q):
    """Probability of every sign pattern of independent bits: (N, k) log-probabilities of +1 and of -1 -> (N, 2^k),
    pattern j having bit i of j as its sign i. Sums of logarithms by matrix product: a few large operations."""
    bits = log_p.shape[1]
    places = torch.arange(bits, device=log_p.device)[:, None]
    positive = (torch.arange(2**bits, device=log_p.device) >> places & 1).to(log_p.dtype)  # (k, 2^k)
    return _exact_matmul(torch.cat([log_p, log_q], 1), torch.cat([positive, 1 - positive])).exp()


def entropy_terms(z, temperature=0.01, eps=1e-5):
    """Entropy of the soft assignment of tokens to all 2^K codes, without the (N, 2^K) table.

    The assignment of a token is softmax over codes c of 2 z.c / temperature. It factorises over bits: bit i is +1
    with probability p_i = sigmoid(4 z_i / temperature), independently. So a token's entropy is the sum of K binary
    entropies, and the mean assignment over tokens is one matrix product of two halves' tables, (2^K/2, N) x (N, 2^K/2).

    z: (N, K) latents; computed in float32 at least (float64 stays), whatever autocast says. Returns two scalars, in nats:
    `sample_entropy`, mean over tokens; `codebook_entropy`, -sum_c pbar_c log(pbar_c + eps) of the mean assignment pbar
    (with eps = 1e-5 it tops out at 11.19, not 12.48, for K = 18: as published).
    """
    with torch.autocast(z.device.type, enabled=False):
        z = z.to(torch.promote_types(z.dtype, torch.float32))
        tokens, bits = z.shape
        logits = 4 * z / temperature
        # Both logarithms from the logit: exact also where p rounds to 0 or 1.
        log_p, log_q = nn.functional.logsigmoid(logits), nn.functional.logsigmoid(-logits)
        sample_entropy = -(log_p.exp() * log_p + log_q.exp() * log_q).sum(1).mean()
        half = bits // 2
        low = _pattern_table(log_p[:, :half], log_q[:, :half])
        high = _pattern_table(log_p[:, half:], log_q[:, half:])
        mean_assignment = _exact_matmul(high.T, low) / tokens  # (2^(K - K//2), 2^(K//2))
        codebook_entropy = -(mean_assignment * torch.log(mean_assignment + eps)).sum()
    return sample_entropy, codebook_entropy


class _ExactMatmul(torch.autograd.Function):
    """a @ b without TF32, forward and backward: reduced precision here moves the codebook gradient by percents."""

    @staticmethod
    def forward(ctx, a, b):
        ctx.save_for_backward(a, b)
        with _no_tf32():
            return a @ b

    @staticmethod
    def backward(ctx, grad):
        a, b = ctx.saved_tensors
        with _no_tf32():
            return grad @ b.T, a.T @ grad


class _no_tf32:
    def __enter__(self):
        self.before = torch.backends.cuda.matmul.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = False

    def __exit__(self, *error):
        torch.backends.cuda.matmul.allow_tf32 = self.before


def _exact_matmul(a, b):
    return _ExactMatmul.apply(a, b) if a.is_cuda else a @ b


class LFQ(nn.Module):
    """The quantizer. It has no parameters.

    Called on z (B, K, h, w); returns
    - `quantized` (B, K, h, w): +1 where z > 0, else -1; the gradient passes straight through to z;
    - `indices` (B, h, w) int64, little-endian;
    - `losses`: scalars `sample_entropy`, `codebook_entropy`, `entropy` (their difference) and `commitment`
      (mean of (z - sign)^2, target detached). All zero in eval mode.
    """

    def __init__(self, bits=18, temperature=0.01, eps=1e-5):
        super().__init__()
        self.bits, self.temperature, self.eps = bits, temperature, eps

    def forward(self, z):
        signs = torch.where(z > 0, 1.0, -1.0).to(z.dtype)
        indices = codes_to_indices(z.movedim(1, -1))
        zero = z.new_zeros((), dtype=torch.promote_types(z.dtype, torch.float32))
        losses = dict.fromkeys(("entropy", "sample_entropy", "codebook_entropy", "commitment"), zero)
        if self.training:
            tokens = z.movedim(1, -1).reshape(-1, self.bits)  # (B, K, h, w) -> (N, K)
            sample, codebook = entropy_terms(tokens, self.temperature, self.eps)
            commitment = (z.to(sample.dtype) - signs.detach().to(sample.dtype)).square().mean()
            losses = {
                "entropy": sample - codebook,
                "sample_entropy": sample,
                "codebook_entropy": codebook,
                "commitment": commitment,
            }
        return z + (signs - z).detach(), indices, losses
