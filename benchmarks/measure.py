"""Shared by the benchmarks: alternating runs, medians with their range, peak memory, random scenes."""

import multiprocessing
import statistics
import time
from pathlib import Path

import torch


def alternate(programs, runs, clock=time.perf_counter):
    """Time programs in turn, so that a slow phase of the machine affects all of them.

    Args:
        programs: name → function without arguments, called once before timing starts.
        clock: seconds now; time.process_time counts only this process's.

    Returns:
        name → (median, smallest, largest) seconds.
    """
    seconds = {name: [] for name in programs}
    for run in range(runs + 1):
        for name, program in programs.items():
            synchronize()
            start = clock()
            program()
            synchronize()
            if run:
                seconds[name].append(clock() - start)
    return {name: (statistics.median(values), min(values), max(values)) for name, values in seconds.items()}


def synchronize():
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _child(function, arguments, pipe):
    try:
        result = function(*arguments)
    except (RuntimeError, MemoryError) as error:  # running out of memory is a result, too
        result = error
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    peak = next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM"))
    pipe.send((result, int(peak) / 2**20))  # the kernel reports KiB


def alone(function, *arguments):
    """Run a module's function in a new process. Returns its result and the peak memory of the process in GiB."""
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


def spread(seconds):
    """'median (smallest – largest)' in ms or s."""
    scale, unit = (1000, "ms") if seconds[0] < 1 else (1, "s")
    return f"{seconds[0] * scale:.3g} {unit} ({seconds[1] * scale:.3g} – {seconds[2] * scale:.3g})"


def random_scenes(count, slots, size, device="cpu"):
    """A batch of noise with the shapes of the network's inputs: partial, mask, completions, valid, original."""
    generator = torch.Generator().manual_seed(0)
    mask = torch.zeros(count, 1, size, size)
    mask[:, :, size // 4 : 3 * size // 4, size // 4 : 3 * size // 4] = 1
    original = torch.rand((count, 3, size, size), generator=generator)
    completions = torch.rand((count, slots, 4, size, size), generator=generator)
    completions[:, :, 3] = (completions[:, :, 3] > 0.5).float()
    batch = {"partial": original * (1 - mask), "mask": mask, "completions": completions,
             "valid": torch.ones(count, slots, dtype=torch.bool), "original": original}
    return {name: value.to(device) for name, value in batch.items()}
