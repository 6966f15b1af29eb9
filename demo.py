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

import runtime

TRAIN, VAL = "--data glyphs:10000:ACEHT", "glyphs:400:ACEHT"
STREET = {
    "train the tokenizer": f"train_tokenizer.py {TRAIN} --val-data {VAL} --out DEMO/tokenizer",
    "encode": f"encode.py --tokenizer DEMO/tokenizer --size 32 {TRAIN} --seed 1 --out DEMO/codes/train",
    "encode, validation": f"encode.py --tokenizer DEMO/tokenizer --size 32 --data {VAL} --seed 2 --out DEMO/codes/val",
    "train the transformer": "train_ar.py --codes DEMO/codes/train --val-codes DEMO/codes/val --out DEMO/ar",
    "sample": "sample.py --model DEMO/ar --per-class 8 --cfg 2.5 2.5 --out DEMO/samples.png",
}


def main():
    arguments = runtime.parser(__doc__)
    arguments.add_argument("folder", nargs="?", type=Path, default="runs/demo", help="for all that it makes")
    folder = arguments.parse_args().folder
    # Threads that wait without spinning: as fast on an idle machine, ten times faster beside any other load.
    environment, times = {"OMP_WAIT_POLICY": "PASSIVE", **os.environ}, {}
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
    print("\n== what came out")
    print(f"{'PSNR, validation':<40} {measured['val_psnr']:8.2f} dB")
    print(f"{'codebook use, validation':<40} {measured['val_codebook_use']:8.2%}")
    print(f"{'transformer validation loss':<40} {measured['val_loss']:8.2f} nats a token")
    for name, seconds in (times | {"in all": sum(times.values())}).items():
        print(f"{name:<40} {seconds:8.0f} s")
    print(f"\nLook at {max((folder / 'tokenizer' / 'samples').glob('*.png'))} (originals above their reconstructions)")
    print(f"and at {folder / 'samples.png'} (a row a letter: A C E H T).")


if __name__ == "__main__":
    runtime.run_script(main)
