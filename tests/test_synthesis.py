"""Composed scenes: deterministic, with holes and completions as asked for."""

import json
import shutil
import subprocess
import sys

import cv2
import numpy as np
import pytest
import yaml
from PIL import Image

from amodal_fusion.data.datasets import SynthesizedDataset
from amodal_fusion.data.images import read_image, write_image
from amodal_fusion.data.masks import HOLES, LARGEST, cut_hole
from amodal_fusion.data.scenes import read_list, read_scene
from amodal_fusion.data.toy import draw_scene, write_dataset
from amodal_fusion.errors import SceneError
from amodal_fusion.synthesis.assets import Material, read_cutout
from amodal_fusion.synthesis.completions import SceneObject, as_received, complete
from amodal_fusion.synthesis.composition import add_clutter, compose_cutouts
from amodal_fusion.synthesis.degradations import redraw
from amodal_fusion.synthesis.synthesizer import Synthesizer
from experiments.completion_statistics import compare, seen_by_colour, seen_by_order
from tests.conftest import SMALL, records
from tests.scripts import ROOT, run, succeed


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    """Cut-outs, backgrounds, and photos with COCO annotations of two rectangles each."""
    folder = tmp_path_factory.mktemp("material")
    for name in ("objects", "backgrounds", "coco"):
        (folder / name).mkdir()
    content = {"images": [], "annotations": []}
    for seed in range(6):
        scene = draw_scene(seed, 80, 3)
        write_image(folder / "objects" / f"{seed}.png", scene.completions[0])
        write_image(folder / "backgrounds" / f"{seed}.png", draw_scene(seed + 50, (70, 90), 4).original)
        write_image(folder / "coco" / f"{seed}.png", scene.original)
        content["images"].append({"id": seed, "file_name": f"{seed}.png"})
        for x in (10, 38):
            polygon = [x, 20, x + 28, 20, x + 28, 60, x, 60]
            content["annotations"].append({"image_id": seed, "segmentation": [polygon], "iscrowd": 0})
    (folder / "coco" / "instances.json").write_text(json.dumps(content))
    return folder


def synthesizer(material, source="cut-outs", **options):
    photos = {"backgrounds": material / "backgrounds"}
    sources = {"cut-outs": {"objects": material / "objects", **photos}, "photos": photos,
               "coco": {"coco": material / "coco" / "instances.json"}}
    return Synthesizer(Material(**sources[source]), img_size=64, **options)


def test_unusable_annotations_are_reported(material, tmp_path):
    content = json.loads((material / "coco" / "instances.json").read_text())
    shutil.copytree(material / "coco", tmp_path / "coco" / "inside")
    path = tmp_path / "coco" / "inside.json"  # photos in a folder of its name
    for annotation in content["annotations"][:3]:
        annotation["segmentation"] = {"size": [80, 80], "counts": [100, 6300]}
    path.write_text(json.dumps(content))
    annotated = Material(coco=path)
    assert any("3 annotations are run lengths (RLE), not read" in fault for fault in annotated.faults)
    assert ("inside.json", path.stat().st_size) in annotated.sizes()
    for annotation in content["annotations"]:
        annotation["segmentation"] = {"size": [80, 80], "counts": [100, 6300]}
    path.write_text(json.dumps(content))
    with pytest.raises(SceneError, match=r"its 12 annotations are run lengths \(RLE\); convert"):
        Material(coco=path)

def test_annotations_fit_their_photo_or_are_named(tmp_path):
    """Annotations of a photo of half the size, and of a rotated photo as it is stored, lie on the object."""
    photo = np.full((80, 120, 3), 40, np.uint8)
    photo[10:40, 20:90] = (200, 60, 30)
    polygon = [20, 10, 90, 10, 90, 40, 20, 40]
    cases = {"same": (photo, 1, True), "halved": (photo[::2, ::2], 1, True), "unsaid": (photo, 1, False),
             "other": (photo[:50], 1, True)} | {f"turned{turn}": (photo, turn, True) for turn in (5, 6, 7, 8)}
    content = {"images": [], "annotations": []}
    for number, (name, (picture, turn, said)) in enumerate(cases.items()):
        exif = Image.Exif()
        exif[0x0112] = turn
        Image.fromarray(picture).save(tmp_path / f"{name}.png", exif=exif)
        size = {"height": 80, "width": 120} if said else {}
        content["images"].append({"id": number, "file_name": f"{name}.png", **size})
        content["annotations"].append({"image_id": number, "segmentation": [polygon]})
    (tmp_path / "a.json").write_text(json.dumps(content))
    photos = Material(coco=tmp_path / "a.json").photos
    assert len(photos) == len(cases)
    for annotations in photos:
        if annotations.photo.stem == "other":
            with pytest.raises(SceneError, match="120×50, but its annotations are of a picture of 120×80"):
                annotations.upright()
            continue
        shown = read_image(annotations.photo, "RGB")
        inside = np.zeros(shown.shape[:2], np.uint8)
        for points in annotations.upright()[0]:
            cv2.fillPoly(inside, [np.rint(points * shown.shape[1::-1]).astype(np.int32)], 1)
        is_object = shown[..., 0] > 120
        assert (is_object & (inside > 0)).sum() > 0.9 * (is_object | (inside > 0)).sum(), annotations.photo


def test_cutouts_without_alpha_are_keyed_or_named(material, tmp_path):
    objects = tmp_path / "objects"
    objects.mkdir()
    for name in ("canvas", "mask", "white", "alpha"):
        rgba = draw_scene(3, 80, 3).completions[0]
        inside = rgba[..., 3:] > 0
        picture = {"canvas": draw_scene(9, 80).original, "mask": np.where(inside, 255, 0).repeat(3, 2),
                   "white": np.where(inside, rgba[..., :3], 250), "alpha": rgba}[name].astype(np.uint8)
        write_image(objects / f"{name}.png", picture)
    Image.open(objects / "white.png").save(objects / "jpeg.jpg", quality=92)
    for name, usable in (("canvas.png", False), ("mask.png", False), ("white.png", True), ("jpeg.jpg", True),
                         ("alpha.png", True)):
        picture = read_cutout(objects / name, 512)
        assert (picture is not None) == usable, name
        if usable:
            assert (picture[..., 3] > 127).mean() < 0.9
    process = succeed("prepare_dataset.py", "synthesize", "--objects", objects, "--backgrounds",
                      material / "backgrounds", "--output_dir", tmp_path / "data", "--n_scenes", 6, "--img_size", 64,
                      "--workers", 1)
    for line in (f"left out: {objects / 'canvas.png'}: no alpha, and no flat background",
                 f"left out: {objects / 'mask.png'}: only black and white",
                 f"note: {objects / 'jpeg.jpg'}: no alpha, its white background was cut out"):
        assert line in process.stdout, process.stdout


@pytest.mark.parametrize("source", ["cut-outs", "coco", "photos"])
@pytest.mark.parametrize("style", ["copy", "redraw", "pix2gestalt"])
def test_scenes_depend_only_on_seed_and_index(material, style, source):
    make = synthesizer(material, source, style=style, seed=3)
    for index in range(6):
        scene = make(index)
        assert 0.04 <= scene.mask.mean() <= LARGEST and 1 <= len(scene.completions) <= 5
        assert not scene.partial[scene.mask].any()
        assert np.array_equal(scene.partial[~scene.mask], scene.original[~scene.mask])
        assert any((c[..., 3] > 127)[scene.mask].any() for c in scene.completions)
        again = synthesizer(material, source, style=style, seed=3)(index)
        assert all(np.array_equal(a, b) for a, b in zip(scene.completions, again.completions))
        assert np.array_equal(scene.original, again.original) and np.array_equal(scene.mask, again.mask)
    other = synthesizer(material, source, style=style, seed=4)(0)
    assert not np.array_equal(make(0).original, other.original)


def test_only_the_copy_style_keeps_pixels_exactly(material):
    def shares(style):
        """Of the visible pixels: those that are exactly the photo's, and those that are nearly."""
        exact, near = [], []
        for index in range(12):
            scene = synthesizer(material, style=style)(index)
            for completion in scene.completions:
                seen = (completion[..., 3] == 255) & ~scene.mask
                if seen.sum() > 50:
                    error = np.abs(completion[seen, :3].astype(int) - scene.original[seen]).max(1)
                    exact.append((error == 0).mean())
                    near.append((error < 26).mean())
        return np.mean(exact), np.mean(near)

    exact, near = shares("copy")
    assert exact > 0.1 and near > 0.4
    assert shares("pix2gestalt")[0] < 0.05


def test_received_photos_are_nearly_exact():
    scene = draw_scene(0, 64, 3)
    whole = scene.completions[0]
    item = SceneObject(whole, whole[..., 3] > 127, True)
    exact = soft = 0
    for seed in range(40):
        photo, (received,) = as_received(scene.original, [item], np.random.default_rng(seed))
        assert np.abs(photo.astype(int) - scene.original).mean() < 10
        exact += np.array_equal(photo, scene.original) and np.array_equal(received.whole, whole)
        alphas = [((w[..., 3] > 0) & (w[..., 3] < 255)).sum() for w in (received.whole, whole)]
        soft += alphas[0] > alphas[1]
        inside = (received.whole[..., 3] > 0) & (whole[..., 3] == 255)
        assert np.array_equal(received.whole[inside, :3], whole[inside, :3])
        beyond = (received.whole[..., 3] > 0) & (whole[..., 3] == 0)
        if beyond.any():  # colours go on, the transparent black does not come in
            assert received.whole[beyond, :3].max(1).mean() > 0.5 * whole[whole[..., 3] == 255, :3].max(1).mean()
    assert 5 <= exact <= 20 and 8 <= soft <= 30


@pytest.mark.parametrize("policy", HOLES)
def test_holes_lie_on_objects_and_keep_their_bounds(policy):
    cover = np.zeros((64, 64), int)
    cover[20:44, 20:44] = 2
    rng = np.random.default_rng(0)
    holes = [hole for hole in (cut_hole(policy, cover, cover > 0, 0.05, rng) for _ in range(60)) if hole is not None]
    assert len(holes) > 10
    assert all(0.05 <= hole.mean() <= LARGEST for hole in holes)
    assert np.mean([(hole & (cover > 0)).any() for hole in holes]) > 0.9
    if policy not in ("centre_50", "centre_80"):
        assert len({hole.tobytes() for hole in holes}) > 5
    if policy == "centre":
        assert all(abs(np.mean(axis) - 31.5) <= 1 for hole in holes for axis in np.nonzero(hole))


def test_synthesize_gives_same_files_for_any_workers(material, tmp_path):
    arguments = ("--objects", material / "objects", "--backgrounds", material / "backgrounds", "--n_scenes", 6,
                 "--img_size", 64, "--seed", 5, "--val_fraction", 0.3)
    for workers in (1, 2):
        succeed("prepare_dataset.py", "synthesize", *arguments, "--output_dir", tmp_path / str(workers), "--workers",
                workers)
    one, two = tmp_path / "1", tmp_path / "2"
    files = sorted(path.relative_to(one) for path in one.rglob("*.png") if path.name != "preview.png")
    assert len(files) >= 6 * 4
    assert all((one / file).read_bytes() == (two / file).read_bytes() for file in files)
    assert len(read_list(one / "train_list.txt", one)) == 4 and (one / "preview.png").exists()
    assert yaml.safe_load((one / "dataset.yaml").read_text())["options"]["seed"] == 5
    read_scene(one / "synthetic_0000000", need_original=True)
    assert run("prepare_dataset.py", "check", "--data_dir", one, "--workers", 1).returncode == 0


def test_training_on_the_fly(material, tmp_path):
    data = write_dataset(tmp_path / "data", train=1)
    losses = []
    for batch, accumulate in ((4, 1), (2, 2)):  # the same scenes in the same steps, also when they are used twice
        folder = tmp_path / f"run{batch}"
        succeed("amodal_fusion_transformer.py", "--data_dir", data, *SMALL, "--lpips_weight", 0, "--synthesize",
                "--objects", material / "objects", "--backgrounds", material / "backgrounds", "--scenes_per_epoch", 48,
                "--epochs", 1, "--repeat", 2, "--batch_size", batch, "--accumulate", accumulate, "--checkpoint_dir",
                folder)
        assert (folder / "best_model.pth").exists()
        losses.append([record["l1"] for record in records(folder)])
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)


def test_a_step_mixes_new_and_repeated_scenes():
    """Two processes with two loaders each, batches of 4, three epochs that are no multiple of anything."""
    made, scene = [], draw_scene(0, 32, 2)

    def make(number):
        made.append(number)
        return scene

    make.n_max, make.seed = 2, 0
    count, repeat, batch, loaders = 8 * 150 + 3, 4, 8, 2
    shares = {(rank, loader): SynthesizedDataset(make, count, repeat, batch) for rank in (0, 1)
              for loader in range(loaders)}
    new = np.zeros((3, 150, 2), int)  # scenes that a process makes for a step
    for epoch, step, rank in np.ndindex(new.shape):
        before, loader = len(made), shares[rank, step % loaders]
        for index in range(step * batch + rank, (step + 1) * batch, 2):
            loader.read(epoch, index)
        new[epoch, step, rank] = len(made) - before
    assert len(made) == len(set(made))  # every loader still has what it made
    assert (new[0, :16] == 4).all() and (new[0, 48:] == 1).all() and (new[1:].mean((0, 1)) < 1.1).all()
    assert max(len(loader.made) for loader in shares.values()) <= 16 * batch / 4


@pytest.mark.parametrize(("sources", "complaint"), [
    ({}, "nothing to compose"),
    ({"objects": "empty", "backgrounds": "backgrounds"}, "no pictures in it"),
    ({"coco": "objects/0.png"}, "not a COCO annotation file"),
])
def test_missing_material_is_named(material, sources, complaint):
    (material / "empty").mkdir(exist_ok=True)
    with pytest.raises(SceneError, match=complaint):
        Material(**{name: material / path for name, path in sources.items()})


def test_clutter_lies_on_objects_beside_the_hole(material):
    make, rng = synthesizer(material), np.random.default_rng(0)
    changed = 0
    for _ in range(20):
        drawn = compose_cutouts(make.material.cutouts, make.material.backgrounds, 64, rng)
        if drawn is None:
            continue
        photo, objects, _ = drawn
        mask = np.zeros(photo.shape[:2], bool)
        mask[20:36, 20:36] = True
        cluttered, fewer = add_clutter(photo, objects, mask, make.material.cutouts, rng)
        assert np.array_equal(cluttered[mask], photo[mask])
        for before, after in zip(objects, fewer):
            assert np.array_equal(before.whole, after.whole)
            assert not (after.visible & ~before.visible).any()
        changed += (cluttered != photo).any()
    assert changed >= 5


def test_a_composition_knows_its_objects(material):
    """The photo is the front objects' own pixels."""
    exact, named = [], 0
    for index in range(8):
        composition = synthesizer(material, style="copy", seed=2).compose(index)
        scene, objects = composition.scene, composition.objects
        assert np.array_equal(scene.original, synthesizer(material, style="copy", seed=2)(index).original)
        assert np.sum([item.visible for item in objects], 0).max() == 1
        for item in objects:
            inside = item.visible & (item.whole[..., 3] == 255)
            exact.append((scene.original[inside] == item.whole[inside, :3]).all(-1).mean())  # but for others' soft rims
        for completion, number in zip(scene.completions, composition.shown, strict=True):
            if number is not None:
                alphas = completion[..., 3] > 127, objects[number].whole[..., 3] > 127
                named += (alphas[0] & alphas[1]).sum() > 0.5 * (alphas[0] | alphas[1]).sum()
    assert np.nanmedian(exact) > 0.8 and named >= 8


def test_a_copied_rim_has_photo_colours():
    """Where alpha is soft the photo shows a mixture, and that is what a completer saw."""
    rng = np.random.default_rng(0)
    alpha = np.zeros((64, 64), np.uint8)
    alpha[20:44, 20:44] = 128
    alpha[22:42, 22:42] = 255
    whole = np.dstack([np.full((64, 64, 3), 200, np.uint8), alpha])
    photo = np.rint(60 + alpha[..., None] / 255 * (whole[..., :3] - 60.0)).astype(np.uint8)
    item = SceneObject(whole, alpha > 127, True)
    mask = np.zeros((64, 64), bool)
    mask[:, 40:] = True
    rim = (alpha == 128) & ~mask
    kept = 0
    for _ in range(20):
        copied = complete(photo, [item], mask, "copy", lambda _: photo, rng)[0][0]
        kept += np.array_equal(copied[rim, :3], photo[rim])
    assert kept >= 15  # careless completers damage it


def test_held_out_files_are_not_trained_on(material, tmp_path):
    objects, output = tmp_path / "objects", tmp_path / "held"
    objects.mkdir()
    names = ["a.png", *(f"b{i}.png" for i in range(7)), "cat_left.png", "cat_right.png",
             *(f"d{i}.png" for i in range(6)), "e.png", "f.png"]  # every eighth from the first: a, cat_left, e
    for seed, name in enumerate(names):
        write_image(objects / name, draw_scene(seed + 20, 80, 1).completions[0])
    write_image(objects / "b3.png", draw_scene(20, 80, 1).completions[0])  # a.png once more
    photos = tmp_path / "photos"
    photos.mkdir()
    for seed in range(10):
        write_image(photos / f"{seed}.png", draw_scene(seed + 50, (70, 90), 4).original)
    options = ("--objects", objects, "--backgrounds", photos, "--coco", material / "coco" / "instances.json",
               "--output_dir", output, "--max_side", 40)
    command = [sys.executable, "-m", "experiments.hold_out", *map(str, options), "--subject", "([a-z]+)_"]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "a.png, a copy of b3.png" in process.stdout and "cat_left.png, whose subject" in process.stdout
    held_out, kept = ({path.name for path in (output / part / "objects").iterdir()} for part in ("val", "train"))
    assert held_out == {"e.png"} and kept == set(names) - {"a.png", "cat_left.png", "e.png"}
    for part, ids in (("val", [0]), ("train", [1, 2, 3, 4, 5])):
        content = json.loads((output / part / "coco" / "instances.json").read_text())
        assert [photo["id"] for photo in content["images"]] == ids
        assert {a["image_id"] for a in content["annotations"]} == set(ids)
        assert content["annotations"][0]["segmentation"] == [[5, 10, 19, 10, 19, 30, 5, 30]]  # half of what it was
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert process.returncode == 2 and "exists; remove it" in process.stderr
    command = [sys.executable, "-m", "experiments.hold_out", *map(str, options[4:6]), "--output_dir", tmp_path / "one"]
    subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)  # of one kind alone
    assert sorted(path.name for path in (tmp_path / "one" / "train").iterdir()) == ["coco"]


def test_experiments_name_what_is_missing(tmp_path):
    for name, *options in (("hold_out", "--objects", ROOT / "docs", "--output_dir", tmp_path / "none"),
                           ("other_blends", "--data_dir", tmp_path, "--lpips_weights", tmp_path / "none.pth")):
        command = [sys.executable, "-m", f"experiments.{name}", *map(str, options)]
        process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        assert process.returncode == 1 and process.stderr.startswith("error: "), process.stderr


@pytest.fixture
def textured():
    """A photo with smooth texture, (128,128,3) uint8."""
    noise = np.random.default_rng(0).uniform(0, 255, (128, 128, 3)).astype(np.float32)
    photo = cv2.GaussianBlur(noise, (0, 0), 2)
    return np.clip(4 * (photo - 127.5) + 120, 10, 240).astype(np.uint8)


def test_statistics_find_shifts_of_colour_and_place(textured):
    alpha = np.zeros((128, 128), np.uint8)
    alpha[20:108, 20:108] = 255
    moved = np.roll(textured, 2, 1) + np.uint8(6)
    row = compare(textured, np.dstack([moved, alpha]), alpha > 0)
    assert row["shift"] == pytest.approx(6, abs=1) and row["registration"] == pytest.approx(2, abs=0.2)
    assert row["sharpness"] == pytest.approx(1, abs=0.1) and row["aligned"] < 0.3 * row["residue"]
    blurred = cv2.GaussianBlur(textured, (0, 0), 2)
    row = compare(textured, np.dstack([blurred, alpha]), alpha > 0)
    assert row["sharpness"] < 0.6 and row["registration"] < 0.2 and row["shift"] < 1
    assert compare(textured, np.dstack([textured, alpha]), alpha > 300) is None


def test_statistics_compare_visible_parts(textured):
    front, behind = (np.zeros((128, 128, 4), np.uint8) for _ in range(2))
    front[40:100, 60:120] = behind[20:110, 10:90] = 255
    front[..., :3] = textured
    behind[..., :3] = textured
    behind[40:100, 60:90, :3] ^= 255  # what it invents under the front one
    overlap = np.zeros((128, 128), bool)
    overlap[40:100, 60:90] = True
    covered = behind[..., 3] > 0
    _, by_order = seen_by_order([front, behind], [[], [0]])
    _, by_colour = seen_by_colour(textured, [front, behind], [0, (overlap & covered).sum() / covered.sum()])
    assert np.array_equal(by_order, covered & ~overlap)
    assert not (by_colour & overlap).any() and by_colour.sum() > 0.9 * by_order.sum()


def test_completion_statistics_prints_a_table(material, textured, tmp_path):
    folder = tmp_path / "layers" / "some_1"
    folder.mkdir(parents=True)
    write_image(folder / "photo.png", textured)
    write_image(folder / "obj_000.png", np.dstack([textured, np.full((128, 128), 255, np.uint8)]))
    command = [sys.executable, "-m", "experiments.completion_statistics", "--layers", tmp_path / "layers", "--objects",
               material / "objects", "--backgrounds", material / "backgrounds", "--n_scenes", 2, "--img_size", 64]
    process = subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True, check=True)
    assert "| layers/some | 1 | 0.00 (0.00–0.00) |" in process.stdout
    assert process.stdout.count("| style ") == 6
    (folder / "meta.json").write_text("[")
    process = subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True, check=False)
    assert process.returncode == 1 and "meta.json: not JSON" in process.stderr


def test_a_weak_redraw_stays_near_the_photo(textured):
    """Within the range measured on real diffusion completions."""
    rgba = np.dstack([textured, np.full((128, 128), 255, np.uint8)])
    window, seen = (slice(0, 128), slice(0, 128)), np.ones((128, 128), bool)
    rng = np.random.default_rng(0)
    rows = [compare(textured, redraw(rgba.copy(), window, 128, rng, strong=False), seen) for _ in range(20)]
    assert 0.1 < np.median([row["shift"] for row in rows]) < 2
    assert np.median([row["registration"] for row in rows]) < 1
    assert 0.6 < np.median([row["sharpness"] for row in rows]) < 1.6
