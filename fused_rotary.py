"""Queries and keys out of the joint product, turned by the rotary embedding, in one pass on a GPU, and back.

    query, key, value = turned(qkv, rotary, heads)     # ar_model.py calls it where `usable(qkv)`

Training only; the plain form is `ar_model.rotate`. What it saves is the way back: the gradients of the three, turned
back and put side by side, are one pass over memory here instead of three.

Letters: N tokens, d width, H heads, D head width.
"""

import torch
import triton
import triton.language as tl

ENABLED = True  # False: the plain form everywhere, to compare with


def usable(qkv):
    return ENABLED and qkv.is_cuda


@triton.jit
def _turn(
    query, key, value, rows_apart, heads_apart, tokens_apart, qkv, rotary, sines, pairs, N,
    D: tl.constexpr, WIDTH: tl.constexpr, BACK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """qkv (rows, N, 3, d) to query, key (rows, H, N, D), turned; BACK: all three to qkv, the two turned back.

    query, key and value lie alike. rotary (2, N, D/2), the sines `sines` behind the cosines. A program takes BLOCK of
    all `pairs` of adjacent entries of one of the three.
    """
    part = tl.program_id(1)
    p = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = p < pairs
    token, pair = p // (WIDTH // 2), p % (WIDTH // 2)
    row, token_of_row, head, pair_of_head = token // N, token % N, pair // (D // 2), pair % (D // 2)
    rotary += token_of_row * (D // 2) + pair_of_head
    cos, sin = tl.load(rotary, mask, 0.0), tl.load(rotary + sines, mask, 0.0)
    single = query
    if part == 1:
        single = key
    if BACK:  # noqa: SIM102 (forward must not touch value)
        if part == 2:  # not turned
            single = value
            cos, sin = tl.full((BLOCK,), 1.0, tl.float32), tl.zeros((BLOCK,), tl.float32)
    two = tl.arange(0, 2)[None, :]
    place = row * rows_apart + head * heads_apart + token_of_row * tokens_apart + 2 * pair_of_head
    single += place[:, None] + two
    joint = qkv + (token * 3 * WIDTH + part * WIDTH + 2 * pair)[:, None] + two
    even, odd = tl.split(tl.load(single if BACK else joint, mask[:, None], 0.0).to(tl.float32))
    if BACK:
        sin = -sin
    turned = tl.join(even * cos - odd * sin, even * sin + odd * cos).to(qkv.dtype.element_ty)
    tl.store(joint if BACK else single, turned, mask[:, None])


class _Turned(torch.autograd.Function):
    # Compiled, this is fast only if what the kernel writes to is fresh, no view, and given to it once.

    @staticmethod
    def forward(ctx, qkv, rotary, heads):
        rows, tokens, width = qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3
        query, key = (qkv.new_empty(rows, tokens, width) for _ in range(2))
        ctx.save_for_backward(rotary)
        pairs, head = query.numel() // 2, width // heads
        _turn[(triton.cdiv(pairs, 1024), 2)](
            query, key, qkv, tokens * width, head, width, qkv, rotary, rotary.stride(0), pairs, tokens,
            head, width, False, 1024,
        )  # fmt: skip
        parts = query, key, qkv[:, :, 2 * width :]
        return tuple(part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in parts)

    @staticmethod
    def backward(ctx, query, key, value):
        (rotary,) = ctx.saved_tensors
        if query.stride(-1) != 1 or not query.stride() == key.stride() == value.stride():
            query, key, value = query.contiguous(), key.contiguous(), value.contiguous()
        rows, heads, tokens, head = query.shape
        qkv = query.new_empty(rows, tokens, 3 * heads * head)
        pairs = query.numel() // 2
        _turn[(triton.cdiv(pairs, 1024), 3)](
            query, key, value, *query.stride()[:3], qkv, rotary, rotary.stride(0), pairs, tokens,
            head, heads * head, True, 1024,
        )  # fmt: skip
        return qkv, None, None


def turned(qkv, rotary, heads):
    """qkv (rows, N, 3 d) contiguous, rotary (2, N, D/2) float32 -> query, key, value (rows, H, N, D)."""
    return _Turned.apply(qkv, rotary, heads)
