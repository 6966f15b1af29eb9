"""Stage I: train the tokenizer of images or of videos (Open-MAGVIT2, arXiv 2409.04410; its losses: losses.py).

    python train_tokenizer.py --data glyphs --out runs/tokenizer                  # a CPU, minutes, nothing to download
    torchrun --nproc_per_node=8 train_tokenizer.py --preset 256_L --data imagenet/train --val-data imagenet/val
    torchrun --nproc_per_node=8 train_tokenizer.py --preset video_128 --init 128_L --data ucf101/train

What comes out, under --out: config.json, log.jsonl, step_XXXXXXXX.pt (the last two; everything a resume needs, and what
load_tokenizer reads), samples/step_XXXXXXXX.png (original above reconstruction, by the moving average; of clips some
frames, all of them in a .webp). Running the same command again goes on from the newest checkpoint.

Letters: x images, y their unclamped reconstructions, both (b, 3, S, S) in [-1, 1], clips (b, 3, T, S, S); D the
discriminator."""

import copy
import functools
import math
from dataclasses import asdict, astuple

import torch
from torch import nn

import data
import fast
import losses
import runtime
import training
from checkpoint import hash_of, locate
from clips import open_clips
from fast.graphs import Gradients, Graphs
from runtime import UserError, at_least
from tokenizer import RELEASED, TOKENIZER_SIZES, VIDEO_SIZES, Tokenizer, TokenizerConfig, load_tokenizer
from video_tokenizer import VideoTokenizer, inflate

# The paper's settings for 256_L and 128_L.
PAPER = {"global_batch": 256, "micro_batch": 8, "lr": 1e-4, "ema": 0.999, "steps": 0}
PAPER |= {"lpips": "published", "gan_weight": 0.1, "entropy_weight": 0.1}
# Ours: legible glyphs in minutes on a CPU, so without LPIPS and D, each many times larger than this tokenizer.
TINY = {"size": 32, "global_batch": 16, "micro_batch": 16, "lr": 7e-4, "ema": 0.98, "steps": 550, "epochs": 0}
TINY |= {"lr_drops": [], "lpips": "none", "gan_weight": 0.0, "lecam_weight": 0.0, "entropy_weight": 0.03}
# The released settings of video_128. An epoch of UCF-101's first training split has 75 steps.
VIDEO = {**PAPER, "data": "moving-glyphs", "size": 128, "frames": 17, "global_batch": 128, "micro_batch": 2}
VIDEO |= {"epochs": 2000, "lr_drops": [], "warmup_epochs": 2, "cosine_to": 0.01}
VIDEO |= {"gan_weight": 0.3, "lecam_weight": 0.05}
VIDEO_TINY = {**TINY, "data": "moving-glyphs", "size": 24, "frames": 5, "global_batch": 4, "micro_batch": 4}
VIDEO_TINY |= {"steps": 480, "eval_pictures": 200}
PRESETS = {
    "tiny": TINY,
    "128_L": {**PAPER, "size": 128, "epochs": 350, "lr_drops": [250, 300], "lecam_weight": 0.01},
    "256_L": {**PAPER, "size": 256, "epochs": 270, "lr_drops": [200, 250], "lecam_weight": 0.05},
    "video_tiny": VIDEO_TINY,
    "video_128": VIDEO,
}
for name, preset in PRESETS.items():
    size = (TOKENIZER_SIZES | VIDEO_SIZES)[name]
    preset |= {"channels": size.channels, "multipliers": list(size.channel_multipliers)}
    preset |= {"blocks": size.blocks_per_level, "bits": size.bits}

# Settings that a resumed run may change: they leave the weights alone, up to rounding. Not so the micro-batch (codebook
# entropy and BatchNorm go over it), but it has to fit the memory at hand. Contents of --data and --init are compared.
MAY_CHANGE = {"out", "workers", "log_every", "save_every", "keep_every", "eval_every", "eval_pictures"}
MAY_CHANGE |= {"val_data", "compile", "allow_changes", "micro_batch", "preset", "data", "init"}


def parse(argv=None):
    arguments = runtime.parser(__doc__)
    add = arguments.add_argument_group("data").add_argument
    add("--data", default="glyphs", help="folder, of any depth; or built in: [moving-]glyphs[:COUNT[:CLASSES]]")
    add("--val-data", help="the same, for PSNR and the reconstruction pictures; --data where it is not given")
    add("--size", type=at_least(1), help="side of the training crops, pixels")
    add("--frames", type=at_least(0), default=0, help="frames a clip, for a tokenizer of videos; 0: pictures")
    add("--workers", type=at_least(0), default=2, help="loader processes per device")
    add("--seed", type=at_least(0), default=0, help="of initialisation, order, crops")
    add = arguments.add_argument_group("model").add_argument
    add("--preset", default="tiny", help=f"size and settings: {', '.join(PRESETS)}; the flags below override it")
    add("--init", help="begin with the weights, at their sizes, of a released name, file or run; videos also of images")
    add("--channels", type=int, help="width at full resolution, a multiple of 32; levels 32 wide lose the colours")
    add("--multipliers", type=int, nargs="+", help="width of each level over --channels; resolution halves between")
    add("--blocks", type=int, help="ResBlocks a level")
    add("--bits", type=int, help="latent channels K, for 2^K codes")
    add = arguments.add_argument_group("objective").add_argument
    add("--lpips", help="LPIPS weights: 'published' (downloaded), a file that holds them, or 'none' for no LPIPS")
    add("--gan-weight", type=at_least(0, float), help="weight of the adversarial term; 0: no discriminator at all")
    add("--lecam-weight", type=at_least(0, float), help="weight of LeCAM in the discriminator's loss")
    add("--entropy-weight", type=at_least(0, float), help="weight of the entropy term")
    add("--global-entropy", action="store_true", help="codebook entropy over devices (not accumulated); no CUDA graphs")
    add = arguments.add_argument_group("schedule").add_argument
    add("--lr", type=at_least(0, float), help="learning rate of both Adams")
    add("--lr-drops", type=at_least(0, float), nargs="*", help="epochs after which the learning rate falls to a tenth")
    add("--warmup-epochs", type=at_least(0, float), default=0, help="epochs of linear warm-up from 0")
    add("--cosine-to", type=at_least(0, float, 1), default=0, help="share of --lr that a cosine ends at; 0: no cosine")
    add("--ema", type=at_least(0, float, 1), help="decay of the moving average of all trained parameters, per step")
    training.add_run_flags(arguments, "runs/tokenizer", 20, "evaluations and reconstruction pictures", 1000)
    return runtime.parse_with_presets(arguments, PRESETS, argv)


def learning_rate(args, step, epoch_steps, total):
    """Learning rate of a step, counted from 0, of `total`. Of args: lr, lr_drops, warmup_epochs, cosine_to."""
    warmup = args.warmup_epochs * epoch_steps
    if step < warmup:
        return args.lr * step / warmup
    lr = args.lr * 0.1 ** sum(step >= drop * epoch_steps for drop in args.lr_drops)
    if args.cosine_to:
        done = (step - warmup) / max(total - 1 - warmup, 1)
        lr *= args.cosine_to + (1 - args.cosine_to) * (0.5 + 0.5 * math.cos(math.pi * done))
    return lr


def generator_pass(tokenizer, discriminator, lpips, scaler, args, share, images):
    """The generator's forward and backward on one micro-batch, uint8 (b, 3, S, S) or (b, 3, T, S, S). Adds to its
    gradients those of loss / share, where `share` is the number of micro-batches a step. Returns y and the terms of the
    loss, detached. discriminator, lpips: None leaves that term out. Of args: precision, gan_weight, entropy_weight."""
    if discriminator:
        discriminator.requires_grad_(False)  # D scores y but gets no gradient of its own
    x = data.to_float(images)
    with runtime.autocast(images.device, args.precision):
        y, _, quantizer = tokenizer(x)
        loss, terms = losses.generator_loss(x, y, quantizer, lpips, discriminator, args.gan_weight, args.entropy_weight)
    scaler.scale(loss / share).backward()
    return {"y": y.detach(), "generator": loss.detach(), **terms}


def discriminator_pass(discriminator, lecam, scaler, args, share, images, y):
    """The same for D, on the images and the generator's y of them: adds to D's gradients and returns the terms of its
    loss. Of args: precision, lecam_weight."""
    discriminator.requires_grad_(True)
    with runtime.autocast(images.device, args.precision):
        real, fake = discriminator(data.to_float(images)), discriminator(y)  # apart, for BatchNorm
    loss, terms = losses.discriminator_loss(real, fake, lecam, args.lecam_weight)
    scaler.scale(loss / share).backward()
    return {"discriminator": loss.detach(), **terms}


def main():
    # Settings
    args = parse()
    rt = runtime.start()
    args.precision = runtime.set_precision(rt, args.precision)
    accumulation = runtime.split_batch(args.global_batch, args.micro_batch, rt.world)
    # Training repeats few shapes, so it pays to try out convolution algorithms. Not where codes, pictures or published
    # metrics are made: each process may find another one the fastest, whose last digits differ.
    torch.backends.cudnn.benchmark = True

    # Data
    opened = functools.partial(open_clips, frames=args.frames) if args.frames else data.open_pictures
    pictures = opened(args.data, args.size, train=True, seed=args.seed, labelled=None)
    val_pictures = opened(args.val_data or args.data, args.size, train=False, seed=args.seed, labelled=None)
    epoch_steps, total = training.run_length(args, len(pictures))

    # What --init holds: training weights and their moving average, as `trained` and `average` below
    tokenizer_class = VideoTokenizer if args.frames else Tokenizer
    discriminator_class = losses.PatchDiscriminator3D if args.frames else losses.PatchDiscriminator
    init, init_path = [], None
    if args.init:
        init_path = rt.share(locate(args.init, RELEASED))
        init = [nn.ModuleDict({"tokenizer": load_tokenizer(init_path, ema)}) for ema in (False, True)]
        for part in init:
            if args.frames and isinstance(part["tokenizer"], Tokenizer):
                part["tokenizer"] = inflate(part["tokenizer"])
            elif not isinstance(part["tokenizer"], tokenizer_class):
                raise UserError(f"{init_path} is a tokenizer of videos: give --frames, or one of images")
        for part, discriminator in zip(init, losses.load_discriminator(init_path, discriminator_class)):
            part["discriminator"] = discriminator
        args.channels, multipliers, args.blocks, args.bits = astuple(init[0]["tokenizer"].config)
        args.multipliers = list(multipliers)

    # Models
    runtime.seed_everything(args.seed)
    config = TokenizerConfig(args.channels, args.multipliers, args.blocks, args.bits)
    if args.size % config.factor:
        raise UserError(f"--size {args.size} is not a multiple of {config.factor}, the tokenizer's factor")
    if args.gan_weight and args.size < 24 and not args.frames:
        raise UserError(f"--size {args.size}: the discriminator needs 24 pixels; or use --gan-weight 0")
    tokenizer = tokenizer_class(config)
    if args.frames and tokenizer.rebuilt_frames(args.frames) < args.frames:
        words = f"1 more than a multiple of {tokenizer.time_factor}, the tokenizer's factor in time"
        raise UserError(f"--frames {args.frames} is not {words}: the last frames would be lost")
    tokenizer.quantizer.global_batch = args.global_entropy
    trained, lpips, discriminator = nn.ModuleDict({"tokenizer": tokenizer}), None, None
    if args.lpips != "none":
        lpips_path = None if args.lpips == "published" else args.lpips
        lpips = rt.place(losses.load_lpips("vgg", lpips_path, maybe=init_path))
    if args.gan_weight:
        discriminator = trained["discriminator"] = discriminator_class()
        if init and "discriminator" not in init[0]:
            rt.say(f"{init_path} holds no discriminator of this kind: it begins afresh")
    average = copy.deepcopy(trained).eval().requires_grad_(False)
    for part, loaded in zip((trained, average), init):
        part.load_state_dict(loaded.state_dict(), strict=False)  # only one of them may have a discriminator
    for part in (trained, average):
        rt.share_parameters(part.to(rt.device))
        rt.place(part)  # before optimizers are made: their state has to lie in memory as the weights do
    lecam = losses.LeCAM().to(rt.device)

    # Optimizers
    adam = functools.partial(torch.optim.Adam, lr=args.lr, betas=(0.5, 0.9), fused=rt.device.type == "cuda")
    optimizers = {name: adam(module.parameters()) for name, module in trained.items()}
    scaler = torch.amp.GradScaler(rt.device.type, enabled=args.precision == "fp16")

    # Resume
    saved = {"lecam": lecam, "scaler": scaler}  # by their names in the file
    for name, module in trained.items():
        saved |= {name: module, f"{name}_ema": average[name], f"optimizer_{name}": optimizers[name]}
    settings = vars(args) | {"pictures": len(pictures), "total_steps": total, "pictures_hash": data.identity(pictures)}
    settings["init_hash"] = bool(init) and hash_of(nn.ModuleList(init).state_dict())
    run = training.Run(rt, args, settings, MAY_CHANGE, saved, kind="tokenizer", config=asdict(config))

    # Passes. No graph may talk to other processes, as the global entropy does.
    compiled = fast.compiles(rt.device, args.compile, total)
    if compiled:
        fast.compile(*(level.upsample for level in tokenizer.decoder.up[1:]), *([lpips] if lpips else []))
    graphs = Graphs(rt, compiled and not (args.global_entropy and rt.world > 1))
    gradients = {name: Gradients(rt, module.parameters()) for name, module in trained.items()}
    share = accumulation * rt.world
    generator_work = functools.partial(generator_pass, tokenizer, discriminator, lpips, scaler, args, share)
    discriminator_work = functools.partial(discriminator_pass, discriminator, lecam, scaler, args, share)

    def evaluate():
        graphs.forget()  # an evaluation needs their memory
        run.note(**measure(rt, run, average["tokenizer"], val_pictures, args))

    trained.train()
    if run.lacks_evaluation:
        evaluate()
    bad = data.BadPictures(pictures)
    batches = data.training_batches(
        pictures, args.seed, args.global_batch, args.micro_batch, rt.rank, rt.world, run.step, total, args.workers
    )
    for step, micro_batches in enumerate(batches, run.step):
        lr = learning_rate(args, step, epoch_steps, total)
        for optimizer in optimizers.values():
            for group in optimizer.param_groups:
                group["lr"] = lr

        # Generator: all micro-batches, then one step
        pairs, terms = [], []
        for i, batch in enumerate(micro_batches):
            bad.add(batch.unreadable)
            images = batch.images.to(rt.device, non_blocking=True)
            terms.append(graphs.run(generator_work, gradients["tokenizer"], i == 0, images))
            pairs.append((images, terms[i].pop("y")))
        gradients["tokenizer"].exchange()
        scaler.step(optimizers["tokenizer"])

        # Discriminator: the same pictures and the y that the generator made of them
        if discriminator:
            for i, pair in enumerate(pairs):
                terms[i] |= graphs.run(discriminator_work, gradients["discriminator"], i == 0, *pair)
            gradients["discriminator"].exchange()
            scaler.step(optimizers["discriminator"])
        scaler.update()

        # Means over the global batch, LeCAM's running means, moving average of the weights
        means = torch.stack([torch.stack(list(term.values())) for term in terms]).mean(0)
        if rt.world > 1:
            torch.distributed.all_reduce(means)
            means = means / rt.world
        means = dict(zip(terms[0], means, strict=True))
        if discriminator:
            lecam.advance(means["logits_real"], means["logits_fake"])
        losses.update_ema(list(average.parameters()), list(trained.parameters()), args.ema)

        # Log, save, evaluate, leave
        run.advance(loss=means["generator"] + means.get("discriminator", 0))
        if run.due(args.log_every):
            bad.check(rt.reduce([bad.count])[0], step // epoch_steps + 1)
            run.line(**{name: value.item() for name, value in means.items()}, lr=lr)
        if run.due(args.save_every) or run.due(args.eval_every) or run.leaving:
            run.save()  # before the evaluation: what goes wrong there loses no step
        if run.due(args.eval_every):
            evaluate()
        if run.leaving:
            break
    rt.say(bad.report(rt.gather(bad.seen)))
    run.close()


@torch.no_grad()
def measure(rt, run, tokenizer, pictures, args):
    """Mean PSNR of a picture (dB, truncated uint8) and share of codes in use, by the averaged weights, on validation
    pictures shared out over ranks. The first eight, original above reconstruction, become a picture of the run."""
    count = min(args.eval_pictures, len(pictures))
    chosen = torch.linspace(0, len(pictures) - 1, count).long().tolist()  # spread over all classes
    batches = data.evaluation_batches(pictures, args.micro_batch, rt.rank, rt.world, args.workers, chosen)
    seen = torch.zeros(2**tokenizer.config.bits, dtype=torch.uint8)
    total, number, shown, bad = 0.0, 0, None, data.BadPictures(pictures)
    for batch in batches:
        bad.add(batch.unreadable)
        if len(batch.images) == 0:
            continue
        with runtime.autocast(rt.device, args.precision):
            y, indices, _ = tokenizer(data.to_float(batch.images.to(rt.device)))
        rebuilt = data.to_uint8(y).cpu()
        shown = torch.cat([batch.images[:8], rebuilt[:8]]) if shown is None else shown
        error = ((batch.images.double() - rebuilt.double()) / 255).square().flatten(1).mean(1)  # (b,)
        psnr = -10 * error[error > 0].log10()  # an exact copy has no finite PSNR to average
        # float32 values add up exactly in float64: the same mean whatever the number of processes
        total += psnr.float().double().sum().item()
        number += len(psnr)
        seen[indices.flatten().cpu()] = 1
    if rt.main and shown is not None:
        run.save_samples(shown, columns=len(shown) // 2)
    total, number, unreadable = rt.reduce([total, number, bad.count])
    bad.check(unreadable, max(count, 100) / len(pictures))  # a single one among few stops no training
    return {"val_psnr": total / max(number, 1), "val_codebook_use": int(rt.reduce(seen, "max").sum()) / len(seen)}


if __name__ == "__main__":
    runtime.run_script(main)
