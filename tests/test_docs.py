"""What README and docs say: scripts take the commands, and the figures of docs/results.md are those of its logs."""

import importlib
import json
import re
import subprocess
import sys

import pytest
from scripts import ROOT

PAGE = " ".join((ROOT / "docs" / "results.md").read_text().split())


def values(run, name):
    """{step: value} of what a run in docs/logs logged."""
    lines = map(json.loads, (ROOT / "docs" / "logs" / run / "log.jsonl").read_text().splitlines())
    return {line["step"]: line[name] for line in lines if name in line}


def check_series(pattern, found, digits):
    """A sentence "after 500, 1000 steps: 15.53, 17.57 dB" against {step: value}; `pattern` finds both lists."""
    steps, figures = re.search(pattern, PAGE).groups()
    figures = dict(zip(map(int, steps.split(",")), figures.split(", "), strict=True))
    assert figures == {step: f"{found[step]:.{digits}f}" for step in figures}


def test_flying_letters():
    losses, psnr = values("moving_glyphs_transformer", "val_loss"), values("moving_glyphs_tokenizer", "val_psnr")
    check_series(r"after ([\d, ]+) steps: ([\d., ]+) nats a token on 400 validation clips", losses, 3)
    assert f"{values('moving_glyphs_transformer', 'loss')[14000]:.2f} in training" in PAGE
    check_series(r"after ([\d, ]+) steps of 8: ([\d., ]+) dB on 64 validation clips", psnr, 2)
    assert f"after 2,400 more of 16: {psnr[3500 + 2400]:.2f} dB" in PAGE
    assert f"PSNR {values('moving_glyphs_pictures', 'val_psnr')[700]:.2f} dB on 60 validation pictures" in PAGE


def test_emoji():
    psnr, losses = values("emoji_tokenizer", "val_psnr"), values("emoji_transformer", "val_loss")
    check_series(r"PSNR after ([\d, ]+) steps: ([\d., ]+) dB on 161 validation pictures", psnr, 2)
    check_series(r"in training; after ([\d, ]+) steps ([\d., ]+) nats on validation pictures", losses, 2)
    loss, speed = (values("emoji_transformer", name)[6000] for name in ("loss", "images_per_second"))
    assert f"{round(speed, -2):,.0f} images/s; {loss:.2f} nats a token in training" in PAGE


def test_photographs():
    found, use = values("photographs", "val_psnr"), values("photographs", "val_codebook_use")[3000]
    check_series(r"PSNR after ([\d, ]+) steps: ([\d., ]+) dB on 165 validation crops", found, 2)
    speed, memory = (values("photographs", name) for name in ("images_per_second", "memory_gib"))
    middle = sorted(speed.values())[len(speed) // 2]
    assert f"{middle:.0f} images/s, {max(memory.values()):.1f} GiB" in PAGE
    assert f"whose {165 * 256:,} tokens are of {use * 2**18:,.0f} codes" in PAGE


def test_ablations():
    figures = json.loads((ROOT / "docs" / "logs" / "ablations" / "figures.json").read_text())
    for name, of_seeds in figures.items():
        best, unit, digits = (max, "dB", 2) if name.endswith("codes") else (min, "nats a token", 3)
        each = [best(found) for found in of_seeds]
        words = ", ".join(f"{value:.{digits}f}" for value in each)
        assert f"| {name} | {sum(each) / 3:.{digits}f} {unit} | {words} |" in PAGE


def commands():
    """Words of each command of the project's scripts in README, docs and the scripts' first screens, as bash has them."""
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    text = "\n".join(page.read_text() for page in pages)
    blocks = re.findall(r"^```bash\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    blocks += re.findall(r"`(python [\w/]+\.py [^`]+)`", text)
    for script in [*ROOT.glob("*.py"), ROOT / "docs" / "ablations.py"]:
        blocks += re.findall(r"^ *((?:python|torchrun) .*)", script.read_text().split('"""')[1], re.MULTILINE)
    show = "printf '%s\\x1f' \"$@\"; echo"
    stubs = f"python() {{ {show}; }}; torchrun() {{ {show}; }}; source() {{ true; }}; make() {{ true; }}\n"
    script = stubs + "\n".join(blocks)
    shown = subprocess.run(["bash", "-euc", script], capture_output=True, text=True, check=True).stdout
    for line in shown.splitlines():
        words = line.split("\x1f")[:-1]
        first = next(i for i, word in enumerate(words) if word.endswith(".py"))  # after torchrun's own
        yield words[first:]


@pytest.mark.parametrize("words", list(commands()), ids=" ".join)
def test_commands_are_taken(words, monkeypatch, capsys):
    """Each with one more flag, which there is not: that is all that the script has to say of its flags."""
    script, *flags = words
    monkeypatch.setattr(sys, "argv", [script, *flags, "--no-such-flag"])
    monkeypatch.syspath_prepend(ROOT / "docs")
    with pytest.raises(SystemExit):
        importlib.import_module(script.removeprefix("docs/").removesuffix(".py")).main()
    assert capsys.readouterr().err.endswith("unrecognized arguments: --no-such-flag (see --help)\n")
