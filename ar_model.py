"""The autoregressive model of Open-MAGVIT2 (arXiv 2409.04410): a plain transformer over factorized tokens.

A token of 2^18 codes is two sub-tokens, "pre" (6 bits) and "post" (12 bits). A causal transformer runs over the tokens
of an image, or a clip, in raster order (the spatial blocks); from each of its outputs a small one, over a sequence of
two, predicts first the pre and then, given it, the post sub-token (the intra-token blocks).

    model, tokenizer = load_ar("B")                 # released name, released or own file, or run folder
    logits = model([pre, post], class_labels)       # teacher forcing: two of (B, N, 2^bits)
    losses = cross_entropies(logits, [pre, post])   # two scalars; their sum is the objective
    indices = model.generate(class_labels, cfg_scale=(1.9, 2.0), seeds=range(B))
    images = tokenizer.decode(indices.view(B, 16, 16))

Letters: B batch, N tokens (a whole grid's, or the first of them), d width, H heads, D head width, V vocabulary of a
sub-token. `rows` are the sequences that run: B, or 2 B where guidance adds the null class's branch."""

import dataclasses
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

import fast
from checkpoint import entries_of, locate, read_weights
from lfq import merge_indices, split_indices
from runtime import UserError, reading, to_device
from tokenizer import RELEASED_AR, entries_under, model_from_entries, own_tokenizer, tokenizer_from_entries


@dataclasses.dataclass(frozen=True)
class ARConfig:
    """Size of an `ARTransformer`. `factorized_bits`: bits of the pre and post sub-tokens; `grid`: an image's side, or a
    clip's (frames, rows, columns), in tokens; `dropout`: probability on the token sequence and on what attention and
    feed-forward add."""

    width: int
    heads: int
    spatial_layers: int
    intra_layers: int
    factorized_bits: tuple = (6, 12)
    grid: int | tuple = 16
    num_classes: int = 1000
    dropout: float = 0.1

    def __post_init__(self):
        for name in ("factorized_bits", "grid"):  # JSON makes tuples lists
            if isinstance(value := getattr(self, name), list):
                object.__setattr__(self, name, tuple(value))
        layers, bits = (self.spatial_layers, self.intra_layers), self.factorized_bits
        sizes = (self.width, self.heads, self.num_classes, *self.shape, *layers, *bits)
        if not all(type(n) is int and 1 <= n <= 10**6 for n in sizes) or self.tokens > 2**20 or max(layers) > 200:
            raise UserError(f"sizes must be whole numbers from 1, layers up to 200, tokens up to 1024 x 1024: {self}")
        unit = 4 if len(self.shape) == 2 else 16  # see `rotary_table`
        if (isinstance(self.grid, tuple) and len(self.grid) != 3) or self.width % (unit * self.heads):
            words = f"a head's width must be a whole multiple of {unit}, the grid a side or three numbers"
            raise UserError(f"width {self.width} over {self.heads} heads: {words}")
        if len(bits) != 2 or sum(bits) > 30 or not 0 <= self.dropout < 1:
            raise UserError(f"factorized_bits must be two, 30 at most in all, dropout from 0 to below 1: {self}")

    @property
    def head_width(self):
        return self.width // self.heads

    @property
    def shape(self):
        """(rows, columns) or (frames, rows, columns)."""
        return self.grid if isinstance(self.grid, tuple) else (self.grid, self.grid)

    @property
    def tokens(self):
        return math.prod(self.shape)


# B, L and XL are the paper's. The others are ours: tiny ones for tests and first runs on a CPU, and B for clips.
AR_SIZES = {
    "tiny": ARConfig(width=192, heads=4, spatial_layers=4, intra_layers=1, grid=4),
    "video_tiny": ARConfig(width=96, heads=3, spatial_layers=4, intra_layers=1, grid=(3, 5, 5), dropout=0.0),
    "video_B": ARConfig(width=1024, heads=16, spatial_layers=24, intra_layers=2, grid=(5, 16, 16), num_classes=101),
    "B": ARConfig(width=1024, heads=16, spatial_layers=24, intra_layers=2),
    "L": ARConfig(width=1280, heads=20, spatial_layers=36, intra_layers=3),
    "XL": ARConfig(width=1536, heads=24, spatial_layers=48, intra_layers=4),
}


# --- The network. Module names are those of the released files. -------------------------------------------------------
class RMSNorm(nn.RMSNorm):
    """torch's, in float32 also where x or the weight is in half precision."""

    def forward(self, x):
        return F.rms_norm(x.float(), self.normalized_shape, self.weight.float(), self.eps).type_as(x)


def rotary_table(shape, head_width, device=None):
    """cos and sin of the rotary embedding of a grid (rows, columns) or (frames, rows, columns): (2, N + 1, D/2)
    float32, token t at position t + 1. The D/2 rotation pairs are shared out over the grid's axes: the n pairs of an
    axis turn by place / 10000^(j/n), j = 0..n-1, where place is the token's row, column or frame."""
    shares = (4, 4) if len(shape) == 2 else (2, 3, 3)  # of D/2 pairs, in eighths: a half each, or a quarter for time
    places = torch.cartesian_prod(*(torch.arange(size, device=device) for size in shape))  # (N, axes), raster order
    angles = []
    for place, share in zip(places.unbind(-1), shares, strict=True):
        pairs = head_width // 2 * share // 8
        frequencies = 1 / 10000 ** (torch.arange(pairs, device=device) / pairs)
        angles.append(place[:, None] * frequencies)  # (N, pairs)
    angles = torch.cat(angles, dim=-1)  # (N, D/2)
    # Released weights: position 0 (the class) has cos = sin = 0, not angle 0, so its query and key vanish.
    return F.pad(torch.stack([angles.cos(), angles.sin()]), (0, 0, 1, 0))


def rotate(x, rotary):
    """Turn the adjacent pairs (2m, 2m+1) of x (..., N, D) by `rotary` (2, N, D/2), in float32."""
    cos, sin = rotary
    cos, sin = torch.stack([cos, cos], -1).flatten(-2), torch.stack([-sin, sin], -1).flatten(-2)  # (N, D)
    swapped = x.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)  # (..., N, D), the two of each pair exchanged
    return (x.float() * cos + swapped.float() * sin).type_as(x)


def rotated_heads(qkv, rotary, heads):
    """(rows, N, 3 d) -> q, k, v, three of (rows, H, N, D), q and k rotated."""
    q, k, v = qkv.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)  # (3, rows, H, N, D)
    return rotate(q, rotary), rotate(k, rotary), v


@fast.path("attention.causal")
def causal_attention(qkv, rotary, heads):
    """qkv (rows, N, 3 d), rotary (2, N, D/2) -> (rows, N, d)."""
    q, k, v = rotated_heads(qkv, rotary, heads)
    mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)  # (rows, H, N, D)
    return mixed.transpose(1, 2).flatten(2)  # (rows, H, N, D) -> (rows, N, d)


class Attention(nn.Module):
    """The spatial blocks' causal self-attention, (rows, N, d) -> the same. With a cache (2, rows, H, length, D) x is
    one token, N = 1, whose key and value are written there at `position`: it attends to the cache up to it."""

    def __init__(self, config):
        super().__init__()
        self.heads = config.heads
        self.wqkv = nn.Linear(config.width, 3 * config.width, bias=False)
        self.wo = nn.Linear(config.width, config.width, bias=False)

    def forward(self, x, rotary, cache=None, position=0):
        qkv = self.wqkv(x)  # (rows, N, 3 d)
        if cache is None:
            return self.wo(causal_attention(qkv, rotary, self.heads))
        q, k, v = rotated_heads(qkv, rotary, self.heads)  # (rows, H, 1, D)
        cache[0, :, :, position], cache[1, :, :, position] = k[:, :, 0], v[:, :, 0]
        k, v = cache[:, :, :, : position + 1]  # (rows, H, position + 1, D)
        return self.wo(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))  # (rows, 1, d)


class PairAttention(Attention):
    """The intra-token blocks' causal self-attention, over one or two elements: (rows, 1 or 2, d) -> the same.

    Released weights: the pair takes positions 0 and 1 of the spatial blocks' rotary table. Position 0 makes the first
    element's q and k vanish, position 1 (grid place 0) turns nothing. So the first element gets its own v, and the
    second weighs both v by a softmax of the scores (0, q.k / sqrt(D)), which is a sigmoid."""

    def forward(self, x):
        w_qk, w_v = self.wqkv.weight.split([2 * x.shape[-1], x.shape[-1]])
        v = F.linear(x, w_v)  # (rows, 1 or 2, d)
        if x.shape[1] == 1:
            return self.wo(v)
        q, k = F.linear(x[:, 1], w_qk).unflatten(-1, (2, self.heads, -1)).float().unbind(1)  # (rows, H, D)
        first, second = v.unflatten(-1, (self.heads, -1)).float().unbind(1)  # (rows, H, D)
        score = (q * k).sum(-1, keepdim=True) / math.sqrt(q.shape[-1])  # (rows, H, 1)
        second = torch.lerp(first, second, score.sigmoid()).flatten(1)  # (rows, d)
        return self.wo(torch.stack([v[:, 0], second.type_as(v)], dim=1))  # (rows, 2, d)


class FeedForward(nn.Module):
    """w2(silu(w1 x) * w3 x); its width is 2/3 of 4 d, rounded up to a multiple of 256."""

    def __init__(self, config):
        super().__init__()
        hidden = math.ceil(int(2 * 4 * config.width / 3) / 256) * 256
        self.w1 = nn.Linear(config.width, hidden, bias=False)
        self.w3 = nn.Linear(config.width, hidden, bias=False)
        self.w2 = nn.Linear(hidden, config.width, bias=False)

    def forward(self, x):
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class Block(nn.Module):
    """Pre-norm transformer block, (rows, N, d) -> (rows, N, d); dropout on what attention and feed-forward add."""

    def __init__(self, config, attention=Attention):
        super().__init__()
        self.dropout = config.dropout
        self.attention_norm = RMSNorm(config.width, eps=1e-5)
        self.attention = attention(config)
        self.ffn_norm = RMSNorm(config.width, eps=1e-5)
        self.feed_forward = FeedForward(config)

    def forward(self, x, *place):  # place: rotary, cache, position, as the attention takes them
        x = x + F.dropout(self.attention(self.attention_norm(x), *place), self.dropout, self.training)
        return x + F.dropout(self.feed_forward(self.ffn_norm(x)), self.dropout, self.training)


class ARTransformer(nn.Module):
    """Class-conditional transformer over tokens of two sub-tokens, initialised N(0, 0.02), both heads zero.
    State-dict entries are the released ones without `transformer.` before them. `class_dropout` is the probability with
    which training replaces an image's class by the null class, number `num_classes`. `class_names`: a list, or None."""

    def __init__(self, config):
        super().__init__()
        self.config, self.class_dropout, self.class_names = config, 0.1, None
        pre, post = (2**bits for bits in config.factorized_bits)
        self.pre_emb = nn.Embedding(pre, config.width)
        self.post_emb = nn.Embedding(post, config.width)
        # The last row is the null class, "no class".
        self.class_emb = nn.ModuleDict({"embedding_table": nn.Embedding(config.num_classes + 1, config.width)})
        self.spatial_blocks = nn.ModuleList(Block(config) for _ in range(config.spatial_layers))
        self.factorized_blocks = nn.ModuleList(Block(config, PairAttention) for _ in range(config.intra_layers))
        self.norm = RMSNorm(config.width, eps=1e-5)
        self.head = nn.ModuleList(nn.Linear(config.width, size, bias=False) for size in (pre, post))
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)
        for head in self.head:
            nn.init.zeros_(head.weight)

    def rotary(self):
        # Not a buffer, which .to(bfloat16) would round.
        return rotary_table(self.config.shape, self.config.head_width, self.norm.weight.device)

    def forward(self, sub_indices, class_labels):
        """Teacher forcing: logits of every token given its class, the tokens before it, and for post its pre.
        sub_indices: pre and post, (B, N) integers each, N up to a grid's. class_labels: (B,) in 0..num_classes. Returns
        [logits_pre (B, N, V_pre), logits_post (B, N, V_post)]. In train mode classes and tokens drop out, drawn from
        torch's global generator. Raises UserError where N is larger than the grid."""
        pre, post = sub_indices
        batch, tokens = pre.shape
        if tokens > self.config.tokens:
            raise UserError(f"{tokens} tokens do not fit this model's grid of {'x'.join(map(str, self.config.shape))}")
        if self.training:
            dropped = torch.rand(batch, device=class_labels.device) < self.class_dropout
            class_labels = class_labels.masked_fill(dropped, self.config.num_classes)
        # The class predicts token 0, token t - 1 predicts token t: the last token only ever is an answer.
        embedded_pre = self.pre_emb(pre)  # (B, N, d)
        given = embedded_pre[:, :-1] + self.post_emb(post[:, :-1])  # (B, N - 1, d)
        x = torch.cat([self.class_emb["embedding_table"](class_labels)[:, None], given], dim=1)  # (B, N, d)
        x = F.dropout(x, self.config.dropout, self.training)
        rotary = self.rotary()[:, :tokens].contiguous()  # (2, N, D/2)
        for block in self.spatial_blocks:
            x = block(x, rotary)
        return self.predict(x, embedded_pre)

    def predict(self, x, embedded_pre):
        """What the spatial blocks made of each position, and its pre sub-token, (B, N, d) both -> the two logits."""
        pair = torch.stack([x, embedded_pre], dim=2).flatten(0, 1)  # (B, N, 2, d) -> (B*N, 2, d)
        for block in self.factorized_blocks:
            pair = block(pair)
        parts = self.norm(pair).unflatten(0, x.shape[:2]).unbind(2)  # (B*N, 2, d) -> two of (B, N, d)
        return [head(part) for head, part in zip(self.head, parts, strict=True)]

    @torch.no_grad()
    def generate(
        self, class_labels, cfg_scale=(1.0, 1.0), temperature=(1.0, 1.0), top_k=(0, 0), top_p=(1.0, 1.0),
        seeds=None, max_tokens=None, given=None,
    ):  # fmt: skip
        """Draw the tokens of images, or clips, with classifier-free guidance; always in eval mode.
        class_labels: (B,) in 0..num_classes. Every option is a pair (pre, post): `cfg_scale`, where (1, 1) is no
        guidance and runs no null branch; `temperature` > 0; `top_k`, 0 is off; `top_p` in (0, 1], 1 is off. seeds: one
        integer an image (0..B-1 where None); an image is a function of its seed, class and options, not of its batch.
        max_tokens: stop after so many (None: all). given: first tokens to keep, merged indices (B, n) int64, n up to
        max_tokens. Returns merged indices (B, max_tokens) int64. Raises UserError for options out of range."""
        config, device = self.config, self.norm.weight.device
        tokens = config.tokens if max_tokens is None else max_tokens
        seeds = list(range(len(class_labels)) if seeds is None else seeds)
        if not len(seeds) == len(class_labels) > 0:
            raise UserError(f"{len(class_labels)} images need as many seeds, not {len(seeds)}, and at least one")
        if not 1 <= tokens <= config.tokens:
            raise UserError(f"max_tokens must be 1 to {config.tokens} (the grid), not {tokens}")
        lowest, highest = class_labels.aminmax()
        if lowest < 0 or highest > config.num_classes:
            raise UserError(f"class labels must be 0 to {config.num_classes} (no class), not {lowest} to {highest}")
        options = [SubTokenOptions(*part) for part in zip(cfg_scale, temperature, top_k, top_p)]
        if len(options) != 2 or not all(abs(s) <= 1e3 >= t >= 1e-3 and k >= 0 and 0 < p <= 1 for s, t, k, p in options):
            raise UserError("pairs of cfg_scale up to 1000, temperature 0.001 to 1000, top_k from 0, 0 < top_p <= 1")
        given = torch.zeros(len(class_labels), 0, dtype=torch.int64) if given is None else given
        bits, fits = sum(config.factorized_bits), given.shape[:-1] == class_labels.shape and given.shape[-1] <= tokens
        if not fits or given.dtype != torch.int64 or (given >> bits).any():
            raise UserError(f"given tokens must be int64 ({len(class_labels)}, up to {tokens}), 0 to {2**bits - 1}")
        # Draws are made in float64, which accelerators but CUDA's lack.
        dtype = torch.float64 if device.type in ("cpu", "cuda") else torch.float32
        uniforms = to_device(image_uniforms(seeds, config.tokens).to(dtype), device)
        labels = class_labels.to(device, non_blocking=True)
        given = torch.stack(split_indices(given.to(device), config.factorized_bits), dim=-1)  # (B, n, 2)
        if any(scale != 1 for scale in cfg_scale):  # one batch: the images' classes, then as many null classes
            labels = torch.cat([labels, torch.full_like(labels, config.num_classes)])
        was_training = self.training
        self.eval()
        try:
            sub_tokens, logits = draw_tokens(self, labels, uniforms, options, tokens, given)
        finally:
            self.train(was_training)
        if not all(part.isfinite().all() for part in logits):  # what overflows once stays in the cache
            raise UserError("the transformer's logits are not finite; use --precision fp32 or bf16")
        return merge_indices(sub_tokens.unbind(-1), config.factorized_bits)


def cross_entropies(logits, sub_indices):
    """The mean cross entropies (pre, post), in nats, float32, of two logits (B, N, V) and indices (B, N)."""
    pairs = zip(logits, sub_indices, strict=True)
    return [F.cross_entropy(part.float().flatten(0, 1), answer.flatten()) for part, answer in pairs]


class SubTokenOptions(NamedTuple):
    """How a sub-token is drawn. scale: of guidance, where a null branch runs."""

    scale: float
    temperature: float
    top_k: int
    top_p: float

    def adjust(self, logits, images):
        """Guidance, temperature, top-k, top-p: logits (rows, V) -> (images, V)."""
        if len(logits) > images:
            cond, null = logits.chunk(2)
            logits = null + self.scale * (cond - null)
        return filter_logits(logits / self.temperature, self.top_k, self.top_p)


@fast.path("decode.draw_tokens")
def draw_tokens(model, labels, uniforms, options, tokens, given):
    """Draw B images' tokens, one after the other. Nothing in here waits for the device.
    labels (rows,); uniforms (B, a whole grid's tokens, 2); options: the two sub-tokens' `SubTokenOptions`; given: the
    first sub-tokens (B, n, 2). Returns sub-tokens (B, tokens, 2) int64, and the last token's two logits (rows, V)."""
    rotary, config, drawn = model.rotary(), model.config, []
    x = model.class_emb["embedding_table"](labels)[:, None]  # (rows, 1, d)
    shape = (config.spatial_layers, 2, len(labels), config.heads, tokens, config.head_width)
    caches = model.spatial_blocks[0].attention.wqkv(x).new_empty(shape)  # keys and values, in the type that computes
    for t in range(tokens):
        for block, cache in zip(model.spatial_blocks, caches, strict=True):
            x = block(x, rotary[:, t : t + 1], cache, t)
        elements, sub_tokens, logits = x, [], []
        for part, embedding in enumerate((model.pre_emb, model.post_emb)):
            y = elements  # (rows, 1, d), then with the pre sub-token (rows, 2, d)
            for block in model.factorized_blocks:
                y = block(y)
            logits.append(model.head[part](model.norm(y[:, -1])).float())  # (rows, V)
            adjusted = options[part].adjust(logits[part], len(uniforms))  # (B, V)
            sub_tokens.append(given[:, t, part] if t < given.shape[1] else draw(adjusted, uniforms[:, t, part]))  # (B,)
            # Both branches of guidance go on from the token drawn.
            embedded = embedding(sub_tokens[part]).repeat(len(x) // len(uniforms), 1)  # (B, d) -> (rows, d)
            elements = torch.cat([elements, embedded[:, None]], dim=1)
        x = elements[:, 1:].sum(1, keepdim=True)  # (rows, 1, d): the two embeddings' sum is the next position's input
        drawn.append(torch.stack(sub_tokens, dim=-1))  # (B, 2)
    return torch.stack(drawn, dim=1), logits


def filter_logits(logits, top_k=0, top_p=1.0):
    """Logits (..., V) with -inf for what is left out; at least one entry stays. top_k: keep those that reach the k-th
    largest (0: all). top_p: of these, keep the fewest likeliest whose probabilities' sum passes p (1: all)."""
    if 0 < top_k < logits.shape[-1]:
        kth = logits.topk(top_k).values[..., -1:]
        logits = logits.masked_fill(logits < kth, -math.inf)
    if top_p < 1:
        ordered, order = logits.sort(dim=-1, descending=True, stable=True)
        reached = ordered.softmax(-1).cumsum(-1)
        keep = F.pad(reached[..., :-1], (1, 0)) <= top_p  # while all likelier ones together have not passed p
        keep = keep.scatter(-1, order, keep)  # from the order of likelihood back to that of the vocabulary
        logits = logits.masked_fill(~keep, -math.inf)
    return logits


def draw(logits, uniforms):
    """An entry of softmax(logits) by inverse CDF: logits (B, V), uniforms (B,) in [0, 1) -> (B,) int64.
    It is the first entry whose cumulative probability, computed in the uniforms' type, passes u."""
    likelihood = logits.to(uniforms.dtype).softmax(-1)
    # Entries of probability 0 are never drawn, although a GPU's parallel sums may step up there by rounding.
    cumulative = likelihood.cumsum(-1).masked_fill(likelihood == 0, 0)
    # Rounding may leave the total below u: then the entry that reaches the total is drawn.
    passes = (cumulative > uniforms[:, None]) | (cumulative == cumulative.amax(-1, keepdim=True))
    return passes.int().argmax(-1)  # the first


def image_uniforms(seeds, tokens):
    """Uniforms (B, N, 2) in [0, 1), float64, on the CPU: each image's come from its own seed."""
    generators = [torch.Generator().manual_seed(int(seed)) for seed in seeds]
    return torch.stack([torch.rand(tokens, 2, dtype=torch.float64, generator=generator) for generator in generators])


# --- Reading files ----------------------------------------------------------------------------------------------------
def load_ar(path_or_name, config=None):
    """(ARTransformer, the file's Tokenizer or None), both in eval mode and on the CPU. path_or_name: a released name
    ("B", "L", "XL", "emoji"), a released transformer file, this project's own file or run folder, or a bare state dict.
    B, L and XL are known by their width; own files carry configuration and the classes' names (`class_names`, else
    None); others need `config`. Raises UserError naming the file, the entries at fault and the size expected."""
    path = locate(path_or_name, RELEASED_AR)
    with reading(path, "a transformer file"):
        content = read_weights(path)
        own = isinstance(content, dict) and content.get("kind") == "ar"
        config, entries, class_names, tokenizer = (_own if own else _released)(content, path, config)
        model = model_from_entries(ARTransformer, config, AR_SIZES, entries, path, "transformer")
        model.class_names = class_names
        return model, tokenizer


def _own(content, path, config):
    """(ARConfig, entries, names of the classes or None, Tokenizer or None) of this project's own file."""
    try:
        config, entries, names = config or ARConfig(**content["config"]), content["model"], content["class_names"]
        if names and [type(name) for name in names] != [str] * config.num_classes:
            raise UserError(f"class_names are not those of {config.num_classes} classes")
        return config, entries, names, own_tokenizer(content, path) if content["tokenizer"] else None
    except (KeyError, TypeError, UserError) as error:
        raise UserError(f"{path} is no whole transformer file of this project: {error}") from None


def _released(content, path, config):
    """The same of a released file, or of a bare state dict."""
    content, prefixes = entries_of(content, path), ("transformer.", "first_stage_model.")
    entries, carried = (entries_under(prefix, content) for prefix in prefixes)
    bare = {name: value for name, value in content.items() if not name.startswith(prefixes)}
    if twice := bare.keys() & entries.keys():
        raise UserError(f"{path} holds entry {min(twice)} twice, with and without transformer. before it")
    entries |= bare
    tokenizer = tokenizer_from_entries(carried, path) if carried else None
    return config or _config_by_width(entries, path), entries, None, tokenizer


def _config_by_width(entries, source):
    """The paper's size whose width the entries have: the width fixes heads and grid."""
    table = entries.get("class_emb.embedding_table.weight")
    if not isinstance(table, torch.Tensor) or table.ndim != 2:
        if any(name.startswith(("encoder.", "decoder.", "tokenizer")) for name in entries):
            raise UserError(f"{source} is a tokenizer file; give one of train_ar.py, or AR_256_B.ckpt")
        raise UserError(f"{source} holds no transformer: entry class_emb.embedding_table.weight is missing")
    width, sizes = table.shape[1], {AR_SIZES[name].width: AR_SIZES[name] for name in ("B", "L", "XL")}
    if width not in sizes:
        raise UserError(f"{source} is a bare state dict of width {width}, no released size: take a file of train_ar.py")
    return sizes[width]
