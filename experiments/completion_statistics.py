"""How completions differ from the photo: real ones of several models, and simulated ones in the synthesizer's styles.

    python -m experiments.completion_statistics --layers REAL_LAYERS REAL --objects CUTOUTS --backgrounds PLACES \\
        --coco COCO/instances.json

A folder of --layers has one folder per photo with photo.* and obj_*.png (RGBA, full frame). Its meta.json may state the
order of the layers ({"order": …}: from back to front) or the share of each layer that the photo does not show
({"layers": [{"hidden": 0.2}, …]}). Photos are grouped by folder and by the first letters of their names.

A layer is compared with the photo where the photo shows it ("seen"). With a known order this is where no nearer layer
covers it. Otherwise it is where the layer is closest to the photo of all layers, without the hidden share (25 levels of
difference where that is unknown). This rule prefers layers that agree with the photo, so simulated layers are measured
both ways.

Each cell is the median over layers, with the range from 10 to 90 % in brackets. Colours are in levels of 255. The shift
is the mean difference; the uneven shift its smooth part, the residue the rest (RMS). "Aligned" is the residue after the
photo is registered to the layer. Gain and gradient energy are ratios to the photo's. A positive edge offset means that
alpha reaches beyond the object. A soft edge is the number of soft pixels per pixel of outline. Errors in the hidden
part are known for composed objects alone.
"""

import argparse
import json
import re
from pathlib import Path

import cv2
import numpy as np
from tqdm import tqdm

from amodal_fusion.data.images import read_image, resize
from amodal_fusion.errors import SceneError, UserError, exit_with_message
from amodal_fusion.evaluation.markdown import print_table
from amodal_fusion.synthesis.assets import Material
from amodal_fusion.synthesis.synthesizer import STYLES, Synthesizer

LEAST_SEEN = 400  # pixels; a layer with fewer is skipped
DIFFERENCE = 25  # levels; where neither order nor hidden share is known, a larger one counts as not seen
REDRAWN = 8  # levels; a larger difference counts as redrawn
SMOOTH = 12  # pixels, deviation of the Gaussian that tells an uneven shift from the residue
LEAST_TEXTURE = 20  # mean squared gradient of the photo, below which sharpness and registration say nothing
COLUMNS = {"layers": "layers", "shift": "colour shift", "uneven": "uneven shift", "gain": "gain of contrast",
           "sharpness": "gradient energy", "registration": "registration, px", "residue": "residue",
           "aligned": "residue, aligned", "redrawn": "share > 8 levels", "edge": "edge offset, px",
           "rim": "difference at the rim", "soft": "soft edge, px", "hidden": "hidden: difference",
           "shape": "hidden: IoU"}


def seen_by_order(layers, nearer):
    """Where each layer is opaque and no nearer one covers it; nearer[i] are indices of layers. List of (H,W) bool."""
    opaque = [layer[..., 3] > 250 for layer in layers]
    return [opaque[i] & ~np.any([layers[k][..., 3] > 5 for k in nearer[i]], 0) for i in range(len(layers))]


def seen_by_colour(photo, layers, hidden):
    """Where each layer is the closest one to the photo, without its `hidden` share (None: unknown)."""
    errors = []
    for layer in layers:
        error = np.abs(layer[..., :3].astype(np.float32) - photo).mean(2)
        opaque = (layer[..., 3] > 250).astype(np.float32)
        mean = cv2.GaussianBlur(error * opaque, (0, 0), 3) / np.maximum(cv2.GaussianBlur(opaque, (0, 0), 3), 1e-6)
        errors.append(np.where(opaque > 0, mean, np.inf))
    best = np.min(errors, 0)
    seen = []
    for error, share in zip(errors, hidden):
        opaque = np.isfinite(error)
        known = share is not None and opaque.any()
        limit = np.quantile(error[opaque], 1 - share) if known else DIFFERENCE
        seen.append(opaque & (error == best) & (error <= limit))
    return seen


def shifted(photo, shift):
    """A photo moved by (rows, columns) in pixels."""
    matrix = np.float32([[1, 0, shift[1]], [0, 1, shift[0]]])
    return cv2.warpAffine(photo, matrix, photo.shape[1::-1], borderMode=cv2.BORDER_REPLICATE)


def registration(photo, layer, inside):
    """(row, column) shift in pixels that moves the photo onto the layer, found together with gain and offset.

    Least squares on image gradients (Lucas and Kanade 1981), three iterations on grey images.
    """
    photo, layer = (cv2.cvtColor(image, cv2.COLOR_RGB2GRAY).astype(np.float32) for image in (photo, layer))
    photo, layer = (cv2.GaussianBlur(image, (0, 0), 1) for image in (photo, layer))
    shift = np.zeros(2)
    for _ in range(3):
        moved = shifted(photo, shift)
        down, right = np.gradient(moved)
        columns = np.stack([-down[inside], -right[inside], moved[inside], np.ones(inside.sum())], 1)
        solution, *_ = np.linalg.lstsq(columns, layer[inside], rcond=None)
        shift = np.clip(shift + solution[:2], -8, 8)
    return shift


def edge_offset(photo, alpha, seen):
    """Distance in pixels from the edge of alpha to the strongest mean edge of the photo, or nan.

    Positive: alpha reaches beyond the object. Only the edge of the seen part counts, away from the frame.
    """
    inside = alpha > 127
    signed = np.where(inside, 0.5 - cv2.distanceTransform(inside.astype(np.uint8), cv2.DIST_L2, 3),
                      cv2.distanceTransform((~inside).astype(np.uint8), cv2.DIST_L2, 3) - 0.5)
    near = cv2.dilate(seen.astype(np.uint8), np.ones((17, 17), np.uint8)) > 0
    near[:8] = near[-8:] = near[:, :8] = near[:, -8:] = False
    hidden = inside & (cv2.dilate(seen.astype(np.uint8), np.ones((9, 9), np.uint8)) == 0)
    near &= cv2.dilate(hidden.astype(np.uint8), np.ones((17, 17), np.uint8)) == 0
    gradient = np.linalg.norm(np.gradient(cv2.cvtColor(photo, cv2.COLOR_RGB2GRAY).astype(np.float32)), axis=0)
    bins = np.rint(np.clip(signed, -99, 99)).astype(int)
    counts = [np.count_nonzero(near & (bins == offset)) for offset in range(-6, 7)]
    if min(counts) < 60:
        return np.nan
    profile = np.array([gradient[near & (bins == offset)].mean() for offset in range(-6, 7)])
    if profile.max() < 1.5 * np.median(profile):
        return np.nan  # no clear edge
    return -(int(profile.argmax()) - 6)


def compare(photo, layer, seen):
    """Statistics of one layer where it is seen, {column: number}, or None when too little is seen."""
    inner = cv2.erode(seen.astype(np.uint8), np.ones((7, 7), np.uint8)) > 0
    if np.count_nonzero(inner) < LEAST_SEEN:
        return None
    difference = layer[..., :3].astype(np.float32) - photo
    mean, uneven, residue = split_difference(difference, inner)
    energies = [np.square(np.stack(np.gradient(image.astype(np.float32), axis=(0, 1))))[:, inner].mean()
                for image in (layer[..., :3], photo)]
    alpha = layer[..., 3]
    rim = seen & (cv2.erode((alpha > 250).astype(np.uint8), np.ones((5, 5), np.uint8)) == 0)
    outline = cv2.morphologyEx((alpha > 127).astype(np.uint8), cv2.MORPH_GRADIENT, np.ones((3, 3), np.uint8))
    row = {"shift": np.abs(mean).mean(), "uneven": uneven, "residue": residue,
           "gain": layer[inner, :3].std() / max(photo[inner].std(), 1e-3),
           "redrawn": (np.abs(difference[inner]).max(1) > REDRAWN).mean(), "edge": edge_offset(photo, alpha, seen),
           "rim": np.abs(difference[rim]).mean() if rim.sum() > 50 else np.nan,
           "soft": np.count_nonzero((alpha > 8) & (alpha < 247)) / max(1, np.count_nonzero(outline) / 2)}
    if energies[1] > LEAST_TEXTURE:
        shift = registration(photo, layer[..., :3], inner)
        aligned = layer[..., :3].astype(np.float32) - shifted(photo, shift)
        row |= {"sharpness": energies[0] / energies[1], "registration": np.hypot(*shift),
                "aligned": split_difference(aligned, inner)[2]}
    return row


def split_difference(difference, inner):
    """A difference (H,W,3) within `inner` as its mean (3,), and the RMS of its smooth and of its fine part."""
    mean = difference[inner].mean(0)
    weight = np.maximum(cv2.GaussianBlur(inner.astype(np.float32), (0, 0), SMOOTH), 1e-6)
    smooth = cv2.GaussianBlur((difference - mean) * inner[..., None], (0, 0), SMOOTH) / weight[..., None]
    return mean, *(np.sqrt(np.square(part[inner]).mean()) for part in (smooth, difference - mean - smooth))


def read_layers(folder):
    """Photo (H,W,3), layers [(H,W,4)] and where the photo shows each, [(H,W) bool]."""
    photo = read_image(next(folder.glob("photo.*")), "RGB")
    layers = [resize(read_image(path, "RGBA"), photo.shape[:2]) for path in sorted(folder.glob("obj_*.png"))]
    try:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        meta = {}
    except ValueError as error:
        raise SceneError(f"{folder / 'meta.json'}: not JSON ({error})") from None
    if "order" in meta:
        return photo, layers, seen_by_order(layers, [range(i + 1, len(layers)) for i in range(len(layers))])
    hidden = [layer["hidden"] for layer in meta["layers"]] if "layers" in meta else [None] * len(layers)
    return photo, layers, seen_by_colour(photo, layers, hidden)


def measure_real(folders):
    """{group of photos: rows of statistics}."""
    rows = {}
    photos = sorted(path.parent for folder in folders for path in folder.glob("*/photo.*"))
    if not photos:
        raise UserError(f"{', '.join(map(str, folders))}: no folder with a photo.* and obj_*.png in it")
    for folder in tqdm(photos, "real", disable=None):
        photo, layers, seen = read_layers(folder)
        prefix = re.match(r"[^\W\d_]*", folder.name)[0]
        rows.setdefault(f"{folder.parent.name}/{prefix}", []).extend(
            compare(photo, layer, where) for layer, where in zip(layers, seen))
    return rows


def measure_simulated(synthesizer, count):
    """Rows of statistics of `count` scenes: with the true visible parts, and with parts inferred from colour."""
    known, inferred = [], []
    for index in tqdm(range(count), synthesizer.style, disable=None):
        composition = synthesizer.compose(index)
        scene, objects = composition.scene, composition.objects
        chosen = [(layer, objects[number]) for layer, number in zip(scene.completions, composition.shown)
                  if number is not None]
        if not chosen:
            continue
        layers = [layer for layer, _ in chosen]
        hidden = [1 - np.count_nonzero(item.visible & (item.whole[..., 3] > 127)) /
                  max(1, np.count_nonzero(item.whole[..., 3] > 127)) for _, item in chosen]
        guesses = seen_by_colour(scene.original, layers, np.clip(hidden, 0, 1))
        for (layer, item), guess in zip(chosen, guesses):
            inferred.append(compare(scene.original, layer, guess & ~scene.mask))
            row = compare(scene.original, layer, item.visible & (layer[..., 3] > 250) & ~scene.mask)
            if row is not None:
                known.append(row | hidden_errors(layer, item))
    return known, inferred


def hidden_errors(layer, item):
    """Differences from the truth in the hidden part, where the truth is known."""
    truth, drawn = item.whole[..., 3] > 127, layer[..., 3] > 127
    hidden = ~item.visible
    if not item.true or np.count_nonzero(truth & hidden) < LEAST_SEEN:
        return {}
    both = truth & drawn & hidden
    difference = np.abs(layer[both, :3].astype(np.float32) - item.whole[both, :3])
    return {"hidden": difference.mean() if both.any() else np.nan,
            "shape": np.count_nonzero(both) / np.count_nonzero((truth | drawn) & hidden)}


def summary(name, rows):
    """One line of the table: medians with the range from 10 to 90 % in brackets."""
    rows = [row for row in rows if row is not None]
    line = {"set": name, "layers": len(rows)}
    for key in COLUMNS:
        values = np.array([row[key] for row in rows if key in row], float)
        values = values[~np.isnan(values)]
        if len(values):
            low, middle, high = np.quantile(values, (0.1, 0.5, 0.9))
            line[key] = f"{middle:.2f} ({low:.2f}–{high:.2f})" if high < 3 else f"{middle:.1f} ({low:.1f}–{high:.1f})"
    return line


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=Path, nargs="+", default=[], help="folders of photos with real completions")
    for name in ("objects", "backgrounds", "coco"):
        parser.add_argument(f"--{name}", type=Path)
    parser.add_argument("--n_scenes", type=int, default=100, help="composed scenes of each style")
    parser.add_argument("--img_size", type=int, default=256, help="side of composed scenes in pixels")
    parser.add_argument("--seed", type=int, default=99)
    parser.add_argument("--json", help="file to write the table to")
    options = parser.parse_args()
    lines = [summary(group, rows) for group, rows in measure_real(options.layers).items()] if options.layers else []
    if options.objects or options.backgrounds or options.coco:
        material = Material(options.objects, options.backgrounds, options.coco)
        for style in STYLES[1:]:
            synthesizer = Synthesizer(material, options.img_size, style=style, seed=options.seed)
            known, inferred = measure_simulated(synthesizer, options.n_scenes)
            lines += [summary(f"style {style}", known), summary(f"style {style}, seen inferred", inferred)]
    if not lines:
        parser.error("nothing to measure: give --layers, or material (--objects, --backgrounds, --coco), or both")
    print_table(lines, {"set": "set", **COLUMNS}, options.json)


if __name__ == "__main__":
    with exit_with_message():
        main()
