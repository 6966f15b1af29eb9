"""Weights files that are hostile, malformed or cannot be read for now; downloads that fail."""

import dataclasses
import http.server
import os
import pickle
import struct
import threading
import zipfile

import pytest
import torch
import torch.distributed as dist
from scripts import on_two_ranks
from torch.serialization import MAGIC_NUMBER, PROTOCOL_VERSION

import checkpoint
import runtime
from ar_model import ARConfig, ARTransformer, load_ar
from inception import load_inception
from losses import load_lpips
from runtime import Unreadable, UserError
from tokenizer import Tokenizer, TokenizerConfig, load_tokenizer

TOKENIZER, AR = TokenizerConfig(32, (1, 2), 1), ARConfig(32, 1, 1, 1, grid=4, num_classes=2)
ENTRY = "encoder.conv_in.weight"


def text(word):
    return b"X" + struct.pack("<I", len(word)) + word.encode()


# pickle's BUILD on a function of torch: the name and switch by which torch's old format wrote a file.
SETS_STATE = b"ctorch._utils\n_rebuild_tensor\nN}" + text("__name__") + text("PWNED") + b"s"
SETS_STATE += text("dump_patches") + b"\x88s\x86b"


def test_a_file_sets_no_state_and_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with open("old.pt", "wb") as file:
        for part in (MAGIC_NUMBER, PROTOCOL_VERSION, {}):
            pickle.dump(part, file, 2)
        file.write(b"\x80\x02(" + text("module") + SETS_STATE + text("\nlines\n") + text("x") + b"tQ.")
        pickle.dump([], file, 2)
    with zipfile.ZipFile("zip.pt", "w") as file:
        file.writestr("a/data.pkl", b"\x80\x02" + SETS_STATE + b".")
        file.writestr("a/version", "3\n")
    with open("old.pt", "ab") as file:  # a zip archive to Python, not to torch
        file.write((tmp_path / "zip.pt").read_bytes())
    with pytest.raises(UserError, match="old.pt"):
        checkpoint.read_weights("old.pt")
    checkpoint.read_weights("zip.pt")
    assert torch._utils._rebuild_tensor.__name__ == "_rebuild_tensor"
    assert sorted(os.listdir()) == ["old.pt", "zip.pt"]


def own_tokenizer(path, state=None, **config):
    fields = dataclasses.asdict(TOKENIZER) | config
    state = Tokenizer(TOKENIZER).state_dict() | (state or {})
    torch.save({"kind": "tokenizer", "config": fields, "tokenizer": state}, path)
    return state


@pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2])
def test_packed_records_are_not_unpacked(tmp_path, method):
    own_tokenizer(tmp_path / "whole.pt")
    with zipfile.ZipFile(tmp_path / "whole.pt") as a, zipfile.ZipFile(tmp_path / "x.pt", "w", method) as b:
        for name in a.namelist():
            b.writestr(name, a.read(name))
    with pytest.raises(UserError, match="x.pt holds packed records"):
        load_tokenizer(tmp_path / "x.pt")
    assert checkpoint.is_intact(tmp_path / "whole.pt") and not checkpoint.is_intact(tmp_path / "x.pt")


@pytest.mark.parametrize(
    "config",
    [{"channels": n} for n in (32.0, "32", None, True, [32], 32 * 10**12)]
    + [{"channel_multipliers": n} for n in ("12", None, [1] * 1000, [1, 10**9])]
    + [{"blocks_per_level": 10**9}, {"blocks_per_level": 10**5}, {"bits": 18.0}],
)
def test_sizes_of_a_tokenizer_that_the_file_does_not_hold(tmp_path, config):
    own_tokenizer(tmp_path / "x.pt", **config)
    with pytest.raises(UserError, match="x.pt"):
        load_tokenizer(tmp_path / "x.pt")


@pytest.mark.parametrize("name", ["block.1000000000", "block.²", "block.-1"])
def test_block_numbers_in_names(tmp_path, name):
    state = Tokenizer(TOKENIZER).state_dict()
    torch.save(state | {f"encoder.down.0.{name}": torch.zeros(1)}, tmp_path / "x.pt")
    with pytest.raises(UserError, match="x.pt does not hold"):
        load_tokenizer(tmp_path / "x.pt")


@pytest.mark.parametrize(
    "config",
    [{"spatial_layers": n} for n in (10**9, 10**5, 1.0, "1", None)]
    + [{"width": 10**12}, {"width": 10**6}, {"grid": 10**9}, {"num_classes": 10**12}, {"dropout": "0"}]
    + [{"factorized_bits": n} for n in ((6, 60), (29, 1), (6.0, 12), 5)],
)
def test_sizes_of_a_transformer_that_the_file_does_not_hold(tmp_path, config):
    content = {"kind": "ar", "config": dataclasses.asdict(AR) | config, "class_names": None, "tokenizer": None}
    torch.save(content | {"model": ARTransformer(AR).state_dict()}, tmp_path / "x.pt")
    with pytest.raises(UserError, match="x.pt"):
        load_ar(tmp_path / "x.pt")


@pytest.mark.parametrize("old_format", [False, True])
@pytest.mark.parametrize(
    "change",
    [
        lambda w: w.to_sparse(),
        lambda w: w.to("meta"),
        lambda w: torch.quantize_per_tensor(w, 0.1, 0, torch.qint8),
        lambda w: w.to(torch.complex64),
        lambda w: w.int(),
        lambda w: w.tolist(),
        lambda w: w / 0,
        lambda w: w * torch.nan,
        lambda w: w.double() * 1e300,
    ],
)
def test_entries_that_are_no_finite_floats(tmp_path, change, old_format):
    state = Tokenizer(TOKENIZER).state_dict()
    state[ENTRY] = change(state[ENTRY])
    torch.save(state, tmp_path / "x.pt", _use_new_zipfile_serialization=not old_format)
    with pytest.raises(UserError, match=f"x.pt.*{ENTRY}") as error:
        load_tokenizer(tmp_path / "x.pt")
    assert "\n" not in str(error.value)


def test_weights_beyond_this_machines_memory():
    huge = {"a": torch.zeros(()).expand(10**7, 10**7)}
    with pytest.raises(UserError, match="x.pt does not hold it: 372529 GiB"):
        checkpoint.match(huge, huge, "x.pt", "it")


@pytest.mark.parametrize("load", [load_tokenizer, load_ar, lambda p: load_lpips("vgg", p), load_inception])
def test_what_is_no_file_or_cannot_be_read(tmp_path, monkeypatch, load):
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(UserError, match="fifo is no plain file"):
        load(tmp_path / "fifo")
    with pytest.raises(UserError, match="there is no file"):
        load(tmp_path / "nothing")
    with pytest.raises(Unreadable, match="cannot read .*: Input/output error"):
        load("/proc/self/mem")


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
def test_prefixes_of_wrapped_models(tmp_path, prefix):
    state = Tokenizer(TOKENIZER).state_dict()
    torch.save({prefix + name: value for name, value in state.items()}, tmp_path / "x.pt")
    with pytest.warns(UserWarning, match=f"read without {prefix} before"):
        read = load_tokenizer(tmp_path / "x.pt").state_dict()
    assert all(torch.equal(read[name], value) for name, value in state.items())
    model = ARTransformer(AR)
    torch.save({prefix + name: value for name, value in model.state_dict().items()}, tmp_path / "x.pt")
    with pytest.warns(UserWarning, match=f"read without {prefix} before"):
        assert load_ar(tmp_path / "x.pt", config=AR)[0].config == AR


# Checkpoints -----------------------------------------------------------------------------------------------


def test_a_checkpoint_that_cannot_be_read_for_now_is_not_passed_over(tmp_path, monkeypatch):
    for step in (1, 2):
        checkpoint.save_checkpoint(tmp_path, {"kind": "ar", "step": step, "settings": {}})

    rt = runtime.Runtime(torch.device("cpu"))

    def failing(error):
        def fail(*_):
            raise error

        monkeypatch.setattr(zipfile.ZipFile, "testzip", fail)

    for error in (OSError(5, "Input/output error"), MemoryError()):
        failing(error)
        with pytest.raises(Unreadable, match="cannot read .*step_00000002.pt"):
            checkpoint.load_latest(rt, tmp_path, "ar")
        with pytest.raises(Unreadable, match="cannot read .*step_00000002.pt"):
            checkpoint.locate(tmp_path, {})
    failing(OSError("damaged"))  # without a number: of zipfile's own
    assert checkpoint.load_latest(rt, tmp_path, "ar") == (None, None)


@pytest.mark.parametrize("change", [{"step": None}, {"step": "2"}, {"settings": None}])
def test_a_checkpoint_without_training_state(tmp_path, change):
    checkpoint.save_checkpoint(tmp_path, {"kind": "ar", "step": 1, "settings": {}})
    torch.save({"kind": "ar", "step": 2, "settings": {}} | change, tmp_path / "step_00000002.pt")
    with pytest.raises(UserError, match="step_00000002.pt holds no training state"):
        checkpoint.load_latest(runtime.Runtime(torch.device("cpu")), tmp_path, "ar")


# Downloads -------------------------------------------------------------------------------------------------


class Short(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.send_header("Content-Length", "2000" if "short" in self.path else "1000")
        self.end_headers()
        self.wfile.write(b"x" * 1000)

    def log_message(self, *_):
        pass


def test_a_download_is_whole_or_absent(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    server = http.server.HTTPServer(("127.0.0.1", 0), Short)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    with pytest.raises(UserError, match="could not download .*1000 of 2000 bytes came.*put it at"):
        checkpoint.download(f"{address}/short.pt")
    path = checkpoint.download(f"{address}/whole.pt")
    server.shutdown()
    assert [p.name for p in path.parent.iterdir()] == ["whole.pt"]
    with pytest.raises(UserError, match="whole.pt.*remove it, and it is downloaded again"):
        checkpoint.read_weights(path)


def _download(rank, folder):
    os.environ |= {"LOCAL_RANK": str(rank), "TORCH_HOME": str(folder)}
    with pytest.raises(UserError, match="could not download"):
        checkpoint.download("http://127.0.0.1:9/x.pt")
    dist.barrier()


def test_a_download_fails_on_all_ranks(tmp_path):
    on_two_ranks(_download, tmp_path, tmp_path / "hub")
