"""The whole street on built-in pictures, on a CPU in minutes: what `make demo` and `make demo-video` run.

    python demo.py                     # all that it makes is in runs/demo; or name another folder
    python demo.py --video             # in runs/demo_video

Trains a tiny tokenizer on glyphs, encodes them, trains a tiny transformer, draws samples; then prints a table of what
came out, and what to look at. Every step is a command that you can run, and change, yourself. With --video the glyphs
move, and the tokenizer begins with the weights of one that has learnt pictures."""

import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from PIL import Image, ImageSequence

import runtime
from clips import follow_letters, open_clips
from glyphs import nearest_letters

LETTERS, EACH = "CAT", 20  # samples a letter
SIZE, VIDEO_SIZE, FRAMES = 24, 20, 9  # pixels a side
TRAIN, VAL = f"glyphs:6000:{LETTERS}", f"glyphs:400:{LETTERS}"
# GroupNorm has 32 groups: with no more channels than that, each would lose its mean, and with it the colours.
TOKENIZER = f"--size {SIZE} --channels 64 --multipliers 1 1 1 --bits 13 --lr 8e-4 --lr-drops 1.25 --steps 550"
TRANSFORMER = "--width 96 --heads 3 --dropout 0 --global-batch 32 --micro-batch 32 --lr 3e-3 --warmup-epochs 0.3"
ENCODE = f"encode.py --tokenizer DEMO/tokenizer --size {SIZE}"
CODES = "--codes DEMO/codes/train --val-codes DEMO/codes/val --out DEMO/ar"
SAMPLE = f"sample.py --model DEMO/ar --per-class {EACH} --cfg 3 3 --out DEMO/samples"
STREET = {
    "train the tokenizer": f"train_tokenizer.py --data {TRAIN} --val-data {VAL} {TOKENIZER} --out DEMO/tokenizer",
    "encode": f"{ENCODE} --data {TRAIN} --seed 1 --out DEMO/codes/train",
    "encode, validation": f"{ENCODE} --data {VAL} --seed 2 --out DEMO/codes/val",
    "train the transformer": f"train_ar.py {TRANSFORMER} --steps 900 {CODES}",
    "sample": f"{SAMPLE}.png --top-p 0.8 0.8",
}
# Widths of 64 again, but of levels that halve time, too: 9 frames of 20 x 20 pixels are 3 x 5 x 5 tokens.
TOKENIZER = f"--size {VIDEO_SIZE} --channels 32 --multipliers 2 2 2 --bits 8 --lr 8e-4 --lr-drops 0.9 --steps 400"
CLIPS = f"--data moving-glyphs:3000:{LETTERS} --size {VIDEO_SIZE} --frames {FRAMES}"
ENCODE = "encode.py --tokenizer DEMO/tokenizer --batch 16"
VIDEO_STREET = {
    "train on pictures": f"train_tokenizer.py --data {TRAIN} --val-data {VAL} {TOKENIZER} --out DEMO/pictures",
    "train the tokenizer": f"train_tokenizer.py --preset video_tiny --init DEMO/pictures {CLIPS} --steps 120 "
    "--out DEMO/tokenizer",
    "encode": f"{ENCODE} {CLIPS} --seed 1 --out DEMO/codes/train",
    "encode, validation": f"{ENCODE} {CLIPS.replace('3000', '200')} --seed 2 --out DEMO/codes/val",
    "train the transformer": f"train_ar.py --preset video_tiny --pre-bits 4 {CODES}",
    "sample": f"{SAMPLE}.webp --top-p 0.7 0.7 --batch 60",
}


def main():
    arguments = runtime.parser(__doc__)
    arguments.add_argument("folder", nargs="?", type=Path, help="for all that it makes")
    arguments.add_argument("--video", action="store_true", help="letters that move")
    args = arguments.parse_args()
    folder = args.folder or Path("runs/demo_video" if args.video else "runs/demo")
    # Runs of minutes on a CPU: its threads wait for each other briefly, then sleep (beside any other load, spinning would
    # take many times longer). Runs of seconds on a GPU: compiling for it would take longer than they do.
    environment, times = {"GOMP_SPINCOUNT": "5000", "FAST": "0", **os.environ}, {}
    for name, words in (VIDEO_STREET if args.video else STREET).items():
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
    made, size = folder / f"samples.{'webp' if args.video else 'png'}", VIDEO_SIZE if args.video else SIZE
    samples = read_samples(made, size)
    if args.video:
        letters, places = follow_letters(samples, LETTERS)
        clips = open_clips(f"moving-glyphs:{len(samples)}:{LETTERS}", size, FRAMES, train=True)
        _, true_places = follow_letters(np.stack([clips[0, i][0].movedim(0, -1) for i in range(len(clips))]), LETTERS)
    else:
        letters = nearest_letters(samples[:, 0], LETTERS)
    right = letters == np.arange(len(LETTERS)).repeat(EACH)
    print("\n== what came out")
    print(f"{'PSNR, validation':<40} {measured['val_psnr']:8.2f} dB")
    print(f"{'codebook use, validation':<40} {measured['val_codebook_use']:8.2%}")
    print(f"{'transformer validation loss':<40} {measured['val_loss']:8.2f} nats a token")
    print(f"{'letters right, by the nearest template':<40} {right.sum():8} of {len(right)}")
    if args.video:
        steps = (np.linalg.norm(np.diff(of, axis=1), axis=-1).mean() for of in (places, true_places))
        words = "{:8.2f} pixels a frame; in training {:.2f}".format(*steps)
        print(f"{'speed of the letters':<40} {words}")
    for name, seconds in (times | {"in all": sum(times.values())}).items():
        print(f"{name:<40} {seconds:8.0f} s")
    print(f"\nLook at {max((folder / 'tokenizer' / 'samples').glob('*.png'))} (originals above their reconstructions)")
    print(f"and at {made} (a row a letter).")


def read_samples(path, size):
    """uint8 (N, T, S, S, 3) of a grid that sample.py wrote: a letter a row, two pixels between samples."""
    with Image.open(path) as sheet:
        frames = [np.pad(frame.convert("RGB"), [(0, 2), (0, 2), (0, 0)]) for frame in ImageSequence.Iterator(sheet)]
    cells = np.stack(frames).reshape(-1, len(LETTERS), size + 2, EACH, size + 2, 3)[:, :, :size, :, :size]
    return cells.transpose(1, 3, 0, 2, 4, 5).reshape(len(LETTERS) * EACH, -1, size, size, 3)


if __name__ == "__main__":
    runtime.run_script(main)
