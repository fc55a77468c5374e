"""Upper bound of the speed on a GPU, computed without one: operations, memory traffic and kernels per scene.

    python -m benchmarks.roofline --size 256 --slots 5 --batch 32 --tflops 989 --bandwidth 4800 --json roofline.json

No values are computed: PyTorch's fake tensors have only shapes. Traffic assumes that every kernel reads its inputs from
memory and writes its outputs back, without fusion or caches. The bound is the larger of the times that arithmetic and
traffic need at the given peak rates (default: NVIDIA's numbers for an H200, dense bf16 TFLOP/s and GB/s).
"""

import argparse

import torch
import torchvision
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from amodal_fusion.evaluation.markdown import print_table
from amodal_fusion_transformer import AmodalFusionTransformer
from benchmarks.measure import random_scenes


class Count(TorchDispatchMode):
    """Counts kernels, their operations, and the bytes of their inputs and outputs. Views are free."""

    def __init__(self):
        super().__init__()
        self.kernels = self.flop = self.bytes = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = operation(*args, **kwargs)
        tensors = [x for x in tree_leaves((args, kwargs, result)) if isinstance(x, torch.Tensor)]
        if not operation.is_view and len(tensors) > 1:
            self.kernels += 1
            self.bytes += sum(x.numel() * x.element_size() for x in tensors)
        if operation.overloadpacket in flop_registry:
            self.flop += flop_registry[operation.overloadpacket](*args, **kwargs, out_val=result)
        return result


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--slots", type=int, default=5)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--tflops", type=float, default=989)
    parser.add_argument("--bandwidth", type=float, default=4800, help="GB/s")
    parser.add_argument("--json", help="file to write the numbers to")
    options = parser.parse_args()
    model = AmodalFusionTransformer()
    backbone = torchvision.models.vgg16(weights=None).features.requires_grad_(False)
    with FakeTensorMode(allow_non_fake_inputs=True):
        batch = random_scenes(options.batch, options.slots, options.size)

    def fuse():
        return model(batch["partial"], batch["mask"], batch["completions"])["fused"]

    def inference():
        with torch.no_grad():
            fuse()

    def training():
        torch.autograd.grad(fuse().sum(), list(model.parameters()), allow_unused=True)

    def lpips():  # the fused image with its gradient, the original without
        image = batch["original"].clone().requires_grad_()
        torch.autograd.grad(backbone(image).sum(), image)
        with torch.no_grad():
            backbone(batch["original"])

    rows = []
    for name, program in (("inference", inference), ("forward and backward", training), ("… of LPIPS-VGG", lpips)):
        with FakeTensorMode(allow_non_fake_inputs=True), torch.autocast("cpu", torch.bfloat16), Count() as counted:
            program()
        gflop, gigabytes = counted.flop / options.batch / 1e9, counted.bytes / options.batch / 1e9
        arithmetic, traffic = gflop / options.tflops / 1e3, gigabytes / options.bandwidth  # seconds
        rows.append({"what": name, "gflop": f"{gflop:.1f}", "gb": f"{gigabytes:.2f}", "kernels": counted.kernels,
                     "bound": f"{1 / max(arithmetic, traffic):.0f}",
                     "by": "traffic" if traffic > arithmetic else "arithmetic"})
    print_table(rows, {"what": f"{options.size}², N = {options.slots}", "gflop": "GFLOP a scene", "gb": "GB a scene",
                       "kernels": f"kernels a batch of {options.batch}", "bound": "scenes / s at most",
                       "by": "bound by"}, options.json)


if __name__ == "__main__":
    main()
