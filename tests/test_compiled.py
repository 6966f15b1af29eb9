"""What --compile compiles, on the CPU: against golden files and the same modules uncompiled. Needs a C++ compiler."""

import os
import shutil

import pytest
import torch
from golden_files import fill, load, relative

import fast
from ar_model import ARConfig, ARTransformer, cross_entropies
from losses import LPIPS
from tokenizer import Tokenizer, TokenizerConfig, Upsampler

os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"  # no processes that only start compilers
pytestmark = pytest.mark.skipif(
    not (shutil.which(os.environ.get("CXX", "g++")) or shutil.which("clang++")), reason="needs a C++ compiler"
)


def test_transformer():
    golden = load("gpt_tiny")
    model = fill(ARTransformer(ARConfig(64, 4, 3, 2, grid=4, num_classes=10)), "transformer.").eval()
    tokens = [golden["index_pre"], golden["index_post"]]

    def losses_and_gradients():
        model.zero_grad()
        logits = model(tokens, golden["class_label"])
        losses = cross_entropies(logits, tokens)
        sum(losses).backward()
        return logits, losses, [weight.grad for weight in model.parameters()]

    *_, plain = losses_and_gradients()
    fast.compile(*model.spatial_blocks)
    model.predict = torch.compile(model.predict, dynamic=False)
    (pre, post), losses, gradients = losses_and_gradients()
    assert relative(pre[:, golden["positions"]], golden["logits_pre"]) < 1e-5
    assert relative(post[:, golden["positions"], :256], golden["logits_post"]) < 1e-5
    for part, loss in zip(("pre", "post"), losses, strict=True):
        assert relative(loss, golden[f"cross_entropy_{part}"]) < 1e-5
    for ours, theirs in zip(gradients, plain, strict=True):
        assert relative(ours, theirs) < 1e-5


def test_upsamplers():
    golden = load("tokenizer_tiny16")
    model = fill(Tokenizer(TokenizerConfig(32, (1, 1, 2, 2, 4), 1))).eval()
    fast.compile(*(part for part in model.modules() if isinstance(part, Upsampler)))
    assert relative(model.decode(golden["indices"]), golden["reconstruction"]) < 1e-5


def test_lpips():
    golden = load("lpips_vgg")
    lpips = fill(LPIPS("vgg"), "loss.perceptual_loss.", keep=("shift", "scale"))
    fast.compile(lpips)
    assert relative(lpips(golden["image"], golden["other"]).flatten(), golden["distance"]) < 1e-5
