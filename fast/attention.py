"""Causal attention with rotation on a GPU: what Inductor cannot make of stage II's training.

Queries and keys are turned once, then softmax(q k^T) v goes block by block with sums in float32, and the backward pass
turns the gradients back. As `triton_op`s the kernels are seen through by torch.compile.

Letters: rows the sequences, N tokens, d width, H heads, D head width."""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import wrap_triton

BLOCK = 64  # queries and keys that attention takes at once


def causal_takes(qkv, rotary, heads):
    """A GPU; float32 or half precision; a head width of 16, 32, 64, or in half precision 128: registers end there."""
    width = qkv.shape[-1] // (3 * heads)
    fits = width in (16, 32, 64, 128) and width * qkv.element_size() <= 256
    return qkv.is_cuda and qkv.dtype != torch.float64 and fits


def causal(qkv, rotary, heads):
    return torch.ops.nanomagvit2.attend(qkv.contiguous(), rotary.contiguous(), heads)[0]


@triton.jit
def _turn(qkv, rotary, turned, tokens, H: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr):
    """Turn the adjacent pairs of a token's queries and keys, a program a token.
    qkv (rows, N, 3, H, D) -> turned (rows, N, 2, H, D), with rotary (2, N, D/2)."""
    token, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    h, d, pair = tl.arange(0, BLOCK), tl.arange(0, D), tl.arange(0, D // 2)
    cos = tl.load(rotary + token * (D // 2) + pair)[None, :]
    sin = tl.load(rotary + (tokens + token) * (D // 2) + pair)[None, :]
    place, mask = h[:, None] * D + d[None, :], (h < 2 * H)[:, None]
    value = tl.load(qkv + (row * tokens + token) * 3 * H * D + place, mask, 0.0).to(tl.float32)
    even, odd = tl.split(tl.reshape(value, [BLOCK, D // 2, 2]))
    value = tl.reshape(tl.join(even * cos - odd * sin, even * sin + odd * cos), [BLOCK, D])
    tl.store(turned + (row * tokens + token) * 2 * H * D + place, value.to(turned.dtype.element_ty), mask)


@triton.jit
def _store_turned_back(x, stride, value, rotary, tokens, place, mask, BLOCK: tl.constexpr, D: tl.constexpr):
    """The gradient of a head's queries or keys before they were turned, from that after."""
    d, pair = tl.arange(0, D), tl.arange(0, D // 2)
    even, odd = tl.split(tl.reshape(value, [BLOCK, D // 2, 2]))
    at = place[:, None] * (D // 2) + pair[None, :]
    cos = tl.load(rotary + at, mask[:, None], 0.0)
    sin = tl.load(rotary + tokens * (D // 2) + at, mask[:, None], 0.0)
    value = tl.reshape(tl.join(even * cos + odd * sin, odd * cos - even * sin), [BLOCK, D])
    tl.store(x + place[:, None] * stride + d[None, :], value.to(x.dtype.element_ty), mask[:, None])


@triton.jit
def _attend(
    turned, qkv, mixed, logsum, tokens, SCALE: tl.constexpr,
    H: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """softmax(q k^T scale) v for a block of one head's queries, over the keys up to each; and the softmax's log-sum, to
    base 2, for the backward pass. turned (rows, N, 2, H, D): queries and keys; qkv (rows, N, 3, H, D): for the values;
    mixed (rows, N, H, D); logsum (rows, H, N)."""
    block, row, head = tl.program_id(0), (tl.program_id(1) // H).to(tl.int64), tl.program_id(1) % H
    d, k = tl.arange(0, D), tl.arange(0, BLOCK)
    turned += row * tokens * 2 * H * D + head * D
    qkv += row * tokens * 3 * H * D + 2 * H * D + head * D
    place = block * BLOCK + k
    query = tl.load(turned + place[:, None] * (2 * H * D) + d[None, :], (place < tokens)[:, None], 0.0)
    highest = tl.full([BLOCK], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    result = tl.zeros([BLOCK, D], tl.float32)
    for start in range(0, (block + 1) * BLOCK, BLOCK):
        other = start + k
        mask = (other < tokens)[:, None]
        key = tl.load(turned + H * D + other[:, None] * (2 * H * D) + d[None, :], mask, 0.0)
        value = tl.load(qkv + other[:, None] * (3 * H * D) + d[None, :], mask, 0.0)
        score = tl.dot(query, tl.trans(key), input_precision="ieee") * (SCALE * 1.4426950408889634)
        score = tl.where(other[None, :] <= place[:, None], score, -float("inf"))
        before, highest = highest, tl.maximum(highest, tl.max(score, 1))
        weight, shrink = tl.exp2(score - highest[:, None]), tl.exp2(before - highest)
        total = total * shrink + tl.sum(weight, 1)
        result = tl.dot(weight.to(value.dtype), value, result * shrink[:, None], input_precision="ieee")
    mixed += (row * tokens + place)[:, None] * (H * D) + head * D + d[None, :]
    tl.store(mixed, (result / total[:, None]).to(mixed.dtype.element_ty), (place < tokens)[:, None])
    tl.store(logsum + (row * H + head) * tokens + place, highest + tl.log2(total), place < tokens)


@triton.jit
def _sum_products(mixed, dmixed, sums, tokens, H: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr):
    """mixed . dmixed, which the softmax's gradient subtracts: (rows, N, H, D) -> (rows, H, N); a program a token."""
    token, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    h, i = tl.arange(0, BLOCK), tl.arange(0, D)
    place = (row * tokens + token) * H * D + h[:, None] * D + i[None, :]
    mask = (h < H)[:, None]
    product = tl.load(mixed + place, mask, 0.0).to(tl.float32) * tl.load(dmixed + place, mask, 0.0).to(tl.float32)
    tl.store(sums + (row * H + h) * tokens + token, tl.sum(product, 1), h < H)


@triton.jit
def _attend_backward(
    turned, qkv, rotary, dmixed, logsum, sums, dqkv, tokens, SCALE: tl.constexpr,
    H: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradients of one block of a head's tokens: of its keys and values, from the queries of this block and later ones;
    then of its queries, from the keys of this block and earlier ones. So all programs have equally much to do."""
    block, row, head = tl.program_id(0), (tl.program_id(1) // H).to(tl.int64), tl.program_id(1) % H
    d, k = tl.arange(0, D), tl.arange(0, BLOCK)
    turned += row * tokens * 2 * H * D + head * D
    qkv += row * tokens * 3 * H * D + 2 * H * D + head * D
    dqkv += row * tokens * 3 * H * D + head * D
    dmixed += row * tokens * H * D + head * D
    logsum += (row * H + head) * tokens
    sums += (row * H + head) * tokens
    BASE: tl.constexpr = SCALE * 1.4426950408889634  # for powers of 2
    here = block * BLOCK + k
    mask = here < tokens

    key = tl.load(turned + H * D + here[:, None] * (2 * H * D) + d[None, :], mask[:, None], 0.0)
    value = tl.load(qkv + here[:, None] * (3 * H * D) + d[None, :], mask[:, None], 0.0)
    of_key = tl.zeros([BLOCK, D], tl.float32)
    of_value = tl.zeros([BLOCK, D], tl.float32)
    for start in range(block * BLOCK, tokens, BLOCK):
        other = start + k
        there = other < tokens
        query = tl.load(turned + other[:, None] * (2 * H * D) + d[None, :], there[:, None], 0.0)
        of_mixed = tl.load(dmixed + other[:, None] * (H * D) + d[None, :], there[:, None], 0.0)
        level = tl.load(logsum + other, there, 0.0)
        subtracted = tl.load(sums + other, there, 0.0)
        score = tl.dot(key, tl.trans(query), input_precision="ieee") * BASE  # (keys, queries)
        seen = (here[:, None] <= other[None, :]) & there[None, :]
        weight = tl.where(seen, tl.exp2(score - level[None, :]), 0.0)
        of_value = tl.dot(weight.to(of_mixed.dtype), of_mixed, of_value, input_precision="ieee")
        of_weight = tl.dot(value, tl.trans(of_mixed), input_precision="ieee")
        of_score = (weight * (of_weight - subtracted[None, :])).to(query.dtype)
        of_key = tl.dot(of_score, query, of_key, input_precision="ieee")
    _store_turned_back(dqkv + H * D, 3 * H * D, of_key * SCALE, rotary, tokens, here, mask, BLOCK, D)
    at = here[:, None] * (3 * H * D) + d[None, :]
    tl.store(dqkv + 2 * H * D + at, of_value.to(dqkv.dtype.element_ty), mask[:, None])

    query = tl.load(turned + here[:, None] * (2 * H * D) + d[None, :], mask[:, None], 0.0)
    of_mixed = tl.load(dmixed + here[:, None] * (H * D) + d[None, :], mask[:, None], 0.0)
    level = tl.load(logsum + here, mask, 0.0)
    subtracted = tl.load(sums + here, mask, 0.0)
    of_query = tl.zeros([BLOCK, D], tl.float32)
    for start in range(0, (block + 1) * BLOCK, BLOCK):
        other = start + k
        there = other < tokens
        key = tl.load(turned + H * D + other[:, None] * (2 * H * D) + d[None, :], there[:, None], 0.0)
        value = tl.load(qkv + other[:, None] * (3 * H * D) + d[None, :], there[:, None], 0.0)
        score = tl.dot(query, tl.trans(key), input_precision="ieee") * BASE  # (queries, keys)
        weight = tl.where(other[None, :] <= here[:, None], tl.exp2(score - level[:, None]), 0.0)
        of_weight = tl.dot(of_mixed, tl.trans(value), input_precision="ieee")
        of_score = (weight * (of_weight - subtracted[:, None])).to(key.dtype)
        of_query = tl.dot(of_score, key, of_query, input_precision="ieee")
    _store_turned_back(dqkv, 3 * H * D, of_query * SCALE, rotary, tokens, here, mask, BLOCK, D)


@torch.library.triton_op("nanomagvit2::attend", mutates_args=())
def _forward_attend(qkv: Tensor, rotary: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    rows, tokens, width = qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3
    D = width // heads
    turned, mixed = qkv.new_empty((rows, tokens, 2 * width)), qkv.new_empty((rows, tokens, width))
    logsum = torch.empty((rows, heads, tokens), dtype=torch.float32, device=qkv.device)
    wrap_triton(_turn)[(tokens, rows)](qkv, rotary, turned, tokens, heads, D, triton.next_power_of_2(2 * heads))
    stages = 3 if D * qkv.element_size() <= 128 else 1  # three fit the shared memory of any GPU then
    wrap_triton(_attend)[(triton.cdiv(tokens, BLOCK), rows * heads)](
        turned, qkv, mixed, logsum, tokens, D**-0.5, heads, D, BLOCK, num_stages=stages
    )
    return mixed, logsum, turned


@torch.library.triton_op("nanomagvit2::attend_backward", mutates_args=())
def _backward_attend(
    dmixed: Tensor, turned: Tensor, qkv: Tensor, rotary: Tensor, mixed: Tensor, logsum: Tensor
) -> Tensor:
    rows, heads, tokens = logsum.shape
    D = mixed.shape[2] // heads
    dqkv, sums = torch.empty_like(qkv), torch.empty_like(logsum)
    wrap_triton(_sum_products)[(tokens, rows)](mixed, dmixed, sums, tokens, heads, D, triton.next_power_of_2(heads))
    # One stage: more take registers that another program could have.
    wrap_triton(_attend_backward)[(triton.cdiv(tokens, BLOCK), rows * heads)](
        turned, qkv, rotary, dmixed, logsum, sums, dqkv, tokens, D**-0.5, heads, D, BLOCK, num_stages=1
    )
    return dqkv


def _setup_attend(ctx, inputs, output):
    qkv, rotary, _ = inputs
    mixed, logsum, turned = output
    ctx.save_for_backward(turned, qkv, rotary, mixed, logsum)


def _gradients_attend(ctx, dmixed, dlogsum, dturned):
    return torch.ops.nanomagvit2.attend_backward(dmixed.contiguous(), *ctx.saved_tensors), None, None


torch.library.register_autograd("nanomagvit2::attend", _gradients_attend, setup_context=_setup_attend)
