"""Three of the paper's choices at small scale, three seeds of each: the table in results.md.

    python docs/ablations.py --data pictures/train --val-data pictures/val      # class folders of pictures; one GPU

1. Codes: the same tokenizer with 2^18 and with 2^10 (and with the 2^12 that 2. needs).
2. Sub-tokens: 18 bits as 6 + 12 and as 9 + 9; 12 bits as 6 + 6 and as one vocabulary of 2^12.
3. Intra-token blocks: with them, and with a spatial block more in their place, both sub-tokens predicted from it.

Tokenizers are measured by the PSNR of validation pictures. Transformers, which soon learn few pictures by heart, by the
lowest validation loss on the way, nats a token: to be compared where the codes are the same."""

import json
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import runtime
from ar_model import ARConfig, ARTransformer, cross_entropies
from data import open_codes, open_pictures
from lfq import split_indices

# Like preset tiny: L1 and entropy only, no LPIPS, no discriminator.
TOKENIZER = "--size 64 --channels 64 --multipliers 1 1 1 --lr 8e-4 --global-batch 64 --micro-batch 64 --ema 0.995"
TRANSFORMERS = {  # name -> (bits of the tokenizer, split, intra-token blocks)
    "18 bits, 6 + 12": (18, (6, 12), 1),
    "18 bits, 9 + 9": (18, (9, 9), 1),
    "18 bits, 6 + 12, without intra-token blocks": (18, (6, 12), 0),
    "12 bits, 6 + 6": (12, (6, 6), 1),
    "12 bits, one vocabulary": (12, (12, 1), 1),  # the 13th bit is always 0: a second sub-token, soon learnt
}


class Independent(ARTransformer):
    """Without the one intra-token block that its config must have: post does not know its pre."""

    def __init__(self, config):
        super().__init__(config)
        del self.factorized_blocks

    def predict(self, x, embedded_pre):
        return [head(self.norm(x)) for head in self.head]


def main():
    arguments = runtime.parser(__doc__)
    arguments.add_argument("--data", required=True, help="class folders of pictures to train on")
    arguments.add_argument("--val-data", required=True, help="class folders of others")
    arguments.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    arguments.add_argument("--tokenizer-steps", type=runtime.at_least(1), default=3000, help="of 64 pictures")
    arguments.add_argument("--steps", type=runtime.at_least(1), default=800, help="of the transformers, likewise")
    arguments.add_argument("--out", type=Path, default=Path("runs/ablations"), help="folder of all runs")
    args = arguments.parse_args()
    if runtime.start().world > 1:
        raise runtime.UserError("this starts its own processes: run it without torchrun")
    pictures, others = (open_pictures(source, 64, train=False) for source in (args.data, args.val_data))
    if pictures.classes != others.classes:
        raise runtime.UserError(f"{args.data} and {args.val_data} have other classes")
    parts = [(seed, bits) for seed in args.seeds for bits in (18, 12, 10)]
    figures = {f"2^{bits} codes": [] for bits in (18, 12, 10)} | {name: [] for name in TRANSFORMERS}
    with ProcessPoolExecutor(len(parts), get_context("spawn")) as pool:  # side by side: each is small
        for found in pool.map(partial(train, args), *zip(*parts, strict=True)):
            for name, values in found.items():
                figures[name].append(values)  # on the way, of a seed
    (args.out / "figures.json").write_text(json.dumps(figures) + "\n")
    print(f"| | mean | seeds {', '.join(map(str, args.seeds))} |\n|---|---|---|")
    for name, values in figures.items():
        best, unit, digits = (max, "dB", 2) if name.endswith("codes") else (min, "nats a token", 3)
        each = [best(some) for some in values]
        mean, each = f"{sum(each) / len(each):.{digits}f}", ", ".join(f"{value:.{digits}f}" for value in each)
        print(f"| {name} | {mean} {unit} | {each} |")


def train(args, seed, bits):
    """Train a tokenizer and what its codes are for. Returns {name: PSNR or losses on the way}."""
    folder = args.out / f"seed_{seed}_{bits}_bits"
    found = {f"2^{bits} codes": tokenizer(args, seed, bits, folder)}
    for name, (of_bits, *choices) in TRANSFORMERS.items():
        if of_bits == bits:
            found[name] = transformer(args, seed, folder, *choices)
    return found


def run(script, *flags):
    """Run one of the project's scripts; its output is its log's."""
    words = [sys.executable, ROOT / script, *flags]
    if subprocess.call([str(word) for word in words], stdout=subprocess.DEVNULL):
        raise runtime.UserError(f"{script} ended early, for the reason above")


def tokenizer(args, seed, bits, folder):
    """Train a tokenizer and encode both sets with it. Returns PSNR of the validation pictures every 1,000 steps, dB."""
    more = ["--data", args.data, "--val-data", args.val_data, "--bits", bits, "--steps", args.tokenizer_steps]
    run("train_tokenizer.py", *TOKENIZER.split(), *more, "--seed", seed, "--out", folder / "run")
    for name, source in (("train", args.data), ("val", args.val_data)):
        run("encode.py", "--tokenizer", folder / "run", "--data", source, "--size", 64, "--out", folder / name)
    lines = [json.loads(line) for line in (folder / "run" / "log.jsonl").read_text().splitlines()]
    psnr = [line["val_psnr"] for line in lines if "val_psnr" in line]
    print(f"seed {seed}, 2^{bits} codes: {psnr}", flush=True)
    return psnr


def transformer(args, seed, folder, split, intra):
    """Train a transformer on the codes in `folder`. Returns its validation losses on the way, nats a token."""
    rt = runtime.start()
    precision = runtime.set_precision(rt, None)
    caches = [open_codes(folder / name) for name in ("train", "val")]
    (indices, labels), (val_indices, val_labels) = (
        [part.to(rt.device) for part in cache.batch([(0, i) for i in range(len(cache))], 0)] for cache in caches
    )
    runtime.seed_everything(seed)
    kind, layers = (ARTransformer, 5) if intra else (Independent, 6)
    grid, classes = caches[0].grid[0], len(caches[0].classes)
    model = kind(ARConfig(192, 6, layers, 1, split, grid, classes, dropout=0.1)).to(rt.device)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, betas=(0.9, 0.95), weight_decay=0.05)

    def loss_of(indices, labels):
        parts = split_indices(indices, split)
        with runtime.autocast(rt.device, precision):
            return sum(cross_entropies(model(parts, labels), parts))

    found = []
    for step in range(1, args.steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * min(1, step / 100)
        chosen = torch.randint(len(indices), (64,), device=rt.device)
        loss_of(indices[chosen], labels[chosen]).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 100 == 0 or step == args.steps:
            model.eval()
            with torch.no_grad():
                found.append(loss_of(val_indices, val_labels).item())
            model.train()
    print(f"seed {seed}, split {split}, {intra} intra-token blocks: {found}", flush=True)
    return found


if __name__ == "__main__":
    runtime.run_script(main)
