"""The whole street on built-in pictures, on a CPU in minutes: what `make demo` runs.

    python demo.py [FOLDER]        default folder: runs/demo

Trains a tiny tokenizer on glyphs, encodes them, trains a tiny transformer, draws samples; then prints a table of what
came out, and the two pictures to look at. Every step is a command that you can run, and change, yourself."""

import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from PIL import Image

import runtime
from glyphs import nearest_letters

LETTERS, SIZE, EACH = "CAT", 24, 20  # pixels a side; samples a letter
TRAIN, VAL = f"glyphs:6000:{LETTERS}", f"glyphs:400:{LETTERS}"
# GroupNorm has 32 groups: with no more channels than that, each would lose its mean, and with it the colours.
TOKENIZER = f"--size {SIZE} --channels 64 --multipliers 1 1 1 --bits 13 --lr 8e-4 --lr-drops 1.25 --steps 550"
TRANSFORMER = "--width 96 --heads 3 --dropout 0 --global-batch 32 --micro-batch 32 --lr 3e-3 --warmup-epochs 0.3"
ENCODE = f"encode.py --tokenizer DEMO/tokenizer --size {SIZE}"
STREET = {
    "train the tokenizer": f"train_tokenizer.py --data {TRAIN} --val-data {VAL} {TOKENIZER} --out DEMO/tokenizer",
    "encode": f"{ENCODE} --data {TRAIN} --seed 1 --out DEMO/codes/train",
    "encode, validation": f"{ENCODE} --data {VAL} --seed 2 --out DEMO/codes/val",
    "train the transformer": f"train_ar.py --codes DEMO/codes/train --val-codes DEMO/codes/val {TRANSFORMER} --steps 900 "
    "--out DEMO/ar",
    "sample": f"sample.py --model DEMO/ar --per-class {EACH} --cfg 3 3 --top-p 0.8 0.8 --out DEMO/samples.png",
}


def main():
    arguments = runtime.parser(__doc__)
    arguments.add_argument("folder", nargs="?", type=Path, default="runs/demo", help="for all that it makes")
    folder = arguments.parse_args().folder
    # Runs of minutes on a CPU: its threads wait for each other briefly, then sleep (beside any other load, spinning would
    # take many times longer). Runs of seconds on a GPU: compiling for it would take longer than they do.
    environment, times = {"GOMP_SPINCOUNT": "5000", "FAST": "0", **os.environ}, {}
    for name, words in STREET.items():
        words = words.replace("DEMO", shlex.quote(str(folder)))
        print(f"\n== {name}: python {words}", flush=True)
        began = time.perf_counter()
        script, *flags = shlex.split(words)
        code = subprocess.call([sys.executable, str(Path(__file__).with_name(script)), *flags], env=environment)
        if code:
            sys.exit(code)
        times[name] = time.perf_counter() - began

    measured = {}
    for run in ("tokenizer", "ar"):
        for line in (folder / run / "log.jsonl").read_text().splitlines():
            measured |= json.loads(line)
    with Image.open(folder / "samples.png") as sheet:  # a letter a row, two pixels between pictures
        cells = np.pad(sheet, [(0, 2), (0, 2), (0, 0)]).reshape(len(LETTERS), SIZE + 2, EACH, SIZE + 2, 3)
    samples = cells[:, :SIZE, :, :SIZE].swapaxes(1, 2).reshape(-1, SIZE, SIZE, 3)
    right = nearest_letters(samples, LETTERS) == np.arange(len(LETTERS)).repeat(EACH)
    print("\n== what came out")
    print(f"{'PSNR, validation':<40} {measured['val_psnr']:8.2f} dB")
    print(f"{'codebook use, validation':<40} {measured['val_codebook_use']:8.2%}")
    print(f"{'transformer validation loss':<40} {measured['val_loss']:8.2f} nats a token")
    print(f"{'letters right, by the nearest template':<40} {right.sum():8} of {len(right)}")
    for name, seconds in (times | {"in all": sum(times.values())}).items():
        print(f"{name:<40} {seconds:8.0f} s")
    print(f"\nLook at {max((folder / 'tokenizer' / 'samples').glob('*.png'))} (originals above their reconstructions)")
    print(f"and at {folder / 'samples.png'} (a row a letter).")


if __name__ == "__main__":
    runtime.run_script(main)
