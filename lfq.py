"""Lookup-free quantization (LFQ): a codebook of 2^K codes without a table.

Open-MAGVIT2 (arXiv 2409.04410), the quantizer of MAGVIT-v2 (arXiv 2310.05737): a latent of K channels is quantized by
sign, so a pixel's K signs are its code and, read as bits, its index in 0..2^K-1.

    quantized, indices, losses = LFQ(bits=18)(z)        # z (B, K, h, w)
    codes = indices_to_codes(indices, bits=18)          # (B, h, w) -> (B, h, w, K) in {-1, +1}
    pre, post = split_indices(indices, (6, 12))         # the transformer's two sub-tokens

Letters: B batch, K bits, h w latent grid, N tokens = B*h*w.
"""

import contextlib
import functools

import torch
import torch.distributed as dist
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import logsigmoid

from runtime import exact_float32

fused_entropy = None
if torch.cuda.is_available():  # Triton kernels
    with contextlib.suppress(ImportError):
        import fused_entropy


def codes_to_indices(codes):
    """Index of each code: (..., K) real numbers -> (...) int64, little-endian: sum_i 2^i [codes_i > 0]."""
    weights = 2 ** torch.arange(codes.shape[-1], device=codes.device)
    return ((codes > 0) * weights).sum(-1)


def indices_to_codes(indices, bits=18, dtype=torch.float32):
    """Code of each index: (...) integers in 0..2^bits-1 -> (..., bits) in {-1, +1}, channel i from bit i."""
    places = torch.arange(bits, device=indices.device)
    return ((indices.unsqueeze(-1) >> places & 1) * 2 - 1).to(dtype)


def split_indices(indices, factorized_bits=(6, 12)):
    """Sub-tokens of each index, lowest bits first: (...) -> one (...) a part. For (6, 12): pre 0..63, post
    0..4095."""
    parts, shift = [], 0
    for bits in factorized_bits:
        parts.append(indices >> shift & (2**bits - 1))
        shift += bits
    return parts


def merge_indices(sub_indices, factorized_bits=(6, 12)):
    """Undo `split_indices`: for (6, 12), pre + 64 * post; int64."""
    index, shift = torch.zeros_like(sub_indices[0], dtype=torch.int64), 0
    for part, bits in zip(sub_indices, factorized_bits, strict=True):
        index = index + (part.long() << shift)
        shift += bits
    return index


@functools.lru_cache
def _patterns(bits, device, dtype):
    """Which of the 2 K numbers (log p_i, then log q_i) add up to the logarithm of each half's each sign pattern: zeros
    and ones, (2 K, 2^(K//2) + 2^(K - K//2)), first the low bits' patterns; pattern j's sign i is bit i."""
    halves = []
    for count in (bits // 2, bits - bits // 2):
        positive = torch.arange(2**count, device=device) >> torch.arange(count, device=device)[:, None] & 1
        halves.append(positive)
    positive, negative = torch.block_diag(*halves), torch.block_diag(*(1 - half for half in halves))
    return torch.cat([positive, negative]).to(dtype)


class _EntropyTerms(torch.autograd.Function):
    """`entropy_terms` of z (N, K), with p_i = sigmoid(scale * z_i). The gradients are made with the terms: two tensors
    of z's size are all that has to wait for the backward pass."""

    @staticmethod
    def forward(ctx, z, scale, eps, global_batch):
        compute = _fused_terms if fused_entropy and fused_entropy.usable(z) else _terms
        terms, gradients = compute(z.contiguous(), scale, eps, global_batch)
        ctx.save_for_backward(*gradients)
        return terms

    @staticmethod
    @once_differentiable
    def backward(ctx, of_sample, of_codebook):
        sample, codebook = ctx.saved_tensors
        return torch.addcmul(of_sample * sample, of_codebook, codebook), None, None, None


def _terms(z, scale, eps, global_batch):
    """(sample and codebook entropy), (gradient of each).

    By hand because it is short and few operations are fast ones: the tables of both halves' sign patterns are one
    matrix product of logarithms, the mean assignment another, (2^(K - K//2), 2^(K//2)), high half by low half; and
    nothing of size 2^K * N is ever made. Without TF32: reduced precision here moves the codebook gradient by percents.
    """
    tokens, bits = z.shape
    with exact_float32(z.device):
        logits, patterns = z * scale, _patterns(bits, z.device, z.dtype)
        # log p and log q, both from the logit: exact also where the probability rounds to 0 or 1.
        logs = logsigmoid(torch.cat([logits, -logits], 1))  # (N, 2 K)
        tables = (logs @ patterns).exp_()
        low, high = tables.split([2 ** (bits // 2), 2 ** (bits - bits // 2)], 1)
        mean = high.T @ low / tokens
        if global_batch:
            dist.all_reduce(mean)
            mean /= dist.get_world_size()
        probabilities = logs.exp()
        sample_entropy = -(probabilities * logs).sum() / tokens
        above = mean + eps
        log = above.log()
        codebook_entropy = -(mean * log).sum()

        # Backwards, from the mean to the tables' logarithms, log p and log q, and the logits. Every process of a global
        # batch has the same of_mean, of which 1/world is its share: the mean of all gradients over processes brings
        # that.
        of_mean = -torch.addcdiv(log, mean, above)
        of_tables = torch.cat([high @ of_mean, low @ of_mean.T], 1).mul_(tables)
        of_log_p, of_log_q = (of_tables @ patterns.T).split(bits, 1)
        p, q = probabilities.split(bits, 1)
        # d log p = q d logit, d log q = -p d logit, d entropy = -logit p q d logit
        of_codebook = (of_log_p * q - of_log_q * p) * (scale / tokens)
        of_sample = logits * p * q * (-scale / tokens)
    return (sample_entropy, codebook_entropy), (of_sample, of_codebook)


def _fused_terms(z, scale, eps, global_batch):
    """The same on a GPU: the many small operations around the matrix products are three kernels."""
    tokens, bits = z.shape
    tables, entropies = fused_entropy.tables_of(z, scale)
    low, high = tables.split([2 ** (bits // 2), 2 ** (bits - bits // 2)], 1)
    with exact_float32(z.device):
        total = high.T @ low
        if global_batch:
            dist.all_reduce(total)
            tokens *= dist.get_world_size()
        codebook_entropy, of_mean = fused_entropy.codebook_entropy(total, 1 / tokens, eps)
        of_tables = torch.empty_like(tables)
        torch.mm(high, of_mean, out=of_tables[:, : low.shape[1]])
        torch.mm(low, of_mean.T, out=of_tables[:, low.shape[1] :])
    return (entropies.mean(), codebook_entropy), fused_entropy.gradients(z, tables, of_tables, scale)


def entropy_terms(z, temperature=0.01, eps=1e-5, global_batch=False):
    """Entropy of the soft assignment of tokens to all 2^K codes, without the (N, 2^K) table.

    The assignment of a token is softmax over codes c of 2 z.c / temperature. It factorises over bits: bit i is +1 with
    probability p_i = sigmoid(4 z_i / temperature), independently. So a token's entropy is the sum of K binary
    entropies, and the mean assignment over tokens is one matrix product of two halves' tables, (2^K/2, N) x (N, 2^K/2).

    z: (N, K) latents; computed in float64 on a CPU, which has it at hand, and elsewhere in float32 at least, whatever
    autocast says. (In float32 the gradient of their difference is off by up to percents where tokens are few.) Returns
    two scalars of that type, in nats: `sample_entropy`, mean over tokens; `codebook_entropy`, -sum_c pbar_c log(pbar_c
    + eps) of the mean assignment pbar (with eps = 1e-5 it tops out at 11.19, not 12.48, for K = 18: as published).

    global_batch: pbar is the mean over the tokens of all processes, each of which must call this with equally many. The
    gradient is then right once it is averaged over processes, as training does: that average is the gradient of one
    process that holds all the tokens.
    """
    z = z.to(torch.promote_types(z.dtype, torch.float64 if z.device.type == "cpu" else torch.float32))
    return _EntropyTerms.apply(z, 4 / temperature, eps, global_batch and dist.is_initialized())


class LFQ(nn.Module):
    """The quantizer. It has no parameters.

    Called on z (B, K, h, w); returns
    - `quantized` (B, K, h, w): +1 where z > 0, else -1; the gradient passes straight through to z;
    - `indices` (B, h, w) int64, little-endian;
    - `losses`: scalars `sample_entropy`, `codebook_entropy`, `entropy` (their difference) and `commitment`
      (mean of (z - sign)^2, target detached). All zero in eval mode.
    `global_batch`, off unless set: codebook entropy of all processes' tokens, see `entropy_terms`."""

    def __init__(self, bits=18, temperature=0.01, eps=1e-5):
        super().__init__()
        self.bits, self.temperature, self.eps, self.global_batch = bits, temperature, eps, False

    def forward(self, z):
        signs = torch.where(z > 0, 1.0, -1.0).to(z.dtype)
        indices = codes_to_indices(z.movedim(1, -1))
        zero = z.new_zeros((), dtype=torch.promote_types(z.dtype, torch.float32))
        losses = dict.fromkeys(("entropy", "sample_entropy", "codebook_entropy", "commitment"), zero)
        if self.training:
            tokens = z.movedim(1, -1).reshape(-1, self.bits)  # (B, K, h, w) -> (N, K)
            sample, codebook = entropy_terms(tokens, self.temperature, self.eps, self.global_batch)
            commitment = (z.to(sample.dtype) - signs.detach().to(sample.dtype)).square().mean()
            losses = {
                "entropy": sample - codebook,
                "sample_entropy": sample,
                "codebook_entropy": codebook,
                "commitment": commitment,
            }
            losses = {name: value.to(zero.dtype) for name, value in losses.items()}
        return z + (signs - z).detach(), indices, losses
