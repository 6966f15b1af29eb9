"""Drawing tokens on a GPU: one token of all images as one CUDA graph over a handful of Triton kernels.

A token takes a few hundred small operations, whose launches take longer than they do: captured once, they are launched
as one graph, for any position, since the position is a number in the GPU's memory. Weights are kept once more in the
type that computes (half precision under autocast), w1 and w3 in one matrix. The residual stream stays in float32.

Letters: B images, rows B or, with guidance, 2 B, d width, H heads, D head width, N tokens."""

import weakref

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

_decoders = weakref.WeakKeyDictionary()  # the last Decoder of each model, for as long as the model lives


def draw_tokens_takes(model, labels, uniforms, options, tokens, given):
    """A GPU, and a head width that is a power of 2 from 16."""
    width = model.config.head_width
    return model.norm.weight.is_cuda and width >= 16 and width & (width - 1) == 0


def draw_tokens(model, labels, uniforms, options, tokens, given):
    dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else model.norm.weight.dtype
    # Where the weights lie, too: a graph reads some of them there.
    places = tuple(parameter.data_ptr() for parameter in model.parameters())
    key = (len(labels), len(uniforms), tuple(options), dtype, places)
    if model not in _decoders or _decoders[model].key != key:
        forget(model)  # the old one's memory goes before the new one's comes
        _decoders[model] = Decoder(model, len(labels), len(uniforms), options, dtype, key)
    decoder = _decoders[model]
    return decoder.draw(labels, uniforms, tokens, given), decoder.logits


def forget(model):
    """Give back the memory of the model's Decoder."""
    _decoders.pop(model, None)


@triton.jit
def _share(x, weight, y, rows, N, K, SHARES: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """y[s] = x weight^T over the s-th of SHARES parts of K; a program BN columns of one.
    x (rows, K), up to BM rows; weight (N, K); y (SHARES, rows, N) float32."""
    m, n, k = tl.arange(0, BM), tl.program_id(0) * BN + tl.arange(0, BN), tl.arange(0, BK)
    share = tl.program_id(1)
    x += m[:, None] * K + k[None, :]
    weight += n[None, :] * K + k[:, None]
    total = tl.zeros((BM, BN), tl.float32)
    for start in range(share * (K // SHARES), (share + 1) * (K // SHARES), BK):
        left = tl.load(x + start, (m < rows)[:, None], 0.0)
        total = tl.dot(left, tl.load(weight + start), total, input_precision="ieee")
    y += share * rows * N
    tl.store(y + m[:, None] * N + n[None, :], total, (m < rows)[:, None])


@triton.jit
def _add_norm(x, delta, weight, y, size, width, eps, SHARES: tl.constexpr, BLOCK: tl.constexpr):
    """x += each of SHARES deltas, `size` apart, then y = RMSNorm(x) * weight; a program a row. x float32."""
    row = tl.program_id(0)
    i = tl.arange(0, BLOCK)
    mask = i < width
    value = tl.load(x + row * width + i, mask, 0.0)
    for share in tl.static_range(SHARES):
        value += tl.load(delta + share * size + row * width + i, mask, 0.0).to(tl.float32)
    if SHARES:
        tl.store(x + row * width + i, value, mask)
    inverse = 1 / tl.sqrt(tl.sum(value * value) / width + eps)
    weight = tl.load(weight + i, mask, 0.0)
    tl.store(y + row * width + i, (value * inverse * weight).to(y.dtype.element_ty), mask)


@triton.jit
def _attend(
    qkv, rotary, keys, values, position, y, table, length, scale,
    H: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Rotate this position's query and key, put key and value into the cache, attend to positions 0..this one.
    qkv (rows, 3 H D); rotary (2, table, D/2); keys, values (rows, H, length, D), of a key the even entries before the
    odd ones; y (rows, H D). A program a row and head; softmax on the way, as blocks of the cache come in."""
    row, head = tl.program_id(0), tl.program_id(1)
    here = tl.load(position)
    pair, i, k = tl.arange(0, D // 2), tl.arange(0, D), tl.arange(0, BLOCK)
    cos, sin = tl.load(rotary + here * (D // 2) + pair), tl.load(rotary + (table + here) * (D // 2) + pair)
    qkv += row * 3 * H * D + head * D
    even, odd = tl.load(qkv + 2 * pair).to(tl.float32), tl.load(qkv + 2 * pair + 1).to(tl.float32)
    query_even, query_odd = (even * cos - odd * sin) * scale, (even * sin + odd * cos) * scale
    qkv += H * D
    even, odd = tl.load(qkv + 2 * pair).to(tl.float32), tl.load(qkv + 2 * pair + 1).to(tl.float32)
    key_even, key_odd = even * cos - odd * sin, even * sin + odd * cos
    value = tl.load(qkv + H * D + i)
    keys += (row * H + head).to(tl.int64) * length * D
    values += (row * H + head).to(tl.int64) * length * D
    tl.store(keys + here * D + pair, key_even.to(keys.dtype.element_ty))
    tl.store(keys + here * D + D // 2 + pair, key_odd.to(keys.dtype.element_ty))
    tl.store(values + here * D + i, value)

    highest = tl.sum(query_even * key_even) + tl.sum(query_odd * key_odd)
    total = 1.0
    mixed = value.to(tl.float32)
    for start in range(0, here, BLOCK):
        mask = start + k < here
        place = (start + k)[:, None] * D
        past_even = tl.load(keys + place + pair[None, :], mask[:, None], 0.0).to(tl.float32)
        past_odd = tl.load(keys + place + D // 2 + pair[None, :], mask[:, None], 0.0).to(tl.float32)
        past = tl.load(values + place + i[None, :], mask[:, None], 0.0).to(tl.float32)
        score = tl.sum(past_even * query_even[None, :], 1) + tl.sum(past_odd * query_odd[None, :], 1)
        score = tl.where(mask, score, -float("inf"))
        before, highest = highest, tl.maximum(highest, tl.max(score))
        shrink, weight = tl.exp(before - highest), tl.exp(score - highest)
        total = total * shrink + tl.sum(weight)
        mixed = mixed * shrink + tl.sum(weight[:, None] * past, 0)
    tl.store(y + row * H * D + head * D + i, (mixed / total).to(y.dtype.element_ty))


@triton.jit
def _draw(
    logits, uniforms, position, drawn, pre, post, x, images, length, width, scale, temperature,
    PART: tl.constexpr, GUIDE: tl.constexpr, TWICE: tl.constexpr, V: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Guidance, temperature and the draw by inverse CDF, in float64, as `ar_model.draw`; a program an image.
    logits (rows, V); uniforms (B, N, 2); the sub-token goes to drawn (2, B, N), unless one is given there (not -1). The
    next input goes to the image's rows of x (rows, d): after pre its embedding, after post the sum of both."""
    image = tl.program_id(0)
    here = tl.load(position)
    v = tl.arange(0, V)
    value = tl.load(logits + image * V + v).to(tl.float32)
    if GUIDE:
        null = tl.load(logits + (images + image) * V + v).to(tl.float32)
        value = null + scale * (value - null)
    value = (value / temperature).to(tl.float64)
    likelihood = tl.exp(value - tl.max(value))
    likelihood = likelihood / tl.sum(likelihood)
    cumulative = tl.where(likelihood > 0, tl.cumsum(likelihood), 0.0)
    passes = (cumulative > tl.load(uniforms + (image * length + here) * 2 + PART)) | (cumulative == tl.max(cumulative))
    place = drawn + (PART * images + image) * length + here
    given = tl.load(place)
    found = tl.where(given >= 0, given, tl.min(tl.where(passes, v, V)))
    tl.store(place, found)
    i = tl.arange(0, BLOCK)
    mask = i < width
    if PART == 0:
        following = tl.load(pre + found * width + i, mask, 0.0)
    else:
        before = tl.load(drawn + image * length + here)
        following = tl.load(pre + before * width + i, mask, 0.0)
        following += tl.load(post + found * width + i, mask, 0.0)
    for branch in tl.static_range(2 if TWICE else 1):  # both branches of guidance go on from the token drawn
        tl.store(x + (branch * images + image) * width + i, following, mask)


@triton.jit
def _gate(h, y, width, BLOCK: tl.constexpr):
    """y = silu(first half of h) * second half; h (rows, 2 width)."""
    row, i = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = i < width
    first = tl.load(h + row * 2 * width + i, mask, 0.0).to(tl.float32)
    second = tl.load(h + row * 2 * width + width + i, mask, 0.0).to(tl.float32)
    tl.store(y + row * width + i, (first * tl.sigmoid(first) * second).to(y.dtype.element_ty), mask)


class Decoder:
    """The graph of one token for a fixed number of images and fixed options, with the memory that it works on."""

    def __init__(self, model, rows, images, options, dtype, key):
        config, device = model.config, model.norm.weight.device
        # Parts of the model, not the model: it would never be let go of.
        self.blocks = [*model.spatial_blocks, *model.factorized_blocks]
        self.embeddings, self.class_table = [model.pre_emb.weight, model.post_emb.weight], model.class_emb
        self.norm, self.head = model.norm, model.head
        self.images, self.options, self.dtype, self.key = images, options, dtype, key
        self.guide, self.length = rows > images, config.tokens

        def empty(*shape, dtype=dtype):
            return torch.zeros(shape, dtype=dtype, device=device)

        self.weights = [self._weights_of(block) for block in self.blocks]
        self.heads = [head.weight.detach().to(dtype, copy=True) for head in model.head]
        self.rotary = model.rotary().contiguous()
        heads, width = config.heads, config.head_width
        self.spatial = empty(config.spatial_layers, 2, rows, heads, self.length, width)
        self.intra = empty(config.intra_layers, 2, rows, heads, 2, width)
        self.x = empty(rows, config.width, dtype=torch.float32)
        self.uniforms = empty(images, self.length, 2, dtype=torch.float64)
        self.drawn = empty(2, images, self.length, dtype=torch.int64)
        self.position = empty(1, dtype=torch.int32)
        self.places = torch.arange(2, dtype=torch.int32, device=device)  # of the two sub-tokens
        self.logits, self.graph = [None, None], None

    def _weights_of(self, block):
        """A block's matrices in the type that computes, w1 and w3 as one."""
        ffn, attention = block.feed_forward, block.attention
        both = torch.cat([ffn.w1.weight, ffn.w3.weight])
        matrices = [attention.wqkv.weight, attention.wo.weight, both, ffn.w2.weight]
        matrices = [weight.detach().to(self.dtype).clone() for weight in matrices]
        return [block.attention_norm.weight.float(), block.ffn_norm.weight.float(), *matrices]

    def _add_norm(self, x, delta, weight):
        y = torch.empty(x.shape, dtype=self.dtype, device=x.device)
        shares = 0 if delta is None else len(delta)
        _add_norm[(len(x),)](
            x, x if delta is None else delta, weight, y, x.numel(), x.shape[1], 1e-5, shares,
            triton.next_power_of_2(x.shape[1]),
        )  # fmt: skip
        return y

    def _deltas(self, x, weight):
        """x weight^T as (shares, rows, d), to be summed by `_add_norm`: with few rows and columns, all multiprocessors
        have work only if K is shared out, too."""
        (rows, K), N = x.shape, len(weight)
        if rows > 128 or N > 1024 or N % 32 or K % 256:
            return F.linear(x, weight)[None]
        y = torch.empty((4, rows, N), dtype=torch.float32, device=x.device)
        _share[(N // 32, 4)](x, weight, y, rows, N, K, 4, 128, 32, 64, num_warps=8, num_stages=4)
        return y

    def _block(self, x, delta, weights, cache, position):
        """One block at `position`: adds delta to x in place, returns what is to be added next."""
        norm1, norm2, wqkv, wo, w13, w2 = weights
        rows, heads, length, width = cache.shape[1:]
        qkv = F.linear(self._add_norm(x, delta, norm1), wqkv)
        mixed = torch.empty((rows, heads * width), dtype=self.dtype, device=x.device)
        _attend[(rows, heads)](
            qkv, self.rotary, *cache, position, mixed, self.rotary.shape[1], length, width**-0.5, heads, width,
            BLOCK=32, num_warps=1,
        )  # fmt: skip
        hidden = F.linear(self._add_norm(x, self._deltas(mixed, wo), norm2), w13)  # w1 x, w3 x
        gated = hidden.new_empty(rows, w2.shape[1])
        _gate[(rows, triton.cdiv(w2.shape[1], 1024))](hidden, gated, w2.shape[1], 1024)
        return self._deltas(gated, w2)

    def _step(self):
        """One token of every image, as `ar_model.draw_tokens`; then the next position."""
        x, delta, layers = self.x, None, len(self.spatial)
        for weights, cache in zip(self.weights[:layers], self.spatial, strict=True):
            delta = self._block(x, delta, weights, cache, self.position)
        for part in (0, 1):
            for weights, cache in zip(self.weights[layers:], self.intra, strict=True):
                delta = self._block(x, delta, weights, cache, self.places[part:])
            self.logits[part] = F.linear(self._add_norm(x, delta, self.norm.weight), self.heads[part])
            self._draw_part(self.logits[part], part)
            delta = None  # x is new
        self.position += 1

    def _draw_part(self, logits, part):
        option, guide, temperature = self.options[part], self.guide, self.options[part].temperature
        if option.top_k or option.top_p < 1:  # the filters sort: torch's own kernels, and then a plain draw
            logits, guide, temperature = option.adjust(logits.float(), self.images), False, 1.0
        width = self.x.shape[1]
        _draw[(self.images,)](
            logits, self.uniforms, self.position, self.drawn, *self.embeddings, self.x, self.images, self.length, width,
            option.scale, temperature, part, guide, self.guide, logits.shape[1], triton.next_power_of_2(width),
            num_warps=8,
        )  # fmt: skip

    def draw(self, labels, uniforms, tokens, given):
        """labels (rows,), uniforms (B, N, 2) float64, given (B, n, 2) -> sub-tokens (B, tokens, 2)."""
        if self.graph is None:
            self._step()  # compiles the kernels, and lets cuBLAS choose
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self._step()
        else:  # take the model's weights anew: they may have been trained since
            for block, weights in zip(self.blocks, self.weights, strict=True):
                torch._foreach_copy_(weights, self._weights_of(block))
            torch._foreach_copy_(self.heads, [head.weight for head in self.head])
        self.uniforms.copy_(uniforms)
        self.x.copy_(self.class_table["embedding_table"](labels))
        self.drawn.fill_(-1)  # to be drawn
        self.drawn[:, :, : given.shape[1]] = given.permute(2, 0, 1)
        self.position.zero_()
        for _ in range(tokens):
            self.graph.replay()
        return self.drawn[:, :, :tokens].permute(1, 2, 0)
