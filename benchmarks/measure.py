"""What the benchmarks share: alternating runs, medians with spread, peak memory, tables."""

import json
import multiprocessing
import platform
import statistics
import time
from pathlib import Path

import torch

from amodal_fusion.evaluation.metrics import gap_closed
from amodal_fusion.evaluation.rules import RULES


def alternate(programs, runs):
    """Time programs in turn, so that all see the same moods of the machine.

    Args:
        programs: name → function without arguments, called once before the clock starts.

    Returns:
        name → (median, smallest, largest) seconds.
    """
    seconds = {name: [] for name in programs}
    for run in range(runs + 1):
        for name, program in programs.items():
            synchronize()
            start = time.perf_counter()
            program()
            synchronize()
            if run:
                seconds[name].append(time.perf_counter() - start)
    return {name: (statistics.median(values), min(values), max(values)) for name, values in seconds.items()}


def synchronize():
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _child(function, arguments, pipe):
    try:
        result = function(*arguments)
    except (RuntimeError, MemoryError) as error:  # out of memory is a result, too
        result = error
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    peak = next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM"))
    pipe.send((result, int(peak) / 2**20))  # given in KiB


def alone(function, *arguments):
    """Run a module's function in a process of its own; returns its result and the process's peak memory in GiB."""
    here, there = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=_child, args=(function, arguments, there))
    process.start()
    there.close()
    try:
        return here.recv()
    except EOFError:
        return MemoryError("killed"), float("nan")
    finally:
        process.join()


def machine():
    """One line about where the figures come from."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        name = next((line.split(":")[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line),
                    name)
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return f"{name}, {torch.get_num_threads()} threads{gpu}, torch {torch.__version__}"


def report(rows, columns, json_path=None):
    """Print rows (dicts) as a Markdown table of `columns` (key → title), and write them as JSON."""
    print(f"{machine()}\n\n| {' | '.join(columns.values())} |\n|{'---|' * len(columns)}")
    for row in rows:
        print("| " + " | ".join(str(row.get(key, "")) for key in columns) + " |")
    if json_path:
        Path(json_path).write_text(json.dumps({"machine": machine(), "rows": rows}, indent=1), encoding="utf-8")


def report_gaps(figures, title, json_path=None):
    """Report mean PSNR and how much of the gap between the best simple rule and the oracle it closes.

    Args:
        figures: method → (scenes, 2), PSNR in hole and overlap; RULES, which get no line, and "oracle" among them.
        title: of the methods' column; json_path as in `report`.
    """
    means = {name: rows.nanmean(0).tolist() for name, rows in figures.items()}
    best = [max(means[rule][i] for rule in RULES) for i in (0, 1)]
    rows = []
    for name, mean in means.items():
        if name not in RULES:
            gaps = [gap_closed(mean[i], best[i], means["oracle"][i]) for i in (0, 1)]
            rows.append({"method": name, "psnr": f"{mean[0]:.2f} / {mean[1]:.2f}",
                         "gap": f"{gaps[0]:.2f} / {gaps[1]:.2f}", "means": mean})
    report(rows, {"method": title, "psnr": "PSNR, hole / overlap", "gap": "gap closed"}, json_path)


def spread(seconds):
    """'median (smallest – largest)' in ms or s."""
    scale, unit = (1000, "ms") if seconds[0] < 1 else (1, "s")
    return f"{seconds[0] * scale:.3g} {unit} ({seconds[1] * scale:.3g} – {seconds[2] * scale:.3g})"


def random_scenes(count, slots, size, device="cpu"):
    """A batch of noise in the shapes of the network's inputs: partial, mask, completions, valid, original."""
    generator = torch.Generator().manual_seed(0)
    mask = torch.zeros(count, 1, size, size)
    mask[:, :, size // 4 : 3 * size // 4, size // 4 : 3 * size // 4] = 1
    original = torch.rand((count, 3, size, size), generator=generator)
    completions = torch.rand((count, slots, 4, size, size), generator=generator)
    completions[:, :, 3] = (completions[:, :, 3] > 0.5).float()
    batch = {"partial": original * (1 - mask), "mask": mask, "completions": completions,
             "valid": torch.ones(count, slots, dtype=torch.bool), "original": original}
    return {name: value.to(device) for name, value in batch.items()}
