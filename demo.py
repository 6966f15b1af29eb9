"""The whole street on built-in pictures, on a CPU in minutes: what `make demo` runs.

    python demo.py [FOLDER]        default folder: runs/demo

Trains a tiny tokenizer on glyphs, encodes them, trains a tiny transformer, draws samples; then prints a table of what
came out, and the two pictures to look at. Every step is a command that you can run, and change, yourself.
"""

import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

import runtime

HERE = Path(__file__).parent
GLYPHS = "glyphs:{}:ACEHT"


def main():
    arguments = runtime.parser(
        "The whole street on built-in pictures, in minutes on a CPU.", "  python demo.py\n  python demo.py runs/mine"
    )
    arguments.add_argument("folder", nargs="?", type=Path, default="runs/demo", help="for all that it makes")
    folder = arguments.parse_args().folder
    train, val = GLYPHS.format(10000), GLYPHS.format(400)
    at = shlex.quote(str(folder))
    encode = f"encode.py --tokenizer {at}/tokenizer --size 32"
    street = {
        "train the tokenizer": f"train_tokenizer.py --data {train} --val-data {val} --out {at}/tokenizer",
        "encode": f"{encode} --data {train} --seed 1 --out {at}/codes/train",
        "encode, validation": f"{encode} --data {val} --seed 2 --out {at}/codes/val",
        "train the transformer": f"train_ar.py --codes {at}/codes/train --val-codes {at}/codes/val --out {at}/ar",
        "sample": f"sample.py --model {at}/ar --per-class 8 --cfg 2.5 2.5 --out {at}/samples.png",
    }
    # Threads that wait without spinning: as fast on an idle machine, ten times faster beside any other load.
    environment = {"OMP_WAIT_POLICY": "PASSIVE", **os.environ}
    times = {}
    for name, words in street.items():
        print(f"\n== {name}: python {words}", flush=True)
        began = time.perf_counter()
        script, *flags = shlex.split(words)
        code = subprocess.call([sys.executable, str(HERE / script), *flags], env=environment)
        if code:
            sys.exit(code)
        times[name] = time.perf_counter() - began

    measured = {}
    for run in ("tokenizer", "ar"):
        for line in (folder / run / "log.jsonl").read_text().splitlines():
            measured |= json.loads(line)
    shown = max((folder / "tokenizer" / "samples").glob("*.png"))
    print("\n== what came out")
    print(f"{'PSNR, validation':<40} {measured['val_psnr']:8.2f} dB")
    print(f"{'codebook use, validation':<40} {measured['val_codebook_use']:8.2%}")
    print(f"{'transformer validation loss':<40} {measured['val_loss']:8.2f} nats a token")
    for name, seconds in times.items():
        print(f"{name:<40} {seconds:8.0f} s")
    print(f"{'in all':<40} {sum(times.values()):8.0f} s")
    print(f"\nLook at {shown} (originals above their reconstructions)")
    print(f"and at {folder / 'samples.png'} (a row a letter: A C E H T).")


if __name__ == "__main__":
    runtime.run_script(main)
