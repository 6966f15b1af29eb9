"""Class labels to pictures or clips: a grid to look at, a folder of them, or an .npz (for pictures ADM's).

    python sample.py --model runs/ar --out samples.png                 # a class a row, 8 pictures each
    python sample.py --model B --classes 207,88,985 --out samples.png
    torchrun --nproc_per_node=8 sample.py --model B --out samples.npz  # 50,000 pictures, the paper's settings
    python sample.py --model B --given photos --out completed.png      # keeps their upper halves, draws the lower ones
    python sample.py --model runs/video --given videos --frames 65 --out clips.webp    # goes on from their first frames

The kind of output follows from --out: `.png` (of clips `.webp`, `.gif`, `.mp4`), `.npz`, or else a folder. With K
classes and M given pictures, picture i shows class i % K, goes on from given picture i // K % M, and is a function of
--seed and i, whatever the number of processes. After a stop, the same command makes what is missing. Settings are saved
too: FOLDER/config.json, OUT.json.
As in Open-MAGVIT2 (arXiv 2409.04410), classifier-free guidance has a scale for each sub-token."""

import json
import math
import os
import re
import shutil
import time
import warnings
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

import runtime
from ar_model import AR_SIZES, RELEASED_AR, load_ar
from checkpoint import changed_settings, hash_of, locate
from clips import open_clips, pyav, write_video
from data import identity, open_pictures, read_batch, save_png, tile, to_float, to_uint8
from page import write_page
from runtime import UserError, at_least
from tokenizer import RELEASED, load_tokenizer
from video_tokenizer import VideoTokenizer

# Pairs (pre, post): the paper's settings of evaluation, by size; `show` trades variety for clear pictures.
_PLAIN = {"cfg_scale": (1.0, 1.0), "temperature": (1.0, 1.0), "top_k": (0, 0), "top_p": (1.0, 1.0)}
PRESETS = {
    "B": {**_PLAIN, "cfg_scale": (1.9, 2.0)},
    "L": {**_PLAIN, "cfg_scale": (1.9, 1.9), "temperature": (1.1, 1.0)},
    "XL": {**_PLAIN, "cfg_scale": (1.75, 1.85), "temperature": (1.1, 1.0)},
    "show": {**_PLAIN, "cfg_scale": (4.0, 4.0), "top_p": (0.96, 0.96)},
    "emoji": {**_PLAIN, "top_p": (0.9, 0.9)},  # knows its pictures by heart: guidance would lead away from them
}
PAPER_SIZES = {AR_SIZES[size].width: size for size in ("L", "XL")}  # a width's preset; of any other width: B
BATCH = 200  # on an accelerator; a picture takes half the time that it takes among 50 there (B)
ANIMATED = (".webp", ".gif", ".mp4")  # grids of clips


def parse(argv=None):
    arguments = runtime.parser(__doc__)
    presets = "paper: the published settings of this size (own sizes: B's); show: cfg 4 4, top-p .96 .96; "
    presets += "default: show for a grid, otherwise paper (emoji: top-p .9 .9); the flags below override it"
    pair = {"nargs": 2, "metavar": ("PRE", "POST")}
    add = arguments.add_argument_group("what").add_argument
    add("--model", required=True, help="transformer: a file, a run folder, emoji (in here), or B, L, XL (downloaded)")
    add("--tokenizer", help="a file, a run folder or a released name; default: the one in the model's file")
    add("--given", help="pictures, or videos, to go on from: a folder or built-in ones; in a grid, a column each")
    add("--given-rows", type=at_least(1), help="upper rows of their tokens to keep; default: half of them")
    add("--given-frames", type=at_least(1), help="first frames of videos to keep; default: half of a clip's tokens")
    add("--frames", type=at_least(1), help="of a clip; past the model's, each window begins with the last one's end")
    add("--out", required=True, help=f"a grid, a class a row: .png, of clips {', '.join(ANIMATED)}; .npz; or a folder")
    add("--classes", help="`all`, or names or numbers (names go first), with commas; default: all, or 10 in a grid")
    add("--html", nargs="?", const="", metavar="PAGE", help="show them on a page too; default: OUT.html")
    add = arguments.add_argument_group("how many").add_mutually_exclusive_group().add_argument
    add("--per-class", type=at_least(1), help="pictures a class; default: those of --given, or 8 in a grid, else 50")
    add("--count", type=at_least(1), help="pictures in all")
    add = arguments.add_argument_group("sampling (pairs: for the pre and the post sub-token)").add_argument
    add("--preset", choices=["paper", "show"], help=presets)
    scale = at_least(-1000, float, 1000)  # beyond, logits overflow
    add("--cfg", "--cfg-scale", dest="cfg_scale", type=scale, **pair, help="scale of classifier-free guidance; 1: none")
    add("--temperature", type=at_least(1e-3, float, 1000), **pair, help="divides the logits")
    add("--top-k", type=at_least(0), **pair, help="draw from the k likeliest only; 0 is off")
    add("--top-p", type=at_least(1e-30, float, 1), **pair, help="draw from the likeliest that sum up to p; 1 is off")
    add("--seed", type=at_least(0), default=0, help="another number gives other pictures")
    add = arguments.add_argument_group("how").add_argument
    add("--batch", type=at_least(1), help=f"pictures at a time on a device; default: {BATCH}, on a CPU 50, of clips 16")
    add("--precision", help="bf16, fp16 or fp32; default: bf16 on an accelerator, fp32 on a CPU")
    add("--rounding", action="store_true", help="round to grey levels; published numbers truncate")
    return arguments.parse_args(argv)


def main():
    args = parse()
    out, kind = output(args.out)
    rt = runtime.start()
    precision = runtime.set_precision(rt, args.precision)
    model, tokenizer, files = load_models(rt, args)
    names = model.class_names or list(map(str, range(model.config.num_classes)))

    # What the flags leave open follows from the kind of output.
    grid, shape, video = kind == "grid", model.config.shape, isinstance(tokenizer, VideoTokenizer)
    if grid and video != (out.suffix.lower() in ANIMATED):
        ways = f"clips, for --out {', '.join(ANIMATED)}, .npz or a folder" if video else "pictures, for --out .png"
        raise UserError(f"{files['model']} draws {ways}")
    if video and args.html is not None:
        raise UserError("--html is of pictures, and this model draws clips")
    if grid and out.suffix.lower() == ".mp4":
        pyav()
    ours = os.path.realpath(files["model"]) == os.path.realpath(RELEASED_AR["emoji"])
    preset = args.preset or ("emoji" if ours else "show" if grid else "paper")
    defaults = PRESETS[PAPER_SIZES.get(model.config.width, "B") if preset == "paper" else preset]
    options = {name: getattr(args, name) or pair for name, pair in defaults.items()}
    classes = choose_classes(args.classes, model.class_names, len(names), spread=grid)
    size, frames = [shape[-1] * tokenizer.factor] * 2, args.frames
    if video:
        window = 1 + (shape[0] - 1) * tokenizer.time_factor
        frames = frames or window
        size = [frames, *size]
        if frames > window == 1:
            raise UserError(f"--frames {frames}: this model draws single frames, and goes on from none")
    elif frames:
        raise UserError("--frames is of clips, and this model draws pictures")
    if not args.given and (args.given_rows or args.given_frames):
        raise UserError("--given-rows and --given-frames go with --given")
    photos, kept = open_given(args, tokenizer, shape) if args.given else ([], 0)
    count = args.count or (args.per_class or len(photos) or (8 if grid else 50)) * len(classes)
    batch_size = args.batch or (16 if video else 50 if rt.device.type == "cpu" else BATCH)
    chosen = f"all {len(names)}" if classes == list(range(len(names))) else ",".join(map(str, classes))
    settings = {**files, "classes": chosen, "count": count, "size": "x".join(map(str, size))}
    settings |= {name: list(pair) for name, pair in options.items()}
    settings |= {"seed": args.seed, "batch": batch_size, "precision": precision, "rounding": args.rounding}
    settings |= {"given": args.given, "given_hash": args.given and identity(photos)}
    settings |= {"given_frames": photos.shape[0] if photos else 0} if video else {"given_rows": kept}
    work = out if kind == "folder" else Path(f"{out}.parts")  # each batch goes there as soon as it is made
    if rt.main:
        refuse_others(work, settings)
    needed, kept = min(len(photos), (count - 1) // len(classes) + 1), kept * math.prod(shape[1:])  # photos, tokens
    given = encode_given(rt, tokenizer, photos, needed, kept) if args.given else torch.zeros(1, 0, dtype=torch.int64)
    runtime.open_run(rt, work, settings)

    # Batches, shared out over ranks. They are the same whatever the number of ranks, so that rounding is too.
    batches = [range(first, min(first + batch_size, count)) for first in range(0, count, batch_size)]
    labels = [classes[i % len(classes)] for i in range(count)]
    plain = [re.sub(r"[^\w.-]", "_", name)[:50] for name in names]  # as a file's name can hold them

    def files_of(batch):
        if kind != "folder":
            return [work / f"{batch[0]:06d}-{batch[-1]:06d}.npy"]
        return [work / f"{i:06d}_{plain[labels[i]]}.{'webp' if video else 'png'}" for i in batch]

    todo = [batch for batch in batches[rt.rank :: rt.world] if not all(file.exists() for file in files_of(batch))]
    rt.barrier()
    started = time.perf_counter()
    # While the device makes a batch, a thread writes the one before; nothing here waits for the device but that thread.
    with ThreadPoolExecutor(1) as writer:
        writing = writer.submit(lambda: None)  # nothing yet
        for batch in tqdm(todo, unit="batch", disable=None if rt.main else True, dynamic_ncols=True):
            seeds = [runtime.seed_of(args.seed, i) for i in batch]
            first_tokens = given[[i // len(classes) % len(given) for i in batch]]
            inputs = torch.tensor([labels[i] for i in batch]), seeds, first_tokens
            pictures = draw(rt, model, tokenizer, options, precision, args.rounding, frames, *inputs)
            pictures = pictures.movedim(1, -1).to("cpu", non_blocking=True)  # (B, [T,] H, W, 3)
            copied = torch.get_device_module(rt.device).Event()  # torch.Event: not with every torch_npu
            copied.record()
            writing.result()
            writing = writer.submit(store, files_of(batch), pictures, copied)
        writing.result()
    (made,) = rt.reduce([sum(map(len, todo))])
    seconds = time.perf_counter() - started

    parts = [file for batch in batches for file in files_of(batch)]
    if rt.main and (args.html is not None or kind != "folder") and not all(part.exists() for part in parts):
        raise UserError(f"{work} lacks batches of other hosts; put --out where all hosts share a file system")
    if rt.main and args.html is not None:
        captions = (f"{i}: {names[label]}, --seed {args.seed}" for i, label in enumerate(labels))
        opened = ([Image.open(part)] if kind == "folder" else map(Image.fromarray, np.load(part)) for part in parts)
        entries = zip(captions, ([picture] for pictures in opened for picture in pictures))
        write_page(args.html or f"{out}.html", f"Samples of {args.model}", entries, count)
    if rt.main and kind != "folder":  # one file out of the batches
        if grid:
            write_grid(out, parts, count, rows=len(classes))
            rt.say("rows: " + ", ".join(names[label] for label in classes))
        else:
            write_npz(out, parts, (count, *size, 3))
        runtime.write_json(f"{out}.json", settings)
        shutil.rmtree(work)
    kinds, unit = ("clips", "clips") if video else ("pictures", "images")
    again = f" ({count - made:.0f} were there already)" if made < count else ""
    rt.say(f"made {made:.0f} {kinds} in {seconds:.1f} s ({made / seconds:.2f} {unit}/s){again}: {out}")
    rt.barrier()


@torch.no_grad()
def draw(rt, model, tokenizer, options, precision, rounding, frames, labels, seeds, given):
    """uint8 pictures (B, 3, H, W), or clips (B, 3, frames, H, W), of labels (B,); given: first tokens (B, n)."""
    with runtime.autocast(rt.device, precision):
        indices = model.generate(labels, **options, seeds=seeds, given=given)  # (B, N)
        pictures = to_uint8(tokenizer.decode(indices.unflatten(1, model.config.shape)), rounding)
    if not frames or pictures.shape[2] >= frames:
        return pictures[:, :, :frames]  # None: all there are
    # The next window begins with the last frame as it is shown: encoded alone, it is one latent frame.
    given = torch.cat([tokenizer.encode(to_float(clip[None, :, -1:])).flatten(1) for clip in pictures])
    seeds, left = [runtime.seed_of(seed, 1) for seed in seeds], frames - pictures.shape[2] + 1
    following = draw(rt, model, tokenizer, options, precision, rounding, left, labels, seeds, given)
    return torch.cat([pictures, following[:, :, 1:]], 2)


def open_given(args, tokenizer, shape):
    """(the pictures or clips of --given, how many rows, or latent frames, of each one's tokens are kept)."""
    video, side = len(shape) == 3, shape[-1] * tokenizer.factor
    flag, unit = ("--given-frames", tokenizer.time_factor) if video else ("--given-rows", 1)
    value, other = (args.given_frames, args.given_rows) if video else (args.given_rows, args.given_frames)
    allowed = range(1, 1 + unit * shape[0], unit)  # a first latent frame holds one frame, others `unit` each
    value = value or allowed[max(1, shape[0] // 2) - 1]
    if other or value not in allowed:
        raise UserError(f"this model's --given is cut by {flag}, one of {', '.join(map(str, allowed))}")
    kept = allowed.index(value) + 1
    if video:
        return open_clips(args.given, side, value, labelled=False, first=True), kept
    return open_pictures(args.given, side, train=False, labelled=False), kept


@torch.no_grad()
def encode_given(rt, tokenizer, photos, count, kept):
    """The first `kept` tokens of the first `count` photos, or clips, on the CPU; ranks share the work out."""
    tokens, failure = torch.zeros(count, kept, dtype=torch.int64), None
    for index in range(rt.rank, count, rt.world):
        # One by one: in batches that depend on the number of ranks, rounding might turn a code.
        images, _, _, unreadable = read_batch(photos, [(0, index)])
        if unreadable:
            failure = f"{photos.name(index)} of --given {photos.source} cannot be read: {unreadable[index]}"
            break
        tokens[index] = tokenizer.encode(to_float(torch.from_numpy(images).to(rt.device))).flatten()[:kept]
    if failure := next(filter(None, rt.gather(failure)), None):
        raise UserError(failure)
    return rt.reduce(tokens)  # the sum: where one rank has a picture's tokens, the others have zeros


def load_models(rt, args):
    """(transformer, tokenizer, settings: their paths, and hashes of what they hold)."""
    path = tokenizer_path = rt.share(locate(args.model, RELEASED_AR))
    model, tokenizer = load_ar(path)
    carried = hash_of(tokenizer.state_dict()) if tokenizer else None
    if args.tokenizer:
        tokenizer_path = rt.share(locate(args.tokenizer, RELEASED))
        tokenizer = load_tokenizer(tokenizer_path)
    advice = "name the one it was trained with: --tokenizer PATH_OR_NAME"
    if tokenizer is None:
        raise UserError(f"{path} carries no tokenizer; {advice}")
    if isinstance(tokenizer, VideoTokenizer) != (len(model.config.shape) == 3):
        raise UserError(f"of {path} and {tokenizer_path} one is of videos, the other of images; {advice}")
    bits, model_bits = tokenizer.config.bits, sum(model.config.factorized_bits)
    if bits != model_bits:
        raise UserError(f"tokens of {tokenizer_path} have {bits} bits, those of {path} {model_bits}; {advice}")
    files = {"model": str(path), "tokenizer": str(tokenizer_path)}
    files |= {"model_hash": hash_of(model.state_dict()), "tokenizer_hash": hash_of(tokenizer.state_dict())}
    if carried and files["tokenizer_hash"] != carried:
        rt.say(f"warning: {tokenizer_path} is another tokenizer than {path} was trained with, and carries")
    return model.to(rt.device), rt.place(tokenizer), files


def output(text):
    """(path, "grid" | "npz" | "folder") meant by --out."""
    out = Path(text)
    kind = {".npz": "npz", **dict.fromkeys([".png", *ANIMATED], "grid")}.get(out.suffix.lower(), "folder")
    if out.suffix.lower() in (".jpg", ".jpeg", ".npy", ".zip"):
        raise UserError(f"--out {text}: give a name ending in .png or .npz, or a folder")
    if out.exists() and out.is_dir() != (kind == "folder"):
        raise UserError(f"--out {text} is a {'folder' if out.is_dir() else 'file'}; give another name")
    return out, kind


def choose_classes(text, names, number, spread=False):
    """Labels meant by --classes: `all`, or class names or numbers, comma-separated, in that order. Left out: all, or
    with `spread` ten (all, where there are fewer), evenly spaced."""
    if text is None and spread:
        return sorted({round(i) for i in np.linspace(0, number - 1, 10)})
    if text in (None, "all"):
        return list(range(number))
    labels, names = [], names or []
    known = {str(label): label for label in range(number)} | {name: label for label, name in enumerate(names)}
    for item in map(str.strip, text.split(",")):
        if item not in known:
            listed = ", ".join([f"the numbers 0 to {number - 1}", *names[:40]])
            listed += f" and {len(names) - 40} more" if len(names) > 40 else ""
            raise UserError(f"--classes: unknown class '{item}'; known are all, {listed}")
        labels.append(known[item])
        if item not in names and any(name.isdecimal() for name in names):
            taken = f"number {item} is taken, the class {names[labels[-1]]}"
            warnings.warn(f"--classes: no class is called {item}: {taken}", stacklevel=2)
    return labels


def refuse_others(work, settings):
    """Let a run go on in `work` only where it holds pictures of the same settings (or of fewer pictures)."""
    if not work.is_dir() or not any(work.iterdir()):
        return
    config, reason = work / "config.json", "files that are not this script's"
    if os.path.lexists(config):
        with runtime.reading(config, "settings of sample.py"):
            before = json.loads(config.read_bytes())
            grown = {"count"} if before["count"] <= settings["count"] and "model_hash" in before else set()
        changed = changed_settings(before, settings, {"model", "tokenizer", "given"} | grown)
        if not changed:
            return
        reason = f"pictures of other settings ({changed})"
    raise UserError(f"the folder {work} holds {reason}; give another --out, or remove it")


def store(files, pictures, copied):
    """Write uint8 pictures (B, H, W, 3), or clips (B, T, H, W, 3), once they are `copied` (an event): to one .npy, or
    each to its .png or .webp."""

    def save(path, array):
        if path.suffix == ".webp":
            write_video(path, torch.from_numpy(array).movedim(-1, 0))
            return
        with runtime.replacing(path) as file:
            if path.suffix == ".npy":
                np.save(file, array)
            else:  # the fastest compression: packing 50,000 pictures takes longer than making them
                Image.fromarray(array).save(file, "PNG", compress_level=1)

    copied.synchronize()
    arrays = [pictures.numpy()] if files[0].suffix == ".npy" else pictures.numpy()
    with ThreadPoolExecutor() as pool:
        list(pool.map(save, files, arrays))


def write_grid(out, parts, count, rows):
    """One picture, or video: a row a class, a column a sample; the last column may end early."""
    pictures = [np.load(part) for part in parts]
    empty = np.full((-count % rows, *pictures[0].shape[1:]), 230, np.uint8)
    sheet = torch.from_numpy(np.concatenate([*pictures, empty])).unflatten(0, (-1, rows))  # picture i: row i % rows
    sheet = tile(sheet.transpose(0, 1).flatten(0, 1).movedim(-1, 1), columns=len(sheet))  # (3, [T,] H, W)
    if sheet.ndim == 4:
        return write_video(out, sheet)
    save_png(out, sheet)


def write_npz(out, parts, shape):
    """What np.savez(out, arr_0) writes, but with no more than one batch in memory."""
    with (
        runtime.replacing(out) as file,
        zipfile.ZipFile(file, "w") as archive,
        archive.open("arr_0.npy", "w", force_zip64=True) as array,
    ):
        np.lib.format.write_array_header_1_0(array, {"descr": "|u1", "fortran_order": False, "shape": shape})
        for part in parts:
            array.write(np.load(part).tobytes())


if __name__ == "__main__":
    runtime.run_script(main)
