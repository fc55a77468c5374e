"""Time of each stage of a whole inference run.

    python -m benchmarks.end_to_end --scenes 200 --img_size 256 --json end_to_end.json

First, drawn scenes pass through the functions of the inference script in one process, and each stage is timed. Then the
script itself runs, with its reader and writer processes, with and without figures.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from amodal_fusion.data.scenes import find_scenes, read_scene, write_scene
from amodal_fusion.data.toy import draw_scene
from amodal_fusion.evaluation.markdown import print_table
from amodal_fusion.model.blending import blend_hole
from amodal_fusion.output.records import clear_outputs
from amodal_fusion.output.scene_writer import write_outputs
from amodal_fusion_transformer_inference import FusionPredictor

SCRIPT = Path(__file__).parent.parent / "amodal_fusion_transformer_inference.py"


def stages(data, output, size):
    """Seconds of each stage over all scenes, in one process."""
    predictor = FusionPredictor(device="cpu", img_size=size)
    seconds = Counter()

    def timed(name, function, *arguments):
        start = time.perf_counter()
        result = function(*arguments)
        seconds[name] += time.perf_counter() - start
        return result

    for scene_id in find_scenes(data):
        scene = timed("read", read_scene, data / scene_id)
        small = timed("scale", scene.resized, (size, size))
        (logits,) = timed("network", predictor.look, [small])
        blend = timed("blending", blend_hole, scene, logits, False)
        timed("clear", clear_outputs, output / scene_id)
        timed("encode", write_outputs, output / scene_id, scene, blend, scene_id, False)
        timed("encode and figure", write_outputs, output / scene_id, scene, blend, scene_id, True)
    seconds["figure"] = seconds.pop("encode and figure") - seconds["encode"]
    return seconds


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenes", type=int, default=200)
    parser.add_argument("--img_size", type=int, default=256)
    parser.add_argument("--json", help="file to write the numbers to")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        for seed in range(options.scenes):
            (root / "data" / f"scene_{seed:04d}").mkdir(parents=True)
            write_scene(root / "data" / f"scene_{seed:04d}", draw_scene(seed, options.img_size, 5))
        seconds = stages(root / "data", root / "stages", options.img_size)
        total = sum(seconds.values())
        rows = [{"what": name, "ms": f"{1000 * value / options.scenes:.1f}", "share": f"{value / total:.0%}"}
                for name, value in seconds.most_common()]
        for name, more in (("script", ()), ("script, --no-figures", ("--no-figures",))):
            start = time.perf_counter()
            subprocess.run([sys.executable, str(SCRIPT), "--data_dir", root / "data", "--output_dir",
                            root / name.replace(" ", "_"), "--img_size", str(options.img_size), "--no-metrics",
                            "--device", "cpu", *more],
                           check=True, capture_output=True, env=dict(os.environ))
            rows.append({"what": name, "ms": f"{1000 * (time.perf_counter() - start) / options.scenes:.1f}"})
    print_table(rows, {"what": "stage", "ms": "ms a scene", "share": "share"}, options.json)


if __name__ == "__main__":
    main()
