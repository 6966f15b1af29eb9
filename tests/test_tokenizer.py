import dataclasses
import pickle
import urllib.request
import warnings

import pytest
import torch
from golden_files import checkpoint_keys, fill, load, named_tensor, relative
from PIL import Image
from scripts import run

import ar_model
import tokenizer as tk
from ar_model import load_ar
from runtime import UserError

SIZES = {
    "tiny16": tk.TokenizerConfig(32, (1, 1, 2, 2, 4), 1),
    "tiny8": tk.TokenizerConfig(32, (1, 2, 2, 4), 2),
    "256_L": tk.TOKENIZER_SIZES["256_L"],
    "128_L": tk.TOKENIZER_SIZES["128_L"],
}
FILES = {name: address.rsplit("/", 1)[1] for name, address in tk.RELEASED_TOKENIZERS.items()}
PRETRAINED = {"pretrain_256_16384": 14, "pretrain_256_262144": 18}


def empty(config):
    """The module without the cost of random initialisation."""
    with torch.device("meta"):
        module = tk.Tokenizer(config)
    return module.to_empty(device="cpu").eval()


@pytest.mark.parametrize("size", SIZES)
@torch.no_grad()
def test_golden(size):
    golden = load(f"tokenizer_{size}")
    model = fill(empty(SIZES[size]))
    latent = model.encoder(golden["image"])
    assert relative(latent, golden["encoder_out"]) < 1e-5
    reconstruction, indices, _ = model(golden["image"])
    assert torch.equal(indices, golden["indices"])
    assert relative(reconstruction, golden["reconstruction"]) < 1e-5
    assert torch.equal(model.encode(golden["image"]), golden["indices"])
    assert relative(model.decode(golden["indices"]), golden["reconstruction"]) < 1e-5


@pytest.mark.parametrize("size, encoder, decoder", [("256_L", 49.75e6, 65.38e6), ("128_L", 48.42e6, 63.60e6)])
def test_sizes_and_entries(size, encoder, decoder):
    with torch.device("meta"):
        model = tk.Tokenizer(tk.TOKENIZER_SIZES[size])
    for part, count in ((model.encoder, encoder), (model.decoder, decoder)):
        assert sum(p.numel() for p in part.parameters()) == pytest.approx(count, abs=5e3)
    released = checkpoint_keys(f"imagenet_{size}.ckpt")
    released = {k: v[0] for k, v in released.items() if k.startswith(("encoder.", "decoder."))}
    assert {k: tuple(v.shape) for k, v in model.state_dict().items()} == released


def released_file(path, size, change=None, container=True, **extra):
    """A file with a released file's entries: every tensor constant (and so small on disk), encoder and decoder 1, their
    moving average 2, all else 3."""
    entries = {}
    for name, (shape, dtype) in checkpoint_keys(FILES[size]).items():
        value = 1 if name.startswith(("encoder.", "decoder.")) else 2 if name.startswith("model_ema.") else 3
        entries[name] = torch.full((1,), value, dtype=dtype).expand(shape) if shape else torch.tensor(value)
    if change:
        change(entries)
    torch.save({"state_dict": entries, "epoch": 3, **extra} if container else entries, path)
    return path


def values(module):
    return {float(v) for p in module.state_dict().values() for v in (p.min(), p.max())}


@pytest.mark.parametrize("container", [True, False])
@pytest.mark.parametrize("size", ["128_L", "256_L"])
def test_released_file(tmp_path, size, container):
    path = released_file(tmp_path / "x.ckpt", size, container=container)
    for ema, expected in ((True, {2.0}), (False, {1.0})):
        model = tk.load_tokenizer(path, ema=ema)
        assert model.config == tk.TOKENIZER_SIZES[size]
        assert values(model) == expected and not model.training


def by_name(entries):
    """Each entry a constant of its own, drawn by its name."""
    for name, value in entries.items():
        entries[name] = named_tensor(name, (1,) * bool(value.shape)).to(value.dtype).expand(value.shape)


@pytest.mark.parametrize("name, bits", PRETRAINED.items())
def test_pretrained_tokenizers(tmp_path, monkeypatch, name, bits):
    """By their names, out of the hub's cache; every entry of the file is known, and goes to its own place."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    path = tmp_path / "hub" / "checkpoints" / FILES[name]
    path.parent.mkdir(parents=True)
    released_file(path, name, by_name)
    codes = 2**bits
    file = f"Open-MAGVIT2-Tokenizer-{codes}-Pretrain/resolve/main/pretrain256_{codes}.ckpt"
    assert tk.RELEASED_TOKENIZERS[name] == f"https://huggingface.co/TencentARC/{file}"
    for ema in (True, False):
        model = tk.load_tokenizer(name, ema=ema)
        assert model.config == dataclasses.replace(tk.TOKENIZER_SIZES["256_L"], bits=bits)
        for entry, value in model.state_dict().items():
            due = named_tensor("model_ema." + entry.replace(".", "") if ema else entry, (1,))
            assert torch.equal(value, due.expand(value.shape)), entry


BLUR = "loss.discriminator.blocks.0.1."


@pytest.mark.parametrize(
    "entry, words",
    [
        (BLUR + "extra", f"entry {BLUR}extra is unexpected"),
        ("loss.discriminator.blocks.3.0.weight", "blocks.3.0.weight is unexpected"),
        # (the blur's kernel is no parameter, and has no average)
        ("model_ema.lossdiscriminatorblocks01kernel", "entry lossdiscriminatorblocks01kernel is unexpected"),
    ],
)
def test_a_foreign_entry_beside_the_other_discriminator(tmp_path, entry, words):
    path = released_file(tmp_path / "x.ckpt", "pretrain_256_16384", lambda e: e.update({entry: torch.ones(3)}))
    with pytest.raises(UserError, match=f"x.ckpt.*{words}"):
        tk.load_tokenizer(path)


def test_fourteen_bits_from_pictures_to_samples(tmp_path):
    """As with pretrain_256_16384: a tokenizer of 14 bits, a transformer of 6 + 8, samples."""
    flags = "--data glyphs:40:AB --size 16 --bits 14 --steps 2 --global-batch 8 --micro-batch 8 --workers 0"
    run("train_tokenizer.py", *flags.split(), "--out", tmp_path / "tokenizer")
    flags = ["--data", "glyphs:40:AB", "--size", 16, "--workers", 0]
    run("encode.py", "--tokenizer", tmp_path / "tokenizer", *flags, "--out", tmp_path / "codes")
    flags = [
        "--width",
        "32",
        "--heads",
        "2",
        "--spatial-layers",
        "1",
        "--global-batch",
        "8",
        "--micro-batch",
        "8",
        "--steps",
        "2",
        "--pre-bits",
        "6",
    ]
    run("train_ar.py", "--codes", tmp_path / "codes", *flags, "--out", tmp_path / "ar")
    model, tokenizer = load_ar(tmp_path / "ar")
    assert model.config.factorized_bits == (6, 8) and tokenizer.config.bits == 14
    run("sample.py", "--model", tmp_path / "ar", "--per-class", 3, "--out", tmp_path / "samples.png")
    assert Image.open(tmp_path / "samples.png").mode == "RGB"


def test_tokenizer_of_a_released_transformer_by_name(tmp_path, monkeypatch):
    """Codes for finetuning B have to be of the tokenizer that B was trained with."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    path = tmp_path / "hub" / "checkpoints" / "AR_256_B.ckpt"
    path.parent.mkdir(parents=True)
    shapes = checkpoint_keys("AR_256_B.ckpt")
    torch.save({name: torch.ones(1).expand(shape) for name, (shape, _) in shapes.items() if shape}, path)
    assert tk.load_tokenizer("B").config == tk.TOKENIZER_SIZES["256_L"]
    assert ar_model.RELEASED_AR is tk.RELEASED_AR
    run("encode.py", "--tokenizer", "B", "--data", "glyphs:1:A", "--size", 32, "--workers", 0, "--out", tmp_path / "x")
    assert tk.load_tokenizer(tmp_path / "x" / "tokenizer.pt").config == tk.TOKENIZER_SIZES["256_L"]


def test_tokenizer_carried_by_a_transformer_file(tmp_path):
    entries = {
        name: torch.full((1,), 5.0).expand(shape)
        for name, (shape, _) in checkpoint_keys("AR_256_B.ckpt").items()
        if shape
    }
    torch.save({"state_dict": entries}, tmp_path / "ar.ckpt")
    model = tk.load_tokenizer(tmp_path / "ar.ckpt")
    assert model.config == tk.TOKENIZER_SIZES["256_L"] and values(model) == {5.0}


KEY = "decoder.up.3.block.1.conv2.weight"


@pytest.mark.parametrize(
    "change, words",
    [
        (
            lambda e: e.pop("model_ema." + KEY.replace(".", "")),
            ["model_ema.", "decoderup3block1conv2weight is missing"],
        ),
        (lambda e: e.pop("encoder.conv_in.weight"), ["encoder.conv_in.weight"]),
        (lambda e: e.update({KEY: torch.ones(3)}), [KEY, "(3,)"]),
        (lambda e: e.update({"model_ema." + KEY.replace(".", ""): torch.ones(3)}), [KEY.replace(".", ""), "(3,)"]),
        (lambda e: e.update({"encoder.extra.weight": torch.ones(3)}), ["encoder.extra.weight"]),
        (lambda e: e.update({"model_ema.strange": torch.ones(3)}), ["model_ema.", "entry strange is unexpected"]),
        (lambda e: e.update({"strange.thing": torch.ones(3)}), ["strange.thing", "unexpected"]),
        (lambda e: e.update({"loss.discriminator.x": torch.ones(3)}), ["loss.discriminator.x", "unexpected"]),
        (lambda e: e.update({"loss.perceptual_loss.lin5.model.1.weight": torch.ones(3)}), ["lin5", "unexpected"]),
        (lambda e: e.pop("model_ema.lossdiscriminatormain3bias"), ["lossdiscriminatormain3bias is missing"]),
    ],
)
def test_a_wrong_entry_is_named(tmp_path, change, words):
    path = released_file(tmp_path / "x.ckpt", "128_L", change)
    with pytest.raises(UserError) as error:
        tk.load_tokenizer(path)
    for word in [*words, "x.ckpt"]:
        assert word in str(error.value)
    assert "\n" not in str(error.value)


def test_a_file_without_averages_says_so(tmp_path):
    def change(entries):
        for name in [name for name in entries if name.startswith("model_ema.")]:
            del entries[name]

    path = released_file(tmp_path / "x.ckpt", "128_L", change)
    with pytest.warns(UserWarning, match=r"x.ckpt holds no moving average .* as they stand"):
        assert values(tk.load_tokenizer(path)) == {1.0}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert values(tk.load_tokenizer(path, ema=False)) == {1.0}


def test_a_missing_entry_names_the_size(tmp_path):
    def change(entries):
        del entries[KEY], entries["model_ema." + KEY.replace(".", "")]

    with pytest.raises(UserError, match=rf"128_L tokenizer: entry {KEY} is missing"):
        tk.load_tokenizer(released_file(tmp_path / "x.ckpt", "128_L", change))


class Foreign:
    """Would leave a mark if a reader ever ran it."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        import os

        return os.mkdir, (str(self.mark),)


def test_foreign_objects_are_not_executed(tmp_path):
    mark = tmp_path / "executed"
    path = released_file(tmp_path / "x.ckpt", "128_L", callbacks={"state": Foreign(mark)})
    with pytest.warns(UserWarning, match="posix.mkdir"):
        model = tk.load_tokenizer(path)
    assert values(model) == {2.0} and not mark.exists()
    (tmp_path / "evil.pt").write_bytes(pickle.dumps(Foreign(mark)))
    with pytest.raises(UserError, match="evil.pt"), pytest.warns():
        tk.load_tokenizer(tmp_path / "evil.pt")
    assert not mark.exists()


def test_own_file_round_trip(tmp_path):
    model = tk.Tokenizer(SIZES["tiny8"])
    average = {name: value + 1 for name, value in model.state_dict().items()}
    content = {
        "kind": "tokenizer",
        "step": 3,
        "config": dataclasses.asdict(model.config),
        "tokenizer": model.state_dict(),
    }
    torch.save(content | {"tokenizer_ema": average}, tmp_path / "step_00000003.pt")
    for source in (tmp_path / "step_00000003.pt", tmp_path):  # a file, a run folder
        ours = tk.load_tokenizer(source).state_dict()
        assert all(torch.equal(ours[name], average[name]) for name in average)
    raw = tk.load_tokenizer(tmp_path, ema=False).state_dict()
    assert all(torch.equal(raw[name], value) for name, value in model.state_dict().items())


def test_the_first_level_may_be_wider_than_the_first_convolution(tmp_path):
    """Of a size with multipliers from 2 on; and its bare state dict spells it out."""
    config = tk.TokenizerConfig(32, (2, 4), 1)
    model = tk.Tokenizer(config).eval()
    shapes = {name: tuple(value.shape) for name, value in model.encoder.state_dict().items()}
    assert shapes["conv_in.weight"] == (32, 3, 3, 3)
    assert shapes["down.0.block.0.norm1.weight"] == (32,)
    assert shapes["down.0.block.0.conv1.weight"] == (64, 32, 3, 3)
    assert shapes["down.0.block.0.nin_shortcut.weight"] == (64, 32, 1, 1)
    torch.save(model.state_dict(), tmp_path / "bare.pt")
    loaded = tk.load_tokenizer(tmp_path / "bare.pt", ema=False)
    assert loaded.config == config
    images = torch.rand(1, 3, 8, 8)
    assert torch.equal(loaded(images)[0], model(images)[0])


@pytest.mark.parametrize(
    "change",
    [
        lambda c: c.pop("config"),
        lambda c: c.update(config=None),
        lambda c: c["config"].update(strange=1),
        lambda c: c.pop("tokenizer"),
        lambda c: c.update(kind="ar", tokenizer={"state": {}}),
    ],
)
def test_own_file_that_is_not_whole(tmp_path, change):
    model = tk.Tokenizer(SIZES["tiny8"])
    content = {"kind": "tokenizer", "config": dataclasses.asdict(model.config), "tokenizer": model.state_dict()}
    change(content)
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(UserError, match="x.pt is no whole file"):
        tk.load_tokenizer(tmp_path / "x.pt")


@pytest.mark.parametrize("value", [torch.tensor(1.0), torch.ones(0, 3, 3, 3)])
def test_a_size_that_shapes_do_not_spell_out(tmp_path, value):
    state = tk.Tokenizer(SIZES["tiny8"]).state_dict()
    torch.save(state | {"encoder.conv_in.weight": value}, tmp_path / "x.pt")
    with pytest.raises(UserError, match="x.pt holds no tokenizer: entry encoder.conv_in.weight has shape"):
        tk.load_tokenizer(tmp_path / "x.pt")


@pytest.mark.parametrize("content", [b"", b"hello", b"PK\x03\x04 cut short"])
def test_torn_and_alien_files(tmp_path, content):
    (tmp_path / "x.ckpt").write_bytes(content)
    with pytest.raises(UserError, match="x.ckpt"):
        tk.load_tokenizer(tmp_path / "x.ckpt")


def test_a_file_that_may_not_be_read(tmp_path, monkeypatch):
    def refuse(*args, **options):
        raise PermissionError(13, "Permission denied")

    (tmp_path / "x.ckpt").write_bytes(b"whatever")
    monkeypatch.setattr(torch, "load", refuse)
    with pytest.raises(UserError, match="cannot read .*x.ckpt: Permission denied"):
        tk.load_tokenizer(tmp_path / "x.ckpt")


def test_missing_path_and_offline_download(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="no file or folder nowhere.ckpt"):
        tk.load_tokenizer("nowhere.ckpt")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))

    def offline(*args, **options):
        raise OSError("no route")

    monkeypatch.setattr(urllib.request, "urlopen", offline)
    with pytest.raises(UserError) as error:
        tk.load_tokenizer("256_L")
    assert tk.RELEASED_TOKENIZERS["256_L"] in str(error.value)
    assert str(tmp_path / "hub" / "checkpoints" / "imagenet_256_L.ckpt") in str(error.value)
    path = tmp_path / "hub" / "checkpoints" / "imagenet_256_L.ckpt"  # where the message says: found from there on
    path.parent.mkdir(parents=True, exist_ok=True)
    released_file(path, "256_L")
    assert tk.load_tokenizer("256_L").config == tk.TOKENIZER_SIZES["256_L"]


def test_wrong_image_size():
    model = tk.Tokenizer(SIZES["tiny8"])
    with pytest.raises(UserError, match="60x64 is not a multiple of 8"):
        model(torch.zeros(1, 3, 60, 64))
    with pytest.raises(UserError, match="two tokens"):
        model(torch.zeros(1, 3, 8, 8))
