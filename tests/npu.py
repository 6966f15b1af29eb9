"""A stand-in for an Ascend NPU: attach() makes the device type `npu` and the process group backend `hccl`.

Operators run on the CPU, collectives through gloo, and random numbers come from the CPU's generator. Refused are
float64, and tensors on the CPU beside the device's. As with an older torch_npu, neither torch.Event nor
torch.accelerator.synchronize works. Not modelled: mixed precision, copies that do not wait, streams, memory, more than
one device per process.
"""

import functools
import os
from types import SimpleNamespace

import torch
import torch.distributed as dist
from torch._C import _acc, _construct_storage_from_data_pointer
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

aten = torch.ops.aten
CPU_KEY = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
# Operators that the CPU knows under another name.
ON_CPU = {
    aten._copy_from.default: lambda source, target, non_blocking=False: target.copy_(source),
    aten.convolution_overrideable.default: aten.convolution,
    aten.convolution_backward_overrideable.default: lambda grad, x, weight, *rest: aten.convolution_backward(
        grad, x, weight, [weight.shape[0]], *rest
    ),
}


def to_host(tensor):
    """A CPU tensor in a device tensor's memory; fails for a CPU tensor."""
    place = tensor.storage_offset(), tensor.size(), tensor.stride()
    return torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage().host, *place)


def to_npu(host, storage=None, tensor=None):
    """A device tensor in a CPU tensor's memory: `tensor` or a new one, in `storage` or a new one."""
    if host.dtype == torch.float64:
        raise TypeError("an NPU has no float64")
    if storage is None:
        memory = host.untyped_storage()
        pointer, device = memory.data_ptr(), torch.device("npu", 0)
        storage = _construct_storage_from_data_pointer(pointer, device, memory.nbytes())
        storage.host = memory  # which keeps it alive
    if tensor is None:
        with torch.inference_mode(False):  # whatever the mode: a view has to be as its base is
            tensor = _acc.create_empty_tensor((0,), host.dtype)
    place = host.storage_offset(), host.size(), host.stride()
    return aten.set_.source_Storage_storage_offset.redispatch(CPU_KEY, tensor, storage, *place)


def run_on_cpu(op, *args, **kwargs):
    """Run an operator on the CPU. A view gets its base's storage; what was changed in place is returned."""
    own, hosts, others = [], [], []

    def there(thing):
        if isinstance(thing, (list, tuple)):
            return [there(each) for each in thing]
        if isinstance(thing, torch.Tensor) and thing.device.type == "npu":
            own.append(thing)
            hosts.append(to_host(thing))
            return hosts[-1]
        if isinstance(thing, torch.Tensor) and thing.ndim:
            others.append(thing)
        return torch.device("cpu") if isinstance(thing, torch.device) else thing

    def back(thing):
        if isinstance(thing, (list, tuple)):
            return type(thing)(back(each) for each in thing)
        if not isinstance(thing, torch.Tensor):
            return thing
        storage = None
        for tensor, host in zip(own, hosts, strict=True):
            if thing is host:  # an empty out= has grown
                return tensor if tensor.shape == host.shape else to_npu(host, tensor=tensor)
            if tensor.untyped_storage().host._cdata == thing.untyped_storage()._cdata:
                storage = tensor.untyped_storage()
        return to_npu(thing, storage)

    there_args, there_kwargs = there(args), {name: there(thing) for name, thing in kwargs.items()}
    if own and others and op is not aten._copy_from.default:
        raise RuntimeError(f"{op}: a tensor on the CPU beside the device's")
    for i, (thing, argument) in enumerate(zip(args, op._schema.arguments, strict=False)):
        if isinstance(thing, (int, float)) and isinstance(argument.type, torch.TensorType):
            there_args[i] = torch.tensor(thing)  # torch made a tensor of it, but passes the number
    found = ON_CPU.get(op, op)(*there_args, **there_kwargs)
    return found if own and kwargs.get("device") == torch.device("cpu") else back(found)


class HCCL(dist.ProcessGroup):
    """gloo in the device tensors' memory."""

    def __init__(self, store, rank, size, timeout):
        super().__init__(rank, size)
        self.gloo = dist.ProcessGroupGloo(store, rank, size, timeout)
        self._register_backend(torch.device("npu"), dist.ProcessGroup.BackendType.CUSTOM, self.gloo)

    def getBackendName(self):
        return "hccl"

    def allreduce(self, tensors, options):
        return self.gloo.allreduce([to_host(tensor) for tensor in tensors], options)

    def allgather(self, outputs, inputs, options):
        outputs = [[to_host(tensor) for tensor in each] for each in outputs]
        return self.gloo.allgather(outputs, [to_host(tensor) for tensor in inputs], options)

    def broadcast(self, tensors, options):
        return self.gloo.broadcast([to_host(tensor) for tensor in tensors], options)


class Event:
    def record(self):
        """Nothing: every operator has finished when it returns."""

    synchronize = record


def attach():
    """Make it this process's accelerator, the only one of its host."""
    global LIBRARIES  # an operator is forgotten with its library
    os.environ["LOCAL_RANK"] = "0"
    _setup_privateuseone_for_python_backend(rename="npu")
    torch.npu.Event, torch.npu.max_memory_allocated = Event, lambda: 0
    torch.npu.get_amp_supported_dtype = lambda: [torch.bfloat16]
    torch.npu.conv, torch.npu.matmul = SimpleNamespace(allow_hf32=True), SimpleNamespace(allow_hf32=False)
    # What would ask for an allocator of the device.
    torch.Tensor.__deepcopy__ = lambda tensor, memo: memo.setdefault(id(tensor), tensor.clone())
    torch.Tensor.pin_memory = lambda tensor, device=None: tensor
    torch.UntypedStorage.cpu = lambda storage: getattr(storage, "host", storage)
    LIBRARIES = torch.library.Library("_", "IMPL"), torch.library.Library("aten", "IMPL")
    LIBRARIES[0].fallback(run_on_cpu, "PrivateUse1")
    for op in (aten._to_copy.default, *list(ON_CPU)[1:]):  # which torch would take to pieces, or refuse
        LIBRARIES[1].impl(op.name(), functools.partial(run_on_cpu, op), "PrivateUse1")
    dist.Backend.register_backend("hccl", HCCL, devices=["npu"])
