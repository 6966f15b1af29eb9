"""Weights and training runs on disk: anyone's files are read without executing anything in them, released ones are
downloaded once into torch's hub cache, a run's own are written so that a kill at any moment leaves a good one."""

import contextlib
import fcntl
import hashlib
import http.client
import io
import os
import pickle
import re
import shutil
import urllib.request
import warnings
import zipfile
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from tqdm import tqdm

from runtime import Damaged, UserError, reading, reason_of, replacing


# --- Reading ----------------------------------------------------------------------------------------------------------
class _Inert:
    """Stands in for whatever is no tensor, number, text or container of these: swallows everything, does nothing."""

    __init__ = __setitem__ = append = extend = add = lambda self, *args, **kwargs: None


# All that a file may name, and so call. Anything else becomes an _Inert. (as_strided checks sizes.)
_KNOWN = {
    "collections.OrderedDict": lambda *_: {},
    "torch._utils._rebuild_tensor": lambda record, start, *layout: record.as_strided(*layout, start),
    "torch._utils._rebuild_tensor_v2": lambda record, start, *layout: record.as_strided(*layout[:2], start),
    "torch._utils._rebuild_parameter": lambda tensor, *_: tensor,
    "torch._utils._rebuild_device_tensor_from_cpu_tensor": lambda tensor, *_: tensor,
    "torch.storage.UntypedStorage": torch.uint8,
}
for _dtype, _name in torch.storage._dtype_to_storage_type_map().items():
    _KNOWN[f"torch.{_name}"] = torch.uint8 if _name.startswith("Q") else _dtype  # none of ours is quantized


class _Unpickler(pickle._Unpickler):
    """The second reading: of the pickle in a zip archive of torch.save; tensors' bytes are records beside it."""

    # A file must neither set the state of what it names nor have memory taken for bytes that it lacks.
    dispatch = pickle._Unpickler.dispatch | {pickle.BUILD[0]: lambda self: self.stack.pop()}
    del dispatch[pickle.BYTEARRAY8[0]]

    def __init__(self, archive):
        self.archive, self.folder = archive, archive.namelist()[0].split("/")[0]
        self.records, self.foreign = {}, set()
        super().__init__(io.BytesIO(archive.read(f"{self.folder}/data.pkl")), encoding="utf-8")

    def find_class(self, module, name):
        if f"{module}.{name}" not in _KNOWN:
            self.foreign.add(f"{module}.{name}")
        return _KNOWN.get(f"{module}.{name}", _Inert)

    def persistent_load(self, identity):
        _, dtype, key, *_ = identity
        if key not in self.records:
            content = self.archive.read(f"{self.folder}/data/{key}")  # frombuffer takes no empty one
            self.records[key] = torch.frombuffer(bytearray(content or 16), dtype=dtype)[: len(content)]
        return self.records[key]


def _archive(file):
    """A torch file's zip archive. Its records must not be packed: they would unpack to more than the file holds."""
    archive = zipfile.ZipFile(file)
    records, size = archive.infolist(), os.fstat(file.fileno()).st_size
    if any(record.compress_type for record in records) or sum(record.file_size for record in records) > size:
        raise Damaged(f"{file.name} holds packed records, which torch.save never writes: it is not read")
    return archive


def read_weights(path):
    """The content of a weights file, on the CPU, as plain tensors and containers. Nothing in it is imported or called:
    it is read with `weights_only=True`, and if it has foreign objects (released ones have PyTorch Lightning's) once
    more, with an inert placeholder for each and a warning that names them; in torch's format of before 1.6, refused."""
    downloaded = str(path).startswith(torch.hub.get_dir())
    what = "a weights file" + (" (remove it, and it is downloaded again)" if downloaded else "")
    with reading(path, what), open(path, "rb") as file:
        archive = _archive(file) if file.read(4) == b"PK\x03\x04" else None
        file.seek(0)
        with contextlib.suppress(pickle.UnpicklingError):  # foreign types, or no pickle
            return torch.load(file, map_location="cpu", weights_only=True)
        if archive is None:
            raise ValueError("no pickle, or in an old format with foreign objects")
        unpickler = _Unpickler(archive)
        content = unpickler.load()
    if unpickler.foreign:
        names = ", ".join(sorted(unpickler.foreign))[:300]
        warnings.warn(f"{path} holds objects besides weights, which were left unread: {names}", stacklevel=2)
    return content


def is_intact(path):
    """Whether every byte of a torch file matches the checksums stored in it; `read_weights` looks at tensors' only.
    Raises UserError where that cannot be told for now."""
    with contextlib.suppress(Damaged), reading(path, "a zip archive"), open(path, "rb") as file:
        return _archive(file).testzip() is None
    return False


def entries_of(content, source):
    """The flat name -> tensor dict of a container or a bare state dict, less DDP's and torch.compile's prefixes."""
    entries = content.get("state_dict", content) if isinstance(content, dict) else None
    if not isinstance(entries, dict) or not entries or not all(isinstance(name, str) for name in entries):
        raise UserError(f"{source} holds no state dict")
    wrapper = re.compile(r"\b((module|_orig_mod)\.)+")
    plain = {wrapper.sub("", name): value for name, value in entries.items()}
    if prefix := wrapper.search("\n".join(entries)):
        if len(plain) < len(entries):
            raise UserError(f"{source} holds entries twice, with and without {prefix[0]} before them")
        warnings.warn(f"{source}: entries are read without {prefix[0]} before their names", stacklevel=2)
    return plain


def match(found, expected, source, what):
    """Check that the entries `found` (name -> tensor) are those of `expected`, no more and no less: plain finite
    tensors of those shapes. Raises UserError naming those at fault, the file `source` and `what` model was expected."""
    size = 4 * sum(value.numel() for value in expected.values())
    if size > os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"):  # in a file, one number may be so many
        raise UserError(f"{source} does not hold {what}: {size / 2**30:.0f} GiB are more than this machine's memory")
    found = found if isinstance(found, dict) else {}
    faults = [f"entry {name} is missing" for name in expected if name not in found]
    faults += [f"entry {name} is unexpected" for name in found if name not in expected]
    wrong = {name: _fault(found[name], expected[name]) for name in found if name in expected}
    faults += [f"entry {name} {fault}" for name, fault in wrong.items() if fault]
    if faults:
        more = f"; and {len(faults) - 3} more" if len(faults) > 3 else ""
        raise UserError(f"{source} does not hold {what}: {'; '.join(faults[:3])}{more}")


def _fault(value, due):
    """What is wrong with an entry, or None."""
    if not isinstance(value, torch.Tensor) or value.layout != torch.strided or value.is_meta:
        return "is not a tensor that holds numbers"
    if value.shape != due.shape:
        return f"has shape {tuple(value.shape)}, expected {tuple(due.shape)}"
    floats = {torch.float16, torch.bfloat16, torch.float32, torch.float64}
    if value.dtype != due.dtype and not {value.dtype, due.dtype} <= floats:
        return f"holds {value.dtype}, expected {due.dtype}"
    if value.dtype in floats and not torch.stack(value.aminmax()).float().isfinite().all():
        return "holds values that are not finite"
    return None


def load_network(network, path, what):
    """(network with the weights in the file `path`, the file's SHA-256); UserError where it does not hold `what`."""
    entries = entries_of(read_weights(path), path)
    match(entries, network.state_dict(), path, what)
    network.load_state_dict(entries)
    return network, hashlib.sha256(Path(path).read_bytes()).hexdigest()


def hash_of(state):
    """sha256 over a state dict's names and bytes, in order of the names."""
    digest = hashlib.sha256()
    for name in sorted(state):
        digest.update(name.encode())
        digest.update(state[name].detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


# --- Finding ----------------------------------------------------------------------------------------------------------
def download(url):
    """The local file of `url` in torch's hub cache, fetched the first time; where that fails, all processes raise.
    HF_ENDPOINT in the environment may name a mirror of huggingface.co."""
    hub = "https://huggingface.co"
    url = url.replace(hub, (os.environ.get("HF_ENDPOINT") or hub).rstrip("/"))
    path, failure = Path(torch.hub.get_dir()) / "checkpoints" / url.rsplit("/", 1)[1], None
    mine = not dist.is_initialized() or os.environ.get("LOCAL_RANK", "0") == "0"  # one process a host fetches it
    try:
        if mine and not path.exists():
            _fetch(url, path)
    except Exception as error:  # noqa: BLE001 (of urllib, http.client, the disk)
        reason = reason_of(getattr(error, "reason", error))
        failure = f"could not download {url} ({reason}); fetch it elsewhere and put it at {path}"
    if dist.is_initialized():
        failures = [None] * dist.get_world_size()
        dist.all_gather_object(failures, failure)
        failure = next(filter(None, failures), None)
    if failure:
        raise UserError(failure)
    return path


def _fetch(url, path):
    """Download a file, whole or not at all. What has come stays in PATH.part: the next connection goes on from there
    where one breaks, as long as each brings something, and so does the next process where one is killed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(f"{path}.part", "ab") as part:
        with contextlib.suppress(OSError):  # of a file system without locks
            fcntl.flock(part, fcntl.LOCK_EX)
        while not path.exists():  # another process may have been faster
            start = part.seek(0, os.SEEK_END)
            request = urllib.request.Request(url, headers={"User-Agent": "torch.hub", "Range": f"bytes={start}-"})
            try:
                with urllib.request.urlopen(request, timeout=60) as answer:
                    rest, length = answer.headers["Content-Range"], answer.headers["Content-Length"]
                    size = part.truncate(start if rest else 0)  # some servers only send all of it
                    whole = int((rest or length or "-1").rpartition("/")[2].replace("*", "-1"))  # * or -1: unknown
                    with tqdm.wrapattr(answer, "read", whole, initial=size, desc=path.name, disable=None) as stream:
                        shutil.copyfileobj(stream, part)
                if whole not in (size := part.seek(0, os.SEEK_END), -1):
                    raise (OSError if size < whole else ValueError)(f"{size} of {whole} bytes came")
                os.fsync(part.fileno())
                os.replace(part.name, path)
            except (OSError, http.client.HTTPException) as error:  # worth another try; but not too many bytes
                if getattr(error, "code", None) == 416 and start:  # nothing follows: it is whole, or of another file
                    part.truncate(start - 1 if error.headers["Content-Range"] == f"bytes */{start}" else 0)
                elif part.seek(0, os.SEEK_END) <= start:
                    raise
    Path(part.name).unlink(missing_ok=True)


def locate(name_or_path, released):
    """The weights file meant by `name_or_path`: a file; a run folder (its newest intact checkpoint); or a name in
    `released` (name -> a path, or an address, downloaded once). Raises UserError where it is none of these."""
    path = Path(name_or_path)
    if path.is_dir():
        for candidate in reversed(checkpoints(path)):
            if is_intact(candidate):
                return candidate
        raise UserError(f"the folder {path} holds no intact checkpoint (step_*.pt)")
    if os.path.lexists(path):
        return path
    if str(name_or_path) not in released:
        raise UserError(f"there is no file or folder {name_or_path}; released names: {', '.join(released) or 'none'}")
    where = released[str(name_or_path)]
    return where if isinstance(where, Path) else download(where)


# --- Training state ---------------------------------------------------------------------------------------------------
def checkpoints(folder):
    """The checkpoints of a run, oldest first; a step_best.pt that someone put beside them is none."""
    names = os.listdir(folder) if Path(folder).is_dir() else []  # (glob finds none where it may not read)
    paths = [Path(folder, name) for name in names if re.fullmatch(r"step_[0-9]+\.pt", name)]
    return sorted(paths, key=lambda path: int(path.stem[5:]))


def write_atomically(path, content):
    """torch.save by way of `runtime.replacing`, and onto the disk itself."""
    with replacing(path) as file:
        torch.save(content, file)
        file.flush()
        os.fsync(file.fileno())
    folder = os.open(Path(path).parent, os.O_RDONLY)
    os.fsync(folder)  # the rename itself
    os.close(folder)


def save_checkpoint(folder, state, keep_every=0):
    """Write `state` (plain tensors, numbers, strings; with its "step") as folder/step_XXXXXXXX.pt; returns the path.
    Keeps the newest two up to it (later ones are damaged: passed over), and multiples of `keep_every` (0: none)."""
    path = Path(folder) / f"step_{state['step']:08d}.pt"
    write_atomically(path, state)
    known = checkpoints(folder)
    for old in known[: known.index(path) + 1][:-2]:
        if not (keep_every and int(old.stem[5:]) % keep_every == 0):
            old.unlink(missing_ok=True)
    return path


def load_latest(rt, folder, kind):
    """(path, state) of the newest intact checkpoint of `kind` in a run folder, or (None, None) for a fresh start.
    A torn or foreign file is passed over for the older one, with a warning. A whole one of the other stage or without
    training state, or one that cannot be read for now, is an error: the run would delete or overwrite it. All ranks
    read the file that the main process chose, so every host has to see the folder."""
    chosen = state = None
    if rt.main:
        for scratch in Path(folder).glob("step_*.pt.tmp"):  # a kill in the middle of a save left it
            scratch.unlink(missing_ok=True)
        for path in reversed(checkpoints(folder)):
            content = None
            with contextlib.suppress(Damaged):
                content = read_weights(path) if is_intact(path) else None
            found = content.get("kind") if isinstance(content, dict) else None
            if found not in ("tokenizer", "ar"):
                rt.say(f"warning: {path} is torn or damaged, or no checkpoint; passing it over")
                continue
            if found != kind:
                raise UserError(f"{path} is a checkpoint of the other stage; give another --out")
            if type(content.get("step")) is not int or not isinstance(content.get("settings"), dict):
                raise UserError(f"{path} holds no training state; give another --out")
            chosen, state = path, content
            break
    chosen = rt.share(chosen)
    if chosen and not rt.main:
        if not chosen.is_file():
            raise UserError(f"{chosen} is not visible on this host; put --out on a file system that all hosts share")
        state = read_weights(chosen)
    return chosen, state


def restore(parts, state, path):
    """Load a checkpoint's entries into the `parts` (modules, optimizers, ...) of the same names. Raises UserError
    naming the file `path` where they do not fit."""
    with reading(path, "a checkpoint of this run"):
        for name, part in parts.items():
            if isinstance(part, nn.Module):
                match(state.get(name), part.state_dict(), path, f"this run's {name}")
            part.load_state_dict(state[name])
            if isinstance(part, torch.optim.Optimizer):
                # A fused optimizer wants its moments laid out in memory as their parameters are.
                for parameter, moments in part.state.items():
                    alike = {key: value for key, value in moments.items() if value.shape == parameter.shape}
                    moments |= {key: torch.empty_like(parameter).copy_(value) for key, value in alike.items()}


def changed_settings(old, new, may_change):
    """What differs between a checkpoint's settings and the present ones, as a line; "" where nothing that matters."""
    found = []
    for name, value in new.items():
        before = old.get(name, False)  # a flag younger than the checkpoint was off in it
        if name in may_change or before == value:
            continue
        if name in ("pictures", "total_steps"):  # from flags, and none themselves
            found.append(f"{name.replace('_', ' ')} was {before}, is {value}")
        elif not name.endswith("_hash"):
            found.append(f"--{name.replace('_', '-')} was {before}, is {value}")
        elif name in old or name == "init_hash":  # (the first checkpoints had no other hashes)
            found.append(f"{name.removesuffix('_hash')} of other contents")
    return ", ".join(found)
