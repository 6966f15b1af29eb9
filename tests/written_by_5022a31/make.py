"""Makes files.tar.xz, whose files tests/test_old_files.py opens: copied into a checkout of commit 5022a31 and run there
as `python make.py`; one CPU, a minute.

The scripts of that commit write every file. So that they pack into 400 kB, both training checkpoints are changed once
they are written: each float32 value is cut to its sign and power of two, and that commit's own function writes the
checkpoint again. Code cache, outputs and the losses logged from there on are what that commit makes of the cut
checkpoints. The statistics are as fid.py left them, of pictures of one grey level each, by an Inception network whose
weights are zero but on one path, so that nearly all of their values are zero.
"""

import json
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ar_model import load_ar
from checkpoint import read_weights, write_atomically
from data import open_codes
from inception import InceptionV3
from tokenizer import load_tokenizer

# As in tests/test_old_files.py
TOKENIZER = "--data glyphs:40:ABCD --size 16 --channels 32 --multipliers 1 1 --blocks 1 --bits 4 --ema 0.5 --lr 1e-3"
TOKENIZER += " --global-batch 8 --micro-batch 4 --workers 0 --steps 4 --log-every 1 --save-every 2 --eval-every 4"
AR = "--width 16 --heads 2 --spatial-layers 1 --intra-layers 1 --pre-bits 2 --dropout 0.1 --lr 3e-2"
AR += " --global-batch 8 --micro-batch 4 --steps 4 --log-every 1 --save-every 2 --eval-every 4"


def run(script, *flags):
    variables = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    subprocess.run([sys.executable, script, *map(str, flags)], check=True, env=variables)


def cut(value):
    if isinstance(value, dict):
        return type(value)((key, cut(entry)) for key, entry in value.items())
    if isinstance(value, list):
        return [cut(entry) for entry in value]
    if isinstance(value, torch.Tensor) and value.dtype == torch.float32:
        return (value.contiguous().view(torch.int32) & ~(2**23 - 1)).view(torch.float32)
    return value


def train(script, flags, out):
    """Two steps of four, the checkpoint cut; then, in a copy, the other two: their log lines."""
    run(script, *flags, "--out", out)
    (out / "step_00000004.pt").unlink()
    shutil.rmtree(out / "samples")
    for board in out.glob("events.*"):
        board.unlink()
    path = out / "step_00000002.pt"
    write_atomically(path, cut(read_weights(path)))
    lines = (out / "log.jsonl").read_text().splitlines(keepends=True)
    (out / "log.jsonl").write_text("".join(line for line in lines if json.loads(line)["step"] <= 2))
    copy = Path(f"{out}_copy")
    shutil.copytree(out, copy)
    run(script, *flags, "--out", copy)
    lines = [json.loads(line) for line in (copy / "log.jsonl").read_text().splitlines()]
    shutil.rmtree(copy)
    timed = ("images_per_second", "memory_gib")
    return [{name: line[name] for name in line if name not in timed} for line in lines if line["step"] > 2]


def main():
    files = Path("files")
    files.mkdir()
    expected = {"tokenizer_log": train("train_tokenizer.py", TOKENIZER.split(), files / "tokenizer")}
    rng = np.random.default_rng(0)
    for name in ("cat", "dog", "owl"):
        Path("pictures", name).mkdir(parents=True)
        for number in range(8):
            pixels = rng.integers(0, 256, (5, 6, 3), np.uint8).repeat(4, 0).repeat(4, 1)
            Image.fromarray(pixels).save(Path("pictures", name, f"{number}.png"))
    flags = ["--data", "pictures", "--size", 16, "--crops", 2, "--workers", 0]
    run("encode.py", "--tokenizer", files / "tokenizer", *flags, "--out", files / "codes")
    expected["ar_log"] = train("train_ar.py", ["--codes", files / "codes", *AR.split()], files / "ar")

    torch.manual_seed(1)
    images = torch.rand(1, 3, 16, 16) * 2 - 1
    for name, ema in (("average", True), ("raw", False)):
        tokenizer = load_tokenizer(files / "tokenizer", ema=ema)
        with torch.no_grad():
            indices = tokenizer.encode(images)
            expected[name] = {"images": images, "indices": indices, "decoded": tokenizer.decode(indices)}
    model, carried = load_ar(files / "ar")
    entries = [(0, 3), (0, 20), (1, 3), (2, 9), (7, 11)]  # (epoch, picture): other epochs take other crops
    indices, labels = open_codes(files / "codes").batch(entries, 0)
    expected["codes"] = {"entries": entries, "indices": indices, "labels": labels}
    pre, post = indices // 4, indices % 4
    with torch.no_grad():
        logits = model([pre, post], labels)
        drawn = model.generate(labels, cfg_scale=(2.0, 1.5), seeds=[5, 6, 7, 8, 9])
        decoded = carried.decode(drawn[:1].view(1, 8, 8))
    expected["ar"] = {"pre": pre, "post": post, "labels": labels, "logits": logits, "drawn": drawn, "decoded": decoded}

    # One path: the first filter of the first branch of every block, its middle tap. No bias but of the norms, zero.
    inception = InceptionV3().eval()
    state = {name: torch.zeros_like(value) for name, value in inception.state_dict().items()}
    for name, value in state.items():
        if name.endswith("running_var"):
            value.fill_(1)
        first = "branch" not in name or name.split(".")[1] in ("branch1x1", "branch3x3", "branch3x3_1", "branch3x3_2")
        if name.endswith("bn.weight") and first:
            value[0] = 1
        if name.endswith("conv.weight") and first:
            value[0, 0, value.shape[2] // 2, value.shape[3] // 2] = 1
    state["fc.weight"][:4, 0] = 4 * torch.arange(4.0)
    torch.save(state, files / "inception.pth")
    for name, levels in (("reference", range(150, 166, 2)), ("samples", (140, *range(151, 163, 2), 250))):
        folder = Path(f"pictures_{name}")
        folder.mkdir()
        for level in levels:
            Image.fromarray(np.full((32, 32, 3), level, np.uint8)).save(folder / f"{level}.png")
    weights = ["--inception", files / "inception.pth", "--workers", 0]
    run("fid.py", "pictures_reference", *weights, "--save-stats", files / "statistics.npz")
    run("fid.py", files / "statistics.npz", "pictures_samples", *weights, "--json", "fid.json")
    numbers = json.loads(Path("fid.json").read_text())
    expected["fid"] = {name: numbers[name] for name in ("FID", "sFID", "IS", "precision", "recall")}

    write_atomically(files / "expected.pt", expected)
    with tarfile.open("files.tar.xz", "w:xz", preset=9) as archive:
        for name in ("tokenizer", "codes", "ar", "expected.pt", "inception.pth", "statistics.npz"):
            archive.add(files / name, name)


if __name__ == "__main__":
    main()
