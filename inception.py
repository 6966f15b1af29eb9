"""The Inception network behind FID, sFID, IS, precision and recall: TensorFlow's of 2015-12-05, ported to PyTorch.

    model, sha256 = load_inception()                            # the weights that the field uses, downloaded once
    pool, spatial, logits = model(pictures, "tf1")              # uint8 (B, 3, H, W), any size

The same network sees pictures in one of two ways, which move FID by tenths, so the convention is part of any number:

- "tf1": as ADM's evaluator and torch-fidelity. All generation numbers of the paper.
- "half-pixel": as pytorch-fid. The paper's rFID.

Letters: B batch, C channels, H W pixels, h w feature map.
"""

import hashlib
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

import checkpoint
from runtime import exact_float32, reading

INCEPTION_FILE = "pt_inception-2015-12-05-6726825d.pth"  # the last word is the start of its SHA-256
INCEPTION_ADDRESS = f"https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/{INCEPTION_FILE}"
CONVENTIONS = ("tf1", "half-pixel")

# ----------------------------------------------------------------------------------------------------------------------
# The network. Module names are those of the released file.


class ConvNorm(nn.Module):
    """Convolution (no bias), BatchNorm, ReLU. `same`: padded so that the size stays; otherwise not padded."""

    def __init__(self, c_in, c_out, kernel=1, stride=1, same=True):
        super().__init__()
        height, width = kernel if isinstance(kernel, tuple) else (kernel, kernel)
        padding = (height // 2, width // 2) if same else 0
        self.conv = nn.Conv2d(c_in, c_out, (height, width), stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(c_out, eps=0.001)

    def forward(self, x):
        return F.relu(self.bn(self.conv(x)), inplace=True)


def average_pool(x):
    # Released weights: padding is not counted, unlike torchvision's Inception.
    return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)


def max_pool(x):
    return F.max_pool2d(x, 3, stride=1, padding=1)


def halving_pool(x):
    return F.max_pool2d(x, 3, stride=2)


class Mixed(nn.Module):
    """Parallel branches whose outputs are concatenated: (B, C_in, h, w) -> (B, .width, h, w), or h, w halved.

    branches: name -> list of (width, kernel) steps, or (width, kernel, 2) for a halving one; a list of two steps in
    place of one forks the branch. The steps of `branch_pool` follow `pool`; without steps the pool's output is taken.
    """

    def __init__(self, c_in, pool, branches):
        super().__init__()
        self.pool, self.branches, self.width = pool, {}, 0
        for branch, steps in branches.items():
            width, self.branches[branch] = c_in, []
            for number, step in enumerate(steps, 1):
                forks = step if isinstance(step, list) else [step]
                name = branch if len(steps) == 1 else f"{branch}_{number}"
                names = [name + letter for letter in "ab"] if len(forks) == 2 else [name]
                for name, (c_out, kernel, *stride) in zip(names, forks):
                    self.add_module(name, ConvNorm(width, c_out, kernel, *stride or [1], same=not stride))
                width = sum(fork[0] for fork in forks)
                self.branches[branch].append(names)
            self.width += width

    def forward(self, x):
        outputs = []
        for branch, steps in self.branches.items():
            y = self.pool(x) if branch == "branch_pool" else x
            for names in steps:
                y = torch.cat([getattr(self, name)(y) for name in names], 1)
            outputs.append(y)
        return torch.cat(outputs, 1)


def mixed_5(pool_width):
    """35x35."""
    return {
        "branch1x1": [(64, 1)],
        "branch5x5": [(48, 1), (64, 5)],
        "branch3x3dbl": [(64, 1), (96, 3), (96, 3)],
        "branch_pool": [(pool_width, 1)],
    }


def mixed_6(width):
    """17x17."""
    across, down = (1, 7), (7, 1)
    return {
        "branch1x1": [(192, 1)],
        "branch7x7": [(width, 1), (width, across), (192, down)],
        "branch7x7dbl": [(width, 1), (width, down), (width, across), (width, down), (192, across)],
        "branch_pool": [(192, 1)],
    }


MIXED_6A = {"branch3x3": [(384, 3, 2)], "branch3x3dbl": [(64, 1), (96, 3), (96, 3, 2)], "branch_pool": []}
MIXED_7A = {
    "branch3x3": [(192, 1), (320, 3, 2)],
    "branch7x7x3": [(192, 1), (192, (1, 7)), (192, (7, 1)), (192, 3, 2)],
    "branch_pool": [],
}
MIXED_7 = {  # 8x8
    "branch1x1": [(320, 1)],
    "branch3x3": [(384, 1), [(384, (1, 3)), (384, (3, 1))]],
    "branch3x3dbl": [(448, 1), (384, 3), [(384, (1, 3)), (384, (3, 1))]],
    "branch_pool": [(192, 1)],
}
MIXED = {
    "Mixed_5b": (average_pool, mixed_5(32)),
    "Mixed_5c": (average_pool, mixed_5(64)),
    "Mixed_5d": (average_pool, mixed_5(64)),
    "Mixed_6a": (halving_pool, MIXED_6A),
    "Mixed_6b": (average_pool, mixed_6(128)),
    "Mixed_6c": (average_pool, mixed_6(160)),
    "Mixed_6d": (average_pool, mixed_6(160)),
    "Mixed_6e": (average_pool, mixed_6(192)),
    "Mixed_7a": (halving_pool, MIXED_7A),
    "Mixed_7b": (average_pool, MIXED_7),
    "Mixed_7c": (max_pool, MIXED_7),  # Released weights: a max pool here, unlike torchvision's.
}


class InceptionV3(nn.Module):
    """The network behind FID, sFID, IS, precision and recall, frozen. Entries are those of `INCEPTION_FILE`.

    Called on pictures (B, 3, H, W), any size, and a convention. "tf1" takes uint8; "half-pixel" takes uint8 or floats
    in [0, 1]. Returns float32
    - `pool` (B, 2048): mean over the last 8x8 map; FID, precision and recall;
    - `spatial` (B, 2023): the first 7 channels of Mixed_6d.branch1x1, 17x17, flattened channels-last; sFID;
    - `logits` (B, 1008): without the last layer's bias, as ADM's evaluator has it; IS.
    Always float32 without TF32 and without autocast. Raises ValueError for other input."""

    def __init__(self):
        super().__init__()
        self.Conv2d_1a_3x3 = ConvNorm(3, 32, 3, stride=2, same=False)
        self.Conv2d_2a_3x3 = ConvNorm(32, 32, 3, same=False)
        self.Conv2d_2b_3x3 = ConvNorm(32, 64, 3)
        self.Conv2d_3b_1x1 = ConvNorm(64, 80)
        self.Conv2d_4a_3x3 = ConvNorm(80, 192, 3, same=False)
        width = 192
        for name, (pool, branches) in MIXED.items():
            self.add_module(name, Mixed(width, pool, branches))
            width = getattr(self, name).width
        self.fc = nn.Linear(2048, 1008)
        self.eval().requires_grad_(False)

    @torch.no_grad()
    def forward(self, pictures, convention="tf1"):
        with exact_float32(pictures.device):
            x = network_input(pictures, convention)  # (B, 3, H, W) -> (B, 3, 299, 299)
            x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
            x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(halving_pool(x)))
            x = halving_pool(x)  # (B, 192, 35, 35)
            for name in MIXED:
                x = getattr(self, name)(x)
                if name == "Mixed_6d":  # branch1x1 comes first in the block's output
                    spatial = x[:, :7].permute(0, 2, 3, 1).flatten(1)  # (B, 7, 17, 17) -> (B, 17*17*7)
            pool = x.mean((2, 3))  # (B, 2048, 8, 8) -> (B, 2048)
            return pool, spatial, F.linear(pool, self.fc.weight)


def network_input(pictures, convention):
    """Pictures (B, 3, H, W) to what the network eats, (B, 3, 299, 299) in [-1, 1], by the named convention."""
    if convention == "tf1":
        if pictures.dtype != torch.uint8:
            raise ValueError(f'the "tf1" convention takes uint8 pictures, not {pictures.dtype}')
        return (resize_tf1(pictures.float(), 299) - 128) / 128
    if convention == "half-pixel":
        x = pictures / 255 if pictures.dtype == torch.uint8 else pictures.float()
        # No antialias: also a picture larger than 299 is sampled, not averaged.
        return 2 * F.interpolate(x, (299, 299), mode="bilinear", align_corners=False, antialias=False) - 1
    raise ValueError(f"unknown convention {convention!r}; one of {', '.join(CONVENTIONS)}")


def resize_tf1(x, size):
    """Bilinear resize of TensorFlow 1: output i is taken at i * (in / out), without the half-pixel shift."""

    def along(x, dim):
        extent = x.shape[dim]
        place = torch.arange(size, device=x.device) * (extent / size)
        low = place.long()
        high = (low + 1).clamp(max=extent - 1)
        weight = (place - low).view([-1 if axis == dim else 1 for axis in range(4)])
        a, b = x.index_select(dim, low), x.index_select(dim, high)
        return a + (b - a) * weight  # in TensorFlow's order of operations, width first: equal to the last bit

    return along(along(x, 3), 2)


def load_inception(path=None):
    """(InceptionV3 with weights, SHA-256 of the file) from `path`, or from torch's hub cache, downloaded once.

    Raises UserError where there is no such file, no network to fetch it, or the file is another network's."""
    path = Path(path) if path else checkpoint.download(INCEPTION_ADDRESS)
    entries, model = checkpoint.entries_of(checkpoint.read_weights(path), path), InceptionV3()
    checkpoint.match(entries, model.state_dict(), path, f"the Inception network ({INCEPTION_FILE})")
    model.load_state_dict(entries)
    with reading(path, "a weights file"):
        return model, hashlib.sha256(path.read_bytes()).hexdigest()


def weights_in_words(sha256):
    """The Inception weights, for the protocol."""
    published = sha256.startswith(Path(INCEPTION_FILE).stem.rsplit("-", 1)[1])
    note = "the published file" if published else "NOT the published file: comparable with nothing else"
    return f"SHA-256 {sha256} ({note})"
