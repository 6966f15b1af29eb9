import dataclasses

import torch
import torch.distributed as dist
from scripts import on_two_ranks
from torch import nn

import runtime
from ar_model import AR_SIZES, ARTransformer, cross_entropies
from sharding import rerun_in_backward, shard, unsharded, whole_in_files

CONFIG = dataclasses.replace(AR_SIZES["tiny"], width=32, heads=2, spatial_layers=2, num_classes=5)


def random_model():
    torch.manual_seed(0)
    model = ARTransformer(CONFIG).train()
    for head in model.head:  # zero heads would hide all gradients below them
        nn.init.normal_(head.weight, std=0.02)
    return model


def gradients(model, precision="fp32"):
    """Logits and gradients of one batch, the same dropout every time."""
    torch.manual_seed(1)
    pre, post = torch.randint(64, (3, 16)), torch.randint(4096, (3, 16))
    with runtime.autocast(torch.device("cpu"), precision):
        logits = model([pre, post], torch.tensor([0, 4, 2]))
    sum(cross_entropies(logits, [pre, post])).backward()
    return logits, {name: p.grad for name, p in model.named_parameters()}


def blocks_of(model):
    return [*model.spatial_blocks, *model.factorized_blocks]


def test_checkpointed_blocks_run_twice_with_the_same_gradients():
    model, plain = random_model(), random_model()
    calls = []
    for block in blocks_of(model):
        rerun_in_backward(block)
        block.attention.register_forward_hook(lambda *_: calls.append(1))
    assert list(model.state_dict()) == list(plain.state_dict())
    _, ours = gradients(model)
    assert len(calls) == 2 * len(blocks_of(model))
    for name, gradient in gradients(plain)[1].items():
        assert torch.equal(ours[name], gradient), name
    model.generate(torch.tensor([1]), max_tokens=2)  # needs no gradient: nothing runs twice
    assert len(calls) == 2 * len(blocks_of(model)) + 2 * CONFIG.spatial_layers + 2 * 2 * CONFIG.intra_layers


def _shares(rank):
    rt = runtime.Runtime(torch.device("cpu"), rank, 2, dist.group.WORLD)
    plain = random_model()
    model = random_model()
    shard(rt, model, "fp32")
    held = sum(p.to_local().numel() for p in model.parameters())
    assert held <= 0.51 * sum(p.numel() for p in plain.parameters())
    whole_in_files(rt, model, torch.optim.AdamW(model.parameters()))
    gathered, copy = model.state_dict(), unsharded(rt, model)
    if rank:
        assert copy is None and all(value.is_meta for value in gathered.values())
    else:
        for entries in (gathered, copy.state_dict()):
            for name, value in plain.state_dict().items():
                assert torch.equal(entries[name], value), name


def test_a_process_holds_half_of_a_model_over_two(tmp_path):
    on_two_ranks(_shares, tmp_path)


def _half_precision(rank):
    rt = runtime.Runtime(torch.device("cpu"), rank, 2, dist.group.WORLD)
    theirs, expected = gradients(random_model(), "bf16")
    model = random_model()
    shard(rt, model, "bf16")
    ours, found = gradients(model, "bf16")  # the same batch on both: its gradient is also the mean
    for part, other in zip(ours, theirs):
        assert torch.equal(part, other)  # norms weigh 1, which bf16 holds exactly
    for name, value in expected.items():
        gradient = found[name].full_tensor()
        assert gradient.dtype == torch.float32
        # A norm's gradient is rounded once to bf16; all others are what autocast makes them.
        tolerance = 2**-8 if "_norm" in name else 1e-7
        assert (gradient - value).norm() <= tolerance * value.norm(), name


def test_bf16_shards_compute_what_autocast_does(tmp_path):
    on_two_ranks(_half_precision, tmp_path)
