"""Stage I: train the image tokenizer (Open-MAGVIT2, arXiv 2409.04410; spec of the losses: losses.py).

    python train_tokenizer.py --data glyphs --out runs/tokenizer                  # a CPU, minutes, nothing to download
    torchrun --nproc_per_node=8 train_tokenizer.py --preset 256_L --data imagenet/train --val-data imagenet/val

What comes out, under --out: config.json, log.jsonl, step_XXXXXXXX.pt (the last two; everything a resume needs, and what
load_tokenizer reads), samples/step_XXXXXXXX.png (original above reconstruction, by the moving average). Running the
same command again goes on from the newest checkpoint, to the very weights of a run never stopped.
"""

import argparse
import copy
from dataclasses import asdict
from pathlib import Path

import torch
from torch import nn

import data
import fast
import losses
import runtime
from checkpoint import changed_settings, load_latest, restore, restore_optimizer, save_checkpoint
from fast.graphs import Gradients, Graphs
from fid import psnr
from tokenizer import TOKENIZER_SIZES, Tokenizer, TokenizerConfig, Upsampler

# The paper's settings for 256_L and 128_L. tiny is ours: legible glyphs in minutes on a CPU, with neither LPIPS nor
# discriminator, whose networks are many times larger than itself.
_PAPER = {"global_batch": 256, "micro_batch": 8, "lr": 1e-4, "ema": 0.999, "steps": 0}
_PAPER |= {"lpips": "published", "gan_weight": 0.1, "entropy_weight": 0.1}
PRESETS = {
    "tiny": {
        "size": 32,
        "global_batch": 16,
        "micro_batch": 16,
        "lr": 7e-4,
        "ema": 0.98,
        "steps": 550,
        "epochs": 0,
        "lr_drops": [],
        "lpips": "none",
        "gan_weight": 0.0,
        "lecam_weight": 0.0,
        "entropy_weight": 0.03,
    },
    "128_L": {**_PAPER, "size": 128, "epochs": 350, "lr_drops": [250, 300], "lecam_weight": 0.01},
    "256_L": {**_PAPER, "size": 256, "epochs": 270, "lr_drops": [200, 250], "lecam_weight": 0.05},
}
for name, preset in PRESETS.items():
    size = TOKENIZER_SIZES[name]
    preset |= {"channels": size.channels, "multipliers": list(size.channel_multipliers)}
    preset |= {"blocks": size.blocks_per_level, "bits": size.bits}

# Settings that a resumed run may change freely. They leave the weights alone, up to rounding; but for the micro-batch,
# over which codebook entropy and BatchNorm go, and which the memory at hand may dictate.
MAY_CHANGE = {"out", "workers", "log_every", "save_every", "keep_every", "eval_every", "eval_pictures"}
MAY_CHANGE |= {"val_data", "compile", "allow_changes", "micro_batch", "preset", "data"}  # its contents are compared


def parse(argv=None):
    arguments = runtime.parser(
        "Stage I: train the image tokenizer.",
        "  python train_tokenizer.py --data glyphs --out runs/tokenizer\n"
        "  torchrun --nproc_per_node=8 train_tokenizer.py --preset 256_L --data imagenet/train --out runs/256_L",
    )
    add = arguments.add_argument_group("data").add_argument
    add("--data", default="glyphs", help="folder of class folders of pictures; or glyphs[:COUNT[:CLASSES]], built in")
    add("--val-data", help="the same, for PSNR and the reconstruction pictures; --data where it is not given")
    add("--size", type=runtime.at_least(1), help="side of the training crops, pixels")
    add("--workers", type=runtime.at_least(0), default=2, help="loader processes per device")
    add("--seed", type=runtime.at_least(0), default=0, help="of initialisation, order, crops")
    add = arguments.add_argument_group("model").add_argument
    add("--preset", default="tiny", help="size and settings: tiny, 128_L or 256_L; the flags below override it")
    add("--channels", type=int, help="width at full resolution, a multiple of 32")
    add("--multipliers", type=int, nargs="+", help="width of each level over --channels; resolution halves between")
    add("--blocks", type=int, help="ResBlocks a level")
    add("--bits", type=int, help="latent channels K, for 2^K codes")
    add = arguments.add_argument_group("objective").add_argument
    add("--lpips", help="LPIPS weights: 'published' (downloaded), a file that holds them, or 'none' for no LPIPS")
    add(
        "--gan-weight",
        type=runtime.at_least(0, float),
        help="weight of the adversarial term; 0: no discriminator at all",
    )
    add("--lecam-weight", type=runtime.at_least(0, float), help="weight of LeCAM in the discriminator's loss")
    add("--entropy-weight", type=runtime.at_least(0, float), help="weight of the entropy term")
    add(
        "--global-entropy",
        action="store_true",
        help="codebook entropy of all devices' micro-batches of the same number together, not of each one's; "
        "accumulated micro-batches stay apart",
    )
    add = arguments.add_argument_group("schedule").add_argument
    runtime.add_length_flags(add)
    add("--lr", type=runtime.at_least(0, float), help="learning rate of both Adams")
    add(
        "--lr-drops",
        type=runtime.at_least(0, float),
        nargs="*",
        help="epochs after which the learning rate falls to a tenth",
    )
    add(
        "--ema",
        type=runtime.at_least(0, float, 1),
        help="decay of the moving average of all trained parameters, per step",
    )
    add("--precision", help="bf16, fp16 or fp32 (default: bf16 on an accelerator, fp32 on a CPU)")
    add(
        "--compile",
        action=argparse.BooleanOptionalAction,
        help="compile the small parts where it pays and replay whole passes as CUDA graphs (not with "
        "--global-entropy on several devices); default: on a GPU, for runs of 500 steps or more",
    )
    runtime.add_output_flags(arguments, "runs/tokenizer", 20, "evaluations and reconstruction pictures", 1000)
    return runtime.parse_with_presets(arguments, PRESETS, argv)


def main():
    args = parse()
    rt = runtime.start()
    args.precision = runtime.set_precision(rt, args.precision)
    # Try out convolution algorithms: few shapes, run often. Each process may find another one the fastest, so scripts
    # that make codes, pictures or published metrics don't; validation's figures here may move in their last digits.
    torch.backends.cudnn.benchmark = True
    accumulation = runtime.split_batch(args.global_batch, args.micro_batch, rt.world)

    # Data and models
    pictures = data.open_pictures(args.data, args.size, train=True, seed=args.seed)
    val_pictures = data.open_pictures(args.val_data or args.data, args.size, train=False, seed=args.seed)
    runtime.seed_everything(args.seed)
    config = TokenizerConfig(args.channels, tuple(args.multipliers), args.blocks, args.bits)
    tokenizer = Tokenizer(config).to(rt.device)
    tokenizer.quantizer.global_batch = args.global_entropy
    if args.size % config.factor:
        raise runtime.UserError(f"--size {args.size} is not a multiple of {config.factor}, the tokenizer's factor")
    if args.gan_weight and args.size < 24:
        raise runtime.UserError(f"--size {args.size}: the discriminator needs 24 pixels; or use --gan-weight 0")
    lpips = discriminator = None
    if args.lpips != "none":
        lpips = losses.load_lpips("vgg", None if args.lpips == "published" else args.lpips)
        lpips.to(rt.device, memory_format=rt.layout)
    if args.gan_weight:
        discriminator = losses.PatchDiscriminator().to(rt.device)
    trained = nn.ModuleDict({"tokenizer": tokenizer})
    if discriminator is not None:
        trained["discriminator"] = discriminator
    rt.share_parameters(trained)
    # Before averages and optimizers are made: what is read beside a weight has to lie in memory as it does.
    trained.to(memory_format=rt.layout)
    average = copy.deepcopy(trained).eval().requires_grad_(False)
    lecam = losses.LeCAM().to(rt.device)
    fused = rt.device.type == "cuda"
    optimizers = {
        name: torch.optim.Adam(module.parameters(), args.lr, betas=(0.5, 0.9), eps=1e-8, fused=fused)
        for name, module in trained.items()
    }
    scaler = torch.amp.GradScaler(rt.device.type, enabled=args.precision == "fp16")
    epoch_steps, total = runtime.run_length(args, len(pictures))

    # Resume
    settings = vars(args) | {"pictures": len(pictures), "total_steps": total}
    settings |= {"pictures_hash": data.identity(pictures)}
    out = Path(args.out)
    path, state = load_latest(rt, out, "tokenizer")
    first = 0
    if state:
        changed = changed_settings(state["settings"], settings, MAY_CHANGE)
        if changed and not args.allow_changes:
            raise runtime.UserError(f"{path}: {changed}; use those settings, another --out, or --allow-changes")
        with runtime.reading(path, "a checkpoint of this run"):
            for name, module in trained.items():
                restore(module, state, name, path)
                restore(average[name], state, f"{name}_ema", path)
                restore_optimizer(optimizers[name], state[f"optimizer_{name}"])
            lecam.load_state_dict(state["lecam"])
            scaler.load_state_dict(state["scaler"]) if scaler.is_enabled() else None
        first = state["step"]
    runtime.open_run(rt, out, settings)
    rt.say(
        f"{len(pictures)} pictures, {epoch_steps} steps an epoch, {total} steps; global batch {args.global_batch} = "
        f"{rt.world} process(es) x {args.micro_batch} x {accumulation} accumulated"
        + (f"; resumed {path} at step {first}" if state else "")
    )
    del state

    compiled = fast.compiles(rt.device, args.compile, total)
    if compiled:
        upsamplers = [part for part in tokenizer.modules() if isinstance(part, Upsampler)]
        fast.compile(*upsamplers, *([lpips] if lpips is not None else []))

    # Passes, forward and backward. The global entropy talks to other processes in them, which no graph may.
    gradients = {name: Gradients(rt, module.parameters()) for name, module in trained.items()}
    graphs = Graphs(rt, compiled and not (args.global_entropy and rt.world > 1))
    share = accumulation * rt.world  # the micro-batches whose losses a step adds up

    def generator_pass(images):
        """uint8 pictures -> y, and the terms of the loss. D scores y but gets no gradient of its own."""
        x = data.to_float(images)
        with runtime.autocast(rt.device, args.precision):
            y, _, quantizer = tokenizer(x)
            loss, terms = losses.generator_loss(
                x, y, quantizer, lpips, discriminator, args.gan_weight, args.entropy_weight
            )
        scaler.scale(loss / share).backward()
        return {"y": y.detach(), "generator": loss.detach(), **terms}

    def discriminator_pass(images, y):
        """D on x, then on y, separately: BatchNorm sees them apart. The terms of its loss."""
        with runtime.autocast(rt.device, args.precision):
            real, fake = discriminator(data.to_float(images)), discriminator(y)
        loss, terms = losses.discriminator_loss(real, fake, lecam, args.lecam_weight)
        scaler.scale(loss / share).backward()
        return {"discriminator": loss.detach(), **terms}

    def save(step):
        guard.watch(step, *trained.state_dict().values(), *average.state_dict().values())
        guard.check(rt, path)
        content = {"kind": "tokenizer", "step": step, "config": asdict(config), "settings": settings}
        for name, module in trained.items():
            content[name] = module.state_dict()
            content[f"{name}_ema"] = average[name].state_dict()
            content[f"optimizer_{name}"] = optimizers[name].state_dict()
        content |= {"lecam": lecam.state_dict(), "scaler": scaler.state_dict()}
        saved = save_checkpoint(out, content, keep_every=args.keep_every) if rt.main else path
        rt.barrier()
        return rt.share(saved)

    def evaluates(step):
        return step % args.eval_every == 0 or step == total

    def evaluate(step):
        graphs.forget()
        picture = out / "samples" / f"step_{step:08d}.png"
        log.note(step, **measure(rt, average["tokenizer"], val_pictures, args, picture))

    log = runtime.RunLog(rt, out, total, first, args.global_batch)
    stop, guard, bad = runtime.StopSignal(rt), runtime.FiniteGuard(rt.device), data.BadPictures(pictures)
    batches = data.training_batches(
        pictures, args.seed, args.global_batch, args.micro_batch, rt.rank, rt.world, first, total, args.workers
    )
    trained.train()
    if first and evaluates(first) and not log.has_note(first):
        evaluate(first)  # the run ended between the save and the end of its evaluation
    for step, micro_batches in enumerate(batches, first):
        epoch = step // epoch_steps
        lr = args.lr * 0.1 ** sum(step >= drop * epoch_steps for drop in args.lr_drops)
        for optimizer in optimizers.values():
            for group in optimizer.param_groups:
                group["lr"] = lr

        # Generator: all micro-batches, then one step
        if discriminator is not None:
            discriminator.requires_grad_(False)
        pairs, terms = [], []
        for i, batch in enumerate(micro_batches):
            bad.add(batch.unreadable)
            images = batch.images.to(rt.device, non_blocking=True)
            terms.append(graphs.run(generator_pass, gradients["tokenizer"], i == 0, images))
            pairs.append((images, terms[i].pop("y")))
        gradients["tokenizer"].exchange()
        scaler.step(optimizers["tokenizer"])

        # Discriminator: the same pictures and the y that the generator made of them
        if discriminator is not None:
            discriminator.requires_grad_(True)
            for i, (images, y) in enumerate(pairs):
                terms[i] |= graphs.run(discriminator_pass, gradients["discriminator"], i == 0, images, y)
            gradients["discriminator"].exchange()
            scaler.step(optimizers["discriminator"])
        scaler.update()

        # Means over the global batch, running means, moving average
        means = torch.stack([torch.stack([term[name] for name in terms[0]]) for term in terms]).mean(0)
        if rt.world > 1:
            torch.distributed.all_reduce(means)
            means = means / rt.world
        means = dict(zip(terms[0], means, strict=True))
        if discriminator is not None:
            lecam.advance(means["logits_real"], means["logits_fake"])
        losses.update_ema(list(average.parameters()), list(trained.parameters()), args.ema)
        guard.watch(step + 1, means["generator"] + means.get("discriminator", 0))

        # Log, save, evaluate, leave
        done = step + 1
        log.tick()
        if done % args.log_every == 0 or done == total:
            guard.check(rt, path)
            bad.check(rt.reduce([bad.count])[0], epoch + 1)
            log.line(done, **{name: value.item() for name, value in means.items()}, lr=lr)
        leaving = stop.agreed() and done < total
        if done % args.save_every == 0 or evaluates(done) or leaving:
            path = save(done)  # before the evaluation: what goes wrong there loses no step
        if evaluates(done):
            evaluate(done)
        if leaving:
            rt.say(f"stopped by a signal after step {done}; saved {path}. Run the same command again to go on.")
            break
    log.close()
    rt.say(bad.report(rt.gather(bad.seen)))
    rt.say(f"checkpoint {path or 'none'}; pictures in {out / 'samples'}")


@torch.no_grad()
def measure(rt, tokenizer, pictures, args, grid_path):
    """Mean PSNR per picture (dB, truncated uint8) and codebook use of the averaged weights over validation pictures,
    shared out over ranks; the main process also writes the first eight, original above reconstruction."""
    count = min(args.eval_pictures, len(pictures))
    chosen = torch.linspace(0, len(pictures) - 1, count).long().tolist()  # spread over all classes
    batches = data.evaluation_batches(pictures, args.micro_batch, rt.rank, rt.world, args.workers, chosen)
    seen = torch.zeros(2**tokenizer.config.bits, dtype=torch.uint8)
    total, number, shown, bad = 0.0, 0, None, data.BadPictures(pictures)
    for batch in batches:
        bad.add(batch.unreadable)
        images = batch.images
        if len(images) == 0:
            continue
        with runtime.autocast(rt.device, args.precision):
            y, indices, _ = tokenizer(data.to_float(images.to(rt.device)))
        rebuilt = data.to_uint8(y).cpu()
        shown = torch.cat([images[:8], rebuilt[:8]]) if shown is None else shown
        values = psnr(images, rebuilt)
        finite = torch.as_tensor(values).isfinite()  # an exact copy has no finite PSNR to average
        # float32 values add up exactly in float64: the same mean whatever the number of processes
        total += float(values[finite].float().double().sum())
        number += int(finite.sum())
        seen[indices.flatten().cpu()] = 1
    if rt.main and shown is not None:
        grid_path.parent.mkdir(exist_ok=True)
        with runtime.replacing(grid_path) as file:
            data.picture_grid(shown, columns=len(shown) // 2).save(file, "PNG")
    total, number, unreadable = rt.reduce([total, number, bad.count])
    bad.check(unreadable, max(count, 100) / len(pictures))  # a single one among few stops no training
    return {"val_psnr": total / max(number, 1), "val_codebook_use": int(rt.union(seen).sum()) / len(seen)}


if __name__ == "__main__":
    runtime.run_script(main)
