"""The door, and the paths behind it on a GPU: against their plain twins, float64, golden files."""

import copy
import dataclasses
import subprocess
import sys

import pytest
import torch
from golden_files import fill, load, named_tensor, relative
from scripts import ROOT
from torch import nn

import ar_model
import fast
import losses
import norms
import tokenizer as tk
import video_tokenizer
from ar_model import AR_SIZES, ARConfig, ARTransformer, SubTokenOptions, cross_entropies, image_uniforms, rotary_table
from runtime import Runtime

GPU = "cuda"
TINY = ARConfig(64, 4, 3, 2, (6, 12), grid=4, num_classes=10)


def test_without_a_gpu_the_plain_function_is_the_function(monkeypatch):
    monkeypatch.setattr(fast, "AVAILABLE", False)

    def plain(x):
        return x

    assert fast.path("norm.nothing")(plain) is plain
    for flag, steps, answer in ((None, 10**6, False), (True, 1, True), (False, 10**6, False)):
        assert fast.compiles(torch.device("cpu"), flag, steps) is answer
    fast.forget(plain)


def test_the_switch_in_the_environment():
    words = "import fast, torch; print(fast.ON, fast.compiles(torch.device('cuda'), True, 10**6))"
    for value, answer in (("0", "False False"), ("1", "True True")):
        done = subprocess.run(
            [sys.executable, "-c", words], cwd=ROOT, env={"FAST": value}, capture_output=True, text=True, check=True
        )
        assert done.stdout.strip() == answer


@pytest.fixture(autouse=True)
def exact_float32():
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


def leaf(*shape, offset=0.0):
    """Numbers whose mean may be many times their deviation."""
    return (torch.randn(*shape, device=GPU) + offset).requires_grad_()


def pictures(batch, channels, side):
    x = leaf(batch, channels, side, side, offset=10).detach()
    return x.contiguous(memory_format=torch.channels_last).requires_grad_()


def clips(batch, channels, frames, side):
    x = leaf(batch, channels, frames, side, side, offset=10).detach()
    return x.contiguous(memory_format=torch.channels_last_3d).requires_grad_()


def pixels(*size):
    return (pictures if len(size) == 3 else clips)(*size)


def module(kind, *arguments, **options):
    """With random weights, also where they begin as ones and zeros."""
    made = Runtime(torch.device(GPU)).place(kind(*arguments, **options))
    for parameter in made.parameters():
        if parameter.dim() == 1:
            nn.init.normal_(parameter)
    return made


SIZES = [(2, 32, 5), (3, 128, 64), (8, 256, 33), (2, 512, 16)]
CLIPS = [(2, 32, 1, 5), (2, 128, 9, 33), (1, 512, 5, 16)]
HEADS = [(3, 2, 16, 4, 16), (2, 4, 32, 16, 255), (2, 3, 64, 32, 1024)]  # rows, heads, head width, grid, tokens
CASES = {  # path -> (arguments of each case, tolerances in float32 and in bfloat16)
    "norm.norm_silu": (
        [lambda s=s: (module(norms.group_norm, s[1]), pixels(*s)) for s in SIZES + CLIPS],
        *(2e-6, 6e-3),
    ),
    "norm.modulated_norm": (
        [
            lambda s=s: (norms.group_norm(s[1], affine=False), pixels(*s), leaf(s[0], s[1]), leaf(s[0], s[1]))
            for s in SIZES + CLIPS
        ],
        *(2e-6, 6e-3),
    ),
    "norm.res_block": (
        [
            lambda s=s, width=width: (module(tk.ResBlock, s[1], width), pictures(*s))
            for s, width in ((SIZES[0], 32), (SIZES[1], 256), (SIZES[3], 512))
        ],
        *(5e-6, 2e-2),
    ),
    "norm.upsampler": ([lambda s=s: (module(tk.Upsampler, s[1]), pictures(*s)) for s in SIZES], 2e-6, 6e-3),
    "norm.video_res_block": (
        [
            lambda s=s, width=width: (module(video_tokenizer.ResBlock, s[1], width), clips(*s))
            for s, width in zip(CLIPS, (32, 256, 512))
        ],
        *(5e-6, 2e-2),
    ),
    "norm.video_upsampler": (
        [
            lambda s=s, stride=stride: (module(video_tokenizer.Upsampler, s[1], stride), clips(*s))
            for s, stride in zip(CLIPS, (2, 1, 2))
        ],
        *(5e-6, 6e-3),  # float32 as of the blocks: cuDNN's sums of 27 C products
    ),
    "attention.causal": (
        [
            lambda r=r, h=h, d=d, g=g, n=n: (leaf(r, n, 3 * h * d), rotary_table((g, g), d, GPU)[:, :n].contiguous(), h)
            for r, h, d, g, n in HEADS
        ],
        *(2e-6, 6e-3),
    ),
}
RUNS = [(name, i) for name, (cases, *_) in CASES.items() for i in range(len(cases))]


@pytest.mark.gpu
def test_every_path_has_a_case_here():
    assert set(fast.PATHS) == {*CASES, "decode.draw_tokens"}  # that one draws, see below


def values_and_gradients(function, arguments):
    """The result, and the gradients of all leaves and weights for one random gradient of the result."""
    y = function(*arguments)
    torch.manual_seed(1)
    gradient = torch.randn(y.shape, device=GPU).bfloat16().to(y.dtype)  # the same numbers in every type
    modules = [argument for argument in arguments if isinstance(argument, nn.Module)]
    leaves = [a for a in arguments if isinstance(a, torch.Tensor) and a.requires_grad]
    return y, torch.autograd.grad(y, [*leaves, *(p for m in modules for p in m.parameters())], gradient)


def cast(argument, dtype):
    if isinstance(argument, nn.Module):
        return copy.deepcopy(argument).to(dtype)
    if isinstance(argument, torch.Tensor) and argument.requires_grad:
        return argument.detach().to(dtype).requires_grad_()
    return argument


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name, number", RUNS)
def test_a_path_is_its_plain_twin(name, number, dtype, monkeypatch):
    """Value and every gradient, against the plain function in float64; and the door leads there."""
    cases, *tolerances = CASES[name]
    torch.manual_seed(0)
    arguments = [cast(argument, dtype) for argument in cases[number]()]
    plain, kernel, takes = fast.PATHS[name]
    assert takes(*arguments)
    y, gradients = values_and_gradients(kernel, arguments)
    truth, true_gradients = values_and_gradients(plain, [cast(argument, torch.float64) for argument in arguments])
    assert y.dtype == dtype and y.shape == truth.shape
    if y.dim() > 3:
        assert y.is_contiguous(memory_format=torch.channels_last if y.dim() == 4 else torch.channels_last_3d)
    for ours, theirs in zip((y, *gradients), (truth, *true_gradients), strict=True):
        assert relative(ours, theirs) < tolerances[dtype != torch.float32]
    # What callers call: the kernel; switched off, the plain function.
    functions = [
        norms.norm_silu,
        norms.modulated_norm,
        tk.ResBlock.forward,
        tk.Upsampler.forward,
        video_tokenizer.ResBlock.forward,
        video_tokenizer.Upsampler.forward,
        ar_model.causal_attention,
    ]
    door = dict(zip(CASES, functions, strict=True))[name]
    assert torch.equal(door(*arguments), y)
    monkeypatch.setattr(fast, "ON", False)
    assert torch.equal(door(*arguments), plain(*arguments))


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["norm.upsampler", "attention.causal"])
def test_paths_compile_as_one_graph(name, monkeypatch):
    """And Dynamo asks the switch anew."""
    torch.manual_seed(0)
    arguments = CASES[name][0][0]()
    door = tk.Upsampler.forward if name == "norm.upsampler" else ar_model.causal_attention
    compiled = torch.compile(door, fullgraph=True, dynamic=False)
    for on in (True, False):
        monkeypatch.setattr(fast, "ON", on)
        for ours, theirs in zip(values_and_gradients(compiled, arguments), values_and_gradients(door, arguments)):
            for a, b in zip([ours], [theirs]) if isinstance(ours, torch.Tensor) else zip(ours, theirs):
                assert relative(a, b) < 2e-6


@pytest.mark.gpu
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 2e-6), (torch.bfloat16, 6e-3)])
@pytest.mark.parametrize("rows, heads, width, grid, tokens", HEADS)
def test_causal_attention(rows, heads, width, grid, tokens, dtype, tolerance):
    """Against the formula, with rotations as products of complex numbers."""
    torch.manual_seed(0)
    qkv = torch.randn(rows, tokens, 3 * heads * width, device=GPU).to(dtype).requires_grad_()
    table = rotary_table((grid, grid), width, GPU)[:, :tokens].contiguous()
    out = ar_model.causal_attention(qkv, table, heads)
    to_out = torch.randn_like(out)
    (ours,) = torch.autograd.grad(out, qkv, to_out)

    qkv64 = qkv.detach().double().requires_grad_()
    q, k, v = qkv64.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)

    def turned(x):
        pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
        return torch.view_as_real(pairs * torch.complex(*table.double())).flatten(-2)

    score = turned(q) @ turned(k).mT / width**0.5
    score = score.masked_fill(torch.ones(tokens, tokens, device=GPU).triu(1).bool(), -torch.inf)
    out64 = (score.softmax(-1) @ v).transpose(1, 2).flatten(2)
    (truth,) = torch.autograd.grad(out64, qkv64, to_out.double())
    assert relative(out, out64) < tolerance and relative(ours, truth) < tolerance


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("size", ["tiny16", "tiny8", "256_L", "128_L"])
@torch.no_grad()
def test_golden_tokenizer(size, compiled):
    sizes = {"tiny16": tk.TokenizerConfig(32, (1, 1, 2, 2, 4), 1), "tiny8": tk.TokenizerConfig(32, (1, 2, 2, 4), 2)}
    golden = {name: value.to(GPU) for name, value in load(f"tokenizer_{size}").items()}
    model = fill(tk.Tokenizer(sizes.get(size) or tk.TOKENIZER_SIZES[size])).eval()
    model.to(GPU, memory_format=torch.channels_last)
    if compiled:
        fast.compile(*(part for part in model.modules() if isinstance(part, tk.Upsampler)))
    assert relative(model.encoder(golden["image"]), golden["encoder_out"]) < 1e-5
    assert relative(model.decode(golden["indices"]), golden["reconstruction"]) < 1e-5


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("frames", [17, 5, 1])
@torch.no_grad()
def test_golden_video_tokenizer(frames, compiled):
    golden = {name: value.to(GPU) for name, value in load("video_tiny8").items()}
    model = fill(video_tokenizer.VideoTokenizer(tk.TokenizerConfig(32, (1, 2, 2, 4), 1))).eval()
    Runtime(torch.device(GPU)).place(model)
    if compiled:
        fast.compile(*(level.upsample for level in model.decoder.up[1:]))
    indices = golden[f"indices_{frames}"]
    assert torch.equal(model.encode(golden[f"x_{frames}"]), indices)
    assert relative(model.encoder(golden[f"x_{frames}"]), golden[f"z_{frames}"]) < 1e-5
    assert relative(model.decode(indices), golden[f"y_{frames}"]) < 1e-5


@pytest.mark.gpu
def test_lpips_compiled():
    golden = {name: value.to(GPU) for name, value in load("lpips_vgg").items()}
    lpips = losses.LPIPS("vgg")
    fill(lpips, "loss.perceptual_loss.", keep=("shift", "scale")).to(GPU).compile()
    assert relative(lpips(golden["image"], golden["other"]).flatten(), golden["distance"].flatten()) < 1e-5


def golden_transformer(name, config):
    model = ARTransformer(config)
    for entry, value in model.state_dict().items():
        value.copy_(named_tensor("transformer." + entry, tuple(value.shape)))
    return model.eval().to(GPU), {key: value.to(GPU) for key, value in load(name).items()}


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(
    "name, config, count",
    [
        ("gpt_tiny", TINY, 16),
        ("gpt_tiny_9_9", ARConfig(64, 2, 2, 1, (9, 9), grid=4, num_classes=10), 16),
        ("gpt_B", AR_SIZES["B"], 24),
    ],
)
@torch.no_grad()
def test_golden_transformer(name, config, count, compiled):
    model, golden = golden_transformer(name, config)
    if compiled:
        fast.compile(*model.spatial_blocks)
        model.predict = torch.compile(model.predict, dynamic=False)
    pre, post = model([golden["index_pre"], golden["index_post"]], golden["class_label"])
    assert relative(pre[:, golden["positions"]], golden["logits_pre"]) < 1e-5
    assert relative(post[:, golden["positions"], :256], golden["logits_post"]) < 1e-5
    drawn = model.generate(golden["class_label"], (1.9, 2.0), top_k=(1, 1), max_tokens=count)
    assert torch.equal(drawn, golden["argmax_cfg_pre"] + 2 ** config.factorized_bits[0] * golden["argmax_cfg_post"])


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True])
def test_training_is_that_of_the_plain_code(compiled, monkeypatch):
    model, golden = golden_transformer("gpt_tiny", dataclasses.replace(TINY, dropout=0.0))
    model.train().class_dropout = 0.0
    tokens = [golden["index_pre"], golden["index_post"]]

    def loss_and_gradients():
        model.zero_grad()
        loss = sum(cross_entropies(model(tokens, golden["class_label"]), tokens))
        loss.backward()
        return [loss.detach(), *(weight.grad for weight in model.parameters())]

    with monkeypatch.context() as patch:
        patch.setattr(fast, "ON", False)
        plain = loss_and_gradients()
    if compiled:
        fast.compile(*model.spatial_blocks)
        model.predict = torch.compile(model.predict, dynamic=False)
    for ours, theirs in zip(loss_and_gradients(), plain, strict=True):
        assert relative(ours, theirs) < 1e-5


@pytest.mark.gpu
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"cfg_scale": (1.9, 2.0), "temperature": (1.1, 0.9)},
        {"cfg_scale": (0.0, 2.0), "top_k": (5, 0), "top_p": (1.0, 0.8)},
    ],
)
def test_graph_draws_what_the_plain_code_draws(options, monkeypatch):
    model, _ = golden_transformer("gpt_tiny", TINY)
    labels, seeds = torch.arange(7, device=GPU), range(7)
    first = model.generate(labels, seeds=seeds, **options)
    with torch.no_grad():  # the graph must not keep the old weights
        for weight in model.parameters():
            weight.mul_(1.3)
    ours = model.generate(labels, seeds=seeds, **options)
    monkeypatch.setattr(fast, "ON", False)
    assert torch.equal(ours, model.generate(labels, seeds=seeds, **options))
    assert not torch.equal(ours, first)


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{}, {"cfg_scale": (1.9, 2.0)}, {"cfg_scale": (0.0, 2.0), "top_k": (5, 0)}])
def test_graph_goes_on_from_given_tokens_as_the_plain_code(options, monkeypatch):
    """Also in a graph's first call, in which it is captured; and a call without given tokens draws all of them."""
    model, _ = golden_transformer("gpt_tiny", TINY)
    labels, seeds = torch.arange(7, device=GPU), range(7)
    given = torch.randint(2**18, (7, 6), generator=torch.Generator().manual_seed(0))
    after_given = model.generate(labels, seeds=seeds, given=given, **options)
    assert torch.equal(after_given[:, :6].cpu(), given)
    whole = model.generate(labels, seeds=seeds, **options)
    for n in (1, 8, 16):
        assert torch.equal(model.generate(labels, seeds=seeds, given=whole[:, :n], **options), whole)
    assert torch.equal(model.generate(labels, seeds=seeds, given=given.to(GPU), **options), after_given)
    monkeypatch.setattr(fast, "ON", False)
    assert torch.equal(model.generate(labels, seeds=seeds, given=given, **options), after_given)
    assert torch.equal(model.generate(labels, seeds=seeds, **options), whole)


@pytest.mark.gpu
def test_drawing_gives_all_its_memory_back():
    """Also that of cuBLAS, which keeps 32 MiB for each stream it is called on: training draws in each evaluation."""
    model, _ = golden_transformer("gpt_tiny", TINY)
    left = []
    for _ in range(3):
        model.generate(torch.arange(7, device=GPU))
        fast.forget(model)
        left.append(torch.cuda.memory_allocated())
    assert left[0] == left[1] == left[2]


@pytest.mark.gpu
@torch.no_grad()
def test_bfloat16_graph_keeps_the_distribution():
    """The graph's bf16 logits against float32 teacher forcing over the tokens drawn: 2,048 of AR-B, guided."""
    from fast.decode import Decoder

    images, scales = 8, (1.9, 2.0)
    model, _ = golden_transformer("gpt_B", AR_SIZES["B"])
    options = [SubTokenOptions(scale, 1.0, 0, 1.0) for scale in scales]
    decoder = Decoder(model, 2 * images, images, options, torch.bfloat16, None)
    labels = torch.cat([torch.arange(images, device=GPU) * 100, torch.full((images,), 1000, device=GPU)])
    none_given = torch.zeros(images, 0, 2, dtype=torch.int64, device=GPU)
    decoder.draw(labels, image_uniforms(range(images), 256).to(GPU), 1, none_given)
    decoder.x.copy_(model.class_emb["embedding_table"](labels))
    decoder.position.zero_()
    steps = []
    for _ in range(256):
        decoder.graph.replay()
        steps.append([part.double() for part in decoder.logits])
    truth = model([part.repeat(2, 1) for part in decoder.drawn], labels)
    for part, scale in enumerate(scales):
        ours = torch.stack([step[part] for step in steps], 1)
        (cond, null), (our_cond, our_null) = truth[part].double().chunk(2), ours.chunk(2)
        exact, ours = (b + scale * (a - b) for a, b in ((cond, null), (our_cond, our_null)))
        exact, ours = exact.log_softmax(-1), ours.log_softmax(-1)
        divergence = (exact.exp() * (exact - ours)).sum(-1)
        # bf16 weights and products: 2e-4 and 4e-4 measured; a wrong product makes it some nats.
        assert 0 < divergence.mean() < 2e-3
