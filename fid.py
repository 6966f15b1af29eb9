"""Frechet Inception Distance (FID) and what is reported beside it: sFID, IS, precision and recall; PSNR and SSIM.

    python fid.py REFERENCE SAMPLES                            # the published generation numbers (ADM's protocol)
    python fid.py REFERENCE SAMPLES --convention half-pixel    # FID as pytorch-fid computes it
    python fid.py REFERENCE --save-stats reference.npz         # measure a set once; use the file in its place
    torchrun --nproc_per_node=8 fid.py REFERENCE SAMPLES       # every device takes a share

A set is a folder of pictures (any depth, all of one size), an .npz of pictures (`arr_0`, uint8, (N, H, W, 3)), a
reference file of ADM's evaluator (stored moments and pictures), or saved statistics. Out come the numbers and the
protocol that they were made with; the convention (inception.py) is part of a number.

Letters: B batch, N pictures, D features, H W pixels.
"""

import contextlib
import math
import os
import struct
import sys
import zipfile
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.nn import functional as F
from tqdm import tqdm

import runtime
from data import BadPictures, PictureFolder, evaluation_batches, opened
from inception import (
    CONVENTIONS,
    INCEPTION_FILE,
    InceptionV3,  # noqa: F401 (callers look for it here)
    load_inception,
    weights_in_words,
)
from runtime import UserError

# ----------------------------------------------------------------------------------------------------------------------
# Numbers from features


def exact_device():
    """Where float64 linear algebra runs: CUDA where there is some (other accelerators lack it), else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def float64(*arrays):
    return [torch.as_tensor(array).to(exact_device(), torch.float64) for array in arrays]


def frechet_distance(mu1, sigma1, mu2, sigma2):
    """Squared Frechet (2-Wasserstein) distance of two Gaussians: |mu1 - mu2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)).

    mu: (D,) means; sigma: (D, D) covariances, of any rank; arrays or tensors, computed in float64. Returns a float >=
    0. With S1 = A A^T and S2 = B B^T the trace of the root is the sum of the singular values of A^T B, which are the
    square roots of the eigenvalues of S1^(1/2) S2 S1^(1/2). Nothing is squared on the way, nothing is added to a
    diagonal, so it holds at full precision for covariances of few samples too. Raises UserError for input that is not
    finite, or overflows.
    """
    mu1, sigma1, mu2, sigma2 = float64(mu1, sigma1, mu2, sigma2)
    for array in (mu1, sigma1, mu2, sigma2):
        if not (array.abs() < 1e100).all():
            raise UserError("the statistics hold values that are not finite, or huge: no Frechet distance")

    def factor(sigma):  # (D, D) -> (D, rank), A with A A^T = sigma
        values, vectors = torch.linalg.eigh((sigma + sigma.T) / 2)
        kept = values > values.max() * len(values) * torch.finfo(values.dtype).eps  # the rest is rounding
        return vectors[:, kept] * values[kept].sqrt()

    root_trace = torch.linalg.svdvals(factor(sigma1).T @ factor(sigma2)).sum()
    distance = (mu1 - mu2).square().sum() + sigma1.trace() + sigma2.trace() - 2 * root_trace
    return max(distance.item(), 0.0)  # equal sets come out as rounding of either sign


def inception_score(probabilities, split_size=5000):
    """Inception Score, (mean, standard deviation) over consecutive splits of `split_size` pictures.

    probabilities: (N, classes), each row summing to one. A split's score is exp(mean over its pictures of KL(p(y|x) ||
    p(y))), p(y) the split's mean; a short last split counts as one. Pictures sorted by class give a wrong, far too
    small score. Source: ADM's evaluator.
    """
    (p,) = float64(probabilities)
    scores = []
    for split in p.split(split_size):
        divergence = torch.xlogy(split, split).sum(1) - torch.xlogy(split, split.mean(0)).sum(1)
        scores.append(divergence.mean().exp())
    scores = torch.stack(scores)
    return scores.mean().item(), scores.std(correction=0).item()


def precision_recall(reference, generated, k=3):
    """Improved precision and recall (arXiv 1904.06991) of features (N, D) and (M, D), as two floats in [0, 1].

    Each set's manifold is the union of balls around its points, reaching to the k-th nearest other point. Precision:
    share of generated points in the reference's manifold; recall: the reverse. A ball holds its rim. Memory stays
    within about 1 GiB besides the features. Raises UserError for a set of k points or fewer.
    """
    reference, generated = float64(reference, generated)
    radii_reference, radii_generated = (neighbour_radii(points, k) for points in (reference, generated))
    precise = torch.zeros(len(generated), dtype=torch.bool, device=generated.device)
    recalled = torch.zeros(len(reference), dtype=torch.bool, device=reference.device)
    for rows, distances, slack in distance_blocks(reference, generated):
        distances -= slack  # equal distances must compare as equal, though both are rounded
        precise |= (distances <= radii_reference[rows, None]).any(0)
        recalled[rows] = (distances <= radii_generated).any(1)
    return precise.double().mean().item(), recalled.double().mean().item()


def neighbour_radii(points, k):
    """Squared distance of each point to its k-th nearest other point, (N, D) -> (N,)."""
    if len(points) <= k:
        raise UserError(f"precision and recall need more than {k} pictures a set, not {len(points)}")
    radii = [
        # The point itself is among the k + 1 smallest, at distance zero.
        distances.topk(k + 1, largest=False).values[:, -1]
        for _, distances, _ in distance_blocks(points, points)
    ]
    return torch.cat(radii)


def distance_blocks(points, others, block_numbers=2**25):
    """Squared distances of (N, D) to (M, D), a block of rows at a time: yields (slice of rows, (n, M) distances, (n, M)
    bound on the rounding error of comparing two such distances)."""
    # |a - b|^2 = |a|^2 + |b|^2 - 2 a.b leaves an error of at most about D eps (|a|^2 + |b|^2) for each distance.
    norms, other_norms = points.square().sum(1), others.square().sum(1)
    relative_error = 4 * points.shape[1] * torch.finfo(points.dtype).eps
    step = max(1, block_numbers // len(others))
    for start in range(0, len(points), step):
        rows = slice(start, start + step)
        size = norms[rows, None] + other_norms
        yield rows, torch.addmm(size, points[rows], others.T, alpha=-2), size * relative_error


# ----------------------------------------------------------------------------------------------------------------------
# Numbers from pairs of pictures


def psnr(images, others):
    """Peak signal-to-noise ratio of each pair, in dB: two (B, C, H, W) uint8 -> (B,) float64; infinite where equal."""
    error = ((images.double() - others.double()) / 255).square().flatten(1).mean(1)
    return -10 * error.log10()


def ssim(images, others):
    """Structural similarity of each pair, data range 1: two (B, C, H, W) uint8 -> (B,) float64.

    Uniform 7x7 window, sample covariances, K1 = 0.01, K2 = 0.03, mean over channels and over the windows that lie
    inside the picture; the default of scikit-image. Raises UserError for pictures smaller than the window.
    """
    if min(images.shape[2:]) < 7:
        raise UserError(f"SSIM needs pictures of at least 7x7, not {images.shape[2]}x{images.shape[3]}")
    x, y = images.double() / 255, others.double() / 255
    sample = 49 / 48

    def window_mean(values):
        return F.avg_pool2d(values, 7, stride=1)

    mean_x, mean_y = window_mean(x), window_mean(y)
    var_x = sample * (window_mean(x * x) - mean_x**2)
    var_y = sample * (window_mean(y * y) - mean_y**2)
    covariance = sample * (window_mean(x * y) - mean_x * mean_y)
    c1, c2 = 0.01**2, 0.03**2
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    structure = (2 * covariance + c2) / (var_x + var_y + c2)
    return (luminance * structure).flatten(1).mean(1)


# ----------------------------------------------------------------------------------------------------------------------
# Sums over batches and ranks


class Moments:
    """Mean and covariance of features that arrive in batches, in float64.

    Batches and ranks are merged by their means and scatters (Chan, Golub, LeVeque 1979): no large sums are subtracted,
    so the result does not depend on how the pictures were dealt out.
    """

    def __init__(self, width):
        self.count = 0
        self.mean = torch.zeros(width, dtype=torch.float64, device=exact_device())
        self.scatter = torch.zeros(width, width, dtype=torch.float64, device=exact_device())

    def add(self, features):
        """Take in features (B, D), B > 0."""
        (features,) = float64(features)
        mean = features.mean(0)
        if not mean.isfinite().all():
            raise UserError("Inception's features are not finite: see to its weights")
        centred, step = features - mean, mean - self.mean
        total = self.count + len(features)
        self.scatter += centred.T @ centred + torch.outer(step, step) * (self.count * len(features) / total)
        self.mean += step * (len(features) / total)
        self.count = total

    def over_ranks(self, rt):
        """(mean (D,), sample covariance (D, D)) of all ranks' features, on every rank, as NumPy arrays."""
        (total,) = rt.reduce([self.count])
        if total < 2:
            raise UserError(f"a covariance needs at least two pictures, not {total:.0f}")
        mean, scatter = self.mean.cpu(), self.scatter.cpu()
        if rt.world > 1:
            common = mean * (self.count / total)
            dist.all_reduce(common, group=rt.control)
            scatter += torch.outer(mean - common, mean - common) * self.count
            dist.all_reduce(scatter, group=rt.control)
            mean = common
        return mean.numpy(), (scatter / (total - 1)).numpy()


def gather_rows(rt, parts, width):
    """All ranks' rows, in the order of ranks, as one (N, width) tensor on the main process; None on the others. parts:
    this rank's list of (n, width) tensors, perhaps empty."""
    rows = torch.cat([torch.zeros(0, width), *(part.cpu() for part in parts)])
    if rows.isnan().any():
        raise UserError("what was computed of the pictures is not finite: see to the weights")
    if rt.world == 1:
        return rows
    shares = [None] * rt.world if rt.main else None
    dist.gather_object(rows.numpy(), shares, group=rt.control)
    return torch.from_numpy(np.concatenate(shares)) if rt.main else None


def progress(rt, dataset, batch, workers, words):
    """This rank's batches of a dataset (see `data.evaluation_batches`), with a progress bar on the main process."""
    batches = evaluation_batches(dataset, batch, rt.rank, rt.world, workers)
    steps = math.ceil(math.ceil(len(dataset) / rt.world) / batch)
    return tqdm(batches, words, steps, disable=not (rt.main and sys.stderr.isatty()), dynamic_ncols=True)


# ----------------------------------------------------------------------------------------------------------------------
# Sets of pictures


class FolderPictures(PictureFolder):
    """The pictures below a folder as they are, all of one size: `pictures[epoch, index]`, as `data.open_pictures` has
    it."""

    shape = None  # (H, W)

    def __init__(self, rt, folder):
        super().__init__(folder, size=None, labelled=False)
        # All sizes before any work: headers only, dealt out over the ranks.
        for index in [self.first_readable, *range(rt.rank, len(self), rt.world)]:
            shape = None
            with contextlib.suppress(Exception), opened(self.source / self.name(index)) as picture:
                shape = picture.size[::-1]  # of an unreadable one: None; it is counted when its turn comes
            if self.shape is None:
                self.shape, first = shape, self.name(index)
            if shape not in (None, self.shape):
                raise UserError(
                    f"the pictures in {folder} differ in size: {first} is {in_words(self.shape)}, "
                    f"{self.name(index)} is {in_words(shape)}; bring them to one size"
                )


class NpzPictures:
    """The pictures `arr_0` (N, H, W, 3) of an .npz, read from the disk one by one as `pictures[epoch, index]`."""

    def __init__(self, path):
        self.source, self.array = path, npz_array(path, "arr_0")
        if self.array.dtype != np.uint8:
            raise UserError(f"arr_0 of {path} is {self.array.dtype}; pictures must be uint8, 0..255")
        if self.array.ndim != 4 or self.array.shape[3] != 3 or 0 in self.array.shape:
            raise UserError(f"arr_0 of {path} has shape {self.array.shape}, not (N, height, width, 3)")
        self.shape = self.array.shape[1:3]

    def __len__(self):
        return len(self.array)

    def name(self, index):
        return f"picture {index}"

    def __getitem__(self, entry):
        return torch.from_numpy(np.array(self.array[entry[1]])).permute(2, 0, 1), 0


def npz_array(path, name, shape=None):
    """An array of an .npz: a memory map where it is stored plainly (np.savez), so that ten gigabytes of pictures need
    no memory; else (np.savez_compressed) in memory. Nothing is unpacked of one that is not of `shape` (None in it:
    any), or that is longer than its header and deflate allow."""
    with zipfile.ZipFile(path) as archive, open(path, "rb") as plain:
        entry = archive.getinfo(f"{name}.npy")
        with archive.open(entry) as file:
            old = np.lib.format.read_magic(file) == (1, 0)
            header = np.lib.format.read_array_header_1_0 if old else np.lib.format.read_array_header_2_0
            found, fortran_order, dtype = header(file)
            start = file.tell()
        pairs = zip(shape or (), found)
        if shape is not None and (len(found) != len(shape) or any(s not in (None, n) for s, n in pairs)):
            raise UserError(f"{path} holds no moments of Inception: {name} of shape {shape} is missing")
        if dtype.kind not in ("U" if shape == () else "biuf") or dtype.itemsize > 1000:
            raise UserError(f"{name} of {path} is {dtype}, not {'a text' if shape == () else 'numbers'}")
        length = start + math.prod(found) * dtype.itemsize
        if length != entry.file_size or length > 1100 * min(entry.compress_size, os.path.getsize(path)):
            raise ValueError(f"{name} is not as long as its header says")
        if entry.compress_type == zipfile.ZIP_STORED and not (fortran_order or shape or 0 in found):
            plain.seek(entry.header_offset + 26)  # the entry's own header: 30 bytes, then its name and extras
            start += entry.header_offset + 30 + sum(struct.unpack("<HH", plain.read(4)))
            return np.memmap(path, dtype, "r", start, found)
        with archive.open(entry) as file:
            return np.lib.format.read_array(file, allow_pickle=False)


def in_words(shape):
    return f"{shape[1]}x{shape[0]}"  # width x height


# Arrays of statistics files, and their shapes
STORED = {"mu": (2048,), "sigma": (2048, 2048), "mu_s": (2023,), "sigma_s": (2023, 2023)}
STORED |= {"pool": (None, 2048), "size": (2,), "convention": (), "inception": ()}


class PictureSet:
    """What a path holds: a folder of pictures, or an .npz of pictures, of statistics, or of both.

    `pictures` to measure, or None. Statistics, each None until known: `pool` and `spatial`, (mean, covariance);
    `features` (N, 2048), on the main process; `count` of the pictures behind the moments; their `shape` (H, W); the
    `convention` and the SHA-256 of the `inception` weights behind them. `words`: what they are, for the protocol.
    Opening reads no picture yet, and raises UserError where the path is none of these.
    """

    def __init__(self, rt, path):
        self.path, self.words, self.warnings, self.pictures = path, [], [], None
        self.pool = self.spatial = self.features = None
        self.count = self.shape = self.convention = self.inception = None
        if os.path.isdir(path):
            self.pictures = FolderPictures(rt, path)
            return
        with runtime.reading(path, "an .npz of pictures or statistics"):
            with zipfile.ZipFile(path) as archive:
                names = [name.removesuffix(".npy") for name in archive.namelist()]
            if "arr_0" in names:
                self.pictures = NpzPictures(path)
            if "mu" in names:
                wanted = [name for name in STORED if name in names or name.replace("sigma", "mu") in names]
                self._take({name: npz_array(path, name, STORED[name]) for name in wanted})
            elif self.pictures is None:
                raise UserError(f"{path} has neither pictures (arr_0) nor moments (mu, sigma), but {names[:9]}")

    def _take(self, stored):
        """Statistics of this project, of ADM's reference files, or of pytorch-fid."""
        for name, array in stored.items():
            if array.dtype.kind != "U":
                stored[name] = array = array.astype(np.float32 if name == "pool" else np.float64)
                if not np.isfinite(array).all():
                    raise UserError(f"{self.path}: {name} holds values that are not finite")
        self.pool = stored["mu"], stored["sigma"]
        if "mu_s" in stored:
            self.spatial = stored["mu_s"], stored["sigma_s"]
        # Files of others do not name the convention. Spatial moments are ADM's; no others tell.
        self.convention = str(stored.get("convention", "tf1" if self.spatial else "")) or None
        self.inception = str(stored.get("inception", "")) or None
        self.words.append("stored moments")
        if "pool" in stored:
            self.features = torch.from_numpy(stored["pool"])
            self.shape, self.count = tuple(map(int, stored["size"])), len(self.features)
            self.words.append(f"stored features of {self.count} pictures {in_words(self.shape)}")

    def check(self, convention, sha256):
        """Raise UserError where the stored statistics are not of this convention and these Inception weights; warn
        where they do not say."""
        if self.pool and self.convention is None:
            self.warnings.append(
                f"{self.path} does not say the convention of its statistics; {convention} was taken for it"
            )
        if self.convention not in (None, convention):
            raise UserError(
                f"{self.path} holds statistics made with --convention {self.convention}, not {convention}; "
                f"give that, or the pictures"
            )
        if self.inception not in (None, sha256):
            raise UserError(f"{self.path} holds statistics made with other Inception weights; make them anew")

    def measure(self, rt, model, convention, batch, workers):
        """Fill in what is not stored, from the pictures, all ranks working."""
        if self.pictures is None:
            return
        bad, features, of_pool, of_space = BadPictures(self.pictures), [], Moments(2048), Moments(2023)
        workers = workers if isinstance(self.pictures, FolderPictures) else 0  # an .npz needs no decoding
        for part in progress(rt, self.pictures, batch, workers, str(self.path)):
            bad.add(part.unreadable)
            if len(part.images):
                pool, spatial, _ = model(part.images.to(rt.device), convention)
                features.append(pool.cpu())
                if self.pool is None:
                    of_pool.add(pool)
                    of_space.add(spatial)
        left_out = int(rt.reduce([bad.count])[0])
        bad.check(left_out)
        self.features, self.shape = gather_rows(rt, features, 2048), tuple(self.pictures.shape)
        count = len(self.pictures) - left_out
        self.words.append(f"{count} pictures {in_words(self.shape)}")
        if left_out:
            self.words.append(f"{left_out} unreadable ones left out")
        if self.pool is None:
            self.pool, self.spatial, self.count = of_pool.over_ranks(rt), of_space.over_ranks(rt), count
        else:
            self.words[-1] += " for precision, recall and IS"

    def save(self, path, convention, sha256):
        """Write an .npz that stands in for the set: moments under ADM's names, and the pool features (8 KiB a picture),
        which precision, recall and IS need."""
        arrays = {"mu": self.pool[0], "sigma": self.pool[1], "mu_s": self.spatial[0], "sigma_s": self.spatial[1]}
        arrays |= {"pool": self.features.numpy(), "size": np.array(self.shape)}
        with runtime.replacing(path) as file:
            np.savez(file, **arrays, convention=convention, inception=sha256)


# ----------------------------------------------------------------------------------------------------------------------
# The command


def compare(reference, samples, classifier):
    """All numbers of two measured `PictureSet`s: {name: value, or a sentence why there is none}, and warnings.
    classifier: Inception's last weight matrix (1008, 2048)."""
    numbers, warnings = {"FID": frechet_distance(*reference.pool, *samples.pool)}, []
    warnings += reference.warnings + samples.warnings
    moments_only = "not computed ({} moments only)"
    if reference.spatial and samples.spatial:
        numbers["sFID"] = frechet_distance(*reference.spatial, *samples.spatial)
    else:
        numbers["sFID"] = "not computed (a file without spatial moments)"
    if samples.features is None:
        numbers["IS"] = moments_only.format("the samples are")
    else:
        features, weight = float64(samples.features, classifier)
        probabilities = (features @ weight.T).softmax(1)  # (N, 2048) -> (N, 1008)
        numbers["IS"], numbers["IS deviation"] = inception_score(probabilities)
        numbers["IS splits"] = math.ceil(len(features) / 5000)
        if len(features) > 5000 and len(features) % 5000:
            warnings.append(
                f"the last split of IS has {len(features) % 5000} pictures, not 5000, which makes IS too small: "
                f"take a multiple of 5000"
            )
        del features, probabilities
    if samples.features is None or reference.features is None:
        numbers["precision"] = numbers["recall"] = moments_only.format("one set is")
    else:
        numbers["precision"], numbers["recall"] = precision_recall(reference.features, samples.features)
    for name, pictures in (("reference has", reference), ("samples are", samples)):
        if pictures.count is not None and pictures.count < 2048:
            warnings.append(
                f"the {name} {pictures.count} pictures: below 2048 FID and sFID are biased upwards, so compare them "
                f"only with numbers from the same counts"
            )
    if None not in (reference.shape, samples.shape) and reference.shape != samples.shape:
        warnings.append("the reference and the samples differ in picture size")
    for name, value in numbers.items():
        if not isinstance(value, str) and not math.isfinite(value):
            raise UserError(f"{name} is {value}: the features or Inception's weights hold huge values")
    return numbers, warnings


def check_writable(*paths):
    """Raise UserError now, not after an hour, where a file could not be written."""
    for path in filter(None, paths):
        folder = Path(path).absolute().parent
        if Path(path).exists() and not Path(path).is_file():
            raise UserError(f"cannot write {path}: it is a folder or a device")
        if not (folder.is_dir() and os.access(folder, os.W_OK)):
            raise UserError(f"cannot write {path}: its folder does not exist or is read-only")


def parse(argv=None):
    arguments = runtime.parser(
        "FID, sFID, IS, precision and recall of two sets of pictures, with the protocol behind them.",
        "  python fid.py VIRTUAL_imagenet256_labeled.npz samples.npz\n"
        "  torchrun --nproc_per_node=8 fid.py imagenet/val samples --convention half-pixel --json fid.json",
    )
    arguments.add_argument("reference", help="folder, .npz of pictures, ADM reference file, or saved statistics")
    arguments.add_argument("samples", nargs="?", help="the same; left out: --save-stats only")
    add = arguments.add_argument_group("protocol").add_argument
    add(
        "--convention",
        default="tf1",
        choices=CONVENTIONS,
        help="how Inception sees a picture: tf1 as ADM's evaluator and torch-fidelity, half-pixel as pytorch-fid",
    )
    add("--inception", help=f"weights file, {INCEPTION_FILE} (default: torch's hub cache, or downloaded)")
    add = arguments.add_argument_group("output").add_argument
    add("--save-stats", help="write the reference's statistics to this .npz, for use in its place")
    add("--json", help="write numbers, protocol and warnings to this file")
    add = arguments.add_argument_group("speed (changes no number)").add_argument
    add("--batch", type=runtime.at_least(1), default=64, help="pictures a device at once")
    add("--workers", type=runtime.at_least(0), default=2, help="loader processes per device")
    args = arguments.parse_args(argv)
    if not (args.samples or args.save_stats):
        arguments.error("give the samples too, or --save-stats")
    return args


def main():
    args = parse()
    rt = runtime.start()
    check_writable(args.json, args.save_stats)

    # Open everything before any work, the reference first: a wrong path fails at once.
    reference = PictureSet(rt, args.reference)
    sets = [reference, PictureSet(rt, args.samples)] if args.samples else [reference]
    if args.save_stats and reference.pictures is None:
        raise UserError(f"{args.reference} holds no pictures, only statistics: nothing to save for --save-stats")
    model, sha256 = load_inception(args.inception)
    for pictures in sets:
        pictures.check(args.convention, sha256)

    model.to(rt.device)
    for pictures in sets:
        pictures.measure(rt, model, args.convention, args.batch, args.workers)
    if not rt.main:
        return
    if args.save_stats:
        reference.save(args.save_stats, args.convention, sha256)
    numbers, warnings = compare(*sets, model.fc.weight) if args.samples else ({}, [])

    note = {"tf1": "as ADM's evaluator", "half-pixel": "FID as pytorch-fid; nobody publishes the others so"}
    protocol = {
        name: f"{pictures.path}: {', '.join(pictures.words)}" for name, pictures in zip(("reference", "samples"), sets)
    }
    protocol["convention"] = f"{args.convention} ({note[args.convention]})"
    protocol["inception"] = weights_in_words(sha256)
    protocol["device"] = f"{rt.device.type} x {rt.world}, torch {torch.__version__}"
    for name in ("FID", "sFID", "IS", "precision", "recall") if numbers else ():
        words = numbers[name] if isinstance(numbers[name], str) else f"{numbers[name]:.4f}"
        if name == "IS" and "IS deviation" in numbers:
            words += f" +- {numbers['IS deviation']:.4f} over {numbers['IS splits']} split(s) of 5000"
        rt.say(f"{name:<12} {words}")
    for name, words in protocol.items():
        rt.say(f"  {name:<10} {words}")
    for words in warnings:
        rt.say(f"warning: {words}")
    if args.json:
        runtime.write_json(args.json, numbers | {"protocol": protocol, "warnings": warnings})


if __name__ == "__main__":
    runtime.run_script(main)
