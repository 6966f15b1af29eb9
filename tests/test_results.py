"""The figures of docs/results.md are those of the logs beside it."""

import re

from scripts import ROOT, log_lines

PAGE = " ".join((ROOT / "docs" / "results.md").read_text().split())


def values(run, name):
    """{step: value} of what a run in docs/logs logged."""
    return {line["step"]: line[name] for line in log_lines(ROOT / "docs" / "logs" / run) if name in line}


def test_flying_letters():
    losses, psnr = values("moving_glyphs_transformer", "val_loss"), values("moving_glyphs_tokenizer", "val_psnr")
    steps, figures = re.search(r"after ([\d, ]+) steps: ([\d., ]+) nats a token on 400 validation clips", PAGE).groups()
    assert dict(zip(map(int, steps.split(",")), figures.split(", "))) == {s: f"{v:.3f}" for s, v in losses.items()}
    assert f"{values('moving_glyphs_transformer', 'loss')[14000]:.2f} in training" in PAGE
    steps, figures = re.search(r"after ([\d, ]+) steps of 8: ([\d., ]+) dB on 64 validation clips", PAGE).groups()
    for step, figure in zip(map(int, steps.split(",")), figures.split(", "), strict=True):
        assert f"{psnr[step]:.2f}" == figure
    assert f"after 2,400 more of 16: {psnr[3500 + 2400]:.2f} dB" in PAGE
    assert f"PSNR {values('moving_glyphs_pictures', 'val_psnr')[700]:.2f} dB on 60 validation pictures" in PAGE
