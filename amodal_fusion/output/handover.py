"""Pictures and inpainting masks as inpainters read them: flat folders in the convention of each inpainter.

LaMa and MAT blank the image under the mask, and diffusers does so at strength 1: with the whole hole as mask they would
erase the fusion. So the mask is the region for which no completion was chosen.
"""

import csv
import re
import shlex
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch
from tqdm import tqdm

from amodal_fusion.data.images import read_image, resize, write_image
from amodal_fusion.data.scenes import read_large
from amodal_fusion.data.tensors import as_tensor
from amodal_fusion.errors import ConfigError, SceneError
from amodal_fusion.evaluation.inpainters import GIVEN, grow
from amodal_fusion.evaluation.rules import visible_error
from amodal_fusion.files import check_ours, ours_in, plain_cell, publish, write_text
from amodal_fusion.model.blending import fill_pixels
from amodal_fusion.output.records import read_record

THREADS = 4
COLUMNS = ("file", "scene", "left", "top", "right", "bottom", "width", "height", "given")  # of scenes.csv
LONGEST_NAME = 200  # bytes; file systems allow 255, suffixes included


@dataclass
class Consumer:
    """What one inpainter reads: names of pictures, meaning of the mask, sizes."""

    image: str  # path below the folder, {} is the scene
    mask: str
    multiple: int  # both sides become a multiple of this, px
    resize: bool  # the picture is resized to it; else padded by mirroring
    hole: int  # value of the mask where the inpainter draws
    note: str  # how to run it, {} is the folder


CONSUMERS = {
    "lama": Consumer("{}.png", "{}_mask.png", 1, False, 255, """\
LaMa (github.com/advimman/lama). It names a result after its mask, X_mask.png.
python3 bin/predict.py model.path=$(pwd)/big-lama indir={} outdir={results} dataset.img_suffix=.png
"""),
    "iopaint": Consumer("images/{}.png", "masks/{}.png", 1, False, 255, """\
IOPaint (github.com/Sanster/IOPaint).
iopaint run --model=lama --device=cpu --image={}/images --mask={}/masks --output={results}
"""),
    "mat": Consumer("images/{}.png", "masks/{}.png", 512, True, 0, """\
MAT (github.com/fenglinglwb/MAT). It draws where the mask is 0.
python generate_image.py --network Places_512_FullData.pkl --dpath {}/images --mpath {}/masks --outdir {results}
Pictures are resized to multiples of 512: resize the results back.
"""),
    "diffusers": Consumer("images/{}.png", "masks/{}.png", 8, False, 255, """\
diffusers. At strength 1 the fused image under the mask is ignored: keep strength < 1.
image, mask = Image.open("{}/images/X.png"), Image.open("{}/masks/X.png")
pipe(prompt, image=image, mask_image=mask, strength=0.75, width=image.width, height=image.height)
"""),
}


def file_names(scene_ids, consumer):
    """Names of the pictures, one per scene: its id, shortened if too long.

    For LaMa "mask" becomes "msk", because LaMa reads every picture with "mask" in its name as a mask.
    """
    names, taken = [], set()
    for scene_id in scene_ids:
        stem = re.sub("mask", "msk", scene_id, flags=re.IGNORECASE) if consumer == "lama" else scene_id
        stem = stem.encode()[:LONGEST_NAME].decode(errors="ignore")
        name, number = stem, 1
        while name.lower() in taken:  # also distinct on file systems without case
            number += 1
            name = f"{stem}-{number}"
        taken.add(name.lower())
        names.append(name)
    return names


def check_handover(consumer, folder, *others):
    """Check, before scenes are fused, that `write_handover` can work.

    Raises:
        ConfigError: unknown consumer, or `folder` contains one of `others`, whose masks LaMa would find.
        SceneError: as in `write_handover`.
    """
    if consumer not in CONSUMERS:
        raise ConfigError(f"{consumer!r} is not one of {', '.join(CONSUMERS)}", "handover")
    for other in others:
        if Path(other).resolve().is_relative_to(Path(folder).resolve()):
            raise ConfigError(f"{folder}: {other} lies in this folder; choose another folder", "handover")
    check_places(Path(folder), set(places_of(consumer, Path(folder)).values()))


def places_of(consumer, folder):
    """The folders of the consumer's pictures and masks: image and mask → Path."""
    return {name: (folder / getattr(CONSUMERS[consumer], name)).parent for name in ("image", "mask")}


def write_handover(consumer, folder, data_dir, output_dir, scene_ids, seam=3, given="guide"):
    """Write pictures and inpainting masks for one consumer.

    Args:
        consumer: one of CONSUMERS; folder: for the pictures, README.txt with the command to run, and scenes.csv
            with file, scene, the crop (left, top, right, bottom) of a result, the size to resize that to, and `given`.
        data_dir: DATA/<id>/…; output_dir: OUT/<id>/guide.png and inpaint_mask.png ….
        scene_ids: only fused scenes among them are written.
        seam: pixels by which the mask grows inside the hole.
        given: one of GIVEN: what the inpainter starts from, see `read_given`.

    Returns:
        number of scenes written, and of scenes with nothing left to draw.

    Raises:
        SceneError: the folder has pictures that no earlier handover wrote, or those of another inpainter, or a picture
            cannot be read. Nothing is changed then.
    """
    rules, folder = CONSUMERS[consumer], Path(folder)
    scene_ids = [i for i in scene_ids if (Path(output_dir) / i / "fused.png").exists()]
    names = file_names(scene_ids, consumer)
    places = places_of(consumer, folder)
    check_places(folder, set(places.values()))

    with ExitStack() as stack:
        stages = {place: stack.enter_context(publish(place)) for place in sorted({folder, *places.values()})}

        def write(scene_id, name):
            start, todo = read_given(given, Path(data_dir) / scene_id, Path(output_dir) / scene_id, seam)
            picture, mask, row = fit(start, todo, rules)
            write_image(stages[places["image"]] / Path(rules.image.format(name)).name, picture)
            write_image(stages[places["mask"]] / Path(rules.mask.format(name)).name, mask)
            return plain_cell(name + ".png"), plain_cell(scene_id), *row, given, todo.any()

        with ThreadPoolExecutor(THREADS) as pool:
            rows = list(tqdm(pool.map(write, scene_ids, names), f"hand over to {consumer}", len(names), disable=None))
        with open(stages[folder] / "scenes.csv", "w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([COLUMNS, *(row[:-1] for row in rows)])
        write_text(stages[folder] / "README.txt", read_me(consumer, folder))
    return len(rows), sum(not row[-1] for row in rows)


def check_places(folder, places):
    """Raise SceneError if an inpainter would read pictures in `places` that no earlier handover wrote.

    Also if an earlier handover into `folder` was for another inpainter, or of several kinds of given pictures: its
    pictures would remain.
    """
    layouts = {(folder / pattern).parent for consumer in CONSUMERS.values()
               for pattern in (consumer.image, consumer.mask)}
    for place in sorted((layouts | {folder / given for given in GIVEN}) - places):
        left = [name for name in ours_in(place) if name.endswith(".png")]
        if left:
            before = (f"of other given pictures ({place.name} and more)" if place.name in GIVEN else
                      "for another inpainter")
            raise SceneError(f"{place / left[0]}: written by an earlier handover {before}; choose an empty folder",
                             "handover")
    check_ours([folder / name for name in ("README.txt", "scenes.csv")])
    for place in sorted(places):
        if place.is_dir():
            pictures = {path.name for path in place.iterdir() if path.suffix == ".png" and path.name[0] != "."}
            foreign = sorted(pictures - set(ours_in(place)))
            if foreign:
                raise SceneError(f"{place / foreign[0]}: was not written by an earlier handover, or was changed, and "
                                 "the inpainter would read it; choose an empty folder", "handover")


def read_given(given, data, output, seam):
    """What an inpainter is given of a fused scene: a picture (H,W,3) uint8, and where it draws, (H,W) bool.

    The guide; "ours", the fused image; "visible_fit", the best simple rule of most sets; or "hole", the bare hole. The
    region to draw is grown by `seam` px in the hole.
    """
    hole = read_image(data / "mask.png", "L") >= 128
    if given == "hole":
        return read_image(data / "partial.png", "RGB"), hole
    if given == "visible_fit":
        record = read_record(output) or {"made_by": {}}
        picture, todo = paint_visible_fit(data, record["made_by"].get("n_max_completions"))
    else:
        names = ("guide.png", "inpaint_mask.png") if given == "guide" else ("fused.png", "residual_mask.png")
        picture, todo = read_image(output / names[0], "RGB"), read_image(output / names[1], "L") >= 128
    if hole.shape != todo.shape:
        raise SceneError(f"{data / 'mask.png'}: has another size than its guide; recompute the scene", "overwrite")
    return picture, grow(todo, seam) & hole


def paint_visible_fit(data, max_completions=None):
    """The rule visible fit of `apply_rules`, one completion at a time: picture (H,W,3), and what none covers, (H,W)."""
    scene = read_large(data, max_completions)
    partial = as_tensor(scene.partial)
    mask = torch.from_numpy(scene.mask)[None, None].float()

    def error(completion):
        rgba = as_tensor(completion)[None]
        return visible_error({"partial": partial, "mask": mask, "completions": rgba}).item()

    colours, covered = fill_pixels(scene), np.zeros(scene.mask.sum(), bool)
    for slot in np.argsort([-error(completion) for completion in scene.completions], kind="stable"):
        front = scene.completions[slot][scene.mask] / np.float32(255)
        colours += front[:, 3:] * (front[:, :3] - colours)
        covered |= front[:, 3] > 0.5
    picture, todo = scene.partial.copy(), scene.mask.copy()
    picture[scene.mask] = np.rint(np.clip(colours, 0, 1) * 255).astype(np.uint8)
    todo[scene.mask] = ~covered
    return picture, todo


def fit(picture, todo, rules):
    """Picture and mask (uint8) at a size for the consumer, and the columns of scenes.csv about it."""
    height, width = todo.shape
    mask = np.where(todo, rules.hole, 255 - rules.hole).astype(np.uint8)
    if rules.resize:
        rows, columns = (max(1, round(side / rules.multiple)) * rules.multiple for side in (height, width))
        wanted = resize(todo.astype(np.uint8) * 255, (rows, columns)) >= 64  # keeps thin lines
        mask = np.where(wanted, rules.hole, 255 - rules.hole).astype(np.uint8)
        return resize(picture, (rows, columns)), mask, (0, 0, columns, rows, width, height)
    # the mask is mirrored, too: padding must not count as known
    edges = (0, -height % rules.multiple, 0, -width % rules.multiple, cv2.BORDER_REFLECT)
    row = (0, 0, width, height, width, height)
    return cv2.copyMakeBorder(picture, *edges), cv2.copyMakeBorder(mask, *edges), row


def read_me(consumer, folder):
    """Text of README.txt: the command to run, and the columns of scenes.csv."""
    place, results = str(folder.resolve()), str(results_of(folder).resolve())
    if consumer != "diffusers":  # a command for a shell; the other is Python
        place, results = shlex.quote(place), shlex.quote(results)
    note = CONSUMERS[consumer].note.replace("{results}", results).replace("{}", place)
    return note + ("\nscenes.csv: picture, scene, the box (left, top, right, bottom) to crop the result to, and the\n"
                   "width and height to resize that to, and what was handed over. --results measures the results.\n")


def results_of(folder):
    """Where README.txt puts the results of a handed-over folder: DIR_results, or DIR_results/guide of DIR/guide."""
    if folder.name in GIVEN:
        return folder.parent.with_name(folder.parent.name + "_results") / folder.name
    return folder.with_name(folder.name + "_results")
