"""Built-in pictures, so that every script runs without a data set: letters and digits on textured grounds.

    pictures = data.open_pictures("glyphs", size=32, train=True)    # 50,000 pictures of 36 classes
    pictures = data.open_pictures("glyphs:4000:ABCDEFGH", 64, True) # 4,000 of 8

Picture i has class i % classes and is a function of (seed, train, i); at another size it looks the same.

Letters: S side in pixels."""

import colorsys
import functools

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from runtime import UserError

CLASSES = "ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"
COUNT = "50000"
GLYPH = 2  # the random stream of glyphs; data.py has the other streams


class Glyphs:
    """The data set `glyphs`, `glyphs:COUNT` or `glyphs:COUNT:CLASSES`; see `data.open_pictures`."""

    def __init__(self, source, size, train, seed=0):
        self.source, self.kind, self.shape, self.train, self.seed = source, "pictures", (size, size), train, seed
        kind, *parts = source.split(":")
        count, classes = parts + [COUNT, CLASSES][len(parts) :] if len(parts) < 3 else ("", "")
        if not (count.isdecimal() and len(count) < 10 and int(count) > 0 and classes.isascii() and classes.isalnum()):
            raise UserError(f"'{source}' is not {kind}:COUNT:CLASSES, for instance {kind}:4000:ABCDEFGH")
        if len(set(classes)) < len(classes):
            raise UserError(f"the glyph classes {classes} name a letter twice")
        if size is None or size < 16:
            raise UserError(f"glyphs need an image size of at least 16, not {size or 'original: they have none'}")
        self.classes = list(classes)
        self.labels = np.arange(int(count)) % len(classes)

    def __len__(self):
        return len(self.labels)

    def name(self, index):
        return f"glyph {index}"

    def __getitem__(self, entry):
        _, index = entry
        label, size = int(self.labels[index]), self.shape[0]
        rng = np.random.default_rng([GLYPH, self.seed, int(self.train), index])
        ground, colour = scene(size, rng)
        mask = _letter_mask(self.classes[label], size, rng)[..., None]  # (S, S, 1)
        image = (255 * (ground + mask * (colour - ground)) + 0.5).astype(np.uint8)  # (S, S, 3)
        return torch.from_numpy(image).permute(2, 0, 1).contiguous(), label


def scene(size, rng):
    """A ground of two colours, (S, S, 3), and a letter's colour that stands out from it, (3,), from 0 to 1."""
    light = [rng.uniform(0.65, 0.95), rng.uniform(0.65, 0.95)]
    dark = [rng.uniform(0.05, 0.3), rng.uniform(0.05, 0.3)]
    ground_lumas, letter_lumas = (light, dark) if rng.random() < 0.5 else (dark, light)
    first, second = (_colour(rng, luma) for luma in ground_lumas)
    colour = _colour(rng, letter_lumas[0])
    texture = _texture(size, rng)[..., None]  # (S, S, 1)
    return first + texture * (second - first), colour


def _colour(rng, luma):
    """An RGB colour of random hue whose luma (0.299 R + 0.587 G + 0.114 B) is `luma`, for contrast."""
    pure = np.array(colorsys.hsv_to_rgb(rng.random(), rng.uniform(0.5, 1), 1))
    pure_luma = pure @ (0.299, 0.587, 0.114)
    if luma < pure_luma:
        return pure * (luma / pure_luma)
    return pure + (1 - pure) * ((luma - pure_luma) / (1 - pure_luma))


def _texture(size, rng):
    """A field in [0, 1], (S, S): gradient, stripes, disc or soft noise."""
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
    """How far the letter covers each pixel, 0..1, (S, S). It is 60 to 85 % of the side high, less where it would not
    fit, and turned by up to 15 degrees; drawn large and averaged down."""
    fine = 4 if size <= 64 else 2
    side = size * fine
    left, top, right, bottom = letter_box(letter)
    width, height, angle = right - left, bottom - top, rng.uniform(-15, 15)
    cosine, sine = np.cos(np.radians(angle)), abs(np.sin(np.radians(angle)))
    turned_width, turned_height = width * cosine + height * sine, height * cosine + width * sine
    scale = min(rng.uniform(0.6, 0.85) / height, 0.96 / max(turned_width, turned_height)) * side
    # Its middle: anywhere from which it does not leave the picture
    x = side / 2 + (side - turned_width * scale) * rng.uniform(-0.48, 0.48)
    y = side / 2 + (side - turned_height * scale) * rng.uniform(-0.48, 0.48)
    mask = upright_letter(letter, side, scale, x, y)
    return np.asarray(mask.rotate(angle, Image.Resampling.BICUBIC, center=(x, y)).reduce(fine)) / 255


def letter_box(letter):  # its left, top, right and bottom at scale 1
    return _font(100).getbbox(letter, anchor="ls", stroke_width=3)


def upright_letter(letter, side, scale, x, y):
    """A grey Pillow picture of side x side pixels: the letter, white on black, the middle of its box at (x, y)."""
    left, top, right, bottom = letter_box(letter)
    mask = Image.new("L", (side, side))
    corner = x - scale * (left + right) / 2, y - scale * (top + bottom) / 2
    stroke = round(3 * scale)
    ImageDraw.Draw(mask).text(corner, letter, 255, _font(round(100 * scale)), anchor="ls", stroke_width=stroke)
    return mask


def nearest_letters(pictures, letters, poses=200):
    """Which of `letters` each of uint8 pictures (N, S, S, 3) shows, as numbers (N,): that of the one among `poses`
    random masks a letter that, scaled for each colour, comes nearest to the picture less its mean."""
    rng = np.random.default_rng(GLYPH)
    masks = [_letter_mask(letter, pictures.shape[1], rng).flatten() for letter in letters for _ in range(poses)]
    masks = np.stack(masks) - np.mean(masks, 1, keepdims=True)
    masks /= np.linalg.norm(masks, axis=1, keepdims=True)  # (letters * poses, S * S)
    explained = np.square(masks @ pictures.reshape(len(pictures), -1, 3)).sum(-1)  # (N, letters * poses)
    return explained.argmax(1) // poses
