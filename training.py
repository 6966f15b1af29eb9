"""What both trainings share: their flags, and a run that resumes, logs, saves, stops where its numbers do.

    run = Run(rt, args, settings, may_change, parts, kind="tokenizer", ...)    # resumes; parts: name in the file -> object
    for step in range(run.step, total):
        ...                                                                    # forward, backward, optimizer
        run.advance(loss)                                                      # run.line(...), run.save() when run.due(...)
        if run.leaving:
            break
    run.close()

A run killed anywhere and started again ends with the weights of one that was never stopped.
"""

import contextlib
import datetime
import json
import math
import sys
import time
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

from checkpoint import changed_settings, load_latest, restore, save_checkpoint
from runtime import StopSignal, UserError, at_least, open_run, reading, replacing


def add_length_flags(add):
    """The flags of both trainings for pictures a step and the run's length; `add` is a group's add_argument."""
    add("--global-batch", type=at_least(1), help="pictures a step, over all devices")
    add("--micro-batch", type=at_least(1), help="pictures a device at once; accumulation is derived")
    add("--epochs", type=at_least(0), help="length of the run, epochs of ceil(pictures / global batch) steps")
    add("--steps", type=at_least(0), help="length of the run in steps instead, where not 0")


def add_output_flags(arguments, out, log_every, evaluated, eval_pictures):
    """The flags of both trainings for the run's folder and what goes there when."""
    add = arguments.add_argument_group("output").add_argument
    add("--out", default=out, help="the run's folder")
    add("--log-every", type=at_least(1), default=log_every, help="steps between log lines")
    add("--save-every", type=at_least(1), default=1000, help="steps between checkpoints")
    add("--keep-every", type=at_least(0), default=0, help="steps between checkpoints kept for good; 0: none")
    add("--eval-every", type=at_least(1), default=1000, help=f"steps between {evaluated}")
    add("--eval-pictures", type=at_least(1), default=eval_pictures, help="validation pictures an evaluation takes")
    add("--allow-changes", action="store_true", help="resume although settings differ from the checkpoint's")


def run_length(args, pictures):
    """(steps an epoch, steps of the run), from the flags of `add_length_flags`."""
    epoch_steps = math.ceil(pictures / args.global_batch)
    total = args.steps or args.epochs * epoch_steps
    if total == 0:
        raise UserError("--steps and --epochs are both 0: nothing to do")
    return epoch_steps, total


class Run:
    """A training run in its folder: resumes from the newest checkpoint, logs, saves, and leaves when asked by a signal.

    settings: the flags and what they lead to; saved, and compared with the checkpoint's but for the names `may_change`.
    parts: name in the file -> object with state_dict and load_state_dict: all that is saved and restored. contents:
    what else the file holds, its "kind" for one. `step` is the number of steps done."""

    def __init__(self, rt, args, settings, may_change, parts, **contents):
        self.rt, self.args, self.parts, self.contents = rt, args, parts, contents | {"settings": settings}
        self.folder, self.step, self.total, self.leaving = Path(args.out), 0, settings["total_steps"], False
        self.path, state = load_latest(rt, self.folder, contents["kind"])  # the last good checkpoint
        if state:
            changed = changed_settings(state["settings"], settings, may_change)
            if changed and not args.allow_changes:
                raise UserError(f"{self.path}: {changed}; use those settings, another --out, or --allow-changes")
            restore(parts, state, self.path)
            self.step = state["step"]
        open_run(rt, self.folder, settings)
        if state:
            rt.say(f"resumed {self.path} at step {self.step}")
        self.log = RunLog(rt, self.folder, self.total, self.step, args.global_batch)
        self.signal = StopSignal(rt)
        # The first step whose loss or weights were not finite: on the device, without waiting for it.
        self.first_bad = torch.full((), -1, dtype=torch.int64, device=rt.device)

    def advance(self, loss):
        """A step is done; `loss`, a tensor, was its loss. Like `line` and `save` to be called on all ranks alike."""
        self.step += 1
        self._watch(loss)
        self.log.tick()
        self.leaving = self.signal.agreed() and self.step < self.total

    def due(self, every):
        """Whether what is done every so many steps, and after the last, is due now."""
        return self.step % every == 0 or self.step == self.total

    def line(self, **values):
        """Log a line. Raises UserError where a loss since the one before was not finite."""
        self._check_finite()
        self.log.line(self.step, **values)

    def save(self):
        """Write a checkpoint. Raises UserError where a loss or the weights are not finite: nothing is written then."""
        modules = nn.ModuleList(part for part in self.parts.values() if isinstance(part, nn.Module))
        self._watch(*modules.parameters(), *modules.buffers())
        self._check_finite()
        state = {"step": self.step, **self.contents}
        state |= {name: part.state_dict() for name, part in self.parts.items()}
        if self.rt.main:
            self.path = save_checkpoint(self.folder, state, keep_every=self.args.keep_every)
        self.path = self.rt.share(self.path)

    def save_picture(self, picture):
        """Write this step's PIL picture, on one process."""
        path = self.folder / "samples" / f"step_{self.step:08d}.png"
        path.parent.mkdir(exist_ok=True)
        with replacing(path) as file:
            picture.save(file, "PNG")

    def _watch(self, *tensors):
        for tensor in tensors:  # of a sharded one this rank's part; `_check_finite` asks all ranks
            tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
            bad = ~torch.isfinite(tensor.detach()).all() & (self.first_bad < 0)
            self.first_bad.masked_fill_(bad, self.step)

    def _check_finite(self):
        step = int(self.rt.reduce([float(self.first_bad)], "max")[0])
        if step >= 0:
            advice = "Lower --lr or use --precision bf16 or fp32, then run again to go on from there"
            last = f"last good checkpoint: {self.path or 'none yet'}"
            raise UserError(f"loss or weights became non-finite at step {step}; {last}. {advice}")

    def close(self):
        self.log.close()
        if self.leaving:
            said = f"stopped by a signal after step {self.step}; saved {self.path}"
            self.rt.say(f"{said}. Run the same command again to go on.")
        self.rt.say(f"checkpoint {self.path or 'none'}; pictures in {self.folder / 'samples'}")


class RunLog:
    """A line an interval on the screen, the same as JSON in `log.jsonl`, and TensorBoard where it is installed.

    The values are those of the step named, averaged over its global batch. After a resume, lines past the resumed step
    are dropped, so that the file reads like one uninterrupted run."""

    def __init__(self, rt, folder, total, first_step, images_a_step):
        self.rt, self.total, self.images_a_step = rt, total, images_a_step
        self.last_time, self.last_step = time.perf_counter(), first_step
        self.path, self.board, self.noted = Path(folder) / "log.jsonl", None, []
        hidden = not (rt.main and sys.stderr.isatty())
        self.bar = tqdm(total=total, initial=first_step, disable=hidden, dynamic_ncols=True)
        self.tick = self.bar.update  # call it after each step
        if rt.main:
            lines = _lines(self.path, first_step)
            self.noted = [line["step"] for line in lines if "images_per_second" not in line]
            with replacing(self.path) as file:
                file.writelines(json.dumps(line).encode() + b"\n" for line in lines)
            with contextlib.suppress(ImportError):  # optional
                from torch.utils.tensorboard import SummaryWriter

                self.board = SummaryWriter(str(folder), purge_step=first_step + 1)

    def line(self, step, **values):
        """Note the losses of `step` (1-based count of steps done), speed and memory; call it on every rank."""
        now = time.perf_counter()
        speed = (step - self.last_step) * self.images_a_step / max(now - self.last_time, 1e-9)
        left = datetime.timedelta(seconds=round((self.total - step) * self.images_a_step / max(speed, 1e-9)))
        on_cpu = self.rt.device.type == "cpu"
        peak = 0 if on_cpu else torch.get_device_module(self.rt.device).max_memory_allocated() / 2**30
        memory = self.rt.reduce([peak], "max")[0]
        self.note(step, f"left {left}", **values, images_per_second=speed, memory_gib=memory)
        self.last_time = now

    def note(self, step, *words, **values):
        """Print words and values, and record the values: what was measured beside the losses, in time that does not count
        as training time."""
        self.last_time, self.last_step = time.perf_counter(), step
        if not self.rt.main:
            return
        shown = [f"{name} {value:.4g}" for name, value in values.items()]
        self.rt.say(" ".join([f"step {step}/{self.total}", *shown, *words]))
        values = {name: value if math.isfinite(value) else str(value) for name, value in values.items()}
        with open(self.path, "a") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")
        for name, value in values.items():
            if self.board and not isinstance(value, str):
                self.board.add_scalar(name, value, step)

    def has_note(self, step):
        """Whether a run that this one goes on from has noted that step, beside its losses; the same on every rank."""
        return self.rt.share(step in self.noted)

    def close(self):
        self.bar.close()
        if self.board:
            self.board.close()


def _lines(path, last):
    """The lines of a log up to step `last`, less what is no line: a killed run may have cut the last one."""
    lines = []
    if path.exists():
        with reading(path, "a log"):
            for text in path.read_bytes().splitlines():
                with contextlib.suppress(ValueError, TypeError, KeyError, RecursionError):
                    line = json.loads(text)
                    if line["step"] <= last:
                        lines.append(line)
    return lines
