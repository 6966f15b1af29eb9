"""Frechet Inception Distance (FID) and what is reported beside it: sFID, IS, precision and recall; PSNR and SSIM.

    python fid.py REFERENCE SAMPLES                            # the published generation numbers (ADM's protocol)
    python fid.py REFERENCE SAMPLES --convention half-pixel    # FID as pytorch-fid computes it
    python fid.py REFERENCE --save-stats reference.npz         # measure a set once; use the file in its place
    torchrun --nproc_per_node=8 fid.py REFERENCE SAMPLES       # every device takes a share

A set is a folder of pictures (any depth, all of one size), an .npz of pictures (`arr_0`, uint8, (N, H, W, 3)), a
reference file of ADM's evaluator (stored moments and pictures), or saved statistics. Out come the numbers and their
protocol, of which the convention (inception.py) is part.

Letters: B batch, N pictures, D features, H W pixels."""

import contextlib
import math
import os
import struct
import zipfile

import numpy as np
import scipy.linalg
import torch
import torch.distributed as dist
from torch import nn
from tqdm import tqdm

import runtime
from data import BadPictures, PictureFolder, evaluation_batches, opened
from inception import CONVENTIONS, INCEPTION_FILE, InceptionV3, load_inception, weights_in_words  # noqa: F401
from runtime import UserError, at_least


def frechet_distance(mu1, sigma1, mu2, sigma2):
    """FID, from the means and covariances of features: the squared Frechet (2-Wasserstein) distance of two Gaussians,
    |mu1 - mu2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)).
    mu: (D,); sigma: (D, D), of any rank; arrays or tensors. In float64. Raises UserError for what is not finite."""
    mu1, sigma1, mu2, sigma2 = float64(mu1, sigma1, mu2, sigma2)
    if not all((array.abs() < 1e100).all() for array in (mu1, sigma1, mu2, sigma2)):
        raise UserError("the statistics hold values that are not finite, or huge: no Frechet distance")

    def factor(sigma):  # (D, D) -> (D, rank), A with A A^T = sigma
        # SciPy's: torch's gives up on some matrices that have one eigenvalue many times.
        values, vectors = float64(*scipy.linalg.eigh(((sigma + sigma.T) / 2).cpu()))
        positive = values > values.max() * len(values) * torch.finfo(values.dtype).eps  # the rest is rounding
        return vectors[:, positive] * values[positive].sqrt()

    # With S1 = A A^T and S2 = B B^T, the singular values of A^T B are the square roots of the eigenvalues of
    # S1^(1/2) S2 S1^(1/2). Nothing is squared, nothing added to a diagonal: exact for covariances of few samples too.
    root_trace = torch.linalg.svdvals(factor(sigma1).T @ factor(sigma2)).sum()
    distance = (mu1 - mu2).square().sum() + sigma1.trace() + sigma2.trace() - 2 * root_trace
    return max(distance.item(), 0.0)  # equal sets come out as rounding of either sign


def float64(*arrays):
    """As float64 tensors on CUDA where there is some, else on the CPU: other accelerators lack float64."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return [torch.as_tensor(array).to(device, torch.float64) for array in arrays]


def inception_score(probabilities, split_size=5000):
    """Inception Score, (mean, standard deviation) over consecutive splits of `split_size` pictures.
    probabilities: (N, classes), each row summing to one. A split's score is exp(mean over its pictures of KL(p(y|x) ||
    p(y))), p(y) the split's mean; a short last split counts as one. Pictures sorted by class make it too small."""
    scores = []
    for split in float64(probabilities)[0].split(split_size):
        divergence = torch.xlogy(split, split).sum(1) - torch.xlogy(split, split.mean(0)).sum(1)
        scores.append(divergence.mean().exp())
    scores = torch.stack(scores)
    return scores.mean().item(), scores.std(correction=0).item()


def precision_recall(reference, generated, k=3):
    """Improved precision and recall (arXiv 1904.06991) of features (N, D) and (M, D), as two floats in [0, 1].
    Each set's manifold is the union of balls around its points, reaching to the k-th nearest other point. Precision:
    share of generated points in the reference's manifold; recall: the reverse. A ball holds its rim. Memory stays
    within about 1 GiB besides the features. Raises UserError for a set of k points or fewer."""
    reference, generated = float64(reference, generated)

    def radii(points):  # (N, D) -> (N,), squared; the nearest of the k + 1 points is the point itself
        if len(points) <= k:
            raise UserError(f"precision and recall need more than {k} pictures a set, not {len(points)}")
        nearest = [block.topk(k + 1, largest=False).values for _, block, _ in distance_blocks(points, points)]
        return torch.cat(nearest)[:, -1]

    radii_reference, radii_generated = radii(reference), radii(generated)
    precise, recalled = torch.zeros_like(radii_generated, dtype=torch.bool), []
    for rows, distances, slack in distance_blocks(reference, generated):
        distances -= slack  # equal distances must compare as equal, though both are rounded
        precise |= (distances <= radii_reference[rows, None]).any(0)
        recalled.append((distances <= radii_generated).any(1))
    return precise.double().mean().item(), torch.cat(recalled).double().mean().item()


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


def psnr(images, others):
    """Peak signal-to-noise ratio of each pair, in dB: two (B, C, H, W) uint8 -> (B,) float64; infinite where equal."""
    error = ((images.double() - others.double()) / 255).square().flatten(1).mean(1)
    return -10 * error.log10()


def ssim(images, others):
    """Structural similarity of each pair, data range 1: two (B, C, H, W) uint8 -> (B,) float64.
    Uniform 7x7 window, sample covariances, K1 = 0.01, K2 = 0.03, mean over channels and over the windows that lie
    inside the picture; the default of scikit-image. Raises UserError for pictures smaller than the window."""
    if min(images.shape[2:]) < 7:
        raise UserError(f"SSIM needs pictures of at least 7x7, not {images.shape[2]}x{images.shape[3]}")
    window_mean, sample = nn.AvgPool2d(7, stride=1), 49 / 48
    x, y = images.double() / 255, others.double() / 255
    mean_x, mean_y = window_mean(x), window_mean(y)
    var_x = sample * (window_mean(x * x) - mean_x**2)
    var_y = sample * (window_mean(y * y) - mean_y**2)
    covariance = sample * (window_mean(x * y) - mean_x * mean_y)
    luminance = (2 * mean_x * mean_y + 0.01**2) / (mean_x**2 + mean_y**2 + 0.01**2)
    structure = (2 * covariance + 0.03**2) / (var_x + var_y + 0.03**2)
    return (luminance * structure).flatten(1).mean(1)


# --- Sets: pictures and statistics on disk ----------------------------------------------------------------------------
# Statistics: the arrays' names on file, and their shapes
STATISTICS = {"mu": (2048,), "sigma": (2048, 2048)}  # mean and covariance of the pool features, for FID
STATISTICS |= {"mu_s": (2023,), "sigma_s": (2023, 2023)}  # and of the spatial features, for sFID
STATISTICS |= {"pool": (None, 2048), "size": (2,)}  # for IS, precision and recall: float32 features; (H, W) of pictures
STATISTICS |= {"convention": (), "inception": ()}  # texts; the second is the SHA-256 of the weights


class PictureSet:
    """What a path holds: `pictures` to measure, or None; `stats`, {name: array} of `STATISTICS`; or both (a file of
    ADM's). `count`: of how many pictures the moments are, if known. `words`: for the protocol. Opening reads no picture
    yet, and raises UserError if the path holds neither."""

    def __init__(self, rt, path):
        self.path, self.pictures, self.stats, self.count, self.words = path, None, {}, None, ""
        if os.path.isdir(path):
            self.pictures = open_folder(rt, path)
            return
        with runtime.reading(path, "an .npz of pictures or statistics"):
            with zipfile.ZipFile(path) as archive:
                names = [name.removesuffix(".npy") for name in archive.namelist()]
            if "arr_0" in names:
                self.pictures = NpzPictures(path)
            if "mu" in names:
                self.stats, self.words = load_stats(path, names), "stored moments"
            elif self.pictures is None:
                raise UserError(f"{path} has neither pictures (arr_0) nor moments (mu, sigma), but {names[:9]}")
        if "pool" in self.stats:
            self.count, (height, width) = len(self.stats["pool"]), self.stats["size"]
            self.words += f", stored features of {self.count} pictures {width}x{height}"

    def check(self, convention, sha256):
        """Raise UserError where stored statistics are not of this convention and these Inception weights."""
        found, made = self.stats.get("convention"), f"{self.path} holds statistics made with"
        if found not in (None, convention):
            raise UserError(f"{made} --convention {found}, not {convention}; give that, or the pictures")
        if self.stats.get("inception") not in (None, sha256):
            raise UserError(f"{made} other Inception weights; make them anew")


def open_folder(rt, folder):
    """The pictures in a folder, at any depth, as they are: all of one `shape` (H, W)."""
    pictures = PictureFolder(folder, size=None, labelled=False)
    names = {}  # (H, W) -> a picture's name; from all headers, before any work
    for name in map(pictures.name, range(rt.rank, len(pictures), rt.world)):
        with contextlib.suppress(Exception), opened(pictures.source / name) as picture:  # unreadable: counted later
            names.setdefault(picture.size[::-1], name)
    names = {shape: name for found in rt.gather(names) for shape, name in found.items()}
    if len(names) > 1:
        first, second = sorted(f"{name} is {width}x{height}" for (height, width), name in names.items())[:2]
        raise UserError(f"the pictures in {folder} differ in size: {first}, {second}; bring them to one size")
    (pictures.shape,) = names
    return pictures


class NpzPictures:
    """The pictures, or clips, `arr_0` (N, *axes, 3) of an .npz, read from the disk one by one as `[epoch, index]`."""

    def __init__(self, path, what="pictures", axes=("height", "width")):
        self.source, self.kind, self.array = path, what, npz_array(path, "arr_0")
        shape, kind, due = self.array.shape, self.array.dtype, f"uint8, (N, {', '.join(axes)}, 3)"
        if kind != np.uint8 or len(shape) != len(axes) + 2 or shape[-1] != 3 or 0 in shape:
            raise UserError(f"arr_0 of {path} is {kind} of shape {shape}; {what} are {due}")
        self.shape = shape[1:-1]

    def __len__(self):
        return len(self.array)

    def __getitem__(self, entry):
        return torch.from_numpy(np.array(self.array[entry[1]])).movedim(-1, 0), 0


def load_stats(path, names):
    """The statistics in an .npz with arrays of these names, of this project, of ADM's evaluator or of pytorch-fid."""
    stats = {}
    for name, shape in STATISTICS.items():
        if name not in names and {"sigma": "mu", "sigma_s": "mu_s", "size": "pool"}.get(name) not in stats:
            continue  # not there, and nothing that needs it
        array = npz_array(path, name, shape)
        if shape:
            array = array.astype(np.float32 if name == "pool" else np.float64)
            if not np.isfinite(array).all():
                raise UserError(f"{path}: {name} holds values that are not finite")
        stats[name] = array if shape else str(array)
    if "pool" in stats:
        stats["size"] = tuple(map(int, stats["size"]))
    if "mu_s" in stats:
        stats.setdefault("convention", "tf1")  # spatial moments are ADM's; files of others do not tell
    return stats


def npz_array(path, name, shape=None):
    """An array of an .npz, of `shape` where that is given (None in it: any length; (): a text). Without a shape, and
    stored plainly (np.savez), it is a memory map, so that ten gigabytes of pictures need no memory. Nothing is unpacked
    of an array of another shape, or of one longer than its header and deflate allow."""
    with zipfile.ZipFile(path) as archive, open(path, "rb") as plain:
        entry = archive.getinfo(f"{name}.npy")
        with archive.open(entry) as file:
            read_header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
            found, fortran_order, dtype = read_header[np.lib.format.read_magic(file)](file)
            start = file.tell()
        if shape is not None and (len(found) != len(shape) or any(s not in (None, n) for s, n in zip(shape, found))):
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


def moments(features):
    """Mean (D,) and sample covariance (D, D) of features (N, D), in float64, as NumPy arrays."""
    if len(features) < 2:
        raise UserError(f"a covariance needs at least two pictures or clips, not {len(features)}")
    if not features.isfinite().all():
        raise UserError("the network's features are not finite: see to its weights")
    mean, scatter = features.mean(0, dtype=torch.float64), 0
    for part in features.split(10_000):
        (centred,) = float64(part - mean)
        scatter += centred.T @ centred
    return mean.numpy(), (scatter / (len(features) - 1)).cpu().numpy()


def gather_rows(rt, parts, width):
    """All ranks' rows, in the order of ranks, as one (N, width) tensor on the main process; None on the others. parts:
    this rank's list of (n, width) tensors, perhaps empty."""
    rows = torch.cat([torch.zeros(0, width), *(part.cpu() for part in parts)])
    if any(rt.gather(rows.isnan().any().item())):  # on all ranks or none
        raise UserError("what was computed is not finite: see to the weights")
    if rt.world == 1:
        return rows
    shares = [None] * rt.world if rt.main else None
    dist.gather_object(rows.numpy(), shares, group=rt.control)
    return torch.from_numpy(np.concatenate(shares)) if rt.main else None


def readable_batches(rt, pictures, batch_size, workers):
    """This rank's `data.Batch`es of pictures that can be read, with a progress bar. UserError if over 1 % cannot."""
    bad, batches = BadPictures(pictures), evaluation_batches(pictures, batch_size, rt.rank, rt.world, workers)
    steps = math.ceil(len(pictures) / (rt.world * batch_size))
    for batch in tqdm(batches, str(pictures.source), steps, disable=None if rt.main else True, dynamic_ncols=True):
        bad.add(batch.unreadable)
        if len(batch.images):
            yield batch
    bad.check(rt.reduce([bad.count])[0])


def measure(rt, picture_set, model, args):
    """Add to a `PictureSet`, on the main process, what all ranks measure of its pictures. Stored moments stay."""
    pictures, stats, pool, spatial = picture_set.pictures, picture_set.stats, [], []
    workers = args.workers if isinstance(pictures, PictureFolder) else 0  # an .npz needs no decoding
    for batch in readable_batches(rt, pictures, args.batch, workers):
        for parts, features in zip((pool, spatial), model(batch.images.to(rt.device), args.convention)):
            parts.append(features.cpu())
    pool, spatial = gather_rows(rt, pool, 2048), gather_rows(rt, spatial, 2023)
    if not rt.main:
        return
    words = f"{len(pool)} pictures {pictures.shape[1]}x{pictures.shape[0]}"
    if unreadable := len(pictures) - len(pool):
        words += f", {unreadable} unreadable ones left out"
    if stats:
        picture_set.words += f", {words} for precision, recall and IS"
    else:
        stats["mu"], stats["sigma"] = moments(pool)
        stats["mu_s"], stats["sigma_s"] = moments(spatial)
        picture_set.words, picture_set.count, stats["convention"] = words, len(pool), args.convention
    stats["pool"], stats["size"] = pool.numpy(), pictures.shape


def compare(reference, samples, classifier):
    """({name: number, or why there is none}, warnings) of two `PictureSet`s. classifier: Inception's last weight."""
    ref, gen, warnings = reference.stats, samples.stats, []
    numbers = {"FID": frechet_distance(ref["mu"], ref["sigma"], gen["mu"], gen["sigma"])}
    numbers["sFID"] = "not computed (a file without spatial moments)"
    if "mu_s" in ref and "mu_s" in gen:
        numbers["sFID"] = frechet_distance(ref["mu_s"], ref["sigma_s"], gen["mu_s"], gen["sigma_s"])
    numbers["IS"] = "not computed (the samples are moments only)"
    if "pool" in gen:
        features, weight = float64(gen["pool"], classifier)
        # Without the layer's bias, as ADM's evaluator has it: (N, 2048) -> (N, 1008).
        numbers["IS"], numbers["IS deviation"] = inception_score((features @ weight.T).softmax(1))
        if not math.isfinite(numbers["IS"]):
            raise UserError(f"IS is {numbers['IS']}: the features or Inception's weights hold huge values")
        numbers["IS splits"], rest = math.ceil(len(features) / 5000), len(features) % 5000
        if rest and len(features) > 5000:
            warnings.append(f"the last split of IS has {rest} pictures, which makes IS too small: take 5000 each")
    numbers["precision"] = numbers["recall"] = "not computed (one set is moments only)"
    if "pool" in ref and "pool" in gen:
        numbers["precision"], numbers["recall"] = precision_recall(ref["pool"], gen["pool"])

    for each in (reference, samples):
        if "convention" not in each.stats:
            warnings.append(f"{each.path} does not say its convention; that of the protocol was taken for it")
        if each.count is not None and each.count < 2048:
            biased = "FID and sFID are biased upwards, so compare them only with numbers from the same counts"
            warnings.append(f"{each.path} has {each.count} pictures: below 2048 {biased}")
    if "size" in ref and "size" in gen and ref["size"] != gen["size"]:
        warnings.append("the reference and the samples differ in picture size")
    return numbers, warnings


def report(rt, numbers, notes, protocol, warnings=(), path=None):
    """Print {name: number, or a sentence}, each with its note, then {name: words} of the protocol, then warnings. Write
    all but the notes to `path` as JSON, if given."""
    for name, value in numbers.items():
        words = f"{value:.4f}" if isinstance(value, float) else value
        rt.say(f"{name:<15} {words}  {notes.get(name, '')}".rstrip())
    for name, words in protocol.items():
        rt.say(f"  {name:<13} {words}")
    for words in warnings:
        rt.say(f"warning: {words}")
    if path:
        runtime.write_json(path, numbers | {"protocol": protocol, "warnings": warnings})


def parse(argv=None):
    arguments = runtime.parser(__doc__)
    arguments.add_argument("reference", help="folder, .npz of pictures, ADM reference file, or saved statistics")
    arguments.add_argument("samples", nargs="?", help="the same; left out: --save-stats only")
    add = arguments.add_argument_group("protocol").add_argument
    add("--convention", default="tf1", choices=CONVENTIONS, help="resize: tf1 as ADM, half-pixel as pytorch-fid")
    add("--inception", help=f"weights file, {INCEPTION_FILE} (default: torch's hub cache, or downloaded)")
    add = arguments.add_argument_group("output").add_argument
    add(
        "--save-stats",
        type=runtime.new_file,
        help="write the reference's statistics to this .npz, for use in its place",
    )
    add("--json", type=runtime.new_file, help="write numbers, protocol and warnings to this file")
    add = arguments.add_argument_group("speed (changes no number)").add_argument
    add("--batch", type=at_least(1), default=64, help="pictures a device at once")
    add("--workers", type=at_least(0), default=2, help="loader processes per device")
    args = arguments.parse_args(argv)
    if not (args.samples or args.save_stats):
        arguments.error("give the samples too, or --save-stats")
    return args


def main():
    args = parse()
    rt = runtime.start()
    # Check and open everything before any work: a wrong path fails at once, not after an hour.
    sets = [PictureSet(rt, path) for path in (args.reference, args.samples) if path]
    if args.save_stats and sets[0].pictures is None:
        raise UserError(f"{args.reference} holds no pictures, only statistics: nothing to save for --save-stats")
    model, sha256 = load_inception(args.inception)
    for each in sets:
        each.check(args.convention, sha256)

    model.to(rt.device)
    for each in sets:
        if each.pictures:
            measure(rt, each, model, args)
    if not rt.main:
        return
    if args.save_stats:
        with runtime.replacing(args.save_stats) as file:  # moments under ADM's names, features of 8 KiB a picture
            np.savez(file, **sets[0].stats | {"convention": args.convention, "inception": sha256})
    numbers, warnings = compare(*sets, model.fc.weight) if args.samples else ({}, [])
    protocol = {name: f"{each.path}: {each.words}" for name, each in zip(("reference", "samples"), sets)}
    protocol["convention"] = f"{args.convention} ({CONVENTIONS[args.convention]})"
    protocol["inception"] = weights_in_words(sha256)
    protocol["device"] = f"{rt.device.type} x {rt.world}, torch {torch.__version__}"
    report(rt, numbers, {"IS splits": "of 5000 pictures"}, protocol, warnings, args.json)


if __name__ == "__main__":
    runtime.run_script(main)
