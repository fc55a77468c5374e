"""Feed the readers with damaged files: anything that comes out but a value or the reader's own error is a bug.

    python -m tests.fuzz --inputs 12000 --seconds 600

Exit status 1 when something else came out; the offending file is kept in the folder that is printed.
"""

import argparse
import io
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from amodal_fusion.checkpoints import KIND, VERSION
from amodal_fusion.config import read_yaml
from amodal_fusion.data.images import read_image
from amodal_fusion.data.scenes import read_list
from amodal_fusion.data.toy import draw_scene
from amodal_fusion.errors import ConfigError, SceneError, UserError
from amodal_fusion_transformer import TrainConfig, load_model


def pictures():
    """Whole files of every format and mode."""
    photo = Image.fromarray(draw_scene(0).original)
    cutout = Image.fromarray(draw_scene(0).completions[0])
    grey16 = Image.fromarray((np.arange(4096, dtype=np.uint16) * 15).reshape(64, 64))
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "a description"
    made = [
        (photo, "PNG", {}), (cutout, "PNG", {}), (photo.convert("P"), "PNG", {"transparency": 3}), (grey16, "PNG", {}),
        (photo.convert("1"), "PNG", {}), (photo, "PNG", {"exif": exif}), (photo, "JPEG", {"exif": exif}),
        (photo.convert("CMYK"), "JPEG", {}), (photo, "JPEG", {"progressive": True}), (photo, "WEBP", {}),
        (cutout, "WEBP", {"lossless": True}), (photo, "BMP", {}), (photo.convert("P"), "BMP", {}), (photo, "TIFF", {}),
        (cutout, "TIFF", {"compression": "tiff_lzw"}), (photo, "TIFF", {"compression": "jpeg"}),
        (grey16, "TIFF", {"compression": "tiff_adobe_deflate"}), (photo.convert("P"), "GIF", {}),
    ]
    for image, kind, options in made:
        file = io.BytesIO()
        image.save(file, kind, **options)
        yield kind, file.getvalue()


def damage(data, rng):
    """Flip, cut, insert, repeat, or write a large number somewhere, once or several times."""
    data = bytearray(data)
    for _ in range(rng.integers(1, 4)):
        # half of the time near the start, where sizes and offsets stand
        at = int(rng.integers(0, min(len(data), 128) if rng.random() < 0.5 else len(data)) if data else 0)
        kind = rng.integers(6)
        if kind == 0 and data:
            data[at] ^= 1 << rng.integers(8)
        elif kind == 1 and data:
            data[at] = rng.integers(256)
        elif kind == 2:
            del data[at:]
        elif kind == 3:
            data[at:at] = rng.bytes(int(rng.integers(1, 64)))
        elif kind == 4:
            data[at:at] = data[at : at + int(rng.integers(1, 256))]
        else:
            data[at : at + 4] = [b"\xff\xff\xff\xff", b"\x00\x00\x00\x00", b"\x7f\xff\xff\xff", b"\x00\x00\xff\xff"][
                rng.integers(4)]
    return bytes(data)


def targets(folder):
    """(name, whole files, function of a path, the errors that it may raise)."""
    for kind, data in pictures():
        mode = ("RGB", "RGBA", "L")[len(data) % 3]
        yield f"picture {kind}", data, lambda path, mode=mode: read_image(path, mode), SceneError
    (folder / "data" / "good").mkdir(parents=True)
    (folder / "data" / "한국어 이름").mkdir()
    scenes = "\ufeffgood\r\n한국어 이름\n\n".encode()
    for _ in range(4):  # as many as four pictures
        yield "list", scenes, lambda path: read_list(path, folder / "data"), SceneError
    options = b"data_dir: data\nimg_size: 256\nlr: 1e-4\naugment: true\nresume: auto\nlpips_weights: null\n"
    yield "YAML", options, lambda path: read_yaml(path, TrainConfig), ConfigError
    file = io.BytesIO()
    torch.save({"kind": KIND, "version": VERSION, "config": {"width": 8}, "model": {"a": torch.ones(3)}}, file)
    yield "checkpoint", file.getvalue(), load_model, UserError


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=12000)
    parser.add_argument("--seconds", type=float, default=600, help="stop after so long")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    warnings.simplefilter("ignore")  # Pillow's, about damaged metadata
    rng, folder = np.random.default_rng(options.seed), Path(tempfile.mkdtemp())
    cases, outcomes, bugs, slowest, start = list(targets(folder)), Counter(), Counter(), (0, ""), time.monotonic()
    for number in range(options.inputs):
        name, whole, read, expected = cases[number % len(cases)]
        path = folder / "input.bin"
        path.write_bytes(damage(whole, rng))
        began = time.monotonic()
        try:
            read(path)
            outcomes[name, "read"] += 1
        except expected as error:
            outcomes[name, "refused"] += 1
            if "input.bin" not in str(error):
                bugs[f"{name}: message without the file: {error}"] += 1
        except Exception as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            bug = f"{name}: {type(error).__name__} in {Path(where.filename).name}: {str(error)[:80]}"
            bugs[bug] += 1
            if bugs[bug] == 1:
                path.rename(folder / f"bug_{len(bugs)}.bin")
        slowest = max(slowest, (time.monotonic() - began, name))
        if time.monotonic() - start > options.seconds:
            break
    print("| reader | read | refused |\n|---|---|---|")
    for name in dict.fromkeys(case[0] for case in cases):
        print(f"| {name} | {outcomes[name, 'read']} | {outcomes[name, 'refused']} |")
    print(f"\n{number + 1} inputs in {time.monotonic() - start:.0f} s, the slowest {slowest[0]:.2f} s ({slowest[1]}), "
          f"{len(bugs)} bugs")
    for bug, count in bugs.most_common():
        print(f"{count} × {bug}")
    if bugs:
        print(f"first inputs of each: {folder}")
    sys.exit(bool(bugs))


if __name__ == "__main__":
    main()
