"""Stage II: train the class-conditional transformer on a code cache (Open-MAGVIT2, arXiv 2409.04410).

    python train_ar.py --codes codes/train --out runs/ar                          # a CPU, minutes
    torchrun --nproc_per_node=8 train_ar.py --preset B --codes codes/imagenet --micro-batch 96 --out runs/B

The codes come from encode.py, with the tokenizer that made them. What comes out, under --out: config.json, log.jsonl,
step_XXXXXXXX.pt (the last two; everything a resume needs, and, carrying the tokenizer, all that sample.py needs),
samples/step_XXXXXXXX.png (one class a row). Running the same command again goes on from the newest checkpoint, to the
very weights of a run never stopped.
"""

import argparse
import dataclasses
import math
from pathlib import Path

import torch

import data
import fast
import runtime
from ar_model import AR_SIZES, ARTransformer, cross_entropies
from checkpoint import changed_settings, hash_of, load_latest, restore, save_checkpoint
from fast.graphs import Gradients, Graphs
from lfq import split_indices
from sharding import rerun_in_backward, shard, shard_optimizer_state, unsharded, whole
from tokenizer import load_tokenizer

# The paper's settings for B, L and XL. tiny is ours, for a CPU.
_PAPER = {"global_batch": 768, "micro_batch": 24, "lr": 3e-4, "epochs": 300, "warmup_epochs": 6, "steps": 0}
PRESETS = {
    "tiny": {
        "global_batch": 64,
        "micro_batch": 64,
        "lr": 1.5e-3,
        "epochs": 0,
        "steps": 470,
        "warmup_epochs": 0.5,
        "dropout": 0.1,
    },
    "B": {**_PAPER, "dropout": 0.1},
    "L": {**_PAPER, "dropout": 0.1},
    "XL": {**_PAPER, "dropout": 0.1, "lr": 2.4e-4, "epochs": 350, "warmup_epochs": 7},
}
for name, preset in PRESETS.items():
    size = AR_SIZES[name]
    preset |= {"width": size.width, "heads": size.heads}
    preset |= {"spatial_layers": size.spatial_layers, "intra_layers": size.intra_layers}

# Settings that a resumed run may change freely: they leave the weights alone, up to rounding and, for the micro-batch,
# which values dropout takes.
MAY_CHANGE = {"out", "codes", "val_codes", "log_every", "save_every", "keep_every", "eval_every", "eval_pictures"}
MAY_CHANGE |= {"compile", "allow_changes", "micro_batch", "preset", "shard", "checkpoint_activations"}


def parse(argv=None):
    arguments = runtime.parser(
        "Stage II: train the class-conditional transformer on the codes that encode.py wrote.",
        "  python train_ar.py --codes codes/train --val-codes codes/val --out runs/ar\n"
        "  torchrun --nproc_per_node=8 train_ar.py --preset B --codes codes/imagenet --micro-batch 96 --out runs/B",
    )
    add = arguments.add_argument_group("data").add_argument
    add("--codes", default="codes/train", help="code cache to train on, from encode.py")
    add("--val-codes", help="code cache for the validation loss; none: not computed")
    add("--seed", type=runtime.at_least(0), default=0, help="of initialisation, order, crops, dropout")
    add = arguments.add_argument_group("model").add_argument
    add("--preset", default="tiny", help="size and settings: tiny, B, L or XL; the flags below override it")
    add("--width", type=int, help="model width d")
    add("--heads", type=int, help="attention heads")
    add("--spatial-layers", type=int, help="blocks over the token sequence")
    add("--intra-layers", type=int, help="blocks over each token's two sub-tokens")
    add("--pre-bits", type=int, default=6, help="bits of the first sub-token; the second has the tokenizer's rest")
    add("--dropout", type=float, help="dropout probability on tokens, attention and feed-forward outputs")
    add = arguments.add_argument_group("schedule").add_argument
    runtime.add_length_flags(add)
    add("--lr", type=runtime.at_least(0, float), help="peak learning rate of AdamW")
    add("--warmup-epochs", type=runtime.at_least(0, float), help="epochs of linear warm-up from 0.005 of the peak")
    add("--precision", help="bf16, fp16 or fp32 (default: bf16 on an accelerator, fp32 on a CPU)")
    add = arguments.add_argument_group("memory").add_argument
    add(
        "--shard",
        action="store_true",
        help="spread weights, gradients and optimizer over the processes (FSDP2); the files stay the same",
    )
    add(
        "--checkpoint-activations",
        action="store_true",
        help="keep only each block's input and run it again in the backward pass: a third more arithmetic",
    )
    add(
        "--compile",
        action=argparse.BooleanOptionalAction,
        help="compile the blocks and replay whole passes as CUDA graphs; default: on a GPU, for runs of 500 steps or "
        "more without --shard and --checkpoint-activations, beside which there are no graphs",
    )
    runtime.add_output_flags(arguments, "runs/ar", 50, "validation losses and sample pictures", 10000)
    return runtime.parse_with_presets(arguments, PRESETS, argv)


def open_caches(args):
    """(training codes, validation codes or None, the tokenizer that made both)."""
    codes = data.open_codes(args.codes)
    val_codes = data.open_codes(args.val_codes) if args.val_codes else None
    if val_codes and val_codes.manifest["tokenizer_hash"] != codes.manifest["tokenizer_hash"]:
        raise runtime.UserError(f"{args.val_codes} was made by another tokenizer than {args.codes}; encode it again")
    if val_codes and val_codes.classes != codes.classes:
        raise runtime.UserError(f"{args.val_codes} has other classes than {args.codes}")
    if val_codes and val_codes.grid != codes.grid:
        raise runtime.UserError(
            f"{args.val_codes} holds {val_codes.grid} grids and {args.codes} {codes.grid}; encode it with the "
            f"other's --size"
        )
    if codes.grid[0] != codes.grid[1]:
        raise runtime.UserError(f"{args.codes} holds a {codes.grid} grid; the transformer wants a square one")
    path = Path(args.codes) / "tokenizer.pt"
    tokenizer = load_tokenizer(path)
    if hash_of(tokenizer.state_dict()) != codes.manifest["tokenizer_hash"]:
        raise runtime.UserError(f"{path} is not the tokenizer that made these codes; encode {args.codes} again")
    return codes, val_codes, tokenizer


def learning_rate(
    iteration, peak, iterations_an_epoch, epochs, warmup_epochs, warmup_start=0.005, flat=0.05, floor=0.1
):
    """Learning rate of an iteration, counted from 0.

    A linear warm-up from warmup_start * peak over `warmup_epochs`, rounded to whole iterations; then, over the
    iterations that remain, the peak for their first `flat` share, and a straight line to floor * peak, reached at the
    last iteration.
    """
    warmup, last = round(warmup_epochs * iterations_an_epoch), epochs * iterations_an_epoch - 1
    if iteration < warmup:
        return peak * (warmup_start + (1 - warmup_start) * iteration / warmup)
    done = (iteration - warmup) / max(last - warmup, 1)
    if done <= flat:
        return peak
    return peak * (floor + (1 - floor) * (1 - done) / (1 - flat))


def main():
    args = parse()
    rt = runtime.start()
    args.precision = runtime.set_precision(rt, args.precision)
    if args.shard and rt.world == 1:
        raise runtime.UserError(
            "--shard spreads the model over processes and here is one; launch with torchrun, or leave it out"
        )
    accumulation = runtime.split_batch(args.global_batch, args.micro_batch, rt.world)

    # Data and model
    codes, val_codes, tokenizer = open_caches(args)
    parts = (args.pre_bits, tokenizer.config.bits - args.pre_bits)
    config = dataclasses.replace(
        AR_SIZES[args.preset],
        **{name: getattr(args, name) for name in ("width", "heads", "spatial_layers", "intra_layers", "dropout")},
        factorized_bits=parts,
        grid=codes.grid[0],
        num_classes=len(codes.classes),
    )
    runtime.seed_everything(args.seed)
    model = ARTransformer(config)
    epoch_steps, total = runtime.run_length(args, len(codes))
    warmup = args.warmup_epochs * epoch_steps  # in steps

    # Resume
    settings = vars(args) | {"pictures": len(codes), "total_steps": total}
    settings |= {"tokenizer_hash": codes.manifest["tokenizer_hash"], "codes_hash": codes.identity}
    out = Path(args.out)
    path, state = load_latest(rt, out, "ar")
    first = 0
    if state:
        changed = changed_settings(state["settings"], settings, MAY_CHANGE)
        if changed and not args.allow_changes:
            raise runtime.UserError(f"{path}: {changed}; use those settings, another --out, or --allow-changes")
        restore(model, state, "model", path)
        first = state["step"]

    # Device and optimizer
    if args.checkpoint_activations:
        for block in [*model.spatial_blocks, *model.factorized_blocks]:
            rerun_in_backward(block)
    loss_terms = cross_entropies
    # Compiled blocks together with sharding or rerun blocks have not been tried: only where asked for.
    plain_blocks = not (args.shard or args.checkpoint_activations)
    compiled = fast.ON and (args.compile or (plain_blocks and fast.compiles(rt.device, args.compile, total)))
    if compiled:
        fast.compile(*model.spatial_blocks)
        model.predict = torch.compile(model.predict, dynamic=False)
        loss_terms = torch.compile(cross_entropies, dynamic=False)
    if args.shard:
        shard(rt, model, args.precision)
    else:
        rt.share_parameters(model.to(rt.device))
    # The published code makes two groups, but its schedule then writes the decay into both: all parameters decay.
    fused = rt.device.type == "cuda"
    optimizer = torch.optim.AdamW(
        model.parameters(), args.lr, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.05, fused=fused
    )
    scaler = torch.amp.GradScaler(rt.device.type, enabled=args.precision == "fp16")
    if state:
        with runtime.reading(path, "a checkpoint of this run"):
            if args.shard:
                shard_optimizer_state(state["optimizer"], list(model.parameters()))
            optimizer.load_state_dict(state["optimizer"])
            scaler.load_state_dict(state["scaler"]) if scaler.is_enabled() else None
    runtime.open_run(rt, out, settings)
    parameters = sum(p.numel() for p in model.parameters())
    rt.say(
        f"{parameters / 1e6:.1f} M parameters; {len(codes)} pictures, {epoch_steps} steps an epoch, {total} steps; "
        f"global batch {args.global_batch} = {rt.world} process(es) x {args.micro_batch} x {accumulation} accumulated"
        + (f"; resumed {path} at step {first}" if state else "")
    )
    del state

    # Passes, forward and backward. Graphs go with compiled blocks; sharded ones talk to other processes in every pass,
    # and together with checkpointed activations nobody has tried them.
    gradients = Gradients(rt, model.parameters(), args.shard)
    graphs = Graphs(rt, compiled and plain_blocks)
    share = accumulation * (1 if args.shard else rt.world)  # the micro-batches whose losses a step adds up

    def run_pass(indices, labels):
        sub_indices = split_indices(indices, parts)
        with runtime.autocast(rt.device, args.precision):
            logits = model(sub_indices, labels)
        pre, post = loss_terms(logits, sub_indices)
        scaler.scale((pre + post) / share).backward()
        return {"pre": pre.detach(), "post": post.detach()}

    def save(step):
        guard.watch(step, *model.state_dict().values())
        guard.check(rt, path)
        carried = {"config": dataclasses.asdict(tokenizer.config), "state": tokenizer.state_dict()}
        content = {"kind": "ar", "step": step, "config": dataclasses.asdict(config), "settings": settings}
        content |= {"model": whole(rt, model.state_dict()), "class_names": codes.classes, "tokenizer": carried}
        content |= {"optimizer": whole(rt, optimizer.state_dict()), "scaler": scaler.state_dict()}
        saved = save_checkpoint(out, content, keep_every=args.keep_every) if rt.main else path
        return rt.share(saved)

    def evaluates(step):
        return step % args.eval_every == 0 or step == total

    def evaluate(step):
        graphs.forget()
        # Blocks are compiled for training's batches: others, and single tokens, would be compiled anew.
        with torch.compiler.set_stance("force_eager"):
            if val_codes:
                pre, post = validation_losses(rt, model, val_codes, parts, args)
                log.note(step, val_loss=pre + post, val_cross_entropy_pre=pre, val_cross_entropy_post=post)
            drawing = unsharded(rt, model) if args.shard else model
            if rt.main:
                show_samples(rt, drawing, tokenizer, args, out / "samples" / f"step_{step:08d}.png")
                fast.forget(drawing)
        rt.barrier()
        model.train()

    order = data.SampleOrder(len(codes), args.seed)
    log = runtime.RunLog(rt, out, total, first, args.global_batch)
    stop, guard = runtime.StopSignal(rt), runtime.FiniteGuard(rt.device)
    model.train()
    if first and evaluates(first) and not log.has_note(first):
        evaluate(first)  # the run ended between the save and the end of its evaluation
    for step in range(first, total):
        lr = learning_rate(step, args.lr, 1, total, warmup)
        for group in optimizer.param_groups:
            group["lr"] = lr

        # Forward and backward, micro-batch by micro-batch; gradients travel once, after the last (sharded ones in each,
        # else all of them would have to be kept everywhere)
        terms = []
        for i in range(accumulation):
            number = rt.rank * accumulation + i  # of this micro-batch within the global batch
            entries = order.at(step * args.global_batch + number * args.micro_batch, args.micro_batch)
            indices, labels = (runtime.to_device(part, rt.device) for part in codes.batch(entries, args.seed))
            runtime.seed_everything(args.seed, step, number)  # class dropout and dropout
            found = graphs.run(run_pass, gradients, i == 0, indices, labels)
            terms.append(torch.stack([found["pre"], found["post"]]))
        gradients.exchange()

        # One step
        scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        norm = norm.full_tensor() if args.shard else norm
        scaler.step(optimizer)
        scaler.update()
        means = torch.stack(terms).mean(0)
        guard.watch(step + 1, means.sum())

        # Log, save, evaluate, leave
        done = step + 1
        log.tick()
        if done % args.log_every == 0 or done == total:
            guard.check(rt, path)
            # In float64, so that the same numbers are logged whatever the number of processes
            pre, post = rt.reduce(torch.stack(terms).cpu().double().mean(0).tolist(), "mean")
            log.line(
                done, loss=pre + post, cross_entropy_pre=pre, cross_entropy_post=post, grad_norm=norm.item(), lr=lr
            )
        leaving = stop.agreed() and done < total
        if done % args.save_every == 0 or evaluates(done) or leaving:
            path = save(done)  # before the evaluation: what goes wrong there loses no step
        if evaluates(done):
            evaluate(done)
        if leaving:
            rt.say(f"stopped by a signal after step {done}; saved {path}. Run the same command again to go on.")
            break
    log.close()
    rt.say(f"checkpoint {path or 'none'}; pictures in {out / 'samples'}")


@torch.no_grad()
def validation_losses(rt, model, codes, parts, args):
    """Mean cross entropies (pre, post) over validation pictures, in eval mode, shared out over ranks."""
    model.eval()
    count = min(args.eval_pictures, len(codes))
    mine = torch.linspace(0, len(codes) - 1, count).long().tensor_split(rt.world)[rt.rank].tolist()
    sums, number = torch.zeros(2, dtype=torch.float64), 0
    for first in range(0, math.ceil(count / rt.world), args.micro_batch):
        entries = [(0, index) for index in mine[first : first + args.micro_batch]]
        # A sharded model needs all ranks in every forward: one with no picture left takes any, counting none.
        counted, entries = len(entries), entries or [(0, 0)]
        indices, labels = (part.to(rt.device) for part in codes.batch(entries, args.seed))
        sub_indices = split_indices(indices, parts)
        with runtime.autocast(rt.device, args.precision):
            logits = model(sub_indices, labels)
        sums += torch.stack(cross_entropies(logits, sub_indices)).cpu().double() * counted
        number += counted
    *sums, number = rt.reduce([*sums.tolist(), number])
    return [value / number for value in sums]


@torch.no_grad()
def show_samples(rt, model, tokenizer, args, path):
    """A picture of up to 8 classes, 4 samples each, drawn as sample.py would for showing."""
    classes = torch.linspace(0, model.config.num_classes - 1, min(8, model.config.num_classes)).long()
    labels = classes.repeat_interleave(4).to(rt.device)
    tokenizer.to(rt.device, memory_format=rt.layout)
    with runtime.autocast(rt.device, args.precision):
        indices = model.generate(labels, (4.0, 4.0), (1.0, 1.0), (0, 0), (0.96, 0.96), list(range(len(labels))))
        images = tokenizer.decode(indices.unflatten(1, (model.config.grid, model.config.grid)))
    tokenizer.cpu()
    path.parent.mkdir(exist_ok=True)
    data.picture_grid(data.to_uint8(images).cpu(), columns=4).save(path)


if __name__ == "__main__":
    runtime.run_script(main)
