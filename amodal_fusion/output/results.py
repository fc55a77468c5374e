"""Pictures that an inpainter made of a handed-over folder: found by its scenes.csv, checked, and measured."""

import csv
import re
from pathlib import Path

import numpy as np
import torch

from amodal_fusion.data.images import IMAGE_SUFFIXES, read_image, resize
from amodal_fusion.data.tensors import as_tensor
from amodal_fusion.errors import ConfigError, SceneError
from amodal_fusion.evaluation.image_networks import load_clip, load_fid
from amodal_fusion.evaluation.inpainters import GIVEN
from amodal_fusion.evaluation.scores import measure_picture
from amodal_fusion.files import plain_cell
from amodal_fusion.output.handover import COLUMNS, results_of

MOST_PADDING = 8  # px on a side; handed-over pictures are padded to a multiple of this at most
FOREIGN = 30  # levels; a result that differs from the photo outside the hole by more in the mean is not of its scene


def parse_results(specs):
    """--results NAME=DIR … → list of (name, Path).

    Raises:
        ConfigError: one is not of this form, or its folder does not exist.
    """
    parsed = []
    for spec in specs:
        name, equals, folder = spec.partition("=")
        if not equals or not re.fullmatch(r"[A-Za-z0-9.+-]+", name):
            raise ConfigError(f"{spec!r}: expected NAME=DIR, with letters, digits, '.', '+' and '-' in the name",
                              "results")
        if not Path(folder).expanduser().is_dir():
            raise ConfigError(f"{folder}: no such folder", "results")
        parsed.append((name, Path(folder).expanduser()))
    return parsed


def check_results(specs):
    """Check, before scenes are fused, that --results names folders of results.

    Raises:
        ConfigError: as in `parse_results`. SceneError: a folder has no usable scenes.csv.
    """
    for _, folder in parse_results(specs):
        for part in parts_of(folder):
            read_table(part)


class Results:
    """The results of all inpainters for the scenes of one run.

    Args:
        config: InferenceConfig with results, data_dir, clip_weights, clip_net, fid_weights.
        scene_ids: the scenes that are measured; each needs a result.
        perceptual: PerceptualLoss or None.

    Raises:
        SceneError: a picture is missing or belongs to no scene; scenes.csv is missing or lacks a scene.
        ConfigError: two folders have results of one name for the same given pictures.
    """

    def __init__(self, config, scene_ids, perceptual):
        self.data_dir, self.perceptual = Path(config.data_dir), perceptual
        scene_ids = [i for i in scene_ids if (self.data_dir / i / "original.png").exists()]
        self.rows = {}  # scene id → row of `measure`
        self.files = {}  # (inpainter, given) → {scene id → (path, row of scenes.csv)}
        for name, folder in parse_results(config.results):
            for part in parts_of(folder):
                given, files = find_results(part, scene_ids)
                if (name, given) in self.files:
                    raise ConfigError(f"{part}: the results {name} for {given} are given twice", "results")
                self.files[name, given] = files
        self.clip = load_clip(config.clip_weights, config.clip_net)
        self.fid = load_fid(config.fid_weights, self.files)

    def measure(self, scene_id):
        """Metrics of all results for a scene, <inpainter>_<given>_<metric> → number.

        Raises:
            SceneError: a result has another size than what was handed over, or shows another scene.
        """
        folder = self.data_dir / scene_id
        original, partial = (read_image(folder / name, "RGB") for name in ("original.png", "partial.png"))
        hole = read_image(folder / "mask.png", "L") >= 128
        truth, mask = as_tensor(original), torch.from_numpy(hole)[None, None].float()
        values = {}
        for (name, given), files in self.files.items():
            path, row = files[scene_id]
            picture = read_result(path, row)
            difference = np.abs(picture[~hole].astype(int) - partial[~hole]).mean() if not hole.all() else 0
            if picture.shape != partial.shape or difference > FOREIGN:
                raise SceneError(f"{path}: differs from the photo of {scene_id} by {difference:.0f} levels outside the "
                                 "hole; is it of another scene?")
            result = as_tensor(picture)
            measured = measure_picture(result, truth, mask, self.perceptual)
            if self.clip:
                measured["clip"] = self.clip(result, truth, mask)
            if self.fid:
                self.fid.add(name, given, result, truth)
            values |= {f"{name}_{given}_{metric}": value for metric, value in measured.items()}
        self.rows[scene_id] = values
        return values

    def of_sets(self):
        """FID of each inpainter and given, once all scenes are measured, as columns of the summary."""
        return self.fid.compute() if self.fid else {}


def parts_of(folder):
    """The folders of one inpainter's results: DIR/guide, DIR/hole … as several handed-over folders have, or DIR."""
    parts = [folder / given for given in GIVEN if (folder / given).is_dir()]
    return parts or [folder]


def find_results(folder, scene_ids):
    """What the inpainter was given, and its picture for each scene, scene id → (path, row of scenes.csv).

    Raises:
        SceneError: as `Results`.
    """
    rows, table = read_table(folder)
    pictures = {path.stem: path for path in sorted(folder.iterdir())
                if path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".")}
    by_scene, known = {}, set()
    for row in rows:
        stem = row["file"].removesuffix(".png")
        names = (stem, f"{stem}_mask")  # LaMa names a result after its mask
        known.update(names)
        by_scene[row["scene"]] = (next((pictures[name] for name in names if name in pictures), None), row)
    foreign = [path.name for stem, path in pictures.items() if stem not in known]
    missing = [scene_id for scene_id in scene_ids if by_scene.get(plain_cell(scene_id), (None,))[0] is None]
    if missing and plain_cell(missing[0]) not in by_scene:
        raise SceneError(f"{table}: the scene {missing[0]} was not handed over ({len(missing)} of {len(scene_ids)} "
                         "have no result); hand over all scenes, run the inpainting model again", "handover")
    if missing:
        stem = by_scene[plain_cell(missing[0])][1]["file"].removesuffix(".png")
        hint = f"; {foreign[0]} is of no scene: is it misnamed?" if foreign else ""
        raise SceneError(f"{folder / (stem + '.png')}: missing, the result for {missing[0]} ({len(missing)} of "
                         f"{len(scene_ids)} are missing){hint}")
    if foreign:
        raise SceneError(f"{folder / foreign[0]}: belongs to no scene of {table} ({len(foreign)} such pictures); "
                         "rename or remove it")
    return rows[0]["given"], {scene_id: by_scene[plain_cell(scene_id)] for scene_id in scene_ids}


def read_table(folder):
    """Rows of the scenes.csv that was handed over with a folder of results, and its path.

    It is in the folder, or in the folder whose README.txt named this one.
    """
    handed = [folder / "scenes.csv"]
    for place in (folder, folder.parent):
        if place.name.endswith("_results"):
            source = place.with_name(place.name.removesuffix("_results"))
            source = source if place == folder else source / folder.name
            handed += [source / "scenes.csv"] if results_of(source) == folder else []
    table = next((path for path in handed if path.is_file()), None)
    if table is None:
        raise SceneError(f"{folder}: no scenes.csv here, nor in a folder that was handed over; copy the scenes.csv of "
                         "that folder here", "results")
    with open(table, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    if not rows or set(rows[0]) != set(COLUMNS) or len({row["given"] for row in rows}) != 1:
        raise SceneError(f"{table}: not a table that this version wrote; hand over again", "handover")
    return rows, table


def read_result(path, row):
    """The picture (H,W,3) uint8 at the scene's size: cropped and resized as scenes.csv says, or as it is.

    Raises:
        SceneError: it has neither that size nor the scene's.
    """
    picture = read_image(path, "RGB")
    left, top, right, bottom, width, height = (int(row[name]) for name in COLUMNS[2:8])
    size = picture.shape[1], picture.shape[0]
    if size == (width, height):
        return picture
    if not all(0 <= side - box < MOST_PADDING for side, box in zip(size, (right, bottom))):
        raise SceneError(f"{path}: {size[0]}×{size[1]} pixels; expected {right}×{bottom}, as handed over, or "
                         f"{width}×{height}, as the scene {row['scene']}")
    return resize(picture[top:bottom, left:right], (height, width))
