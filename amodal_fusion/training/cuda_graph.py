"""Training steps and forward passes as CUDA graphs: the GPU starts thousands of kernels at once, not one by one."""

import torch

from amodal_fusion.errors import UserError, is_out_of_memory

WARM_UP = 3  # calls before the capture, in which libraries choose kernels


def uses_cuda_graphs(config, process):
    """Whether steps run as CUDA graphs: if `config.cuda_graph` is set, on one GPU, without fp16.

    A graph cannot contain communication between processes, nor the decisions of fp16 loss scaling.
    """
    return config.cuda_graph and process.device.type == "cuda" and not process.distributed and config.amp != "fp16"


def use_cuda_graphs(step):
    """Replace the backward pass and the optimizer step of a `TrainStep` by CUDA graphs."""
    make_capturable(step.run.optimizer, step.run.process.device)
    step.backward = CudaGraph(step.backward)
    step.run.optimizer.step = CudaGraph(step.run.optimizer.step)


def make_capturable(optimizer, device):
    """Move an optimizer's learning rates and step counts to the GPU."""
    for group in optimizer.param_groups:
        group |= {"lr": torch.tensor(float(group["lr"]), device=device), "capturable": True}
    for state in optimizer.state.values():
        state["step"] = state["step"].to(device)


class CudaGraph:
    """A function as a CUDA graph, captured once and then replayed.

    `function` takes tensors by name and returns a dict of tensors or None. Other memory that it reads must stay in
    place. Shapes and Python branches stay as captured. Other names of tensors start a new capture.

    Raises:
        UserError: in a call, if the function cannot be captured.
    """

    def __init__(self, function):
        self.function, self.stream = function, torch.cuda.Stream()
        self.names = None

    def __call__(self, **tensors):
        if self.names != set(tensors):
            self.names, self.calls, self.graph = set(tensors), 0, None
        self.calls += 1
        if self.calls <= WARM_UP:
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                results = self.function(**tensors)
            torch.cuda.current_stream().wait_stream(self.stream)
            return results
        if self.graph is None:
            self._capture(tensors)
        for name, tensor in tensors.items():
            self.tensors[name].copy_(tensor, non_blocking=True)
        self.graph.replay()
        # the next replay overwrites the results
        return self.results and {name: result.clone() for name, result in self.results.items()}

    def _capture(self, tensors):
        self.tensors = {name: tensor.clone() for name, tensor in tensors.items()}
        self.graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(self.graph, stream=self.stream, capture_error_mode="thread_local"):
                self.results = self.function(**self.tensors)
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise
            raise UserError(f"this cannot be captured as a CUDA graph ({str(error).splitlines()[0]}); do without it",
                            "cuda_graph") from None
