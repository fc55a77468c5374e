"""What is made of fused scenes: folders for inpainters, the order of the objects, the report, the network as ONNX."""

import csv
import json
import shlex
import sys

import numpy as np
import pytest
import torch
from matplotlib import colormaps

from amodal_fusion.data.images import read_image, resize, write_image
from amodal_fusion.data.scenes import Scene, read_scene, write_scene
from amodal_fusion.data.tensors import to_tensors
from amodal_fusion.data.toy import draw_scene
from amodal_fusion.errors import ConfigError, SceneError
from amodal_fusion.evaluation.inpainters import check_command, grow, run_command
from amodal_fusion.evaluation.rules import apply_rules
from amodal_fusion.files import WRITTEN
from amodal_fusion.model.blending import Blend, blend_hole
from amodal_fusion.model.compositing import ABSENT, fill_hole
from amodal_fusion.output.folder import check_options
from amodal_fusion.output.guide import make_guide, small_regions
from amodal_fusion.output.handover import CONSUMERS, check_handover, write_handover
from amodal_fusion.output.locks import (
    ALL,
    Lock,
    apply_locks,
    list_locks,
    lock_blend,
    parse_locks,
    read_locks,
    to_slots,
    within,
)
from amodal_fusion.output.onnx_export import check_sides, compare
from amodal_fusion.output.order import find_order, front_to_back, mean_margins, order_of, write_order
from amodal_fusion_transformer import load_model
from amodal_fusion_transformer_inference import InferenceConfig
from tests.scripts import run


def write_fused(root, names=("wide", "a_mask_shop"), size=(60, 100)):
    """Scenes and what the inference script would have made of them if only comp1 were right. Returns both folders."""
    data, output = root / "data", root / "out"
    for seed, name in enumerate(names):
        scene = draw_scene(seed, size, 2, name)
        for folder in (data / name, output / name):
            folder.mkdir(parents=True)
        write_scene(data / name, scene)
        first = (scene.completions[0][..., 3] > 0) & scene.mask
        write_image(output / name / "fused.png", scene.original)
        write_image(output / name / "guide.png", scene.original)
        for mask in ("residual_mask.png", "inpaint_mask.png"):
            write_image(output / name / mask, (scene.mask & ~first).astype(np.uint8) * 255)
        for k, weight in enumerate((first, np.zeros_like(first)), 1):
            write_image(output / name / f"weight_{k}.png", weight.astype(np.uint16) * 65535)
    return data, output


@pytest.mark.parametrize("consumer", CONSUMERS)
def test_handover_is_what_the_inpainter_reads(tmp_path, consumer):
    data, output = write_fused(tmp_path)
    folder = tmp_path / "to them"
    assert write_handover(consumer, folder, data, output, ["a_mask_shop", "wide", "failed"], seam=3) == (2, 0)
    with open(folder / "scenes.csv", newline="", encoding="utf-8") as file:
        rows = {row["scene"]: row for row in csv.DictReader(file)}
    assert set(rows) == {"a_mask_shop", "wide"}
    if consumer == "lama":  # it takes every *mask*.png for a mask, and what stands before _mask for its picture
        masks = sorted(folder.glob("**/*mask*.png"))
        pictures = [path.with_name(path.name.rsplit("_mask", 1)[0] + ".png") for path in masks]
    else:  # these take two folders in the order of their names, or by equal stems
        pictures, masks = (sorted((folder / name).glob("*.png")) for name in ("images", "masks"))
        assert [path.name for path in pictures] == [path.name for path in masks]
    assert [path.name for path in pictures] == sorted(row["file"] for row in rows.values())
    for scene_id, row in rows.items():
        place = [path.name for path in pictures].index(row["file"])
        picture, mask = read_image(pictures[place], "RGB"), read_image(masks[place], "L")
        assert set(np.unique(mask)) == {0, 255} and picture.shape[:2] == mask.shape
        multiple = {"mat": 512, "diffusers": 8}.get(consumer, 1)
        size = tuple(int(row[name]) for name in ("height", "width"))
        assert mask.shape == tuple(-(-side // multiple) * multiple for side in (60, 100))
        left, top, right, bottom = (int(row[name]) for name in ("left", "top", "right", "bottom"))
        crop = np.s_[top:bottom, left:right]
        guide = read_image(output / scene_id / "guide.png", "RGB")
        assert size == guide.shape[:2] == (60, 100)
        todo = mask[crop] == (0 if consumer == "mat" else 255)
        if consumer == "mat":  # resized, not mirrored: the hole is there once
            todo = resize(todo.astype(np.uint8) * 255, size) > 127
            assert np.abs(resize(picture[crop], size).astype(int) - guide).mean() < 3
        else:
            assert np.array_equal(picture[crop], guide)
        residual = read_image(output / scene_id / "inpaint_mask.png", "L") > 0
        hole = read_image(data / scene_id / "mask.png", "L") > 0
        assert todo[residual].all() and not todo[~hole].any() and todo.sum() > residual.sum()
    note = (folder / "README.txt").read_text()
    assert str(folder.resolve()) in note and ("strength < 1" in note) == (consumer == "diffusers")
    if consumer != "diffusers":  # a command for a shell somewhere else
        words = shlex.split(note.splitlines()[1])
        assert any(word.endswith(f"{folder.resolve()}_results") for word in words), words


def test_handover_leaves_nothing_stale_and_touches_nothing_foreign(tmp_path):
    data, output = write_fused(tmp_path)
    folder = tmp_path / "to"
    write_handover("lama", folder, data, output, ["wide", "a_mask_shop"])
    write_handover("lama", folder, data, output, ["wide"])
    names = {"wide.png", "wide_mask.png", "scenes.csv", "README.txt", WRITTEN}
    assert {path.name for path in folder.iterdir()} == names
    (folder / "my_mask.png").write_bytes((folder / "wide_mask.png").read_bytes())
    for consumer in ("iopaint", "mat"):
        with pytest.raises(SceneError, match=r"wide(_mask)?\.png: written by an earlier handover for another"):
            write_handover(consumer, folder, data, output, ["wide"])
    assert not (folder / "images").exists()
    write_handover("iopaint", tmp_path / "other", data, output, ["wide"])
    write_handover("mat", tmp_path / "other", data, output, ["wide"])
    with pytest.raises(SceneError, match="for another inpainter"):
        write_handover("lama", tmp_path / "other", data, output, ["wide"])
    write_handover("lama", tmp_path / "several" / "hole", data, output, ["wide"], given="hole")
    with pytest.raises(SceneError, match="of other given pictures"):
        check_handover("lama", tmp_path / "several", data, output)
    with pytest.raises(SceneError, match=r"my_mask\.png: was not written by an earlier"):
        write_handover("lama", folder, data, output, ["wide"])
    assert (folder / "my_mask.png").exists()
    with pytest.raises(ConfigError, match="choose another folder"):
        check_handover("lama", tmp_path, data, output)
    with pytest.raises(ConfigError, match="not one of lama, iopaint"):
        check_handover("lamma", folder, data, output)


def test_handover_gives_hole_or_visible_fit(tmp_path):
    data, output = write_fused(tmp_path)
    for given in ("hole", "visible_fit", "ours"):
        folder = tmp_path / "gave" / given
        write_handover("iopaint", folder, data, output, ["wide"], 0, given)
        picture, mask = (read_image(folder / name / "wide.png", "RGB") for name in ("images", "masks"))
        assert f"gave_results/{given}" in (folder / "README.txt").read_text()
        scene = read_scene(data / "wide")
        if given == "hole":
            assert np.array_equal(picture, scene.partial) and np.array_equal(mask[..., 0] > 0, scene.mask)
        elif given == "visible_fit":
            batch = {name: value[None] for name, value in to_tensors(scene, 2).items()}
            batch["fill"] = fill_hole(batch["partial"], batch["mask"])
            fused = apply_rules(batch)["visible_fit"][0].permute(1, 2, 0).numpy() * 255
            assert np.abs(picture - fused).max() <= 0.51
            covered = np.max([completion[..., 3] for completion in scene.completions], 0) > 127
            assert np.array_equal(mask[..., 0] > 0, scene.mask & ~covered)
    write_handover("lama", tmp_path / "to" / "hole", data, output, ["wide"], 0, "hole")
    with pytest.raises(SceneError, match="earlier handover"):  # LaMa would find the other masks below
        write_handover("lama", tmp_path / "to", data, output, ["wide"])


def test_handover_of_long_and_formula_names(tmp_path):
    names = ["=HYPERLINK(1)", "x" * 252, "x" * 251 + "y"]
    data, output = write_fused(tmp_path, names)
    for consumer in ("lama", "iopaint"):
        folder = tmp_path / consumer
        assert write_handover(consumer, folder, data, output, names)[0] == 3
        with open(folder / "scenes.csv", newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        assert [row["scene"] for row in rows] == ["'=HYPERLINK(1)", *names[1:]]
        assert len({row["file"] for row in rows}) == 3 and rows[0]["file"].startswith("'=")


def noisy_blend(seed=0, size=(80, 120), count=4):
    """A scene and a Blend whose weights are noise, rougher than any network's."""
    rng = np.random.default_rng(seed)
    scene = draw_scene(seed, size, count)
    weights = rng.dirichlet(np.full(count + 1, 0.3), scene.mask.sum()).T.astype(np.float32)
    coarse = rng.dirichlet(np.full(count + 1, 0.1), (10, 15)).transpose(2, 0, 1)
    weights = 0.3 * weights + 0.7 * coarse.repeat(8, 1).repeat(8, 2)[:, scene.mask].astype(np.float32)
    weights[1:] *= np.stack([completion[..., 3][scene.mask] > 0 for completion in scene.completions])
    weights /= weights.sum(0)
    fill = np.zeros((weights.shape[1], 3), np.float32)
    return scene, Blend(scene.mask, weights[1:], weights[0], fill, fill)


@pytest.mark.parametrize("seed", range(4))
def test_guide_has_only_large_regions(seed):
    scene, blend = noisy_blend(seed)
    for least in (1, 30, 64):
        guide, todo = make_guide(scene, blend, 0.5, least)
        assert np.array_equal(guide[~scene.mask], scene.partial[~scene.mask]) and not todo[~scene.mask].any()
        labels = np.where(scene.mask, np.where(todo, 0, 1), -1)
        assert not [around for label in (0, 1) for *_, around in small_regions(labels, label, least) if around]
    rough, whole = (np.where(scene.mask, np.where(make_guide(scene, blend, 0.5, least)[1], 0, 1), -1)
                    for least in (1, 64))
    assert len(list(small_regions(rough, 0, 64))) > 3 and len(list(small_regions(whole, 0, 64))) <= 1


def test_guide_takes_single_completions_by_alpha():
    scene = draw_scene(3, 64, 2)
    alpha = scene.completions[0][..., 3]
    scene.completions[0][..., 3] = np.where(alpha > 0, 100, 0)  # too thin
    count = scene.mask.sum()
    sure = np.stack([np.full(count, 0.8), np.full(count, 0.2)]).astype(np.float32)
    sure[1] *= scene.completions[1][..., 3][scene.mask] > 0
    fill = np.full((count, 3), 0.25, np.float32)
    blend = Blend(scene.mask, sure, np.zeros(count, np.float32), fill, fill)
    guide, todo = make_guide(scene, blend, 0, 1)
    second = scene.mask & (scene.completions[1][..., 3] >= 128)
    assert np.array_equal(todo, scene.mask & ~second) and second.any()
    assert np.array_equal(guide[second], scene.completions[1][second][:, :3]) and (guide[todo] == 64).all()
    assert make_guide(scene, blend, 0.5, 1)[1].sum() == count  # 0.2 is not enough


def test_grow_is_round():
    region = np.zeros((21, 21), bool)
    region[10, 10] = True
    y, x = np.mgrid[:21, :21] - 10
    assert np.array_equal(grow(region, 5), np.hypot(y, x) <= 5) and not grow(region & False, 5).any()


def write_inpainter(folder):
    """A program that draws grey, and the command for it."""
    (folder / "my script.py").write_text(
        "import cv2, sys; picture = cv2.imread(sys.argv[1]); picture[cv2.imread(sys.argv[2], 0) > 0] = 7; "
        "cv2.imwrite(sys.argv[3], picture)")
    return f"{sys.executable} '{folder}/my script.py' {{image}} {{mask}} {{output}}"


def test_user_inpainter_runs_and_its_faults_are_named(tmp_path):
    scene = draw_scene(0, 32)
    done = run_command(check_command(write_inpainter(tmp_path)), scene.original, scene.mask)
    assert np.array_equal(done, np.where(scene.mask[..., None], 7, scene.original))
    for command, fault in (("cp {image} {output}", "{mask} is missing"),
                           ("nonesuch {image} {mask} {output}", "no program"),
                           ("cp '{image} {mask} {output}", "No closing quotation")):
        with pytest.raises(ConfigError, match=fault):
            check_command(command)
    for command, fault in (("ls /none {image} {mask} {output}", "status 2; it said: .*/none"),
                           ("echo {image} {mask} {output}", r"wrote no \{output\}")):
        with pytest.raises(SceneError, match=fault):
            run_command(check_command(command), scene.original, scene.mask)


def squares():
    """Three opaque squares on 30×30 that overlap one after the other, alpha (3,H,W), and a hole over the left half."""
    alpha, mask = np.zeros((3, 30, 30)), np.zeros((30, 30))
    for k, left in enumerate((2, 10, 18)):
        alpha[k, 5:25, left : left + 10] = 1
    mask[:, :20] = 1
    return alpha, mask


def test_order_comes_from_weights_and_from_logits(tmp_path):
    alpha, mask = squares()
    weights = alpha * np.array([0.6, 0.3, 0.1])[:, None, None]
    alone = find_order(weights, alpha, mask, np.zeros((3, 3)))
    first, second = alone["pairs"]
    assert (first["front"], first["behind"], first["area"], first["area_in_hole"]) == (1, 2, 40, 40)
    assert first["weights"] == pytest.approx(0.6667, abs=1e-4)
    assert first["confidence"] == pytest.approx(0.9 * 0.6667 + 0.1 / 2, abs=1e-3)
    assert (second["front"], second["behind"], second["area_in_hole"]) == (2, 3, 40)
    assert alone["front_to_back"] == [[1], [2], [3]] and alone["cycles"] == []
    pairwise = np.zeros((3, 3))
    pairwise[1, 0], pairwise[0, 1] = 4, -4
    assert find_order(weights, alpha, mask, pairwise)["pairs"][0]["front"] == 1  # the weights are seen at nine tenths
    found = find_order(weights / 10, alpha, mask, pairwise)
    assert (found["pairs"][0]["front"], found["pairs"][0]["behind"]) == (2, 1)
    assert found["pairs"][0]["pairwise"] == pytest.approx(0.982, abs=1e-3)
    assert found["pairs"][0]["confidence"] == pytest.approx(0.91 * 0.982 + 0.09 / 3, abs=1e-3)
    locked = find_order(weights / 10, alpha, mask, pairwise, locks=[(1, 2)])["pairs"][0]
    assert (locked["front"], locked["confidence"], locked["locked"]) == (1, 1.0, True)
    assert find_order(weights, alpha, mask * 0, pairwise)["pairs"][0]["confidence"] == pytest.approx(0.982, abs=1e-3)
    scene = Scene("상자", None, None, [None] * 3, numbers=[2, 4, 7], sources=["2.png", "parts/4.png", None])
    write_order(tmp_path / "order.json", scene, found)
    written = json.loads((tmp_path / "order.json").read_text(encoding="utf-8"))
    assert written["scene"] == "상자" and written["completions"] == {"2": "2", "4": "parts/4", "7": "comp7"}
    assert (written["pairs"][0]["front"], written["pairs"][0]["behind"]) == (4, 2)
    assert written["front_to_back"] == [[(2, 4, 7)[i - 1] for i in group] for group in found["front_to_back"]]


def test_logits_order_candidates_in_hole_first_then_outside():
    alpha, mask = squares()
    logits = np.zeros_like(alpha)
    mask[:, 11:] = 0  # half of where 1 and 2 meet, and nothing of 2 and 3
    logits[1] = 3 * mask - 1
    logits[0, 0] = 100  # where they do not meet nothing counts
    margins = mean_margins(logits, alpha, mask)
    assert margins[1, 0] == 2 and margins[1, 2] == -1 and np.array_equal(margins, -margins.T)
    assert margins[0, 2] == 0  # these never meet
    assert mean_margins(logits, alpha, mask * 0)[1, 0] == 0.5


def test_cycles_are_legal():
    assert front_to_back(5, [(1, 2), (2, 3), (3, 1), (4, 2), (3, 5)]) == [[4], [1, 2, 3], [5]]
    assert front_to_back(2, []) == [[1], [2]]


def with_fill(weights, alpha):
    """Weights and alpha with the fill's in front, a row per candidate."""
    rows = [np.concatenate([first[None], rest]) for first, rest in ((1 - weights.sum(0), weights),
                                                                   (np.ones_like(alpha[0]), alpha))]
    return [row.reshape(len(row), -1) for row in rows]


def test_lock_moves_weight_where_both_candidates_cover():
    alpha, _ = squares()
    alpha[0, :, 10] = 0.25  # a soft edge lets what is behind show through
    weights, cover = with_fill(alpha * np.array([0.1, 0.5, 0.2])[:, None, None], alpha)
    locked = apply_locks([Lock(1, 2), Lock(2, 3), Lock(0, 3)], weights, cover, {}).reshape(4, *alpha.shape[1:])
    assert np.allclose(locked.sum(0), 1)
    assert locked[1:, 10, 11].tolist() == pytest.approx([0.6, 0, 0])
    assert locked[1:, 10, 10].tolist() == pytest.approx([0.025 + 0.25 * 0.5, 0.75 * 0.5, 0])
    assert locked[1:, 10, 5].tolist() == pytest.approx([0.1, 0, 0])  # 2 is not there
    assert locked[1:, 10, 19].tolist() == pytest.approx([0, 0.5 + 0.2 * 5 / 8, 0], abs=2e-4)  # shared with the fill
    assert locked[:, 10, 25].tolist() == pytest.approx([1, 0, 0, 0])  # 0>3: 3 is out
    with pytest.raises(SceneError, match="lock 4>1: the completions of the scene are 1, 2, 3"):
        to_slots([Lock(4, 1)], [1, 2, 3])
    assert to_slots([Lock(7, ALL), Lock(0, 4)], [4, 7]) == [Lock(2, ALL), Lock(0, 1)]


def test_forgotten_completion_leaves_its_place_to_others():
    alpha = np.array([[1, 1, 1], [1, 1, 0], [0, 1, 0]], float)[..., None]  # (N,P,1), pixels: two meet, three, one
    weights, cover = with_fill(alpha * np.array([[0.9], [0.06], [0.02]])[..., None], alpha)
    locked = apply_locks([Lock(ALL, 1)], weights, cover, {})
    assert locked[:, 0].tolist() == pytest.approx([0.4, 0, 0.6, 0], abs=0.01)  # in the ratio of the others' weights
    assert locked[:, 1].tolist() == pytest.approx([0.2, 0, 0.6, 0.2], abs=0.02)
    assert locked[:, 2].tolist() == pytest.approx([1, 0, 0, 0])
    both = apply_locks([Lock(ALL, 1), Lock(ALL, 2)], weights, cover, {})
    assert both[:, 0].tolist() == pytest.approx([1, 0, 0, 0]) and not both[1:3].any()
    certain = np.array([[0], [1.0], [0]])
    taken = apply_locks([Lock(ALL, 1)], certain, np.ones((3, 1)), {})
    assert taken[:, 0].tolist() == pytest.approx([0, 0, 1], abs=2e-3)  # a completion comes before the fill


def test_locks_in_a_polygon_change_nothing_outside():
    polygon = ((2, 1), (8, 1), (8, 6), (2, 6))
    inside = within(polygon, (10, 12))
    assert inside.sum() == 30 and inside[1:6, 2:8].all()
    triangle = within([(0, 0), (10, 0), (0, 10)], (10, 10))
    assert triangle[0, 8] and not triangle[9, 9] and abs(triangle.sum() - 50) <= 5
    star = within([(0, 0), (10, 10), (10, 0), (0, 10)], (10, 10))  # crosses itself
    assert not star[1, 5] and star[5, 1] and star[5, 8]
    alpha = np.ones((2, 10, 12))
    weights, cover = with_fill(alpha * np.array([0.6, 0.3])[:, None, None], alpha)
    locks = parse_locks(["0>* in 2 1 8 1 8 6 2 6", "2>1"], "lock")
    locked = apply_locks(locks, weights, cover, {polygon: inside.ravel()}).reshape(3, 10, 12)
    assert np.allclose(locked[:, inside].T, [1, 0, 0]) and np.allclose(locked[:, ~inside].T, [0.1, 0, 0.9])


def test_an_exact_copy_has_its_originals_place():
    torch.manual_seed(0)
    scene, logits = draw_scene(1, (64, 64), 3), torch.randn(4, 64, 64)
    alone = order_of(scene, blend_hole(scene, logits), logits.numpy())["pairs"]
    scene.completions.append(scene.completions[1])
    logits = torch.cat([logits, torch.full((1, 64, 64), ABSENT)])  # as the predictor returns them
    both = order_of(scene, blend_hole(scene, logits), logits.numpy())["pairs"]
    pairs = {frozenset((pair["front"], pair["behind"])): pair for pair in both}
    assert pairs.pop(frozenset((2, 4)))["confidence"] == 0.5
    for pair in alone:
        assert pairs.pop(frozenset((pair["front"], pair["behind"]))) == pair
    assert len(pairs) > 0
    for pair in pairs.values():  # 4 has the place of 2
        names = ["front", "behind"]
        of_original = {name: 2 if pair[name] == 4 else pair[name] for name in names}
        assert pair | of_original in alone


def test_order_and_locks_ignore_how_weights_are_stored(monkeypatch):
    torch.manual_seed(0)
    scene, logits = draw_scene(1, (60, 100), 4), torch.randn(5, 16, 16)
    exact, small = (blend_hole(scene, logits, kept) for kept in (True, False))
    one, two = (order_of(scene, blend, logits.numpy()) for blend in (exact, small))
    assert len(one["pairs"]) > 3
    for a, b in zip(one["pairs"], two["pairs"], strict=True):
        assert (a["front"], a["area"]) == (b["front"], b["area"])
        assert a["confidence"] == pytest.approx(b["confidence"], abs=1e-3)
    monkeypatch.setattr("amodal_fusion.output.order.MOST_COUNTED", 4 * 60 * 100 // 4)  # every second row and column
    sparse = order_of(scene, exact, logits.numpy())["pairs"]
    assert all(0.8 < a["area"] / b["area"] < 1.2 for a, b in zip(sparse, one["pairs"]) if b["area"] > 200)
    before = exact.colours.copy()
    for blend in (exact, small):
        lock_blend([Lock(3, 1), Lock(0, 2)], scene, blend)
    assert np.allclose(exact.weights, small.weights / 65535, atol=1e-4)
    assert np.allclose(exact.colours, small.colours, atol=1e-4)
    rgb = np.stack([completion[scene.mask][:, :3] for completion in scene.completions]) / 255
    expected = (exact.weights[..., None] * rgb).sum(0) + exact.residual[:, None] * exact.fill
    assert np.allclose(exact.colours, expected, atol=1e-5) and np.abs(exact.colours - before).max() > 0.1
    scene.completions[3][scene.mask, 3] = 0
    assert lock_blend([Lock(2, 1), Lock(4, 1), Lock(0, 3)], scene, exact) == [1]  # what changes nothing is told


def test_locks_are_read_and_their_faults_named(tmp_path):
    path = tmp_path / "locks.yaml"
    path.write_text('0012: ["1>3", 2 > 4]\nno: 0>1\n', encoding="utf-8")
    for name in ("0012", "no", "other"):
        (tmp_path / name).mkdir()
    assert read_locks(path, tmp_path) == {"0012": [Lock(1, 3), Lock(2, 4)], "no": [Lock(0, 1)]}
    for text in ("1>3", "0>*", "*>12", "0>* in 1 2 3 4 5 6"):
        assert list(map(str, parse_locks([text], "lock"))) == [text]
    assert parse_locks(["*>4", "*>5", "0>5"], "lock")[0] == Lock(ALL, 4)  # two are forgotten, in no circle
    for text, fault in (("x: [1>2]", "no scene 'x'"), ("no: [1<2]", "no: '1<2' is no lock"), ("no: [2>2]", "no lock"),
                        ("no: [1>2, 2>3, 3>1]", "circle"), ("- 1>2", "expected lines"), ("no: [", "YAML: line 1: .*"),
                        ("no: [*>4]", "line 1: .*quote"),
                        ("no: 1>2\nno: 2>3", "no is listed twice"),
                        ("no: ['*>*']", "no lock"), ("no: [1>2 in 3 4 5 6]", "no lock"), ("no: [2>*, 1>2]", "circle"),
                        ("no: ['*>2', 2>1]", "circle")):
        path.write_text(text)
        with pytest.raises(ConfigError, match=fault):
            read_locks(path, tmp_path)
    with pytest.raises(ConfigError, match="none: no such file"):
        read_locks(tmp_path / "none", tmp_path)
    with pytest.raises(ConfigError, match=r"lock: (1>2>3>1|2>3>1>2|3>1>2>3) is a circle"):
        parse_locks(["1>2", "2>3", "3>1"], "lock")


def test_script_writes_the_requested_outputs(tmp_path, checkpoint, backbone):
    data, output = tmp_path / "data", tmp_path / "out"
    for seed, name in enumerate(("one", "two")):
        (data / name).mkdir(parents=True)
        write_scene(data / name, draw_scene(seed, 64, 3, name))
    (tmp_path / "locks.yaml").write_text("two: [2>1]")

    def fuse(*arguments):
        process = run("amodal_fusion_transformer_inference.py", "--data_dir", data, "--output_dir", output,
                      "--checkpoint", checkpoint, "--lpips_weights", backbone, "--workers", 0, "--no-figures",
                      *arguments)
        assert process.returncode == 0, process.stderr
        return process.stdout

    said = fuse("--locks", tmp_path / "locks.yaml", "--handover", "iopaint", tmp_path / "to", "--seam", 1, "--report",
                "--evaluate", "--inpaint_command", write_inpainter(tmp_path))
    assert "2 scenes written to" in said and str(output / "report.html") in said
    assert "| command | ours |" in said and "| telea | visible_fit |" in said
    with open(output / "metrics.csv", newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            assert float(row["command_hole_psnr"]) < float(row["telea_hole_psnr"])  # grey is no answer
    assert {path.name for path in (tmp_path / "to" / "masks").glob("*.png")} == {"one.png", "two.png"}

    def locked(name):
        order = json.loads((output / name / "order.json").read_text())
        return [(pair["front"], pair["behind"]) for pair in order["pairs"] if "locked" in pair]

    def both():
        first, second = (read_image(data / "two" / f"comp{k}.png", "RGBA")[..., 3] > 0 for k in (1, 2))
        return first & second & (read_image(data / "two" / "mask.png", "L") > 0)

    assert locked("one") == [] and locked("two") == [(2, 1)]
    assert both().sum() > 20 and not read_image(output / "two" / "weight_1.png", "L")[both()].any()
    before = read_image(output / "two" / "fused.png", "RGB")
    (tmp_path / "locks.yaml").write_text("two: [1>2]")
    said = fuse("--locks", tmp_path / "locks.yaml")
    assert "1 of 2 scenes are done" in said and locked("two") == [(1, 2)]
    assert "1 scenes are recomputed: their locks changed" in said and "files or options" not in said
    page = (output / "report.html").read_text(encoding="utf-8")  # the earlier page, written again
    assert '"locks":["1>2"]' in page and '"id":"one"' in page and (output / "two" / "page.js").exists()
    assert not read_image(output / "two" / "weight_2.png", "L")[both()].any()
    assert (read_image(output / "two" / "fused.png", "RGB") != before)[both()].any()
    assert "2 of 2 scenes are done" in fuse("--locks", tmp_path / "locks.yaml", "--report")

    files = {path: path.read_bytes() for path in output.rglob("*") if path.is_file()}
    (tmp_path / "locks.yaml").write_text("two: [1>9]")
    process = run("amodal_fusion_transformer_inference.py", "--data_dir", data, "--output_dir", output, "--checkpoint",
                  checkpoint, "--no-metrics", "--workers", 0, "--locks", tmp_path / "locks.yaml")
    assert process.returncode == 2 and "locks.yaml: two: lock 1>9" in process.stderr and "(--locks)" in process.stderr
    assert files == {path: path.read_bytes() for path in output.rglob("*") if path.is_file()}
    for options, fault in (({"inpaint_command": "x"}, "ask for one"),
                           ({"clip_weights": "x"}, "CLIP"), ({"fid_weights": "y"}, "FID"),
                           ({"handover_given": ("hole",)}, "only used by a handover"),
                           ({"handover": ("lamma", "to")}, "not one of lama"),
                           ({"handover": ("lama", str(tmp_path))}, "choose another folder")):
        with pytest.raises(ConfigError, match=fault):
            check_options(InferenceConfig(str(data), output_dir=str(output), **options))
    with pytest.raises(ConfigError, match="single scene"):
        list_locks("1>2", None, data, ["one", "two"])
    assert list_locks("1>2, 0>3", None, data, ["one"]) == {"one": [Lock(1, 2), Lock(0, 3)]}
    with pytest.raises(ConfigError, match=r"one: lock 0>3: the completions of the scene are 1, 2$"):
        list_locks("1>2, 0>3", None, data, ["one"], 2)


def test_flat_names_are_those_of_the_earlier_scripts(tmp_path, checkpoint):
    data, output = tmp_path / "data", tmp_path / "out"
    scene = draw_scene(3, 64, 2, "shop")
    scene.numbers = [2, 5]
    (data / "shop").mkdir(parents=True)
    write_scene(data / "shop", scene)

    def fuse(*options):
        process = run("amodal_fusion_transformer_inference.py", "--data_dir", data, "--output_dir", output,
                      "--checkpoint", checkpoint, "--no-metrics", "--workers", 0, *options)
        assert process.returncode == 0, process.stderr
        return {path.name for path in output.glob("*.png")}

    fuse()
    flat = {f"shop_{name}.png" for name in ("fused", "visualization", "weight2", "weight5", "comp2_masked",
                                            "comp5_masked")}
    assert fuse("--flat_names") == flat
    for one, other in (("fused", "fused"), ("visualization", "figure")):
        assert (output / f"shop_{one}.png").read_bytes() == (output / "shop" / f"{other}.png").read_bytes()
    weight = read_image(output / "shop" / "weight_5.png", "L")
    viridis = np.rint(colormaps["viridis"](weight)[..., :3] * 255)
    assert np.array_equal(read_image(output / "shop_weight5.png", "RGB"), viridis) and weight.max() > 0
    masked = read_image(output / "shop_comp5_masked.png", "RGB")
    colours = np.rint(scene.completions[1][..., :3] * (scene.completions[1][..., 3:] / 255.0))
    assert np.array_equal(masked, np.where(scene.mask[..., None], colours, 0)) and masked.any()
    (data / "shop_2").mkdir()
    write_scene(data / "shop_2", draw_scene(4, 64, 1, "shop_2"))
    both = flat | {f"shop_2_{name}.png" for name in ("fused", "visualization", "weight1", "comp1_masked")}
    assert fuse("--flat_names") == both
    (tmp_path / "locks.yaml").write_text("shop_2: [0>1]")
    assert fuse("--locks", tmp_path / "locks.yaml") == flat  # those of the other scene stay
    (output / "mine_fused.png").write_bytes(b"mine")
    assert fuse("--overwrite") == {"mine_fused.png"}  # flat files would show the results of before


def test_onnx_equals_the_network_for_every_scene(tmp_path, checkpoint):
    path = tmp_path / "network.onnx"
    process = run("amodal_fusion_transformer_inference.py", "--export_onnx", path, "--checkpoint", checkpoint,
                  timeout=280)
    assert process.returncode == 0 and "onnxruntime's result differs by" in process.stdout, process.stderr
    model, _ = load_model(checkpoint)
    for size, completions in (((64, 96), 1), ((256, 256), 2), ((32, 304), 7)):  # below and above 16 tokens a side
        assert compare(model, path, size, completions) < 1e-4
    for size in ((64, 90), (45, 96)):
        with pytest.raises(Exception, match="height_and_width_must_be_multiples_of_16"):
            compare(model, path, size, 2)


def test_onnx_models_name_sides_to_pad():
    onnx, runtime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    from onnx import helper

    values = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, (1, 1, "h", "w")) for name in ("mask", "out")]
    node = helper.make_node("Neg", ["mask"], ["out"])
    network = helper.make_model(helper.make_graph([node], "network", values[:1], values[1:]),
                                opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    check_sides(network)
    onnx.checker.check_model(network)
    session = runtime.InferenceSession(network.SerializeToString(), providers=["CPUExecutionProvider"])
    for size in ((32, 48), (32, 40), (33, 48)):
        mask = np.ones((1, 1, *size), np.float32)
        if size == (32, 48):
            assert (session.run(None, {"mask": mask})[0] == -1).all()
            continue
        with pytest.raises(Exception, match="height_and_width_must_be_multiples_of_16__pad_the_pictures"):
            session.run(None, {"mask": mask})
