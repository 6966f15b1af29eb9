"""The trained model in the repository: what a transformer that has learnt something must show."""

from pathlib import Path

import numpy as np
import pytest
import torch
from scripts import fails_with_one_line, run

from ar_model import RELEASED_AR, SubTokenOptions, load_ar
from data import to_uint8
from lfq import split_indices
from tokenizer import load_tokenizer

TOKENS = 48  # the upper three of sixteen rows


@pytest.fixture(scope="module")
def emoji():
    return load_ar("emoji")


@pytest.fixture(scope="module")
def drawn(emoji):
    """(labels, tokens (8, 48)) of one picture a class."""
    labels = torch.arange(8)
    return labels, emoji[0].generate(labels, (1.5, 1.5), top_p=(0.95, 0.95), max_tokens=TOKENS)


@torch.no_grad()
def logits_of(model, drawn, null=False):
    labels, indices = drawn
    labels = torch.full_like(labels, model.config.num_classes) if null else labels
    return model(split_indices(indices, model.config.factorized_bits), labels)


def test_the_file(emoji):
    assert Path(RELEASED_AR["emoji"]).stat().st_size <= 8e6
    model, tokenizer = emoji
    assert len(model.class_names) == model.config.num_classes == 8 and "smileys_emotion" in model.class_names
    assert sum(model.config.factorized_bits) == tokenizer.config.bits
    same = load_tokenizer("emoji").state_dict()
    assert all(torch.equal(value, same[name]) for name, value in tokenizer.state_dict().items())


def test_bfloat16_agrees_with_float32(emoji, drawn):
    """The likeliest sub-tokens and the decoded pictures, to bf16's 8 bits."""
    model, tokenizer = emoji
    whole = logits_of(model, drawn)
    codes = drawn[1].view(8, 3, 16)
    with torch.autocast("cpu", torch.bfloat16):
        half, picture_half = logits_of(model, drawn), tokenizer.decode(codes)
    picture = tokenizer.decode(codes)
    for a, b in zip(whole, half):
        assert (a.argmax(-1) == b.argmax(-1)).float().mean() > 0.95
        assert ((a - b.float()).norm() / a.norm()).item() < 0.02
    assert (to_uint8(picture).int() - to_uint8(picture_half.float()).int()).abs().float().mean() < 1


def entropy(logits):
    log_p = logits.double().log_softmax(-1)
    return -(log_p.exp() * log_p.nan_to_num(neginf=0)).sum(-1).mean().item()


def adjusted(emoji, drawn, part, scale, top_p):
    both = torch.cat([logits_of(emoji[0], drawn)[part], logits_of(emoji[0], drawn, null=True)[part]])
    return SubTokenOptions(scale, 1.0, 0, top_p).adjust(both, len(drawn[0]))


@pytest.mark.parametrize("part", [0, 1])
def test_guidance_sharpens_and_top_p_narrows(emoji, drawn, part):
    """Up to the scale at which guidance only exaggerates, the more of it, the fewer sub-tokens are likely."""
    entropies = [entropy(adjusted(emoji, drawn, part, scale, 1.0)) for scale in (0.0, 1.0, 1.5)]
    assert entropies[0] > entropies[1] > entropies[2] > 0
    left = [
        adjusted(emoji, drawn, part, 1.0, top_p).isfinite().sum(-1).float().mean() for top_p in (1.0, 0.99, 0.9, 0.5)
    ]
    assert left[0] == 64 and left[0] > left[1] > left[2] > left[3] >= 1


def test_the_class_is_told_from_the_picture(emoji, drawn):
    """The picture's tokens are likelier under its own class than under the mean other one."""
    labels, indices = drawn

    def likelihood(classes):
        logits = logits_of(emoji[0], (classes, indices))
        pairs = zip(logits, split_indices(indices, emoji[0].config.factorized_bits))
        return sum(part.log_softmax(-1).gather(-1, found[..., None]).sum((1, 2)) for part, found in pairs)

    own = likelihood(labels)
    others = torch.stack([likelihood((labels + shift) % 8) for shift in range(1, 8)])
    assert (own > others.mean(0)).float().mean() >= 0.75


def test_samples_as_a_user_draws_them(tmp_path):
    """Emoji stand on white: so do nearly all corners."""
    flags = ["--model", "emoji", "--per-class", 1, "--classes", "smileys_emotion,food_drink,3"]
    run("sample.py", *flags, "--out", tmp_path / "samples.npz", "--preset", "show")
    pictures = np.load(tmp_path / "samples.npz")["arr_0"]
    assert pictures.shape == (3, 64, 64, 3)
    corners = pictures[:, ::63, ::63].astype(float).mean(-1)
    assert (corners > 235).mean() > 0.8 and pictures.std() > 20
    line = fails_with_one_line("sample.py", "--model", "emojis", "--out", tmp_path / "x.png")
    assert "released names: B, L, XL, emoji" in line
