"""What both stages' training steps are made of: passes forward and backward, and the gradients they add up.

    gradients = Gradients(rt, model.parameters())
    graphs = Graphs(rt, enabled)
    for i in range(accumulation):  # a step
        terms = graphs.run(work, gradients, i == 0, *tensors)  # work(*tensors): forward and backward
    gradients.exchange()  # between processes, once
    optimizer.step()

A step of several processes is the step of one that runs all their micro-batches."""

import collections

import torch
import torch.distributed as dist


class Gradients:
    """The gradients of some parameters: cleared, added up by backward passes, exchanged between processes.

    Of one process alone they are autograd's own. Otherwise they are views of one buffer, which one all-reduce sums over
    processes; so a loss has to be divided by the number of all processes' micro-batches. The exchange comes after the
    last backward pass: beside it, it would slow the matrix products down by what it saves."""

    def __init__(self, rt, parameters):
        self.parameters, self.buffer = list(parameters), None
        if rt.world > 1:
            self.buffer = torch.zeros(sum(p.numel() for p in self.parameters), device=rt.device)
            parts = self.buffer.split([p.numel() for p in self.parameters])
            for parameter, part in zip(self.parameters, parts, strict=True):
                # In the order in which the parameter lies in memory, as a fused optimizer reads both.
                parameter.grad = part.as_strided(parameter.shape, parameter.stride(), part.storage_offset())

    def clear(self):
        """Call before the first backward pass of a step."""
        if self.buffer is not None:
            self.buffer.zero_()
        else:
            for parameter in self.parameters:
                parameter.grad = None

    def exchange(self):
        """Call after the last one: the sum over processes."""
        if self.buffer is not None:
            dist.all_reduce(self.buffer)


class Graphs:
    """Runs passes of a training step; where `enabled`, on a GPU, as CUDA graphs: a pass's thousands of kernels are
    recorded once and then launched together, since one by one a host launches them more slowly than a GPU runs them.

    A pass is a function work(*tensors) -> dict of tensors that adds to gradients. Its shapes and branches must be the
    same in every step; it must not wait for the device nor talk to other processes, and what else it changes (running
    means) must stay where it is in memory. Kernels, their order, and what they draw from torch's generator are the same
    with a graph as without."""

    WARM_UP = 3  # steps that run as they are: kernels are compiled and convolution algorithms chosen

    def __init__(self, rt, enabled):
        self.enabled = enabled and rt.device.type == "cuda"
        self.steps = collections.Counter()  # begun, by (work, gradients)
        self.forget()

    def forget(self):
        """Drop the graphs and the gradients until the next step, so that others can have the memory that passes work
        in. (The buffer of exchanged gradients stays.)"""
        self.kept = {}
        for _, gradients in self.steps:
            gradients.clear()
        self.pool = torch.cuda.graph_pool_handle() if self.enabled else None

    def run(self, work, gradients, first, *tensors):
        """work(*tensors), run or replayed; the tensors returned are the caller's. first: it is the first pass of its
        kind in this step, and `gradients` are cleared for it."""
        self.steps[work, gradients] += first
        if not self.enabled or self.steps[work, gradients] <= self.WARM_UP:
            return self._run(work, gradients, first, tensors)
        if (work, first) not in self.kept:
            self.kept[work, first] = self._record(work, gradients, first, tensors)
        graph, inputs, outputs = self.kept[work, first]
        for own, given in zip(inputs, tensors, strict=True):
            own.copy_(given)
        graph.replay()
        return {name: value.clone() for name, value in outputs.items()}

    def _run(self, work, gradients, first, tensors):
        if first:
            gradients.clear()
        return work(*tensors)

    def _record(self, work, gradients, first, tensors):
        inputs, graph = [tensor.clone() for tensor in tensors], torch.cuda.CUDAGraph()
        if first:
            gradients.clear()  # before the graph's own clearing, so that it can have their memory
        # All share one pool of memory: they are replayed in the order in which they are recorded. "thread_local": other
        # threads (the loader's, NCCL's) may meanwhile call what would spoil a recording of their own.
        with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
            outputs = self._run(work, gradients, first, inputs)
        return graph, inputs, outputs
