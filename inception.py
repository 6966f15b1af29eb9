"""The Inception network behind FID, sFID, IS, precision and recall: TensorFlow's of 2015-12-05, ported to PyTorch.

    model, sha256 = load_inception()                            # the weights that the field uses, downloaded once
    pool, spatial, logits = model(pictures, "tf1")              # uint8 (B, 3, H, W), any size

It sees pictures in one of two ways, which move FID by tenths, so the convention is part of any number: "tf1" as ADM's
evaluator and torch-fidelity, all generation numbers of the paper; "half-pixel" as pytorch-fid, the paper's rFID.

Letters: B batch, C channels, H W pixels, h w feature map."""

from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

import checkpoint
from runtime import exact_float32

INCEPTION_FILE = "pt_inception-2015-12-05-6726825d.pth"  # the last word is the start of its SHA-256
INCEPTION_ADDRESS = f"https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/{INCEPTION_FILE}"
CONVENTIONS = {"tf1": "as ADM's evaluator", "half-pixel": "FID as pytorch-fid; nobody publishes the others so"}


class ConvNorm(nn.Module):
    """Convolution (no bias), BatchNorm, ReLU. (Names: the released file's.)"""

    def __init__(self, c_in, c_out, kernel=1, stride=1, padding="same"):
        super().__init__()
        self.conv = nn.Conv2d(c_in, c_out, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(c_out, eps=0.001)

    def forward(self, x):
        return F.relu(self.bn(self.conv(x)), inplace=True)


# Released weights: the average does not count padding, unlike torchvision's.
average_pool = nn.AvgPool2d(3, stride=1, padding=1, count_include_pad=False)
max_pool = nn.MaxPool2d(3, stride=1, padding=1)
halving_pool = nn.MaxPool2d(3, stride=2)


class Mixed(nn.Module):
    """Branches side by side on one input, their channels concatenated. A branch is a list of layers: its convolutions
    are the modules NAME_1, NAME_2, ..., or NAME where there is one; a pool comes first and has no weights."""

    def __init__(self, **branches):
        super().__init__()
        self.branches = [nn.Sequential(*layers) for layers in branches.values()]  # a list: adds no names of its own
        for name, layers in branches.items():
            convolutions = [layer for layer in layers if isinstance(layer, ConvNorm)]
            for number, layer in enumerate(convolutions, 1):
                self.add_module(f"{name}_{number}" if len(convolutions) > 1 else name, layer)

    def forward(self, x):
        return torch.cat([branch(x) for branch in self.branches], 1)


def mixed_5(c_in, pool_width):
    """(B, c_in, 35, 35) -> (B, 224 + pool_width, 35, 35)."""
    return Mixed(
        branch1x1=[ConvNorm(c_in, 64)],
        branch5x5=[ConvNorm(c_in, 48), ConvNorm(48, 64, 5)],
        branch3x3dbl=[ConvNorm(c_in, 64), ConvNorm(64, 96, 3), ConvNorm(96, 96, 3)],
        branch_pool=[average_pool, ConvNorm(c_in, pool_width)],
    )


def mixed_6(width):
    """(B, 768, 17, 17) -> the same; 7x7 convolutions as a pair of 1x7 and 7x1, `width` channels wide inside."""
    pair = [ConvNorm(width, width, (7, 1)), ConvNorm(width, width, (1, 7))]
    return Mixed(
        branch1x1=[ConvNorm(768, 192)],
        branch7x7=[ConvNorm(768, width), ConvNorm(width, width, (1, 7)), ConvNorm(width, 192, (7, 1))],
        branch7x7dbl=[ConvNorm(768, width), *pair, ConvNorm(width, width, (7, 1)), ConvNorm(width, 192, (1, 7))],
        branch_pool=[average_pool, ConvNorm(768, 192)],
    )


class Mixed7(nn.Module):
    """(B, c_in, 8, 8) -> (B, 2048, 8, 8); two branches end in a 1x3 and a 3x1 convolution side by side."""

    def __init__(self, c_in, pool):
        super().__init__()
        self.pool = pool
        self.branch1x1 = ConvNorm(c_in, 320)
        self.branch3x3_1 = ConvNorm(c_in, 384)
        self.branch3x3_2a = ConvNorm(384, 384, (1, 3))
        self.branch3x3_2b = ConvNorm(384, 384, (3, 1))
        self.branch3x3dbl_1 = ConvNorm(c_in, 448)
        self.branch3x3dbl_2 = ConvNorm(448, 384, 3)
        self.branch3x3dbl_3a = ConvNorm(384, 384, (1, 3))
        self.branch3x3dbl_3b = ConvNorm(384, 384, (3, 1))
        self.branch_pool = ConvNorm(c_in, 192)

    def forward(self, x):
        y = self.branch3x3_1(x)
        branch3x3 = [self.branch3x3_2a(y), self.branch3x3_2b(y)]
        y = self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        branch3x3dbl = [self.branch3x3dbl_3a(y), self.branch3x3dbl_3b(y)]
        return torch.cat([self.branch1x1(x), *branch3x3, *branch3x3dbl, self.branch_pool(self.pool(x))], 1)


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
        self.Conv2d_1a_3x3 = ConvNorm(3, 32, 3, stride=2, padding="valid")
        self.Conv2d_2a_3x3 = ConvNorm(32, 32, 3, padding="valid")
        self.Conv2d_2b_3x3 = ConvNorm(32, 64, 3)
        self.Conv2d_3b_1x1 = ConvNorm(64, 80)
        self.Conv2d_4a_3x3 = ConvNorm(80, 192, 3, padding="valid")
        self.Mixed_5b = mixed_5(192, pool_width=32)
        self.Mixed_5c = mixed_5(256, pool_width=64)
        self.Mixed_5d = mixed_5(288, pool_width=64)
        self.Mixed_6a = Mixed(  # (B, 288, 35, 35) -> (B, 768, 17, 17)
            branch3x3=[ConvNorm(288, 384, 3, stride=2, padding="valid")],
            branch3x3dbl=[ConvNorm(288, 64), ConvNorm(64, 96, 3), ConvNorm(96, 96, 3, stride=2, padding="valid")],
            branch_pool=[halving_pool],
        )
        self.Mixed_6b = mixed_6(128)
        self.Mixed_6c = mixed_6(160)
        self.Mixed_6d = mixed_6(160)
        self.Mixed_6e = mixed_6(192)
        pair = [ConvNorm(192, 192, (1, 7)), ConvNorm(192, 192, (7, 1))]
        self.Mixed_7a = Mixed(  # (B, 768, 17, 17) -> (B, 1280, 8, 8)
            branch3x3=[ConvNorm(768, 192), ConvNorm(192, 320, 3, stride=2, padding="valid")],
            branch7x7x3=[ConvNorm(768, 192), *pair, ConvNorm(192, 192, 3, stride=2, padding="valid")],
            branch_pool=[halving_pool],
        )
        self.Mixed_7b = Mixed7(1280, average_pool)
        self.Mixed_7c = Mixed7(2048, max_pool)  # Released weights: a max pool here, unlike torchvision's.
        self.fc = nn.Linear(2048, 1008)
        self.eval().requires_grad_(False)

    @torch.no_grad()
    def forward(self, pictures, convention="tf1"):
        with exact_float32(pictures.device):
            x = network_input(pictures, convention)  # (B, 3, H, W) -> (B, 3, 299, 299)
            x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))  # (B, 64, 147, 147)
            x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(halving_pool(x)))  # (B, 192, 71, 71)
            x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(halving_pool(x))))  # (B, 288, 35, 35)
            x = self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x))))  # (B, 768, 17, 17)
            spatial = x[:, :7].permute(0, 2, 3, 1).flatten(1)  # of branch1x1, which comes first: (B, 17*17*7)
            x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(self.Mixed_6e(x))))  # (B, 2048, 8, 8)
            pool = x.mean((2, 3))  # (B, 2048)
            return pool, spatial, F.linear(pool, self.fc.weight)


def network_input(pictures, convention):
    """Pictures (B, 3, H, W) -> the network's input, (B, 3, 299, 299) in [-1, 1], by the named convention."""
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

    def resize_width(x):
        place = torch.arange(size, device=x.device) * (x.shape[-1] / size)
        left = place.long()
        right = (left + 1).clamp(max=x.shape[-1] - 1)
        a, b = x[..., left], x[..., right]
        return a + (b - a) * (place - left)

    # In TensorFlow's order of operations, width first: equal to the last bit.
    return resize_width(resize_width(x).mT).mT  # (B, 3, H, W) -> (B, 3, H, size) -> (B, 3, size, size)


def load_inception(path=None):
    """(InceptionV3 with weights, SHA-256 of the file) from `path`, or from torch's hub cache, downloaded once.
    Raises UserError where there is no such file, no network to fetch it, or the file is another network's."""
    path = path or checkpoint.download(INCEPTION_ADDRESS)
    return checkpoint.load_network(InceptionV3(), path, f"the Inception network ({INCEPTION_FILE})")


def weights_in_words(sha256):
    """The Inception weights, for the protocol."""
    published = sha256.startswith(Path(INCEPTION_FILE).stem.rsplit("-", 1)[1])
    note = "the published file" if published else "NOT the published file: comparable with nothing else"
    return f"SHA-256 {sha256} ({note})"
