"""GroupNorm and SiLU in one pass on a GPU: what stage I's time hangs on besides its convolutions.

Under autocast torch's GroupNorm reads and writes float32 and wants NCHW, while the fast convolutions want bf16 and
channels last. These Triton kernels take channels last in the input's own type and compute in float32: forward two reads
and a write, backward two reads of x and of the gradient and a write. Two values a channel and image are kept for the
backward pass, besides x. A clip (B, C, T, H, W) is a picture (B, C, T * H, W) to them; where a causal convolution
follows, they write the zeros in front of its first frame themselves, which spares a copy.

Letters: B batch, C channels, P pixels. A program works on one chunk of one image's pixels."""

import torch
import triton
import triton.language as tl
from torch.nn.functional import conv2d, conv3d, pad

TILE, WARPS, PROGRAMS = 2048, 8, 1024  # numbers a program takes at once, its warps, programs a launch


def norm_silu_takes(norm, x):
    """A GPU, channels last, a power of 2 of channels."""
    x, channels = x.flatten(2, -2), x.shape[1]
    fits = channels >= norm.num_groups and channels & (channels - 1) == 0 and x.dtype != torch.float64
    return x.is_cuda and fits and x.is_contiguous(memory_format=torch.channels_last)


def norm_silu(norm, x):
    return _norm(norm, x, norm.weight, norm.bias)[0]


def modulated_norm_takes(norm, x, scale, bias):
    return norm_silu_takes(norm, x)


def modulated_norm(norm, x, scale, bias):
    return _norm(norm, x, scale, bias, activate=False)[0]


def res_block_takes(block, x):
    width = block.conv1.out_channels
    return norm_silu_takes(block.norm1, x) and width & (width - 1) == 0


def res_block(block, x):
    # x comes back from the norm, so that its gradients, of the block and of the shortcut, are added in one pass.
    y, x = _norm(block.norm1, x, block.norm1.weight, block.norm1.bias)
    y = block.conv2(norm_silu(block.norm2, block.conv1(y)))
    return y + block.nin_shortcut(x)


def video_res_block_takes(block, x):
    width = block.conv1.conv_1.out_channels
    return norm_silu_takes(block.norm1, x) and width & (width - 1) == 0


def video_res_block(block, x):
    y, x = _norm(block.norm1, x, block.norm1.weight, block.norm1.bias, frames_before=2)
    y = conv3d(y, block.conv1.conv_1.weight, padding=(0, 1, 1))
    y, _ = _norm(block.norm2, y, block.norm2.weight, block.norm2.bias, frames_before=2)
    y = conv3d(y, block.conv2.conv_1.weight, padding=(0, 1, 1))
    # Of a CausalConv only its convolution: a kernel of 1 needs no zeros, and padding by none copies.
    return y + getattr(block.nin_shortcut, "conv_1", block.nin_shortcut)(x)


def upsampler_takes(upsampler, x):
    return x.is_cuda and x.is_contiguous(memory_format=torch.channels_last)


def upsampler(upsampler, x):
    """The bias is added on the way to the new order: by torch.compile, or in one operation where no gradient is due."""
    conv = upsampler.conv1
    x = conv2d(x, conv.weight, padding=1).movedim(1, -1).unflatten(-1, (2, 2, -1))  # (B, h, w, row, column, C)
    x = _add(x.transpose(2, 3), conv.bias.to(x.dtype).view(2, 1, 2, -1))  # (B, h, row, w, column, C)
    return x.flatten(3, 4).flatten(1, 2).movedim(-1, 1).contiguous(memory_format=torch.channels_last)


def video_upsampler_takes(upsampler, x):
    return x.is_cuda and x.is_contiguous(memory_format=torch.channels_last_3d)


def video_upsampler(upsampler, x):
    conv, strides = upsampler.conv1.conv_1, (upsampler.time_stride, 2, 2)
    x = conv3d(pad(x, (0, 0, 0, 0, 2, 0)), conv.weight, padding=(0, 1, 1)).movedim(1, -1).unflatten(-1, (*strides, -1))
    x = x.permute(0, 1, 4, 2, 5, 3, 6, 7)  # (B, t, time, h, row, w, column, C)
    x = _add(x, conv.bias.to(x.dtype).view(strides[0], 1, 2, 1, 2, -1)).flatten(5, 6).flatten(3, 4).flatten(1, 2)
    if strides[0] == 2:
        x = torch.cat([x[:, :1], x[:, 2:]], 1)
    return x.movedim(-1, 1).contiguous(memory_format=torch.channels_last_3d)


def _add(x, bias):
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return x + bias
    return torch.add(x, bias, out=torch.empty(x.shape, dtype=x.dtype, device=x.device))


@triton.jit
def _tile(start, chunk, pixels, C: tl.constexpr, ROWS: tl.constexpr):
    """(places, mask) of ROWS pixels of this program's chunk, from `start` on: (ROWS, C), (ROWS, 1)."""
    p = tl.program_id(0) * chunk + start + tl.arange(0, ROWS)
    return p[:, None] * C + tl.arange(0, C)[None, :], (p < pixels)[:, None]


@triton.jit
def _affine(stats, scale, bias, stride, image, C: tl.constexpr):
    """Mean, 1 / deviation, scale, bias of an image's channels, (C,). stride: 0 of scale and bias (C,), C of (B, C)."""
    c = tl.arange(0, C)
    mean, inverse = tl.load(stats + image * 2 * C + c), tl.load(stats + image * 2 * C + C + c)
    scale, bias = tl.load(scale + image * stride + c), tl.load(bias + image * stride + c)
    return mean, inverse, scale.to(tl.float32), bias.to(tl.float32)


@triton.jit
def _sum_channels(x, sums, pixels, chunk, C: tl.constexpr, ROWS: tl.constexpr):
    """This chunk's sums of x and of x^2, both of x less the image's first pixel: large means would cost digits."""
    number, image = tl.program_id(0), tl.program_id(1).to(tl.int64)
    c = tl.arange(0, C)
    x += image * pixels * C
    shift = tl.load(x + c).to(tl.float32)
    first = tl.zeros([ROWS, C], tl.float32)
    second = tl.zeros([ROWS, C], tl.float32)
    for start in range(0, chunk, ROWS):
        place, mask = _tile(start, chunk, pixels, C, ROWS)
        value = tl.load(x + place, mask, 0).to(tl.float32)
        value = tl.where(mask, value - shift[None, :], 0.0)
        first += value
        second += value * value
    sums += ((image * tl.num_programs(0) + number) * 2) * C + c
    tl.store(sums, tl.sum(first, 0))
    tl.store(sums + C, tl.sum(second, 0))


@triton.jit
def _load_sums(sums, image, chunks, C: tl.constexpr, MANY: tl.constexpr):
    """The two rows of `sums` (B, chunks, 2, C), added up over chunks."""
    c = tl.arange(0, C)
    first = tl.zeros([MANY, C], tl.float32)
    second = tl.zeros([MANY, C], tl.float32)
    for start in range(0, chunks, MANY):
        k = start + tl.arange(0, MANY)
        place = sums + ((image * chunks + k)[:, None] * 2) * C + c[None, :]
        first += tl.load(place, (k < chunks)[:, None], 0.0)
        second += tl.load(place + C, (k < chunks)[:, None], 0.0)
    return tl.sum(first, 0), tl.sum(second, 0)


@triton.jit
def _group_sum(value, C: tl.constexpr, GROUP: tl.constexpr):
    """Each channel's group's sum: (C,) -> (C,)."""
    total = tl.sum(tl.reshape(value, [C // GROUP, GROUP]), 1)
    return tl.reshape(tl.broadcast_to(total[:, None], [C // GROUP, GROUP]), [C])


@triton.jit
def _statistics(x, sums, stats, pixels, chunks, eps, C: tl.constexpr, GROUP: tl.constexpr, MANY: tl.constexpr):
    """Mean and 1 / deviation of each channel's group, (B, 2, C), from the chunks' sums."""
    image = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, C)
    first, second = _load_sums(sums, image, chunks, C, MANY)
    mean_c = tl.load(x + image * pixels * C + c).to(tl.float32) + first / pixels
    around_c = second - first * first / pixels  # squared deviations from the channel's own mean
    mean = _group_sum(mean_c, C, GROUP) / GROUP
    around = _group_sum(around_c + pixels * (mean_c - mean) * (mean_c - mean), C, GROUP)
    stats += image * 2 * C + c
    tl.store(stats, mean)
    tl.store(stats + C, 1 / tl.sqrt(around / (pixels * GROUP) + eps))


@triton.jit
def _normalize(
    x, stats, scale, bias, stride, y, pixels, before, chunk, SILU: tl.constexpr, C: tl.constexpr, ROWS: tl.constexpr
):  # fmt: skip
    """y = silu((x - mean) / deviation * scale + bias); y has `before` more pixels in front of each image's."""
    image = tl.program_id(1).to(tl.int64)
    x += image * pixels * C
    y += (image * (pixels + before) + before) * C
    mean, inverse, factor, offset = _affine(stats, scale, bias, stride, image, C)
    for start in range(0, chunk, ROWS):
        place, mask = _tile(start, chunk, pixels, C, ROWS)
        n = (tl.load(x + place, mask, 0).to(tl.float32) - mean[None, :]) * (inverse * factor)[None, :] + offset[None, :]
        if SILU:
            n = n * tl.sigmoid(n)
        tl.store(y + place, n.to(y.dtype.element_ty), mask)


@triton.jit
def _gradient_of_norm(x, dy, mean, inverse, scale, offset, SILU: tl.constexpr):
    """(normalized x, gradient of scale * normalized + offset)."""
    normal = (x - mean[None, :]) * inverse[None, :]
    if SILU:
        n = normal * scale[None, :] + offset[None, :]
        gate = tl.sigmoid(n)
        dy = dy * gate * (1 + n * (1 - gate))
    return normal, dy


@triton.jit
def _sum_gradients(
    x, dy, stats, scale, bias, stride, sums, pixels, before, chunk,
    SILU: tl.constexpr, C: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """The chunk's gradients of bias and of scale."""
    number, image = tl.program_id(0), tl.program_id(1).to(tl.int64)
    c = tl.arange(0, C)
    x += image * pixels * C
    dy += (image * (pixels + before) + before) * C
    mean, inverse, factor, offset = _affine(stats, scale, bias, stride, image, C)
    of_bias = tl.zeros([ROWS, C], tl.float32)
    of_scale = tl.zeros([ROWS, C], tl.float32)
    for start in range(0, chunk, ROWS):
        place, mask = _tile(start, chunk, pixels, C, ROWS)
        value = tl.load(x + place, mask, 0).to(tl.float32)
        gradient = tl.load(dy + place, mask, 0).to(tl.float32)  # 0 outside: adds nothing below
        normal, gradient = _gradient_of_norm(value, gradient, mean, inverse, factor, offset, SILU)
        of_bias += gradient
        of_scale += gradient * normal
    sums += ((image * tl.num_programs(0) + number) * 2) * C + c
    tl.store(sums, tl.sum(of_bias, 0))
    tl.store(sums + C, tl.sum(of_scale, 0))


@triton.jit
def _group_gradients(
    sums, scale, stride, grads, means, pixels, chunks, C: tl.constexpr, GROUP: tl.constexpr, MANY: tl.constexpr
):
    """Each image's gradients of bias and scale, (B, 2, C); and, (B, 2, C), what backward subtracts: the group's means
    of the gradient and of gradient times normalized x."""
    image = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, C)
    of_bias, of_scale = _load_sums(sums, image, chunks, C, MANY)
    tl.store(grads + image * 2 * C + c, of_bias)
    tl.store(grads + image * 2 * C + C + c, of_scale)
    factor = tl.load(scale + image * stride + c).to(tl.float32)
    count = pixels * GROUP
    tl.store(means + image * 2 * C + c, _group_sum(factor * of_bias, C, GROUP) / count)
    tl.store(means + image * 2 * C + C + c, _group_sum(factor * of_scale, C, GROUP) / count)


@triton.jit
def _gradient_of_x(
    x, dy, skip, stats, scale, bias, stride, means, dx, pixels, before, chunk,
    SILU: tl.constexpr, SKIP: tl.constexpr, C: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """dx, plus the gradient `skip` that reaches x past the norm."""
    image = tl.program_id(1).to(tl.int64)
    c = tl.arange(0, C)
    x += image * pixels * C
    dy += (image * (pixels + before) + before) * C
    skip += image * pixels * C
    dx += image * pixels * C
    mean, inverse, factor, offset = _affine(stats, scale, bias, stride, image, C)
    mean_first, mean_second = tl.load(means + image * 2 * C + c), tl.load(means + image * 2 * C + C + c)
    for start in range(0, chunk, ROWS):
        place, mask = _tile(start, chunk, pixels, C, ROWS)
        value = tl.load(x + place, mask, 0).to(tl.float32)
        gradient = tl.load(dy + place, mask, 0).to(tl.float32)
        normal, gradient = _gradient_of_norm(value, gradient, mean, inverse, factor, offset, SILU)
        gradient = gradient * factor[None, :] - mean_first[None, :] - normal * mean_second[None, :]
        gradient = gradient * inverse[None, :]
        if SKIP:
            gradient += tl.load(skip + place, mask, 0).to(tl.float32)
        tl.store(dx + place, gradient.to(dx.dtype.element_ty), mask)


def _shape(x):
    """(B, P, C, pixels a chunk, chunks an image, rows a tile)"""
    batch, channels, height, width = x.shape
    pixels, rows = height * width, max(1, TILE // channels)
    chunks = min(max(1, PROGRAMS // batch), triton.cdiv(pixels, rows))
    chunk = triton.cdiv(triton.cdiv(pixels, chunks), rows) * rows
    return batch, pixels, channels, chunk, triton.cdiv(pixels, chunk), rows


class _NormSilu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, scale, bias, groups, eps, activate, rows_before):
        batch, pixels, channels, chunk, chunks, rows = _shape(x)
        grid, stride = (chunks, batch), channels if scale.dim() == 2 else 0
        sums = x.new_empty((batch, chunks, 2, channels), dtype=torch.float32)
        stats = x.new_empty((batch, 2, channels), dtype=torch.float32)
        shape = batch, channels, rows_before + x.shape[2], x.shape[3]
        y = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
        y[:, :, :rows_before] = 0
        group, many, before = channels // groups, max(1, 2048 // channels), rows_before * x.shape[3]
        with torch.cuda.device(x.device):
            _sum_channels[grid](x, sums, pixels, chunk, channels, rows, num_warps=WARPS)
            _statistics[(batch,)](x, sums, stats, pixels, chunks, eps, channels, group, many)
            _normalize[grid](
                x, stats, scale, bias, stride, y, pixels, before, chunk, activate, channels, rows, num_warps=WARPS
            )
        ctx.save_for_backward(x, scale, bias, stats)
        ctx.groups, ctx.activate, ctx.before = groups, activate, before
        ctx.set_materialize_grads(False)  # where x went nowhere else, its second gradient stays None
        return y, x

    @staticmethod
    def backward(ctx, dy, skip):
        x, scale, bias, stats = ctx.saved_tensors
        batch, pixels, channels, chunk, chunks, rows = _shape(x)
        grid, stride = (chunks, batch), channels if scale.dim() == 2 else 0
        dy = dy.contiguous(memory_format=torch.channels_last)
        if skip is not None:
            skip = skip.contiguous(memory_format=torch.channels_last)
        sums = x.new_empty((batch, chunks, 2, channels), dtype=torch.float32)
        grads, means = (x.new_empty((batch, 2, channels), dtype=torch.float32) for _ in range(2))
        dx = torch.empty_like(x)
        group, many = channels // ctx.groups, max(1, 2048 // channels)
        with torch.cuda.device(x.device):
            _sum_gradients[grid](
                x, dy, stats, scale, bias, stride, sums, pixels, ctx.before, chunk,
                ctx.activate, channels, rows, num_warps=WARPS,
            )  # fmt: skip
            _group_gradients[(batch,)](sums, scale, stride, grads, means, pixels, chunks, channels, group, many)
            _gradient_of_x[grid](
                x, dy, dy if skip is None else skip, stats, scale, bias, stride, means, dx, pixels, ctx.before, chunk,
                ctx.activate, skip is not None, channels, rows, num_warps=WARPS,
            )  # fmt: skip
        if stride == 0:
            grads = grads.sum(0, keepdim=True)
        of_bias, of_scale = grads[:, 0].reshape(bias.shape), grads[:, 1].reshape(scale.shape)
        return dx, of_scale.to(scale.dtype), of_bias.to(bias.dtype), None, None, None, None


def _norm(norm, x, scale, bias, activate=True, frames_before=0):
    """silu(norm(x)) with this scale and bias, (C,) or (B, C); and x itself, whose gradient is added to the norm's.
    activate: False leaves SiLU out. frames_before: so many of zeros come before a clip's own."""
    height = x.shape[-2]
    flat = x.flatten(2, -2).contiguous(memory_format=torch.channels_last)  # (B, C, H, W) or (B, C, T * H, W)
    options = norm.num_groups, norm.eps, activate, frames_before * height
    y, flat = _NormSilu.apply(flat, scale.contiguous(), bias.contiguous(), *options)
    return (y, flat) if x.dim() == 4 else (y.unflatten(2, (-1, height)), flat.unflatten(2, (-1, height)))
