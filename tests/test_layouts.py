"""What `create` makes of every layout in its table, of names it cannot use, and of folders that are nobody's data."""

import csv
import os
import unicodedata
from pathlib import Path

import numpy as np
import pytest

from amodal_fusion.data.images import write_image
from amodal_fusion.data.scenes import read_list, read_scene
from amodal_fusion.data.toy import draw_scene, write_dataset
from amodal_fusion.errors import SceneError
from amodal_fusion.ingest.hole_cutting import NewHole, detect_masked_photo
from amodal_fusion.ingest.layout_table import BY_ROLES, LAYOUTS
from amodal_fusion.ingest.layouts import RawScene, find_raw_scenes
from amodal_fusion.ingest.raw_scenes import read_raw_scene
from amodal_fusion.ingest.report import Summary, print_report
from amodal_fusion.ingest.roles import sort_into_roles
from tests.layout_trees import Tree, completion_dataset, write_tree
from tests.scripts import ROOT, run, succeed

SCRIPT = "prepare_dataset.py"
OWN_HOLE = {"completion_dataset", "completion_dataset_debug", "flat", "enhanced"}  # and segment_all__img1


def create(tree, output, *arguments):
    return run(SCRIPT, "create", "--input_dir", tree, "--output_dir", output, "--workers", 1, *arguments)


def skipped(data):
    with open(data / "skipped.csv", newline="", encoding="utf-8") as file:
        return {row["scene"]: row["fault"] for row in csv.DictReader(file)}


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    folder = tmp_path_factory.mktemp("results")
    return folder, write_tree(folder)


def overlap(one, other):
    return (one & other).sum() / max(1, (one | other).sum())


def test_one_command_reads_all_layouts(tree, tmp_path):
    folder, drawn = tree
    data = tmp_path / "data"
    process = create(folder, data, "--photos", folder / "photos", "--cut_hole", "box", "--split")
    assert process.returncode == 0, process.stdout + process.stderr
    lines = [line for line in process.stdout.splitlines() if line.startswith("layout ")]
    assert len(lines) == len({layout.name for layout in LAYOUTS} | {BY_ROLES})
    assert lines == (ROOT / "tests" / "layout_report.txt").read_text(encoding="utf-8").splitlines(), "\n".join(lines)
    documented = (ROOT / "docs" / "formats.md").read_text(encoding="utf-8")
    assert not [layout.name for layout in LAYOUTS if layout.name.split(",")[0].split(" --")[0] not in documented]

    ids = {path.name for path in data.iterdir() if path.is_dir()}
    assert ids == {
        "completion_dataset__a__abbey__00000001", "completion_dataset_debug__a__abbey__00000001", "flat__00000007",
        "flat__00000008", "enhanced__Places365_test_00000138", "auto_process__00000004", "auto_process__0001",
        "single__138",
        "segment_all__img1", "segment_all__img2", "deocclusion__image_0703", "k8xu__street", "saraao__kitchen",
        "saraao_one_object__hall", "qwen__poster", "qwen__card", "layerd__banner", "art__0", "see_through__girl",
        "layer_diffuse__desk", "agentic__0"}
    for scene_id in ids:
        scene = read_scene(data / scene_id, need_original=True)
        truth = min(drawn, key=lambda t: np.abs(scene.original.astype(int) - t.photo).mean())
        jpeg = scene_id.split("__")[0] in ("flat", "saraao")
        assert np.abs(scene.original.astype(int) - truth.photo).mean() < (6 if jpeg else 0.01), scene_id
        assert not scene.partial[scene.mask].any()
        if scene_id.split("__")[0] in OWN_HOLE or scene_id == "segment_all__img1":
            assert overlap(scene.mask, truth.scene.mask) > 0.9, scene_id
        else:  # over objects, where two meet if any do
            cover = np.sum([alpha > 127 for alpha in truth.alphas], 0)
            objects = 1 if scene_id.split("__")[0] in ("auto_process", "single", "agentic", "saraao_one_object") else 2
            assert (cover[scene.mask] >= objects).any(), scene_id
        for completion in scene.completions:
            alpha = completion[..., 3] > 127
            known = [truth.alphas[i] > 127 for i in range(3)] + [np.ones_like(alpha)]
            assert max(overlap(alpha, other) for other in known) > 0.8, scene_id
    assert "visible_seg.png beside amodal_completion.png is a photo and no mask" in process.stdout
    assert not (data / "saraao_one_object__hall" / "comp1_visible.png").exists()
    assert (data / "enhanced__Places365_test_00000138" / "comp1_visible.png").exists()
    with open(data / "report.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert {row["layout"] for row in rows} == {layout.name for layout in LAYOUTS} | {BY_ROLES}
    assert len({row["file"] for row in rows if row["scene"] == "segment_all__img1"}) > 2  # a row for every object


def test_layouts_without_hole_explain_why_and_the_remedy(tree, tmp_path):
    folder, _ = tree
    process = create(folder, tmp_path / "data")
    assert process.returncode == 1 and "Traceback" not in process.stderr
    faults = skipped(tmp_path / "data")
    for scene_id in ("auto_process__00000004", "single__138"):
        assert "its mask is the modal mask of the one object" in faults[scene_id]
        assert "--cut_hole" in faults[scene_id] and "--remove_object" in faults[scene_id]
    for scene_id in ("deocclusion__image_0703", "art__0", "qwen__poster", "see_through__girl"):
        assert "a photo split into layers has none" in faults[scene_id]
    for scene_id in ("segment_all__img2", "layerd__banner", "saraao_one_object__hall"):
        assert "(--photos)" in faults[scene_id]
    written = {path.name for path in (tmp_path / "data").iterdir() if path.is_dir()}
    assert written == {
        "completion_dataset__a__abbey__00000001", "completion_dataset_debug__a__abbey__00000001", "flat__00000007",
        "flat__00000008", "enhanced__Places365_test_00000138", "segment_all__img1"}
    # no photo of it was given: nothing to train on
    assert not (tmp_path / "data" / "enhanced__Places365_test_00000138" / "original.png").exists()
    # the advice can be followed in the same data set, and then holds for it
    process = create(folder, tmp_path / "data", "--cut_hole", "box", "--photos", folder / "photos")
    assert process.returncode == 0 and "4 already there" in process.stdout  # two have a photo now
    for scene_id in ("art__0", "enhanced__Places365_test_00000138", "segment_all__img1"):
        assert (tmp_path / "data" / scene_id / "original.png").exists()
    for changed in (("--cut_hole", "grid"), ("--cut_hole", "box", "--seed", 1)):
        process = create(folder, tmp_path / "data", *changed)
        assert process.returncode == 2 and f"not {changed[-1]}" in process.stderr


def test_removed_object_leaves_hole_and_is_no_target(tree):
    folder, drawn = tree
    raw_scenes, faults = find_raw_scenes(folder, folder / "photos")
    assert not faults
    raw = {scene.id: scene for scene in raw_scenes}
    for scene_id, names in (("deocclusion__image_0703", "012"), ("deocclusion__image_0703", ("000", "001", "002")),
                            ("saraao__kitchen", ("cup", "plate", "spoon")), ("segment_all__img2", "012")):
        name = scene_id.split("__")[0]
        truth = [t for t in drawn if t.root.name == name][-1]
        front = max(range(3), key=lambda i: truth.visible[i].sum())
        wanted = names[front]
        scene, report = read_raw_scene(raw[scene_id], 5, new_hole=NewHole(remove=wanted))
        assert scene.original is None and report["hole"] == "an object taken out"
        visible = truth.visible[front] > 0
        assert (scene.mask & visible).sum() > 0.9 * visible.sum(), scene_id
        assert (scene.mask & ~visible).sum() < 0.6 * visible.sum() + 200
        assert [row["reason"] for row in report["completions"]].count("removed") == (2 if name == "segment_all" else 1)
        for completion in scene.completions:
            assert overlap(completion[..., 3] > 127, truth.alphas[front] > 127) < 0.8
    with pytest.raises(SceneError, match=r": 9 names 0 objects .* 000, 001, 002"):
        read_raw_scene(raw["deocclusion__image_0703"], 5, new_hole=NewHole(remove="9"))
    with pytest.raises(SceneError, match="the only object"):
        read_raw_scene(raw["auto_process__00000004"], 5, new_hole=NewHole(remove="the one object"))


def test_cut_holes_are_reproducible_and_follow_the_policy(tree):
    folder, _ = tree
    raw = {scene.id: scene for scene in find_raw_scenes(folder, folder / "photos")[0]}["deocclusion__image_0703"]
    masks = [read_raw_scene(raw, 5, new_hole=NewHole(policy, seed=seed))[0].mask
             for policy, seed in (("box", 0), ("box", 0), ("box", 1), ("strokes", 0), ("centre", 0))]
    assert np.array_equal(masks[0], masks[1]) and not np.array_equal(masks[0], masks[2])
    rows, columns = np.nonzero(masks[0])
    assert masks[0].sum() == (np.ptp(rows) + 1) * (np.ptp(columns) + 1)  # a box
    assert not np.array_equal(masks[0], masks[3]) and masks[4][31:33, 31:33].all()


def test_blanked_photo_is_no_target_but_window_is(tmp_path):
    scene = draw_scene(5)
    soft = np.hypot(*(np.mgrid[:64, :64] - 32)) / 18
    window = scene.original + np.clip(1.6 - soft, 0, 1)[..., None] * 255  # burnt out, with a halo around it
    strokes = np.where((np.hypot(*(np.mgrid[:64, :64] - 24)) < 12)[..., None], 255, scene.original)
    for name, photo, is_hole in (("box", np.where(scene.mask[..., None], 255, scene.original), True),
                                 ("black", np.where(scene.mask[..., None], 0, scene.original), True),
                                 ("grey", np.where(scene.mask[..., None], 127, scene.original), False),
                                 ("strokes", strokes, True), ("window", np.clip(window, 0, 255), False),
                                 ("whole", scene.original, False)):
        _write(tmp_path / name / "original.png", photo.astype(np.uint8))
        _write(tmp_path / name / "comp1.png", scene.completions[0])
        raw = {found.id: found for found in find_raw_scenes(tmp_path)[0]}[name]
        assert (detect_masked_photo(raw).partial is not None) == is_hole, name
        if not is_hole:  # grey may be a wall: it is said, and decided by nobody
            _, report = read_raw_scene(raw, 5, new_hole=NewHole("box"))
            assert any("is a hole cut already" in note for note in report["notes"]) == (name == "grey"), name


def test_photo_of_another_scene_is_refused(tree, tmp_path):
    folder, _ = tree
    write_image(tmp_path / "banner.png", 255 - draw_scene(4321).original)
    raw = {scene.id: scene for scene in find_raw_scenes(folder, tmp_path)[0]}["layerd__banner"]
    with pytest.raises(SceneError, match="is that its photo"):
        read_raw_scene(raw, 5, new_hole=NewHole("box"))


def test_photos_are_found_by_their_folder_names(tmp_path):
    for letter in "ab":
        for number in (1, 2):
            _write(tmp_path / "photos" / letter / f"{number}.png", draw_scene(number).original)
            _write(tmp_path / "in" / letter / str(number) / "partial.png", draw_scene(number).partial)
            _write(tmp_path / "in" / letter / str(number) / "comp1.png", draw_scene(number).completions[0])
    scenes, faults = find_raw_scenes(tmp_path / "in", tmp_path / "photos")
    assert not faults and [str(s.original.relative_to(tmp_path)) for s in scenes] == [
        "photos/a/1.png", "photos/a/2.png", "photos/b/1.png", "photos/b/2.png"]
    (tmp_path / "photos" / "a").rename(tmp_path / "photos" / "c")
    (tmp_path / "photos" / "b").rename(tmp_path / "photos" / "d")
    scenes, faults = find_raw_scenes(tmp_path / "in", tmp_path / "photos")
    assert not scenes and len(faults) == 4 and all("could both be its photo" in fault for fault in faults.values())


def test_mixed_folders_lose_no_scene(tmp_path):
    for name in ("7_original", "7_mask", "7_result_0", "8", "8_partial", "8_comp1"):  # two kinds side by side
        _write(tmp_path / f"{name}.png", draw_scene(0).original)
    for name in ("orig", "mask", "comps/1", "masks/1"):
        _write(tmp_path / "debug" / "Places365_1" / f"{name}.png", draw_scene(0).original)
    for name in ("obj_000.png", "bkg.png", "more/original.png", "more/mask.png", "more/comp1.png"):
        _write(tmp_path / "street" / name, draw_scene(0).completions[0])
    for name in ("1.png", "2.png"):  # photos
        _write(tmp_path / "numbered" / name, draw_scene(0).original)
    scenes, faults = find_raw_scenes(tmp_path)
    assert not faults and [(scene.id, scene.layout.split(",")[0]) for scene in scenes] == [
        ("7", "auto_process"), ("8", "original"), ("Places365_1", "amodal_enhanced_dataset"),
        ("street", "deocclusion demo"), ("street__more", "original")]


def test_folder_with_common_name_hides_no_pictures(tmp_path):
    for name in ("gt", "mask", "partial", "comp1", "comp1_visible", "object_3"):
        _write(tmp_path / "7" / f"{name}.png", draw_scene(0).original)
    (tmp_path / "7" / "debug").mkdir()
    (scene,), faults = find_raw_scenes(tmp_path)
    assert not faults and scene.original.name == "gt.png" and len(scene.completions) == 2
    assert scene.completions[0].visible.name == "comp1_visible.png"


def _write(path, picture):
    path.parent.mkdir(parents=True, exist_ok=True)
    write_image(path, picture)


@pytest.mark.parametrize(("names", "expected"), [
    ("beach_image.jpg beach_image_mask.png beach_image_comp1.png forest_image.jpg forest_image_mask.png "
     "forest_image_comp1.png", {"beach_image": "o m c1", "forest_image": "o m c1"}),
    ("beach_image.jpg forest_image.jpg city_image.jpg mask.png comp1.png",
     {"beach": "o", "forest": "o", "city": "o", "": "m c1"}),
    ("beach_image.jpg beach_mask.png beach_comp1.png forest_image.jpg forest_mask.png forest_comp1.png",
     {"beach": "o m c1", "forest": "o m c1"}),
    ("object_0001.jpg object_0001_mask.png object_0001_comp1.png object_0002.jpg object_0002_partial.jpg "
     "object_0002_comp1.png", {"object_0001": "o m c1", "object_0002": "o p c1"}),
    ("amodal_0007.jpg amodal_0007_mask.png amodal_0007_partial.jpg amodal_0007_comp1.png", {"amodal_0007": "o p m c1"}),
    ("s.jpg s_partial.jpg s_comp1.png", {"": "o p c1"}),
    ("image.png image_mask.png obj_000.png obj_000_mask.png", {"": "o m c1 x1"}),
    ("x_original.png x_original_mask.png x_comp1.png", {"x": "o m c1"}),
    ("original.png mask.png object_0_completion_1.png object_0_completion_2.png object_1_completion_1.png",
     {"": "o m c3"}),
    ("original.png mask.png comp1.png comp1_mask.png comp1_visible.png comp2.png comp_mask_2.png comp_mask_3.png",
     {"": "o m c2 x3"}),
    ("original.png mask.png comp_1.png comp_1_alpha.png comp_1_mask.png object_2_amodal.png", {"": "o m c2 x2"}),
    ("mask_room.jpg mask_room_mask.png mask_room_comp1.png", {"mask_room": "o m c1"}),
    ("my_object_photo.jpg my_object_photo_mask.png my_object_photo_comp1.png", {"my_object_photo": "o m c1"}),
    ("image1.jpg image1_mask.png image1_comp1.png image2.jpg image2_mask.png image2_comp1.png",
     {"image1": "o m c1", "image2": "o m c1"}),
])
def test_a_role_is_what_remains_after_the_id(names, expected):
    found = {}
    for scene_id, group in sort_into_roles([(Path(name).stem, Path(name)) for name in names.split()], "s").items():
        parts = [letter for letter, role in zip("opm", ("original", "partial", "mask")) if len(group[role]) == 1]
        assert all(len(group[role]) <= 1 for role in ("original", "partial", "mask"))
        masks = sum(len(kinds) for kinds in group["masks"].values())
        parts += [f"c{len(group['completion'])}"] * bool(group["completion"]) + [f"x{masks}"] * bool(masks)
        found[scene_id] = " ".join(parts)
    assert found == expected


def test_hidden_folders_are_skipped_and_bad_names_counted(tmp_path):
    tree, data = tmp_path / "results", tmp_path / "data"
    good = ["plain", "inner space", "in\u00a0side", "가\u3000나", "b" * 200]
    for folder in (".ipynb_checkpoints", ".Trash-0", "__MACOSX", "@eaDir", "plain/.ipynb_checkpoints"):
        completion_dataset(Tree(tree, 1), f"{folder}/00000001")
    for seed, name in enumerate(good):
        completion_dataset(Tree(tree, 10 + seed), name)
    bad = {" leading": "space", "trailing ": "space", "\u3000wide": "space", "narrow\u00a0": "space",
           "line\nbreak": "line break", "line\u2028separator": "line break", "next\x85line": "line break",
           "/".join(["n" * 90] * 3): "more than 240", os.fsdecode(b"latin-\xe9"): "not UTF-8"}
    for seed, name in enumerate(bad):
        completion_dataset(Tree(tree, 50 + seed), name)
    (tree / "plain" / "comp1.png").rename(tree / "plain" / os.fsdecode(b"comp_\xff.png"))  # a file's name is printed
    process = create(tree, data, "--split", "--max_bad", 1)
    assert process.returncode == 0 and "Traceback" not in process.stderr, process.stderr
    assert {path.name for path in data.iterdir() if path.is_dir()} == set(good)
    faults = skipped(data)
    assert len(faults) == len(bad)
    for name, fault in bad.items():
        shown = name.encode(errors="surrogateescape").decode(errors="backslashreplace").replace("/", "__")
        for character in "\n\u2028\x85":
            shown = shown.replace(character, repr(character)[1:-1])
        assert fault in faults[shown]
        assert any(line.startswith(f"bad: {shown}: ") and fault in line for line in process.stdout.split("\n"))
    listed = [line for name in ("train_list.txt", "val_list.txt") for line in read_list(data / name, data)]
    assert sorted(listed) == sorted(good)
    # a data set that was put together by hand: what no list can hold is left out, and said
    (data / "plain").rename(data / " plain")
    process = run(SCRIPT, "split", "--data_dir", data)
    assert process.returncode == 1 and "left out" in process.stdout and " plain: a space at the start" in process.stdout
    listed = [line for name in ("train_list.txt", "val_list.txt") for line in read_list(data / name, data)]
    assert sorted(listed) == sorted(set(good) - {"plain"})


def test_scenes_of_one_photo_share_one_list(tmp_path):
    data = write_dataset(tmp_path / "data", train=12, val=0)
    twins = ("train_1", "train_4", "train_7", "train_9")
    photo = read_scene(data / twins[0]).original
    for number, scene_id in enumerate(twins[1:]):
        noise = np.random.default_rng(number).integers(-1, 2, photo.shape) * (number > 0)  # the third was a JPEG once
        write_image(data / scene_id / "original.png", np.clip(photo + noise, 0, 255).astype(np.uint8))
    (data / "train_2" / "original.png").write_bytes(b"")  # check's business
    names = ("train_list.txt", "val_list.txt", "test_list.txt")
    for seed in range(4):
        process = succeed(SCRIPT, "split", "--data_dir", data, "--val_fraction", 0.4, "--test_fraction", 0.2,
                          "--seed", seed)
        assert "4 scenes share their photo with another" in process.stdout
        lists = [read_list(data / name, data) for name in names]
        assert sum(bool(set(twins) & set(members)) for members in lists) == 1
        assert len({scene_id for members in lists for scene_id in members}) == 12


def test_faults_common_to_many_scenes_are_printed_once(capsys):
    raw_scenes = [RawScene(f"s{i}", Path("in", "many" if i < 40 else str(i), f"s{i}"), layout="test")
                  for i in range(45)]
    skipped = {raw.id: f"{raw.folder}: no hole in {raw.id} (why)" for raw in raw_scenes} | {"s3": "in/many/s3: damaged"}
    print_report(raw_scenes, Summary(), skipped, Path("in"), "test_list.txt")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "layout test: 45 scenes in 40, 41, 42 and 3 more; 45 bad"
    assert sum(line.startswith("bad: ") for line in lines) == 10 + 1 + 1
    assert "bad: s3: damaged" in lines
    assert lines[-1] == "bad: 34 more scenes, all in skipped.csv: no hole in (why)"


def test_wrong_usage_of_holes_and_photos(tree, tmp_path):
    for arguments in (("--img_size", 64), ("--cut_hole", "box", "--remove_object", "1"), ("--photos", tmp_path / "no"),
                      ("--cut_hole", "round")):
        process = create(tree[0], tmp_path / "data", *arguments)
        assert process.returncode == 2 and arguments[0] in process.stderr


def test_raw_results_in_place_of_scenes_name_command(tree):
    process = run(SCRIPT, "check", "--data_dir", tree[0] / "flat")  # inference finds its scenes the same way
    assert process.returncode == 1
    assert f"run create first: python prepare_dataset.py create --input_dir {tree[0] / 'flat'}" in process.stderr


def test_what_is_not_read_is_named(tmp_path):
    completion_dataset(Tree(tmp_path / "results", 1))
    scene = next((tmp_path / "results").rglob("original.png")).parent
    (scene / "original.png").rename(scene / "original.png.png")
    (scene / "comp1.png").rename(scene / "comp1 .png")
    (scene / "partial.png").rename(scene / "partial.PNG ")
    for name, content in (("other/original.heic", b"heic"), ("other/a.PSD", b"8BPS"), ("odd/first.png", None),
                          ("odd/second.png", None), (".hidden/a.heic", b"x")):
        path = tmp_path / "results" / name
        path.parent.mkdir(exist_ok=True)
        write_image(path, draw_scene(1).original) if content is None else path.write_bytes(content)
    process = create(tmp_path / "results", tmp_path / "data")
    said = process.stdout
    assert process.returncode == 0, said + process.stderr
    for line in ("other: 1 .heic files, as original.heic; save them as PNG", "other: 1 .psd files, as a.PSD",
                 "odd: 2 pictures whose names have no role, or no scene around them, as first.png"):
        assert f"not read: {tmp_path / 'results'}/{line}" in said, said
    assert "hidden" not in said and said.count("not read: ") == 3
    (written,) = (path.parent for path in (tmp_path / "data").rglob("mask.png"))
    assert (written / "original.png").exists() and "comp1 .png" in (tmp_path / "data" / "report.csv").read_text()
    (tmp_path / "none").mkdir()
    (tmp_path / "none" / "a.avif").write_bytes(b"x")
    process = create(tmp_path / "none", tmp_path / "x")
    assert process.returncode == 2 and "none: 1 .avif files" in process.stdout


def test_unicode_forms_mix_within_a_scene(tmp_path):
    flat = tmp_path / "flat"
    completion_dataset(Tree(tmp_path, 1), "raw")
    flat.mkdir()
    for number, path in enumerate(sorted((tmp_path / "raw").iterdir())):
        name = unicodedata.normalize("NFD" if number % 2 else "NFC", f"사진é_{path.stem}")
        path.rename(flat / f"{name}.png")
    scenes, faults = find_raw_scenes(flat)
    assert not faults and [len(scene.completions) for scene in scenes] == [3] and scenes[0].mask and scenes[0].original
