"""prepare_dataset.py on trees of the form that the user's pipeline writes, and on what other people bring."""

import csv
import os
import shutil

import cv2
import numpy as np
import pytest
import yaml
from PIL import Image

from amodal_fusion.data.images import read_image, write_image
from amodal_fusion.data.names import print_unportable
from amodal_fusion.data.scenes import read_list, read_scene
from amodal_fusion.data.toy import draw_scene, write_dataset
from amodal_fusion.errors import SceneError
from amodal_fusion.files import WRITTEN, temporary_path
from amodal_fusion.ingest.layouts import find_raw_scenes
from amodal_fusion.ingest.matting import key_background
from amodal_fusion.ingest.raw_scenes import keep_numbers, read_raw_scene
from amodal_fusion.ingest.selection import select_completions
from tests.scripts import run, succeed

SCRIPT = "prepare_dataset.py"


def on_white(completion, rng):
    """As pix2gestalt saves a completion: no alpha, near-white around the object, everything redrawn a little."""
    alpha = cv2.GaussianBlur(completion[..., 3], (0, 0), 0.7)[..., None] / 255.0
    picture = completion[..., :3] * alpha + 250 * (1 - alpha) + rng.normal(0, 2, completion.shape[:2])[..., None]
    return np.clip(picture, 0, 255).astype(np.uint8)


def write_user_scene(folder, seed, comps=12):
    """original, mask (black = hole), partial and 12 comps: 3 objects, their duplicates, tiny and empty ones."""
    folder.mkdir(parents=True)
    rng, scene = np.random.default_rng(seed), draw_scene(seed)
    write_image(folder / "original.png", scene.original)
    write_image(folder / "partial.png", scene.partial)
    write_image(folder / "mask.png", np.where(scene.mask, 0, 255).astype(np.uint8))
    tiny = np.zeros((64, 64, 4), np.uint8)
    tiny[2:4, 2:4] = (200, 0, 0, 255)
    pictures = [*scene.completions, *scene.completions, *scene.completions[:2], tiny, tiny, tiny * 0, tiny * 0]
    for number, picture in enumerate(pictures[:comps], 1):
        write_image(folder / f"comp{number}.png", on_white(picture, rng))


@pytest.fixture
def user_tree(tmp_path):
    """<letter>/<class>/<image id>/…, ids repeat; and one folder of the JPEG layout without a mask."""
    tree = tmp_path / "results"
    for seed, name in enumerate(("a/abbey/00000001", "a/airport/00000001", "b/bakery/00000001", "b/bakery/00000002")):
        write_user_scene(tree / name, seed)
    scene, folder = draw_scene(9), tree / "val_1" / "Places365_val_00000007"
    folder.mkdir(parents=True)
    for suffix, picture in (("", scene.original), ("_partial", scene.partial)):
        Image.fromarray(picture).save(folder / f"{folder.name}{suffix}.jpg", quality=92)
    for number, picture in enumerate(scene.completions, 1):
        write_image(folder / f"{folder.name}_comp{number}.png", on_white(picture, np.random.default_rng(9)))
    return tree


def create(tree, output, *arguments):
    return run(SCRIPT, "create", "--input_dir", tree, "--output_dir", output, "--workers", 1, *arguments)


def rows_of(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_create_turns_user_folders_into_clean_data_set(user_tree, tmp_path):
    data = tmp_path / "data"
    process = create(user_tree, data, "--n_max_completions", 5, "--img_size", 48, "--resize", "--split")
    assert process.returncode == 0, process.stdout + process.stderr
    ids = {"a__abbey__00000001", "a__airport__00000001", "b__bakery__00000001", "b__bakery__00000002",
           "val_1__Places365_val_00000007"}
    assert {path.name for path in data.iterdir() if path.is_dir()} == ids
    assert "4 black in the mask, 1 found from the partial image" in process.stdout
    assert "51 white" in process.stdout
    for scene_id in ids:
        scene = read_scene(data / scene_id, need_original=True)
        seed = 9 if "val_1" in scene_id else sorted(ids).index(scene_id)
        truth = draw_scene(seed).resized((48, 48))
        assert scene.mask.shape == (48, 48)
        assert (scene.mask & truth.mask).sum() / (scene.mask | truth.mask).sum() > 0.85  # JPEG: a pixel wider
        assert not scene.partial[scene.mask].any()
        assert 1 <= len(scene.completions) <= 3  # three objects, each once
        for completion in scene.completions:
            overlaps = [((completion[..., 3] > 127) & (t[..., 3] > 127)).sum()
                        / ((completion[..., 3] > 127) | (t[..., 3] > 127)).sum() for t in truth.completions]
            assert max(overlaps) > 0.85
    rows = [row for row in rows_of(data / "report.csv") if row["scene"] == "a__abbey__00000001"]
    assert len(rows) == 12
    assert {row["reason"].split(" of number")[0] for row in rows} >= {"kept", "duplicate", "empty"}
    assert sorted(row["kept_as"] for row in rows if row["kept_as"]) == ["1", "2", "3"]
    manifest = yaml.safe_load((data / "dataset.yaml").read_text())
    assert manifest["scenes"] == 5 and manifest["image_size"] == [48, 48] and manifest["complete"]
    assert (data / "report.png").stat().st_size > 1000
    train, val = (read_list(data / name, data) for name in ("train_list.txt", "val_list.txt"))
    assert len(train) == 4 and len(val) == 1 and set(train) | set(val) == ids
    succeed(SCRIPT, "check", "--data_dir", data, "--workers", 1)


def test_completions_keep_their_names_and_numbers(user_tree, tmp_path):
    for data, options in ((tmp_path / "renumbered", ()), (tmp_path / "kept", ("--keep_numbers",))):
        assert create(user_tree, data, "--n_max_completions", 3, *options).returncode == 0
        rows = [row for row in rows_of(data / "report.csv") if row["kept_as"] and row["scene"] == "a__abbey__00000001"]
        scene = read_scene(data / "a__abbey__00000001")
        assert {row["file"]: int(row["kept_as"]) for row in rows} == dict(zip(scene.sources, scene.numbers))
        if options:
            assert [f"comp{number}" for number in scene.numbers] == scene.source_names() and max(scene.numbers) > 3
        else:
            assert scene.numbers == [1, 2, 3]
        assert run(SCRIPT, "check", "--data_dir", data, "--workers", 1).returncode == 0
    for sources in (["0.png", "1.png"], ["a/2.png", "b/2.png"], ["cat.png", "comp1.png"]):
        scene, report = draw_scene(0, n=2), {"notes": [], "completions": []}
        scene.sources = sources
        keep_numbers(scene, report)
        assert scene.numbers is None and "cannot be kept" in report["notes"][0]


def test_create_reports_all_bad_scenes_and_keeps_others(user_tree, tmp_path):
    (user_tree / "a/abbey/00000001/comp2.png").write_bytes(b"\x89PNG\r\n")
    (user_tree / "b/bakery/00000002/mask.png").write_bytes(b"")
    write_image(user_tree / "a/airport/00000001/partial.png", draw_scene(77).partial)  # another photo
    data = tmp_path / "data"
    process = create(user_tree, data)
    assert process.returncode == 1 and "60% of the scenes are bad" in process.stderr
    skipped = {row["scene"]: row["fault"] for row in rows_of(data / "skipped.csv")}
    assert set(skipped) == {"a__abbey__00000001", "a__airport__00000001", "b__bakery__00000002"}
    assert "comp2.png" in skipped["a__abbey__00000001"] and "empty file" in skipped["b__bakery__00000002"]
    assert "another photo" in skipped["a__airport__00000001"]
    for scene, fault in skipped.items():  # printed without the scene's folder
        assert f"bad: {scene}: " in process.stdout
        assert fault.splitlines()[0].rpartition("/")[2] in process.stdout
    assert sum(path.is_dir() for path in data.iterdir()) == 2
    assert create(user_tree, tmp_path / "again", "--max_bad", 0.7).returncode == 0


def test_create_continues_where_it_was_interrupted(user_tree, tmp_path):
    data = tmp_path / "data"
    assert create(user_tree, data).returncode == 0
    kept = data / "b__bakery__00000001" / "mask.png"
    before = kept.stat().st_mtime_ns
    for path in (data / "a__abbey__00000001").iterdir():
        path.unlink()
    (data / "a__abbey__00000001").rmdir()
    leftover = temporary_path(data / "scene")  # what a killed run leaves
    leftover.mkdir()
    process = create(user_tree, data)
    assert process.returncode == 0 and "4 already there" in process.stdout
    assert kept.stat().st_mtime_ns == before and (data / "a__abbey__00000001" / "comp1.png").exists()
    assert not leftover.exists()
    process = create(user_tree, data, "--n_max_completions", 2)
    assert process.returncode == 2 and "n_max_completions=5, not 2" in process.stderr
    assert create(user_tree, data, "--n_max_completions", 2, "--overwrite").returncode == 0


def test_missing_parts_are_all_named(tmp_path):
    folder = tmp_path / "results" / "00000020"
    folder.mkdir(parents=True)
    scene = draw_scene(1)
    Image.fromarray(scene.original).save(folder / "00000020.jpg", quality=90)
    Image.fromarray(scene.partial).save(folder / "00000020_partial.jpg", quality=90)
    process = create(tmp_path / "results", tmp_path / "data")
    assert process.returncode == 1
    assert "no completions" in process.stdout and "no mask" in process.stdout
    assert "found from the partial image" in process.stdout


def raw(tmp_path, **pictures):
    """A raw scene of the pictures given by their file names, dots written as '__'."""
    folder = tmp_path / "raw" / "s"
    folder.mkdir(parents=True)
    for name, picture in pictures.items():
        Image.fromarray(picture).save(folder / name.replace("__", "."), quality=95)
    (scene,), faults = find_raw_scenes(tmp_path / "raw")
    assert not faults
    return scene


@pytest.mark.parametrize("inverted", [False, True])
@pytest.mark.parametrize("blank", [0, 255, 128])
def test_polarity_comes_from_the_pixels(tmp_path, inverted, blank):
    scene = draw_scene(2)
    partial = np.where(scene.mask[..., None], blank, scene.original).astype(np.uint8)
    mask = np.where(scene.mask ^ inverted, 255, 0).astype(np.uint8)
    completions = {f"comp{i}__png": c for i, c in enumerate(scene.completions)}
    files = raw(tmp_path, gt__png=scene.original, masked__png=partial, hole__png=mask, **completions)
    found, report = read_raw_scene(files, 5)
    assert np.array_equal(found.mask, scene.mask)
    assert report["hole"] == ("black" if inverted else "white") + " in the mask"
    assert not found.partial[found.mask].any()


def test_partial_is_made_from_original_and_mask(tmp_path):
    scene = draw_scene(2)
    files = raw(tmp_path, image__png=scene.original, mask__png=scene.mask.astype(np.uint8) * 255,
                amodal_1__png=scene.completions[0])
    found, report = read_raw_scene(files, 5, mask_hole="white")
    assert np.array_equal(found.partial, scene.partial) and report["hole"] == "white in the mask (as given)"
    told, _ = read_raw_scene(files, 5, mask_hole="black")
    assert np.array_equal(told.mask, ~scene.mask)


def test_shifted_partial_is_reported(tmp_path):
    scene = draw_scene(2)
    shifted = np.roll(scene.original, 2, 1)
    shifted[scene.mask] = 0
    with pytest.raises(SceneError, match="shifted by 2,0"):
        read_raw_scene(raw(tmp_path, original__png=scene.original, partial__png=shifted,
                           mask__png=scene.mask.astype(np.uint8) * 255, comp1__png=scene.completions[0]), 5)


def test_sizes_that_cannot_be_one_frame_are_reported(tmp_path):
    scene = draw_scene(2)
    with pytest.raises(SceneError, match=r"comp1.png: 32×64, but the scene is 64×64"):
        read_raw_scene(raw(tmp_path, original__png=scene.original, partial__png=scene.partial,
                           mask__png=scene.mask.astype(np.uint8) * 255, comp1__png=scene.completions[0][:, :32]), 5)


@pytest.mark.parametrize(("names", "ids"), [
    (["s/original.png", "s/mask.png", "s/comp1.png"], ["s"]),
    (["x.jpg", "x_mask.png", "x_comp1.png", "y.jpg", "y_mask.png", "y_comp1.png"], ["x", "y"]),
    (["c/x/x.jpg", "c/x/x_partial.jpg", "c/x/x_comp1.png"], ["c__x"]),
    (["가/나 다/gt.png", "가/나 다/hole.png", "가/나 다/completion_2.png"], ["가__나 다"]),
    (["s/image.png", "s/image_mask.png", "s/obj_000.png", "s/obj_000_mask.png"], ["s"]),
    (["s/photo.jpg", "s/readme.txt"], []),
])
def test_scenes_are_found_by_names(tmp_path, names, ids):
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "loop").symlink_to(tmp_path)
    scenes, faults = find_raw_scenes(tmp_path)
    assert [scene.id for scene in scenes] == ids and not faults
    for scene in scenes:
        assert len(scene.completions) == 1 and (scene.mask or scene.partial)


def test_completions_come_in_the_order_of_their_numbers(tmp_path):
    for number in (10, 9, 1, 2):
        (tmp_path / f"comp{number}.png").write_bytes(b"")
    (scene,), _ = find_raw_scenes(tmp_path)
    assert [completion.path.stem for completion in scene.completions] == ["comp1", "comp2", "comp9", "comp10"]


def test_keying_keeps_white_shirt_and_unmixes_edge():
    disc = np.zeros((96, 96, 4), np.uint8)
    y, x = np.mgrid[:96, :96]
    alpha = np.clip(31 - np.hypot(y - 48, x - 48), 0, 1)
    disc[..., :3], disc[..., 3] = (40, 90, 160), np.rint(alpha * 255)
    disc[40:56, 40:56, :3] = 252  # the shirt
    rgb = np.rint(disc[..., :3] * alpha[..., None] + 249 * (1 - alpha[..., None])).astype(np.uint8)
    keyed, kind = key_background(rgb)
    assert kind == "white"
    assert (keyed[40:56, 40:56, 3] == 255).all() and not keyed[:10, :, 3].any()
    assert np.abs(keyed[..., 3] / 255 - alpha).mean() < 0.005
    edge = (keyed[..., 3] > 30) & (keyed[..., 3] < 200)
    assert edge.any() and np.abs(keyed[edge, :3].astype(int) - (40, 90, 160)).max() < 20  # no white halo


def test_keying_finds_black_and_leaves_photos_alone():
    scene = draw_scene(4)
    assert key_background(scene.original)[1] == "opaque"
    black = (scene.completions[0][..., :3] * (scene.completions[0][..., 3:] > 0)).astype(np.uint8)
    keyed, kind = key_background(black)
    assert kind == "black" and np.array_equal(keyed[..., 3] > 0, scene.completions[0][..., 3] > 0)
    assert (key_background(scene.original, "opaque")[0][..., 3] == 255).all()


def test_selection_prefers_new_coverage_and_better_samples():
    scene = draw_scene(5, n=2)
    worse = scene.completions[0].copy()
    worse[..., :3] = np.clip(worse[..., :3].astype(int) + 12, 0, 255) * (worse[..., 3:] > 0)
    whole = np.dstack([scene.original, np.full((64, 64), 255, np.uint8)])
    kept, rows = select_completions([whole, worse, *scene.completions], scene.mask, scene.partial, 3)
    assert set(kept[:2]) == {2, 3} and kept[2] == 0  # the whole frame last, the worse sample not at all
    assert rows[1]["reason"].startswith("duplicate of number")


def test_split_is_stable_keeps_groups_and_covers_all(tmp_path):
    data = write_dataset(tmp_path / "data", train=16, val=4)
    for number, scene_id in enumerate(("photo1_a", "photo1_b", "photo1_c", "photo2_a", "photo2_b")):
        (data / f"train_{number}").rename(data / scene_id)
    arguments = ("split", "--data_dir", data, "--val_fraction", 0.3, "--test_fraction", 0.2,
                 "--group_by", r"(photo\d)_")
    names = ("train_list.txt", "val_list.txt", "test_list.txt")

    def lists(seed):
        succeed(SCRIPT, *arguments, "--seed", seed)
        return [read_list(data / name, data) for name in names]

    first, again, other = lists(0), lists(0), lists(1)
    assert first == again != other
    members = [scene_id for members in first for scene_id in members]
    assert len(members) == len(set(members)) == 20 and len(first[1]) >= 6 and len(first[2]) >= 4
    for photo in ("photo1", "photo2"):
        assert sum(any(scene_id.startswith(photo) for scene_id in members) for members in first) == 1


def test_one_photo_does_not_fill_the_validation_list(tmp_path):
    data = write_dataset(tmp_path / "data", train=30, val=0)
    for number in range(20):
        (data / f"train_{number}").rename(data / f"photo_{number}")
    for seed in range(4):
        said = succeed(SCRIPT, "split", "--data_dir", data, "--group_by", "(photo)_", "--seed", seed).stdout
        assert "27 in train_list.txt, 3 in val_list.txt" in said
    said = succeed(SCRIPT, "split", "--data_dir", data, "--group_by", "(photo|train)_").stdout
    assert "20 in train_list.txt, 10 in val_list.txt" in said and "val_list.txt has more than its share, 0.1" in said


def test_single_photo_leaves_validation_empty_with_a_message(tmp_path):
    data = write_dataset(tmp_path / "data", train=3, val=0)
    photo = (data / "train_0" / "original.png").read_bytes()
    for scene_id in ("train_1", "train_2"):
        (data / scene_id / "original.png").write_bytes(photo)
    said = succeed(SCRIPT, "split", "--data_dir", data).stdout
    assert "nothing left for val_list.txt: the 3 scenes" in said and "--val_dir" in said
    assert "--val_dir" in succeed(SCRIPT, "split", "--data_dir", data, "--group_by", "train").stdout
    assert (data / "val_list.txt").read_text() == ""
    assert "names no scene" not in run(SCRIPT, "check", "--data_dir", data, "--workers", 1).stdout


def test_check_names_every_fault(tmp_path):
    data = write_dataset(tmp_path / "data")
    assert run(SCRIPT, "check", "--data_dir", data, "--workers", 1).returncode == 0
    victim = data / "train_0" / "comp1.png"
    victim.write_bytes(victim.read_bytes()[:200])
    write_image(data / "train_1" / "mask.png", np.zeros((64, 64), np.uint8))
    write_image(data / "train_2" / "original.png", np.zeros((64, 32, 3), np.uint8))
    inverted = 255 - read_image(data / "val_0" / "mask.png", "L")
    write_image(data / "val_0" / "mask.png", inverted)
    write_image(data / "val_1" / "comp1.png", np.full((64, 64, 3), 255, np.uint8))
    (data / "val_list.txt").write_text("val_0\nval_0\n../secret\nnowhere\nval_1\n")
    process = run(SCRIPT, "check", "--data_dir", data, "--workers", 1)
    assert process.returncode == 1
    for complaint in ("train_0/comp1.png: damaged", "train_1/mask.png: no hole", "original.png: 32×64, but partial.png",
                      "val_0/mask.png: inverted", "val_1/comp1.png: no alpha", "'val_0' is listed twice",
                      "'../secret' is a path", "there is no folder"):
        assert complaint in process.stdout, complaint


def test_wrong_usage_exits_with_2(tmp_path):
    inside = ("create", "--input_dir", tmp_path, "--output_dir", tmp_path / "x")
    missing = ("create", "--input_dir", tmp_path / "no", "--output_dir", tmp_path / "x")
    for arguments in (("create",), inside, missing, ("split", "--data_dir"), ("create", "--inputdir", "x"), ()):
        process = run(SCRIPT, *arguments)
        assert process.returncode == 2 and "Traceback" not in process.stderr


@pytest.mark.parametrize("name", [".labels.json", ".git/config", "__pycache__/a.pyc", "notes.txt"])
def test_files_of_the_user_survive_create(name, user_tree, tmp_path):
    data = tmp_path / "data"
    mine = [data / ".tmp-backup" / "thesis.txt", data / ".notes.tmp.txt", data / "a__abbey__00000001" / name]
    assert create(user_tree, data).returncode == 0
    for path in mine:
        path.parent.mkdir(exist_ok=True)
        path.write_text("mine")
    for path in user_tree.rglob("*.png"):
        os.utime(path, (1, 1))
    process = create(user_tree, data)
    assert process.returncode == 2 and "was not written by this program" in process.stderr
    assert all(path.read_text() == "mine" for path in mine)
    mine.pop().unlink()
    if "/" in name:
        (data / "a__abbey__00000001" / name).parent.rmdir()
    assert create(user_tree, data).returncode == 0 and all(path.read_text() == "mine" for path in mine)


def test_data_set_of_earlier_version_continues(user_tree, tmp_path):
    data = tmp_path / "data"
    assert create(user_tree, data, "--split").returncode == 0
    for record in data.rglob(WRITTEN):  # earlier versions kept none
        record.unlink()
    process = create(user_tree, data)
    assert process.returncode == 0 and "5 already there" in process.stdout, process.stderr
    process = create(user_tree, data, "--split")
    assert process.returncode == 2 and "train_list.txt: was not written" in process.stderr
    before = {path: path.read_bytes() for path in data.rglob("*.*")}
    os.utime(user_tree / "a" / "abbey" / "00000001" / "comp1.png", (1, 1))
    for more in ((), ("--overwrite",)):
        process = create(user_tree, data, *more)
        assert process.returncode == 2 and "has no record of what this program wrote" in process.stderr
        assert before == {path: path.read_bytes() for path in data.rglob("*.*")}
    (data / "a__abbey__00000001").rename(tmp_path / "elsewhere")
    (data / "a__abbey__00000001").symlink_to(tmp_path / "elsewhere")
    process = create(user_tree, data)
    assert process.returncode == 2 and "a link or a file" in process.stderr
    (data / "a__abbey__00000001").unlink()
    assert create(user_tree, data).returncode == 0 and (data / "a__abbey__00000001" / "mask.png").exists()


def test_overwrite_trusts_no_foreign_dataset_yaml(user_tree, tmp_path):
    data = tmp_path / "yolo"
    shutil.copytree(user_tree / "a" / "abbey" / "00000001", data / "mine")
    (data / "dataset.yaml").write_text("path: .\ntrain: images\nnames: [car]\n")
    before = {path: path.read_bytes() for path in data.rglob("*.*")}
    for more in ((), ("--overwrite",)):
        process = create(user_tree, data, *more)
        assert process.returncode == 2 and "dataset.yaml: was not written" in process.stderr
        assert before == {path: path.read_bytes() for path in data.rglob("*.*")}


@pytest.mark.parametrize("ignores_case", [False, True])
def test_scene_ids_of_other_systems_are_named(tmp_path, ignores_case):
    flat, data = tmp_path / "flat", tmp_path / "data"
    write_user_scene(tmp_path / "raw", 0, comps=3)
    flat.mkdir()
    for name in ("Hall", "hall", "NUL", "end.", "plain"):  # files whose names differ only in case, too
        for path in (tmp_path / "raw").iterdir():
            shutil.copy(path, flat / f"{name}_{path.name}")
    data.mkdir()
    (data / ".lock").touch()
    if ignores_case:
        os.link(data / ".lock", data / ".LOCK")  # as such a disk shows it
    process = create(flat, data, "--max_bad", 1)
    assert process.returncode == 0, process.stderr
    made = {path.name for path in data.iterdir() if path.is_dir()}
    assert made == {"NUL", "end.", "plain"} | ({"Hall", "hall"} if not ignores_case else set())
    assert "2 scene ids cannot be folders on Windows, as NUL" in process.stdout
    assert ("differ from another only in case, as hall and Hall" in process.stdout) != ignores_case
    assert ("hall and Hall would be one folder" in process.stdout) == ignores_case
    process = run(SCRIPT, "split", "--data_dir", data)
    assert ("as hall and Hall" in process.stdout) != ignores_case and "as NUL" in process.stdout


def test_only_names_that_windows_refuses_are_noted(capsys):
    print_unportable(["console", "com", "com10", "nul_1", "a.b", "LPTX", "사진"])
    assert not capsys.readouterr().out
    for name in ("con", "Com1", "aux.x", "a?b", "a:b", "what ...", "a\\b"):
        print_unportable([name])
        assert name in capsys.readouterr().out


@pytest.mark.parametrize("emptied", ["made_from.csv", "report.csv", "skipped.csv", "train_list.txt", WRITTEN,
                                     "b__bakery__00000002/mask.png", "b__bakery__00000002/comp1.png"])
def test_files_that_a_power_failure_emptied_are_ours(emptied, user_tree, tmp_path):
    data = tmp_path / "data"
    assert create(user_tree, data, "--split").returncode == 0
    whole = (data / emptied).read_bytes()
    (data / emptied).write_bytes(b"")
    process = create(user_tree, data, *["--split"] * (emptied != WRITTEN))
    assert process.returncode == 0, process.stderr
    assert "Traceback" not in process.stderr and (data / emptied).stat().st_size > 0
    if emptied in ("made_from.csv", "train_list.txt") or "/" in emptied:
        assert sorted((data / emptied).read_bytes().splitlines()) == sorted(whole.splitlines())
    assert "5 already there" in create(user_tree, data).stdout


def test_empty_files_of_others_stay(user_tree, tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    (data / "made_from.csv").touch()
    process = create(user_tree, data)
    assert process.returncode == 2 and "made_from.csv: was not written" in process.stderr
    assert sorted(path.name for path in data.iterdir()) == ["made_from.csv"]
