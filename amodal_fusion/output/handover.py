"""Fused scenes as inpainters read them: flat folders, each in the convention of its consumer.

LaMa and MAT blank the image where the mask is set, and diffusers does so at strength 1: handing over the whole hole
would erase the fusion. So the mask is the residual, where none of the completions won.
"""

import csv
import re
import shlex
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from tqdm import tqdm

from amodal_fusion.data.images import read_image, write_image
from amodal_fusion.errors import ConfigError, SceneError
from amodal_fusion.evaluation.inpainters import grow
from amodal_fusion.files import atomic_file, write_text


@dataclass
class Consumer:
    """What one inpainter reads: where its pictures lie, what the mask means, which sizes it takes."""

    image: str  # path below the folder, {} is the scene
    mask: str
    multiple: int  # both sides are padded to a multiple of so many pixels
    hole: int  # value of the mask where the inpainter shall draw
    note: str  # how to run it, {} is the folder


CONSUMERS = {
    "lama": Consumer("{}.png", "{}_mask.png", 1, 255, """\
LaMa (github.com/advimman/lama). It names a result after its mask, X_mask.png.
python3 bin/predict.py model.path=$(pwd)/big-lama indir={} outdir={results} dataset.img_suffix=.png
"""),
    "iopaint": Consumer("images/{}.png", "masks/{}.png", 1, 255, """\
IOPaint (github.com/Sanster/IOPaint).
iopaint run --model=lama --device=cpu --image={}/images --mask={}/masks --output={results}
"""),
    "mat": Consumer("images/{}.png", "masks/{}.png", 512, 0, """\
MAT (github.com/fenglinglwb/MAT). It draws where the mask is 0; both sides are multiples of 512.
python generate_image.py --network Places_512_FullData.pkl --dpath {}/images --mpath {}/masks --outdir {results}
"""),
    "diffusers": Consumer("images/{}.png", "masks/{}.png", 8, 255, """\
diffusers. At strength 1 the fused image under the mask is ignored: keep strength < 1.
image, mask = Image.open("{}/images/X.png"), Image.open("{}/masks/X.png")
pipe(prompt, image=image, mask_image=mask, strength=0.75, width=image.width, height=image.height)
"""),
}


def file_names(scene_ids, consumer):
    """Names of the pictures, one per scene: its id, without "mask", by which LaMa would take a picture for a mask."""
    names, taken = [], set()
    for scene_id in scene_ids:
        stem = re.sub("mask", "msk", scene_id, flags=re.IGNORECASE) if consumer == "lama" else scene_id
        name, number = stem, 1
        while name.lower() in taken:  # also apart where file names have no case
            number += 1
            name = f"{stem}-{number}"
        taken.add(name.lower())
        names.append(name)
    return names


def check_handover(consumer, folder, *others):
    """Refuse what `write_handover` could not do, before the scenes are fused.

    Raises:
        ConfigError: no such consumer, or `folder` holds one of `others`, whose masks LaMa would find.
    """
    if consumer not in CONSUMERS:
        raise ConfigError(f"{consumer!r} is none of {', '.join(CONSUMERS)}", "handover")
    for other in others:
        if Path(other).resolve().is_relative_to(Path(folder).resolve()):
            raise ConfigError(f"{folder}: {other} lies in this folder; choose a folder of its own", "handover")


def write_handover(consumer, folder, data_dir, output_dir, scene_ids, seam=0, workers=1):
    """Write the fused scenes for one consumer.

    Args:
        consumer: one of CONSUMERS; folder: gets the pictures, README.txt with the command to run, and scenes.csv
            with file, scene and the crop (left, top, right, bottom) that undoes the padding.
        data_dir: DATA/<id>/mask.png; output_dir: OUT/<id>/fused.png and residual_mask.png.
        scene_ids: those of them that have been fused are handed over.
        seam: pixels by which the mask grows, inside the hole: the photo around it stays as it is.
        workers: threads.

    Returns:
        numbers of scenes written, and of those where nothing is left to draw.

    Raises:
        SceneError: the folder holds pictures that no earlier handover wrote, or one that lays them out differently, or
            a picture cannot be read.
    """
    rules, folder = CONSUMERS[consumer], Path(folder)
    scene_ids = [i for i in scene_ids if (Path(output_dir) / i / "fused.png").exists()]
    names = file_names(scene_ids, consumer)
    _remove_stale(folder, rules, names)

    def write(scene_id, name):
        fused = read_image(Path(output_dir) / scene_id / "fused.png", "RGB")
        residual = read_image(Path(output_dir) / scene_id / "residual_mask.png", "L") >= 128
        hole = read_image(Path(data_dir) / scene_id / "mask.png", "L") >= 128
        if hole.shape != residual.shape:
            raise SceneError(f"{Path(data_dir) / scene_id / 'mask.png'}: not of the size of its fused image; "
                             "recompute the scene", "overwrite")
        todo = grow(residual, seam) & hole
        height, width = todo.shape
        # mirrored, mask and all, so that no part of the padding is taken for a known picture that is none
        edges = (0, -height % rules.multiple, 0, -width % rules.multiple, cv2.BORDER_REFLECT)
        mask = np.where(todo, rules.hole, 255 - rules.hole).astype(np.uint8)
        write_image(folder / rules.image.format(name), cv2.copyMakeBorder(fused, *edges))
        write_image(folder / rules.mask.format(name), cv2.copyMakeBorder(mask, *edges))
        return name + ".png", scene_id, 0, 0, width, height, todo.any()

    with ThreadPoolExecutor(max(1, workers)) as pool:
        rows = list(tqdm(pool.map(write, scene_ids, names), f"hand over to {consumer}", len(names), disable=None))
    _write_table(folder / "scenes.csv", [row[:-1] for row in rows])
    place, results = (str(path.resolve()) for path in (folder, folder.with_name(folder.name + "_results")))
    if consumer != "diffusers":  # a command for a shell, to be run elsewhere; the other is Python
        place, results = shlex.quote(place), shlex.quote(results)
    note = rules.note.replace("{results}", results).replace("{}", place)
    write_text(folder / "README.txt", note + "\nscenes.csv: picture, scene, and the "
               "box (left, top, right, bottom) to crop the result to.\n")
    return len(rows), sum(not row[-1] for row in rows)


def _write_table(path, rows):
    with atomic_file(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["file", "scene", "left", "top", "right", "bottom"])
        writer.writerows(rows)


def _remove_stale(folder, rules, names):
    """Remove pictures of an earlier handover that are none of this one's; an inpainter would take them along."""
    table, patterns = folder / "scenes.csv", (rules.image, rules.mask)
    known = set()
    if table.exists():
        with open(table, newline="", encoding="utf-8") as file:
            known = {row["file"].removesuffix(".png") for row in csv.DictReader(file)}
    for other in {consumer.mask for consumer in CONSUMERS.values()} - {rules.mask}:
        left = next((path for name in sorted(known) if (path := folder / other.format(name)).exists()), None)
        if left:
            raise SceneError(f"{left}: of an earlier handover for another inpainter, laid out differently; choose "
                             "an empty folder")
    for pattern in patterns:
        (folder / pattern).parent.mkdir(parents=True, exist_ok=True)
    ours, earlier = ({folder / p.format(name) for p in patterns for name in group} for group in (names, known))
    found = {path for p in patterns for path in (folder / p).parent.iterdir()
             if path.suffix == ".png" and not path.name.startswith(".")}
    foreign = sorted(found - ours - earlier)
    if foreign:
        raise SceneError(f"{foreign[0]}: no earlier handover wrote it, and the inpainter would read it; choose an "
                         "empty folder")
    for path in found - ours:
        path.unlink()
    # before the pictures: after an interruption it still names all that are there
    _write_table(table, [[name + ".png"] for name in sorted({*names, *known})])
