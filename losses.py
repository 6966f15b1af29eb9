"""Stage I's objective (Open-MAGVIT2, arXiv 2409.04410): LPIPS, the PatchGAN discriminator, LeCAM, the two losses.

    generator      mean(|x - y| + LPIPS(x, y)) + 0.1 * GAN + 0.1 * entropy + 0.25 * commitment
    discriminator  hinge(D(x), D(y)) + w * LeCAM          w = 0.05 at 256, 0.01 at 128

x image, y unclamped reconstruction, both (B, 3, H, W) in [-1, 1]. All terms from the first step on."""

import torch
from torch import nn
from torch.nn.functional import relu, softplus

from checkpoint import download, entries_of, match, read_weights
from runtime import UserError

# --- LPIPS (arXiv 1801.03924), version 0.1 ----------------------------------------------------------------------------

# Convolutions up to each tap: (input channels, output channels, kernel, stride, padding); "pool" between them.
_POOL_VGG, _POOL_ALEX = ("pool", 2, 2), ("pool", 3, 2)


def _vgg_slice(c_in, c_out, count):
    return [(c_in if i == 0 else c_out, c_out, 3, 1, 1) for i in range(count)]


_NETWORKS = {
    "vgg": [  # taps after relu1_2, 2_2, 3_3, 4_3, 5_3
        _vgg_slice(3, 64, 2),
        [_POOL_VGG, *_vgg_slice(64, 128, 2)],
        [_POOL_VGG, *_vgg_slice(128, 256, 3)],
        [_POOL_VGG, *_vgg_slice(256, 512, 3)],
        [_POOL_VGG, *_vgg_slice(512, 512, 3)],
    ],
    "alex": [  # taps after each of the five ReLUs
        [(3, 64, 11, 4, 2)],
        [_POOL_ALEX, (64, 192, 5, 1, 2)],
        [_POOL_ALEX, (192, 384, 3, 1, 1)],
        [(384, 256, 3, 1, 1)],
        [(256, 256, 3, 1, 1)],
    ],
}
BACKBONES = {
    "vgg": "https://download.pytorch.org/models/vgg16-397923af.pth",
    "alex": "https://download.pytorch.org/models/alexnet-owt-7be5be79.pth",
}
HEADS = {
    network: f"https://github.com/richzhang/PerceptualSimilarity/raw/master/lpips/weights/v0.1/{network}.pth"
    for network in ("vgg", "alex")
}


class _Slices(nn.Module):
    """A backbone cut at its taps; layers keep their numbers in torchvision's `features`, as the released files do."""

    def __init__(self, slices):
        super().__init__()
        number = 0
        for i, layers in enumerate(slices, 1):
            cut = nn.Sequential()
            for layer in layers:
                if layer[0] == "pool":
                    cut.add_module(str(number), nn.MaxPool2d(layer[1], layer[2]))
                    number += 1
                else:
                    c_in, c_out, kernel, stride, padding = layer
                    cut.add_module(str(number), nn.Conv2d(c_in, c_out, kernel, stride, padding))
                    cut.add_module(str(number + 1), nn.ReLU(inplace=True))
                    number += 2
            self.add_module(f"slice{i}", cut)

    def forward(self, x):
        taps = []
        for cut in self.children():
            x = cut(x)
            taps.append(x)
        return taps


class _ScalingLayer(nn.Module):
    """From [-1, 1] to the backbones' input statistics."""

    def __init__(self):
        super().__init__()
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188])[None, :, None, None])
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450])[None, :, None, None])

    def forward(self, x):
        return (x - self.shift) / self.scale


class _Head(nn.Module):
    """A tap's non-negative channel weights, (1, C, 1, 1)."""

    def __init__(self, channels):
        super().__init__()
        # Released weights: the entry is `model.1`, behind a dropout that is off whenever LPIPS is used as a loss.
        self.model = nn.Sequential(nn.Identity(), nn.Conv2d(channels, 1, 1, bias=False))


class LPIPS(nn.Module):
    """Perceptual distance of two pictures (B, 3, H, W) in [-1, 1] -> (B, 1, 1, 1), 0 for equal ones. Frozen.

    network: "vgg" (stage I's loss) or "alex" (the usual choice for evaluation). The weights are random until loaded:
    see `load_lpips`."""

    def __init__(self, network="vgg"):
        super().__init__()
        self.network = network
        self.scaling_layer = _ScalingLayer()
        self.net = _Slices(_NETWORKS[network])
        self.widths = [layers[-1][1] for layers in _NETWORKS[network]]
        for i, width in enumerate(self.widths):
            self.add_module(f"lin{i}", _Head(width))
        self.eval().requires_grad_(False)

    def train(self, mode=True):
        return super().train(False)

    def features(self, x):
        """The five taps of x."""
        return self.net(self.scaling_layer(x))

    def forward(self, x, y):
        # No gradient is ever wanted for the original's features: they cost neither memory nor a backward pass.
        with torch.set_grad_enabled(torch.is_grad_enabled() and x.requires_grad):
            ours = self.features(x)
        distance = 0
        for i, (a, b) in enumerate(zip(ours, self.features(y), strict=True)):
            distance = distance + tap_distance(a, b, getattr(self, f"lin{i}").model[1].weight)
        return distance


def tap_distance(a, b, weight):
    """Distance of two taps (B, C, h, w), weight (1, C, 1, 1) -> (B, 1, 1, 1): unit length over channels, squared
    difference, weighted sum over channels, mean over pixels; in float32 whatever the taps' type."""
    a, b = _wide(a), _wide(b)
    # The published 1e-10 is added to the norm, not under the root.
    a = a / (a.square().sum(1, keepdim=True).sqrt() + 1e-10)
    b = b / (b.square().sum(1, keepdim=True).sqrt() + 1e-10)
    return ((a - b).square() * weight).sum(1, keepdim=True).mean((2, 3), keepdim=True)


def load_lpips(network="vgg", path=None):
    """LPIPS with its published weights.
    path: a file that holds them all (a released tokenizer file, for "vgg", or a saved state dict of `LPIPS`); None:
    torchvision's backbone and the v0.1 heads, downloaded once into torch's hub cache. Raises UserError naming the file
    or, offline, the address and the place to put the file."""
    with torch.device("meta"):
        lpips = LPIPS(network)
    wanted = lpips.state_dict()
    constants = _ScalingLayer().state_dict(prefix="scaling_layer.")
    if path is not None:
        entries = entries_of(read_weights(path), path)
        prefix = "loss.perceptual_loss."
        if any(name.startswith(prefix) for name in entries):
            entries = {n.removeprefix(prefix): v for n, v in entries.items() if n.startswith(prefix)}
        entries = constants | entries
    else:
        backbone, heads = download(BACKBONES[network]), download(HEADS[network])
        # features.N.weight, and a classifier that LPIPS has no use for
        layers = entries_of(read_weights(backbone), backbone)
        entries = constants | entries_of(read_weights(heads), heads)
        for name in wanted:
            if name.startswith("net."):  # net.slice2.5.weight is features.5.weight
                source = "features." + name.split(".", 2)[2]
                if source not in layers:
                    raise UserError(f"{backbone} is not torchvision's {network} file: entry {source} is missing")
                entries[name] = layers[source]
        path = heads
    match(entries, wanted, path, f"LPIPS weights ({network})")
    lpips.load_state_dict({name: value.float().clone() for name, value in entries.items()}, assign=True)
    return lpips.requires_grad_(False)


# --- The discriminator ------------------------------------------------------------------------------------------------
class PatchDiscriminator(nn.Module):
    """PatchGAN: (B, 3, H, W) -> one logit a patch, (B, 1, H/8 - 2, W/8 - 2) for sides that 8 divides.

    BatchNorm is per device and stays in train mode throughout training, also when D scores the generator; x and y go
    through in separate forwards."""

    def __init__(self):
        super().__init__()

        def conv(c_in, c_out, stride, bias):
            return nn.Conv2d(c_in, c_out, 4, stride, 1, bias=bias)

        self.main = nn.Sequential(
            conv(3, 64, 2, True),
            nn.LeakyReLU(0.2),
            *(conv(64, 128, 2, False), nn.BatchNorm2d(128), nn.LeakyReLU(0.2)),
            *(conv(128, 256, 2, False), nn.BatchNorm2d(256), nn.LeakyReLU(0.2)),
            *(conv(256, 512, 1, False), nn.BatchNorm2d(512), nn.LeakyReLU(0.2)),
            conv(512, 1, 1, True),
        )
        for layer in self.main:
            if isinstance(layer, nn.Conv2d):
                nn.init.normal_(layer.weight, 0, 0.02)
            elif isinstance(layer, nn.BatchNorm2d):
                nn.init.normal_(layer.weight, 1, 0.02)

    def forward(self, x):
        return self.main(x)


class LeCAM(nn.Module):
    """Regularizer that holds D's logits near running means of the other kind's (arXiv 2104.03310).

    `real` and `fake` are the running means of D(x) and D(y), from 0. Each micro-batch's term uses the means advanced by
    its own logits; `advance` then moves the stored pair once a step, by the logits' mean over all micro-batches and
    ranks. With one micro-batch on one device that is the published rule."""

    def __init__(self, decay=0.999):
        super().__init__()
        self.decay = decay
        self.register_buffer("real", torch.zeros(()))
        self.register_buffer("fake", torch.zeros(()))

    def _moved(self, logits_real, logits_fake):
        keep, take = self.decay, 1 - self.decay  # not torch.lerp: in float32 its 1 - 0.999 is off by 1e-5
        real = keep * self.real + take * logits_real.detach().mean().to(self.real.dtype)
        return real, keep * self.fake + take * logits_fake.detach().mean().to(self.fake.dtype)

    def forward(self, logits_real, logits_fake):
        """The term of one micro-batch, unweighted; leaves the stored means alone."""
        real, fake = self._moved(logits_real, logits_fake)
        return relu(logits_real - fake).square().mean() + relu(real - logits_fake).square().mean()

    @torch.no_grad()
    def advance(self, mean_real, mean_fake):
        """Move the stored means by the step's mean logits (scalars)."""
        real, fake = self._moved(mean_real, mean_fake)
        self.real.copy_(real)
        self.fake.copy_(fake)


# --- The two losses ---------------------------------------------------------------------------------------------------
def _wide(x):
    """float32 at least: under autocast networks answer in half precision, and losses must not."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def generator_gan_loss(logits):
    """Non-saturating: softplus(-mean logit) of each image, then the mean. logits (B, 1, h, w) of D(y)."""
    return softplus(-_wide(logits).mean((1, 2, 3))).mean()


def generator_loss(
    x, y, quantizer_losses, lpips=None, discriminator=None, gan_weight=0.1, entropy_weight=0.1, commitment_weight=0.25
):
    """The generator's loss on one micro-batch, and its terms by name (detached scalars, unweighted).
    quantizer_losses: as `lfq.LFQ` returns them. lpips, discriminator: None leaves that term out. The weights are the
    paper's."""
    absolute = (x - y).abs()
    terms = {"l1": absolute.mean()}
    loss = terms["l1"]
    if lpips is not None:
        terms["lpips"] = lpips(x, y).mean()
        loss = loss + terms["lpips"]
    if discriminator is not None:
        terms["gan"] = generator_gan_loss(discriminator(y))
        loss = loss + gan_weight * terms["gan"]
    loss = loss + entropy_weight * quantizer_losses["entropy"]
    loss = loss + commitment_weight * quantizer_losses["commitment"]
    terms |= {name: quantizer_losses[name] for name in ("sample_entropy", "codebook_entropy", "commitment")}
    return loss, {name: value.detach() for name, value in terms.items()}


def discriminator_loss(logits_real, logits_fake, lecam, lecam_weight):
    """Hinge plus weighted LeCAM on one micro-batch, and the terms by name (detached; LeCAM unweighted).
    logits_real, logits_fake: D(x) and D(y), y detached, (B, 1, h, w)."""
    logits_real, logits_fake = _wide(logits_real), _wide(logits_fake)
    hinge = 0.5 * (relu(1 - logits_real).mean() + relu(1 + logits_fake).mean())
    regularizer = lecam(logits_real, logits_fake)
    terms = {"hinge": hinge, "lecam": regularizer, "logits_real": logits_real.mean(), "logits_fake": logits_fake.mean()}
    return hinge + lecam_weight * regularizer, {name: value.detach() for name, value in terms.items()}


@torch.no_grad()
def update_ema(averages, parameters, decay=0.999):
    """averages <- decay * averages + (1 - decay) * parameters, in a few launches for the whole list."""
    torch._foreach_lerp_(averages, parameters, 1 - decay)
