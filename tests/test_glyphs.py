import numpy as np
import pytest
import torch

import data
import glyphs
from runtime import UserError


def test_glyphs_are_a_function_of_seed_stream_and_number():
    a, b = (data.open_pictures("glyphs:50:ABC", 32, train=True, seed=4) for _ in range(2))
    for i in (0, 7, 49):
        image, label = a[0, i]
        assert image.dtype == torch.uint8 and image.shape == (3, 32, 32) and label == i % 3
        assert torch.equal(image, b[9, i][0])
    others = [
        data.open_pictures("glyphs:50:ABC", 32, train=False, seed=4)[0, 7][0],
        data.open_pictures("glyphs:50:ABC", 32, train=True, seed=5)[0, 7][0],
        a[0, 10][0],
    ]
    for other in others:
        assert (other.int() - a[0, 7][0].int()).abs().float().mean() > 5


def test_glyph_sources():
    default = data.open_pictures("glyphs", 16, train=True)
    assert len(default) == 50_000 and "".join(default.classes) == "ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"
    assert default.name(17) == "glyph 17"
    assert len(data.open_pictures("glyphs:12", 16, train=True)) == 12
    for wrong in ("glyphs:", "glyphs:0", "glyphs:x", "glyphs:5:", "glyphs:5:A B", "glyphs:5:AA", "glyphs:5:A:B"):
        with pytest.raises(UserError, match="glyph"):
            data.open_pictures(wrong, 32, train=True)
    with pytest.raises(UserError, match="at least 16"):
        data.open_pictures("glyphs", 15, train=True)


@pytest.mark.parametrize("size", [16, 32, 100])
def test_glyphs_are_legible(size):
    """Letter and ground lie on different sides of luma 0.475, the letter is 60 to 85 % of the side high."""
    dataset = data.open_pictures("glyphs", size, train=True)
    heights, sides, share_between = [], [], []
    for i in range(144):
        image = dataset[0, i][0].double() / 255
        luma = 0.299 * image[0] + 0.587 * image[1] + 0.114 * image[2]
        border = torch.cat([luma[0], luma[-1], luma[:, 0], luma[:, -1]])
        ground_is_light = (border > 0.475).double().mean() > 0.5
        letter = (luma > 0.475) != ground_is_light
        rows = letter.any(1).nonzero()
        heights.append((rows.max() - rows.min() + 1).item() / size)
        sides.append(bool(ground_is_light))
        share_between.append(((luma > 0.31) & (luma < 0.64)).double().mean().item())
        assert 0.03 < letter.double().mean() < 0.5, i
    assert 0.25 < np.mean(sides) < 0.75  # light on dark and dark on light
    assert 0.55 < min(heights) and max(heights) < 0.98 and 0.65 < np.mean(heights) < 0.85
    assert np.mean(share_between) < 0.2  # only the letter's smooth edge is between


def test_wide_letters_lie_inside_the_picture():
    dataset = data.open_pictures("glyphs:60:MW", 64, train=True)
    for i in range(60):
        image = dataset[0, i][0].double() / 255
        light = 0.299 * image[0] + 0.587 * image[1] + 0.114 * image[2] > 0.475
        border = torch.cat([light[0], light[-1], light[:, 0], light[:, -1]])
        outside = min(border.sum().item(), (~border).sum().item())
        assert outside <= 2, i  # a corner may touch the edge; legs that leave the picture take 6 to 30 pixels


def test_a_glyph_looks_the_same_at_another_size():
    small, large = (data.open_pictures("glyphs", size, train=True) for size in (32, 128))
    for i in range(20):
        shrunk = large[0, i][0].float().unflatten(1, (32, 4)).unflatten(3, (32, 4)).mean((2, 4))
        assert (shrunk - small[0, i][0].float()).abs().mean() < 10, i  # two different glyphs: 60 and more


@pytest.mark.parametrize("size", [16, 24, 32])
def test_the_nearest_template_is_of_the_letter_shown(size):
    """Of other pictures than the templates; and of what stands on its head it is another's."""
    letters = "ACEHT"
    pictures = glyphs.Glyphs(f"glyphs:200:{letters}", size, train=True)
    images = np.stack([pictures[0, i][0].permute(1, 2, 0).numpy() for i in range(len(pictures))])
    assert (glyphs.nearest_letters(images, letters) == pictures.labels).mean() >= 0.99
    turned = glyphs.nearest_letters(images[:, ::-1], letters) == pictures.labels
    assert turned[pictures.labels == 4].mean() < 0.5  # a T
    noise = np.random.default_rng(0).integers(0, 256, (200, size, size, 3), np.uint8)
    assert (glyphs.nearest_letters(noise, letters) == pictures.labels).mean() < 0.4
