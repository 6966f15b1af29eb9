"""Speed and memory on one GPU: the tables in docs/results.md.

    python bench.py                          # everything, some ten minutes on an H200
    python bench.py --only entropy,sample    # some of it; see ROWS at the end

Each row is a median after warm-up, of real shapes, bf16 autocast, random weights (LPIPS too: values do not change the
time). `plain` is the same work without fused kernels, compiled code and CUDA graphs. `share of the ceiling` is the
work's arithmetic (training, decoding) or its least traffic (sampling: weights and filled cache once a token) over the
time, against this GPU's own rate, measured at the start: a large bf16 matrix product, a large device-to-device copy."""

import dataclasses
import functools
import gc
import itertools
import statistics
from unittest.mock import patch

import torch

import fast
import losses
import runtime
import train_ar
import train_tokenizer
from ar_model import AR_SIZES, ARTransformer, cross_entropies
from fast.graphs import Gradients, Graphs
from lfq import entropy_terms
from tokenizer import TOKENIZER_SIZES, VIDEO_SIZES, Tokenizer
from video_tokenizer import VideoTokenizer

# GFLOP an image, forward, 2 a multiply-add: encoder, decoder of 256_L; VGG16 of LPIPS; the discriminator.
ENCODER, DECODER, VGG, DISCRIMINATOR = 266e9, 317e9, 40e9, 6.3e9
# Forward and backward of the generator; VGG of x forward, of y forward and backward to y; the discriminator likewise
# for the generator, then of x and y forward and backward.
STEP_256_L = 3 * (ENCODER + DECODER) + 3 * VGG + (2 + 6) * DISCRIMINATOR
# The same of a clip of 17 frames of 128 x 128, video_128: its frames have a quarter of the pixels.
STEP_VIDEO = 3 * (4471e9 + 6191e9) + 3 * 17 / 4 * VGG + (2 + 6) * 14e9

PLAIN = patch.object(fast, "ON", False)  # within it all is plain, as with FAST=0


def main():
    arguments = runtime.parser(__doc__)
    arguments.add_argument("--only", help=f"comma-separated: {','.join(ROWS)}")
    args = arguments.parse_args()
    chosen = args.only.split(",") if args.only else list(ROWS)
    if unknown := [name for name in chosen if name not in ROWS]:
        raise runtime.UserError(f"--only: unknown {unknown[0]}; choose from {', '.join(ROWS)}")
    rt = runtime.start()
    if rt.device.type != "cuda":
        raise runtime.UserError("bench.py measures one GPU, and there is none")
    runtime.set_precision(rt, "bf16")
    bench = Bench(rt.device)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    print(f"ceilings: bf16 product {bench.flops / 1e12:.0f} TFLOP/s, copy {bench.bandwidth / 1e12:.2f} TB/s\n")
    print("| what | ours | plain | ratio | peak memory | share of the ceiling |\n|---|---|---|---|---|---|")
    for name in chosen:
        for row in ROWS[name](bench):
            print("| " + " | ".join(row) + " |", flush=True)


class Bench:
    """Times a function on the device, and knows the device's ceilings."""

    def __init__(self, device):
        self.device = device
        a, b = (torch.randn(8192, 8192, device=device, dtype=torch.bfloat16) for _ in range(2))
        self.flops = 2 * 8192**3 / self.time(lambda: a @ b)[0]
        source, target = (torch.empty(2**32, dtype=torch.uint8, device=device) for _ in range(2))
        self.bandwidth = 2 * 2**32 / self.time(lambda: target.copy_(source))[0]

    def time(self, work, repeats=20):
        """(median seconds, peak bytes above what was there before) of work(), after five runs of warm-up."""
        gc.collect()
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        for number in range(5):
            # Without the trials of algorithms, but with a graph's recording: replays allocate nothing.
            if number == 2:
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
            work()
        torch.cuda.synchronize()
        # One run follows the other without waiting, as in a training loop.
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
        marks[0].record()
        for mark in marks[1:]:
            work()
            mark.record()
        torch.cuda.synchronize()
        times = [began.elapsed_time(ended) / 1e3 for began, ended in itertools.pairwise(marks)]
        return statistics.median(times), torch.cuda.max_memory_allocated() - before


def row(what, ours, other, memory, share=None, images=None):
    """Cells: seconds as ms, and images/s where `images` are the work."""

    def cell(seconds):
        if seconds is None:
            return "-"
        return f"{seconds * 1e3:.3g} ms" + (f" ({images / seconds:.0f} images/s)" if images else "")

    ratio = f"{other / ours:.1f}" if other else "-"
    return what, cell(ours), cell(other), ratio, f"{memory / 2**30:.2f} GiB", f"{share:.0%}" if share else "-"


def bench_entropy(bench):
    """LFQ's entropy, 2^18 codes, forward and backward."""
    for tokens in (2048, 4096):
        z = (torch.randn(tokens, 18, device=bench.device) * 0.1).requires_grad_()

        def work(z=z):
            sample, codebook = entropy_terms(z)
            torch.autograd.grad(sample - codebook, z)

        ours, memory = bench.time(work, 100)
        yield row(f"LFQ entropy, {tokens} tokens, forward + backward", ours, None, memory)


def tokenizer_step(bench, batch, compiled, name="256_L"):
    """One complete step of 256_L or video_128 training, of train_tokenizer.py's passes, as a function to call."""
    torch.compiler.reset()  # each size is compiled anew, as a run would
    torch.backends.cudnn.benchmark = True  # as train_tokenizer.py does
    torch.manual_seed(0)
    args, rt = train_tokenizer.parse(["--preset", name, "--precision", "bf16"]), runtime.Runtime(bench.device)
    images = torch.randint(256, (batch, 3, args.size, args.size), dtype=torch.uint8, device=bench.device)
    modules = [Tokenizer(TOKENIZER_SIZES["256_L"]), losses.PatchDiscriminator(), losses.LPIPS()]
    if args.frames:
        images = images[:, :, None].repeat(1, 1, args.frames, 1, 1)
        modules[:2] = VideoTokenizer(VIDEO_SIZES[name]), losses.PatchDiscriminator3D()
    tokenizer, discriminator, lpips = (rt.place(m) if compiled else m.to(bench.device) for m in modules)
    if compiled:
        fast.compile(lpips, *(level.upsample for level in tokenizer.decoder.up[1:]))
    lecam, scaler = losses.LeCAM().to(bench.device), torch.amp.GradScaler(enabled=False)
    trained = [*tokenizer.parameters(), *discriminator.parameters()]
    average = [p.detach().clone() for p in trained]
    adam = [torch.optim.Adam(m.parameters(), 1e-4, betas=(0.5, 0.9), fused=True) for m in (tokenizer, discriminator)]
    gradients, graphs = [Gradients(rt, m.parameters()) for m in (tokenizer, discriminator)], Graphs(rt, compiled)
    generator = functools.partial(train_tokenizer.generator_pass, tokenizer, discriminator, lpips, scaler, args, 1)
    judge = functools.partial(train_tokenizer.discriminator_pass, discriminator, lecam, scaler, args, 1)

    def step():
        y = graphs.run(generator, gradients[0], True, images)["y"]
        adam[0].step()
        terms = graphs.run(judge, gradients[1], True, images, y)
        adam[1].step()
        lecam.advance(terms["logits_real"], terms["logits_fake"])
        losses.update_ema(average, trained)

    return step


def bench_tokenizer(bench, batches=(8, 32, 64), name="256_L", flops=STEP_256_L):
    """256_L training."""
    for batch in batches:
        other = None
        if batch == batches[0]:
            with PLAIN:
                other, _ = bench.time(tokenizer_step(bench, batch, False, name), 5)
        step = tokenizer_step(bench, batch, True, name)
        ours, memory = bench.time(step, 10)
        share = flops * batch / ours / bench.flops
        yield row(f"{name} training step, micro-batch {batch}", ours, other, memory, share, batch)
        del step


def transformer_step(bench, name, batch, compiled, grid=16):
    """(one complete step of training from codes, of train_ar.py's pass, the model)."""
    torch.compiler.reset()
    torch.manual_seed(0)
    args = train_ar.parse(["--precision", "bf16"])
    model = ARTransformer(dataclasses.replace(AR_SIZES[name], grid=grid)).to(bench.device)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-4, betas=(0.9, 0.95), weight_decay=0.05, fused=True)
    loss_terms, scaler = cross_entropies, torch.amp.GradScaler(enabled=False)
    if compiled:
        fast.compile(*model.spatial_blocks)
        model.predict, loss_terms = (torch.compile(f, dynamic=False) for f in (model.predict, cross_entropies))
    codes = torch.randint(2**18, (batch, model.config.tokens), device=bench.device)
    labels = torch.randint(model.config.num_classes, (batch,), device=bench.device)
    rt = runtime.Runtime(bench.device)
    gradients, graphs = Gradients(rt, model.parameters()), Graphs(rt, compiled)
    work = functools.partial(train_ar.training_pass, model, loss_terms, scaler, args, 1)

    def step():
        graphs.run(work, gradients, True, codes, labels)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    return step, model


def step_flops(model):
    """Arithmetic of one image's training step: matrix products and attention, forward and twice that backward."""
    config, tokens = model.config, model.config.tokens

    def products(module):
        return 2 * sum(p.numel() for p in module.parameters() if p.dim() == 2)

    per_token = products(model.spatial_blocks) + 2 * products(model.factorized_blocks) + products(model.head)
    attention = config.spatial_layers * 4 * config.width * tokens / 2  # causal: half of all pairs
    return 3 * tokens * (per_token + attention)


TRAINED = (
    ("B", 24, 16), ("B", 96, 16), ("B", 192, 16), ("B", 24, 32), ("L", 48, 16), ("L", 96, 16),
    ("XL", 32, 16), ("XL", 64, 16), ("video_B", 16, (5, 16, 16)),
)  # fmt: skip


def bench_transformer(bench):
    """AR training from codes."""
    for name, batch, grid in TRAINED:
        other = None
        if (name, batch, grid) == ("B", 96, 16):
            with PLAIN:
                step, model = transformer_step(bench, name, batch, compiled=False)
                other, _ = bench.time(step, 5)
            del step, model
        step, model = transformer_step(bench, name, batch, True, grid)
        ours, memory = bench.time(step, 10)
        share = step_flops(model) * batch / ours / bench.flops
        shape = "x".join(map(str, model.config.shape))
        what = f"AR-{name} training step from codes, {shape} tokens, micro-batch {batch}"
        yield row(what, ours, other, memory, share, batch)
        del step, model


SAMPLED = (
    ("B", 50, 16), ("B", 100, 16), ("B", 200, 16), ("B", 400, 16), ("B", 50, 32), ("L", 50, 16), ("XL", 50, 16),
    ("video_B", 16, (5, 16, 16)),
)  # fmt: skip


def bench_sampling(bench):
    """Guided sampling of whole grids."""
    for name, batch, grid in SAMPLED:
        torch.manual_seed(0)
        model = ARTransformer(dataclasses.replace(AR_SIZES[name], grid=grid)).to(bench.device).eval()
        for head in model.head:
            torch.nn.init.normal_(head.weight, std=0.02)
        labels = torch.arange(batch, device=bench.device) % model.config.num_classes

        def work(model=model, labels=labels, batch=batch):
            with torch.autocast("cuda", torch.bfloat16):
                model.generate(labels, (1.9, 2.0), seeds=range(batch))

        other = None
        if (name, batch, grid) == ("B", 50, 16):
            with PLAIN:
                other, _ = bench.time(work, 1)
        ours, memory = bench.time(work, 3)
        config = model.config
        blocks = [*model.spatial_blocks.parameters(), *model.factorized_blocks.parameters()]
        weights = 2 * sum(p.numel() for p in blocks)
        # Bytes at the middle token
        cache = 2 * batch * config.spatial_layers * 2 * config.width * 2 * config.tokens / 2
        share = config.tokens * (weights + cache) / ours / bench.bandwidth
        what = f"AR-{name} sampling, guided, {'x'.join(map(str, config.shape))} tokens, {batch} images"
        yield row(what, ours, other, memory, share, batch)


def bench_decoder(bench, batch=50):
    """The decoder of 256_L."""
    torch.backends.cudnn.benchmark = False  # as sample.py
    tokenizer = Tokenizer(TOKENIZER_SIZES["256_L"]).to(bench.device).eval()
    indices = torch.randint(2**18, (batch, 16, 16), device=bench.device)

    def work():
        with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
            tokenizer.decode(indices)

    with PLAIN:
        other, _ = bench.time(work, 5)
    tokenizer.to(memory_format=torch.channels_last)
    ours, memory = bench.time(work)
    yield row(f"256_L decoder, {batch} images", ours, other, memory, DECODER * batch / ours / bench.flops, batch)


ROWS = {"entropy": bench_entropy, "tokenizer": bench_tokenizer, "transformer": bench_transformer}
ROWS |= {"sample": bench_sampling, "decode": bench_decoder}
ROWS["video"] = functools.partial(bench_tokenizer, batches=(2, 4), name="video_128", flops=STEP_VIDEO)


if __name__ == "__main__":
    runtime.run_script(main)
