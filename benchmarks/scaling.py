"""Throughput of training with 1, 2, … processes on this machine (gloo on CPUs, NCCL on GPUs).

    python -m benchmarks.scaling --processes 1 2 --steps 30 --json scaling.json

Runs the training script under torchrun on drawn scenes and reads scenes per second from its log. The first third of the
steps is start-up and does not count. Each process has one thread, so two processes have twice the cores of one.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from amodal_fusion.data.toy import write_dataset
from amodal_fusion.evaluation.markdown import print_table

SCRIPT = Path(__file__).parent.parent / "amodal_fusion_transformer.py"


def throughput(data, folder, processes, options):
    """Scenes per second of all processes together."""
    gpus = processes if torch.cuda.is_available() else 0
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", processes, SCRIPT,
               "--data_dir", data, "--checkpoint_dir", folder, "--gpus", gpus, "--img_size", options.img_size,
               "--batch_size", options.batch, "--lpips_weight", 0, "--workers", 0, "--epochs", 1000, "--max_steps",
               options.steps, "--log_every", 1]
    subprocess.run(list(map(str, command)), check=True, capture_output=True,
                   env={**os.environ, "OMP_NUM_THREADS": "1"})
    lines = map(json.loads, (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    rates = [line["scenes_per_second"] for line in lines if line["kind"] == "train"]
    return statistics.median(rates[len(rates) // 3 :])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--batch", type=int, default=4, help="scenes per process and step")
    parser.add_argument("--img_size", type=int, default=128)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--json", help="file to write the numbers to")
    options = parser.parse_args()
    rates = {count: [] for count in options.processes}
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        data = write_dataset(root / "data", train=64 * max(options.processes), val=2, size=options.img_size)
        for run in range(options.runs):
            for count in options.processes:
                rates[count].append(throughput(data, root / f"run_{run}_{count}", count, options))
    one = statistics.median(rates[options.processes[0]]) / options.processes[0]
    rows = [{"processes": count, "rate": f"{statistics.median(values):.2f} ({min(values):.2f} – {max(values):.2f})",
             "efficiency": f"{statistics.median(values) / count / one:.0%}", "rates": values}
            for count, values in rates.items()]
    print_table(rows, {"processes": "processes", "rate": "scenes / s", "efficiency": "efficiency"}, options.json)


if __name__ == "__main__":
    main()
