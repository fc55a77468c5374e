"""The network as an ONNX file, for programs without PyTorch."""

import contextlib
import warnings
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from amodal_fusion.errors import UserError
from amodal_fusion.files import atomic_file
from amodal_fusion.model import compositing, layers

INPUTS = ("partial", "mask", "completions")
OUTPUTS = ("weights", "residual", "fused", "logits")
MOST_TOKENS, MOST_COMPLETIONS = 256, 256  # limits declared in the file; tokens per side of the picture, 16 pixels each
LEVELS = 13  # of push-pull, for sides up to 8192


class _Network(nn.Module):
    """The network with a tuple of outputs, since ONNX has no dict."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, partial, mask, completions):
        out = self.model(partial, mask, completions)
        return tuple(out[name] for name in OUTPUTS)


def sum_of_neighbours(x):
    """As `compositing.sum_of_neighbours`, as a convolution: its slices take minutes to export for any size."""
    cross = torch.tensor([[0.0, 1, 0], [1, 0, 1], [0, 1, 0]]).expand(x.shape[1], 1, 3, 3)
    return F.conv2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), cross, groups=x.shape[1])


@contextlib.contextmanager
def any_size():
    """In this context the network is traced for pictures of any size, not only the example's."""
    with (
        # Additional levels are single pixels and change nothing.
        mock.patch.object(compositing, "level_count", lambda *_: LEVELS),
        mock.patch.object(compositing, "sum_of_neighbours", sum_of_neighbours),
        # Python's min would compare symbolic sides and keep the result.
        mock.patch.object(layers, "min", torch.sym_min, create=True),
        mock.patch.object(layers, "max", lambda sides: torch.sym_max(*sides), create=True),
    ):
        yield


def export_onnx(model, path):
    """Write the network for one scene (B = 1) of any size with any number of completions.

    Inputs and outputs are named and shaped as in the network's forward; height and width are multiples of 16.

    Args:
        model: the network, in eval mode on the CPU.

    Returns:
        a line with the largest difference between onnxruntime and PyTorch for a scene of another size.

    Raises:
        UserError: the packages onnx and onnxscript are missing, or the difference is not small.
    """
    try:
        import onnx
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise UserError(f"an ONNX file needs the package {error.name}: pip install onnx onnxscript",
                        "export_onnx") from None
    height, width = (16 * torch.export.Dim(name, min=2, max=MOST_TOKENS) for name in ("h", "w"))
    count = torch.export.Dim("n", min=1, max=MOST_COMPLETIONS)
    with torch.no_grad(), any_size(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # warnings about names of axes
        # all sizes of the example, and their halves, differ and are not 1, so that no size in the graph is fixed
        program = torch.onnx.export(
            _Network(model).eval(), random_scene((560, 528), 3), dynamo=True, verbose=False,
            dynamic_shapes=({2: height, 3: width}, {2: height, 3: width}, {1: count, 3: height, 4: width}),
            input_names=INPUTS, output_names=OUTPUTS)
    network = program.model_proto
    check_sides(network)
    with atomic_file(path) as temporary:
        onnx.save(network, temporary)
        difference = compare(model, temporary, (96, 320), 4)
        if difference is not None and not difference < 1e-3:
            raise UserError(f"{path}: not written, onnxruntime's result differs by {difference:.2g} from PyTorch's; "
                            "export with another version of torch")
    if difference is None:
        return f"{path}: written, but not compared: onnxruntime is not installed"
    return f"{path}: onnxruntime's result differs by {difference:.1g} at most"


PAD_FIRST = "height_and_width_must_be_multiples_of_16__pad_the_pictures"


def check_sides(network):
    """Let an ONNX model (changed in place) fail with a clear message unless 16 divides both sides.

    ONNX has no assertion. So a node looks up entry (side modulo 16) of a list with one entry, a zero; runtimes show the
    node's name when it fails. The zero is added to every input, so that the node runs first.
    """
    from onnx import helper, numpy_helper

    graph, inputs = network.graph, [value.name for value in network.graph.input]
    for node in graph.node:
        node.input[:] = [f"sides/{name}" if name in inputs else name for name in node.input]
    nodes = [
        helper.make_node("Shape", ["mask"], ["sides/size"], "sides/shape", start=2),
        helper.make_node("Mod", ["sides/size", "sides/stride"], ["sides/rest"], "sides/mod"),
        helper.make_node("Gather", ["sides/entries", "sides/rest"], ["sides/zeros"], PAD_FIRST),
        helper.make_node("ReduceSum", ["sides/zeros"], ["sides/zero"], "sides/sum", keepdims=0),
        *(helper.make_node("Add", [name, "sides/zero"], [f"sides/{name}"], f"sides/{name}") for name in inputs),
    ]
    graph.initializer.extend([numpy_helper.from_array(np.array([16]), "sides/stride"),
                              numpy_helper.from_array(np.zeros(1, np.float32), "sides/entries")])
    nodes += graph.node
    del graph.node[:]
    graph.node.extend(nodes)


def random_scene(size, completions, seed=0):
    """partial (1,3,H,W), mask (1,1,H,W), completions (1,N,4,H,W) of noise, with a hole."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.zeros(1, 1, *size)
    mask[..., size[0] // 4 : size[0] // 2, size[1] // 4 : size[1] // 2] = 1
    partial = torch.rand(1, 3, *size, generator=generator) * (1 - mask)
    return partial, mask, torch.rand(1, completions, 4, *size, generator=generator)


def compare(model, path, size, completions):
    """Largest difference between the file in onnxruntime and the network, for a random scene.

    Returns:
        a float, nan if either has nan; None without onnxruntime.
    """
    try:
        import onnxruntime
    except ImportError:
        return None
    inputs = random_scene(size, completions)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    theirs = session.run(OUTPUTS, {name: value.numpy() for name, value in zip(INPUTS, inputs)})
    with torch.no_grad():
        ours = model(*inputs)
    differences = [(ours[name] - torch.from_numpy(value)).abs().max() for name, value in zip(OUTPUTS, theirs)]
    return torch.stack(differences).max().item()
