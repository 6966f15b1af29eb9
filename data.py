"""Pictures and codes for every stage: picture folders, built-in glyphs, the order of samples, the code cache.

    dataset = open_pictures("imagenet/train", size=256, train=True)     # or "glyphs", "glyphs:4000:ABCDEFGH"
    for micro_batches in training_batches(dataset, seed=0, global_batch=256, micro_batch=8, rank=0, world=1,
                                          first_step=0, total_steps=1000, workers=8):
        for images, labels, bad in micro_batches: ...                   # uint8 (b, 3, S, S), int64 (b,)
    codes = open_codes("codes/train")                                   # written by encode.py
    indices, labels = codes.batch(SampleOrder(len(codes), seed=0).at(0, 96), seed=0)

Nothing here keeps a random state: the order of samples is a function of (seed, epoch), a crop of (seed,
epoch, index), a glyph of (seed, index). So a run goes on from any step, with any number of workers.

Letters: b pictures in a batch, S side in pixels, h w latent grid.
"""

import colorsys
import functools
import json
import os
import signal
import sys
import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch.utils.data import DataLoader
from tqdm import tqdm

from runtime import UserError, free_gib, split_batch, write_json

# fmt: off
EXTENSIONS = (".avif", ".bmp", ".gif", ".jfif", ".jp2", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".pnm",
              ".ppm", ".tif", ".tiff", ".webp")  # in capitals too
# fmt: on
GLYPHS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"
GLYPH_COUNT = 50_000
BAD_SHARE = 0.01  # of a data set's pictures may be unreadable; more stops the run

# First number of each random stream's seed: keeps apart what is drawn from equal numbers behind it.
ORDER, CROP, GLYPH, CODE_CROP = range(4)


def to_float(images):
    """uint8 0..255 -> float32 in [-1, 1], on the device of `images`."""
    return images.float() / 127.5 - 1


def to_uint8(images, rounding=False):
    """Float images, clamped to [-1, 1] -> uint8. Truncates, as the published numbers were made: half a grey
    level darker on average than with `rounding`."""
    levels = 255 * (images.float().clamp(-1, 1) + 1) / 2
    return (levels.round() if rounding else levels).to(torch.uint8)


def picture_grid(images, columns):
    """A PIL picture of the uint8 (N, 3, H, W) tensor, row by row, two light pixels between neighbours."""
    count, _, height, width = images.shape
    rows = -(-count // columns)
    sheet = torch.full((3, rows * (height + 2) - 2, columns * (width + 2) - 2), 230, dtype=torch.uint8)
    for i, image in enumerate(images):
        top, left = i // columns * (height + 2), i % columns * (width + 2)
        sheet[:, top : top + height, left : left + width] = image
    return Image.fromarray(sheet.movedim(0, -1).contiguous().numpy())


# ---------------------------------------------------------------------------------------------------------
# Picture folders


def open_pictures(source, size, train, seed=0, labelled=True):
    """The pictures of `source` at `size` x `size` pixels, as a map-style dataset.

    source: a folder with one folder a class (pictures at any depth below), or built-in `glyphs`,
        `glyphs:COUNT`, `glyphs:COUNT:CLASSES` (a folder of that name is `./glyphs`).
    train: folders: a random crop, a function of (seed, epoch, index), instead of the centre crop; glyphs:
        other pictures than with False.
    labelled: False takes any picture at any depth of a folder, with label 0 of the one class "all".

    Returns a dataset with `len()`, `.classes` (names; folders sorted), `.labels` (int64 array),
    `.name(index)`, and `dataset[epoch, index]` -> (image uint8 tensor (3, S, S), label, index, ok); in place
    of an unreadable picture comes the next readable one, with ok False. Raises UserError where there is none.
    """
    if size < 1 or seed < 0:
        raise UserError(f"image size must be positive and the seed not negative, not {size} and {seed}")
    if str(source).split(":")[0] == "glyphs":
        return Glyphs(str(source), size, train, seed)
    return PictureFolder(source, size, train, seed, labelled)


class PictureFolder:
    """See `open_pictures`."""

    def __init__(self, source, size, train, seed=0, labelled=True):
        self.source, self.size, self.train, self.seed = Path(source), size, train, seed
        if not self.source.is_dir():
            raise UserError(f"there is no picture folder {source}")
        paths, labels = [], []
        if labelled:
            folders = next(os.walk(self.source), ((), (), ()))[1]
            self.classes = sorted(name for name in folders if not name.startswith("."))
            for label, name in enumerate(self.classes):
                found = _pictures_below(self.source / name)
                if not found:
                    raise UserError(
                        f"class folder {self.source / name} holds no pictures; fill or remove it "
                        f"(pictures are {' '.join(EXTENSIONS)})"
                    )
                paths += [f"{name}/{path}" for path in found]
                labels += [label] * len(found)
        else:
            self.classes = ["all"]
            paths = _pictures_below(self.source)
            labels = [0] * len(paths)
        if not paths:
            loose = len(_pictures_below(self.source))
            if loose:
                raise UserError(
                    f"{source} has no class folders, its {loose} pictures lie directly in it; put those of "
                    f"each class in a folder of their own"
                )
            raise UserError(f"the folder {source} holds no pictures ({' '.join(EXTENSIONS)})")
        # One flat array, because a list of a million strings is copied into every worker as it is touched.
        self.paths = np.array([os.fsencode(path) for path in paths])
        self.labels = np.array(labels, dtype=np.int64)
        self._last = (-1, None)
        # Fail now, not in a worker: more than 1 % unreadable would stop the run anyway.
        probe = min(len(self), 100 + int(BAD_SHARE * len(self)))
        if all(self._read(index) is None for index in range(probe)):
            raise UserError(f"not one of the first {probe} pictures in {source} can be read")

    def __len__(self):
        return len(self.paths)

    def name(self, index):
        """The picture's path below the folder."""
        return os.fsdecode(self.paths[index])

    def _read(self, index):
        """RGB picture, or None. The last one is kept: encode.py takes several crops of a picture in a row."""
        if self._last[0] != index:
            try:
                self._last = (index, load_rgb(self.source / self.name(index)))
            except Exception:  # noqa: BLE001 (Pillow's readers raise a dozen types for damaged files)
                self._last = (index, None)
        return self._last[1]

    def __getitem__(self, entry):
        epoch, index = entry
        for place in range(index, index + len(self)):
            place %= len(self)
            picture = self._read(place)
            if picture is not None:
                break
        else:
            raise UserError(f"no picture in {self.source} can be read")
        rng = np.random.default_rng([CROP, self.seed, epoch, place]) if self.train else None
        image = np.array(resize_and_crop(picture, self.size, rng))  # (S, S, 3)
        image = torch.from_numpy(image).permute(2, 0, 1).contiguous()
        return image, int(self.labels[place]), int(index), place == index


def _pictures_below(folder):
    """Sorted relative paths of all pictures below a folder; hidden files and folders are left out."""

    def stop(error):
        raise UserError(f"cannot read the folder {error.filename}: {error.strerror}")

    found = []
    for where, folders, files in os.walk(folder, onerror=stop, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in files:
            if os.path.splitext(name)[1].lower() in EXTENSIONS and not name.startswith("."):
                found.append(os.path.relpath(os.path.join(where, name), folder))
    return sorted(found)


def load_rgb(path):
    """The picture at `path` in RGB, as Pillow converts it (first frame; transparency dropped).

    EXIF orientation is not applied: the published loader does not. Raises whatever Pillow raises for a file
    that is damaged, cut short, no picture, or so large that Pillow takes it for a decompression bomb.
    """
    with warnings.catch_warnings():
        # Palettes with transparency, broken EXIF, sizes short of a bomb: nothing that changes pixels.
        warnings.simplefilter("ignore")
        with Image.open(path) as picture:
            if picture.mode.startswith("I"):
                # 16-bit grey. Pillow's convert clips at 255, which leaves a white picture: take the high
                # byte, as Pillow itself does with 16-bit colour.
                picture = Image.fromarray((np.asarray(picture).clip(0, 65535) >> 8).astype(np.uint8))
            return picture.convert("RGB")


def resize_and_crop(picture, size, rng=None):
    """Short side to `size` (bilinear, the long side rounded down), then a `size` x `size` crop: random, from
    the generator `rng`, or centred where that is None. Pillow picture in, Pillow picture out."""
    short = min(picture.size)
    width, height = (int(size * side / short) for side in picture.size)
    if rng is None:
        left, top = round((width - size) / 2.0), round((height - size) / 2.0)
    else:
        left, top = int(rng.integers(width - size + 1)), int(rng.integers(height - size + 1))
    if width * height <= Image.MAX_IMAGE_PIXELS:
        resized = picture.resize((width, height), Image.Resampling.BILINEAR)
        return resized.crop((left, top, left + size, top + size))
    # A line 20,000 pixels long and 1 high would take gigabytes when enlarged: make only the crop. (The same
    # up to rounding, hence not for all.)
    across, down = picture.width / width, picture.height / height
    # min: (left + size) * across may end a rounding error past the edge, which Pillow refuses
    right, bottom = min((left + size) * across, picture.width), min((top + size) * down, picture.height)
    box = (left * across, top * down, right, bottom)
    return picture.resize((size, size), Image.Resampling.BILINEAR, box=box)


class BadPictures:
    """Counts a run's unreadable pictures: `add` each batch's, `check` now and then, `report` at the end."""

    def __init__(self, dataset):
        self.dataset, self.count, self.seen = dataset, 0, {}

    def add(self, indices):
        """Count these indices; name each on stderr the first time."""
        for index in indices:
            self.count += 1
            if index not in self.seen:
                self.seen[index] = self.dataset.name(index)
                tqdm.write(f"warning: unreadable picture skipped: {self.seen[index]}", file=sys.stderr)

    def check(self, total=None, epochs=1):
        """Raise UserError where more than 1 % of the pictures are unreadable.

        total: `.count` summed over ranks (this rank's, if None). epochs: how many were drawn from, the one
        begun included; as a picture comes once an epoch, 1 % or fewer never stop a run.
        """
        total = self.count if total is None else int(total)
        if total > BAD_SHARE * len(self.dataset) * epochs:
            examples = f" (for instance {self._names()})" if self.seen else ""
            raise UserError(
                f"more than {BAD_SHARE:.0%} of the {len(self.dataset)} pictures in {self.dataset.source} "
                f"cannot be read{examples}; repair or remove them, then run again"
            )

    def report(self, seen_by_all=()):
        """The closing line. seen_by_all: every rank's `.seen`, where others have read pictures too."""
        for seen in seen_by_all:
            self.seen |= seen
        return f"unreadable pictures: {f'{len(self.seen)} ({self._names()})' if self.seen else 'none'}"

    def _names(self):
        names = list(self.seen.values())
        return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


# ---------------------------------------------------------------------------------------------------------
# Glyphs


class Glyphs:
    """Built-in class-conditional pictures: letters and digits on textured grounds. See `open_pictures`.

    Picture i has class i % classes and is a function of (seed, train, i); at another size it looks the same.
    """

    def __init__(self, source, size, train, seed=0):
        self.source, self.size, self.train, self.seed = source, size, train, seed
        parts = source.split(":")[1:]
        count, classes = parts + [str(GLYPH_COUNT), GLYPHS][len(parts) :] if len(parts) < 3 else ("", "")
        if not (count.isdecimal() and int(count) > 0 and classes.isascii() and classes.isalnum()):
            raise UserError(f"'{source}' is not glyphs:COUNT:CLASSES, for instance glyphs:4000:ABCDEFGH")
        if len(set(classes)) < len(classes):
            raise UserError(f"the glyph classes {classes} name a letter twice")
        if size < 16:
            raise UserError(f"glyphs need an image size of at least 16, not {size}")
        self.classes = list(classes)
        self.labels = np.arange(int(count)) % len(classes)

    def __len__(self):
        return len(self.labels)

    def name(self, index):
        return f"glyph {index}"

    def __getitem__(self, entry):
        _, index = entry
        label = int(self.labels[index])
        rng = np.random.default_rng([GLYPH, self.seed, int(self.train), index])
        image = torch.from_numpy(draw_glyph(self.classes[label], self.size, rng))
        return image.permute(2, 0, 1).contiguous(), label, int(index), True


def draw_glyph(letter, size, rng):
    """One letter 60 to 85 % of the side high (less if it would not fit), turned by up to 15 degrees, in one
    colour on a ground of two. Returns uint8 (S, S, 3)."""
    light = [rng.uniform(0.65, 0.95), rng.uniform(0.65, 0.95)]
    dark = [rng.uniform(0.05, 0.3), rng.uniform(0.05, 0.3)]
    ground_lumas, letter_lumas = (light, dark) if rng.random() < 0.5 else (dark, light)
    first, second = (_colour(rng, luma) for luma in ground_lumas)
    colour = _colour(rng, letter_lumas[0])
    texture = _texture(size, rng)[..., None]  # (S, S, 1)
    ground = first + texture * (second - first)
    mask = _letter_mask(letter, size, rng)[..., None]
    return (255 * (ground + mask * (colour - ground)) + 0.5).astype(np.uint8)


def _colour(rng, luma):
    """An RGB colour of random hue whose luma (0.299 R + 0.587 G + 0.114 B) is `luma`, for contrast."""
    pure = np.array(colorsys.hsv_to_rgb(rng.random(), rng.uniform(0.5, 1), 1))
    its = pure @ (0.299, 0.587, 0.114)
    return pure * (luma / its) if luma < its else pure + (1 - pure) * ((luma - its) / (1 - its))


def _texture(size, rng):
    """A field in [0, 1]: gradient, stripes, disc or soft noise. Returns (S, S)."""
    kind, angle, phase = rng.integers(4), rng.uniform(0, 2 * np.pi), rng.random()
    place = (np.arange(size) + 0.5) / size - 0.5
    along = place * np.cos(angle) + (place * np.sin(angle))[:, None]
    if kind == 0:
        return np.clip(along + 0.5, 0, 1)
    if kind == 1:
        return 0.5 + 0.5 * np.sin(2 * np.pi * ((2 + 4 * rng.random()) * along + phase))
    if kind == 2:
        x, y = rng.uniform(-0.5, 0.5, 2)
        return np.clip(np.hypot(place - x, (place - y)[:, None]), 0, 1)
    noise = Image.fromarray(rng.random((6, 6), dtype=np.float32))
    return np.clip(np.asarray(noise.resize((size, size), Image.Resampling.BICUBIC)), 0, 1)


@functools.cache
def _font(pixels):
    return ImageFont.load_default(pixels)


def _letter_mask(letter, size, rng):
    """How far the letter covers each pixel, 0..1, (S, S). Drawn large and averaged down."""
    fine = 4 if size <= 64 else 2
    side = size * fine
    # Size: what was drawn, unless the turned letter would leave the picture.
    left, top, right, bottom = _font(100).getbbox(letter, anchor="ls", stroke_width=3)
    wide, high, angle = right - left, bottom - top, rng.uniform(-15, 15)
    cosine, sine = np.cos(np.radians(angle)), abs(np.sin(np.radians(angle)))
    turned_wide, turned_high = wide * cosine + high * sine, high * cosine + wide * sine
    scale = min(rng.uniform(0.6, 0.85) / high, 0.96 / max(turned_wide, turned_high)) * side
    # Place: anywhere inside.
    x = side / 2 + (side - turned_wide * scale) * rng.uniform(-0.48, 0.48)
    y = side / 2 + (side - turned_high * scale) * rng.uniform(-0.48, 0.48)
    mask = Image.new("L", (side, side))
    ImageDraw.Draw(mask).text(
        (x - scale * (left + right) / 2, y - scale * (top + bottom) / 2),
        letter,
        255,
        _font(round(100 * scale)),
        anchor="ls",
        stroke_width=round(3 * scale),
    )
    mask = mask.rotate(angle, Image.Resampling.BICUBIC, center=(x, y)).reduce(fine)
    return np.asarray(mask) / 255


# ---------------------------------------------------------------------------------------------------------
# Order and batches


class SampleOrder:
    """The order of samples of a whole run: sample s is entry s % count of epoch s // count's permutation.

    Within an epoch no picture is repeated or skipped, batches straddle epochs, starting at any step is free.
    """

    def __init__(self, count, seed):
        self.count, self.seed, self._epoch = count, seed, None

    def at(self, first, number):
        """Samples first .. first + number - 1 as a list of (epoch, index)."""
        entries = []
        while number > 0:
            epoch, start = divmod(first, self.count)
            if epoch != self._epoch:
                rng = np.random.default_rng([ORDER, self.seed, epoch])
                self._epoch, self._permutation = epoch, rng.permutation(self.count)
            part = self._permutation[start : start + number].tolist()
            entries += [(epoch, index) for index in part]
            first, number = first + len(part), number - len(part)
        return entries


def training_batches(
    dataset, seed, global_batch, micro_batch, rank, world, first_step, total_steps, workers=0
):
    """This rank's micro-batches of steps first_step (0-based) .. total_steps - 1: yields for each step a list
    of global_batch / (micro_batch * world) times (images uint8 (b, 3, S, S), labels int64 (b,), bad indices).

    Micro-batch m of a step holds samples step * global_batch + m * micro_batch and on, whoever draws it; rank
    r has those from m = r * accumulation. So two ranks with one micro-batch each see exactly what one rank
    with two sees. Nothing depends on `workers`. Raises UserError where the batch sizes do not divide.
    """
    accumulation = split_batch(global_batch, micro_batch, world)

    def entries():
        order = SampleOrder(len(dataset), seed)
        for step in range(first_step, total_steps):
            for m in range(rank * accumulation, (rank + 1) * accumulation):
                yield order.at(step * global_batch + m * micro_batch, micro_batch)

    def steps():
        batches = iter(_loader(dataset, entries(), _stack, workers))
        for _ in range(first_step, total_steps):
            yield [next(batches) for _ in range(accumulation)]

    return steps()


def evaluation_batches(dataset, batch, rank=0, world=1, workers=0, indices=None, crops=1):
    """Every picture exactly once over all ranks, a contiguous share each, the last partial batch kept: yields
    (images uint8 (b, 3, S, S), labels int64 (b,), indices int64 (b,), bad indices).

    Unreadable pictures are left out and listed, so b may be less than `batch`, even 0. indices: these
    pictures only (before sharing out). crops: each picture so often in a row, with the crops of epochs
    0 .. crops - 1; `batch` counts pictures, so b is up to batch * crops.
    """
    share = np.array_split(np.arange(len(dataset)) if indices is None else np.asarray(indices), world)[rank]

    def entries():
        for first in range(0, len(share), batch):
            yield [(crop, index) for index in share[first : first + batch].tolist() for crop in range(crops)]

    return iter(_loader(dataset, entries(), _stack_readable, workers))


def _loader(dataset, entries, collate, workers):
    return DataLoader(
        dataset,
        batch_sampler=entries,
        collate_fn=collate,
        num_workers=workers,  # torch gives each one thread
        pin_memory=torch.accelerator.is_available(),
        worker_init_fn=_leave_signals_to_the_main_process,
        generator=torch.Generator(),  # leaves the global one alone
    )


def _leave_signals_to_the_main_process(worker):
    """Ctrl-C and a batch system's SIGTERM reach workers too: they serve on until the main process stops."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _stack(samples):
    images, labels, _, _ = zip(*samples)
    bad = [index for _, _, index, ok in samples if not ok]
    return torch.stack(images), torch.tensor(labels), bad


def _stack_readable(samples):
    bad = sorted({index for _, _, index, ok in samples if not ok})
    kept = [sample for sample in samples if sample[3]]
    images = torch.stack([sample[0] for sample in kept or samples])[: len(kept)]
    labels, indices = (torch.tensor([sample[i] for sample in kept], dtype=torch.int64) for i in (1, 2))
    return images, labels, indices, bad


# ---------------------------------------------------------------------------------------------------------
# The code cache: a folder with
#   codes.bin      int32 (count, max(1, crops), h*w), flat
#   labels.bin     int32 (count,): the class, or one of the two below
#   manifest.json  what the codes are of, and whether all are there
#   tokenizer.pt   the tokenizer that made them (encode.py writes it)

UNREADABLE, PENDING = -1, -2
FORMAT, VERSION = "nanoMAGVIT2 codes", 1


def _manifest_of(folder):
    """The manifest of a cache whose files have the sizes that it states."""
    try:
        manifest = json.loads((Path(folder) / "manifest.json").read_text())
    except (OSError, ValueError):
        manifest = None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise UserError(f"{folder} is not a code cache (no manifest.json of one): make it with encode.py")
    try:
        newer = manifest["version"] > VERSION
        shapes = {"codes.bin": _codes_shape(manifest), "labels.bin": (manifest["count"],)}
    except (KeyError, TypeError, IndexError) as error:
        raise UserError(f"{folder}/manifest.json is no whole manifest of a code cache: {error}") from None
    if newer:
        raise UserError(f"the code cache {folder} was made by a newer version of this project; update it")
    for name, shape in shapes.items():
        path, expected = Path(folder) / name, 4 * int(np.prod(shape))
        actual = path.stat().st_size if path.is_file() else 0
        if actual != expected:
            raise UserError(
                f"{path} has {actual} bytes, its manifest says {expected}: it is damaged; remove {folder} "
                f"and run encode.py again"
            )
    return manifest


def _codes_shape(manifest):
    return manifest["count"], max(1, manifest["crops"]), manifest["grid"][0] * manifest["grid"][1]


class CodeWriter:
    """Makes a code cache, or goes on with one left unfinished; any number of ranks write their rows of it.

    settings: the manifest's entries: tokenizer_hash, bits, grid [h, w], size, crops (0: the centre crop),
    seed, classes, count, source, and whatever else decides the codes. A cache made with others (`source`
    apart: a folder may move) is refused with a UserError naming them. Rank 0 makes its writer first.
    """

    def __init__(self, folder, settings):
        self.folder = Path(folder)
        self.manifest = {"format": FORMAT, "version": VERSION, **settings, "complete": False}
        if (self.folder / "manifest.json").exists():
            old = _manifest_of(self.folder)
            changed = [
                f"{name} {str(old.get(name))[:40]}, not {str(value)[:40]}"
                for name, value in self.manifest.items()
                if name not in ("source", "complete") and old.get(name) != value
            ]
            if changed:
                raise UserError(
                    f"{folder} holds codes made with {'; '.join(changed)}: give another --out, or remove it"
                )
            self.manifest = old
        else:
            self._create()

    def _create(self):
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot make the folder {self.folder}: {error.strerror}") from None
        gib = 4 * np.prod(_codes_shape(self.manifest), dtype=np.float64) / 2**30
        if gib > free_gib(self.folder):
            raise UserError(
                f"the codes need {gib:.1f} GiB, and {self.folder} has {free_gib(self.folder):.1f} GiB free"
            )
        with open(self.folder / "codes.bin", "wb") as file:
            file.truncate(4 * int(np.prod(_codes_shape(self.manifest))))
        np.full(self.manifest["count"], PENDING, np.int32).tofile(self.folder / "labels.bin")
        write_json(self.folder / "manifest.json", self.manifest)  # last: with it, the other two are whole

    @property
    def complete(self):
        return self.manifest["complete"]

    def labels(self):
        """int32 (count,), as they stand on file."""
        return np.fromfile(self.folder / "labels.bin", np.int32)

    def todo(self):
        """Row numbers not yet encoded; unreadable ones are tried again. All ranks ask before any writes."""
        return np.flatnonzero(self.labels() < 0)

    def write(self, indices, codes, labels):
        """Set whole rows: indices (b,), codes (b, max(1, crops), h*w), labels (b,). Integers, on the CPU.

        A label follows once its codes are on the disk: no kill or power cut leaves a row that looks done and
        is not. These are plain writes: through a memory map, a full disk ends the process without a word.
        """
        self._put("codes.bin", indices, np.asarray(codes, np.int32))
        self._put("labels.bin", indices, np.asarray(labels, np.int32))

    def write_unreadable(self, indices):
        """Note rows that cannot be encoded."""
        self._put("labels.bin", indices, np.full(len(indices), UNREADABLE, np.int32))

    def _put(self, name, indices, rows):
        with open(self.folder / name, "r+b") as file:
            for index, row in zip(indices, rows, strict=True):
                file.seek(int(index) * row.nbytes)
                file.write(row.tobytes())
            file.flush()
            if name == "codes.bin":
                os.fsync(file.fileno())

    def finish(self):
        """Mark the cache complete. On one rank, after all have written theirs."""
        if (self.labels() == PENDING).any():
            raise UserError(f"{self.folder} is not finished; run encode.py again to go on")
        with open(self.folder / "labels.bin", "r+b") as file:
            os.fsync(file.fileno())
        self.manifest["complete"] = True
        write_json(self.folder / "manifest.json", self.manifest)


class CodeDataset:
    """A complete code cache: see `open_codes`."""

    def __init__(self, folder):
        self.manifest = _manifest_of(folder)
        if not self.manifest["complete"]:
            raise UserError(f"the code cache {folder} is incomplete: finish it by running encode.py again")
        self.classes, self.grid = self.manifest["classes"], tuple(self.manifest["grid"])
        labels = np.fromfile(Path(folder) / "labels.bin", np.int32).astype(np.int64)
        self.rows = np.flatnonzero(labels >= 0)
        self.labels = labels[self.rows]
        self.codes = np.memmap(
            Path(folder) / "codes.bin", np.int32, mode="r", shape=_codes_shape(self.manifest)
        )

    def __len__(self):
        return len(self.rows)

    def batch(self, entries, seed):
        """b times (epoch, index), as from `SampleOrder` -> (code indices int64 (b, h*w), labels int64 (b,)).
        Where several crops are on file, the one taken is a function of (seed, epoch, index)."""
        crops = self.codes.shape[1]
        chosen = [
            int(np.random.default_rng([CODE_CROP, seed, epoch, index]).integers(crops)) if crops > 1 else 0
            for epoch, index in entries
        ]
        indices = np.array([index for _, index in entries])
        codes = self.codes[self.rows[indices], chosen].astype(np.int64)
        return torch.from_numpy(codes), torch.from_numpy(self.labels[indices])


def open_codes(folder):
    """The complete code cache in `folder`.

    Returns a dataset with `len()`, `.labels` (int64 array) and `.batch(entries, seed)` over its readable
    pictures, `.classes` (names), `.grid` (h, w), `.manifest`; and `.codes`, the memory map int32 (count,
    max(1, crops), h*w), in which `.rows` are the readable ones. Raises UserError where it is no cache,
    unfinished, of a newer version, or its files are not as long as they should be. (Codes are not scanned.)
    """
    return CodeDataset(folder)
