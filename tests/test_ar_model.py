import dataclasses
import json
import math
import os

import numpy as np
import pytest
import scipy.stats
import torch
from golden_files import checkpoint_keys, fill, load, named_tensor, relative
from torch.utils._python_dispatch import TorchDispatchMode

import ar_model
import train_ar
from ar_model import AR_SIZES, ARConfig, ARTransformer, load_ar
from runtime import UserError
from tokenizer import Tokenizer, TokenizerConfig

TINY = ARConfig(width=64, heads=4, spatial_layers=3, intra_layers=2, grid=4, num_classes=10)
TINY_9_9 = ARConfig(64, 2, 2, 1, factorized_bits=(9, 9), grid=4, num_classes=10)
TINY_CLIP = dataclasses.replace(TINY, grid=(3, 2, 3))


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Threads only wait for one another on models this small."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def empty(config):
    """The module without the time and memory of an initialisation."""
    with torch.device("meta"):
        return ARTransformer(config)


def tiny(config=TINY):
    return fill(ARTransformer(config), "transformer.").eval()


def tokens(batch, count, config=TINY, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(2**bits, (batch, count), generator=generator) for bits in config.factorized_bits]


# ----------------------------------------------------------------------------------------------------------------------
# Golden files


def check_golden(name, model, max_tokens):
    golden = load(name)
    sub_indices, places = [golden["index_pre"], golden["index_post"]], golden["positions"]
    with torch.no_grad():
        pre, post = model(sub_indices, golden["class_label"])
    assert relative(pre[:, places], golden["logits_pre"]) < 1e-5
    assert relative(post[:, places, :256], golden["logits_post"]) < 1e-5
    losses = ar_model.cross_entropies([pre, post], sub_indices)
    expected = [golden["cross_entropy_pre"], golden["cross_entropy_post"]]
    assert [loss.item() for loss in losses] == pytest.approx([loss.item() for loss in expected], rel=1e-5)
    drawn = model.generate(golden["class_label"], (1.9, 2.0), top_k=(1, 1), max_tokens=max_tokens)
    bits = model.config.factorized_bits[0]
    assert torch.equal(drawn, golden["argmax_cfg_pre"] + 2**bits * golden["argmax_cfg_post"])


@pytest.mark.parametrize("name, config", [("gpt_tiny", TINY), ("gpt_tiny_9_9", TINY_9_9)])
def test_golden_tiny(name, config):
    check_golden(name, tiny(config), None)


def test_golden_B():
    model = empty(AR_SIZES["B"])
    state = model.state_dict()
    for name, value in state.items():
        state[name] = named_tensor("transformer." + name, tuple(value.shape))
    model.load_state_dict(state, assign=True)
    check_golden("gpt_B", model.eval(), 24)


def test_golden_filtering():
    golden = load("filtering")
    settings = [name for name in golden if name.startswith("kept_")]
    assert len(settings) == 8
    for name in settings:
        top_k, top_p = name.removeprefix("kept_k").split("_p")
        filtered = ar_model.filter_logits(golden["logits"], int(top_k), float(top_p))
        assert torch.equal(filtered > -math.inf, golden[name]), name
        assert torch.equal(filtered[golden[name]], golden["logits"][golden[name]]), name


def test_golden_schedule():
    table = load("ar_schedule")["table"].numpy()
    table = table[table[:, 1] == table[:, 2]]
    assert len(table) == 34
    for peak, _, _, warmup, start, floor, per_epoch, epochs, step, expected, *_ in table:
        ours = train_ar.learning_rate(step, peak, epochs * per_epoch, warmup * per_epoch, start, floor=floor)
        assert ours == pytest.approx(expected, rel=0, abs=1e-9)


@pytest.mark.parametrize("step", range(21))
def test_a_warmup_is_whole_steps(step):
    ours = train_ar.learning_rate(step, 1.0, 21, 7 * 0.6)  # 4.2 of them
    assert ours == pytest.approx(train_ar.learning_rate(step, 1.0, 21, 4), rel=1e-12)


def test_schedule_defaults_and_ends():
    assert train_ar.learning_rate(0, 1.0, 200, 20) == 0.005
    assert train_ar.learning_rate(20, 1.0, 200, 20) == 1.0
    assert train_ar.learning_rate(199, 1.0, 200, 20) == pytest.approx(0.1)
    assert train_ar.learning_rate(0, 1.0, 1, 0) == 1.0  # a run of one step, no warm-up
    assert train_ar.learning_rate(9, 1.0, 10, 0, flat=1.0) == 1.0


def test_golden_training():
    golden = load("train_ar_tiny")
    model = tiny(dataclasses.replace(TINY, dropout=0.0)).train()
    model.class_dropout = 0.0
    optimizer = torch.optim.AdamW(model.parameters(), 3e-4, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.05)
    table = []
    for pre, post, labels in zip(golden["index_pre"], golden["index_post"], golden["class_label"]):
        losses = ar_model.cross_entropies(model([pre, post], labels), [pre, post])
        optimizer.zero_grad()
        sum(losses).backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        table.append([loss.item() for loss in losses] + [norm.item()])
    np.testing.assert_allclose(table, golden["table"], rtol=1e-5)
    compared = [name for name in golden if name.startswith("param.")]
    assert len(compared) == 5
    for name in compared:
        assert relative(model.get_parameter(name.removeprefix("param.")), golden[name]) < 1e-6, name


# ----------------------------------------------------------------------------------------------------------------------
# Size, names, initialisation


@pytest.mark.parametrize("size, millions", [("B", 343.6), ("L", 804.4), ("XL", 1486.7)])
def test_sizes_and_entries(size, millions):
    model = empty(AR_SIZES[size])
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.05)
    released = {
        name.removeprefix("transformer."): shape
        for name, (shape, _) in checkpoint_keys(f"AR_256_{size}.ckpt").items()
        if name.startswith("transformer.")
    }
    assert {name: tuple(value.shape) for name, value in model.state_dict().items()} == released


def test_initialisation():
    torch.manual_seed(0)
    model = ARTransformer(TINY)
    for name, value in model.named_parameters():
        if "norm" in name:
            assert torch.equal(value, torch.ones_like(value)), name
        elif name.startswith("head."):
            assert torch.equal(value, torch.zeros_like(value)), name
        else:
            error = 5 / math.sqrt(2 * value.numel())  # five standard errors of a standard deviation
            assert value.std().item() == pytest.approx(0.02, rel=error), name
    losses = ar_model.cross_entropies(model(tokens(2, 16), torch.tensor([0, 1])), tokens(2, 16))
    assert [loss.item() for loss in losses] == pytest.approx([math.log(64), math.log(4096)], rel=1e-6)


def test_config():
    for size in AR_SIZES.values():
        assert ARConfig(**json.loads(json.dumps(dataclasses.asdict(size)))) == size
    faults = {"width": 100, "heads": 5, "spatial_layers": 0, "factorized_bits": (18,), "grid": 0, "dropout": 1}
    for name, value in faults.items():
        with pytest.raises(UserError, match=name.split("_")[0]):
            dataclasses.replace(AR_SIZES["tiny"], **{name: value})
    with pytest.raises(UserError, match="multiple of 4"):
        ARConfig(width=60, heads=10, spatial_layers=1, intra_layers=1)


def test_config_of_clips():
    config = ARConfig(32, 2, 1, 1, grid=[5, 16, 12])  # a list, as JSON has it
    assert config.grid == config.shape == (5, 16, 12) and config.tokens == 960 and hash(config)
    assert ARConfig(32, 2, 1, 1, grid=4).shape == (4, 4)
    for width in (8, 24, 40):
        ARConfig(width, 1, 1, 1, grid=4)
        with pytest.raises(UserError, match="multiple of 16"):
            ARConfig(width, 1, 1, 1, grid=(3, 4, 4))
    wrong = [(), (4,), (4, 4), [4, 4], (2, 2, 2, 2), None, 4.0, "344"]  # lengths and types
    for grid in [*wrong, (3, 0, 4), (3, 4.0, 4), (3, True, 4), (3, "4", 4)]:
        with pytest.raises(UserError):
            ARConfig(32, 2, 1, 1, grid=grid)
    with pytest.raises(UserError, match="^19 tokens do not fit this model's grid of 3x2x3$"):
        tiny(TINY_CLIP)(tokens(2, 19), torch.tensor([3, 10]))


def test_rotary_table():
    """Against the rotation written out for one place: row 2, column 3 of a 5x5 grid, head width 8."""
    cos, sin = ar_model.rotary_table((5, 5), 8)
    assert cos.shape == (26, 4)
    assert torch.equal(cos[0], torch.zeros(4)) and torch.equal(sin[0], torch.zeros(4))
    angles = [2 * 1.0, 2 * 0.01, 3 * 1.0, 3 * 0.01]  # frequencies 10000^-(0/4) and 10000^-(2/4)
    assert cos[1 + 2 * 5 + 3].tolist() == pytest.approx([math.cos(a) for a in angles], abs=1e-6)
    turned = ar_model.rotate(torch.tensor([1.0, 0] * 4), (cos[14:15], sin[14:15])).flatten().tolist()
    expected = [f(a) for a in angles for f in (math.cos, math.sin)]  # adjacent entries are a pair
    assert turned == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("width", [16, 32])
def test_rotary_table_of_clips(width):
    """Against angles written out for one place: frame 2, row 1, column 3 of a 3x4x5 grid."""
    table = ar_model.rotary_table((3, 4, 5), width)
    assert table.shape == (2, 61, width // 2) and table.dtype == torch.float32 and not table[:, 0].any()
    frequencies = {  # 10000^-(j/n)
        16: ([1, 1e-2], [1, 10 ** (-4 / 3), 10 ** (-8 / 3)]),
        32: ([1, 1e-1, 1e-2, 1e-3], [1, 10 ** (-2 / 3), 10 ** (-4 / 3), 1e-2, 10 ** (-8 / 3), 10 ** (-10 / 3)]),
    }
    of_time, of_space = frequencies[width]
    angles = [2 * f for f in of_time] + [1 * f for f in of_space] + [3 * f for f in of_space]
    expected = [[f(angle) for angle in angles] for f in (math.cos, math.sin)]
    np.testing.assert_allclose(table[:, 1 + 2 * 20 + 1 * 5 + 3], expected, atol=1e-6)


def test_rotary_tables_of_a_clip_of_one_frame_and_of_an_image():
    """Half of the pairs are a row's in 2D, 3 of 8 in 3D: of one frequency are j' = 0, 4, .. in 2D, j = 0, 3, .. in 3D."""
    flat, clip = ar_model.rotary_table((4, 5), 64), ar_model.rotary_table((1, 4, 5), 64)
    assert not flat[:, 0].any() and not clip[:, 0].any()
    time, *clip = clip[:, 1:].split([8, 12, 12], -1)
    assert (time[0] == 1).all() and (time[1] == 0).all()
    for ours, theirs in zip(clip, flat[:, 1:].split(16, -1), strict=True):  # rows, columns
        for j in range(12):
            same = [k for k in range(16) if (ours[..., j] - theirs[..., k]).abs().max() < 1e-6]
            assert same == ([4 * j // 3] if j % 3 == 0 else [])


def test_cross_entropies_are_float32():
    logits = [torch.randn(2, 3, 8).bfloat16(), torch.randn(2, 3, 16).bfloat16()]
    answers = [torch.arange(6).view(2, 3), torch.arange(6).view(2, 3)]
    for loss, part in zip(ar_model.cross_entropies(logits, answers), logits):
        picked = part.double().log_softmax(-1).flatten(0, 1)[torch.arange(6), torch.arange(6)]
        assert loss.dtype == torch.float32 and loss.item() == pytest.approx(-picked.mean().item(), rel=1e-6)


def test_fewer_tokens_than_the_grid_and_too_many():
    model, sub_indices, labels = tiny(), tokens(2, 16), torch.tensor([3, 10])
    whole = model(sub_indices, labels)
    part = model([index[:, :5] for index in sub_indices], labels)
    for a, b in zip(part, whole):
        assert a.shape[1] == 5 and relative(a, b[:, :5]) < 1e-6
    with pytest.raises(UserError, match="17 tokens do not fit"):
        model(tokens(2, 17), labels)


# ----------------------------------------------------------------------------------------------------------------------
# Dropout


def labels_used(model, labels):
    seen = []
    table = model.class_emb["embedding_table"]
    handle = table.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    model(tokens(len(labels), 1), labels)
    handle.remove()
    return seen[0]


def test_class_dropout():
    model, labels = tiny().train(), torch.arange(4000) % 10
    torch.manual_seed(0)
    used = labels_used(model, labels)
    dropped = used == 10
    assert torch.equal(used[~dropped], labels[~dropped])
    # 4000 draws of probability 0.1: 400 +- 19
    assert abs(dropped.sum().item() - 400) < 4 * 19
    torch.manual_seed(1)
    assert not torch.equal(labels_used(model, labels), used)
    torch.manual_seed(0)
    assert torch.equal(labels_used(model, labels), used)  # a function of torch's seed
    model.class_dropout = 0.0
    assert torch.equal(labels_used(model, labels), labels)
    model.class_dropout = 1.0
    assert torch.equal(labels_used(model.eval(), labels), labels)


def test_dropout_places(monkeypatch):
    """Doubling what passes a dropout is the same as doubling the weights that feed it, for each in turn."""
    model, sub_indices, labels = tiny(), tokens(2, 16), torch.tensor([3, 4])
    blocks = [f"{kind}.{i}." for kind, n in (("spatial_blocks", 3), ("factorized_blocks", 2)) for i in range(n)]
    places = [["pre_emb", "post_emb", "class_emb.embedding_table"]]  # the token sequence, the class with it
    places += [[block + layer] for block in blocks for layer in ("attention.wo", "feed_forward.w2")]
    calls = []
    for number, names in enumerate(places):

        def double_one(x, p, training, number=number):
            assert p == 0.1 and training is model.training
            calls.append(x.shape)
            return 2 * x if (len(calls) - 1) % len(places) == number else x

        with monkeypatch.context() as patch, torch.no_grad():
            patch.setattr(ar_model.F, "dropout", double_one)
            ours = model(sub_indices, labels)
        doubled = tiny()
        with torch.no_grad():
            for name in names:
                doubled.get_parameter(name + ".weight").mul_(2)
            expected = doubled(sub_indices, labels)
        # The pre embedding also feeds the intra-token blocks, and there no dropout lies behind it.
        for a, b in list(zip(ours, expected))[: 1 if number == 0 else 2]:
            assert relative(a, b) < 1e-6, names
    assert len(calls) == len(places) ** 2  # and there is no other place


def test_dropout_is_real_and_follows_the_seed():
    model, sub_indices, labels = tiny().train(), tokens(2, 16), torch.tensor([3, 4])
    model.class_dropout = 0.0
    outputs = []
    for seed in (5, 5, 6):
        torch.manual_seed(seed)
        outputs.append(model(sub_indices, labels)[0])
    assert torch.equal(outputs[0], outputs[1]) and not torch.equal(outputs[0], outputs[2])
    assert relative(outputs[0], model.eval()(sub_indices, labels)[0]) > 0.01


# ----------------------------------------------------------------------------------------------------------------------
# Generation


def numpy_draw(logits, u, temperature, top_k, top_p):
    """One entry by a direct search, independent of the code under test: logits (V,), one uniform."""
    logits = logits.double().numpy() / temperature
    if top_k:
        logits[logits < np.sort(logits)[-top_k]] = -np.inf
    likelihood = np.exp(logits - logits.max())
    likelihood /= likelihood.sum()
    kept, reached = np.zeros(len(logits), bool), 0.0
    for entry in np.argsort(-likelihood, kind="stable"):
        if reached > top_p:
            break
        kept[entry] = True
        reached += likelihood[entry]
    likelihood[~kept] = 0
    cumulative = np.cumsum(likelihood)
    return int(np.searchsorted(cumulative, u * cumulative[-1], side="right"))


SETTINGS = {
    "unguided": {},
    "guided": {"cfg_scale": (1.9, 2.0)},
    "post only": {"cfg_scale": (1.0, 2.0), "temperature": (1.3, 0.7)},
    "all": {"cfg_scale": (4.0, 3.0), "temperature": (0.8, 1.2), "top_k": (20, 300), "top_p": (0.9, 0.5)},
}


IMAGES_AND_CLIPS = [*((setting, TINY) for setting in SETTINGS), ("unguided", TINY_CLIP), ("guided", TINY_CLIP)]


@pytest.mark.parametrize("setting, config", IMAGES_AND_CLIPS)
@torch.no_grad()
def test_cached_generation_equals_full_forward_passes(setting, config, monkeypatch):
    options = SETTINGS[setting]
    model, labels, seeds, count = tiny(config), torch.tensor([1, 7]), [11, 12], config.tokens
    uniforms = [torch.rand(count, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(s)) for s in seeds]
    sub_indices, slow_logits = [torch.zeros(2, count, dtype=torch.int64) for _ in range(2)], []
    for t in range(count):
        for part in (0, 1):
            shown = [index[:, : t + 1] for index in sub_indices]
            logits = model(shown, labels)[part][:, t]
            scale = options.get("cfg_scale", (1.0, 1.0))[part]
            null = model(shown, torch.full_like(labels, 10))[part][:, t]
            logits = null + scale * (logits - null)
            slow_logits.append(logits)
            rest = [
                options.get(name, (off, off))[part]
                for name, off in (("temperature", 1.0), ("top_k", 0), ("top_p", 1.0))
            ]
            for image in range(2):
                drawn = numpy_draw(logits[image], uniforms[image][t, part].item(), *rest)
                sub_indices[part][image, t] = drawn
    cached_logits, adjust = [], ar_model.SubTokenOptions.adjust

    def watch(self, logits, images):
        cond, null = logits.chunk(2) if len(logits) > images else (logits, logits)
        cached_logits.append(null + self.scale * (cond - null))
        return adjust(self, logits, images)

    monkeypatch.setattr(ar_model.SubTokenOptions, "adjust", watch)
    drawn = model.generate(labels, **options, seeds=seeds)
    assert torch.equal(drawn, sub_indices[0] + 64 * sub_indices[1])
    assert len(set(drawn.flatten().tolist())) > 16  # no constant picture
    for fast, slow in zip(cached_logits, slow_logits, strict=True):
        assert relative(fast, slow) < 1e-5


@pytest.mark.parametrize("setting, config", IMAGES_AND_CLIPS)
def test_its_own_first_tokens_given_a_model_draws_the_same_image(setting, config):
    model, options = tiny(config), {"seeds": [3, 4, 5], **SETTINGS[setting]}
    labels = torch.tensor([1, 7, 10])
    whole = model.generate(labels, **options)
    for n in (0, 1, 8, config.tokens):
        assert torch.equal(model.generate(labels, **options, given=whole[:, :n]), whole)
    assert torch.equal(model.generate(labels, **options, given=whole[:, :3], max_tokens=5), whole[:, :5])


@pytest.mark.parametrize("setting", SETTINGS)
@torch.no_grad()
def test_what_follows_given_tokens_is_that_of_full_forward_passes(setting):
    """Each sub-token drawn is the one that teacher forcing's logits give for its uniform; tokens of no likelihood at
    all are kept as they are."""
    model, labels, seeds, n = tiny(), torch.tensor([1, 7]), [11, 12], 6
    options = SETTINGS[setting]
    given = torch.randint(2**18, (2, n), generator=torch.Generator().manual_seed(0))
    drawn = model.generate(labels, **options, seeds=seeds, given=given)
    assert torch.equal(drawn[:, :n], given) and drawn.dtype == torch.int64 and drawn.shape == (2, 16)
    assert not torch.equal(drawn[:, n:], model.generate(labels, **options, seeds=seeds)[:, n:])
    uniforms = [torch.rand(16, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(s)) for s in seeds]
    sub_indices, null = [drawn % 64, drawn // 64], torch.full_like(labels, 10)
    for part, (cond, uncond) in enumerate(zip(model(sub_indices, labels), model(sub_indices, null), strict=True)):
        logits = uncond + options.get("cfg_scale", (1.0, 1.0))[part] * (cond - uncond)
        offs = {"temperature": (1.0, 1.0), "top_k": (0, 0), "top_p": (1.0, 1.0)} | options
        rest = [offs[name][part] for name in ("temperature", "top_k", "top_p")]
        for image in range(2):
            for t in range(n, 16):
                truth = numpy_draw(logits[image, t], uniforms[image][t, part].item(), *rest)
                assert truth == sub_indices[part][image, t]


@torch.no_grad()
def test_a_token_drawn_after_given_ones_has_the_models_distribution():
    model, n, images = tiny(), 3, 600
    given = torch.randint(2**18, (1, n), generator=torch.Generator().manual_seed(0))
    label = torch.tensor([4])
    drawn = model.generate(label.repeat(images), given=given.repeat(images, 1), max_tokens=n + 1)[:, n]
    shown = [torch.cat([part, part[:, :1]], 1) for part in (given % 64, given // 64)]  # the last is not looked at
    likelihood = model(shown, label)[0][0, n].double().softmax(-1)
    counts, due = (drawn % 64).bincount(minlength=64), likelihood * images
    often = due >= 5
    counts, due = (torch.cat([x[often], x[~often].sum()[None]]) for x in (counts, due))
    assert scipy.stats.chisquare(counts, due).pvalue > 1e-3


@pytest.mark.parametrize("scale, rows", [((1.0, 1.0), 3), ((1.0, 2.0), 6)])
def test_the_null_branch_runs_only_under_guidance(scale, rows):
    model, seen = tiny(), []
    model.spatial_blocks[0].register_forward_hook(lambda module, inputs, output: seen.append(len(inputs[0])))
    model.generate(torch.tensor([1, 2, 3]), scale, max_tokens=2)
    assert seen == [rows, rows]


def test_an_image_does_not_depend_on_its_batch():
    model, labels, seeds = tiny(), torch.arange(8), [100, 7, 2**62, 0, 5, 6, 8, 9]
    whole = model.generate(labels, (1.5, 1.5), seeds=seeds)
    for size in (1, 3):
        parts = [model.generate(labels[i : i + size], (1.5, 1.5), seeds=seeds[i : i + size]) for i in range(0, 8, size)]
        assert torch.equal(torch.cat(parts), whole)
    same_class = model.generate(torch.tensor([1, 1]), seeds=[1, 2])
    assert not torch.equal(same_class[0], same_class[1])
    short = model.generate(labels, (1.5, 1.5), seeds=seeds, max_tokens=5)
    assert torch.equal(short, whole[:, :5])


def test_generation_is_in_eval_mode_and_restores_the_mode():
    model, labels = tiny(), torch.tensor([1, 2])
    expected = model.generate(labels, seeds=[1, 2])
    model.train()
    assert torch.equal(model.generate(labels, seeds=[1, 2]), expected)
    assert model.training and model.spatial_blocks[0].training
    with pytest.raises(RuntimeError):
        model.generate(labels.to("meta"))
    assert model.training


def test_generation_waits_for_nothing_inside_the_token_loop():
    """Reading a value from the device is aten::_local_scalar_dense: as many for 12 tokens as for 1."""

    class Reads(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, function, kinds, args=(), kwargs=None):
            self.count += function in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
            return function(*args, **(kwargs or {}))

    counts = []
    for length in (1, 12):
        with Reads() as reads:
            tiny().generate(torch.tensor([1]), (2.0, 2.0), top_k=(5, 5), top_p=(0.9, 0.9), max_tokens=length)
        counts.append(reads.count)
    assert counts[0] == counts[1] > 0


def test_nothing_is_drawn_from_logits_that_are_not_finite():
    """A weight becomes so large that a product overflows."""
    for name in ("head.0.weight", "spatial_blocks.0.attention.wo.weight"):
        model = tiny()
        model.get_parameter(name).data.view(-1)[:] = 3e38
        for given in (None, torch.tensor([[5, 6]]), torch.tensor([[5, 6, 7]])):
            with pytest.raises(UserError, match="logits are not finite"):
                model.generate(torch.tensor([1]), max_tokens=3, given=given)


def test_generation_under_autocast(monkeypatch):
    """bfloat16 keeps 8 bits: the first logits agree to parts in a hundred, and the cache is bfloat16."""
    seen, caches, adjust = [], [], ar_model.SubTokenOptions.adjust
    options = ar_model.SubTokenOptions
    monkeypatch.setattr(options, "adjust", lambda self, logits, n: seen.append(logits) or adjust(self, logits, n))
    model = tiny()
    model.spatial_blocks[0].register_forward_hook(lambda module, inputs, output: caches.append(inputs[2]))
    model.generate(torch.tensor([1, 2]), (2.0, 2.0), max_tokens=1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model.generate(torch.tensor([1, 2]), (2.0, 2.0), max_tokens=16)
    assert caches[0].dtype == torch.float32 and caches[1].dtype == torch.bfloat16
    assert seen[2].dtype == torch.float32
    assert 1e-6 < relative(seen[2], seen[0]) < 0.05


def test_draw_against_a_direct_search():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(500, 64, generator=generator) * 3
    uniforms = torch.rand(500, dtype=torch.float64, generator=generator)
    expected = [numpy_draw(row, u.item(), 1.0, 0, 1.0) for row, u in zip(logits, uniforms)]
    assert ar_model.draw(logits, uniforms).tolist() == expected
    assert len(set(expected)) > 30
    # Just below and just above the place where one entry ends, in a vocabulary of the post size: float32 would not tell
    # them apart.
    logits = torch.randn(100, 4096, generator=generator) * 0.1
    cumulative = np.exp(logits.double().numpy()).cumsum(1)
    for step, answer in ((-1e-12, 3000), (1e-12, 3001)):
        uniforms = torch.from_numpy(cumulative[:, 3000] / cumulative[:, -1] + step)
        assert ar_model.draw(logits, uniforms).tolist() == [answer] * 100


def test_draw_survives_sums_that_step_back(monkeypatch):
    """Parallel sums need not be monotone; entries of probability 0 must not be hit all the same."""
    logits, cumsum = torch.tensor([[-math.inf, 0.0, -math.inf, 0.0, -math.inf]]), torch.Tensor.cumsum
    noise = torch.tensor([1e-15, 0.0, 1e-15, 0.0, 1e-15], dtype=torch.float64)
    monkeypatch.setattr(torch.Tensor, "cumsum", lambda x, dim: cumsum(x, dim) + noise)
    uniforms = torch.tensor([0.0, 0.5, 1 - 2**-53], dtype=torch.float64)
    assert ar_model.draw(logits.repeat(3, 1), uniforms).tolist() == [1, 3, 3]


def test_draw_at_the_edges():
    none = -math.inf
    logits = torch.tensor([[none, 0.0, none, 0.0, none]]).repeat(4, 1)
    uniforms = torch.tensor([0.0, 0.5 - 2**-53, 0.5, 1 - 2**-53], dtype=torch.float64)
    assert ar_model.draw(logits, uniforms).tolist() == [1, 1, 3, 3]
    # The largest uniform on sums that do not end at exactly 1, behind it entries that may not be drawn.
    logits = torch.randn(2000, 300, generator=torch.Generator().manual_seed(0))
    logits[:, 200:] = none
    logits[:, 199] = -800.0  # probability 0 in float64
    drawn = ar_model.draw(logits, torch.full((2000,), 1 - 2**-53, dtype=torch.float64))
    assert drawn.tolist() == [198] * 2000
    assert ar_model.draw(logits, torch.ones(2000, dtype=torch.float64)).tolist() == [198] * 2000


def test_draws_have_the_right_distribution():
    likelihood = torch.tensor([0.4, 0.3, 0.15, 0.1, 0.04, 0.01], dtype=torch.float64)
    uniforms = ar_model.image_uniforms(range(200), 50)
    assert uniforms.shape == (200, 50, 2) and uniforms.dtype == torch.float64
    for part in (0, 1):  # over images and tokens, for the pre and for the post draws
        u = uniforms[..., part].flatten()
        counts = ar_model.draw(likelihood.log().expand(len(u), -1), u).bincount(minlength=6)
        assert scipy.stats.chisquare(counts, likelihood * len(u)).pvalue > 1e-3
    correlation = np.corrcoef(uniforms[..., 0].flatten(), uniforms[..., 1].flatten())[0, 1]
    assert abs(correlation) < 4 / math.sqrt(10000)


@pytest.mark.parametrize(
    "options, word",
    [
        ({"temperature": (0.0, 1.0)}, "temperature 0.001 to 1000"),
        ({"temperature": (1.0, math.nan)}, "temperature"),
        ({"cfg_scale": (math.inf, 1.0)}, "cfg_scale"),
        ({"cfg_scale": (1.0,)}, "pair"),
        ({"top_k": (-1, 0)}, "top_k"),
        ({"top_p": (0.0, 1.0)}, "top_p"),
        ({"top_p": (1.0, 1.1)}, "top_p"),
        ({"seeds": [1]}, "2 images need as many seeds, not 1"),
        ({"max_tokens": 17}, "max_tokens must be 1 to 16"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"class_labels": torch.tensor([0, 11])}, "class labels must be 0 to 10"),
        ({"class_labels": torch.tensor([-1, 0])}, "class labels"),
        ({"class_labels": torch.zeros(0, dtype=torch.int64)}, "0 images need .* at least one"),
        ({"given": torch.zeros(2, 3)}, r"given tokens must be int64 \(2, up to 16\)"),
        ({"given": torch.zeros(3, 3, dtype=torch.int64)}, "given"),
        ({"given": torch.zeros(2, dtype=torch.int64)}, "given"),
        ({"given": torch.tensor(0)}, "given"),
        ({"given": torch.zeros(2, 17, dtype=torch.int64)}, "given"),
        ({"given": torch.zeros(2, 5, dtype=torch.int64), "max_tokens": 4}, r"\(2, up to 4\)"),
        ({"given": torch.tensor([[0], [2**18]])}, "0 to 262143"),
        ({"given": torch.tensor([[0], [-1]])}, "0 to 262143"),
    ],
)
def test_options_out_of_range(options, word):
    with pytest.raises(UserError, match=word) as error:
        tiny().generate(**{"class_labels": torch.tensor([0, 10]), **options})
    assert "\n" not in str(error.value)


def test_top_p_always_keeps_one_and_ties():
    logits = torch.tensor([[0.0, 5.0, 0.0], [1.0, 1.0, 1.0]])
    kept = ar_model.filter_logits(logits, top_p=1e-9) > -math.inf
    assert kept.tolist() == [[False, True, False], [True, False, False]]
    kept = ar_model.filter_logits(torch.zeros(1, 4), top_p=0.5) > -math.inf
    assert kept.tolist() == [[True, True, True, False]]  # two of them reach 0.5, three pass it
    kept = ar_model.filter_logits(logits, top_k=2) > -math.inf
    assert kept.tolist() == [[True] * 3] * 2  # top-k keeps what equals the k-th


# ----------------------------------------------------------------------------------------------------------------------
# Reading files


def released_file(path, size="B", change=None, container=True, **extra):
    """A file with a released file's entries. Each is constant, so that it is small on disk: entry i of the list holds
    the value i."""
    entries = {
        name: torch.full((1,), float(i)).expand(shape) if shape else torch.tensor(float(i))
        for i, (name, (shape, _)) in enumerate(checkpoint_keys(f"AR_256_{size}.ckpt").items())
    }
    if change:
        change(entries)
    torch.save({"state_dict": entries, "epoch": 3, **extra} if container else entries, path)
    return path


@pytest.mark.parametrize("size, container", [("B", True), ("L", True), ("XL", False)])
def test_released_file(tmp_path, size, container, monkeypatch):
    seen = []

    def stand_in(entries, source, config=None):  # the tokenizer's own reading is tested in its own room
        seen.append(entries)
        return "the tokenizer"

    monkeypatch.setattr(ar_model, "tokenizer_from_entries", stand_in)
    model, tokenizer = load_ar(released_file(tmp_path / "x.ckpt", size, container=container))
    assert model.config == AR_SIZES[size] and not model.training and model.class_names is None
    assert tokenizer == "the tokenizer"
    state, carried = model.state_dict(), seen[0]
    for i, name in enumerate(checkpoint_keys(f"AR_256_{size}.ckpt")):
        held = state if name.startswith("transformer.") else carried
        short = name.removeprefix("transformer.").removeprefix("first_stage_model.")
        assert held.pop(short).flatten()[0].item() == i, name
    assert not state and not carried
    assert all(p.requires_grad for p in model.parameters())


def test_the_carried_tokenizer_is_read(tmp_path):
    def only_tokenizer_one(entries):
        for name in entries:
            if name.startswith("first_stage_model."):
                entries[name] = torch.ones(1).expand(entries[name].shape)

    _, tokenizer = load_ar(released_file(tmp_path / "x.ckpt", change=only_tokenizer_one))
    assert isinstance(tokenizer, Tokenizer) and tokenizer.factor == 16 and not tokenizer.training
    assert {float(v) for p in tokenizer.state_dict().values() for v in (p.min(), p.max())} == {1.0}


NAME = "transformer.spatial_blocks.3.feed_forward.w2.weight"


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda e: e.pop(NAME), ["B transformer", NAME.removeprefix("transformer.") + " is missing"]),
        (lambda e: e.update({NAME: torch.ones(3)}), ["w2.weight has shape (3,), expected (1024, 2816)"]),
        (lambda e: e.update({"transformer.extra": torch.ones(3)}), ["entry extra is unexpected"]),
        (lambda e: e.update({"loss.x": torch.ones(3)}), ["entry loss.x is unexpected"]),
        (lambda e: e.update({NAME: 3}), ["w2.weight is not a tensor"]),
        (lambda e: e.update({NAME.removeprefix("transformer."): torch.ones(1024, 2816)}), ["w2.weight twice"]),
        (lambda e: e.pop("transformer.class_emb.embedding_table.weight"), ["class_emb.embedding_table.weight"]),
        (lambda e: e.pop("first_stage_model.decoder.conv_in.weight"), ["decoder.conv_in.weight is missing"]),
    ],
)
def test_a_wrong_entry_is_named(tmp_path, change, words):
    path = released_file(tmp_path / "x.ckpt", change=change)
    with pytest.raises(UserError) as error:
        load_ar(path)
    for word in [*words, str(path)]:
        assert word in str(error.value)
    assert "\n" not in str(error.value)


class Foreign:
    """Would leave a mark if a reader ever ran it."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


def test_foreign_objects_are_not_executed(tmp_path, monkeypatch):
    monkeypatch.setattr(ar_model, "tokenizer_from_entries", lambda *_: None)
    mark = tmp_path / "executed"
    path = released_file(tmp_path / "x.ckpt", callbacks={"state": Foreign(mark)})
    with pytest.warns(UserWarning, match="posix.mkdir"):
        model, _ = load_ar(path)
    assert model.norm.weight.shape == (1024,) and not mark.exists()


def own_file(path, **changes):
    model, tokenizer = tiny(), Tokenizer(TokenizerConfig(32, (1, 2), 1))
    content = {
        "kind": "ar",
        "step": 5,
        "config": dataclasses.asdict(TINY),
        "model": model.state_dict(),
        "class_names": [f"class {i}" for i in range(10)],
        "tokenizer": {"config": dataclasses.asdict(tokenizer.config), "state": tokenizer.state_dict()},
    }
    torch.save({**content, **changes}, path)
    return model, tokenizer


@pytest.mark.parametrize("folder", [False, True])
def test_own_file(tmp_path, folder):
    model, tokenizer = own_file(tmp_path / "step_00000005.pt")
    read, read_tokenizer = load_ar(tmp_path if folder else tmp_path / "step_00000005.pt")
    assert read.config == TINY and read.class_names[9] == "class 9"
    assert read_tokenizer.config == tokenizer.config
    for ours, theirs in ((read, model), (read_tokenizer, tokenizer)):
        for name, value in theirs.state_dict().items():
            assert torch.equal(ours.state_dict()[name], value), name
        assert not ours.training
    golden = load("gpt_tiny")
    logits = read([golden["index_pre"], golden["index_post"]], golden["class_label"])
    assert relative(logits[0], golden["logits_pre"]) < 1e-5


def test_own_file_without_tokenizer_or_parts(tmp_path):
    own_file(tmp_path / "a.pt", tokenizer=None, class_names=None)
    model, tokenizer = load_ar(tmp_path / "a.pt")
    assert tokenizer is None and model.class_names is None
    own_file(tmp_path / "b.pt", config={"width": 64})
    with pytest.raises(UserError, match="b.pt is no whole transformer file"):
        load_ar(tmp_path / "b.pt")


@pytest.mark.parametrize("prefix", ["", "transformer."])
def test_bare_state_dict(tmp_path, prefix):
    model = tiny()
    torch.save({prefix + name: value for name, value in model.state_dict().items()}, tmp_path / "bare.pt")
    with pytest.raises(UserError, match="bare.pt is a bare state dict of width 64"):
        load_ar(tmp_path / "bare.pt")
    read, tokenizer = load_ar(tmp_path / "bare.pt", config=TINY)
    assert tokenizer is None
    for name, value in model.state_dict().items():
        assert torch.equal(read.state_dict()[name], value), name
    with pytest.raises(UserError, match=r"spatial_blocks\.3\..* is missing"):
        load_ar(tmp_path / "bare.pt", config=dataclasses.replace(TINY, spatial_layers=4))


def test_a_tokenizer_file_is_told_from_a_transformer_file(tmp_path):
    tokenizer = Tokenizer(TokenizerConfig(32, (1, 2), 1))
    state = tokenizer.state_dict()
    for content in (
        {"kind": "tokenizer", "config": dataclasses.asdict(tokenizer.config), "tokenizer": state},
        {"state_dict": state},
        state,
    ):
        torch.save(content, tmp_path / "x.pt")
        with pytest.raises(UserError, match="x.pt is a tokenizer file"):
            load_ar(tmp_path / "x.pt")


def test_unknown_names(tmp_path):
    with pytest.raises(UserError, match="no file or folder XXL; released names: B, L, XL"):
        load_ar("XXL")
    assert ar_model.RELEASED_AR["XL"] == (
        "https://huggingface.co/TencentARC/Open-MAGVIT2-AR-XL-256-resolution/resolve/main/AR_256_XL.ckpt"
    )
