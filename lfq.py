"""Lookup-free quantization (LFQ): a codebook of 2^K codes without a table.

Open-MAGVIT2 (arXiv 2409.04410), the quantizer of MAGVIT-v2 (arXiv 2310.05737): a latent of K channels is quantized by
sign, so a pixel's K signs are its code and, read as bits, its index in 0..2^K-1.

    quantized, indices, losses = LFQ(bits=18)(z)        # z (B, K, h, w)
    codes = indices_to_codes(indices, bits=18)          # (B, h, w) -> (B, h, w, K) in {-1, +1}
    pre, post = split_indices(indices, (6, 12))         # the transformer's two sub-tokens

Letters: B batch, K bits, h w latent grid, N tokens = B*h*w."""

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.functional import logsigmoid

from runtime import exact_float32


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
    parts = []
    for bits in factorized_bits:
        parts.append(indices & (2**bits - 1))
        indices = indices >> bits
    return parts


def merge_indices(sub_indices, factorized_bits=(6, 12)):
    """Undo `split_indices`: for (6, 12), pre + 64 * post; int64."""
    indices = torch.zeros_like(sub_indices[0], dtype=torch.int64)
    for part, bits in zip(reversed(sub_indices), reversed(factorized_bits), strict=True):
        indices = (indices << bits) + part
    return indices


class ExactProduct(torch.autograd.Function):
    """a^T b, forward and backward in full float32: TF32 would move the codebook entropy's gradient by percents."""

    @staticmethod
    def forward(ctx, a, b):
        ctx.save_for_backward(a, b)
        with exact_float32(a.device):
            return a.T @ b

    @staticmethod
    def backward(ctx, grad):
        a, b = ctx.saved_tensors
        with exact_float32(a.device):
            return b @ grad.T, a @ grad


def pattern_probabilities(p, q):
    """Probabilities of all 2^k sign patterns, (N, 2^k), from each sign's to be + (p) and - (q), (N, k). Sign i of
    pattern j is bit i of j."""
    half = p.shape[1] // 2
    if half == 0:
        return torch.cat([q, p], 1) if p.shape[1] else p.new_ones(len(p), 1)
    low, high = (pattern_probabilities(p[:, part], q[:, part]) for part in (slice(half), slice(half, None)))
    return (high[:, :, None] * low[:, None]).flatten(1)  # (N, 2^(k - half), 1) * (N, 1, 2^half) -> (N, 2^k)


def entropy_terms(z, temperature=0.01, eps=1e-5, global_batch=False):
    """Entropy of the soft assignment of tokens to all 2^K codes, without the (N, 2^K) table.

    The assignment of a token is softmax over codes c of 2 z.c / temperature. It factorises over bits: bit i is +1 with
    probability p_i = sigmoid(4 z_i / temperature), independently. So a token's entropy is the sum of K binary
    entropies, and the mean assignment is a matrix product of two halves' tables, (2^(K/2), N) x (N, 2^(K/2)).

    z: (N, K) latents. Returns two scalars, in nats: `sample_entropy`, mean over tokens; `codebook_entropy`, -sum_c
    pbar_c log(pbar_c + eps) of the mean assignment pbar (with eps = 1e-5 it tops out at 11.19, not 12.48, for K = 18:
    as published). Computed in float64 on a CPU, elsewhere in float32 at least, whatever autocast says. (In float32 the
    gradient of their difference is off by up to percents where tokens are few.)
    global_batch: pbar is the mean over the tokens of all processes, each of which must call this with equally many. The
    gradient is then right once it is averaged over processes, as training does."""
    wide = torch.float64 if z.device.type == "cpu" else torch.float32
    logits = z.to(torch.promote_types(z.dtype, wide)) * (4 / temperature)
    # p and q = 1 - p by their logarithms: exact, with their gradients, also where one of them rounds to 1.
    log_p, log_q = logsigmoid(logits), logsigmoid(-logits)
    p, q = log_p.exp(), log_q.exp()
    sample_entropy = -(p * log_p + q * log_q).sum(1).mean()

    half = z.shape[1] // 2
    low = pattern_probabilities(p[:, :half], q[:, :half])  # (N, 2^half)
    high = pattern_probabilities(p[:, half:], q[:, half:])  # (N, 2^(K - half))
    mean = ExactProduct.apply(high, low) / len(z)  # (2^(K - half), 2^half): entry [j, i] is code j * 2^half + i
    if global_batch and dist.is_initialized():
        everyone = mean.detach().clone()
        dist.all_reduce(everyone)
        mean = mean + (everyone / dist.get_world_size() - mean).detach()  # all processes' value, this one's gradient
    codebook_entropy = -(mean * (mean + eps).log()).sum()
    return sample_entropy, codebook_entropy


class LFQ(nn.Module):
    """The quantizer. It has no parameters.

    Called on z (B, K, h, w); returns
    - `quantized` (B, K, h, w): +1 where z > 0, else -1; its gradient passes straight through to z;
    - `indices` (B, h, w) int64, little-endian;
    - `losses`: scalars `sample_entropy`, `codebook_entropy`, `entropy` (their difference) and `commitment`
      (mean of (z - sign)^2, target detached). All zero in eval mode.
    Set `global_batch` for the codebook entropy of all processes' tokens, see `entropy_terms`."""

    def __init__(self, bits=18, temperature=0.01, eps=1e-5):
        super().__init__()
        self.bits, self.temperature, self.eps, self.global_batch = bits, temperature, eps, False

    def forward(self, z):
        signs = torch.where(z > 0, 1.0, -1.0).to(z.dtype)
        pixels = z.movedim(1, -1)  # (B, K, h, w) -> (B, h, w, K)
        dtype = torch.promote_types(z.dtype, torch.float32)
        sample = codebook = commitment = z.new_zeros(())
        if self.training:
            tokens = pixels.reshape(-1, self.bits)  # (B, h, w, K) -> (N, K)
            sample, codebook = entropy_terms(tokens, self.temperature, self.eps, self.global_batch)
            commitment = (z.to(sample.dtype) - signs).square().mean()
        losses = {"entropy": sample - codebook, "sample_entropy": sample, "codebook_entropy": codebook}
        losses = {name: value.to(dtype) for name, value in (losses | {"commitment": commitment}).items()}
        return z + (signs - z).detach(), codes_to_indices(pixels), losses  # straight through: the gradient of z alone
