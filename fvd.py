"""Frechet Video Distance (FVD, arXiv 1812.01717): the Frechet distance of two sets of clips, by I3D's logits.

    python fvd.py REFERENCE SAMPLES --i3d i3d_pretrained_400.pt
    torchrun --nproc_per_node=8 fvd.py REFERENCE SAMPLES       # every device takes a share

A set is an .npz of clips (`arr_0`, uint8, (N, T, H, W, 3)) or a folder of videos (clips.py), of one T, H, W. Out come
FVD, in float64 and as published in float32, and the protocol. The bias falls with the count of clips: quote it too.

Letters: B batch, N clips, D features, C channels, T frames, H W pixels."""

from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

import runtime
from checkpoint import load_network
from clips import open_clips
from fid import NpzPictures, frechet_distance, gather_rows, moments, readable_batches, report
from runtime import UserError, at_least, exact_float32

I3D_FILE = "i3d_pretrained_400.pt"


# --- I3D (arXiv 1705.07750), as VideoGPT and TATS use it --------------------------------------------------------------
def same(x, kernel, stride):
    """Pads x (B, C, T, H, W) with zeros so that a window leaves size / stride, rounded up; an odd zero goes behind."""
    padding = []
    for size, k, s in zip(x.shape[:1:-1], kernel[::-1], stride[::-1]):  # F.pad begins with the last axis
        total = max(k - (size % s or s), 0)
        padding += [total // 2, total - total // 2]
    return F.pad(x, padding)


def max_pool(x, kernel, stride):
    return F.max_pool3d(same(x, kernel, stride), kernel, stride)


class Unit(nn.Module):
    """Convolution (no bias), BatchNorm, ReLU. (Names: the released file's.)"""

    def __init__(self, c_in, c_out, kernel=1, stride=1):
        super().__init__()
        self.conv3d = nn.Conv3d(c_in, c_out, kernel, stride, bias=False)
        self.bn = nn.BatchNorm3d(c_out)

    def forward(self, x):
        return F.relu(self.bn(self.conv3d(same(x, self.conv3d.kernel_size, self.conv3d.stride))), inplace=True)


class Mixed(nn.Module):
    """Four branches side by side on one input, their channels concatenated; T, H, W stay."""

    def __init__(self, c_in, b0, b1a, b1b, b2a, b2b, b3b):
        super().__init__()
        self.b0, self.b3b = Unit(c_in, b0), Unit(c_in, b3b)
        self.b1a, self.b1b = Unit(c_in, b1a), Unit(b1a, b1b, 3)
        self.b2a, self.b2b = Unit(c_in, b2a), Unit(b2a, b2b, 3)

    def forward(self, x):
        pooled = max_pool(x, (3, 3, 3), (1, 1, 1))
        return torch.cat([self.b0(x), self.b1b(self.b1a(x)), self.b2b(self.b2a(x)), self.b3b(pooled)], 1)


class I3D(nn.Module):
    """The network behind FVD, frozen: clips (B, 3, T, 224, 224) in [-1, 1] -> logits (B, 400), in float32 without TF32
    and without autocast. T >= 9: the last pool takes two frames. Entries are those of `I3D_FILE`."""

    def __init__(self):
        super().__init__()
        self.Conv3d_1a_7x7 = Unit(3, 64, 7, stride=2)
        self.Conv3d_2b_1x1 = Unit(64, 64)
        self.Conv3d_2c_3x3 = Unit(64, 192, 3)
        self.Mixed_3b = Mixed(192, 64, 96, 128, 16, 32, 32)
        self.Mixed_3c = Mixed(256, 128, 128, 192, 32, 96, 64)
        self.Mixed_4b = Mixed(480, 192, 96, 208, 16, 48, 64)
        self.Mixed_4c = Mixed(512, 160, 112, 224, 24, 64, 64)
        self.Mixed_4d = Mixed(512, 128, 128, 256, 24, 64, 64)
        self.Mixed_4e = Mixed(512, 112, 144, 288, 32, 64, 64)
        self.Mixed_4f = Mixed(528, 256, 160, 320, 32, 128, 128)
        self.Mixed_5b = Mixed(832, 256, 160, 320, 32, 128, 128)
        self.Mixed_5c = Mixed(832, 384, 192, 384, 48, 128, 128)
        self.logits = nn.ModuleDict({"conv3d": nn.Conv3d(1024, 400, 1)})
        self.eval().requires_grad_(False)

    @torch.no_grad()
    def forward(self, clips):
        with exact_float32(clips.device):  # shapes: of 17 frames
            x = max_pool(self.Conv3d_1a_7x7(clips), (1, 3, 3), (1, 2, 2))  # (B, 64, 9, 56, 56)
            x = max_pool(self.Conv3d_2c_3x3(self.Conv3d_2b_1x1(x)), (1, 3, 3), (1, 2, 2))  # (B, 192, 9, 28, 28)
            x = max_pool(self.Mixed_3c(self.Mixed_3b(x)), (3, 3, 3), (2, 2, 2))  # (B, 480, 5, 14, 14)
            x = self.Mixed_4f(self.Mixed_4e(self.Mixed_4d(self.Mixed_4c(self.Mixed_4b(x)))))  # (B, 832, 5, 14, 14)
            x = self.Mixed_5c(self.Mixed_5b(max_pool(x, (2, 2, 2), (2, 2, 2))))  # (B, 1024, 3, 7, 7)
            x = self.logits["conv3d"](F.avg_pool3d(x, (2, 7, 7), stride=1))  # (B, 400, 2, 1, 1)
            return x.mean((2, 3, 4))


def features(i3d, clips):
    """I3D's logits (B, 400) of clips as they are on file: uint8 (B, 3, T, H, W), any H, W, T >= 9."""
    frames = clips.movedim(2, 1).flatten(0, 1).float()  # (B*T, 3, H, W)
    frames = F.interpolate(frames, (224, 224), mode="bilinear", align_corners=False, antialias=False)
    return i3d((2 * frames / 255 - 1).unflatten(0, (len(clips), -1)).movedim(1, 2))


def load_i3d(path=None):
    """(I3D with weights, SHA-256 of the file) from `path`, or from torch's hub cache; UserError if it is not there."""
    cached = Path(torch.hub.get_dir(), "checkpoints", I3D_FILE)
    if not path and not cached.exists():
        raise UserError(f"there is no {cached}: put VideoGPT's file (piergiaj's I3D) there, or give --i3d FILE")
    return load_network(I3D(), path or cached, f"the I3D network ({I3D_FILE})")


# --- The distance -----------------------------------------------------------------------------------------------------
def frechet_video_distance(a, b):
    """FVD of two sets' features, (N, D) and (M, D), in float64; UserError for one clip, or what is not finite."""
    return frechet_distance(*moments(torch.as_tensor(a, device="cpu")), *moments(torch.as_tensor(b, device="cpu")))


def published_distance(a, b):
    """FVD as published numbers are computed: in float32, with matrix roots by SVD, where a singular value below 1e-10
    stays as it is. Where a covariance is nearly singular, it moves by a percent with the order of the clips."""

    def root(matrix):
        if not matrix.isfinite().all():
            raise UserError("the features are too large for the published FVD: see to the weights")
        u, s, vh = torch.linalg.svd(matrix)
        return u @ torch.where(s < 1e-10, s, s.sqrt()).diag() @ vh

    a, b = (torch.as_tensor(x, dtype=torch.float32, device="cpu") for x in (a, b))
    centred = a - a.mean(0), b - b.mean(0)
    sigma1, sigma2 = (1 / (len(x) - 1) * (x.T @ x) for x in centred)  # in the published order, for the last bits
    root_trace = root(root(sigma1) @ (sigma2 @ root(sigma1))).trace()
    return ((sigma1 + sigma2).trace() - 2 * root_trace + (a.mean(0) - b.mean(0)).square().sum()).item()


# --- The command ------------------------------------------------------------------------------------------------------
def open_set(path, frames=17, size=128):
    """The clips at `path`, not yet read; of a folder's videos the `frames` in the middle, `size` x `size`. A dataset of
    uint8 (3, T, H, W) with a `shape` (T, H, W), and `words` for the protocol."""
    if Path(path).is_dir():
        clips = open_clips(path, size, frames, labelled=False)
    else:
        with runtime.reading(path, "an .npz of clips"):
            clips = NpzPictures(path, "clips", ("frames", "height", "width"))
    clips.words = f"{len(clips)} clips of {'x'.join(map(str, clips.shape))}"
    if len(clips) < 2 or clips.shape[0] < 9:
        raise UserError(f"{path} has {clips.words}; FVD takes 2 clips or more, of 9 frames or more")
    return clips


def parse(argv=None):
    arguments = runtime.parser(__doc__)
    add = arguments.add_argument
    add("reference", help=".npz of clips, or a folder of videos")
    add("samples", help="the same")
    add("--frames", type=at_least(9), default=17, help="of a folder's clips, the videos' middle")
    add("--size", type=at_least(1), default=128, help="side of a folder's clips, pixels")
    add("--i3d", help=f"weights file, {I3D_FILE} (default: the one in torch's hub cache)")
    add("--json", type=runtime.new_file, help="write numbers, protocol and warnings to this file")
    add("--batch", type=at_least(1), default=16, help="clips a device at once; changes no number")
    add("--workers", type=at_least(0), default=2, help="loader processes per device, for folders; changes no number")
    return arguments.parse_args(argv)


def main():
    args = parse()
    rt = runtime.start()
    sets = [open_set(path, args.frames, args.size) for path in (args.reference, args.samples)]
    if sets[0].shape != sets[1].shape:
        raise UserError("{0.source} has {0.words}, {1.source} {1.words}: bring them to one shape".format(*sets))
    i3d, sha256 = load_i3d(args.i3d)
    i3d.to(rt.device)
    logits = []
    for clips in sets:
        batches = readable_batches(rt, clips, args.batch, 0 if isinstance(clips, NpzPictures) else args.workers)
        logits.append(gather_rows(rt, [features(i3d, batch.images.to(rt.device)) for batch in batches], 400))
    if not rt.main:
        return
    numbers = {"FVD": frechet_video_distance(*logits), "FVD published": published_distance(*logits)}
    names = [f"{clips.source}: {clips.words}, {len(clips) - len(rows)} unreadable" for clips, rows in zip(sets, logits)]
    protocol = dict(zip(("reference", "samples"), names))
    protocol["I3D"] = f"SHA-256 {sha256}; frames resized to 224x224, bilinear, without antialias"
    protocol["device"] = f"{rt.device.type} x {rt.world}, torch {torch.__version__}"
    biased = "below 2048 FVD is biased upwards, so compare it only with numbers from the same counts"
    warnings = [f"{clips.source} has {len(clips)} clips: {biased}" for clips in sets if len(clips) < 2048]
    notes = {"FVD": "float64", "FVD published": "float32, as published numbers are"}
    report(rt, numbers, notes, protocol, warnings, args.json)


if __name__ == "__main__":
    runtime.run_script(main)
