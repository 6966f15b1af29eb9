"""Turn pictures or videos into a cache of code indices, once, so that stage II never runs the encoder.

    python encode.py --tokenizer runs/tokenizer --data imagenet/train --size 256 --out codes/train
    torchrun --nproc_per_node=8 encode.py --tokenizer 256_L --data imagenet/train --crops 10 --out codes/train
    python encode.py --tokenizer video_128 --data ucf101/train --size 128 --crops 10 --out codes/ucf101

Open-MAGVIT2 (arXiv 2409.04410) trains its transformer on the indices of a frozen tokenizer. In --out: codes.bin,
labels.bin, manifest.json, and tokenizer.pt, all that train_ar.py needs. Stopped anywhere, the same command goes on."""

import hashlib
import math
import os
import shutil
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import checkpoint
import data
import runtime
from clips import open_clips
from runtime import UserError, at_least
from tokenizer import load_tokenizer
from video_tokenizer import VideoTokenizer


def parse(argv=None):
    arguments = runtime.parser(__doc__)
    add = arguments.add_argument_group("pictures").add_argument
    add("--data", required=True, help="class folders of pictures, videos; or [moving-]glyphs[:COUNT[:CLASSES]]")
    add("--unlabelled", action="store_true", help="take --data's pictures at any depth, all of one class")
    add("--size", type=at_least(1), default=256, help="side of the crops, pixels")
    add("--crops", type=at_least(0), default=0, help="random crops a picture, clips a video; 0: centre, middle only")
    add("--frames", type=at_least(1), help="of a clip, for a video tokenizer (default: 17)")
    add("--seed", type=at_least(0), default=0, help="of the random crops; glyphs: another seed, other pictures")
    add("--workers", type=at_least(0), default=2, help="loader processes per device")
    add = arguments.add_argument_group("encoding").add_argument
    add("--tokenizer", required=True, help="released name (256_L; or B, for the one that B has), file, or run folder")
    add("--raw", action="store_true", help="the training weights instead of their moving average (EMA)")
    add("--batch", type=at_least(1), help="crops a device at once (default: 64; of clips 4)")
    # Codes are signs of latents. Where rounding turns one, the token is another, not a slightly different one.
    add("--precision", default="fp32", help="fp32; or bf16, fp16: faster, and some codes differ")
    add = arguments.add_argument_group("output").add_argument
    add("--out", required=True, help="the cache's folder")
    return arguments.parse_args(argv)


class CodeWriter:
    """Creates a code cache (its files: see data.py), or opens an unfinished one to go on with it. Rank 0 comes first;
    then every rank writes its own rows. settings: the manifest's entries, which decide the codes. A cache made with
    others (`source` apart: a folder may move) is refused with a UserError naming them."""

    def __init__(self, folder, settings):
        self.folder = Path(folder)
        if not (self.folder / "manifest.json").exists():
            self._create({"format": data.FORMAT, "version": data.VERSION, **settings, "complete": False})
        old = self.manifest = data.read_manifest(folder)
        changed = [name for name in settings if name != "source" and old.get(name) != settings[name]]
        if changed:
            words = "; ".join(f"{name} {str(old.get(name))[:40]}, not {str(settings[name])[:40]}" for name in changed)
            raise UserError(f"{folder} holds codes made with {words}: give another --out, or remove it")

    def _create(self, manifest):
        self.folder.mkdir(parents=True, exist_ok=True)
        length, free = 4 * math.prod(data.codes_shape(manifest)), shutil.disk_usage(self.folder).free / 2**30
        if length / 2**30 > free:
            raise UserError(f"the codes need {length / 2**30:.1f} GiB, and {self.folder} has {free:.1f} GiB free")
        labels = self.folder / "labels.bin"
        if labels.is_file() and not labels.is_symlink() and (self.labels() != data.PENDING).any():
            raise UserError(f"{self.folder} holds codes, but no manifest.json: restore it, or give another --out")
        with runtime.replacing(self.folder / "codes.bin") as file:
            file.truncate(length)
        with runtime.replacing(labels) as file:
            np.full(manifest["count"], data.PENDING, np.int32).tofile(file)
        runtime.write_json(self.folder / "manifest.json", manifest)  # last: with it, the other two are whole

    def labels(self):
        """int32 (count,), as they stand on file."""
        return np.fromfile(self.folder / "labels.bin", np.int32)

    def write(self, indices, codes, labels):
        """Set whole rows: indices (b,), codes (b, max(1, crops), h*w), labels (b,), on the CPU. Labels are written once
        their codes are on the disk: no kill or power cut leaves a row that looks done and is not."""
        self._put("codes.bin", indices, codes)
        self._put("labels.bin", indices, labels)

    def write_unreadable(self, indices):
        self._put("labels.bin", indices, [data.UNREADABLE] * len(indices))

    def _put(self, name, indices, rows):
        # Not through a memory map: a full disk would end the process without a word.
        with open(self.folder / name, "r+b", opener=lambda path, flags: os.open(path, flags | os.O_NOFOLLOW)) as file:
            for index, row in zip(indices, np.asarray(rows, np.int32), strict=True):
                file.seek(int(index) * row.nbytes)
                file.write(row.tobytes())
            file.flush()
            os.fsync(file.fileno())

    def finish(self):
        """Mark the cache complete. On one rank, after all have written theirs."""
        if (self.labels() == data.PENDING).any():
            raise UserError(f"{self.folder} is not finished; run encode.py again to go on")
        self.manifest["complete"] = True
        runtime.write_json(self.folder / "manifest.json", self.manifest)


def open_writer(rt, args, tokenizer, pictures):
    """This rank's CodeWriter; the main process has made or checked the cache, with the tokenizer in it."""
    names = "\n".join(pictures.name(index) for index in range(len(pictures))).encode(errors="surrogateescape")
    settings = {"tokenizer_hash": checkpoint.hash_of(tokenizer.state_dict()), "bits": tokenizer.config.bits}
    settings |= {"grid": [args.size // tokenizer.factor] * 2, "size": args.size, "crops": args.crops}
    settings |= {"seed": args.seed, "precision": args.precision, "classes": pictures.classes, "count": len(pictures)}
    settings |= {"picture_names_hash": hashlib.sha256(names).hexdigest(), "source": str(args.data)}
    if args.frames:
        settings |= {"grid": [tokenizer.latent_frames(args.frames), *settings["grid"]], "frames": args.frames}
    if rt.main and not CodeWriter(args.out, settings).manifest["complete"]:
        content = {"kind": "tokenizer", "config": asdict(tokenizer.config), "tokenizer": tokenizer.state_dict()}
        checkpoint.write_atomically(Path(args.out) / "tokenizer.pt", content)
    rt.barrier()
    return CodeWriter(args.out, settings)


def encode(rt, tokenizer, images, batch, precision):
    """uint8 (b, 3, S, S) -> indices (b, h*w) on the CPU, `batch` images at a time; clips likewise, (b, t*h*w)."""
    codes = []
    for part in images.split(batch):
        with torch.inference_mode(), runtime.autocast(rt.device, precision):
            x = data.to_float(part.to(rt.device, non_blocking=True))
            codes.append(tokenizer.encode(x).flatten(1).cpu())  # (b, h, w) -> (b, h*w)
    return torch.cat(codes)


def main():
    args = parse()
    rt = runtime.start()
    args.precision = runtime.set_precision(rt, args.precision)
    glyphs = args.data.split(":")[0] in ("glyphs", "moving-glyphs")
    if glyphs and args.crops:
        raise UserError("glyphs are drawn to size, there is nothing to crop: leave --crops out")

    # Pictures, tokenizer, cache: whatever is wrong shows before any work is done.
    train = bool(args.crops) or glyphs  # random crops of a folder; the glyphs that the tokenizer was trained on
    tokenizer = load_tokenizer(args.tokenizer, ema=not args.raw)
    if args.size % tokenizer.factor:
        raise UserError(f"--size {args.size} is not a multiple of {tokenizer.factor}, this tokenizer's factor")
    if isinstance(tokenizer, VideoTokenizer):
        args.frames, args.batch, kind, unit = args.frames or 17, args.batch or 4, "videos", "clips"
        if (args.frames - 1) % (factor := tokenizer.time_factor):
            raise UserError(f"--frames {args.frames} is not 1 more than a multiple of {factor}: the last would be lost")
        pictures = open_clips(args.data, args.size, args.frames, train, args.seed, not args.unlabelled)
    elif args.frames:
        raise UserError(f"{args.tokenizer} is a tokenizer of images: leave --frames out")
    else:
        args.batch, kind, unit = args.batch or 64, "pictures", "images"
        pictures = data.open_pictures(args.data, args.size, train, args.seed, not args.unlabelled)
    writer = open_writer(rt, args, tokenizer, pictures)
    if writer.manifest["complete"]:
        rt.say(f"{args.out} is already complete: {len(pictures)} {kind}")
        return
    rt.place(tokenizer)
    todo = np.flatnonzero(writer.labels() < 0)  # unreadable ones are tried again
    rt.say(f"device {rt.device.type} x {rt.world}, {args.precision}, {len(todo)} of {len(pictures)} {kind} to do")
    rt.barrier()  # all ranks share out the same list: none writes before all have read it

    crops = max(1, args.crops)
    at_once = max(1, args.batch // crops)  # pictures: each with all its crops, so that rows are written whole
    batches = data.evaluation_batches(pictures, at_once, rt.rank, rt.world, args.workers, todo, crops)
    rounds = math.ceil(math.ceil(len(todo) / rt.world) / at_once)  # of the rank with the largest share
    stop, bad = runtime.StopSignal(), data.BadPictures(pictures)
    bar = tqdm(total=len(todo), disable=None if rt.main else True, unit=kind)
    began = spoke = time.perf_counter()
    done = done_by_all = 0

    def progress():
        images, took = done_by_all * crops, time.perf_counter() - began
        return f"{done_by_all} of {len(todo)} {kind}, {images} {unit}, {took:.1f} s, {images / took:.1f} {unit}/s"

    for _ in range(rounds):
        batch = next(batches, data.Batch((), (), (), {}))  # empty where this rank's share is used up
        if len(batch.labels):
            codes = encode(rt, tokenizer, batch.images, args.batch, args.precision)
            codes = codes.view(-1, crops, codes.shape[1])  # (b, h*w) -> (pictures, crops, h*w)
            writer.write(batch.indices[::crops], codes, batch.labels[::crops])
        if batch.unreadable:
            writer.write_unreadable(batch.unreadable)
        bad.add(batch.unreadable)
        done += len(batch.labels) // crops + len(batch.unreadable)
        asked, done_by_all, bad_of_all = map(int, rt.reduce([stop.asked, done, bad.count]))
        bad.check(bad_of_all)
        bar.update(done_by_all - bar.n)
        if bar.disable and time.perf_counter() > spoke + 30:  # a line now and then where no terminal shows the bar
            spoke = time.perf_counter()
            rt.say(progress())
        if asked:
            break
    bar.close()

    # Every row is on file once all ranks are here (the last reduce above).
    if done_by_all < len(todo):
        rt.say(f"stopped after {progress()}; the same command goes on from here")
    elif rt.main:
        writer.finish()
        rt.say(progress())
        codes, used = data.open_codes(args.out), np.zeros(2**tokenizer.config.bits, bool)
        for rows in np.array_split(codes.rows, math.ceil(len(codes) / 1000)):
            used[codes.codes[rows]] = True
        rt.say(f"codes used {used.mean():.2%} of 2^{tokenizer.config.bits}")
        rt.say(f"unreadable {kind}: {int((writer.labels() == data.UNREADABLE).sum()) or 'none'}")
        rt.say(f"complete: {args.out}")


if __name__ == "__main__":
    runtime.run_script(main)
