"""The quantizer's entropies in few launches, on a GPU: plain operations spend their time being started.

    tables, entropies = tables_of(z, scale)                  # all sign patterns of both halves of the bits
    entropy, of_mean = codebook_entropy(total, share, eps)   # total: the halves' matrix product
    of_sample, of_codebook = gradients(z, tables, of_tables, scale)

`lfq.py` calls them where `usable(z)`, between its matrix products; its plain code says what they compute. All sums have
a fixed order. A half's table has 2^count entries, entry j for the pattern whose sign i is bit i.

Letters: K bits, N tokens.
"""

import torch
import triton
import triton.language as tl

ENABLED = True  # False: the plain form everywhere, to compare with
BLOCK = 1024  # codes a program takes


def usable(z):
    """True for what the kernels take: a GPU, float32, (N, K) with K up to 20 (one warp holds a table)."""
    return ENABLED and z.is_cuda and z.dtype == torch.float32 and z.shape[1] <= 20


@triton.jit
def _probabilities(logit):
    """p = sigmoid(logit), q = 1 - p, log p, log q: nothing cancels where p or q rounds to 1."""
    e = tl.exp(-tl.abs(logit))
    u = 1 + e
    log_u = tl.where(u == 1, e, tl.log(u) * (e / (u - 1)))  # log(1 + e) despite u's rounding
    p, q = tl.where(logit > 0, 1.0, e) / u, tl.where(logit > 0, e, 1.0) / u
    return p, q, tl.minimum(logit, 0.0) - log_u, tl.minimum(-logit, 0.0) - log_u


@triton.jit
def _half_table(z, scale, table, COUNT: tl.constexpr):
    """Stores the probability of every sign pattern of COUNT bits; returns the bits' entropy."""
    pattern = tl.arange(0, 2**COUNT)
    probability = tl.full([2**COUNT], 1.0, tl.float32)
    entropy = 0.0
    for i in tl.static_range(COUNT):
        p, q, log_p, log_q = _probabilities(tl.load(z + i) * scale)
        probability *= tl.where((pattern >> i & 1) == 1, p, q)
        entropy -= p * log_p + q * log_q
    tl.store(table + pattern, probability)
    return entropy


@triton.jit
def _tables(z, scale, tables, entropies, LOW: tl.constexpr, HIGH: tl.constexpr):
    """Both halves' tables and the entropy of a token; a program a token."""
    token = tl.program_id(0).to(tl.int64)
    z += token * (LOW + HIGH)
    tables += token * (2**LOW + 2**HIGH)
    entropy = _half_table(z, scale, tables, LOW)
    entropy += _half_table(z + LOW, scale, tables + 2**LOW, HIGH)
    tl.store(entropies + token, entropy)


@triton.jit
def _codebook_entropy(total, share, eps, uniform, sums, of_mean, BLOCK: tl.constexpr):
    """A block of codes: its part of the entropy of mean = total * share, and the entropy's derivative.

    The derivative leaves out a constant, -log(uniform), uniform = 2^-K + eps: it cancels in the gradient, as a token's
    probabilities add up to 1. Left in, it would cost digits where assignments are soft and log(mean) is nearly it."""
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mean = tl.load(total + place) * share
    above = mean + eps
    log = tl.log(above / uniform)
    tl.store(of_mean + place, -(log + mean / above))
    tl.store(sums + tl.program_id(0), -tl.sum(mean * (log + tl.log(uniform))))


@triton.jit
def _half_gradients(z, scale, table, of_table, factor, of_sample, of_codebook, COUNT: tl.constexpr):
    """Gradients by one half's bits, from that by its table."""
    pattern = tl.arange(0, 2**COUNT)
    of_log = tl.load(table + pattern) * tl.load(of_table + pattern)  # of the table's logarithm
    for i in tl.static_range(COUNT):
        logit = tl.load(z + i) * scale
        p, q, _, _ = _probabilities(logit)
        positive = (pattern >> i & 1) == 1
        of_log_p, of_log_q = tl.sum(tl.where(positive, of_log, 0.0)), tl.sum(tl.where(positive, 0.0, of_log))
        # d log p = q d logit, d log q = -p d logit, d entropy = -logit p q d logit
        tl.store(of_codebook + i, (of_log_p * q - of_log_q * p) * factor)
        tl.store(of_sample + i, -logit * p * q * factor)


@triton.jit
def _gradients(z, scale, tables, of_tables, factor, of_sample, of_codebook, LOW: tl.constexpr, HIGH: tl.constexpr):
    """A token's gradients; a program a token."""
    token = tl.program_id(0).to(tl.int64)
    place, tables_place = token * (LOW + HIGH), token * (2**LOW + 2**HIGH)
    z, of_sample, of_codebook = z + place, of_sample + place, of_codebook + place
    tables, of_tables = tables + tables_place, of_tables + tables_place
    _half_gradients(z, scale, tables, of_tables, factor, of_sample, of_codebook, LOW)
    z, of_sample, of_codebook = z + LOW, of_sample + LOW, of_codebook + LOW
    tables, of_tables = tables + 2**LOW, of_tables + 2**LOW
    _half_gradients(z, scale, tables, of_tables, factor, of_sample, of_codebook, HIGH)


def tables_of(z, scale):
    """Probabilities of the low bits' sign patterns, then of the high ones', (N, 2^(K//2) + 2^(K - K//2)); and each
    token's entropy, (N,). z (N, K), contiguous."""
    (tokens, bits), low = z.shape, z.shape[1] // 2
    tables, entropies = z.new_empty((tokens, 2**low + 2 ** (bits - low))), z.new_empty(tokens)
    with torch.cuda.device(z.device):
        _tables[(tokens,)](z, scale, tables, entropies, low, bits - low, num_warps=1)
    return tables, entropies


def codebook_entropy(total, share, eps):
    """-sum(mean log(mean + eps)) of mean = total * share (2^K numbers); and its derivative, but for a constant."""
    codes, block = total.numel(), min(BLOCK, total.numel())
    sums, of_mean = total.new_empty(codes // block), torch.empty_like(total)
    with torch.cuda.device(total.device):
        _codebook_entropy[(len(sums),)](total, share, eps, 1 / codes + eps, sums, of_mean, block)
    return sums.sum(), of_mean


def gradients(z, tables, of_tables, scale):
    """Gradients by z of the mean sample entropy and of the codebook entropy, from of_tables, the products of `of_mean`
    with the tables."""
    (tokens, bits), low = z.shape, z.shape[1] // 2
    of_sample, of_codebook = torch.empty_like(z), torch.empty_like(z)
    with torch.cuda.device(z.device):
        _gradients[(tokens,)](
            z, scale, tables, of_tables, scale / tokens, of_sample, of_codebook, low, bits - low, num_warps=1
        )
    return of_sample, of_codebook
