"""What the transformer's training spends its time on between matrix products, on a GPU, each in one pass.

    x, y = add_norm(x, added, weight, dropout)            # x + dropout(added), and its RMSNorm
    mixed = attend(qkv, rotary, heads)                    # turn queries and keys, attend causally
    y = gate(h)                                           # silu of one half times the other

`ar_model.py` calls them where `usable(...)`; the plain code stands beside each call. As separate operations the
residual stream and the packed queries, keys and values would go through memory several times. Dropout draws from Philox
by (seed, place), and the backward pass draws it again instead of reading it. Sums are in float32. As `triton_op`s they
are seen through by torch.compile, whose code starts them faster than Python.

Letters: rows the sequences, N tokens, d width, H heads, D head width.
"""

import torch
import triton
import triton.language as tl
from torch.library import wrap_triton

ENABLED = True  # False: the plain form everywhere, to compare with
PROGRAMS = 1056  # share out the rows in the norm's backward pass: 8 on each of an H200's 132 multiprocessors
BLOCK = 64  # queries and keys that attention takes at once


def usable(x, head_width=None):
    """True for what the kernels take: a GPU, float32 or half precision; and in attention a head width of 16, 32, 64, or
    in half precision 128 (more fits no GPU's registers)."""
    fits = head_width is None or (head_width in (16, 32, 64, 128) and head_width * x.element_size() <= 256)
    return ENABLED and x.is_cuda and x.dtype != torch.float64 and fits


# ----------------------------------------------------------------------------------------------------------------------
# Residual stream, dropout, norm


@triton.jit
def _kept(seed, row, width, DROPOUT: tl.constexpr, BLOCK: tl.constexpr):
    """0 where dropout takes a number of this row, else 1 / (1 - dropout): (BLOCK,). One Philox call makes four."""
    group = row.to(tl.int32) * (width // 4) + tl.arange(0, BLOCK // 4)
    a, b, c, d = tl.randint4x(seed, group)
    bits = tl.reshape(tl.join(tl.join(a, b), tl.join(c, d)), [BLOCK])
    uniform = (bits.to(tl.uint32, bitcast=True) >> 8).to(tl.float32) * 2.0**-24  # in [0, 1)
    return tl.where(uniform < DROPOUT, 0.0, 1 / (1 - DROPOUT))


@triton.jit
def _add_norm(
    x, added, weight, seed, total, y, inverse, width,
    ADDS: tl.constexpr, DROPS: tl.constexpr, DROPOUT: tl.constexpr, EPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """total = x + dropout(added); y = RMSNorm(total) * weight; inverse = 1 / rms; a program a row."""
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    mask = i < width
    place = row * width + i
    value = tl.load(x + place, mask, 0.0).to(tl.float32)
    if ADDS:
        more = tl.load(added + place, mask, 0.0).to(tl.float32)
        if DROPS:
            more *= _kept(tl.load(seed), row, width, DROPOUT, BLOCK)
        value += more
        tl.store(total + place, value.to(total.dtype.element_ty), mask)
    over = 1 / tl.sqrt(tl.sum(value * value) / width + EPS)
    tl.store(inverse + row, over)
    factor = tl.load(weight + i, mask, 0.0).to(tl.float32)
    tl.store(y + place, (value * over * factor).to(y.dtype.element_ty), mask)


@triton.jit
def _add_norm_backward(
    dy, dtotal, total, weight, inverse, seed, dx, dadded, dweight, rows, width, share,
    ADDS: tl.constexpr, DROPS: tl.constexpr, PAST: tl.constexpr, DROPOUT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradients of x, of added and, this program's part, of weight; a program `share` rows. dtotal, where PAST: the
    gradient that reaches the sum past the norm."""
    i = tl.arange(0, BLOCK)
    mask = i < width
    factor = tl.load(weight + i, mask, 0.0).to(tl.float32)
    of_weight = tl.zeros([BLOCK], tl.float32)
    first = tl.program_id(0) * share
    for number in range(tl.minimum(share, rows - first)):
        row = (first + number).to(tl.int64)
        place = row * width + i
        over = tl.load(inverse + row)
        normal = tl.load(total + place, mask, 0.0).to(tl.float32) * over
        gradient = tl.load(dy + place, mask, 0.0).to(tl.float32)
        of_weight += gradient * normal
        gradient *= factor
        gradient = over * (gradient - normal * (tl.sum(gradient * normal) / width))
        if PAST:
            gradient += tl.load(dtotal + place, mask, 0.0).to(tl.float32)
        tl.store(dx + place, gradient.to(dx.dtype.element_ty), mask)
        if ADDS:
            if DROPS:
                gradient *= _kept(tl.load(seed), row, width, DROPOUT, BLOCK)
            tl.store(dadded + place, gradient.to(dadded.dtype.element_ty), mask)
    tl.store(dweight + tl.program_id(0) * width + i, of_weight, mask)


@torch.library.triton_op("nanomagvit2::add_norm", mutates_args=())
def _forward_add_norm(
    x: torch.Tensor, added: torch.Tensor | None, weight: torch.Tensor, seed: torch.Tensor | None, dropout: float,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    width, rows = x.shape[-1], x.numel() // x.shape[-1]
    y = torch.empty(x.shape, dtype=dtype, device=x.device)
    total = x.new_empty((0,) if added is None else x.shape)
    inverse = torch.empty(rows, dtype=torch.float32, device=x.device)
    wrap_triton(_add_norm)[(rows,)](
        x, x if added is None else added, weight, weight if seed is None else seed, total, y, inverse, width,
        added is not None, seed is not None, dropout, 1e-5, triton.next_power_of_2(width),
    )  # fmt: skip
    return total, y, inverse


@torch.library.triton_op("nanomagvit2::add_norm_backward", mutates_args=())
def _backward_add_norm(
    dy: torch.Tensor, dtotal: torch.Tensor | None, total: torch.Tensor, weight: torch.Tensor, inverse: torch.Tensor,
    seed: torch.Tensor | None, dropout: float, added: torch.dtype | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    width, rows = total.shape[-1], total.numel() // total.shape[-1]
    programs = min(PROGRAMS, rows)
    dx = torch.empty_like(total)
    dadded = total.new_empty((0,) if added is None else total.shape, dtype=added or total.dtype)
    dweight = torch.empty((programs, width), dtype=torch.float32, device=total.device)
    wrap_triton(_add_norm_backward)[(programs,)](
        dy, dy if dtotal is None else dtotal, total, weight, inverse, weight if seed is None else seed, dx, dadded,
        dweight, rows, width, triton.cdiv(rows, programs), added is not None, seed is not None, dtotal is not None,
        dropout, triton.next_power_of_2(width),
    )  # fmt: skip
    return dx, dadded, dweight.sum(0)


def _setup_add_norm(ctx, inputs, output):
    x, added, weight, seed, ctx.dropout, _ = inputs
    total, _, inverse = output
    ctx.adds = None if added is None else added.dtype
    ctx.save_for_backward(x if added is None else total, weight, inverse, seed)
    ctx.set_materialize_grads(False)


def _gradients_add_norm(ctx, dtotal, dy, dinverse):
    total, weight, inverse, seed = ctx.saved_tensors
    dtotal = None if dtotal is None or ctx.adds is None else dtotal.contiguous()
    dx, dadded, dweight = torch.ops.nanomagvit2.add_norm_backward(
        dy.contiguous(), dtotal, total, weight, inverse, seed, ctx.dropout, ctx.adds
    )
    return dx, None if ctx.adds is None else dadded, dweight.to(weight.dtype), None, None, None


torch.library.register_autograd("nanomagvit2::add_norm", _gradients_add_norm, setup_context=_setup_add_norm)


def add_norm(x, added, weight, dropout):
    """(x + dropout(added), its RMSNorm in the type that products are computed in), both (..., d).

    added None: nothing is added. dropout: 0 for none; otherwise torch's generator of the device gives a seed."""
    dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else x.dtype
    seed = None
    if added is not None and dropout > 0:
        seed = torch.randint(2**31 - 1, (1,), device=x.device)
    total, y, _ = torch.ops.nanomagvit2.add_norm(
        x.contiguous(), None if added is None else added.contiguous(), weight, seed, dropout, dtype
    )
    return x if added is None else total, y


# ----------------------------------------------------------------------------------------------------------------------
# Feed-forward


@triton.jit
def _gate(h, y, width, BLOCK: tl.constexpr):
    """y = silu(first half of h) * second half; h (rows, 2 width)."""
    row, i = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = i < width
    first = tl.load(h + row * 2 * width + i, mask, 0.0).to(tl.float32)
    second = tl.load(h + row * 2 * width + width + i, mask, 0.0).to(tl.float32)
    tl.store(y + row * width + i, (first * tl.sigmoid(first) * second).to(y.dtype.element_ty), mask)


@triton.jit
def _gate_backward(h, dy, dh, width, BLOCK: tl.constexpr):
    """The gradient of h."""
    row, i = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = i < width
    h += row * 2 * width + i
    dh += row * 2 * width + i
    first, second = tl.load(h, mask, 0.0).to(tl.float32), tl.load(h + width, mask, 0.0).to(tl.float32)
    gradient = tl.load(dy + row * width + i, mask, 0.0).to(tl.float32)
    passed = tl.sigmoid(first)
    tl.store(dh, (gradient * second * passed * (1 + first * (1 - passed))).to(dh.dtype.element_ty), mask)
    tl.store(dh + width, (gradient * first * passed).to(dh.dtype.element_ty), mask)


@torch.library.triton_op("nanomagvit2::gate", mutates_args=())
def _forward_gate(h: torch.Tensor) -> torch.Tensor:
    rows, width = h.numel() // h.shape[-1], h.shape[-1] // 2
    y = h.new_empty((*h.shape[:-1], width))
    wrap_triton(_gate)[(rows, triton.cdiv(width, 1024))](h, y, width, 1024)
    return y


@torch.library.triton_op("nanomagvit2::gate_backward", mutates_args=())
def _backward_gate(h: torch.Tensor, dy: torch.Tensor) -> torch.Tensor:
    rows, width = dy.numel() // dy.shape[-1], dy.shape[-1]
    dh = torch.empty_like(h)
    wrap_triton(_gate_backward)[(rows, triton.cdiv(width, 1024))](h, dy, dh, width, 1024)
    return dh


torch.library.register_autograd(
    "nanomagvit2::gate",
    lambda ctx, dy: torch.ops.nanomagvit2.gate_backward(*ctx.saved_tensors, dy.contiguous()),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)


def gate(h):
    """silu of the first half of h (..., 2 d), times the second: (..., d)."""
    return torch.ops.nanomagvit2.gate(h.contiguous())


# ----------------------------------------------------------------------------------------------------------------------
# Attention


@triton.jit
def _turn(
    qkv, rotary, turned, tokens, H: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
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
    H: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A block of queries of one head: softmax(q k^T scale) v over the keys up to each query; and, base 2, the softmax's
    log-sum for the backward pass.

    turned (rows, N, 2, H, D): queries and keys; qkv (rows, N, 3, H, D): for the values; mixed (rows, N, H, D); logsum
    (rows, H, N)."""
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
        score = tl.dot(query, tl.trans(key), input_precision=PRECISION) * (SCALE * 1.4426950408889634)
        score = tl.where(other[None, :] <= place[:, None], score, -float("inf"))
        before, highest = highest, tl.maximum(highest, tl.max(score, 1))
        weight, shrink = tl.exp2(score - highest[:, None]), tl.exp2(before - highest)
        total = total * shrink + tl.sum(weight, 1)
        result = tl.dot(weight.to(value.dtype), value, result * shrink[:, None], input_precision=PRECISION)
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
    H: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of one block of a head's tokens: of its keys and values, from the queries from here on; then of its
    queries, from the keys up to here. So all programs have equally many pairs of blocks to go through."""
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
        score = tl.dot(key, tl.trans(query), input_precision=PRECISION) * BASE  # (keys, queries)
        seen = (here[:, None] <= other[None, :]) & there[None, :]
        weight = tl.where(seen, tl.exp2(score - level[None, :]), 0.0)
        of_value = tl.dot(weight.to(of_mixed.dtype), of_mixed, of_value, input_precision=PRECISION)
        of_weight = tl.dot(value, tl.trans(of_mixed), input_precision=PRECISION)
        of_score = (weight * (of_weight - subtracted[None, :])).to(query.dtype)
        of_key = tl.dot(of_score, query, of_key, input_precision=PRECISION)
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
        score = tl.dot(query, tl.trans(key), input_precision=PRECISION) * BASE  # (queries, keys)
        weight = tl.where(other[None, :] <= here[:, None], tl.exp2(score - level[:, None]), 0.0)
        of_weight = tl.dot(of_mixed, tl.trans(value), input_precision=PRECISION)
        of_score = (weight * (of_weight - subtracted[:, None])).to(key.dtype)
        of_query = tl.dot(of_score, key, of_query, input_precision=PRECISION)
    _store_turned_back(dqkv, 3 * H * D, of_query * SCALE, rotary, tokens, here, mask, BLOCK, D)


def _precision():
    """As torch would compute float32's products."""
    return "tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee"


@torch.library.triton_op("nanomagvit2::attend", mutates_args=())
def _forward_attend(
    qkv: torch.Tensor, rotary: torch.Tensor, heads: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    rows, tokens, width = qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3
    turned, mixed, logsum = _empty_of_attend(qkv, heads)
    wrap_triton(_turn)[(tokens, rows)](
        qkv, rotary, turned, tokens, heads, width // heads, triton.next_power_of_2(2 * heads)
    )
    small = width // heads * qkv.element_size() <= 128  # three stages fit the shared memory of any GPU
    wrap_triton(_attend)[(triton.cdiv(tokens, BLOCK), rows * heads)](
        turned, qkv, mixed, logsum, tokens, (width // heads) ** -0.5, heads, width // heads, BLOCK, _precision(),
        num_stages=3 if small else 1,
    )  # fmt: skip
    return mixed, logsum, turned


def _empty_of_attend(qkv, heads):
    """(turned queries and keys, mixed, logsum)"""
    rows, tokens, width = qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3
    logsum = torch.empty((rows, heads, tokens), dtype=torch.float32, device=qkv.device)
    return qkv.new_empty((rows, tokens, 2 * width)), qkv.new_empty((rows, tokens, width)), logsum


@torch.library.triton_op("nanomagvit2::attend_backward", mutates_args=())
def _backward_attend(
    dmixed: torch.Tensor, turned: torch.Tensor, qkv: torch.Tensor, rotary: torch.Tensor, mixed: torch.Tensor,
    logsum: torch.Tensor,
) -> torch.Tensor:  # fmt: skip
    (rows, heads, tokens), width = logsum.shape, mixed.shape[2]
    dqkv, sums = torch.empty_like(qkv), torch.empty_like(logsum)
    wrap_triton(_sum_products)[(tokens, rows)](
        mixed, dmixed, sums, tokens, heads, width // heads, triton.next_power_of_2(heads)
    )
    wrap_triton(_attend_backward)[(triton.cdiv(tokens, BLOCK), rows * heads)](
        turned, qkv, rotary, dmixed, logsum, sums, dqkv, tokens, (width // heads) ** -0.5, heads, width // heads,
        BLOCK, _precision(), num_stages=1,  # more stages take registers that another program could have
    )  # fmt: skip
    return dqkv


def _setup_attend(ctx, inputs, output):
    qkv, rotary, _ = inputs
    mixed, logsum, turned = output
    ctx.save_for_backward(turned, qkv, rotary, mixed, logsum)


def _gradients_attend(ctx, dmixed, dlogsum, dturned):
    return torch.ops.nanomagvit2.attend_backward(dmixed.contiguous(), *ctx.saved_tensors), None, None


torch.library.register_autograd("nanomagvit2::attend", _gradients_attend, setup_context=_setup_attend)


def attend(qkv, rotary, heads):
    """Causal attention of turned queries and keys: qkv (rows, N, 3 d), rotary (2, N, D/2) -> (rows, N, d)."""
    return torch.ops.nanomagvit2.attend(qkv.contiguous(), rotary.contiguous(), heads)[0]
