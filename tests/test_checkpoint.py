"""Weights files that are hostile, malformed or cannot be read for now; downloads that fail."""

import contextlib
import dataclasses
import http.server
import io
import os
import pickle
import re
import socket
import struct
import sys
import threading
import time
import zipfile

import pytest
import torch
import torch.distributed as dist
from scripts import on_two_ranks, server
from torch.serialization import MAGIC_NUMBER, PROTOCOL_VERSION

import checkpoint
import runtime
from ar_model import ARConfig, ARTransformer, load_ar
from inception import load_inception
from losses import load_lpips
from runtime import UserError
from tokenizer import RELEASED_TOKENIZERS, Tokenizer, TokenizerConfig, load_tokenizer

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
    with pytest.raises(UserError, match="cannot read .*: Input/output error"):
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
        with pytest.raises(UserError, match="cannot read .*step_00000002.pt"):
            checkpoint.load_latest(rt, tmp_path, "ar")
        with pytest.raises(UserError, match="cannot read .*step_00000002.pt"):
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


CONTENT = bytes(range(256)) * 1200


class Server(http.server.BaseHTTPRequestHandler):
    """Serves CONTENT as the first part of the address says, and notes what was asked for."""

    asked, go_on, protocol_version = [], threading.Event(), "HTTP/1.1"

    def do_GET(self):
        kind, given = self.path.split("/")[1], self.headers["Range"]
        Server.asked.append((self.path, given))
        start = 0 if "plain" in kind else int(re.fullmatch("bytes=([0-9]+)-", given)[1])
        if kind == "nothing":
            return self.send_error(404)
        if kind == "moved":
            return self.answer(302, 0, {"Location": f"http://localhost:{self.server.server_port}/breaks/x.pt"})
        if start >= len(CONTENT):
            return self.answer(416, 0, {"Content-Range": f"bytes */{len(CONTENT)}"})
        ranged = {"Content-Range": f"bytes {start}-{len(CONTENT) - 1}/{len(CONTENT)}"}
        if kind == "untold":  # neither a length nor ranges
            self.answer(200, None, {"Connection": "close"})
        elif kind == "liar":  # says that it goes on from there, and starts over
            self.answer(206, len(CONTENT), ranged)
            start = 0
        elif "plain" in kind:
            self.answer(200, len(CONTENT))
        else:
            self.answer(206, len(CONTENT) - start, ranged)
        end = start + 100_000 if "breaks" in kind or kind == "hangs" else len(CONTENT)
        end = 100_000 // len(Server.asked) if kind == "plain-wanes" else end
        self.wfile.write(CONTENT[start:end])
        self.close_connection = True
        if kind == "hangs":
            Server.go_on.wait(60)
            self.wfile.write(CONTENT[end:])
        if kind == "resets-breaks":
            time.sleep(0.2)  # the reset drops what was not read yet
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()

    def answer(self, status, length, headers=()):
        self.send_response(status)
        for name, value in dict(headers).items():
            self.send_header(name, value)
        if length is not None:
            self.send_header("Content-Length", str(length))
        self.end_headers()

    def handle(self):
        with contextlib.suppress(OSError):
            super().handle()

    def finish(self):
        with contextlib.suppress(OSError):
            super().finish()

    def log_message(self, *_):
        pass


@pytest.fixture
def address(tmp_path, monkeypatch):
    """Of a server; downloads go to tmp_path/hub/checkpoints."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.delenv("HF_ENDPOINT", raising=False)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        Server.asked.clear()
        Server.go_on.clear()
        yield f"http://127.0.0.1:{server.server_port}"
        Server.go_on.set()
        server.shutdown()


@pytest.fixture
def cache(tmp_path):
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    return folder


def ranges():
    return [given.removeprefix("bytes=") for _, given in Server.asked]


def is_whole(path):
    """And nothing lies beside it."""
    return path.read_bytes() == CONTENT and [p.name for p in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize("kind", ["whole", "plain", "untold"])
def test_a_download(address, kind):
    assert is_whole(checkpoint.download(f"{address}/{kind}/x.pt"))
    assert is_whole(checkpoint.download(f"{address}/{kind}/x.pt")) and ranges() == ["0-"]  # from the cache


@pytest.mark.parametrize("kind", ["breaks", "resets-breaks", "moved"])
def test_a_broken_connection_is_taken_up_again(address, kind):
    """Also behind a redirection to another host."""
    assert is_whole(checkpoint.download(f"{address}/{kind}/x.pt"))
    asked = [int(text[:-1]) for text in ranges()]
    assert asked[0] == 0 and asked[-1] > 200_000 and asked == sorted(asked) and len(set(asked)) >= 4
    assert {path for path, _ in Server.asked} == {f"/{kind}/x.pt"} | ({"/breaks/x.pt"} if kind == "moved" else set())


def test_a_server_that_breaks_and_knows_no_ranges(address, cache):
    with pytest.raises(UserError, match="could not download .*100000 of 307200 bytes came.*put it at"):
        checkpoint.download(f"{address}/plain-breaks/x.pt")
    assert [p.name for p in cache.iterdir()] == ["x.pt.part"] and len(Server.asked) == 2
    assert is_whole(checkpoint.download(f"{address}/plain/x.pt"))  # and not appended to the part


def test_a_server_that_knows_no_ranges_and_sends_ever_less(address, cache):
    with pytest.raises(UserError, match=f"could not download .* of {len(CONTENT)} bytes came"):
        checkpoint.download(f"{address}/plain-wanes/x.pt")
    assert len(Server.asked) == 2 and not (cache / "x.pt").exists()


def test_a_server_that_sends_another_range_than_it_says(address, cache):
    (cache / "x.pt.part").write_bytes(CONTENT[:1000])
    with pytest.raises(UserError, match="308200 of 307200 bytes came"):
        checkpoint.download(f"{address}/liar/x.pt")
    assert is_whole(checkpoint.download(f"{address}/whole/x.pt")) and ranges() == ["1000-", "308200-", "0-"]


@pytest.mark.parametrize(
    "part, asked",
    [
        (CONTENT[:1000], ["1000-"]),
        (CONTENT, ["307200-", "307199-"]),  # killed before it was renamed
        (CONTENT + b"more", ["307204-", "0-"]),
    ],
)
def test_the_part_of_another_process(address, cache, part, asked):
    (cache / "x.pt.part").write_bytes(part)
    assert is_whole(checkpoint.download(f"{address}/whole/x.pt"))
    assert ranges() == asked


def test_a_killed_download_goes_on(address, cache):
    child = server().Process(target=_download_alone, args=(f"{address}/hangs/x.pt", str(cache.parent.parent)))
    child.start()
    part = cache / "x.pt.part"
    for _ in range(400):
        if part.exists() and part.stat().st_size:
            break
        time.sleep(0.05)
    child.kill()
    child.join()
    size = part.stat().st_size
    assert 0 < size <= 100_000 and not (cache / "x.pt").exists()
    assert is_whole(checkpoint.download(f"{address}/whole/x.pt"))
    assert ranges() == ["0-", f"{size}-"]


def _download_alone(url, folder):
    os.environ["TORCH_HOME"] = folder
    checkpoint.download(url)


def test_two_hosts_with_one_cache_fetch_once(address, cache, tmp_path):
    threading.Timer(1.5, Server.go_on.set).start()
    on_two_ranks(_download_as_a_host, tmp_path, f"{address}/hangs/x.pt", str(tmp_path))
    assert is_whole(cache / "x.pt") and ranges() == ["0-"]


def _download_as_a_host(rank, url, folder):
    os.environ |= {"LOCAL_RANK": "0", "TORCH_HOME": folder}
    assert checkpoint.download(url).read_bytes() == CONTENT


def test_what_is_not_there(address, cache):
    with pytest.raises(UserError, match=f"could not download {address}/nothing/x.pt .Not Found.; fetch it elsewhere"):
        checkpoint.download(f"{address}/nothing/x.pt")
    assert len(Server.asked) == 1


@pytest.mark.parametrize("end", ["", "/"])
def test_a_mirror_of_the_hub(address, monkeypatch, end):
    monkeypatch.setenv("HF_ENDPOINT", f"{address}/whole{end}")
    assert is_whole(checkpoint.download(RELEASED_TOKENIZERS["256_L"]))
    file = "TencentARC/Open-MAGVIT2-Tokenizer-256-resolution/resolve/main/imagenet_256_L.ckpt"
    assert Server.asked == [(f"/whole/{file}", "bytes=0-")]
    monkeypatch.setenv("HF_ENDPOINT", f"{address}/nothing{end}")
    with pytest.raises(UserError, match=f"could not download {address}/nothing/TencentARC/"):
        checkpoint.download(RELEASED_TOKENIZERS["128_L"])
    assert checkpoint.download(f"{address}/whole/other.pt").read_bytes() == CONTENT  # not of the hub


def test_a_download_shows_its_progress(address, monkeypatch):
    class Terminal(io.StringIO):
        isatty = lambda self: True

    monkeypatch.setattr(sys, "stderr", Terminal())
    path = checkpoint.download(f"{address}/breaks/x.pt")
    assert "x.pt: 100%" in sys.stderr.getvalue()
    with pytest.raises(UserError, match="x.pt.*remove it, and it is downloaded again"):
        checkpoint.read_weights(path)


def _download(rank, folder):
    os.environ |= {"LOCAL_RANK": str(rank), "TORCH_HOME": str(folder)}
    with pytest.raises(UserError, match="could not download"):
        checkpoint.download("http://127.0.0.1:9/x.pt")
    dist.barrier()


def test_a_download_fails_on_all_ranks(tmp_path):
    on_two_ranks(_download, tmp_path, tmp_path / "hub")
