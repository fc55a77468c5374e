"""Scenes per second and core: from a data set, packed or not, from synthesis, and with other PNG decoders.

    python -m benchmarks.data --objects CUTOUTS --backgrounds PHOTOS --coco INSTANCES.json --json data.json

First --n_scenes scenes are composed into a temporary folder. Processor time of one thread.
"""

import argparse
import tempfile
import time
from pathlib import Path

import cv2
import numpy as np
import torch
import torchvision
from PIL import Image
from torch.utils.data import default_collate

from amodal_fusion.data.datasets import AmodalFusionDataset
from amodal_fusion.data.images import read_image
from amodal_fusion.data.packed import ShardWriter, pack_scenes
from amodal_fusion.data.scenes import read_scene, write_scene
from amodal_fusion.data.tensors import to_tensors
from amodal_fusion.evaluation.markdown import print_table
from amodal_fusion.synthesis.assets import Material
from amodal_fusion.synthesis.synthesizer import Synthesizer
from benchmarks.measure import alternate


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--objects", required=True)
    parser.add_argument("--backgrounds", required=True)
    parser.add_argument("--coco")
    parser.add_argument("--img_size", type=int, default=256)
    parser.add_argument("--n_scenes", type=int, default=24)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--json", help="file to write the numbers to")
    options = parser.parse_args()
    torch.set_num_threads(1)
    cv2.setNumThreads(0)
    synthesizer = Synthesizer(Material(options.objects, options.backgrounds, options.coco), options.img_size)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        scenes = [synthesizer(i) for i in range(options.n_scenes)]
        for scene in scenes:
            (folder / scene.id).mkdir()
            write_scene(folder / scene.id, scene)
        ids = [scene.id for scene in scenes]
        files = [path for scene_id in ids for path in sorted((folder / scene_id).iterdir())]
        same, half = (AmodalFusionDataset(folder, ids, size, augment=True)
                      for size in (options.img_size, options.img_size // 2))

        pack_scenes(ShardWriter(folder, folder / "pack", options.img_size, 5), ids, 0)
        packed = AmodalFusionDataset(folder / "pack", ids, options.img_size, augment=True)

        def each(function, items):
            return lambda: [function(item) for item in items]

        def batches(data):
            return lambda: [default_collate([data[i] for i in range(start, min(start + 8, len(ids)))])
                            for start in range(0, len(ids), 8)]

        programs = {
            "batches of 8 from the folder": batches(same),
            "… packed": batches(packed),
            "… scaled to half": batches(half),
            "on-the-fly synthesis": each(lambda i: to_tensors(synthesizer(i + 1000), 5), range(len(ids))),
            "read_scene": each(lambda i: read_scene(folder / i), ids),
            "to_tensors": each(lambda scene: to_tensors(scene, 5), scenes),
            "decode: Pillow through read_image": each(lambda path: read_image(path, "RGBA"), files),
            "decode: Pillow alone": each(lambda path: np.asarray(Image.open(path)), files),
            "decode: OpenCV": each(lambda path: cv2.imread(str(path), cv2.IMREAD_UNCHANGED), files),
            "decode: torchvision.io": each(lambda path: torchvision.io.decode_image(str(path)), files),
        }
        seconds = alternate(programs, options.runs, time.process_time)
        size = (folder / "pack" / "00000.npy").stat().st_size
    rows = [{"what": name, "rate": f"{len(ids) / value[0]:.0f} ({len(ids) / value[2]:.0f} – {len(ids) / value[1]:.0f})",
             "ms": f"{1000 * value[0] / len(ids):.1f}", "seconds": value} for name, value in seconds.items()]
    print(f"{options.img_size}², a scene: {len(files) / len(ids):.1f} pictures, {size / 1e3 / len(ids):.0f} kB packed")
    print_table(rows, {"what": "what", "rate": "scenes / s and core", "ms": "ms a scene"}, options.json)


if __name__ == "__main__":
    main()
