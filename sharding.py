"""A transformer too large for one device: weights, gradients and optimizer spread over all processes (FSDP2).

    shard(rt, model, precision)             # built on the CPU, with the weights it would have anyway
    optimizer = AdamW(model.parameters())
    whole_in_files(rt, model, optimizer)    # state_dict() and load_state_dict() are those of one process

Files hold whole tensors under plain names. In the host's memory every process builds the whole model (4 bytes a
parameter) and reads the whole checkpoint (12 more)."""

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils.checkpoint import checkpoint

import runtime
from ar_model import ARTransformer


def shard(rt, model, precision):
    """Spread a model on the CPU over all processes' devices, in place.
    The shares, their gradients' sums and AdamW are float32. A block is gathered in `precision`, which autocast would
    compute in: gathered in float32, autocast's own copies of all weights would wait, whole, for the backward pass.
    Embeddings, last norm, heads, and what passes between blocks stay float32."""
    mesh = init_device_mesh(rt.device.type, (rt.world,))
    dtype = None if precision == "fp32" else runtime.PRECISIONS[precision]
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for block in [*model.spatial_blocks, *model.factorized_blocks]:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=MixedPrecisionPolicy(cast_forward_inputs=False))


def whole_in_files(rt, model, optimizer):
    """Have the state dicts of a sharded model and its optimizer hold whole tensors, on the main process's CPU (on the
    others without numbers, meta). All processes must ask for them, and load them, together."""
    by_name, by_number = dict(model.named_parameters()), list(model.parameters())

    def cut_model(_, state, *args):
        state |= {name: _cut(value, by_name[name]) for name, value in state.items()}

    def cut_optimizer(_, state):
        for number, moments in state["state"].items():
            moments |= {name: _cut(value, by_number[number]) for name, value in moments.items()}

    model.register_state_dict_post_hook(lambda _, state, *args: state.update(_whole(rt, state)))
    model.register_load_state_dict_pre_hook(cut_model)
    optimizer.register_state_dict_post_hook(lambda _, state: _whole(rt, state))
    optimizer.register_load_state_dict_pre_hook(cut_optimizer)


def _cut(value, parameter):
    """A whole tensor, cut as a sharded parameter of its shape is; others (Adam's step count) as they are."""
    if value.shape != parameter.shape:
        return value
    return distribute_tensor(value, parameter.device_mesh, parameter.placements)


def _whole(rt, tree):
    if isinstance(tree, dict):
        return {key: _whole(rt, value) for key, value in tree.items()}
    return full(tree).to("cpu" if rt.main else "meta") if isinstance(tree, DTensor) else tree  # one at a time


def full(tensor):
    """A sharded tensor whole, on every process; any other as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def unsharded(rt, model):
    """A sharded model's whole float32 copy on the main process's device, None on the others; all must call it. (Shards
    would gather every block anew for every token.) Any other model as it is."""
    if not isinstance(model, FSDPModule):
        return model
    entries = model.state_dict()  # whole: see `whole_in_files`
    if not rt.main:
        return None
    with torch.device("meta"):
        copy = ARTransformer(model.config)
    copy.load_state_dict(entries, assign=True)
    return copy.to(rt.device)


def rerun_in_backward(block):
    """Make a block keep only its input for the backward pass, which runs it again, with the same dropout."""
    plain = block.forward

    def forward(*inputs):
        # Drawing pictures needs no gradient: there the block runs as it is.
        return checkpoint(plain, *inputs, use_reentrant=False) if torch.is_grad_enabled() else plain(*inputs)

    block.forward = forward
