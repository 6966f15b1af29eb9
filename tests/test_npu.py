"""The scripts on a stand-in for an Ascend NPU (npu.py), alone and as two ranks, against the CPU's numbers."""

import importlib.util
import json

import numpy as np
import pytest
import torch
from golden_files import fill
from PIL import Image
from scripts import log_lines, run

from checkpoint import read_weights
from losses import LPIPS

try:
    import npu
except ImportError:
    npu = None
taken = importlib.util.find_spec("torch_npu") is not None
pytestmark = pytest.mark.skipif(npu is None or taken, reason="this torch takes no device made in Python named npu")

LR = 1e-5  # so small that rounding cannot grow: Adam's first steps are of one size, whatever the gradient
TRAINING = f"--global-batch 8 --micro-batch 4 --steps 2 --lr {LR} --precision fp32 --eval-pictures 4 --log-every 1"
TOKENIZER = "--size 24 --channels 32 --multipliers 1 1 1 --blocks 1 --gan-weight 0.1 --lecam-weight 0.05"
AR = "--width 32 --heads 2 --spatial-layers 1 --intra-layers 1 --dropout 0.1"


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Folder with cpu, npu and npu2: what the scripts wrote on each."""
    folder, pictures = tmp_path_factory.mktemp("runs"), "--data glyphs:60:AB --workers 0"
    keep, alex = ("scaling_layer.shift", "scaling_layer.scale"), f"--lpips-alex {folder}/alex.pt"
    torch.save(fill(LPIPS("alex"), "alex.", keep=keep).state_dict(), folder / "alex.pt")
    for name, prepare, processes in (("cpu", None, 1), ("npu", npu.attach, 1), ("npu2", npu.attach, 2)):
        out = folder / name
        for words in (
            f"train_tokenizer.py {pictures} {TOKENIZER} {TRAINING} --out {out}/tokenizer",
            f"encode.py {pictures} --tokenizer {out}/tokenizer --size 16 --out {out}/codes",
            f"train_ar.py --codes {out}/codes --val-codes {out}/codes {AR} {TRAINING} --out {out}/ar",
            f"sample.py --model {out}/ar --count 4 --top-k 32 32 --precision fp32 --out {out}/samples",
            f"eval_tokenizer.py {pictures} --tokenizer {out}/tokenizer --size 32 {alex} --out {out}/eval",
        ):
            run(*words.split(), prepare=prepare, processes=processes)
        protocol = json.loads((out / "eval" / "metrics.json").read_text())["protocol"]
        assert protocol["device"].startswith(f"{name[:3]} x {processes}, tokenizer in fp32")
    return folder


def distance(ours, cpus):
    """Of two lists of tensors: root mean square of the difference, and of the second."""
    ours, cpus = (torch.cat([x.flatten() for x in tensors]) for tensors in (ours, cpus))
    return (ours - cpus).square().mean().sqrt(), cpus.square().mean().sqrt()


@pytest.mark.parametrize("name, module", [("tokenizer", "tokenizer"), ("ar", "model")])
@pytest.mark.parametrize("kind", ["npu", "npu2"])
def test_training_gives_the_cpus_numbers(runs, kind, name, module):
    for ours, cpus in zip(log_lines(runs / kind / name), log_lines(runs / "cpu" / name), strict=True):
        assert ours == pytest.approx(cpus, rel=1e-4, abs=1e-6)
    ours, cpus = (read_weights(runs / each / name / "step_00000002.pt") for each in (kind, "cpu"))
    for optimizer in (key for key in cpus if key.startswith("optimizer")):
        means = ([p["exp_avg"] for p in state[optimizer]["state"].values()] for state in (ours, cpus))
        difference, size = distance(*means)
        assert difference < 1e-4 * size
    assert distance(ours[module].values(), cpus[module].values())[0] < 0.05 * LR


@pytest.mark.parametrize("kind", ["npu", "npu2"])
def test_what_is_made_of_the_weights(runs, kind):
    codes, cpus = (np.fromfile(runs / each / "codes" / "codes.bin", np.int32) for each in (kind, "cpu"))
    assert len(codes) == 60 * 16 and (codes != cpus).mean() < 0.01
    same = []
    for path in (runs / "cpu" / "samples").glob("*.png"):
        picture = np.array(Image.open(runs / kind / "samples" / path.name), int)
        same.append((np.abs(picture - np.array(Image.open(path))) <= 1).all())
    assert len(same) == 4 and sum(same) >= 3  # a draw that falls between two tokens may go either way
    ours, cpus = (json.loads((runs / each / "eval" / "metrics.json").read_text()) for each in (kind, "cpu"))
    for name in ("PSNR", "PSNR published", "SSIM", "SSIM published", "LPIPS AlexNet", "codebook use"):
        assert ours[name] == pytest.approx(cpus[name], rel=1e-3)
