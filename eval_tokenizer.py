"""Stage I, measured: how well a tokenizer (Open-MAGVIT2, arXiv 2409.04410) gives pictures back.

    python eval_tokenizer.py --tokenizer 256_L --data imagenet/val --size 256                    # the paper's rFID 1.17
    torchrun --nproc_per_node=8 eval_tokenizer.py --tokenizer 128_L --data imagenet/val --size 256        # rFID 0.34
    python eval_tokenizer.py --tokenizer runs/tokenizer --data glyphs:2000 --size 32       # own run, built-in pictures
    python eval_tokenizer.py --tokenizer 256_L --data photos --size original --save-pictures rebuilt     # of any sizes
    python eval_tokenizer.py --tokenizer video_128 --data ucf101/train --size 128            # the published rFVD 16
    python eval_tokenizer.py --tokenizer video_128 --data videos --size 128 --frames all --save-pictures rebuilt

Every picture is resized and centre-cropped to --size (or only padded: original), encoded and decoded. Out come, with
the protocol behind them: rFID, PSNR and SSIM (each plain, and as published), LPIPS with VGG and with AlexNet, the share
of the 2^K codes that occur, bits per pixel; under --out also metrics.json and reconstructions.png. A video tokenizer is
measured on clips (clips.py): rFVD (fvd.py) in place of rFID, all else frame by frame."""

import math
from collections import Counter
from pathlib import Path

import torch
from torch.nn.functional import pad

import data
import fvd
import runtime
from clips import open_clips, write_video
from fid import float64, frechet_distance, gather_rows, moments, psnr, readable_batches, report, ssim
from inception import load_inception, weights_in_words
from losses import load_lpips
from page import LIMIT, write_page
from runtime import UserError, at_least
from tokenizer import load_tokenizer
from video_tokenizer import VideoTokenizer

NUMBERS = ["pictures", "rFID", "PSNR", "PSNR published", "SSIM", "SSIM published", "LPIPS VGG", "LPIPS AlexNet"]
NUMBERS += ["codebook use", "bits per pixel"]
CLIP_NUMBERS = ["clips", "rFVD", "rFVD published", "PSNR", "SSIM", *NUMBERS[6:]]
PUBLISHED_BATCH = 4  # the published PSNR is taken over mini-batches of so many pictures; at original size of one
SMALLEST = {"SSIM": 7, "LPIPS VGG": 16, "LPIPS AlexNet": 31}  # side, in pixels, of a picture that has one


def parse(argv=None):
    arguments = runtime.parser(__doc__)
    add = arguments.add_argument_group("protocol").add_argument
    add("--tokenizer", required=True, help="a name (256_L, pretrain_256_16384, ...), a file, or a run's folder")
    add("--data", default="glyphs:5000", help="folder of pictures, or videos; or [moving-]glyphs[:COUNT[:CLASSES]]")
    add("--size", type=at_least(1, word="original"), default=256, help="pixels a side; or 'original': no crop, batch 1")
    add("--frames", type=at_least(1, word="all"), default=17, help="of a clip; or 'all': whole, 17 at once, batch 1")
    add("--raw", action="store_true", help="the training weights, not their moving average")
    add("--rounding", action="store_true", help="round to uint8 for PSNR and SSIM; published: truncate")
    add("--precision", default="fp32", help="of the tokenizer: fp32, bf16 or fp16; the metrics stay in fp32")
    add = arguments.add_argument_group("the metrics' weights (left out: torch's hub cache, or downloaded)").add_argument
    add("--inception", help="file for rFID")
    add("--i3d", help=f"file for rFVD, {fvd.I3D_FILE}, which is not downloaded")
    add("--lpips-vgg", help="file with LPIPS's VGG weights: a released tokenizer, or a state dict of losses.LPIPS")
    add("--lpips-alex", help="file with LPIPS's AlexNet weights: a state dict of losses.LPIPS")
    add = arguments.add_argument_group("output").add_argument
    add("--out", default="runs/eval", help="folder for metrics.json, config.json and reconstructions.png")
    add("--save-pictures", metavar="FOLDER", help="write every reconstruction there, a PNG named as its original")
    add("--video-format", default="webp", choices=("webp", "gif", "mp4"), help="of reconstructed clips, instead of PNG")
    add("--html", nargs="?", const="", metavar="PAGE", help="show pairs on a page; default: OUT/reconstructions.html")
    add = arguments.add_argument_group("speed (changes no number)").add_argument
    add("--batch", type=at_least(1), default=16, help="pictures a device at once")
    add("--workers", type=at_least(0), default=2, help="loader processes per device")
    return arguments.parse_args(argv)


def published_original(images, rounding=False):
    """The original that the published PSNR and SSIM compare with: uint8 -> float -> uint8, the way of the
    reconstruction. Truncated, its grey levels 1 to 95 come out one lower."""
    return data.to_uint8((images.double() / 127.5 - 1).float(), rounding)  # to float32 after all, as published


def published_psnr(per_picture):
    """PSNR in dB of each mini-batch of 4, from its mean squared error: (N,) of the pictures in order -> (ceil(N / 4),).
    Its mean lies below the mean over pictures."""
    errors = 10 ** (-per_picture / 10)
    return torch.stack([-10 * batch.mean().log10() for batch in errors.split(PUBLISHED_BATCH)])


def finite_mean(values, what):
    """(mean of the finite PSNRs, or inf if none is; note). A picture given back exactly has an infinite one."""
    finite = values[values.isfinite()]
    note = f"dB, mean over {what}"
    if infinite := len(values) - len(finite):
        note += f"; {infinite} are infinite (given back exactly), not averaged"
    return finite.mean().item() if len(finite) else math.inf, note


@torch.no_grad()
def rebuild(tokenizer, x):
    """Images (B, 3, H, W) in [-1, 1], of any size -> (y of the same size, unclamped, indices (B, h, w)). Zeros (mid
    grey) pad x to a multiple of the tokenizer's factor, half of them (rounded down) left and top; y is cut back."""
    (height, width), f = x.shape[2:], tokenizer.factor
    top, left = -height % f // 2, -width % f // 2
    y, indices, _ = tokenizer(pad(x, (left, -(left + width) % f, top, -(top + height) % f)))
    return y[:, :, top : top + height, left : left + width], indices


@torch.no_grad()
def measure(rt, args, tokenizer, pictures, network, perceptual, keep=None):
    """Measure the tokenizer on all pictures or clips, each rank on its share. network: Inception, I3D or None.
    perceptual: {name of the number: LPIPS}. keep: called with each picture's index, the picture and its reconstruction,
    uint8 (3, [T,] H, W), on the rank that has it. Returns on the main process ({name: number}, {name: note to print
    behind it}, uint8 (rows, columns, 3, H, W) with up to eight originals and reconstructions); on others three None."""
    rows, features_x, features_y, shown, count, tokens, pixels = [], [], [], None, 0, 0, 0
    video = isinstance(tokenizer, VideoTokenizer)
    kind, distance, width = ("clips", "rFVD", 400) if video else ("pictures", "rFID", 2048)
    seen = torch.zeros(2**tokenizer.config.bits, dtype=torch.uint8)
    for batch in readable_batches(rt, pictures, args.batch, args.workers):
        images = batch.images.to(rt.device)
        x = data.to_float(images)
        with runtime.autocast(rt.device, args.precision):
            # A clip is one window, a whole video (of no `shape`) has one for every 17 frames.
            y, indices = tokenizer.rebuild(x, (pictures.shape or [17])[0]) if video else rebuild(tokenizer, x)
        y = y.float().clamp(-1, 1)
        if not y.isfinite().all():
            raise UserError(f"{args.tokenizer} gives back values that are not finite")
        rebuilt = data.to_uint8(y, args.rounding)
        seen[indices.flatten().cpu()] = 1
        count, tokens, pixels = count + len(images), tokens + indices.numel(), pixels + x[:, 0].numel()
        if shown is None:
            shown = torch.stack([images[:8], rebuilt[:8]], int(video)).cpu()
            if video:  # a row of frames for each, one of every token in time
                shown = shown[:, :, :, :: tokenizer.time_factor][:, :, :, :8].movedim(3, 2).flatten(0, 1)
        for picture in zip(batch.indices.tolist(), images, rebuilt) if keep else ():
            keep(*picture)
        for z, features in ((x, features_x), (y, features_y)) if network else ():
            # The published rFID never passes through uint8; rFVD does, originals too.
            found = fvd.features(network, data.to_uint8(z)) if video else network((z + 1) / 2, "half-pixel")[0]
            features.append(found.cpu())

        # Clips (b, 3, T, H, W) are scored frame by frame, a long video's not all at once.
        frames = (z.movedim(1, -3).flatten(0, -4).split(256) for z in (x, y, images, rebuilt))
        for x, y, images, rebuilt in zip(*frames):  # (n, 3, H, W)
            original, published, scored = float64(images, published_original(images.cpu(), args.rounding), rebuilt)
            columns = [score(of, scored) for score in (psnr, ssim) for of in (original, published)]
            with runtime.exact_float32(rt.device):
                columns += float64(*(lpips(x, y).flatten() for lpips in perceptual.values()))
            rows.append(torch.stack(columns, 1))  # (n, 4 + len(perceptual))

    used = int(rt.reduce(seen, "max").sum())
    count, tokens, pixels = map(int, rt.reduce([count, tokens, pixels]))
    rows = gather_rows(rt, rows, 4 + len(perceptual))
    features_x, features_y = (gather_rows(rt, features, width) for features in (features_x, features_y))
    if not rt.main:
        return None, None, None
    numbers, notes = {kind: count}, {kind: f"{len(pictures) - count} unreadable ones left out"}
    if network:
        numbers[distance] = frechet_distance(*moments(features_x), *moments(features_y))
        notes[distance] = "" if count >= 2048 else f"biased upwards: fewer than 2048 {kind}"
        numbers |= {"rFVD published": fvd.published_distance(features_x, features_y)} if video else {}
    numbers["PSNR"], notes["PSNR"] = finite_mean(rows[:, 0], "frames" if video else "pictures")
    each, batches = (PUBLISHED_BATCH, published_psnr(rows[:, 1])) if pictures.shape else (1, rows[:, 1])
    numbers["PSNR published"], notes["PSNR published"] = finite_mean(batches, f"mini-batches of {each}")
    notes["PSNR published"] += f"; mean over pictures {finite_mean(rows[:, 1], '')[0]:.4f}"
    numbers |= zip(["SSIM", "SSIM published", *perceptual], rows[:, 2:].mean(0).tolist())
    numbers["codebook use"] = used / len(seen)
    notes["codebook use"] = f"{used} of {len(seen)} codes occur"
    numbers["bits per pixel"] = tokenizer.config.bits * tokens / pixels
    return numbers, notes, shown


def if_there(rt, load, *arguments):
    """(what `load(*arguments)` returns, None); or (None, the reason) on all ranks, if one of them lacks the weights.
    The last argument is the file that the user gave, or None: what was given must be right."""
    try:
        found, reason = load(*arguments), None
    except UserError as error:
        if arguments[-1] is not None:
            raise
        reason = str(error)
    reason = next(filter(None, rt.gather(reason)), None)
    return (None, f"not computed ({reason})") if reason else (found, None)


def main():
    args = parse()
    rt = runtime.start()
    args.precision = runtime.set_precision(rt, args.precision)
    size = None if args.size == "original" else args.size
    tokenizer = rt.place(load_tokenizer(args.tokenizer, ema=not args.raw))
    video = isinstance(tokenizer, VideoTokenizer)
    if size and size % tokenizer.factor:
        raise UserError(f"--size {size} is not a multiple of {tokenizer.factor}, this tokenizer's factor")
    if video and (not size or args.html is not None):
        raise UserError(f"{args.tokenizer} is a tokenizer of videos: give their side as --size, and no --html")
    if video:
        pictures = open_clips(args.data, size, None if args.frames == "all" else args.frames, labelled=False)
        load, file, in_words, ending = fvd.load_i3d, args.i3d, "SHA-256 {}".format, f".{args.video_format}"
        how = "clips as uint8, truncated, originals too; frames resized to 224x224, bilinear, without antialias"
    else:
        pictures = data.open_pictures(args.data, size, train=False, labelled=False)
        load, file, in_words, ending = load_inception, args.inception, weights_in_words, ".png"
        how = "float originals, float reconstructions clamped; convention half-pixel (as pytorch-fid)"
    args.batch = args.batch if pictures.shape else 1
    if args.save_pictures:
        names = [Path(args.save_pictures, pictures.name(index)) for index in range(len(pictures))]
        # a.jpg becomes a.png; but beside an a.gif, which would too, a.jpg.png.
        short, whole = [name.with_suffix(ending) for name in names], [Path(f"{name}{ending}") for name in names]
        times = Counter(short + whole)
        paths = [name if times[name] == 1 else other for name, other in zip(short, whole)]
        originals = {Path(args.data, pictures.name(index)).resolve() for index in range(len(pictures))}
        if any(p in originals or p.is_relative_to(Path(args.data).resolve()) for p in map(Path.resolve, paths)):
            raise UserError(f"--save-pictures {args.save_pictures} would write among --data; give another folder")
    loaded, reason = if_there(rt, load, file)
    if video and (len(pictures) < 2 or (pictures.shape or [0])[0] < 9):
        loaded, reason = None, "not computed (it is of two clips or more, of one length, 9 frames or more)"
    network, sha256 = loaded or (None, None)
    absent, perceptual = dict.fromkeys(["rFID", "rFVD", "rFVD published"], reason), {}
    for name, backbone, path in ("LPIPS VGG", "vgg", args.lpips_vgg), ("LPIPS AlexNet", "alex", args.lpips_alex):
        perceptual[name], absent[name] = if_there(rt, load_lpips, backbone, path)
        if size and size < SMALLEST[name]:
            perceptual[name], absent[name] = None, f"not computed (it needs {SMALLEST[name]} pixels a side)"
    perceptual = {name: lpips.to(rt.device) for name, lpips in perceptual.items() if lpips}
    network = network and network.to(rt.device)
    smallest = max(SMALLEST[name] for name in ["SSIM", *perceptual])
    pictures.smallest = smallest, max(smallest, tokenizer.factor + 1)  # the decoder needs two tokens
    out = runtime.open_run(rt, args.out, vars(args))

    entries = []

    def keep(index, x, y):
        if args.save_pictures:
            paths[index].parent.mkdir(parents=True, exist_ok=True)
            if video:
                write_video(paths[index], y)
            else:
                data.save_png(paths[index], y)
        if args.html is not None and index < LIMIT:
            value = psnr(*float64(x[None], y[None])).item()
            words = "given back exactly (PSNR infinite)" if value == math.inf else f"{value:.2f} dB"
            entries.append((f"{pictures.name(index)}: {words}", [data.to_picture(x), data.to_picture(y)]))
            for picture in entries[-1][1]:
                picture.thumbnail((1024, 1024))  # at most

    numbers, notes, shown = measure(rt, args, tokenizer, pictures, network, perceptual, keep)
    entries = [entry for share in rt.gather(entries) for entry in share]  # in order
    if not rt.main:
        return
    names = CLIP_NUMBERS if video else NUMBERS
    numbers = {name: numbers.get(name, absent.get(name)) for name in names}
    notes = {name: notes[name] for name in names if name in notes}
    shape = f"short side resized to {size}, {'random' if video else 'centre'} crop {size}x{size}"
    shape = shape if size else f"original size, zero padding to multiples of {tokenizer.factor} cut off again, batch 1"
    protocol = {
        "tokenizer": f"{args.tokenizer}, {'training weights' if args.raw else 'moving average where there is one'}",
        names[0]: f"{args.data}, {shape}{f', {args.frames} frames' * video}",
        names[1]: how,
        "I3D" if video else "inception": in_words(sha256) if network else "none",
        "PSNR, SSIM": f"uint8, {'rounded' if args.rounding else 'truncated'}, data range 1; published: originals too",
        "LPIPS": "version 0.1, floats, reconstructions clamped",
        "device": f"{rt.device.type} x {rt.world}, tokenizer in {args.precision}, torch {torch.__version__}",
    }
    report(rt, numbers, notes, protocol)
    values = {name: str(value) if value == math.inf else value for name, value in numbers.items()}
    runtime.write_json(out / "metrics.json", values | {"notes": notes, "protocol": protocol})
    data.save_png(out / "reconstructions.png", data.tile(shown.flatten(0, 1), columns=shown.shape[1]))
    if args.html is not None:
        page, title = args.html or out / "reconstructions.html", f"Rebuilt by {args.tokenizer}"
        write_page(page, title, entries, numbers["pictures"])


if __name__ == "__main__":
    runtime.run_script(main)
