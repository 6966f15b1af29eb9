"""What both trainings share: their flags, and a run that resumes, logs, saves, stops where its numbers do.

    run = Run(rt, args, settings, may_change, parts, kind="tokenizer", ...)    # resumes
    for step in range(run.step, total):
        ...                                                                    # forward, backward, optimizer; then
        run.advance(loss)                                                      # and run.line(...), run.save() when due
    run.close()

A run killed anywhere and started again ends with the weights of one that was never stopped."""

import argparse
import contextlib
import datetime
import json
import math
import time
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

from checkpoint import changed_settings, load_latest, restore, save_checkpoint
from clips import write_video
from data import save_png, tile
from runtime import StopSignal, UserError, at_least, open_run, reading, replacing, split_batch


def add_run_flags(arguments, out, log_every, evaluated, eval_pictures):
    """The flags of both trainings for a run's length, speed and folder, and for what goes there when."""
    add = arguments.add_argument_group("length").add_argument
    add("--global-batch", type=at_least(1), help="pictures a step, over all devices")
    add("--micro-batch", type=at_least(1), help="pictures a device at once; accumulation is derived")
    add("--epochs", type=at_least(0), help="length of the run, epochs of ceil(pictures / global batch) steps")
    add("--steps", type=at_least(0), help="length of the run in steps instead, where not 0")
    add = arguments.add_argument_group("speed").add_argument
    add("--precision", help="bf16, fp16 or fp32 (default: bf16 on an accelerator, fp32 on a CPU)")
    graphs = "compile, and replay CUDA graphs; default: on a GPU, for 500 steps or more"
    add("--compile", action=argparse.BooleanOptionalAction, help=graphs)
    add = arguments.add_argument_group("output").add_argument
    add("--out", default=out, help="the run's folder")
    add("--log-every", type=at_least(1), default=log_every, help="steps between log lines")
    add("--save-every", type=at_least(1), default=1000, help="steps between checkpoints")
    add("--keep-every", type=at_least(0), default=0, help="steps between checkpoints kept for good; 0: none")
    add("--eval-every", type=at_least(1), default=1000, help=f"steps between {evaluated}")
    add("--eval-pictures", type=at_least(1), default=eval_pictures, help="validation pictures an evaluation takes")
    add("--allow-changes", action="store_true", help="resume although settings differ from the checkpoint's")


def run_length(args, pictures):
    """(steps an epoch, steps of the run), from the flags."""
    epoch_steps = math.ceil(pictures / args.global_batch)
    total = args.steps or args.epochs * epoch_steps
    if total == 0:
        raise UserError("--steps and --epochs are both 0: nothing to do")
    return epoch_steps, total


class Run:
    """A training run in its folder: resumes from the newest checkpoint, logs, saves, and leaves when asked by a signal.

    settings: the flags and what they lead to; saved, and compared with the checkpoint's but for the names `may_change`.
    parts: name in the file -> object with state_dict and load_state_dict: all that is saved and restored. contents:
    what else the file holds, its "kind" for one. `step` is the number of steps done. The log is lines on the screen,
    the same as JSON in `log.jsonl`, and TensorBoard where it is installed. Methods are called on all ranks alike."""

    def __init__(self, rt, args, settings, may_change, parts, **contents):
        self.rt, self.args, self.parts, self.contents = rt, args, parts, contents | {"settings": settings}
        self.folder, self.step, self.leaving = Path(args.out), 0, False
        self.checkpoint, state = load_latest(rt, self.folder, contents["kind"])  # the last good one's path
        if state:
            changed = changed_settings(state["settings"], settings, may_change)
            if changed and not args.allow_changes:
                raise UserError(f"{self.checkpoint}: {changed}; use those settings, another --out, or --allow-changes")
            restore(parts, state, self.checkpoint)
            self.step = state["step"]
        open_run(rt, self.folder, settings)
        if state:
            rt.say(f"resumed {self.checkpoint} at step {self.step}")
        epoch_steps, self.total = run_length(args, settings["pictures"])
        accumulation = split_batch(args.global_batch, args.micro_batch, rt.world)
        batch = f"{args.global_batch} = {rt.world} process(es) x {args.micro_batch} x {accumulation} accumulated"
        rt.say(f"{settings['pictures']} pictures, {epoch_steps} steps an epoch, {self.total} steps; batch {batch}")
        self.signal = StopSignal()
        # The first step whose loss or weights were not finite: on the device, without waiting for it.
        self.first_bad = torch.full((), -1, dtype=torch.int64, device=rt.device)
        evaluated, self.board = False, None
        if rt.main:
            lines = rewind_log(self.folder / "log.jsonl", self.step)
            evaluated = any(line["step"] == self.step and "images_per_second" not in line for line in lines)
            with contextlib.suppress(ImportError):  # optional
                from torch.utils.tensorboard import SummaryWriter

                self.board = SummaryWriter(str(self.folder), purge_step=self.step + 1)
        # The run that this one resumes may have ended after a save, before the evaluation that is due with it.
        self.lacks_evaluation = rt.share(self.step > 0 and self.due(args.eval_every) and not evaluated)
        self.bar = tqdm(total=self.total, initial=self.step, disable=None if rt.main else True, dynamic_ncols=True)
        self.last_time, self.last_step = time.perf_counter(), self.step

    def advance(self, loss):
        """A step is done; `loss`, a tensor, was its loss."""
        self.step += 1
        self._watch(loss)
        self.bar.update()
        asked = self.rt.reduce([self.signal.asked])[0]  # on any rank: all must leave at the same step
        self.leaving = asked > 0 and self.step < self.total

    def due(self, every):
        """Whether what is done every so many steps, and after the last, is due now."""
        return self.step % every == 0 or self.step == self.total

    def line(self, **values):
        """Log the step's losses, with speed and memory. UserError where one since the last line was not finite."""
        self._check_finite()
        seconds = (time.perf_counter() - self.last_time) / (self.step - self.last_step)
        left = datetime.timedelta(seconds=round((self.total - self.step) * seconds))
        on_cpu = self.rt.device.type == "cpu"
        peak = 0 if on_cpu else torch.get_device_module(self.rt.device).max_memory_allocated() / 2**30
        memory = self.rt.reduce([peak], "max")[0]
        self.note(f"left {left}", **values, images_per_second=self.args.global_batch / seconds, memory_gib=memory)

    def note(self, *words, **values):
        """Log values and, on the screen only, words. The time until now (of an evaluation) counts in no line's speed."""
        self.last_time, self.last_step = time.perf_counter(), self.step
        if not self.rt.main:
            return
        shown = [f"{name} {value:.4g}" for name, value in values.items()]
        self.rt.say(" ".join([f"step {self.step}/{self.total}", *shown, *words]))
        values = {name: value if math.isfinite(value) else str(value) for name, value in values.items()}
        with open(self.folder / "log.jsonl", "a") as file:
            file.write(json.dumps({"step": self.step, **values}) + "\n")
        for name, value in values.items():
            if self.board and not isinstance(value, str):
                self.board.add_scalar(name, value, self.step)

    def save(self):
        """Write a checkpoint. Raises UserError where a loss or the weights are not finite: nothing is written then."""
        modules = nn.ModuleList(part for part in self.parts.values() if isinstance(part, nn.Module))
        self._watch(*modules.parameters(), *modules.buffers())
        self._check_finite()
        state = {"step": self.step, **self.contents}
        state |= {name: part.state_dict() for name, part in self.parts.items()}
        if self.rt.main:
            self.checkpoint = save_checkpoint(self.folder, state, keep_every=self.args.keep_every)
        self.checkpoint = self.rt.share(self.checkpoint)

    def save_samples(self, images, columns):
        """Write this step's uint8 pictures (N, 3, H, W) as a .png; clips (N, 3, T, H, W) as a .webp, and their first,
        middle and last frames as a .png. On one process."""
        path = self.folder / "samples" / f"step_{self.step:08d}.png"
        path.parent.mkdir(exist_ok=True)
        sheet = tile(images, columns)  # (3, [T,] H, W)
        if sheet.ndim == 4:
            write_video(path.with_suffix(".webp"), sheet)
            sheet = tile(sheet[:, [0, sheet.shape[1] // 2, -1]].movedim(1, 0), columns=1)  # (3, H, W)
        save_png(path, sheet)

    def _watch(self, *tensors):
        for tensor in tensors:
            bad = ~torch.isfinite(tensor.detach()).all() & (self.first_bad < 0)
            self.first_bad.masked_fill_(bad, self.step)

    def _check_finite(self):
        step = int(self.rt.reduce([float(self.first_bad)], "max")[0])
        if step >= 0:
            last = f"last good checkpoint: {self.checkpoint or 'none yet'}. Lower --lr or use --precision bf16 or fp32"
            raise UserError(f"loss or weights became non-finite at step {step}; {last}, then run again to go on")

    def close(self):
        self.bar.close()
        if self.board:
            self.board.close()
        if self.leaving:
            self.rt.say(f"stopped by a signal after step {self.step}; run the same command again to go on")
        self.rt.say(f"checkpoint {self.checkpoint}; pictures in {self.folder / 'samples'}")


def rewind_log(path, step):
    """Drop a log's lines past `step`, and what is no line (a kill may cut the last one), so that it reads like the log
    of one uninterrupted run. Returns its lines."""
    lines = []
    if path.exists():
        with reading(path, "a log"):
            for text in path.read_bytes().splitlines():
                with contextlib.suppress(ValueError, TypeError, KeyError, RecursionError):
                    line = json.loads(text)
                    if line["step"] <= step:
                        lines.append(line)
    with replacing(path) as file:
        file.writelines(json.dumps(line).encode() + b"\n" for line in lines)
    return lines
