"""Markdown tables that benchmarks and experiments print, with a line about the machine."""

import json
import platform
from pathlib import Path

import torch

from amodal_fusion.evaluation.metrics import gap_closed
from amodal_fusion.evaluation.rules import RULES


def machine():
    """One line: processor, threads, GPU, version of PyTorch."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        name = next((line.split(":")[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line),
                    name)
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return f"{name}, {torch.get_num_threads()} threads{gpu}, torch {torch.__version__}"


def print_table(rows, columns, json_path=None):
    """Print a Markdown table, and write all numbers as JSON if `json_path` is given.

    Args:
        rows: list of dicts. columns: key of the dicts → title of the column.
    """
    print(f"{machine()}\n\n| {' | '.join(columns.values())} |\n|{'---|' * len(columns)}")
    for row in rows:
        print("| " + " | ".join(str(row.get(key, "")) for key in columns) + " |")
    if json_path:
        Path(json_path).write_text(json.dumps({"machine": machine(), "rows": rows}, indent=1), encoding="utf-8")


def print_gaps(figures, title, json_path=None):
    """Print mean PSNR, and the share of the gap between the best simple rule and the oracle that each method closes.

    Args:
        figures: method → (scenes, 2), PSNR in hole and overlap. "oracle" and all RULES must be among the methods; rules
            get no row.
        title: of the column of methods. json_path: as in `print_table`.
    """
    means = {name: rows.nanmean(0).tolist() for name, rows in figures.items()}
    best = [max(means[rule][i] for rule in RULES) for i in (0, 1)]
    rows = []
    for name, mean in means.items():
        if name not in RULES:
            gaps = [gap_closed(mean[i], best[i], means["oracle"][i]) for i in (0, 1)]
            rows.append({"method": name, "psnr": f"{mean[0]:.2f} / {mean[1]:.2f}",
                         "gap": f"{gaps[0]:.2f} / {gaps[1]:.2f}", "means": mean})
    print_table(rows, {"method": title, "psnr": "PSNR, hole / overlap", "gap": "gap closed"}, json_path)
