"""Pictures and codes for every stage: picture folders, the order of samples, batches, the code cache.

    pictures = open_pictures("imagenet/train", size=256, train=True)    # or "glyphs", "glyphs:4000:ABCDEFGH"
    for micro_batches in training_batches(pictures, seed=0, ...):       # a step's list of `Batch`es
    codes = open_codes("codes/train")                                   # written by encode.py
    indices, labels = codes.batch(SampleOrder(len(codes), seed=0).at(0, 96), seed=0)

Nothing here keeps a random state: the order of samples is a function of (seed, epoch), a crop of (seed, epoch, index).
So a run goes on from any step, with any number of workers.

Letters: b pictures in a batch, S side in pixels, h w latent grid."""

import contextlib
import hashlib
import json
import math
import multiprocessing.queues
import os
import signal
import sys
import warnings
from functools import lru_cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, PngImagePlugin, UnidentifiedImageError
from torch.nn.functional import pad
from torch.utils.data import DataLoader
from tqdm import tqdm

from glyphs import Glyphs
from runtime import UserError, printable, reading, reason_of, replacing, split_batch

EXTENSIONS = ".avif .bmp .gif .jfif .jp2 .jpeg .jpg .pbm .pgm .png .pnm .ppm .tif .tiff .webp"  # in capitals too
ENDINGS = tuple(EXTENSIONS.split())
# Pillow goes by content, not by name, and would hand PostScript to an interpreter: it may open these only.
FORMATS = sorted({Image.registered_extensions().get(extension) for extension in ENDINGS} - {None})
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY  # 64 MiB: editors write megabytes of history
BAD_SHARE = 0.01  # of a data set's pictures may be unreadable; more stop the run
_named = set()  # (source, name) of unreadable pictures that this process has named: evaluations meet them again

# A seed's first number, one for each use: what is drawn from equal numbers behind it differs. 2, 4, 5: elsewhere.
ORDER, CROP, CODE_CROP = 0, 1, 3


def to_float(images):
    """uint8 0..255 -> float32 in [-1, 1], what the tokenizer takes, on the device of `images`."""
    return images.float() / 127.5 - 1


def to_uint8(images, rounding=False):
    """The tokenizer's float images, clamped to [-1, 1] -> uint8. Truncates, as the published numbers were made: half a
    grey level darker on average than with `rounding`."""
    levels = 255 * (images.float().clamp(-1, 1) + 1) / 2
    return (levels.round() if rounding else levels).to(torch.uint8)


def to_picture(image):
    """uint8 (3, H, W) -> a PIL picture."""
    return Image.fromarray(image.movedim(0, -1).cpu().contiguous().numpy())


def save_png(path, image):
    """Write a uint8 picture (3, H, W), by way of `replacing`."""
    with replacing(path) as file:
        to_picture(image).save(file, "PNG")


def tile(images, columns):
    """uint8 pictures (N, 3, H, W) -> one of all, (3, H', W'), row by row, two light pixels between neighbours; clips
    (N, 3, T, H, W) -> (3, T, H', W')."""
    between = (0, 2, 0, 2, *[0] * (2 * images.ndim - 5), -len(images) % columns)
    tiles = pad(images, between, value=230).unflatten(0, (-1, columns))  # (rows, columns, 3, [T,] H + 2, W + 2)
    return tiles.movedim((0, 1), (-4, -2)).flatten(-2).flatten(-3, -2)[..., :-2, :-2]


def open_pictures(source, size, train, seed=0, labelled=True):
    """The pictures of `source` at `size` x `size` pixels, as a map-style dataset.

    source: a folder with one folder a class (pictures at any depth below), or built-in `glyphs[:COUNT[:CLASSES]]`.
    train: a random crop, a function of (seed, epoch, index), instead of the centre crop; glyphs: other pictures.
    labelled: False takes any picture at any depth of a folder, with label 0 of the one class "all"; None does so too
    where there are no class folders, or one without pictures.
    size: None takes pictures as they are, neither resized nor cropped; `.shape` is None then.

    Returns a dataset with `len()`, `.source`, `.kind` ("pictures"), `.classes` (sorted names), `.labels` (int64 array),
    `.shape` (H, W), `.name(index)`, and `dataset[epoch, index]` -> (uint8 tensor (3, S, S), label), which raises what
    Pillow raises for an unreadable picture. Raises UserError where none can be read."""
    assert (size is None or size > 0) and seed >= 0
    if str(source).split(":")[0] == "glyphs":
        return Glyphs(str(source), size, train, seed)
    return PictureFolder(source, size, train, seed, labelled)


class PictureFolder:
    """See `open_pictures`. smallest: at size None, a picture with a shorter (short, long) side counts as unreadable."""

    kind, endings = "pictures", EXTENSIONS  # in messages

    def __init__(self, source, size, train=False, seed=0, labelled=True):
        self.source, self.size, self.train, self.seed = Path(source), size, train, seed
        self.shape, self.smallest = size and (size, size), (1, 1)
        found = dict(sorted(self._by_class().items()))
        if labelled is None:
            labelled = len(found) > 1 and all(paths for name, paths in found.items() if name != ".")
        if not labelled:
            found = {".": [path for paths in found.values() for path in paths]}
        elif len(found) > 1:
            del found["."]  # pictures beside the class folders
        elif found["."]:
            words = f"its {len(found['.'])} {self.kind} lie directly in it; give each class a folder of its own"
            raise UserError(f"{source} has no class folders, {words}")
        for name, paths in found.items():
            if not paths:
                words = f"{self.kind} ({self.endings}; a folder linked to twice counts once)"
                raise UserError(f"the folder {self.source / name} holds no {words}")
        self.classes = list(found) if labelled else ["all"]
        # One flat array, because a list of a million strings is copied into every worker as it is touched.
        self.paths = np.array([os.fsencode(path) for paths in found.values() for path in sorted(paths)])
        self.labels = np.repeat(np.arange(len(found)), [len(paths) for paths in found.values()])
        self._last = None, None  # index and picture
        first = read_batch(self, [(0, 0)], enough_tries(self))  # fail now, not in a worker
        if not len(first.images):
            words = f"can be read; {self.name(0)}: {first.unreadable[0]}"
            raise UserError(f"not one of the first {enough_tries(self)} {self.kind} in {source} {words}")

    def _by_class(self):
        """{class folder: the paths, from `source` on, of its pictures at any depth}; under "." those in none."""
        found = {}
        for folder, files in walk(self.source):
            pictures = [name for name in files if name.lower().endswith(ENDINGS)]
            found.setdefault(folder.split("/")[0], []).extend(os.path.normpath(f"{folder}/{name}") for name in pictures)
        return found

    def __len__(self):
        return len(self.paths)

    def name(self, index):
        return os.fsdecode(self.paths[index])

    def __getitem__(self, entry):
        epoch, index = entry
        if index != self._last[0]:  # encode.py takes several crops of a picture in a row
            self._last = index, load_rgb(self.source / self.name(index))
        picture = self._last[1]
        if self.size:
            rng = np.random.default_rng([CROP, self.seed, epoch, index]) if self.train else None
            picture = resize_and_crop(picture, self.size, rng)
        elif min(picture.size) < self.smallest[0] or max(picture.size) < self.smallest[1]:
            raise ValueError("it is {}x{}, smaller than {}x{}".format(*picture.size, *self.smallest))
        return torch.from_numpy(np.array(picture)).permute(2, 0, 1).contiguous(), int(self.labels[index])


def walk(source):
    """Yields (path from `source` on, names of its files) for `source` and each folder below, but for what is hidden.
    Links to folders are followed last. A folder seen before is shown empty: no loop and no second way adds files."""
    seen, tops = set(), [source]
    for top in tops:  # which grows by the links found on the way
        for folder, inside, files in os.walk(top, onerror=_stop):
            place, below = os.path.realpath(folder), os.path.relpath(folder, source)
            if place in seen:
                inside.clear()
                files.clear()
            seen.add(place)
            inside[:] = sorted(name for name in inside if not name.startswith("."))
            tops += [f"{folder}/{name}" for name in inside if os.path.islink(f"{folder}/{name}")]
            yield below, [name for name in files if not name.startswith(".")]


def _stop(error):
    raise UserError(f"there is no picture folder {error.filename} that can be read: {error.strerror}")


def identity(pictures):
    """sha256 by which a run is resumed on the same pictures: of the names of a data set's classes, and of the names and
    labels of its pictures in order. Not of where it lies, nor of its pixels."""
    entries = [f"{label} {pictures.name(index)}" for index, label in enumerate(pictures.labels)]
    text = "\0".join([*pictures.classes, "", *entries, ""])
    return hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()


@contextlib.contextmanager
def plain_file(path):
    # O_NONBLOCK: opening a named pipe would wait for somebody who writes into it.
    with open(path, "rb", opener=lambda path, flags: os.open(path, flags | os.O_NONBLOCK)) as file:
        if not os.path.isfile(file.fileno()):
            raise ValueError("it is no plain file")
        yield file


@contextlib.contextmanager
def opened(path):
    """The picture at `path`, opened by Pillow and not yet decoded. Raises whatever Pillow raises for a file that is
    damaged, no picture, or so large that Pillow takes it for a decompression bomb."""
    # Ignored are warnings of transparent palettes, broken EXIF, sizes short of a bomb: nothing that changes pixels.
    with plain_file(path) as file, warnings.catch_warnings(action="ignore"):
        try:
            picture = Image.open(file, formats=FORMATS)
        except UnidentifiedImageError:
            raise ValueError(f"it is not a picture that Pillow reads as {', '.join(FORMATS)}") from None
        yield picture


def load_rgb(path):
    """The picture at `path` in RGB, as Pillow converts it (first frame; transparency dropped; EXIF orientation not
    applied, as in the published loader). Raises as `opened` does."""
    with opened(path) as picture:
        if picture.mode[0] not in "IF":
            return picture.convert("RGB")
        # 16-bit grey, which convert would clip at 255 to a white picture. Take the high byte, as Pillow does of colour.
        tiff = getattr(picture, "tag_v2", {})
        if picture.mode == "F" or (picture.mode == "I" and tiff):
            raise ValueError("its grey levels are floats, signed or of 32 bits: which is white, no file says")
        bits_per_sample, photometric = tiff.get(258, (16,))[0], tiff.get(262)
        levels = (np.asarray(picture).clip(0, 65535) >> (bits_per_sample - 8)).astype(np.uint8)
        return Image.fromarray(255 - levels if photometric == 0 else levels).convert("RGB")  # 0: white is zero


def resize_and_crop(picture, size, rng=None):
    """A Pillow picture's short side to `size` (bilinear, the long side rounded down), then a crop of `size` x `size`:
    centred, or random by the generator `rng`. Raises ValueError where a line of pixels would become gigabytes."""
    width, height = (int(size * side / min(picture.size)) for side in picture.size)
    if width * height > Image.MAX_IMAGE_PIXELS:
        raise ValueError(f"enlarged to size it would have {width * height / 1e6:.0f} million pixels")
    spare = width - size, height - size
    left, top = (int(rng.integers(pixels + 1)) if rng else round(pixels / 2) for pixels in spare)
    resized = picture.resize((width, height), Image.Resampling.BILINEAR)
    return resized.crop((left, top, left + size, top + size))


def enough_tries(pictures):  # so many unreadable ones in a row are more than BAD_SHARE, or all there are
    return min(len(pictures), 100 + int(BAD_SHARE * len(pictures)))


class BadPictures:
    """Counts a run's unreadable pictures: `add` each batch's, `check` now and then, `report` at the end."""

    def __init__(self, dataset):
        self.dataset, self.count, self.seen = dataset, 0, {}  # seen: index -> "name (reason)"

    def add(self, unreadable):
        """Count these, {index: reason}; name each on stderr the first time."""
        self.count += len(unreadable)
        for index, reason in unreadable.items():
            name = os.fsencode(self.dataset.name(index)).decode(errors="backslashreplace").replace("\n", "\\n")
            self.seen[index] = words = f"{name} ({reason})"
            if (self.dataset.source, name) not in _named:
                _named.add((self.dataset.source, name))
                tqdm.write(printable(f"warning: unreadable {self.dataset.kind[:-1]} skipped: {words}"), file=sys.stderr)

    def check(self, total, epochs=1):
        """Raise UserError where more than 1 % of the pictures are unreadable. total: `.count` summed over ranks.
        epochs: how many were drawn from, the one begun included: each has every picture once, so 1 % stop no run."""
        if total > BAD_SHARE * len(self.dataset) * epochs:
            share = f"more than {BAD_SHARE:.0%} of the {len(self.dataset)} {self.dataset.kind} in {self.dataset.source}"
            raise UserError(f"{share} cannot be read{self._examples()}; repair or remove them, then run again")

    def report(self, seen_by_all):
        """The closing line. seen_by_all: every rank's `.seen`."""
        for seen in seen_by_all:
            self.seen |= seen
        return f"unreadable {self.dataset.kind}: {len(self.seen) or 'none'}{self._examples()}"

    def _examples(self):
        pictures = ", ".join(list(self.seen.values())[:3]) + (", ..." if len(self.seen) > 3 else "")
        return f" ({pictures})" if pictures else ""


# --- Order and batches ------------------------------------------------------------------------------------------------
class SampleOrder:
    """The samples of a whole run: number s is entry s % count of epoch s // count's permutation. So an epoch has each
    picture once, batches straddle epochs, and a run can start at any step at no cost."""

    def __init__(self, count, seed):
        self.count = count
        self.order = lru_cache(2)(lambda epoch: np.random.default_rng([ORDER, seed, epoch]).permutation(count))

    def at(self, first, number):
        """Samples first .. first + number - 1 as a list of (epoch, index)."""
        places = [divmod(sample, self.count) for sample in range(first, first + number)]
        return [(epoch, int(self.order(epoch)[place])) for epoch, place in places]


class Batch(NamedTuple):
    images: torch.Tensor  # uint8 (b, 3, H, W)
    labels: torch.Tensor  # int64 (b,)
    indices: torch.Tensor  # int64 (b,), as asked for
    unreadable: dict  # index -> reason, of pictures that are not among the images


def read_batch(pictures, entries, tries=1):
    """The `Batch`, of NumPy arrays, of a list of (epoch, index). An unreadable picture's place is taken by the first
    readable one of the `tries` pictures from it on, a function of the entry alone; else all its crops are left out."""
    samples, unreadable = [], {}
    for epoch, index in entries:
        for place in range(index, index + tries):
            try:
                samples.append((*pictures[epoch, place % len(pictures)], index))
                break
            except Exception as error:  # noqa: BLE001 (Pillow's readers raise a dozen types for damaged files)
                unreadable.setdefault(index, reason_of(error))
    samples = [sample for sample in samples if tries > 1 or sample[2] not in unreadable]  # clips of a damaged video
    images, labels, indices = zip(*samples) if samples else ((), (), ())
    images = torch.stack(images) if images else torch.zeros(0, 3, *(pictures.shape or (0, 0)), dtype=torch.uint8)
    return Batch(images.numpy(), np.array(labels, np.int64), np.array(indices, np.int64), unreadable)


def training_batches(dataset, seed, global_batch, micro_batch, rank, world, first_step, total_steps, workers=0):
    """Yields for each step, first_step (0-based) .. total_steps - 1, the list of this rank's micro-batches. Readable
    pictures replace unreadable ones, as CUDA graphs want one shape. Raises UserError where the sizes do not divide.
    A step's global batch is cut into a share for each rank in turn, and that into micro-batches. So two ranks with one
    micro-batch each see exactly what one rank with two sees. Nothing depends on `workers`."""
    share = split_batch(global_batch, micro_batch, world) * micro_batch  # of a step's samples
    order, steps = SampleOrder(len(dataset), seed), range(first_step, total_steps)
    places = range(rank * share, (rank + 1) * share, micro_batch)  # where this rank's micro-batches begin in a step's
    entries = (order.at(step * global_batch + place, micro_batch) for step in steps for place in places)
    batches = _loader(dataset, entries, micro_batch, workers)
    return ([next(batches) for _ in places] for _ in steps)


def evaluation_batches(dataset, batch, rank=0, world=1, workers=0, indices=None, crops=1):
    """Yields `Batch`es: every picture exactly once over all ranks, a contiguous share each, partial last batch kept.
    Unreadable pictures are left out and listed, so b may be less than `batch`, even 0. indices: these pictures only
    (before sharing out). crops: each picture so often in a row, with the crops of epochs 0 .. crops - 1."""
    share = np.array_split(range(len(dataset)) if indices is None else indices, world)[rank].tolist()
    parts = (share[i : i + batch] for i in range(0, len(share), batch))
    return _loader(dataset, ([(crop, index) for index in part for crop in range(crops)] for part in parts), 0, workers)


def _loader(pictures, entries, full, workers):
    """Yields the `Batch` of each list in `entries`, of `full` pictures where that is not 0. Workers send NumPy arrays,
    through a pipe: torch's tensors go through /dev/shm, which containers keep small; where it is full, they hang."""
    pin = torch.accelerator.is_available()
    read = partial(read_batch, pictures, tries=enough_tries(pictures) if full else 1)
    # pin_memory leaves arrays alone, but has a thread take them out of the pipe.
    options = {"num_workers": workers, "pin_memory": pin, "worker_init_fn": _begin_worker}
    options |= {"generator": torch.Generator()}  # leaves the global one alone
    # A worker has __getitems__ read a whole batch, and nothing is left to collate.
    loader = DataLoader(SimpleNamespace(__getitems__=read), batch_sampler=entries, collate_fn=tuple, **options)
    for *arrays, unreadable in loader:
        if len(arrays[0]) < full:
            raise UserError(f"too many pictures in {pictures.source} cannot be read: {next(iter(unreadable.values()))}")
        yield Batch(*(tensor.pin_memory() if pin else tensor for tensor in map(torch.from_numpy, arrays)), unreadable)


def _begin_worker(worker):
    """Ctrl-C and a batch system's SIGTERM reach workers too, which must serve until the main process stops. A worker
    that cannot send a batch ends: the main process would wait for ever."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    multiprocessing.queues.Queue._on_queue_feeder_error = staticmethod(lambda error, batch: os._exit(1))


# --- The code cache ---------------------------------------------------------------------------------------------------
# Written by encode.py: a folder with
#   codes.bin      int32 (count, max(1, crops), h*w), flat
#   labels.bin     int32 (count,): the class, or one of the two below
#   manifest.json  what the codes are of, and whether all are there
#   tokenizer.pt   the tokenizer that made them
UNREADABLE, PENDING = -1, -2
FORMAT, VERSION = "nanoMAGVIT2 codes", 1


def codes_shape(manifest):
    return manifest["count"], max(1, manifest["crops"]), math.prod(manifest["grid"])


def read_manifest(folder):
    """The manifest of a cache whose files have the sizes that it states; else raises UserError."""
    path = Path(folder) / "manifest.json"
    if not path.exists():
        raise UserError(f"{folder} is not a code cache: make it with encode.py")
    with reading(path, "a code cache's manifest"):
        manifest = json.loads(path.read_bytes())
        if manifest.get("format") != FORMAT:
            raise ValueError(f"it does not say {FORMAT}")
        if manifest["version"] > VERSION:
            raise UserError(f"the code cache {folder} was made by a newer version of this project; update it")
        numbers = [manifest["count"], 1 + manifest["crops"], manifest["bits"], manifest["size"]]
        numbers += [manifest.get("frames", 1), *manifest["grid"]]  # frames: of clips only
        sound = all(type(number) is int and 1 <= number <= 2**40 for number in numbers)
        if not sound or len(numbers) != 7 + ("frames" in manifest) or manifest["bits"] > 30:
            raise ValueError(f"count, 1 + crops, bits, size, frames, grid are {numbers}")
        if type(manifest["classes"]) is not list or {type(name) for name in manifest["classes"]} != {str}:
            raise ValueError("classes is no list of names")
        manifest["complete"] = bool(manifest["complete"])
    for name, shape in (("codes.bin", codes_shape(manifest)), ("labels.bin", (manifest["count"],))):
        path, expected = Path(folder) / name, 4 * math.prod(shape)
        actual = path.stat().st_size if path.is_file() else 0
        if actual != expected:
            raise UserError(f"{path} has {actual} bytes, not {expected}; remove {folder} and run encode.py again")
    return manifest


class open_codes:
    """The readable pictures' codes of the complete cache in `folder`; UserError where it is none. Scans no codes.
    `len()`, `.labels` (int64 array), `.classes` (names), `.grid` (h, w) or (t, h, w), `.manifest`, `.identity` (hash
    of what decides the codes); `.codes`, a memory map int32 (count, max(1, crops), h*w), and its readable `.rows`."""

    def __init__(self, folder):
        self.manifest = read_manifest(folder)
        if not self.manifest["complete"]:
            raise UserError(f"the code cache {folder} is incomplete: finish it by running encode.py again")
        self.classes, self.grid = self.manifest["classes"], tuple(self.manifest["grid"])
        self.codes = np.memmap(Path(folder) / "codes.bin", np.int32, mode="r", shape=codes_shape(self.manifest))
        labels = np.fromfile(Path(folder) / "labels.bin", np.int32).astype(np.int64)
        self.rows = np.flatnonzero(labels >= 0)
        self.labels = labels[self.rows]
        if not len(self.rows) or labels.min() < UNREADABLE or labels.max() >= len(self.classes):
            words = "names no picture, or classes that there are not: it is damaged"
            raise UserError(f"{folder}/labels.bin {words}; remove {folder} and run encode.py again")
        made_of = {name: value for name, value in self.manifest.items() if name != "source"}
        self.identity = hashlib.sha256(json.dumps(made_of, sort_keys=True).encode() + labels.tobytes()).hexdigest()

    def __len__(self):
        return len(self.rows)

    def batch(self, entries, seed):
        """b times (epoch, index), as from `SampleOrder` -> (code indices int64 (b, h*w), labels int64 (b,)). Where
        several crops are on file, the one taken is a function of (seed, epoch, index)."""
        crops, rng = self.codes.shape[1], np.random.default_rng
        crop = [rng([CODE_CROP, seed, *entry]).integers(crops) if crops > 1 else 0 for entry in entries]
        indices = np.array([index for _, index in entries])
        codes = self.codes[self.rows[indices], crop].astype(np.int64)  # (b, h*w)
        return torch.from_numpy(codes), torch.from_numpy(self.labels[indices])
