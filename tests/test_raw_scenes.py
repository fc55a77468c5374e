"""What `create` concludes from pixels: alpha or modal mask, hole or object, target or partial image; and `check`."""

import os

import cv2
import numpy as np
import pytest
from PIL import Image

from amodal_fusion.data.checks import check_scene
from amodal_fusion.data.consistency import misfit
from amodal_fusion.data.images import MOST_PIXELS, read_image, resize, write_image
from amodal_fusion.data.scenes import read_scene, write_scene
from amodal_fusion.data.toy import draw_scene
from amodal_fusion.errors import SceneError
from amodal_fusion.ingest.layouts import RawCompletion, RawScene, find_raw_scenes
from amodal_fusion.ingest.matting import cut_out, key_background
from amodal_fusion.ingest.raw_scenes import read_raw_scene
from amodal_fusion.ingest.selection import select_completions
from tests.scripts import run


class Results:
    """A drawn scene and the pictures that a pipeline would make of it."""

    def __init__(self, seed=2, size=64):
        self.scene = draw_scene(seed, size)
        self.photo, self.hole = self.scene.original, self.scene.mask
        self.partial, self.mask = self.scene.partial, self.hole.astype(np.uint8) * 255
        self.objects = self.scene.completions
        self.alphas = [picture[..., 3] for picture in self.objects]
        self.visible = [np.uint8(255) * ((picture[..., :3] == self.photo).all(2) & (picture[..., 3] > 0))
                        for picture in self.objects]

    def on(self, i, colour, noise=0.0):
        """Object i without alpha on a flat background."""
        whole = np.where(self.alphas[i][..., None] > 0, self.objects[i][..., :3], np.uint8(colour)).astype(np.float32)
        return np.clip(whole + np.random.default_rng(i).normal(0, noise, whole.shape), 0, 255).astype(np.uint8)

    def made_up(self, i):
        """Object i, in the hole as a completer imagined it."""
        picture = self.objects[i].copy()
        inside = self.hole & (picture[..., 3] > 0)
        picture[inside, :3] = 255 - picture[inside, :3]
        return picture


def write(folder, **pictures):
    """A folder of pictures by their names, dots written as '__'; returns its raw scene."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, picture in pictures.items():
        Image.fromarray(np.asarray(picture)).save(folder / name.replace("__", "."), quality=95)
    (scene,), faults = find_raw_scenes(folder)
    assert not faults
    return scene


def iou(one, other):
    return (one & other).sum() / max(1, (one | other).sum())


def matches(scene, alphas, least=0.95):
    """Whether every completion of the scene has the shape of one of `alphas`."""
    return all(max(iou(c[..., 3] > 127, alpha > 127) for alpha in alphas) > least for c in scene.completions)


# ---- masks beside completions

def test_pixels_decide_whether_mask_is_alpha_or_modal(tmp_path):
    made = Results()
    common = {"original__png": made.photo, "partial__png": made.partial, "mask__png": made.mask}
    comps = {f"comp{i}__png": made.on(i, 255) for i in range(3)}
    # dark objects on black: what a flood fill eats, the mask gives back
    on_black = {f"comp{i}__png": np.where(made.alphas[i][..., None] > 0, made.objects[i][..., :3] // 6, 0)
                for i in range(3)}
    for name, pictures in (("white", comps), ("black", on_black)):
        scene, report = read_raw_scene(write(tmp_path / name, **common, **pictures, **{
            f"comp{i}_mask__png": made.alphas[i] for i in range(3)}), 5)
        assert matches(scene, made.alphas, 0.95 if name == "white" else 0.85) and scene.visible is None, name
        assert "comp0_mask.png …: alpha, they contain the completions" in report["notes"]
        assert {row["background"] for row in report["completions"]} == {"mask beside it"}

    scene, report = read_raw_scene(write(tmp_path / "inverted", **common, **comps, **{
        f"comp{i}_mask__png": 255 - made.alphas[i] for i in range(3)}), 5)
    assert matches(scene, made.alphas) and "comp0_mask.png …: inverted, black is the object" in report["notes"]
    # full pictures say nothing about what their masks are
    scene, report = read_raw_scene(write(tmp_path / "photos", **common, **{
        f"comp{i}__png": np.where(made.alphas[i][..., None] > 0, made.objects[i][..., :3], made.photo) for i in range(3)
    }, **{f"comp{i}_silhouette__png": made.alphas[i] for i in range(3)}), 5)
    assert matches(scene, made.alphas) and any("taken as alpha" in note for note in report["notes"])

    scene, report = read_raw_scene(write(tmp_path / "modal", **common, **comps, **{
        f"comp{i}_mask__png": made.visible[i] for i in range(3)}), 5)
    assert matches(scene, made.alphas, 0.9) and {row["background"] for row in report["completions"]} == {"white"}
    assert any(note.startswith("comp0_mask.png …: modal masks, ") for note in report["notes"])
    for row in report["completions"]:
        if row["kept_as"]:
            shown = scene.visible[row["kept_as"] - 1]
            assert np.array_equal(shown, made.visible[int(row["file"][4])] > 127)


def test_visible_mask_stays_beside_completion_at_every_size(tmp_path):
    made = Results()
    pictures = {f"comp{i}__png": made.objects[i] for i in range(3)} | {"comp1_visible__png": made.visible[1]}
    scene, report = read_raw_scene(write(tmp_path / "raw", original__png=made.photo, partial__png=made.partial,
                                         mask__png=made.mask, **pictures), 5)
    number = next(row["kept_as"] for row in report["completions"] if row["file"] == "comp1.png")
    (tmp_path / "data").mkdir()
    write_scene(tmp_path / "data", scene.resized((32, 32)))
    assert [path.name for path in (tmp_path / "data").glob("*_visible.png")] == [f"comp{number}_visible.png"]
    assert read_scene(tmp_path / "data").visible is None  # nobody asked
    back = read_scene(tmp_path / "data", with_visible=True)
    assert sum(shown is None for shown in back.visible) == len(back.visible) - 1
    assert iou(back.visible[number - 1], made.visible[1][::2, ::2] > 127) > 0.8
    assert check_scene(tmp_path / "data") is None


def test_modal_mask_beside_its_completion_is_left_out(tmp_path):
    made = Results()
    scene, report = read_raw_scene(write(tmp_path / "raw", original__png=made.photo, partial__png=made.partial,
                                         mask__png=made.mask, **{f"comp{i}__png": made.objects[i] for i in range(3)},
                                         comp1_visible__png=255 - made.alphas[1]), 5)
    assert scene.visible is None and len(scene.completions) == 3
    assert "the modal mask of comp1.png does not cover what it shows, ignored" in report["notes"]
    (tmp_path / "data").mkdir()
    write_scene(tmp_path / "data", scene)
    assert check_scene(tmp_path / "data") is None


def test_modal_masks_separate_twins_and_limit_the_comparison():
    made = Results(seed=9, size=128)
    photo, hole, picture, shown = made.partial, made.hole, made.objects[1], made.visible[1] > 127
    worse = picture.copy()
    worse[shown, :3] = np.clip(worse[shown, :3].astype(int) + 20, 0, 255)
    # hidden by a front object: off the photo there, and none the worse
    better = picture.copy()
    better[~shown, :3] = 255 - better[~shown, :3]
    _, rows = select_completions([worse, better], hole, photo, 5, [shown, shown])
    assert rows[1]["visible_error"] < 0.03 < rows[0]["visible_error"]
    _, rows = select_completions([worse, better], hole, photo, 5)
    assert min(row["visible_error"] for row in rows) > 0.1  # the front object counts against both
    _, rows = select_completions([picture, picture.copy()], hole, photo, 5, [shown, ~shown & (picture[..., 3] > 0)])
    assert [row["kept_as"] for row in rows].count(None) == 0  # alike, and two objects
    _, rows = select_completions([picture, picture.copy()], hole, photo, 5)
    assert [row["kept_as"] for row in rows].count(None) == 1


def test_completions_on_larger_canvas_follow_their_offset(tmp_path):
    made = Results()
    canvas = cv2.copyMakeBorder(made.on(0, 255), 10, 6, 12, 4, cv2.BORDER_CONSTANT, value=(255, 255, 255))
    alpha = cv2.copyMakeBorder(made.alphas[0], 10, 6, 12, 4, cv2.BORDER_CONSTANT, value=0)
    for name, picture in (("original", made.photo), ("partial", made.partial), ("mask", made.mask), ("c", canvas),
                          ("a", alpha), ("v", made.visible[0])):
        write_image(tmp_path / f"{name}.png", picture)
    files = {name: tmp_path / f"{name}.png" for name in ("original", "partial", "mask")}
    completion = RawCompletion(tmp_path / "c.png", tmp_path / "a.png", tmp_path / "v.png", offset=(-10, -12))
    scene, _ = read_raw_scene(RawScene("s", tmp_path, **files, completions=[completion]), 5)
    assert iou(scene.completions[0][..., 3] > 127, made.alphas[0] > 127) > 0.97
    assert np.array_equal(scene.visible[0], made.visible[0] > 127)  # that one is in the photo's frame


# ---- holes

def test_mask_without_hole_is_refused_unless_requested(tmp_path):
    made = Results(seed=6)
    comps = {f"comp{i}__png": made.on(i, 255) for i in range(3)}
    hidden = min(range(3), key=lambda i: (made.visible[i] > 0).sum() / (made.alphas[i] > 0).sum())
    modal = made.visible[hidden]
    outline = rf"mask.png: white follows the visible outline of comp{hidden}.png.*say which side"
    with pytest.raises(SceneError, match=outline):
        read_raw_scene(write(tmp_path / "a", original__png=made.photo, mask__png=modal,
                             partial__png=np.where(modal[..., None] > 0, 0, made.photo), **comps), 5)
    told, report = read_raw_scene(find_raw_scenes(tmp_path / "a")[0][0], 5, mask_hole="white")
    assert np.array_equal(told.mask, modal > 127) and report["hole"] == "white in the mask (as given)"
    with pytest.raises(SceneError, match=r"partial.png: shows the same as original.png in the hole, nothing is blank"):
        read_raw_scene(write(tmp_path / "b", original__png=made.photo, partial__png=made.photo, mask__png=made.mask,
                             **comps), 5)
    told, _ = read_raw_scene(find_raw_scenes(tmp_path / "b")[0][0], 5, mask_hole="white")
    assert np.array_equal(told.partial, made.partial)
    files = write(tmp_path / "told", partial__png=made.partial, mask__png=made.mask, **comps)
    _, report = read_raw_scene(files, 5, mask_hole="black")
    assert "partial.png is blank where mask.png is white, mask_hole says black" in report["notes"]
    # a flat object is as blank as a hole, and still the photo
    flat = made.photo.copy()
    flat[8:56, 10:54] = (200, 40, 40)
    with pytest.raises(SceneError, match="nothing is blank"):
        noisy = np.clip(flat + np.random.default_rng(0).normal(0, 2, flat.shape), 0, 255).astype(np.uint8)
        read_raw_scene(write(tmp_path / "c", original__png=noisy, partial__png=flat, mask__png=made.mask, **comps), 5)
    part = made.mask.copy()
    part[:, :32] = 0
    with pytest.raises(SceneError, match=r"partial.png: also blank outside of mask.png, on"):
        read_raw_scene(write(tmp_path / "d", original__png=made.photo, partial__png=made.partial, mask__png=part,
                             **comps), 5)
    with pytest.raises(SceneError, match=r"mask.png: grey nearly everywhere: a picture, not a black and white mask"):
        read_raw_scene(write(tmp_path / "e", original__png=made.photo, mask__png=made.photo, **comps), 5)


@pytest.mark.parametrize("inverted", [False, True])
def test_completions_show_hole_side_without_a_partial_image(tmp_path, inverted):
    made = Results()
    mask = 255 - made.mask if inverted else made.mask
    scene, report = read_raw_scene(write(tmp_path / "a", original__png=made.photo, mask__png=mask, **{
        f"comp{i}__png": made.made_up(i) for i in range(3)}), 5)
    assert np.array_equal(scene.mask, made.hole) and np.array_equal(scene.original, made.photo)
    assert report["hole"] == f"{'black' if inverted else 'white'} in the mask (completions fit the photo outside)"
    # completers that saw the whole photo are right on both sides; one that is hidden is wrong on any
    for name, comps in (("all", range(3)), ("one", [0])):
        with pytest.raises(SceneError, match=r"no partial image.*does not tell the hole; say which side"):
            read_raw_scene(write(tmp_path / name, original__png=made.photo, mask__png=mask, **{
                f"comp{i}__png": made.objects[i] for i in comps}), 5)


@pytest.mark.parametrize("blank", [0, 255, 127])
def test_original_equal_to_partial_image_is_no_target(tmp_path, blank):
    made = Results()
    blanked = np.where(made.hole[..., None], np.uint8(blank), made.photo)
    comps = {f"comp{i}__png": made.on(i, 255 - blank if blank != 127 else 255) for i in range(3)}
    cases = {"with mask": {"mask__png": made.mask}, "with mask and partial": {"mask__png": 255 - made.mask,
                                                                             "partial__png": blanked}}
    if blank != 127:
        cases["without mask"] = {"partial__png": blanked}
    for name, files in cases.items():
        for suffix in ("png", "jpg"):
            scene, report = read_raw_scene(write(tmp_path / f"{name} {suffix}", **files, **comps, **{
                f"original__{suffix}": blanked}), 5)
            assert scene.original is None and iou(scene.mask, made.hole) > 0.85, (name, suffix)
            assert any("no target, the scene is for inference only" in note for note in report["notes"])
    sky = made.photo.copy()
    sky[:] = (180, 200, 230)
    flat, _ = read_raw_scene(write(tmp_path / "sky", original__png=sky, mask__png=made.mask, partial__png=np.where(
        made.hole[..., None], 0, sky).astype(np.uint8), **comps), 5)
    assert flat.original is not None  # a flat sky goes on beside the hole


def test_frame_with_other_objects_is_another_photo(tmp_path):
    made = Results()
    other = made.photo.copy()
    other[36:56, 2:14] = (230, 230, 40)  # on one backdrop, as frames of one camera are
    assert np.abs(made.photo.astype(int) - other)[~made.hole].mean() < 12
    comps = {f"comp{i}__png": made.objects[i] for i in range(3)}
    with pytest.raises(SceneError, match=r"partial.png: another photo\? \d+% of the visible part differs"):
        read_raw_scene(write(tmp_path / "a", original__png=other, partial__png=made.partial, mask__png=made.mask,
                             **comps), 5)


def test_shrunk_mask_leaves_no_black_rim(tmp_path):
    made = Results(size=96)
    comps = {f"comp{i}__png": made.objects[i] for i in range(2)}
    for side in (3, 9, 13):  # by 1, 4 and 6 pixels
        shrunk = cv2.erode(made.mask, np.ones((side, side)))
        files = {"partial__png": made.partial, "mask__png": shrunk, **comps}
        scene, report = read_raw_scene(write(tmp_path / f"alone {side}", **files), 5)  # nothing else knows better
        assert np.array_equal(scene.mask, made.hole)
        assert any(f"mask.png grown by {side // 2} pixel" in note for note in report["notes"])
        if side < 11:  # the rim is taken from the original
            scene, _ = read_raw_scene(write(tmp_path / f"with {side}", original__png=made.photo, **files), 5)
            assert np.array_equal(scene.partial[~scene.mask], made.photo[~scene.mask])
    for side in (11, 13, 21):  # by 5, 6 and 10 pixels
        with pytest.raises(SceneError, match=r"partial.png: also blank outside of mask.png"):
            read_raw_scene(write(tmp_path / str(side), original__png=made.photo, partial__png=made.partial,
                                 mask__png=cv2.erode(made.mask, np.ones((side, side))), comp0__png=made.objects[0],
                                 comp1__png=made.objects[1]), 5)


def test_white_sky_beside_black_hole_is_no_hole(tmp_path):
    made = Results(size=96)
    partial = made.partial.copy()
    sky = np.zeros_like(made.hole)
    sky[:25] = True
    sky &= cv2.erode((~made.hole).astype(np.uint8), np.ones((15, 15))) > 0
    soft = np.clip(1 - cv2.distanceTransform((~sky).astype(np.uint8), cv2.DIST_L2, 5) / 30, 0, 1)[..., None]
    soft = soft * ~made.hole[..., None]
    partial = np.rint(partial * (1 - soft) + 255 * soft).astype(np.uint8)
    comps = {f"comp{i}__png": made.objects[i] for i in range(3)}
    scene, _ = read_raw_scene(write(tmp_path / "soft", partial__png=partial, **comps), 5)
    assert iou(scene.mask, made.hole) > 0.8
    both = made.partial.copy()
    both[:30, :30] = 255  # as sharp as the hole
    with pytest.raises(SceneError, match="no mask, and large black and white regions; add the mask"):
        read_raw_scene(write(tmp_path / "both", partial__png=both, **comps), 5)


@pytest.mark.parametrize("names", [("original", "partial", "{}"), ("0001_original", "0001_partial", "0001_result_{}")])
def test_partial_image_beside_any_layout_brings_its_hole(tmp_path, names):
    made, (original, partial, drawn) = Results(size=96), names
    raw = write(tmp_path, **{original + "__png": made.photo, partial + "__png": made.partial},
                **{drawn.format(i) + "__png": made.objects[i] for i in range(3)})
    scene, report = read_raw_scene(raw, 5)
    assert raw.layout != "original, partial, mask, comp1 …" and report["hole"] == "found from the partial image"
    assert iou(scene.mask, made.hole) > 0.8 and len(scene.completions) == 3


def test_masks_crops_and_other_pictures_are_not_completions(tmp_path):
    made = Results(size=96)
    files = {"original__png": made.photo, "partial__png": made.partial, "mask__png": made.mask}
    names = (("amodal_rgb_{}", "amodal_mask_{}"), ("obj_{}_rgb", "obj_{}_mask"), ("obj_{}", "obj_{}_amodal_mask"),
             ("completion_{}", "completion_mask_{}"))
    for number, (drawn, mask) in enumerate(names):
        raw = write(tmp_path / str(number), **files, **{drawn.format(i) + "__jpg": made.photo for i in range(3)},
                    **{mask.format(i) + "__png": made.alphas[i] for i in range(3)})
        scene, report = read_raw_scene(raw, 5)
        assert len(report["completions"]) == 3 and matches(scene, made.alphas), drawn
    with pytest.raises(SceneError, match="white nearly everywhere, are these masks inverted"):
        read_raw_scene(write(tmp_path / "inverted", **files, **{f"obj_{i}__jpg": made.photo for i in range(3)},
                             **{f"obj_{i}_mask__png": 255 - made.alphas[i] for i in range(3)}), 5)
    comps = {f"obj_{i}__png": made.objects[i] for i in range(3)}
    raw = write(tmp_path / "seg", **files, **comps, obj_0_seg__png=made.alphas[0], obj_1_depth__png=made.alphas[1] // 2,
                result__png=made.photo)
    scene, report = read_raw_scene(raw, 5)
    assert len(scene.completions) == 3 and matches(scene, made.alphas)
    assert [row["file"] for row in report["completions"] if row["reason"] == "silhouette"] == ["obj_0_seg.png"]
    assert any("only black and white, so a mask" in note for note in report["notes"])
    assert any("no role in the name: obj_1_depth.png, result.png" in note for note in report["notes"])
    with pytest.raises(SceneError, match="completions of 3 sizes, are they crops"):
        read_raw_scene(write(tmp_path / "crops", **files, **{
            f"comp{i}__png": made.objects[i][: 20 + i, : 20 + i] for i in range(3)}), 5)
    slope = np.repeat(np.linspace(60, 200, 96, dtype=np.uint8)[None], 96, 0)[..., None]
    slope = np.where(made.alphas[1][..., None] > 0, made.objects[1][..., :3], slope)
    _, report = read_raw_scene(write(tmp_path / "slope", **files, comp0__png=made.objects[0], comp1__png=slope), 5)
    assert any("comp1.png: covers the whole frame and differs from the photo" in note for note in report["notes"])


def test_wrong_photos_and_colour_orders_are_named(tmp_path):
    made = Results(seed=1, size=96)
    files = {"original__png": made.photo, "partial__png": made.partial, "mask__png": made.mask}
    with pytest.raises(SceneError, match=r"red and blue are swapped in the completions"):
        read_raw_scene(write(tmp_path / "bgr", **files, **{
            f"comp{i}__png": made.objects[i][..., [2, 1, 0, 3]] for i in range(3)}), 5)
    for name, turn in (("mirrored", lambda picture: picture[:, ::-1]), ("upside down", lambda picture: picture[::-1])):
        with pytest.raises(SceneError, match=f"the completions are {name}"):
            read_raw_scene(write(tmp_path / name, **files, **{
                f"comp{i}__png": turn(made.objects[i]) for i in range(3)}), 5)
    with pytest.raises(SceneError, match="the alpha of the completions is inverted"):
        read_raw_scene(write(tmp_path / "alpha", **files, **{
            f"comp{i}__png": np.dstack([made.on(i, 255), 255 - made.alphas[i]]) for i in range(3)}), 5)
    whole = [np.where(made.alphas[i][..., None] > 0, made.objects[i][..., :3], made.photo) for i in range(3)]
    assert len(read_raw_scene(write(tmp_path / "whole", **files, **{  # pictures of all, with the object's alpha
        f"comp{i}__png": np.dstack([whole[i], made.alphas[i]]) for i in range(3)}), 5)[0].completions) == 3
    _, report = read_raw_scene(write(tmp_path / "other", **files, **{
        f"comp{i}__png": np.dstack([255 - made.objects[i][..., :3], made.alphas[i]]) for i in range(3)}), 5)
    assert any("no completion agrees with the photo anywhere" in note for note in report["notes"])


def test_wall_in_object_colour_is_no_mirror_image():
    """Little is seen of an object in the hole, and badly redrawn; mirrored, all of it lies on a wall of its colour."""
    photo = np.random.default_rng(0).integers(0, 256, (128, 128, 3)).astype(np.uint8)
    photo[30:80, :50] = 120
    completion, hole = np.zeros((128, 128, 4), np.uint8), np.zeros((128, 128), bool)
    completion[30:80, 78:] = (120, 120, 120, 255)
    hole[20:90, 86:] = True
    assert misfit(photo, [completion], [None], hole) == (None, None)


def test_a_completed_background_keeps_its_white_sky(tmp_path):
    made, noise = Results(seed=1, size=96), np.random.default_rng(0)
    ground = noise.integers(40, 200, (96, 96, 3)).astype(np.uint8)
    ground[:40] = 252
    photo = np.where(made.alphas[0][..., None] > 0, made.objects[0][..., :3], ground)
    files = {"original__png": photo, "mask__png": made.mask, "comp0__png": made.on(0, 255),
             "partial__png": np.where(made.hole[..., None], 0, photo).astype(np.uint8)}
    scene, report = read_raw_scene(write(tmp_path, **files, comp1__png=ground), 5)
    assert [row["background"] for row in report["completions"]] == ["white", "opaque"]
    assert any("comp1.png: kept whole, as a completed background" in note for note in report["notes"])
    assert sum((completion[..., 3] == 255).all() for completion in scene.completions) == 1
    _, report = read_raw_scene(find_raw_scenes(tmp_path)[0][0], 5, background="white")
    assert [row["background"] for row in report["completions"]] == ["white", "white"]


def test_a_black_hole_in_a_dark_photo(tmp_path):
    photo = np.random.default_rng(0).integers(8, 16, (96, 96, 3)).astype(np.uint8)
    photo[20:36, 50:66] = (200, 60, 60)
    hole = np.zeros((96, 96), bool)
    hole[24:80, 20:58] = True
    lamp = np.zeros((96, 96, 4), np.uint8)
    lamp[20:36, 50:66] = (200, 60, 60, 255)
    scene, report = read_raw_scene(write(
        tmp_path / "mask", original__png=photo, partial__png=np.where(hole[..., None], 0, photo).astype(np.uint8),
        mask__png=hole.astype(np.uint8) * 255, comp0__png=lamp), 5)
    assert np.array_equal(scene.mask, hole) and report["hole"] == "white in the mask"
    # without the mask: what differs from an exact copy by a level was blanked, too
    scene, _ = read_raw_scene(write(
        tmp_path / "none", original__png=photo, partial__png=np.where(hole[..., None], 0, photo).astype(np.uint8),
        comp0__png=lamp), 5)
    assert iou(scene.mask, hole) > 0.9


def test_completion_ending_with_the_hole_keeps_the_hole(tmp_path):
    """Completers that draw around a hole leave its outline in their alpha; a box is nobody's outline."""
    made, (rows, columns) = Results(seed=6, size=96), np.mgrid[:96, :96]
    round_hole = (rows - 48) ** 2 + (columns - 48) ** 2 < 24**2
    for name, hole in (("round", round_hole), ("box", (abs(rows - 48) < 20) & (abs(columns - 48) < 24))):
        files = {"original__png": made.photo, "mask__png": hole.astype(np.uint8) * 255,
                 "partial__png": np.where(hole[..., None], 0, made.photo).astype(np.uint8)}
        unlike = np.dstack([255 - made.photo, files["mask__png"]])
        scene, _ = read_raw_scene(write(tmp_path / name, **files, comp0__png=unlike), 5)
        assert np.array_equal(scene.mask, hole)
    seen = np.dstack([made.photo, round_hole.astype(np.uint8) * 255])  # the photo's own there: what is visible of it
    with pytest.raises(SceneError, match=r"white follows the visible outline of comp0.png"):
        read_raw_scene(write(tmp_path / "round", comp0__png=seen), 5)


# ---- what is object in a completion

@pytest.mark.parametrize(("colour", "kind"), [
    ((128, 128, 128), "#808080"), ((0, 255, 0), "#00ff00"), ((90, 60, 200), "#5a3cc8"), ((250, 250, 250), "white"),
    ((3, 3, 3), "black")])
def test_any_flat_background_is_keyed(colour, kind):
    made = Results(size=96)
    for picture in (made.on(0, colour, noise=1.5), np.asarray(Image.fromarray(made.on(0, colour)))):
        keyed, found = key_background(picture)
        assert found[:3] == kind[:3] and iou(keyed[..., 3] > 127, made.alphas[0] > 127) > 0.93
    photo = cv2.resize(np.random.default_rng(0).integers(90, 250, (12, 12, 3), dtype=np.uint8), (96, 96))
    assert key_background(photo)[1] == "opaque"


def test_constant_alpha_counts_as_no_alpha():
    made = Results(size=96)
    opaque = np.dstack([made.on(0, 255), np.full((96, 96), 255, np.uint8)])
    stray, constant, counted = opaque.copy(), opaque.copy(), made.objects[0].copy()
    stray[3, 5:20, 3] = 0
    constant[..., 3] = 254
    counted[..., 3] = counted[..., 3] // 255
    for picture, kind in ((opaque, "white"), (stray, "white"), (constant, "white"), (counted, "alpha")):
        found, how = cut_out(picture)
        assert how == kind and iou(found[..., 3] > 127, made.alphas[0] > 127) > 0.95


@pytest.mark.parametrize(("light", "dark", "cell"), [(255, 204, 8), (153, 102, 8), (60, 40, 5)])
def test_a_drawn_checkerboard_is_named_and_left_out(tmp_path, light, dark, cell):
    made = Results(size=96)
    y, x = np.mgrid[:96, :96] // cell
    board = np.where(((y + x) % 2)[..., None], np.uint8(light), np.uint8(dark)) * np.ones(3, np.uint8)
    drawn = np.where(made.alphas[0][..., None] > 0, made.objects[0][..., :3], board)
    files = {"original__png": made.photo, "partial__png": made.partial, "mask__png": made.mask}
    scene, report = read_raw_scene(write(tmp_path / "a", **files, comp1__png=drawn, comp2__png=made.objects[1]), 5)
    assert len(scene.completions) == 1 and report["completions"][0]["reason"] == "checkerboard"
    assert any("comp1.png: a drawn checkerboard instead of transparency" in note for note in report["notes"])
    with pytest.raises(SceneError, match=r"(?s)no completion shows anything in the hole \(checkerboard\).*real alpha"):
        read_raw_scene(write(tmp_path / "b", **files, comp1__png=drawn), 5)


def test_completions_all_covering_the_frame_give_a_warning(tmp_path):
    made = Results()
    scene, report = read_raw_scene(write(tmp_path / "a", original__png=made.photo, partial__png=made.partial,
                                         mask__png=made.mask, comp1__png=made.photo), 5)
    assert len(scene.completions) == 1 and any("all completions cover the whole frame" in n for n in report["notes"])


def test_premultiplied_alpha_is_recognised_and_undone():
    y, x = np.mgrid[:64, :64]
    alpha = np.clip((24 - np.hypot(y - 32, x - 32)) / 6, 0, 1)  # a soft matte
    for colour in ((200, 120, 40), (250, 250, 250), (9, 8, 7)):
        straight = np.dstack([np.full((64, 64, 3), colour), alpha * 255]).astype(np.uint8)
        premultiplied = straight.copy()
        premultiplied[..., :3] = np.rint(straight[..., :3] * (straight[..., 3:] / 255.0))
        untouched, kind = cut_out(straight)
        assert kind == "alpha" and np.array_equal(untouched, straight)
        undone, kind = cut_out(premultiplied)
        shown = straight[..., 3] > 30
        assert np.abs(undone[shown].astype(int) - straight[shown]).max() <= (10 if kind != "alpha" else 9), colour
        assert kind == "premultiplied alpha" or max(colour) < 10


# ---- odd pictures

def test_hole_from_transparency(tmp_path):
    made = Results()
    erased = np.dstack([made.photo, 255 - made.mask])  # its colours are still there, hidden
    comps = {f"comp{i}__png": made.objects[i] for i in range(3)}
    strokes = np.dstack([np.full((64, 64, 3), 255, np.uint8), made.mask])
    cases = {"erased photo as mask": ({"original__png": made.photo, "mask__png": erased}, True),
             "erased photo as mask, and partial": ({"partial__png": made.partial, "mask__png": erased}, False),
             "strokes as mask": ({"original__png": made.photo, "partial__png": made.partial, "mask__png": strokes},
                                 True),
             "erased photo alone": ({"original__png": erased}, False), "erased partial": ({
                 "partial__png": erased, "original__png": made.photo}, True)}
    for name, (files, trainable) in cases.items():
        scene, _ = read_raw_scene(write(tmp_path / name, **files, **comps), 5)
        assert np.array_equal(scene.mask, made.hole) and np.array_equal(scene.partial, made.partial), name
        assert (scene.original is not None) == trainable, name


def test_bits_and_masks_of_other_ranges(tmp_path):
    made = Results()
    for name, scale, suffix in (("12 bits", 16, "png"), ("12 bits tif", 16, "tif"), ("16 bits", 257, "png")):
        folder = tmp_path / name
        raw = write(folder, mask__png=made.mask // 255, **{f"comp{i}__png": made.objects[i] for i in range(3)})
        for role, picture in (("original", made.photo), ("partial", made.partial)):
            cv2.imwrite(str(folder / f"{role}.{suffix}"), picture[..., ::-1].astype(np.uint16) * scale)
        raw = find_raw_scenes(folder)[0][0]
        scene, report = read_raw_scene(raw, 5)
        assert np.abs(scene.original.astype(int) - made.photo).max() <= 1 and np.array_equal(scene.mask, made.hole)
        assert any("12-bit values in a 16-bit file" in note for note in report["notes"]) == name.startswith("12")


def test_a_blurred_mask_leaves_no_dark_rim(tmp_path):
    made = Results()
    soft = cv2.GaussianBlur(made.mask, (0, 0), 2)
    darkened = np.rint(made.photo * (1 - soft[..., None] / 255.0)).astype(np.uint8)
    darkened[made.hole] = 0
    comps = {f"comp{i}__png": made.objects[i] for i in range(3)}
    scene, _ = read_raw_scene(write(tmp_path / "a", original__png=made.photo, partial__png=darkened, mask__png=soft,
                                    **comps), 5)
    assert np.array_equal(scene.partial[~scene.mask], made.photo[~scene.mask]) and iou(scene.mask, made.hole) > 0.95
    alone, _ = read_raw_scene(write(tmp_path / "b", partial__png=darkened, mask__png=soft, **comps), 5)
    assert np.abs(alone.partial[~alone.mask].astype(int) - made.photo[~alone.mask]).max() < 30  # the hole is wider


def test_square_results_of_a_rectangular_photo(tmp_path):
    wide, ways = draw_scene(2, (64, 96)), {
        "cropped to its middle": lambda picture: np.ascontiguousarray(picture[:, 16:80]),
        "squeezed": lambda picture: resize(picture, (64, 64))}
    for name, square in ways.items():
        comps = {f"comp{i}__png": square(picture) for i, picture in enumerate(wide.completions)}
        photo, mask = square(wide.original), np.uint8(255) * (square(wide.mask.astype(np.uint8) * 255) > 127)
        partial = np.where(mask[..., None] > 0, 0, photo)
        for witness, files in (("partial.png shows", {"partial__png": partial}), ("completions show", {})):
            scene, report = read_raw_scene(write(tmp_path / f"{name}, {witness}", original__png=wide.original,
                                                 mask__png=mask, **files, **comps), 5, mask_hole="white")
            assert np.abs(scene.original.astype(int) - photo).mean() < 1
            assert f"original.png: {name}, as {witness} it" in report["notes"]
    with pytest.raises(SceneError, match=r"original.png: 96×64, but the scene is 64×64"):
        read_raw_scene(write(tmp_path / "other", original__png=255 - wide.original, partial__png=partial,
                             mask__png=mask, **comps), 5)
    with pytest.raises(SceneError, match=r"comp0.png: 64×64, but the scene is 96×64"):
        read_raw_scene(write(tmp_path / "no photo of these", original__png=255 - wide.original, mask__png=mask,
                             **comps), 5)


def test_only_documented_formats_of_allowed_size_are_opened(tmp_path, monkeypatch):
    photo = Image.fromarray(draw_scene(0).original)
    photo.save(tmp_path / "eps.eps")
    (tmp_path / "eps.eps").rename(tmp_path / "comp1.png")
    monkeypatch.setattr("subprocess.check_call", lambda *_, **__: pytest.fail("started a program"))
    with pytest.raises(SceneError, match=r"comp1.png: not a picture \(PNG, JPEG, WebP, BMP or TIFF\)"):
        read_image(tmp_path / "comp1.png", "RGB")
    for kind in ("GIF", "PPM", "TGA", "ICO"):
        photo.save(tmp_path / "other.png", format=kind)
        with pytest.raises(SceneError, match="not a picture"):
            read_image(tmp_path / "other.png", "RGB")
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(SceneError, match=r"pipe.png: not a regular file"):
        read_image(tmp_path / "pipe.png", "RGB")
    side = int(MOST_PIXELS**0.5) + 1
    Image.new("1", (side, side)).save(tmp_path / "large.png")
    assert (tmp_path / "large.png").stat().st_size < 2e5
    with pytest.raises(SceneError, match=rf"large.png: {side}×{side}, more than 64 megapixels; scale"):
        read_image(tmp_path / "large.png", "L")


# ---- check

@pytest.mark.parametrize(("change", "fault"), [
    (lambda c: np.dstack([np.where(c[..., 3:] > 0, c[..., :3], np.uint8(255)), 255 - c[..., 3]]),
     "the alpha of the completions is inverted"),
    (lambda c: c[..., [2, 1, 0, 3]], "red and blue are swapped"),
    (lambda c: c[:, ::-1], "the completions are mirrored"),
])
def test_check_and_create_agree_on_completions(tmp_path, change, fault):
    scene = Results(seed=1, size=96).scene
    scene.completions = [np.ascontiguousarray(change(c)) for c in scene.completions]
    write_scene(tmp_path, scene)
    assert fault in check_scene(tmp_path)


def test_all_completions_without_alpha_are_named_at_once(tmp_path):
    made = Results(size=96)
    write_scene(tmp_path, made.scene)
    for i in (1, 2):
        write_image(tmp_path / f"comp{i}.png", made.on(i, 255))
    assert all(f"comp{i}.png: no alpha" in check_scene(tmp_path) for i in (1, 2))


def test_outputs_of_create_and_synthesize_pass_check(tmp_path):
    """A completed background is flat paper at its border, where objects hide all of the photo's own."""
    made = Results()
    paper = np.full((64, 64, 3), (150, 150, 150), np.uint8)
    paper[24:40, 24:40] = (40, 90, 200)
    scene = made.scene
    scene.completions = [*made.objects, np.dstack([paper, np.full((64, 64), 255, np.uint8)])]
    (tmp_path / "synthesized").mkdir()
    write_scene(tmp_path / "synthesized", scene)
    assert check_scene(tmp_path / "synthesized") is None
    last = tmp_path / "synthesized" / "comp4.png"
    write_image(last, read_image(last, "RGBA"))  # by somebody else
    assert "comp4.png: no alpha, on a flat background" in check_scene(tmp_path / "synthesized")

    raw = write(tmp_path / "raw", original__png=made.photo, partial__png=made.partial, mask__png=made.mask,
                comp1__png=made.objects[0], comp2__png=paper)
    told, _ = read_raw_scene(raw, 5, background="opaque")
    assert min(completion[..., 3].min() for completion in told.completions) == 0
    assert max(completion[..., 3].min() for completion in told.completions) == 255
    (tmp_path / "created").mkdir()
    write_scene(tmp_path / "created", told)
    assert check_scene(tmp_path / "created") is None


def on_grey(folder):
    for path in folder.glob("comp*.png"):
        rgba = read_image(path, "RGBA")
        write_image(path, np.where(rgba[..., 3:] > 0, rgba[..., :3], 128).astype(np.uint8))


def change(name, function, mode="RGB"):
    return lambda folder: write_image(folder / name, function(read_image(folder / name, mode)))


def inverted_with_noise(folder):
    mask = read_image(folder / "mask.png", "L") > 0
    partial = np.where(mask[..., None], read_image(folder / "original.png", "RGB"), 250)
    write_image(folder / "partial.png", partial.astype(np.uint8))


def alpha_of(function):
    def changed(rgba):
        return np.dstack([rgba[..., :3], function(rgba[..., 3])])

    return lambda folder: [change(path.name, changed, "RGBA")(folder) for path in folder.glob("comp*.png")]


def other_suffix(folder):
    Image.open(folder / "comp2.png").save(folder / "comp2.jpg.png")
    (folder / "comp2.png").rename(folder / "comp2.PNG")
    Image.open(folder / "comp2.PNG").convert("RGB").save(folder / "comp2.jpg")
    (folder / "comp2.jpg.png").unlink()


def modal_of_another(folder):
    outside = read_image(folder / "comp1.png", "RGBA")[..., 3] == 0
    write_image(folder / "comp1_visible.png", outside.astype(np.uint8) * 255)


FAULTY = {
    "alpha of 0 and 1": (alpha_of(lambda a: a // 255), "comp1.png: alpha is 0 or 1"),
    "inverted": (change("mask.png", lambda m: 255 - m, "L"), "mask.png: inverted"),
    "inverted, blanked white": (inverted_with_noise, "mask.png: inverted"),
    "inverted, unblanked": (lambda f: [change("mask.png", lambda m: 255 - m, "L")(f), change(
        "partial.png", lambda p: np.clip(p.astype(int) + 3, 0, 255).astype(np.uint8))(f)], "mask.png: inverted"),
    "unblanked": (lambda f: write_image(f / "partial.png", read_image(f / "original.png", "RGB")),
                  "partial.png: not blank in the hole"),
    "mask of another": (change("mask.png", lambda m: np.roll(m, 20, 1), "L"), "partial.png: not blank in the hole"),
    "another photo": (change("original.png", lambda o: np.rot90(o, 2)), "partial.png: another photo? It differs by"),
    "shifted": (change("original.png", lambda o: np.roll(o, 2, 1)), "partial.png: shifted by -2,0 pixels against"),
    "blank original": (change("original.png", np.zeros_like), "partial.png: another photo?"),
    "original is the partial": (lambda f: write_image(f / "original.png", read_image(f / "partial.png", "RGB")),
                                "original.png: blank in the hole, so it is no target"),
    "on grey": (on_grey, "comp1.png: no alpha, on a flat background"),
    "stray transparent pixel": (lambda f: [on_grey(f), change("comp1.png", lambda c: np.dstack([c[..., :3], np.where(
        np.arange(4096).reshape(64, 64) == 70, 0, 255).astype(np.uint8)]), "RGBA")(f)],
        "comp1.png: no alpha, on a flat background"),
    "other suffix": (other_suffix, "comp2.PNG: not read; save it as comp2.png"),
    "original.jpg": (lambda f: (f / "original.png").rename(f / "original.jpg"), "original.jpg: not read"),
    "modal mask of another": (modal_of_another, "comp1_visible.png: empty or outside its completion"),
    "modal mask of none": (lambda f: write_image(f / "comp9_visible.png", np.zeros((64, 64), np.uint8)),
                           "comp9_visible.png: a modal mask without a completion"),
}


def test_check_compares_the_pictures_of_a_scene(tmp_path):
    for seed, (name, (damage, _)) in enumerate(FAULTY.items(), 1):
        (tmp_path / name).mkdir()
        write_scene(tmp_path / name, draw_scene(seed))
        damage(tmp_path / name)
    for seed in range(3):
        (tmp_path / f"good {seed}").mkdir()
        write_scene(tmp_path / f"good {seed}", draw_scene(100 + seed))
    # a studio photo's flat background goes on in the photo
    studio = draw_scene(200)
    studio.original[:] = np.where(np.max([c[..., 3:] for c in studio.completions], 0) > 0, studio.original, 240)
    studio.partial = np.where(studio.mask[..., None], 0, studio.original).astype(np.uint8)
    studio.completions.append(np.full((64, 64, 4), (240, 240, 240, 255), np.uint8))
    (tmp_path / "studio").mkdir()
    write_scene(tmp_path / "studio", studio)
    process = run("prepare_dataset.py", "check", "--data_dir", tmp_path, "--workers", 1)
    assert process.returncode == 1 and "Traceback" not in process.stderr
    for name, (_, fault) in FAULTY.items():
        about = [line for line in process.stdout.splitlines() if f"/{name}/" in line]
        assert any(fault in line for line in about), (name, about)
    assert not any(f"/{name}/" in process.stdout for name in ("good 0", "good 1", "good 2", "studio")), process.stdout
