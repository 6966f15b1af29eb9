"""Stage I's objective (Open-MAGVIT2, arXiv 2409.04410): LPIPS, the PatchGAN discriminator, LeCAM, the two losses.

    generator      mean(|x - y| + LPIPS(x, y)) + 0.1 * GAN + 0.1 * entropy + 0.25 * commitment
    discriminator  hinge(D(x), D(y)) + w * LeCAM          w = 0.05 at 256, 0.01 at 128

x image, y unclamped reconstruction, both (B, 3, H, W) in [-1, 1]. All terms from the first step on. For videos, x and y
are clips (B, 3, T, H, W), LPIPS goes frame by frame, D is a PatchDiscriminator3D, and the weight of GAN is 0.3."""

import itertools
from collections import OrderedDict

import torch
from torch import nn
from torch.nn.functional import relu, softplus

from checkpoint import download, entries_of, match, read_weights

# --- LPIPS (arXiv 1801.03924), version 0.1 ----------------------------------------------------------------------------
BACKBONES = {
    "vgg": "https://download.pytorch.org/models/vgg16-397923af.pth",
    "alex": "https://download.pytorch.org/models/alexnet-owt-7be5be79.pth",
}
HEADS = "https://github.com/richzhang/PerceptualSimilarity/raw/master/lpips/weights/v0.1"  # /vgg.pth, /alex.pth


def _slices(network):
    """A backbone's layers up to each of five taps: vgg's relu1_2, 2_2, 3_3, 4_3 and 5_3, or every ReLU of alex."""

    def conv(c_in, c_out, kernel=3, stride=1, padding=1):
        return nn.Conv2d(c_in, c_out, kernel, stride, padding), nn.ReLU(inplace=True)

    if network == "alex":
        return [
            [*conv(3, 64, kernel=11, stride=4, padding=2)],
            [nn.MaxPool2d(3, 2), *conv(64, 192, kernel=5, padding=2)],
            [nn.MaxPool2d(3, 2), *conv(192, 384)],
            [*conv(384, 256)],
            [*conv(256, 256)],
        ]
    return [
        [*conv(3, 64), *conv(64, 64)],
        [nn.MaxPool2d(2, 2), *conv(64, 128), *conv(128, 128)],
        [nn.MaxPool2d(2, 2), *conv(128, 256), *conv(256, 256), *conv(256, 256)],
        [nn.MaxPool2d(2, 2), *conv(256, 512), *conv(512, 512), *conv(512, 512)],
        [nn.MaxPool2d(2, 2), *conv(512, 512), *conv(512, 512), *conv(512, 512)],
    ]


class _Backbone(nn.Module):
    """(B, 3, H, W) -> five taps. Layers keep their numbers in torchvision's `features`, as the released files do."""

    def __init__(self, slices):
        super().__init__()
        numbers = itertools.count()
        for i, layers in enumerate(slices, 1):
            self.add_module(f"slice{i}", nn.Sequential(OrderedDict((str(next(numbers)), layer) for layer in layers)))

    def forward(self, x):
        taps = []
        for layers in self.children():
            x = layers(x)
            taps.append(x)
        return taps


class _ScalingLayer(nn.Module):
    """Pictures (B, 3, H, W) in [-1, 1], brought to the statistics that the backbones were trained on."""

    def __init__(self):
        super().__init__()
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188])[None, :, None, None])
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450])[None, :, None, None])

    def forward(self, x):
        return (x - self.shift) / self.scale


class LPIPS(nn.Module):
    """Perceptual distance of two pictures (B, 3, H, W) in [-1, 1] -> (B, 1, 1, 1), 0 for equal ones. Frozen.

    network: "vgg" (stage I's loss) or "alex" (usual in evaluation). Random until loaded: see `load_lpips`."""

    def __init__(self, network="vgg"):
        super().__init__()
        slices = _slices(network)
        self.scaling_layer, self.net = _ScalingLayer(), _Backbone(slices)
        for i, layers in enumerate(slices):
            # Non-negative weights (1, C, 1, 1) of a tap's channels. Released weights: the entry is `model.1`, behind a
            # dropout that is off whenever LPIPS is used as a loss.
            weights = nn.Conv2d(layers[-2].out_channels, 1, 1, bias=False)
            self.add_module(f"lin{i}", nn.ModuleDict({"model": nn.Sequential(nn.Identity(), weights)}))
        self.requires_grad_(False)

    def forward(self, x, y):
        taps_x, taps_y = self.net(self.scaling_layer(x)), self.net(self.scaling_layer(y))
        weights = [getattr(self, f"lin{i}")["model"][1].weight for i in range(5)]
        return sum(map(tap_distance, taps_x, taps_y, weights))


def tap_distance(a, b, weight):
    """Distance of two taps (B, C, h, w), weight (1, C, 1, 1) -> (B, 1, 1, 1): unit length over channels, squared
    difference, weighted sum over channels, mean over pixels; in float32 whatever the taps' type."""
    a, b = _wide(a), _wide(b)
    # The published 1e-10 is added to the norm, not under the root.
    a = a / (a.square().sum(1, keepdim=True).sqrt() + 1e-10)
    b = b / (b.square().sum(1, keepdim=True).sqrt() + 1e-10)
    return ((a - b).square() * weight).sum(1, keepdim=True).mean((2, 3), keepdim=True)


def load_lpips(network="vgg", path=None, maybe=None):
    """LPIPS with its published weights.
    path: a file that holds them all: a released tokenizer file (for "vgg"), or a saved state dict of `LPIPS`. None: the
    file `maybe`, if it is a released tokenizer's; else torchvision's backbone and the v0.1 heads, downloaded once into
    torch's hub cache. Raises UserError naming the file or, offline, the address and where to put it."""
    if path is None and maybe and "loss.perceptual_loss.lin0.model.1.weight" in entries_of(read_weights(maybe), maybe):
        path = maybe
    with torch.device("meta"):
        lpips = LPIPS(network)
    if path is None:
        backbone, heads = download(BACKBONES[network]), download(f"{HEADS}/{network}.pth")
        layers, entries = (entries_of(read_weights(file), file) for file in (backbone, heads))
        for name in lpips.net.state_dict():  # slice2.5.weight is torchvision's features.5.weight
            number = name.split(".", 1)[1]
            if f"features.{number}" in layers:  # beside a classifier that LPIPS has no use for
                entries[f"net.{name}"] = layers[f"features.{number}"]
        path = f"{backbone} with {heads}"
    else:
        found, prefix = entries_of(read_weights(path), path), "loss.perceptual_loss."
        entries = {n.removeprefix(prefix): v for n, v in found.items() if n.startswith(prefix)} or found
    entries = _ScalingLayer().state_dict(prefix="scaling_layer.") | entries
    match(entries, lpips.state_dict(), path, f"LPIPS weights ({network})")
    lpips.load_state_dict({name: value.float() for name, value in entries.items()}, assign=True)
    return lpips


class PatchDiscriminator(nn.Module):
    """PatchGAN: (B, 3, H, W) -> one logit a patch, (B, 1, H/8 - 2, W/8 - 2) for sides that 8 divides.

    BatchNorm is per device and in train mode throughout, also when D scores the generator; x and y go through apart."""

    def __init__(self, conv=nn.Conv2d, norm=nn.BatchNorm2d, kernel=4, strides=(2, 2, 2, 1, 1)):
        super().__init__()
        layers = [conv(3, 64, kernel, strides[0], padding=1), nn.LeakyReLU(0.2)]
        for c_in, stride in zip((64, 128, 256), strides[1:4], strict=True):
            layers += [conv(c_in, 2 * c_in, kernel, stride, padding=1, bias=False), norm(2 * c_in), nn.LeakyReLU(0.2)]
        self.main = nn.Sequential(*layers, conv(512, 1, kernel, strides[4], padding=1))
        for layer in self.main:
            if isinstance(layer, conv):
                nn.init.normal_(layer.weight, 0, 0.02)
            elif isinstance(layer, norm):
                nn.init.normal_(layer.weight, 1, 0.02)

    def forward(self, x):
        return self.main(x)


class PatchDiscriminator3D(PatchDiscriminator):
    """The same for clips: (B, 3, T, H, W) -> one logit a patch, (B, 1, T/4, H/8, W/8), each rounded up."""

    def __init__(self):
        super().__init__(nn.Conv3d, nn.BatchNorm3d, kernel=3, strides=(2, 2, (1, 2, 2), 1, 1))


def load_discriminator(path, kind=PatchDiscriminator):
    """[discriminator, its moving average] of a tokenizer file, released or own; [] where it holds none of this kind, a
    PatchDiscriminator or PatchDiscriminator3D. Raises UserError naming the file and the entries at fault."""
    entries, prefix = entries_of(read_weights(path), path), "loss.discriminator."
    states = [entries.get("discriminator"), entries.get("discriminator_ema")]  # of a file of ours
    if states[0] is None:
        state = {n.removeprefix(prefix): v for n, v in entries.items() if n.startswith(prefix + "main.")}
        # Released files: an average is named like its parameter, without dots; BatchNorm's statistics have none.
        average = {n: entries.get("model_ema." + (prefix + n).replace(".", ""), v) for n, v in state.items()}
        states = [state, average] if state else []
    discriminators = [kind() for _ in states]
    for discriminator, state in zip(discriminators, states):
        weight = isinstance(state, dict) and state.get("main.0.weight")
        if getattr(weight, "ndim", None) == 9 - discriminator.main[0].weight.ndim:  # 4 for images, 5 for videos
            return []  # the other kind
        match(state, discriminator.state_dict(), path, "a PatchGAN discriminator")
        discriminator.load_state_dict(state)
    return discriminators


class LeCAM(nn.Module):
    """Keeps D's logits of real images near the running mean of those of fakes, and the reverse (arXiv 2104.03310).

    `real` and `fake` are the running means of D(x) and D(y), from 0. Each micro-batch's term uses the means advanced by
    its own logits; `advance` then moves the stored pair once a step, by the logits' mean over all micro-batches and
    ranks. With one micro-batch on one device that is the published rule."""

    def __init__(self, decay=0.999):
        super().__init__()
        self.decay = decay
        self.register_buffer("real", torch.zeros(()))
        self.register_buffer("fake", torch.zeros(()))

    def _moved(self, mean, logits):  # not torch.lerp: in float32 its 1 - 0.999 is off by 1e-5
        return self.decay * mean + (1 - self.decay) * logits.detach().mean().to(mean.dtype)

    def forward(self, logits_real, logits_fake):
        """The term of one micro-batch, unweighted; leaves the stored means alone."""
        real, fake = self._moved(self.real, logits_real), self._moved(self.fake, logits_fake)
        return relu(logits_real - fake).square().mean() + relu(real - logits_fake).square().mean()

    @torch.no_grad()
    def advance(self, mean_real, mean_fake):
        """Move the stored means by the step's mean logits (scalars)."""
        self.real.copy_(self._moved(self.real, mean_real))
        self.fake.copy_(self._moved(self.fake, mean_fake))


def _wide(x):
    """float32 at least: under autocast networks answer in half precision, and losses must not."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def generator_loss(x, y, quantizer, lpips=None, discriminator=None, gan_weight=0.1, entropy_weight=0.1):
    """The generator's loss on one micro-batch, and its terms by name (detached scalars, unweighted).
    quantizer: the losses of `lfq.LFQ`. lpips, discriminator: None leaves that term out. The weights are the paper's."""
    loss = (x - y).abs().mean()
    terms = {"l1": loss}
    if lpips is not None:
        # A picture (B, 3, H, W) goes as it is, a clip (B, 3, T, H, W) as its frames (B * T, 3, H, W).
        terms["lpips"] = lpips(*(images.movedim(1, -3).flatten(0, -4) for images in (x, y))).mean()
        loss = loss + terms["lpips"]
    if discriminator is not None:
        logits = _wide(discriminator(y))  # (B, 1, h, w); for clips (B, 1, t, h, w)
        terms["gan"] = softplus(-logits.flatten(1).mean(1)).mean()  # non-saturating, of each image's mean logit
        loss = loss + gan_weight * terms["gan"]
    loss = loss + entropy_weight * quantizer["entropy"] + 0.25 * quantizer["commitment"]
    terms |= {name: quantizer[name] for name in ("sample_entropy", "codebook_entropy", "commitment")}
    return loss, {name: value.detach() for name, value in terms.items()}


def discriminator_loss(logits_real, logits_fake, lecam, lecam_weight):
    """Hinge plus weighted LeCAM on one micro-batch, and the terms by name (detached; LeCAM unweighted).
    logits_real, logits_fake: D(x) and D(y), y detached, one logit a patch."""
    logits_real, logits_fake = _wide(logits_real), _wide(logits_fake)
    hinge = 0.5 * (relu(1 - logits_real).mean() + relu(1 + logits_fake).mean())
    regularizer = lecam(logits_real, logits_fake)
    terms = {"hinge": hinge, "lecam": regularizer, "logits_real": logits_real.mean(), "logits_fake": logits_fake.mean()}
    return hinge + lecam_weight * regularizer, {name: value.detach() for name, value in terms.items()}


@torch.no_grad()
def update_ema(averages, parameters, decay=0.999):
    """averages <- decay * averages + (1 - decay) * parameters, in a few launches for the whole list."""
    torch._foreach_lerp_(averages, parameters, 1 - decay)
