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
    """qkv (rows, N, 3, d) to query, key (rows, H, N, D), turned; BACK: the three to qkv, turned back.

    query, key and value lie alike. rotary (2, N, D/2), the sines `sines` behind the cosines. A program takes BLOCK of
    all `pairs` of adjacent entries of query, key or value.
    """
    part = tl.program_id(1)
    p = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = p < pairs
    token, pair = p // (WIDTH // 2), p % (WIDTH // 2)
    row, token_of_row, head, pair_of_head = token // N, token % N, pair // (D // 2), pair % (D // 2)
    turn = rotary + token_of_row * (D // 2) + pair_of_head
    cos, sin = tl.load(turn, mask, 0.0), tl.load(turn + sines, mask, 0.0)
    single = query
    if part == 1:
        single = key
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


def _launch(query, key, value, qkv, rotary, back):
    _, heads, tokens, width = query.shape
    pairs = query.numel() // 2
    _turn[(triton.cdiv(pairs, 1024), 3 if back else 2)](
        query, key, value, *query.stride()[:3], qkv, rotary, rotary.stride(0), pairs, tokens,
        width, heads * width, back, 1024,
    )  # fmt: skip


class _Turned(torch.autograd.Function):
    @staticmethod
    def forward(ctx, qkv, rotary, heads):
        value = qkv.unflatten(-1, (3, heads, -1))[:, :, 2].transpose(1, 2)  # (rows, N, 3 d) -> (rows, H, N, D)
        rows, _, tokens, width = value.shape
        query, key = (qkv.new_empty(rows, tokens, heads, width).transpose(1, 2) for _ in range(2))
        ctx.save_for_backward(rotary)
        _launch(query, key, key, qkv, rotary, back=False)
        return query, key, value

    @staticmethod
    def backward(ctx, *parts):
        (rotary,) = ctx.saved_tensors
        if parts[0].stride(-1) != 1 or len({part.stride() for part in parts}) > 1:
            parts = [part.contiguous() for part in parts]
        rows, heads, tokens, width = parts[0].shape
        qkv = parts[0].new_empty(rows, tokens, 3 * heads * width)
        _launch(*parts, qkv, rotary, back=True)
        return qkv, None, None


def turned(qkv, rotary, heads):
    """qkv (rows, N, 3 d) contiguous, rotary (2, N, D/2) float32 -> query, key, value (rows, H, N, D)."""
    return _Turned.apply(qkv, rotary, heads)
