"""Turn pictures into a cache of code indices, once, so that stage II never runs the encoder.

    python encode.py --tokenizer runs/tokenizer --data imagenet/train --size 256 --out codes/train
    torchrun --nproc_per_node=8 encode.py --tokenizer 256_L --data imagenet/train --crops 10 --out codes/train

In --out: codes.bin (a row of int32 indices a crop), labels.bin, manifest.json, and tokenizer.pt, so that train_ar.py
needs nothing else. `data.open_codes` reads it. Stopped anywhere, the same command goes on. Open-MAGVIT2 (arXiv
2409.04410): the transformer is trained on the indices of a frozen tokenizer."""

import hashlib
import math
import sys
import time
from dataclasses import asdict

import numpy as np
import torch
from tqdm import tqdm

import checkpoint
import data
import runtime
from tokenizer import load_tokenizer

SECONDS_BETWEEN_LINES = 30  # where no terminal shows a bar


def parse(argv=None):
    arguments = runtime.parser(
        "Encode a picture folder to a code cache for train_ar.py.",
        "  python encode.py --tokenizer runs/tokenizer --data glyphs --size 32 --out codes/glyphs\n"
        "  torchrun --nproc_per_node=8 encode.py --tokenizer 256_L --data imagenet/train --out codes/train",
    )
    add = arguments.add_argument_group("pictures").add_argument
    add("--data", required=True, help="folder of class folders of pictures; or glyphs[:COUNT[:CLASSES]], built in")
    add("--unlabelled", action="store_true", help="take --data's pictures at any depth, all of one class")
    add("--size", type=runtime.at_least(1), default=256, help="side of the crops, pixels")
    add(
        "--crops",
        type=runtime.at_least(0),
        default=0,
        help="random crops a picture (a square one has but one); 0: the centre crop only",
    )
    add("--seed", type=runtime.at_least(0), default=0, help="of the random crops; glyphs: another seed, other pictures")
    add("--workers", type=runtime.at_least(0), default=2, help="loader processes per device")
    add = arguments.add_argument_group("encoding").add_argument
    add("--tokenizer", required=True, help="released name (256_L, 128_L), a tokenizer file, or a run's folder")
    add("--raw", action="store_true", help="the training weights instead of their moving average (EMA)")
    add("--batch", type=runtime.at_least(1), default=64, help="crops a device at once")
    # A code is the sign of a latent, and rounding turns some: another token, not a slightly different one.
    add("--precision", default="fp32", help="fp32; or bf16, fp16: faster, and some codes differ")
    add = arguments.add_argument_group("output").add_argument
    add("--out", required=True, help="the cache's folder")
    return arguments.parse_args(argv)


def open_writer(rt, args, tokenizer, pictures):
    """This rank's CodeWriter; the main process has made or checked the cache, with the tokenizer in it."""
    names = "\n".join(pictures.name(index) for index in range(len(pictures)))
    settings = {
        "tokenizer_hash": checkpoint.hash_of(tokenizer.state_dict()),
        "bits": tokenizer.config.bits,
        "grid": [args.size // tokenizer.factor] * 2,
        "size": args.size,
        "crops": args.crops,
        "seed": args.seed,
        "precision": args.precision,
        "classes": pictures.classes,
        "count": len(pictures),
        "picture_names_hash": hashlib.sha256(names.encode(errors="surrogateescape")).hexdigest(),
        "source": str(args.data),
    }
    if rt.main:
        writer = data.CodeWriter(args.out, settings)
        if not writer.complete:
            content = {"kind": "tokenizer", "config": asdict(tokenizer.config), "tokenizer": tokenizer.state_dict()}
            checkpoint.write_atomically(writer.folder / "tokenizer.pt", content)
    rt.barrier()
    return writer if rt.main else data.CodeWriter(args.out, settings)


def main():
    args = parse()
    rt = runtime.start()
    args.precision = runtime.set_precision(rt, args.precision)
    glyphs = args.data.split(":")[0] == "glyphs"
    if glyphs and args.crops:
        raise runtime.UserError("glyphs are drawn to size, there is nothing to crop: leave --crops out")

    # Pictures, tokenizer, cache: whatever is wrong shows before any work is done.
    # train: random crops of a folder; of glyphs, the pictures that the tokenizer was trained on.
    pictures = data.open_pictures(
        args.data, args.size, train=bool(args.crops) or glyphs, seed=args.seed, labelled=not args.unlabelled
    )
    tokenizer = load_tokenizer(args.tokenizer, ema=not args.raw)
    if args.size % tokenizer.factor:
        raise runtime.UserError(
            f"--size {args.size} is not a multiple of {tokenizer.factor}, the tokenizer's pixels a token"
        )
    writer = open_writer(rt, args, tokenizer, pictures)
    if writer.complete:
        rt.say(f"{args.out} is already complete: {len(pictures)} pictures")
        return
    tokenizer.to(rt.device, memory_format=rt.layout)
    crops = max(1, args.crops)
    at_once = max(1, args.batch // crops)  # pictures: each with all its crops, so that rows are written whole
    todo = writer.todo()
    rt.say(f"device {rt.device.type} x {rt.world}, {args.precision}, {len(todo)} of {len(pictures)} pictures to do")
    rt.barrier()  # all ranks share out the same list: none writes before all have read it

    stop, bad = runtime.StopSignal(rt), data.BadPictures(pictures)
    batches = data.evaluation_batches(pictures, at_once, rt.rank, rt.world, args.workers, todo, crops)
    bar = tqdm(total=len(todo), disable=not (rt.main and sys.stderr.isatty()), unit="pictures")
    began = spoke = time.perf_counter()
    done = done_by_all = seconds = speed = 0
    # Every rank makes as many rounds as the one with the largest share, since they meet at the end of each.
    for _ in range(math.ceil(math.ceil(len(todo) / rt.world) / at_once)):
        images, labels, indices, unreadable = next(batches, (None, (), (), ()))
        if len(labels):
            codes = encode(rt, tokenizer, images, args.batch, args.precision)
            codes = codes.view(-1, crops, codes.shape[1])  # (b, h*w) -> (pictures, crops, h*w)
            writer.write(indices[::crops], codes, labels[::crops])
        if unreadable:
            writer.write_unreadable(unreadable)
            bad.add(unreadable)
        done += len(labels) // crops + len(unreadable)
        asked, done_by_all, bad_of_all = rt.reduce([stop.asked, done, bad.count])
        bad.check(bad_of_all)
        bar.update(int(done_by_all) - bar.n)
        seconds = time.perf_counter() - began
        speed = done_by_all * crops / seconds
        if began + seconds > spoke + SECONDS_BETWEEN_LINES and bar.disable:
            spoke = began + seconds
            rt.say(f"{done_by_all:.0f}/{len(todo)} pictures, {speed:.1f} images/s")
        if asked:
            break
    bar.close()

    # Every row is on file once all ranks are here (the last reduce above).
    if rt.main and done_by_all < len(todo):
        rt.say(f"stopped after {done_by_all:.0f} of {len(todo)} pictures; the same command goes on from here")
    elif rt.main:
        writer.finish()
        unreadable = int((writer.labels() == data.UNREADABLE).sum())
        images = done_by_all * crops
        rt.say(f"{done_by_all:.0f} pictures, {images:.0f} images, {seconds:.1f} s, {speed:.1f} images/s")
        rt.say(f"codes used {share_used(args.out):.2%} of 2^{tokenizer.config.bits}")
        rt.say(f"unreadable pictures: {unreadable or 'none'}")
        rt.say(f"complete: {args.out}")


def encode(rt, tokenizer, images, batch, precision):
    """uint8 (b, 3, S, S) -> indices (b, h*w) on the CPU, `batch` images at a time."""
    codes = []
    for part in images.split(batch):
        with torch.inference_mode(), runtime.autocast(rt.device, precision):
            part = data.to_float(part.to(rt.device, non_blocking=True))
            codes.append(tokenizer.encode(part).flatten(1).cpu())
    return torch.cat(codes)


def share_used(folder):
    """The share of all codes that the cache holds at least once."""
    codes = data.open_codes(folder)
    used = np.zeros(2 ** codes.manifest["bits"], bool)
    for rows in np.array_split(codes.rows, math.ceil(len(codes) / 1000)):
        used[codes.codes[rows]] = True
    return used.mean()


if __name__ == "__main__":
    runtime.run_script(main)
