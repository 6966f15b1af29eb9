"""The autoregressive model of Open-MAGVIT2 (arXiv 2409.04410): a plain transformer over factorized tokens.

A token of 2^18 codes is two sub-tokens, "pre" (6 bits) and "post" (12 bits). A causal transformer runs over the image's
tokens in raster order (the spatial blocks); from each of its outputs a small one, over a sequence of two, predicts
first the pre and then, given it, the post sub-token (the intra-token blocks).

    model, tokenizer = load_ar("B")                 # released name, released or own file, or run folder
    logits = model([pre, post], class_labels)       # teacher forcing: two of (B, N, 2^bits)
    losses = cross_entropies(logits, [pre, post])   # two scalars; their sum is the objective
    indices = model.generate(class_labels, cfg_scale=(1.9, 2.0), seeds=range(B))
    images = tokenizer.decode(indices.view(B, 16, 16))

Letters: B batch, N tokens (grid^2, or the first of them), d width, H heads, D head width, V vocabulary of a sub-token.
`rows` are the sequences that run: B, or 2 B where guidance adds the null class's branch."""

import contextlib
import dataclasses
import math

import torch
import torch.nn.functional as F
from torch import nn

from checkpoint import entries_of, locate, match, read_weights
from lfq import merge_indices
from runtime import UserError, reading, to_device
from tokenizer import TokenizerConfig, tokenizer_from_entries

fused_sampling = fused_training = None
if torch.cuda.is_available():  # Triton kernels; their import takes a second, which no CPU run should pay
    with contextlib.suppress(ImportError):
        import fused_sampling
        import fused_training


@dataclasses.dataclass(frozen=True)
class ARConfig:
    """Size of an `ARTransformer`. `factorized_bits`: bits of the pre and post sub-tokens; `grid`: side of the token
    grid; `dropout`: probability on the token sequence and on what attention and feed-forward add. Raises UserError for
    a size that cannot be built."""

    width: int
    heads: int
    spatial_layers: int
    intra_layers: int
    factorized_bits: tuple = (6, 12)
    grid: int = 16
    num_classes: int = 1000
    dropout: float = 0.1

    def __post_init__(self):
        object.__setattr__(self, "factorized_bits", tuple(self.factorized_bits))  # JSON makes it a list
        for name in ("width", "heads", "spatial_layers", "intra_layers", "grid", "num_classes"):
            value, limit = getattr(self, name), 1024 if name == "grid" else 10**6
            if type(value) is not int or not 1 <= value <= limit:
                raise UserError(f"{name} must be a whole number of 1 to {limit}, not {value!r}")
        if self.width % self.heads or self.head_width % 4:
            raise UserError(
                f"width {self.width} over {self.heads} heads: a head's width must be a whole multiple of 4 "
                f"(rotation pairs, half of them for rows and half for columns)"
            )
        bits = self.factorized_bits
        if len(bits) != 2 or not all(type(b) is int and b >= 1 for b in bits) or sum(bits) > 30:
            raise UserError(f"factorized_bits must be two whole numbers (pre, post), 30 at most in all, not {bits}")
        if type(self.dropout) not in (int, float) or not 0 <= self.dropout < 1:
            raise UserError(f"dropout must be at least 0 and below 1, not {self.dropout}")

    @property
    def head_width(self):
        return self.width // self.heads


# B, L and XL are the paper's. tiny is ours, for tests and first runs on a CPU.
AR_SIZES = {
    "tiny": ARConfig(width=192, heads=4, spatial_layers=4, intra_layers=1, grid=4),
    "B": ARConfig(width=1024, heads=16, spatial_layers=24, intra_layers=2),
    "L": ARConfig(width=1280, heads=20, spatial_layers=36, intra_layers=3),
    "XL": ARConfig(width=1536, heads=24, spatial_layers=48, intra_layers=4),
}

RELEASED_AR = {
    name: f"https://huggingface.co/TencentARC/Open-MAGVIT2-AR-{name}-256-resolution/resolve/main/AR_256_{name}.ckpt"
    for name in ("B", "L", "XL")
}

# ----------------------------------------------------------------------------------------------------------------------
# The network. Module names are those of the released files.


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension, eps 1e-5, in float32 whatever autocast says."""

    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x):
        return F.rms_norm(x.float(), x.shape[-1:], self.weight.float(), eps=1e-5).type_as(x)


def rotary_table(grid, head_width, device=None):
    """cos and sin of the 2D rotary embedding, (2, grid^2 + 1, D/2) float32.

    Grid place t stands at position t + 1. The first D/4 rotation pairs turn by row * frequency, the others by column *
    frequency, frequencies 1 / 10000^(2j / (D/2)), j = 0..D/4-1.
    """
    half = head_width // 2
    frequencies = 1 / 10000 ** (torch.arange(0, half, 2, device=device) / half)  # (D/4,)
    angles = torch.arange(grid, device=device)[:, None] * frequencies  # (grid, D/4)
    by_row, by_column = angles[:, None].expand(-1, grid, -1), angles[None].expand(grid, -1, -1)
    angles = torch.cat([by_row, by_column], dim=-1).flatten(0, 1)  # (grid, grid, D/2) -> (grid^2, D/2)
    # Released weights: position 0 (the class) has cos = sin = 0, not angle 0, so its query and key vanish.
    return F.pad(torch.stack([angles.cos(), angles.sin()]), (0, 0, 1, 0))


def rotate(x, rotary):
    """Turn the adjacent pairs (2m, 2m+1) of x (..., N, D) by `rotary` (2, N, D/2), in float32."""
    cos, sin = rotary
    cos, sin = torch.stack([cos, cos], -1).flatten(-2), torch.stack([-sin, sin], -1).flatten(-2)  # (N, D)
    swapped = x.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)  # the other of each pair
    return (x.float() * cos + swapped.float() * sin).type_as(x)


def add_norm(x, added, norm, dropout=0.0, training=False):
    """(x + dropout(added), its norm): how every step of the residual stream begins. added None: (x, its norm)."""
    if fused_training and fused_training.usable(x):
        return fused_training.add_norm(x, added, norm.weight, dropout if training else 0.0)
    if added is not None:
        x = x + F.dropout(added, dropout, training)
    return x, norm(x)


class Attention(nn.Module):
    """Causal self-attention, (rows, N, d) -> (rows, N, d).

    With a cache (2, rows, H, length, D) there is one input, N = 1, and it stands at position `start`: its key and value
    are written there, and it attends to the filled part only, 0..start.
    """

    def __init__(self, config):
        super().__init__()
        self.heads = config.heads
        self.wqkv = nn.Linear(config.width, 3 * config.width, bias=False)
        self.wo = nn.Linear(config.width, config.width, bias=False)

    def forward(self, x, rotary, cache=None, start=0):
        qkv = self.wqkv(x)
        if cache is None and fused_training and fused_training.usable(x, x.shape[-1] // self.heads):
            return self.wo(fused_training.attend(qkv, rotary, self.heads))
        # (rows, N, 3 d) -> three of (rows, H, N, D)
        query, key, value = qkv.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        query, key = rotate(query, rotary), rotate(key, rotary)
        if cache is not None:
            cache[0, :, :, start], cache[1, :, :, start] = key[:, :, 0], value[:, :, 0]
            key, value = cache[:, :, :, : start + 1]
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=cache is None)
        return self.wo(mixed.transpose(1, 2).flatten(2))  # (rows, H, N, D) -> (rows, N, d)


class PairAttention(Attention):
    """The intra-token blocks' attention, over sequences of two: the same function in closed form.

    The first element sees itself only. The second weighs both by a softmax of (0, q.k / sqrt(D)): the score with the
    first is 0, as its key is zeroed like the class's, and its own position is grid place 0, which turns nothing.
    """

    def forward(self, x, rotary, cache=None, start=0):
        if cache is not None or x.shape[1] != 2:
            return super().forward(x, rotary, cache, start)
        # The first element's query and key are not needed.
        of_asking, of_values = self.wqkv.weight.split([2 * x.shape[-1], x.shape[-1]])
        of_first, of_second = F.linear(x, of_values).unbind(1)
        query, key, first, second = (
            part.unflatten(-1, (self.heads, -1)).float()  # (rows, d) -> (rows, H, D)
            for part in (*F.linear(x[:, 1], of_asking).chunk(2, -1), of_first, of_second)
        )
        score = (query * key).sum(-1, keepdim=True) / math.sqrt(query.shape[-1])
        second = torch.lerp(first, second, score.sigmoid()).flatten(1).type_as(of_first)
        return self.wo(torch.stack([of_first, second], dim=1))


class FeedForward(nn.Module):
    """w2(silu(w1 x) * w3 x); its width is 2/3 of 4 d, rounded up to a multiple of 256."""

    def __init__(self, config):
        super().__init__()
        hidden = math.ceil(int(2 * 4 * config.width / 3) / 256) * 256
        self.w1 = nn.Linear(config.width, hidden, bias=False)
        self.w3 = nn.Linear(config.width, hidden, bias=False)
        self.w2 = nn.Linear(hidden, config.width, bias=False)

    def forward(self, x):
        if fused_training and fused_training.usable(x):
            return self.w2(fused_training.gate(F.linear(x, torch.cat([self.w1.weight, self.w3.weight]))))
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class Block(nn.Module):
    """Pre-norm transformer block; dropout on what attention and feed-forward add, none inside attention.

    (x, added) -> (x, added): what the feed-forward adds is left to the next block, whose first norm takes it in the
    same pass over memory. `added` is None for the first.
    """

    def __init__(self, config, attention=Attention):
        super().__init__()
        self.dropout = config.dropout
        self.attention_norm = RMSNorm(config.width)
        self.attention = attention(config)
        self.ffn_norm = RMSNorm(config.width)
        self.feed_forward = FeedForward(config)

    def forward(self, x, added, rotary, cache=None, start=0):
        x, y = add_norm(x, added, self.attention_norm, self.dropout, self.training)
        added = self.attention(y, rotary, cache, start)
        x, y = add_norm(x, added, self.ffn_norm, self.dropout, self.training)
        return x, self.feed_forward(y)


class ARTransformer(nn.Module):
    """Class-conditional transformer over tokens of two sub-tokens. State-dict entries: the released ones without
    `transformer.`, no more.

    Initialised N(0, 0.02), both heads zero. `class_dropout` is the probability with which training replaces an image's
    class by the null class, number `num_classes`. `class_names`: list of names, or None."""

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
        self.norm = RMSNorm(config.width)
        self.head = nn.ModuleList(nn.Linear(config.width, size, bias=False) for size in (pre, post))
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)
        for head in self.head:
            nn.init.zeros_(head.weight)

    def _rotary(self):
        # Some ten small operations: cheaper than a buffer that .to(bfloat16) would round.
        return rotary_table(self.config.grid, self.config.head_width, self.norm.weight.device)

    def forward(self, sub_indices, class_labels):
        """Teacher forcing: logits of every token given its class, the tokens before it, and for post its pre.

        sub_indices: pre and post, (B, N) integers each, N up to grid^2. class_labels: (B,) in 0..num_classes. Returns
        [logits_pre (B, N, V_pre), logits_post (B, N, V_post)]. In train mode classes and tokens drop out, drawn from
        torch's global generator. Raises UserError where N is larger than the grid."""
        pre, post = sub_indices
        batch, tokens = pre.shape
        if tokens > self.config.grid**2:
            raise UserError(f"{tokens} tokens do not fit this model's grid of {self.config.grid}x{self.config.grid}")
        if self.training:
            dropped = torch.rand(batch, device=class_labels.device) < self.class_dropout
            class_labels = class_labels.masked_fill(dropped, self.config.num_classes)
        rotary = self._rotary()[:, :tokens].contiguous()
        # The class predicts token 0, token t - 1 predicts token t: the last token only ever is an answer.
        given = self.pre_emb(pre[:, :-1]) + self.post_emb(post[:, :-1])
        x = torch.cat([self.class_emb["embedding_table"](class_labels)[:, None], given], dim=1)  # (B, N, d)
        x, added = F.dropout(x, self.config.dropout, self.training), None
        for block in self.spatial_blocks:
            x, added = block(x, added, rotary)
        x = x + F.dropout(added, self.config.dropout, self.training)
        pair = torch.stack([x, self.pre_emb(pre)], dim=2).flatten(0, 1)  # (B, N, 2, d) -> (B*N, 2, d)
        added = None
        for block in self.factorized_blocks:
            # Released weights: the pair takes positions 0 and 1 of the same table, so 0 is zeroed here too.
            pair, added = block(pair, added, rotary[:, :2])
        _, pair = add_norm(pair, added, self.norm, self.config.dropout, self.training)
        parts = pair.unflatten(0, (batch, tokens)).unbind(2)  # (B*N, 2, d) -> two of (B, N, d)
        return [head(part) for head, part in zip(self.head, parts, strict=True)]

    @torch.no_grad()
    def generate(
        self,
        class_labels,
        cfg_scale=(1.0, 1.0),
        temperature=(1.0, 1.0),
        top_k=(0, 0),
        top_p=(1.0, 1.0),
        seeds=None,
        max_tokens=None,
    ):
        """Draw images' tokens, with classifier-free guidance; always in eval mode.

        class_labels: (B,) in 0..num_classes. Every option is a pair (pre, post): `cfg_scale`, where (1, 1) is no
        guidance and runs no null branch; `temperature` > 0; `top_k`, 0 is off; `top_p` in (0, 1], 1 is off. seeds: one
        integer an image (0..B-1 where None); an image is a function of its seed, class and options, not of its batch.
        max_tokens: stop after so many (grid^2 where None).
        Returns merged indices (B, max_tokens) int64. Raises UserError for options out of range."""
        tokens = self.config.grid**2 if max_tokens is None else max_tokens
        seeds = list(range(len(class_labels)) if seeds is None else seeds)
        check_sampling(cfg_scale, temperature, top_k, top_p)
        self._check_request(class_labels, seeds, tokens)
        device = self.norm.weight.device
        guide = any(scale != 1 for scale in cfg_scale)
        options = list(zip(cfg_scale if guide else (None, None), temperature, top_k, top_p, strict=True))
        # Draws are made in float64, which accelerators but CUDA's lack.
        dtype = torch.float64 if device.type in ("cpu", "cuda") else torch.float32
        uniforms = to_device(image_uniforms(seeds, self.config.grid**2).to(dtype), device)
        labels = class_labels.to(device, non_blocking=True)
        if guide:  # both branches run as one batch: the images' classes, then as many null classes
            labels = torch.cat([labels, torch.full_like(labels, self.config.num_classes)])
        if fused_sampling and fused_sampling.usable(self):
            decoder = fused_sampling.decoder_for(self, len(seeds), guide, options, self._computes_in())
            indices = decoder.generate(labels, uniforms, tokens)
            check_finite(decoder.logits)
            return indices
        rotary, caches = self._rotary(), self._caches(len(labels), tokens)
        was_training = self.training
        self.eval()
        try:
            x = self.class_emb["embedding_table"](labels)[:, None]  # (rows, 1, d)
            drawn = []
            for t in range(tokens):  # nothing in here waits for the device
                x, sub_tokens, logits = self._token_step(x, t, rotary, caches, uniforms[:, t], options)
                drawn.append(merge_indices(sub_tokens, self.config.factorized_bits))
        finally:
            self.train(was_training)
        check_finite(logits)
        return torch.stack(drawn, dim=1)

    def compile_blocks(self):
        """Compile each block for itself: one compilation serves all blocks of a kind, and state-dict entries keep their
        names."""
        import torch._functorch.config  # which nothing else may have imported

        # Its keys leave out kernels of the backward pass: it would go on using the old ones after they were edited.
        torch._functorch.config.enable_autograd_cache = False
        for block in (*self.spatial_blocks, *self.factorized_blocks):
            block.compile(dynamic=False)

    def train(self, mode=True):
        if mode and fused_sampling:
            fused_sampling.forget(self)  # a model that trains needs the memory
        return super().train(mode)

    def _computes_in(self):
        """The type of matrix products: autocast's, or the weights'."""
        weight = self.norm.weight
        autocast = torch.is_autocast_enabled(weight.device.type)
        return torch.get_autocast_dtype(weight.device.type) if autocast else weight.dtype

    def _caches(self, rows, tokens):
        """Keys and values (layers, 2, rows, H, N, D) of the spatial and of the intra-token blocks (N = 2)."""
        config, dtype = self.config, self._computes_in()
        return [
            self.norm.weight.new_empty((layers, 2, rows, config.heads, length, config.head_width), dtype=dtype)
            for layers, length in ((config.spatial_layers, tokens), (config.intra_layers, 2))
        ]

    def _token_step(self, x, position, rotary, caches, uniforms, options):
        """One token of every image: x (rows, 1, d) enters at `position`, uniforms (B, 2) decide the draws.

        Returns the next x, the sub-tokens [pre, post], (B,) each, and their logits. No shape depends on `position`,
        except how much of the spatial cache is attended to.
        """
        spatial_cache, intra_cache = caches
        added = None
        for block, cache in zip(self.spatial_blocks, spatial_cache, strict=True):
            x, added = block(x, added, rotary[:, position : position + 1], cache, position)
        sub_tokens, all_logits, following = [], [], 0
        for part, embedding in enumerate((self.pre_emb, self.post_emb)):
            for block, cache in zip(self.factorized_blocks, intra_cache, strict=True):
                x, added = block(x, added, rotary[:, part : part + 1], cache, part)
            logits = self.head[part](add_norm(x, added, self.norm)[1])[:, 0].float()  # (rows, V)
            sub_token = _sample(logits, uniforms[:, part], *options[part])
            sub_tokens.append(sub_token)
            all_logits.append(logits)
            # Both branches of guidance go on from the token drawn.
            x = embedding(sub_token).repeat(len(x) // len(sub_token), 1)[:, None]  # (B,) -> (rows, 1, d)
            added = None
            following = following + x  # the next position's input is the sum of the two embeddings
        return following, sub_tokens, all_logits

    def _check_request(self, class_labels, seeds, tokens):
        if len(seeds) != len(class_labels):
            raise UserError(f"{len(class_labels)} images need as many seeds, not {len(seeds)}")
        if not 1 <= tokens <= self.config.grid**2:
            raise UserError(f"max_tokens must be 1 to {self.config.grid**2} (the grid), not {tokens}")
        if len(class_labels) == 0:
            raise UserError("class_labels is empty; give at least one")
        lowest, highest = class_labels.aminmax()
        if lowest < 0 or highest > self.config.num_classes:
            raise UserError(
                f"class labels must be 0 to {self.config.num_classes} (the null class), not {lowest} to {highest}"
            )


# ----------------------------------------------------------------------------------------------------------------------
# Sampling


def check_sampling(cfg_scale, temperature, top_k, top_p):
    """Raises UserError where an option of `generate` is no pair (pre, post) or out of range."""
    pairs = {"cfg_scale": cfg_scale, "temperature": temperature, "top_k": top_k, "top_p": top_p}
    for name, pair in pairs.items():
        if len(pair) != 2:
            raise UserError(f"{name} must be a pair (pre, post), not {pair}")
    if not all(abs(scale) <= 1000 for scale in cfg_scale):  # beyond, logits overflow
        raise UserError(f"cfg_scale must be finite and at most 1000, not {cfg_scale}")
    if not all(1e-3 <= value <= 1000 for value in temperature):
        raise UserError(
            f"temperature must be above 0 (0.001 to 1000), not {temperature}; for the likeliest token use top_k 1"
        )
    if not all(k >= 0 and k == int(k) for k in top_k):
        raise UserError(f"top_k must be whole numbers, 0 (off) or more, not {top_k}")
    if not all(0 < p <= 1 for p in top_p):
        raise UserError(f"top_p must be above 0 and at most 1 (off), not {top_p}")


def guided(cond, uncond, scale):
    """Classifier-free guidance of logits: uncond + scale * (cond - uncond)."""
    return uncond + scale * (cond - uncond)


def filter_logits(logits, top_k=0, top_p=1.0):
    """Logits (..., V) with what top-k and then top-p leave out set to -inf; at least one entry stays.

    top_k: keep logits that reach the k-th largest (0: all). top_p: keep the smallest set of the likeliest entries whose
    probability, after top-k, passes p (1: all).
    """
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

    It is the first entry whose cumulative probability, of the uniforms' type, passes u; never one of probability 0.
    """
    likelihood = logits.to(uniforms.dtype).softmax(-1)
    # Out are entries of probability 0: a GPU's parallel sums may step up there by rounding.
    cumulative = likelihood.cumsum(-1).masked_fill(likelihood == 0, 0)
    # Rounding may leave the total below u: then it is the entry that reaches the total.
    passes = (cumulative > uniforms[:, None]) | (cumulative == cumulative.amax(-1, keepdim=True))
    return passes.int().argmax(-1)  # the first


def check_finite(logits):
    """Raises UserError where the last token's logits are not finite: what overflows once stays in the cache."""
    if not all(part.isfinite().all() for part in logits):
        raise UserError("the transformer's logits are not finite; use --precision fp32 or bf16")


def _sample(logits, uniforms, scale, temperature, top_k, top_p):
    """Logits (rows, V) -> sub-tokens (B,): guidance (unless scale is None), temperature, filter, draw."""
    if scale is not None:
        logits = guided(*logits.chunk(2), scale)
    return draw(filter_logits(logits / temperature, top_k, top_p), uniforms)


def image_uniforms(seeds, tokens):
    """Uniforms (B, N, 2) in [0, 1), float64, on the CPU: each image's come from its own seed."""
    return torch.stack(
        [
            torch.rand(tokens, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(int(seed)))
            for seed in seeds
        ]
    )


# ----------------------------------------------------------------------------------------------------------------------
# Training


def cross_entropies(logits, sub_indices):
    """The mean cross entropies (pre, post), in nats, float32, of two logits (B, N, V) and indices (B, N)."""
    return tuple(
        F.cross_entropy(part.float().flatten(0, 1), answer.flatten())
        for part, answer in zip(logits, sub_indices, strict=True)
    )


def clip_gradients(optimizer, in_step=False):
    """Clip the gradients of all parameters together to a norm of 1; returns the norm before, a tensor.

    in_step: leave the scaling to the optimizer's step, which saves a pass over memory. For fused optimizers and
    unsharded gradients, before every step, and after a GradScaler's `unscale_`.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    if not in_step:
        return torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    optimizer.grad_scale = (norm + 1e-6).clamp(min=1)  # fused optimizers divide gradients by this attribute
    return norm


def learning_rate(
    iteration, peak, iterations_an_epoch, epochs, warmup_epochs, warmup_start=0.005, flat=0.05, floor=0.1
):
    """Learning rate of an iteration, counted from 0.

    A linear warm-up from warmup_start * peak over `warmup_epochs`, rounded to whole iterations; then, over the
    iterations that remain, the peak for their first `flat` share, and a straight line to floor * peak, reached at the
    last iteration.
    """
    warmup, last = round(warmup_epochs * iterations_an_epoch), epochs * iterations_an_epoch - 1
    if iteration < warmup:
        return peak * (warmup_start + (1 - warmup_start) * iteration / warmup)
    done = (iteration - warmup) / max(last - warmup, 1)
    if done <= flat:
        return peak
    return peak * (floor + (1 - floor) * (1 - done) / (1 - flat))


# ----------------------------------------------------------------------------------------------------------------------
# Reading files


def load_ar(path_or_name, config=None):
    """(ARTransformer, Tokenizer or None), both in eval mode and on the CPU.

    path_or_name: a released name ("B", "L", "XL"), a released transformer file, this project's own file or run folder,
    or a bare state dict of any of these. B, L and XL are known by their width, own files carry their configuration; a
    bare state dict of another width needs `config`. The tokenizer is the one in the file, which the model was trained
    with. `class_names` of the model: an own file's list, otherwise None. Raises UserError naming the file, the entries
    at fault and the size expected; nothing is loaded in part."""
    path = locate(path_or_name, RELEASED_AR)
    with reading(path, "a transformer file"):
        content = read_weights(path)
        kind = content.get("kind") if isinstance(content, dict) else None
        if kind == "tokenizer":
            raise UserError(f"{path} is a tokenizer file; give a transformer file (from train_ar.py, or AR_256_B.ckpt)")
        if kind == "ar":  # this project's own
            try:
                config, entries = config or ARConfig(**content["config"]), content["model"]
                class_names, carried = content["class_names"], content["tokenizer"] or {}
                tokenizer_entries = carried and carried["state"]
                tokenizer_config = carried and TokenizerConfig(**carried["config"])
                if class_names and [type(name) for name in class_names] != [str] * config.num_classes:
                    raise UserError(f"class_names are not those of {config.num_classes} classes")
            except (KeyError, TypeError, UserError) as error:
                raise UserError(f"{path} is no whole transformer file of this project: {error}") from None
        else:
            class_names = tokenizer_config = None
            entries, tokenizer_entries = {}, {}
            for name, value in entries_of(content, path).items():
                if name.startswith("first_stage_model."):
                    tokenizer_entries[name.removeprefix("first_stage_model.")] = value
                elif (short := name.removeprefix("transformer.")) in entries:
                    raise UserError(f"{path} holds entry {short} twice, with and without transformer. before it")
                else:
                    entries[short] = value
            config = config or _config_by_width(entries, path)
        if config.spatial_layers + config.intra_layers > len(entries):  # before so many are built
            raise UserError(f"{path} holds {len(entries)} entries, too few for the blocks of its size")
        with torch.device("meta"):  # no memory and no time for an initialisation that is replaced
            model = ARTransformer(config)
        match(entries, model.state_dict(), path, _describe(config))
        model.load_state_dict({name: value.float() for name, value in entries.items()}, assign=True)
        model.class_names = class_names
        if not tokenizer_entries:
            return model.eval(), None
        return model.eval(), tokenizer_from_entries(tokenizer_entries, path, tokenizer_config)


def _config_by_width(entries, source):
    """The paper's size whose width the entries have: the width fixes heads and grid."""
    table = entries.get("class_emb.embedding_table.weight")
    if not isinstance(table, torch.Tensor) or table.ndim != 2:
        if any(name.startswith(("encoder.", "decoder.")) for name in entries):
            raise UserError(f"{source} is a tokenizer file; give a transformer file, such as AR_256_B.ckpt")
        raise UserError(f"{source} holds no transformer: entry class_emb.embedding_table.weight is missing")
    for name in RELEASED_AR:
        if AR_SIZES[name].width == table.shape[1]:
            return AR_SIZES[name]
    raise UserError(
        f"{source} is a bare state dict of width {table.shape[1]}, which is no released size, so its heads "
        f"and grid cannot be told; use a checkpoint of train_ar.py, which carries them, or give the config"
    )


def _describe(config):
    name = next((f"{name} transformer" for name, size in AR_SIZES.items() if size == config), "transformer")
    return f"a {name} of size {dataclasses.asdict(config)}"
