"""Milliseconds that `create` needs per completion, compared with another checkout of this repository.

    git worktree add /tmp/before COMMIT
    python -m benchmarks.create --baseline /tmp/before

Both process the same raw scenes in turn, each run in a new process with one thread. Times are processor time. The ratio
is the median over pairs of consecutive runs.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import cv2
import numpy as np

from amodal_fusion.data.images import write_image
from amodal_fusion.data.toy import draw_scene
from amodal_fusion.evaluation.markdown import machine

ROOT = Path(__file__).parent.parent
RUN = """
import json, sys, time
sys.path.insert(0, sys.argv[1])
import cv2
cv2.setNumThreads(0)
try:
    from amodal_fusion.ingest.create import create_scene, find_raw_scenes
    from amodal_fusion.prepare import CreateConfig
except ImportError:  # an older checkout
    from prepare_dataset import CreateConfig, create_scene, find_raw_scenes
scenes, _ = find_raw_scenes(sys.argv[2])
config = CreateConfig(input_dir=sys.argv[2], output_dir=sys.argv[3])
create_scene(scenes[0], config)
start = time.process_time()
for raw in scenes[1:]:
    create_scene(raw, config)
print(json.dumps((time.process_time() - start) / sum(len(raw.completions) for raw in scenes[1:])))
"""


def write_results(folder, scenes, objects, size, with_alpha):
    """Raw results of a completion pipeline: on near-white backgrounds or RGBA, with many duplicates."""
    rng = np.random.default_rng(0)
    for seed in range(scenes):
        scene, at = draw_scene(seed, size, objects), folder / f"{seed:03d}"
        at.mkdir(parents=True)
        write_image(at / "original.png", scene.original)
        write_image(at / "partial.png", scene.partial)
        write_image(at / "mask.png", np.where(scene.mask, 0, 255).astype(np.uint8))
        for number, completion in enumerate(scene.completions * 3, 1):
            picture = completion
            if not with_alpha:
                alpha = cv2.GaussianBlur(completion[..., 3], (0, 0), 0.7)[..., None] / 255.0
                noise = rng.normal(0, 2, completion.shape[:2])[..., None]
                picture = np.clip(completion[..., :3] * alpha + 250 * (1 - alpha) + noise, 0, 255).astype(np.uint8)
            write_image(at / f"comp{number}.png", picture)


def seconds(checkout, results):
    with tempfile.TemporaryDirectory() as output:
        process = subprocess.run([sys.executable, "-c", RUN, str(checkout), str(results), output], check=True,
                                 capture_output=True, text=True, cwd=checkout)
    return json.loads(process.stdout)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--baseline", help="another checkout")
    parser.add_argument("--scenes", type=int, default=5)
    parser.add_argument("--img_size", type=int, default=256)
    parser.add_argument("--runs", type=int, default=3)
    options = parser.parse_args()
    print(f"{machine()}\n\n| completions | ms each | before | ratio |\n|---|---|---|---|")
    for name, with_alpha in (("on white, 12 a scene", False), ("with alpha, 12 a scene", True)):
        with tempfile.TemporaryDirectory() as results:
            write_results(Path(results), options.scenes, 4, options.img_size, with_alpha)
            pairs = [(seconds(ROOT, results), options.baseline and seconds(options.baseline, results))
                     for _ in range(options.runs)]
        ours, theirs = (list(column) for column in zip(*pairs))
        line = f"| {name} | {1000 * statistics.median(ours):.1f} |"
        if options.baseline:
            ratio = statistics.median(ours / theirs for ours, theirs in pairs)
            line += f" {1000 * statistics.median(theirs):.1f} | {ratio:.2f} |"
        print(line)


if __name__ == "__main__":
    main()
