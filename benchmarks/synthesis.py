"""Speed of on-the-fly synthesis (scenes per second and core) and statistics of its scenes, against another version.

    git worktree add /tmp/earlier COMMIT
    python -m benchmarks.synthesis --objects CUTOUTS --backgrounds PHOTOS --coco INSTANCES.json --against /tmp/earlier

Both versions compose the same scenes of the same seed in turn, a few dozen at a time, each in its own process. Each
process first composes as many scenes untimed, so the figures are those of a loader in the middle of an epoch.
"""

import argparse
import os
import pickle
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent.parent


def serve(options):
    """Compose the scenes that standard input requests as "first count", with the code that PYTHONPATH points to."""
    import cv2

    from amodal_fusion.synthesis.assets import Material
    from amodal_fusion.synthesis.synthesizer import Synthesizer

    cv2.setNumThreads(0)
    material = Material(options.objects, options.backgrounds, options.coco)
    synthesizer = Synthesizer(material, options.img_size, hole=options.hole, style=options.style, seed=options.seed)
    while request := sys.stdin.buffer.readline():
        first, count = map(int, request.split())
        start = time.process_time()
        scenes = [synthesizer(i) for i in range(first, first + count)]
        seconds = time.process_time() - start
        pickle.dump((seconds, [vars(scene) for scene in scenes]), sys.stdout.buffer)
        sys.stdout.flush()


def ask(child, first, count):
    child.stdin.write(f"{first} {count}\n".encode())
    child.stdin.flush()
    return pickle.load(child.stdout)


def describe(scene):
    """Statistics of one scene (dict of arrays): shares of the picture or the hole, and PSNR in dB."""
    from amodal_fusion.data.scenes import Scene
    from amodal_fusion.data.tensors import to_tensors
    from amodal_fusion.evaluation.metrics import compare_methods
    from amodal_fusion.evaluation.rules import apply_rules, oracle, visible_error
    from amodal_fusion.model.compositing import fill_hole

    scene = Scene(**scene)
    batch = {name: value[None] for name, value in to_tensors(scene, len(scene.completions)).items()}
    batch["fill"] = fill_hole(batch["partial"], batch["mask"])
    alphas = np.stack([c[..., 3] for c in scene.completions])
    cover = (alphas > 127).sum(0)[scene.mask]
    row = {"hole of picture": scene.mask.mean(), "completions": len(alphas), "alpha of picture": (alphas > 127).mean(),
           "soft alpha": ((alphas > 0) & (alphas < 255)).mean(), "hole covered": (cover >= 1).mean(),
           "hole in overlap": (cover >= 2).mean(), "visible error": visible_error(batch).mean().item(),
           "original, mean": scene.original.mean() / 255, "original, deviation": scene.original.std() / 255}
    psnr = compare_methods(batch, {**apply_rules(batch), "oracle": oracle(batch)[0]})
    return row | {name: value.item() for name, value in psnr.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("objects", "backgrounds", "coco"):
        parser.add_argument(f"--{name}")
    parser.add_argument("--against", type=Path, help="root of another checkout")
    parser.add_argument("--img_size", type=int, default=256)
    parser.add_argument("--hole", default="mixed")
    parser.add_argument("--style", default="mixed")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--n_scenes", type=int, default=300)
    parser.add_argument("--at_once", type=int, default=50, help="scenes of one version before the other version runs")
    parser.add_argument("--json", help="file to write the numbers to")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        return serve(options)
    from amodal_fusion.evaluation.markdown import print_table

    versions = {"this": HERE} | ({"earlier": options.against.resolve()} if options.against else {})
    children, seconds, rows = {}, {name: [] for name in versions}, {name: [] for name in versions}
    for name, root in versions.items():
        children[name] = subprocess.Popen([sys.executable, __file__, *sys.argv[1:], "--serve"],
                                          stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                          env={**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"})
        ask(children[name], 10**6, options.n_scenes)
    for first in range(0, options.n_scenes, options.at_once):
        count = min(options.at_once, options.n_scenes - first)
        for name, child in children.items():
            taken, scenes = ask(child, first, count)
            seconds[name].append(taken / count)
            rows[name] += [describe(scene) for scene in scenes]
    for child in children.values():
        child.stdin.close()
    rates = {name: sorted(1 / taken for taken in values) for name, values in seconds.items()}
    table = [{"what": "scenes / s and core", **{name: f"{statistics.median(rate):.1f} ({rate[0]:.1f} – {rate[-1]:.1f})"
                                                for name, rate in rates.items()}}]
    for what in rows["this"][0]:
        table.append({"what": what})
        for name in versions:
            values = np.array([row[what] for row in rows[name]], float)
            values = values[~np.isnan(values)]
            table[-1][name] = f"{values.mean():.3g} ± {values.std() / np.sqrt(len(values)):.2g}"
    print(f"{options.n_scenes} scenes of {options.img_size}², style {options.style}; ± standard error of the mean")
    print_table(table, {"what": "what", **{name: name for name in versions}}, options.json)


if __name__ == "__main__":
    main()
