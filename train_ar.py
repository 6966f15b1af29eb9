"""Stage II: train the class-conditional transformer on a code cache (Open-MAGVIT2, arXiv 2409.04410).

    python train_ar.py --codes codes/train --out runs/ar                          # a CPU, minutes
    torchrun --nproc_per_node=8 train_ar.py --preset B --codes codes/imagenet --micro-batch 96 --out runs/B

The codes come from encode.py, with the tokenizer that made them. What comes out, under --out: config.json, log.jsonl,
step_XXXXXXXX.pt (the last two; everything a resume needs, and, carrying the tokenizer, all that sample.py needs),
samples/step_XXXXXXXX.png (one class a row; of clips .webp). The same command goes on from the newest checkpoint."""

import functools
from dataclasses import asdict
from pathlib import Path

import torch
from torch.utils.checkpoint import checkpoint

import data
import fast
import runtime
import training
from ar_model import AR_SIZES, RELEASED_AR, ARConfig, ARTransformer, cross_entropies, load_ar
from checkpoint import hash_of, locate
from fast.graphs import Gradients, Graphs
from lfq import split_indices
from runtime import UserError, at_least
from tokenizer import load_tokenizer

# The paper's settings for B, L and XL. tiny is ours, for a CPU.
PAPER = {"global_batch": 768, "micro_batch": 24, "lr": 3e-4, "epochs": 300, "warmup_epochs": 6, "steps": 0}
TINY = {"global_batch": 64, "micro_batch": 64, "lr": 1.5e-3, "epochs": 0, "warmup_epochs": 0.5, "steps": 470}
# Ours, of clips. video_B is for UCF-101, in steps of about as many tokens as B's; nobody has trained it.
VIDEO_TINY = {**TINY, "global_batch": 32, "micro_batch": 32, "warmup_epochs": 0.3, "steps": 1200}
VIDEO_B = {**PAPER, "global_batch": 128, "micro_batch": 16, "epochs": 1000, "warmup_epochs": 20}
PRESETS = {"tiny": TINY, "B": PAPER, "L": PAPER, "XL": {**PAPER, "lr": 2.4e-4, "epochs": 350, "warmup_epochs": 7}}
PRESETS |= {"video_tiny": VIDEO_TINY, "video_B": VIDEO_B}
SIZE_FLAGS = ("width", "heads", "spatial_layers", "intra_layers", "dropout")
for name, preset in PRESETS.items():
    PRESETS[name] = {**preset, **{flag: getattr(AR_SIZES[name], flag) for flag in SIZE_FLAGS}}

# Settings that a resumed run may change: they leave weights alone, up to rounding and what dropout draws.
MAY_CHANGE = {"out", "codes", "val_codes", "log_every", "save_every", "keep_every", "eval_every", "eval_pictures"}
MAY_CHANGE |= {"compile", "allow_changes", "micro_batch", "preset", "checkpoint_activations", "init"}


def parse(argv=None):
    arguments = runtime.parser(__doc__)
    add = arguments.add_argument_group("data").add_argument
    add("--codes", default="codes/train", help="code cache to train on, from encode.py")
    add("--val-codes", help="code cache for the validation loss; none: not computed")
    add("--seed", type=at_least(0), default=0, help="of initialisation, order, crops, dropout")
    add = arguments.add_argument_group("model").add_argument
    add("--preset", default="tiny", help=f"size and settings: {', '.join(PRESETS)}; the flags below override it")
    add("--init", help="fine-tune: begin with the weights of a released name, a file or a run's folder, at their sizes")
    add("--width", type=int, help="model width d")
    add("--heads", type=int, help="attention heads")
    add("--spatial-layers", type=int, help="blocks over the token sequence")
    add("--intra-layers", type=int, help="blocks over each token's two sub-tokens")
    add("--pre-bits", type=int, default=6, help="bits of the first sub-token; the second has the tokenizer's rest")
    add("--dropout", type=float, help="dropout probability on tokens, attention and feed-forward outputs")
    add = arguments.add_argument_group("schedule").add_argument
    add("--lr", type=at_least(0, float), help="peak learning rate of AdamW")
    add("--warmup-epochs", type=at_least(0, float), help="epochs of linear warm-up from 0.005 of the peak")
    add = arguments.add_argument_group("memory").add_argument
    add("--checkpoint-activations", action="store_true", help="keep only blocks' inputs, run them twice: 1/4 more time")
    training.add_run_flags(arguments, "runs/ar", 50, "validation losses and sample pictures", 10000)
    return runtime.parse_with_presets(arguments, PRESETS, argv)


def open_caches(args):
    """(training codes, validation codes or None, the tokenizer that made both)."""
    codes, path = data.open_codes(args.codes), Path(args.codes) / "tokenizer.pt"
    tokenizer = load_tokenizer(path)
    if hash_of(tokenizer.state_dict()) != codes.manifest["tokenizer_hash"]:
        raise UserError(f"{path} is not the tokenizer that made these codes; encode {args.codes} again")
    val_codes = data.open_codes(args.val_codes) if args.val_codes else None
    if val_codes and val_codes.manifest["tokenizer_hash"] != codes.manifest["tokenizer_hash"]:
        raise UserError(f"{args.val_codes} was made by another tokenizer than {args.codes}; encode it again")
    if val_codes and val_codes.grid != codes.grid:
        raise UserError(f"{args.val_codes} holds {val_codes.grid} grids, not {codes.grid}; encode with the same --size")
    if val_codes and val_codes.classes != codes.classes:
        raise UserError(f"{args.val_codes} has other classes than {args.codes}")
    return codes, val_codes, tokenizer


def learning_rate(step, peak, total, warmup, start=0.005, flat=0.05, floor=0.1):
    """Learning rate of a step, counted from 0, of `total`.
    A linear warm-up from start * peak over `warmup` steps, rounded; then, over the steps that remain, the peak for
    their first `flat` share, and a straight line to floor * peak, reached at the last step."""
    warmup = round(warmup)
    if step < warmup:
        return peak * (start + (1 - start) * step / warmup)
    done = (step - warmup) / max(total - 1 - warmup, 1)
    if done <= flat:
        return peak
    return peak * (floor + (1 - floor) * (1 - done) / (1 - flat))


def training_pass(model, loss_terms, scaler, args, share, indices, labels):
    """Forward and backward of one micro-batch, indices (b, N) and labels (b,): adds to the gradients its loss over
    `share`, the number of micro-batches a step adds up. Returns the loss's two terms, detached. loss_terms: plain or
    compiled `cross_entropies`. Of args: precision."""
    sub_indices = split_indices(indices, model.config.factorized_bits)
    with runtime.autocast(indices.device, args.precision):
        logits = model(sub_indices, labels)
    pre, post = loss_terms(logits, sub_indices)
    scaler.scale((pre + post) / share).backward()
    return {"pre": pre.detach(), "post": post.detach()}


def rerun_in_backward(block):
    """Make a block keep only its input for the backward pass, which runs it again, with the same dropout."""
    plain = block.forward

    def forward(*inputs):
        # Drawing pictures needs no gradient: there the block runs as it is.
        return checkpoint(plain, *inputs, use_reentrant=False) if torch.is_grad_enabled() else plain(*inputs)

    block.forward = forward


def main():
    # Settings
    args = parse()
    rt = runtime.start()
    args.precision = runtime.set_precision(rt, args.precision)
    accumulation = runtime.split_batch(args.global_batch, args.micro_batch, rt.world)

    # Data
    codes, val_codes, tokenizer = open_caches(args)
    order = data.SampleOrder(len(codes), args.seed)
    epoch_steps, total = training.run_length(args, len(codes))

    # The transformer to begin with, which gives the sizes, too
    init, init_hash = None, False
    if args.init:
        path = rt.share(locate(args.init, RELEASED_AR))
        init, carried = load_ar(path)
        pre, post = init.config.factorized_bits
        if pre + post != tokenizer.config.bits:
            raise UserError(f"{path} takes codes of {pre + post} bits; {args.codes} has {tokenizer.config.bits}")
        if carried and hash_of(carried.state_dict()) != codes.manifest["tokenizer_hash"]:
            rt.say(f"warning: {args.codes} was made by another tokenizer than {path} was trained with, and carries")
        vars(args).update({flag: getattr(init.config, flag) for flag in SIZE_FLAGS if flag != "dropout"}, pre_bits=pre)

    # Model
    runtime.seed_everything(args.seed)
    size = {flag: getattr(args, flag) for flag in SIZE_FLAGS}
    bits = (args.pre_bits, tokenizer.config.bits - args.pre_bits)
    grid = codes.grid if len(codes.grid) == 3 else codes.grid[0]
    config = ARConfig(**size, factorized_bits=bits, grid=grid, num_classes=len(codes.classes))
    model, loss_terms = ARTransformer(config), cross_entropies
    if init:
        init_hash = hash_of(entries := init.state_dict())
        if init.config.num_classes != config.num_classes or init.class_names not in (None, codes.classes):
            rt.say(f"{path} knows other classes than {args.codes}: their embeddings begin afresh")
            del entries["class_emb.embedding_table.weight"]
        model.load_state_dict(entries, strict=False)
        del init, carried, entries  # of an XL, 6 GB
    if args.checkpoint_activations:
        for block in [*model.spatial_blocks, *model.factorized_blocks]:
            rerun_in_backward(block)
    if compiled := fast.compiles(rt.device, args.compile, total):
        fast.compile(*model.spatial_blocks)
        model.predict = torch.compile(model.predict, dynamic=False)
        loss_terms = torch.compile(cross_entropies, dynamic=False)
    rt.share_parameters(model.to(rt.device))

    # Optimizer. All weights decay: the published code spares some, but its schedule writes the decay into them, too.
    fused = rt.device.type == "cuda"
    optimizer = torch.optim.AdamW(model.parameters(), args.lr, betas=(0.9, 0.95), weight_decay=0.05, fused=fused)
    scaler = torch.amp.GradScaler(rt.device.type, enabled=args.precision == "fp16")

    # Resume
    settings = vars(args) | {"pictures": len(codes), "total_steps": total, "codes_hash": codes.identity}
    settings |= {"tokenizer_hash": codes.manifest["tokenizer_hash"], "init_hash": init_hash}
    saved = {"model": model, "optimizer": optimizer, "scaler": scaler}  # by their names in the file
    carried = {"config": asdict(tokenizer.config), "state": tokenizer.state_dict()}
    contents = {"kind": "ar", "config": asdict(config), "class_names": codes.classes, "tokenizer": carried}
    run = training.Run(rt, args, settings, MAY_CHANGE, saved, **contents)
    rt.say(f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters")

    # The pass
    graphs, gradients = Graphs(rt, compiled), Gradients(rt, model.parameters())
    work = functools.partial(training_pass, model, loss_terms, scaler, args, accumulation * rt.world)

    def evaluate():
        graphs.forget()
        # Blocks are compiled for training's batches: others, and single tokens, would be compiled anew.
        with torch.compiler.set_stance("force_eager"):
            if val_codes:
                pre, post = validation_losses(rt, model, val_codes, args)
                run.note(val_loss=pre + post, val_cross_entropy_pre=pre, val_cross_entropy_post=post)
            if rt.main:
                run.save_samples(draw_samples(rt, model, tokenizer, args), columns=4)
        rt.barrier()
        model.train()

    model.train()
    if run.lacks_evaluation:
        evaluate()
    for step in range(run.step, total):
        lr = learning_rate(step, args.lr, total, args.warmup_epochs * epoch_steps)
        for group in optimizer.param_groups:
            group["lr"] = lr

        # Forward and backward, micro-batch by micro-batch; then one step
        terms = []
        for i in range(accumulation):
            number = rt.rank * accumulation + i  # of this micro-batch within the global batch
            entries = order.at(step * args.global_batch + number * args.micro_batch, args.micro_batch)
            indices, labels = (runtime.to_device(part, rt.device) for part in codes.batch(entries, args.seed))
            runtime.seed_everything(args.seed, step, number)  # class dropout and dropout
            losses = graphs.run(work, gradients, i == 0, indices, labels)
            terms.append(torch.stack([losses["pre"], losses["post"]]))
        gradients.exchange()
        scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()

        # Log, save, evaluate, leave
        run.advance(loss=torch.stack(terms).mean(0).sum())
        if run.due(args.log_every):
            # In float64, so that the same numbers are logged whatever the number of processes
            pre, post = (rt.reduce(torch.stack(terms).cpu().double().mean(0)) / rt.world).tolist()
            run.line(loss=pre + post, cross_entropy_pre=pre, cross_entropy_post=post, grad_norm=norm.item(), lr=lr)
        if run.due(args.save_every) or run.due(args.eval_every) or run.leaving:
            run.save()  # before the evaluation: what goes wrong there loses no step
        if run.due(args.eval_every):
            evaluate()
        if run.leaving:
            break
    run.close()


@torch.no_grad()
def validation_losses(rt, model, codes, args):
    """Mean cross entropies (pre, post) over validation pictures, in eval mode, shared out over ranks."""
    model.eval()
    count = min(args.eval_pictures, len(codes))
    mine = torch.linspace(0, len(codes) - 1, count).long().tensor_split(rt.world)[rt.rank].tolist()
    sums = torch.zeros(2, dtype=torch.float64)
    for first in range(0, len(mine), args.micro_batch):
        entries = [(0, index) for index in mine[first : first + args.micro_batch]]
        indices, labels = (part.to(rt.device) for part in codes.batch(entries, args.seed))
        sub_indices = split_indices(indices, model.config.factorized_bits)
        with runtime.autocast(rt.device, args.precision):
            logits = model(sub_indices, labels)
        sums += torch.stack(cross_entropies(logits, sub_indices)).cpu().double() * len(entries)
    return (rt.reduce(sums) / count).tolist()


@torch.no_grad()
def draw_samples(rt, model, tokenizer, args):
    """uint8 pictures, or clips, of up to 8 classes, 4 samples each, drawn as sample.py would for showing."""
    classes, images = model.config.num_classes, []
    labels = torch.linspace(0, classes - 1, min(8, classes)).long().repeat_interleave(4).to(rt.device)
    rt.place(tokenizer)
    with runtime.autocast(rt.device, args.precision):
        for first in range(0, len(labels), 4):  # few at once: all that training needs stays in memory beside them
            some, seeds = labels[first : first + 4], range(first, first + 4)
            indices = model.generate(some, (4.0, 4.0), top_p=(0.96, 0.96), seeds=seeds)
            images.append(data.to_uint8(tokenizer.decode(indices.unflatten(1, model.config.shape))).cpu())
    fast.forget(model)  # training needs the memory
    tokenizer.cpu()
    return torch.cat(images)


if __name__ == "__main__":
    runtime.run_script(main)
