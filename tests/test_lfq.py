import numpy as np
import pytest
import torch
from golden_files import load, relative
from scripts import on_two_ranks

import lfq


def tokens_of(x):
    return x.movedim(1, -1).reshape(-1, x.shape[1])


@pytest.mark.parametrize("kind", ["soft", "hard"])
def test_golden_float32(kind):
    golden = load(f"lfq_{kind}")
    z = golden["x"].requires_grad_()
    quantized, indices, losses = lfq.LFQ().train()(z)
    assert torch.equal(quantized.detach(), golden["quantized"])
    assert torch.equal(indices.flatten(), golden["indices"])
    pre, post = lfq.split_indices(indices)
    assert torch.equal(pre.flatten(), golden["index_pre_6"]) and torch.equal(post.flatten(), golden["index_post_12"])
    names = {
        "sample_entropy": "per_sample_entropy",
        "codebook_entropy": "codebook_entropy",
        "entropy": "entropy_loss",
        "commitment": "commit_loss",
    }
    for ours, theirs in names.items():
        assert losses[ours].item() == pytest.approx(golden[theirs].item(), rel=1e-6), ours
    (gradient,) = torch.autograd.grad(losses["entropy"], z, retain_graph=True)
    assert relative(gradient, golden["grad_entropy_loss"]) < 1e-6
    (gradient,) = torch.autograd.grad(losses["commitment"], z)
    assert relative(gradient, golden["grad_commit"]) < 1e-6


@pytest.mark.parametrize("kind, gradient_tolerance", [("soft", 1e-4), ("hard", 1e-2)])
def test_golden_computed_in_float32(kind, gradient_tolerance, monkeypatch):
    """What an accelerator computes."""
    golden = load(f"lfq_{kind}")
    z = tokens_of(golden["x"]).requires_grad_()
    monkeypatch.setattr(torch, "float64", torch.float32)
    terms = lfq.entropy_terms(z)
    for ours, theirs in zip(terms, ("per_sample_entropy", "codebook_entropy"), strict=True):
        assert ours.dtype == torch.float32 and ours.item() == pytest.approx(golden[theirs].item(), rel=1e-6)
    (gradient,) = torch.autograd.grad(terms[0] - terms[1], z)
    assert relative(gradient, tokens_of(golden["grad_entropy_loss"])) < gradient_tolerance


@pytest.mark.parametrize("kind", ["soft", "hard"])
def test_golden_float64(kind):
    golden = load(f"lfq_{kind}")
    z = golden["x"].double().requires_grad_()
    _, _, losses = lfq.LFQ().train()(z)
    assert losses["sample_entropy"].dtype == torch.float64
    assert losses["sample_entropy"].item() == pytest.approx(golden["per_sample_entropy"].item(), rel=1e-9)
    assert losses["codebook_entropy"].item() == pytest.approx(golden["codebook_entropy"].item(), rel=1e-9)
    (gradient,) = torch.autograd.grad(losses["entropy"], z)
    assert relative(gradient, golden["grad_entropy_loss"]) < 1e-9


def dense_terms(z):
    """Both entropies by the table of all assignments."""
    codes = lfq.indices_to_codes(torch.arange(2 ** z.shape[1]), z.shape[1], z.dtype)
    logs = torch.log_softmax(2 * z @ codes.T / 0.01, dim=1)
    mean = logs.exp().mean(0)
    return -(logs.exp() * logs).sum(1).mean(), -(mean * torch.log(mean + 1e-5)).sum()


@pytest.mark.parametrize("deviation", [0.002, 0.04, 0.3, 0.5])
@pytest.mark.parametrize("tokens", [1, 4, 16])
def test_few_tokens(tokens, deviation):
    """Single precision in, 2^18 codes: both entropies nearly cancel there. (The dense table in float64 is no truth for
    every draw: with one token whose gradient is 1e-8 it was seen to be off by 1e-6, ours by 1e-7.)"""
    z = (torch.randn(1, 18, tokens, 1) * deviation).requires_grad_()
    _, _, losses = lfq.LFQ().train()(z)
    (gradient,) = torch.autograd.grad(losses["entropy"], z)
    exact = tokens_of(z.detach()).double().requires_grad_()
    sample, codebook = dense_terms(exact)
    assert losses["entropy"].dtype == torch.float32
    assert losses["entropy"].item() == pytest.approx((sample - codebook).item(), rel=1e-6, abs=1e-12)
    (theirs,) = torch.autograd.grad(sample - codebook, exact)
    assert relative(tokens_of(gradient), theirs) < 1e-6


@pytest.mark.parametrize("bits", [1, 2, 5, 8])
def test_entropy_equals_the_dense_softmax(bits):
    z = (torch.randn(7, bits, dtype=torch.float64) * 0.02).requires_grad_()
    sample, codebook = dense_terms(z)
    ours = lfq.entropy_terms(z)
    assert torch.allclose(torch.stack(ours), torch.stack([sample, codebook]), rtol=1e-12)
    for mine, dense in zip(ours, (sample, codebook)):
        a, b = (torch.autograd.grad(value, z, retain_graph=True)[0] for value in (mine, dense))
        assert relative(a, b) < 1e-9


def test_entropy_memory_is_not_tokens_times_codes():
    """Largest tensor made, forward and backward, at 2^18 codes: far below N * 2^18 and growing by N * 2^10 only."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        numel = total = 0

        def __torch_dispatch__(self, function, kinds, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor):
                self.numel = max(self.numel, result.numel())
            return result

    def largest(tokens):
        z = torch.randn(tokens, 18).requires_grad_()
        with Largest() as seen:
            sample, codebook = lfq.entropy_terms(z)
            (sample - codebook).backward()
        return seen.numel

    assert largest(64) == 2**18
    assert largest(1024) <= 1024 * 2**10


def _half_of_the_tokens(rank, z, theirs):
    """Each rank's gradient, averaged as in training, is the gradient of one process with both ranks' tokens."""
    mine = z[rank * 8 : rank * 8 + 8].clone().requires_grad_()
    sample, codebook = lfq.entropy_terms(mine, global_batch=True)
    assert codebook.item() == pytest.approx(theirs["codebook"].item(), rel=1e-12)
    means = torch.stack([sample.detach(), codebook.detach()])
    torch.distributed.all_reduce(means)
    assert means[0].item() / 2 == pytest.approx(theirs["sample"].item(), rel=1e-12)
    (gradient,) = torch.autograd.grad(sample - codebook, mine)
    # The average halves what each rank adds to a weight's gradient.
    assert relative(gradient / 2, theirs["gradient"][rank * 8 : rank * 8 + 8]) < 1e-9
    (own,) = torch.autograd.grad(sum(lfq.entropy_terms(mine)), mine)
    assert relative(own / 2, theirs["gradient"][rank * 8 : rank * 8 + 8]) > 0.1  # and another one without


def test_global_entropy_of_two_ranks_is_that_of_one_with_both_batches(tmp_path):
    torch.manual_seed(0)
    z = (torch.randn(16, 10, dtype=torch.float64) * 0.01).requires_grad_()
    sample, codebook = lfq.entropy_terms(z)
    (gradient,) = torch.autograd.grad(sample - codebook, z)
    theirs = {"sample": sample, "codebook": codebook, "gradient": gradient}
    on_two_ranks(_half_of_the_tokens, tmp_path, z.detach(), {k: v.detach() for k, v in theirs.items()})
    assert torch.equal(lfq.entropy_terms(z, global_batch=True)[1], codebook)  # alone there is nobody to ask


def test_entropy_ignores_autocast():
    z = torch.randn(16, 18) * 0.02
    expected = lfq.entropy_terms(z)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(torch.stack(lfq.entropy_terms(z)), torch.stack(expected))
        losses = lfq.LFQ().train()(z.bfloat16().view(1, 18, 4, 4))[2]
    assert {value.dtype for value in losses.values()} == {torch.float32}


def test_indices_are_little_endian_and_zero_is_minus_one():
    z = torch.full((1, 18, 1, 1), -1.0)
    z[0, 3] = 0.5
    z[0, 7] = 0.0
    quantized, indices, _ = lfq.LFQ().eval()(z)
    assert indices.item() == 2**3
    assert quantized.flatten().tolist() == [1.0 if i == 3 else -1.0 for i in range(18)]


def test_codes_and_sub_tokens_round_trip():
    indices = torch.from_numpy(np.random.default_rng(0).integers(0, 2**18, (5, 7)))
    assert torch.equal(lfq.codes_to_indices(lfq.indices_to_codes(indices, 18)), indices)
    for parts in [(6, 12), (9, 9), (4, 6, 8)]:
        assert torch.equal(lfq.merge_indices(lfq.split_indices(indices, parts), parts), indices)
    pre, post = lfq.split_indices(indices)
    assert torch.equal(indices, pre + 64 * post)


def test_gradient_passes_straight_through():
    z = torch.randn(2, 18, 3, 3, requires_grad=True)
    weight = torch.randn_like(z)
    quantized, _, _ = lfq.LFQ().eval()(z)
    (quantized * weight).sum().backward()
    assert torch.equal(z.grad, weight)


def test_losses_are_zero_in_eval_mode():
    _, _, losses = lfq.LFQ().eval()(torch.randn(1, 18, 2, 2))
    assert [value.item() for value in losses.values()] == [0.0] * 4


@pytest.mark.gpu
@pytest.mark.parametrize("deviation", [0.01, 0.1, 1.0])  # probabilities 0.5 and around to 0 and 1
@pytest.mark.parametrize("tokens, bits", [(300, 1), (300, 2), (300, 7), (2048, 18), (100, 20)])
def test_entropy_terms_on_a_gpu(tokens, bits, deviation, monkeypatch):
    """Both entropies and the gradient of each, z's rows not contiguous: against float64. TF32 is allowed and must not
    be used."""
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", True)
    torch.manual_seed(0)
    # half a deviation off 0: where all codes are as likely, codebook entropy has its maximum and no gradient
    z = ((torch.randn(bits, tokens, device="cuda") + 0.5) * deviation).T

    def terms_and_gradients(z):
        terms = lfq.entropy_terms(z.requires_grad_())
        return *terms, *(torch.autograd.grad(term, z, retain_graph=True)[0] for term in terms)

    for a, b in zip(terms_and_gradients(z.detach()), terms_and_gradients(z.double()), strict=True):
        assert a.dtype == torch.float32 and a.shape == b.shape
        assert relative(a, b) < 5e-6


@pytest.mark.gpu
def test_entropy_terms_of_a_global_batch(monkeypatch):
    """Two processes with the same tokens: what one has alone."""
    z = torch.randn(300, 12, device="cuda", requires_grad=True)

    def terms_and_gradient(global_batch):
        sample, codebook = lfq.entropy_terms(z, global_batch=global_batch)
        return sample, codebook, torch.autograd.grad(sample - codebook, z)[0]

    alone = terms_and_gradient(False)
    monkeypatch.setattr(lfq.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(lfq.dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(lfq.dist, "all_reduce", lambda total: total.mul_(2))
    for a, b in zip(terms_and_gradient(True), alone, strict=True):
        assert relative(a, b) < 1e-6


@pytest.mark.gpu
@pytest.mark.parametrize("kind, tolerance", [("soft", 1e-5), ("hard", 1e-2)])
def test_golden_on_a_gpu(kind, tolerance):
    golden = {name: value.to("cuda") for name, value in load(f"lfq_{kind}").items()}
    z = golden["x"].requires_grad_()
    _, _, ours = lfq.LFQ().train()(z)
    assert relative(ours["sample_entropy"], golden["per_sample_entropy"]) < 1e-6
    assert relative(ours["codebook_entropy"], golden["codebook_entropy"]) < 1e-6
    (gradient,) = torch.autograd.grad(ours["entropy"], z)
    assert relative(gradient, golden["grad_entropy_loss"]) < tolerance
