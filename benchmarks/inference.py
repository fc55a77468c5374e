"""Seconds and peak memory of the network per scene, compared with the plain design.

    python -m benchmarks.inference --sizes 128 256 512 1024 2048 --slots 2 5 10 --json inference.json

Both run in turn in one process. Peak memory is measured in a process that does one forward pass and nothing else; it
includes interpreter, libraries and inputs. Above --plain_limit pixels a side, the plain design is not measured.
"""

import argparse
import math

import torch

from amodal_fusion.data.tensors import INPUTS
from amodal_fusion.evaluation.markdown import print_table
from amodal_fusion.training.cuda_graph import WARM_UP, CudaGraph
from amodal_fusion_transformer import AmodalFusionTransformer
from benchmarks.measure import alone, alternate, random_scenes, spread
from experiments.plain_design import PlainDesign


def build(name, slots):
    torch.manual_seed(0)
    return (AmodalFusionTransformer() if name == "ours" else PlainDesign(slots)).eval()


def random_inputs(count, slots, size, device="cpu"):
    """partial, mask and completions of random scenes. The original is dropped, so that it does not count as memory."""
    batch = random_scenes(count, slots, size, device)
    return [batch[name] for name in ("partial", "mask", "completions")]


def one_forward(name, slots, size, threads):
    torch.set_num_threads(threads)
    model, inputs = build(name, slots), random_inputs(1, slots, size)
    with torch.no_grad():
        model(*inputs)


def programs(slots, size, device, plain, amp, count):
    """name → function that fuses `count` scenes."""
    inputs = random_inputs(count, slots, size, device)

    def program(model, half):
        def forward():
            with torch.no_grad(), torch.autocast(device, torch.bfloat16, enabled=half):
                model(*inputs)
        return forward

    ours = build("ours", slots).to(device)
    made = {"ours": program(ours, False)}
    if plain:
        made["plain"] = program(build("plain", slots).to(device), False)
    if amp:
        made["ours bf16"] = program(ours, True)
    if device == "cuda":
        made["ours recorded"] = recorded(ours, inputs)
        made["ours bf16 compiled"] = program(torch.compile(build("ours", slots).to(device)), True)
    return made


def recorded(model, inputs):
    """A forward pass as a CUDA graph, in fp32, after its recording."""
    graph = CudaGraph(lambda **tensors: {"fused": model(**tensors)["fused"]})

    def forward():
        with torch.no_grad():
            graph(**dict(zip(INPUTS, inputs)))

    for _ in range(WARM_UP + 1):
        forward()
    return forward


def exponent(points):
    """Slope of a straight line through (log x, log y)."""
    xs, ys = ([math.log(value) for value in column] for column in zip(*points))
    mean_x, mean_y = sum(xs) / len(xs), sum(ys) / len(ys)
    return sum((x - mean_x) * (y - mean_y) for x, y in zip(xs, ys)) / sum((x - mean_x) ** 2 for x in xs)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[128, 256, 512])
    parser.add_argument("--slots", type=int, nargs="+", default=[2, 5, 10])
    parser.add_argument("--plain_limit", type=int, default=512, help="largest side for the plain design, pixels")
    parser.add_argument("--batch", type=int, default=1, help="scenes per forward pass")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--bf16", action=argparse.BooleanOptionalAction, default=True, help="also time bf16, at N = 5")
    parser.add_argument("--memory", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--json", help="file to write the numbers to")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows = []
    for size in options.sizes:
        for slots in options.slots:
            plain = size <= options.plain_limit and slots == 5
            made = programs(slots, size, device, plain, options.bf16 and slots == 5, options.batch)
            seconds = alternate(made, options.runs)
            row = {"size": size, "slots": slots, "seconds": {name: value[0] for name, value in seconds.items()}}
            row |= {name: spread([value / options.batch for value in times]) for name, times in seconds.items()}
            if plain:
                row["ratio"] = f"{seconds['plain'][0] / seconds['ours'][0]:.1f}"
            if options.memory and device == "cpu":
                result, peak = alone(one_forward, "ours", slots, size, torch.get_num_threads())
                row["memory"] = str(result)[:40] if isinstance(result, Exception) else f"{peak:.2f}"
            rows.append(row)
            print(f"{size}² N={slots}: {row}", flush=True)
    print()
    print_table(rows, {"size": "side", "slots": "N", "ours": "ours", "plain": "plain design", "ratio": "plain / ours",
                       "ours bf16": "ours, bf16", "ours recorded": "recorded",
                       "ours bf16 compiled": "compiled", "memory": "peak GiB"}, options.json)
    by = {(row["size"], row["slots"]): row["seconds"]["ours"] for row in rows}
    for slots in options.slots:
        points = [(size**2, by[size, slots]) for size in options.sizes]
        if len(points) > 1:
            print(f"\nseconds ∝ pixels^{exponent(points):.2f} at N = {slots}", end="")
    for size in options.sizes:
        points = [(slots + 1, by[size, slots]) for slots in options.slots]  # the fill is a candidate, too
        if len(points) > 1:
            print(f"\nseconds ∝ (N + 1)^{exponent(points):.2f} at {size}²", end="")
    print()


if __name__ == "__main__":
    main()
