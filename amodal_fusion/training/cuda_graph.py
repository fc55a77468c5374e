"""Thousands of small kernels as one CUDA graph: a GPU starts them at once, where a program starts them one by one."""

import torch

from amodal_fusion.errors import UserError, is_out_of_memory

WARM_UP = 3  # calls that are computed as usual before one is recorded: libraries choose their kernels then


class Recorded:
    """`program`, which takes tensors by name, recorded in one of its first calls and replayed from then on.

    Whatever it reads besides must stay where it is in memory; shapes and Python's decisions stay as they were, until
    tensors come by other names: then it is recorded anew. What it returns is overwritten by the next call.

    Raises:
        UserError: from a call, when the program has something that cannot be recorded.
    """

    def __init__(self, program):
        self.program, self.stream = program, torch.cuda.Stream()
        self.names = None

    def __call__(self, **tensors):
        if self.names != set(tensors):
            self.names, self.calls, self.graph = set(tensors), 0, None
        self.calls += 1
        if self.calls <= WARM_UP:
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                results = self.program(**tensors)
            torch.cuda.current_stream().wait_stream(self.stream)
            return results
        if self.graph is None:
            self._record(tensors)
        for name, tensor in tensors.items():
            self.tensors[name].copy_(tensor, non_blocking=True)
        self.graph.replay()
        return self.results

    def _record(self, tensors):
        self.tensors = {name: tensor.clone() for name, tensor in tensors.items()}
        self.graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(self.graph, stream=self.stream, capture_error_mode="thread_local"):
                self.results = self.program(**self.tensors)
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise
            raise UserError(f"a step cannot be recorded as a CUDA graph ({str(error).splitlines()[0]}); training does "
                            "without where --cuda_graph is left out") from None


def is_recorded(config, process):
    """Whether steps are recorded: if `config` says so, on one GPU. Several talk within a step, fp16 decides there."""
    return config.cuda_graph and process.device.type == "cuda" and not process.distributed and config.amp != "fp16"
