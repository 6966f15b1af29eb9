"""Passes and gradients: exchanged ones against one process's, and, on a GPU, graphs against the plain passes."""

import os
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
from golden_files import relative
from scripts import ROOT, log_lines, on_two_ranks, run
from torch import nn

import fast
from ar_model import ARConfig, ARTransformer, cross_entropies
from fast.graphs import Gradients, Graphs
from runtime import Runtime
from train_ar import rerun_in_backward


def network():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.SiLU(), nn.Conv2d(8, 2, 3, bias=False), nn.Flatten(), nn.Linear(32, 1))
    return model.to(memory_format=torch.channels_last)


def add_up(model, gradients, pictures, share):
    """Two micro-batches' gradients."""
    gradients.clear()
    for part in pictures.chunk(2):
        (model(part).square().mean() / share).backward()
    gradients.exchange()


def _exchange(rank, folder):
    pictures = torch.load(folder / "pictures.pt").chunk(2)[rank]
    model = network()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += rank
    rt = Runtime(torch.device("cpu"), rank, 2, dist.group.WORLD)
    rt.share_parameters(model)
    gradients = Gradients(rt, model.parameters())
    for _ in range(2):  # the second time over what the first has left
        add_up(model, gradients, pictures, 4)
    for parameter in model.parameters():
        assert parameter.grad.stride() == parameter.stride()
    torch.save([p.grad for p in model.parameters()], folder / f"{rank}.pt")


def test_exchanged_gradients_are_those_of_one_process(tmp_path):
    """The second process, which begins with other weights, takes the first one's."""
    pictures = torch.randn(8, 3, 8, 8)
    torch.save(pictures, tmp_path / "pictures.pt")
    on_two_ranks(_exchange, tmp_path, tmp_path)
    model = network()
    model(pictures).square().mean().backward()
    for rank in range(2):
        for parameter, gradient in zip(model.parameters(), torch.load(tmp_path / f"{rank}.pt"), strict=True):
            assert relative(gradient, parameter.grad) < 1e-6


def test_one_process_keeps_no_buffer():
    model = network()
    gradients = Gradients(Runtime(torch.device("cpu")), model.parameters())
    add_up(model, gradients, torch.randn(4, 3, 8, 8), 2)
    gradients.clear()
    assert all(p.grad is None for p in model.parameters())


def test_passes_without_a_gpu():
    """They add up from the first on; forgetting the graphs, of which there are none, lets go of the gradients."""
    rt, model = Runtime(torch.device("cpu")), network()
    gradients, graphs = Gradients(rt, model.parameters()), Graphs(rt, True)

    def work(pictures):
        loss = model(pictures).square().mean() / 2
        loss.backward()
        return {"loss": loss.detach()}

    for pictures in torch.randn(5, 8, 3, 8, 8):  # steps
        for i, part in enumerate(pictures.chunk(2)):
            graphs.run(work, gradients, i == 0, part)
    assert graphs.kept == {}
    found = [p.grad for p in model.parameters()]
    graphs.forget()
    assert all(p.grad is None for p in model.parameters())
    model(pictures).square().mean().backward()
    for gradient, parameter in zip(found, model.parameters(), strict=True):
        assert relative(gradient, parameter.grad) < 1e-6


def trained(enabled, world, half, compiled=False, rerun=False, steps=8):
    """The losses of some steps of two micro-batches with dropout, the weights, and the graphs."""
    torch.manual_seed(0)
    model = ARTransformer(ARConfig(64, 4, 3, 2, (6, 12), grid=4, num_classes=10)).cuda().train()
    for head in model.head:  # begun at zero, the first steps would show no difference between micro-batches
        nn.init.normal_(head.weight, std=0.02)
    for block in [*model.spatial_blocks, *model.factorized_blocks] if rerun else []:
        rerun_in_backward(block)
    if compiled:
        fast.compile(*model.spatial_blocks)
        model.predict = torch.compile(model.predict, dynamic=False)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, fused=True)
    rt = Runtime(torch.device("cuda"), world=world)
    gradients, graphs = Gradients(rt, model.parameters()), Graphs(rt, enabled)
    # Its scale changes every other step.
    scaler = torch.amp.GradScaler("cuda", growth_interval=2, enabled=half)
    data = torch.Generator("cuda").manual_seed(1)

    def work(pre, post, labels):
        with torch.autocast("cuda", torch.float16, enabled=half):
            logits = model([pre, post], labels)
        terms = cross_entropies(logits, [pre, post])
        scaler.scale(sum(terms) / 2).backward()
        return {"pre": terms[0].detach(), "post": terms[1].detach()}

    found = []
    for step in range(steps):
        for i in range(2):
            tokens = [torch.randint(2**bits, (3, 16), generator=data, device="cuda") for bits in (6, 12)]
            torch.manual_seed(1000 * step + i)
            found.append(graphs.run(work, gradients, i == 0, *tokens, torch.arange(3, device="cuda")))
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        if step == 5:
            graphs.forget()
            torch.cuda.empty_cache()
    losses = torch.tensor([[value.item() for value in terms.values()] for terms in found])
    return losses, list(model.parameters()), graphs


@pytest.mark.gpu
@pytest.mark.parametrize(
    "world, half, rerun",  # two: gradients in a buffer
    [(1, False, False), (2, False, False), (1, True, False), (1, False, True)],
)
def test_graphs_change_nothing(world, half, rerun):
    """Losses and weights, dropout included, that of blocks run twice, too (which graphs take compiled only); a graph
    that was dropped is recorded again."""
    plain_losses, plain_weights, _ = trained(False, world, half, compiled=rerun)
    losses, weights, graphs = trained(True, world, half, compiled=rerun, rerun=rerun)
    assert len(graphs.kept) == 2
    assert plain_losses.std(0).min() > 1e-3  # micro-batches differ
    assert relative(losses, plain_losses) < (1e-4 if half else 1e-6)
    for a, b in zip(weights, plain_weights, strict=True):
        assert relative(a, b) < (1e-2 if half else 1e-4)


SCRIPTS = {
    "train_tokenizer.py": "--data glyphs:60:AB --size 24 --channels 32 --multipliers 1 1 --blocks 1 --gan-weight 0.1"
    " --lecam-weight 0.05 --workers 1 --precision bf16",
    "train_ar.py": "--width 64 --heads 2 --spatial-layers 2 --intra-layers 1 --warmup-epochs 0 --precision fp32",
}
# Both runs in one process: another would find other convolution algorithms the fastest.
BOTH = """
import pathlib, runpy, sys, torch
import fast.graphs as passes
record, recorded = passes.Graphs._record, []
passes.Graphs._record = lambda self, *args: recorded.append(args[0].func.__name__) or record(self, *args)
torch.backends.cudnn.deterministic = True
script, folder, *flags = sys.argv[1:]
for name, warm_up in ("plain", 99), ("graphs", 3):
    passes.Graphs.WARM_UP = warm_up
    sys.argv = [script, *flags, "--out", f"{folder}/{name}"]
    runpy.run_path(script)["main"]()
    pathlib.Path(folder, name, "recorded").write_text(" ".join(recorded))
"""


@pytest.mark.gpu
@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_with_graphs(script, tmp_path):
    """Every loss of every step, with an evaluation between; how far weights move; BatchNorm's counts."""
    flags = [*SCRIPTS[script].split(), "--steps", 10, "--log-every", 1, "--eval-every", 6, "--compile"]
    # So little is learnt that another order of sums is not amplified.
    flags += ["--global-batch", 12, "--micro-batch", 4, "--lr", "1e-5", "--save-every", 3, "--keep-every", 3]
    if script == "train_ar.py":
        small = "--data glyphs:60:AB --size 24 --channels 32 --multipliers 1 1 --blocks 1 --workers 1 --steps 2"
        run("train_tokenizer.py", *small.split(), "--out", tmp_path / "tokenizer")
        encode = ["--tokenizer", tmp_path / "tokenizer", "--data", "glyphs:60:AB", "--size", 24]
        run("encode.py", *encode, "--out", tmp_path / "codes")
        flags += ["--codes", tmp_path / "codes", "--val-codes", tmp_path / "codes", "--eval-pictures", 9]
    words = [sys.executable, "-c", BOTH, ROOT / script, tmp_path, *flags]
    done = subprocess.run(
        [str(word) for word in words],
        check=False,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        timeout=300,
    )
    assert done.returncode == 0 and done.stderr == "", done.stderr[-3000:]  # nor a warning

    assert (tmp_path / "plain" / "recorded").read_text() == ""
    # In two rounds, before and after the evaluation: the first micro-batch's, and the others'.
    passes = ["training_pass"] if script == "train_ar.py" else ["generator_pass", "discriminator_pass"]
    assert sorted((tmp_path / "graphs" / "recorded").read_text().split()) == sorted(4 * passes)
    plain, ours = ([x for x in log_lines(tmp_path / name) if "lr" in x] for name in ("plain", "graphs"))
    assert len(plain) == len(ours) == 10
    for expected, line in zip(plain, ours, strict=True):
        for name, value in expected.items():
            assert line[name] == pytest.approx(value, rel=1e-3, abs=1e-5), (line["step"], name)
    ends = [tmp_path / name / f"step_000000{step}.pt" for name in ("plain", "graphs") for step in ("03", "10")]
    began, plain, ours_began, ours = (torch.load(path, map_location="cpu") for path in ends)
    for part in ["model"] if script == "train_ar.py" else ["tokenizer", "discriminator"]:
        for name, value in plain[part].items():
            if "num_batches" in name:
                # Steps, micro-batches, passes: D(y) for the generator, D(x), D(y)
                assert ours[part][name] == value == 10 * 3 * 3
            elif name.endswith("weight"):  # a bias before a norm of one channel has no gradient but noise
                moved, our_moved = value - began[part][name], ours[part][name] - ours_began[part][name]
                assert relative(our_moved, moved) < 0.05, name
