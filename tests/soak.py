"""Watch memory and open files of a long inference and a long training run.

    python -m tests.soak --scenes 2000 --steps 300

Prints, for the script's own process and for its helpers together, resident memory and open files at a quarter of the
run and at its end, and the slope of a line through what lies between.
"""

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np

from amodal_fusion.data.scenes import write_scene
from amodal_fusion.data.toy import draw_scene
from tests.conftest import SMALL
from tests.scripts import Running

TRAIN, FUSE = "amodal_fusion_transformer.py", "amodal_fusion_transformer_inference.py"


def usage(pid):
    """(MB resident, open files) of a process; zeros when it is gone."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
        pages = next(line for line in status.splitlines() if line.startswith("VmRSS"))
        return np.array([int(pages.split()[1]) / 1024, len(list(Path(f"/proc/{pid}/fd").iterdir()))])
    except (OSError, StopIteration):
        return np.zeros(2)


def watch(title, unit, progress, *arguments):
    """Run a script; `progress` tells how many units are done. Prints one line of the table per kind of process."""
    running, samples = Running(*arguments), []
    while running.process.is_alive():
        children = Path(f"/proc/{running.pid}/task/{running.pid}/children")
        try:
            helpers = sum((usage(child) for child in children.read_text().split()), np.zeros(2))
        except OSError:
            break
        samples.append((progress(), *usage(running.pid), *helpers))
        time.sleep(0.2)
    process = running.finish(3600)
    assert process.returncode == 0, process.stderr
    samples = np.array([sample for sample in samples if sample[1] > 0])
    late = samples[samples[:, 0] >= 0.25 * samples[-1, 0]][:-2]  # start-up and the end are not the run
    for name, memory, files in (("itself", 1, 2), ("helpers", 3, 4)):
        cells = []
        for column in (memory, files):
            slope = np.polyfit(late[:, 0], late[:, column], 1)[0]
            cells.append(f"{late[0, column]:.0f} → {late[-1, column]:.0f} | {100 * slope:+.2f}")
        print(f"| {title}, {samples[-1, 0]:.0f} {unit} | {name} | {' | '.join(cells)} |", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenes", type=int, default=2000)
    parser.add_argument("--steps", type=int, default=300)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        data, output, run = (Path(temporary) / name for name in ("data", "out", "run"))
        for seed in range(options.scenes):
            (data / f"scene_{seed:05d}").mkdir(parents=True)
            write_scene(data / f"scene_{seed:05d}", draw_scene(seed))
        ids = [f"scene_{seed:05d}" for seed in range(min(options.scenes, 208))]
        (data / "train_list.txt").write_text("\n".join(ids[8:]))
        (data / "val_list.txt").write_text("\n".join(ids[:8]))
        common = ("--data_dir", data, "--checkpoint_dir", run, *SMALL, "--lpips_weight", 0, "--workers", 2)
        print("| run | process | resident MB, quarter → end | per 100 | open files, quarter → end | per 100 |")
        print("|---|---|---|---|---|---|")

        def steps():
            log = run / "metrics.jsonl"
            return log.read_text().count('"train"') if log.exists() else 0

        epochs = -(-options.steps // 50)  # 200 scenes, 4 a step
        watch("training", "steps", steps, TRAIN, *common, "--epochs", epochs, "--max_steps", options.steps,
              "--save_every", 10)
        watch("inference", "scenes", lambda: len(list(output.glob("*/fused.png"))), FUSE, "--data_dir", data,
              "--output_dir", output, "--checkpoint", run / "last.pth", "--workers", 2, "--no-metrics")


if __name__ == "__main__":
    main()
