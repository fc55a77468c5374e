"""The network from Python, and what bounds its memory."""

import pickle
import re
import zlib

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from matplotlib import colormaps
from PIL import Image

import amodal_fusion_transformer_inference as inference
from amodal_fusion.checkpoints import export_weights, load_checkpoint, save_checkpoint
from amodal_fusion.data import scenes as large_scenes
from amodal_fusion.data.images import read_image, write_image
from amodal_fusion.data.scenes import read_scene, write_scene
from amodal_fusion.data.tensors import inputs_of, to_tensors
from amodal_fusion.data.toy import draw_scene
from amodal_fusion.errors import ConfigError, SceneError, UserError, message_of
from amodal_fusion.evaluation.figures import draw_scene as draw_figure
from amodal_fusion.evaluation.figures import scene_legend, winner_colour
from amodal_fusion.files import WRITTEN
from amodal_fusion.model.blending import blend_hole
from amodal_fusion.model.compositing import add_fill, composite
from amodal_fusion.output.records import state_of
from amodal_fusion.output.scene_reader import SceneReader, count_candidates, network_size
from amodal_fusion.output.scene_writer import SceneWriter, for_figure
from amodal_fusion_transformer import NETWORK_VERSION, AmodalFusionTransformer
from amodal_fusion_transformer_inference import FusionPredictor
from tests.scripts import ROOT


@pytest.fixture(scope="module")
def predictor(checkpoint):
    return FusionPredictor(checkpoint, "cpu", 64)


def test_the_python_example_runs(checkpoint, monkeypatch):
    (snippet,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.S)
    monkeypatch.setattr(inference, "SHIPPED", checkpoint)
    scene = draw_scene(0, (50, 70), 3)
    variables = {"partial": scene.partial, "mask": scene.mask, "completions": scene.completions}
    exec(snippet, variables)
    assert variables["fused"].shape == (50, 70, 3) and variables["weights"].shape == (3, 50, 70)
    assert np.array_equal(variables["fused"][~scene.mask], scene.partial[~scene.mask])
    total = variables["weights"].sum(0) + variables["residual"]
    assert np.allclose(total, scene.mask, atol=1e-5)


def test_sharpness_ranges_from_equal_weights_to_one_winner(checkpoint):
    scene = draw_scene(2, (64, 64), 3)
    largest = {}
    for sharpness in (0.01, 1, 4, 100):
        result = FusionPredictor(checkpoint, "cpu", 64, sharpness=sharpness).fuse(scene.partial, scene.mask,
                                                                                  scene.completions)
        weights = np.concatenate([result["weights"], result["residual"][None]])[:, scene.mask]
        assert np.allclose(weights.sum(0), 1, atol=1e-5)
        largest[sharpness] = weights.max(0)
    covers = np.stack([completion[..., 3] > 0 for completion in scene.completions])[:, scene.mask]
    assert np.allclose(largest[0.01], 1 / (1 + covers.sum(0)), atol=0.05)
    assert largest[0.01].mean() < largest[1].mean() < largest[4].mean() < largest[100].mean()
    for wrong in (-1, 0, 101, float("nan"), "abc", None):
        with pytest.raises(ConfigError, match="sharpness"):
            FusionPredictor(checkpoint, "cpu", sharpness=wrong)
    with pytest.raises(ConfigError, match="amp"):
        FusionPredictor(checkpoint, "cpu", amp="x")


def test_pictures_arrays_and_tensors_are_fused_alike(predictor):
    scene = draw_scene(1, (50, 70), 3)
    mask = scene.mask.astype(np.uint8) * 255
    expected = predictor.fuse(scene.partial, scene.mask, np.stack(scene.completions))
    for partial, hole, completions in (
        (Image.fromarray(scene.partial), Image.fromarray(mask), [Image.fromarray(c) for c in scene.completions]),
        (scene.partial / 255, scene.mask * 1.0, [c / np.float32(255) for c in scene.completions]),
    ):
        result = predictor.fuse(partial, hole, completions)
        assert all(np.array_equal(result[name], expected[name]) for name in expected)
    for one in (Image.fromarray(scene.completions[0]), scene.completions[0]):
        assert predictor.fuse(scene.partial, scene.mask, one)["weights"].shape == (1, 50, 70)
    tensors = to_tensors(scene, 3)
    result = predictor.fuse(tensors["partial"], tensors["mask"], tensors["completions"])
    assert result["residual"].shape == (1, 50, 70) and np.array_equal(result["weights"].numpy(), expected["weights"])
    assert torch.equal(result["fused"] * (1 - tensors["mask"]), tensors["partial"])
    assert np.array_equal((result["fused"] * 255).round().byte().permute(1, 2, 0).numpy(), expected["fused"])


@pytest.mark.parametrize(("change", "complaint"), [
    (lambda p, m, c: (p, m, [c[0][..., :3]]), "completion 1: shape .* needs alpha"),
    (lambda p, m, c: (p, m, [Image.fromarray(c[0][..., :3])]), "completion 1: .* needs alpha"),
    (lambda p, m, c: (p, m, [c[0][:-1]]), "completion 1: 70×49, but partial is 70×50"),
    (lambda p, m, c: (p, m & False, c), "mask: no hole"),
    (lambda p, m, c: (p[:0], m, c), "partial: no pixel in it"),
    (lambda p, m, c: (p, ~m, c), "mask: inverted"),
    (lambda p, m, c: (p, m * np.uint8(100), c), "mask: has values other than"),
    (lambda p, m, c: (p * 2.0, m, c), "partial: values from 0 to 510; floats lie in"),
    (lambda p, m, c: (p, m, c[:0]), "there is none"),
    (lambda p, m, c: (p, m, [np.zeros_like(c[0])]), "fully transparent"),
    (lambda p, m, c: (p, m, [c[0], c[1] // 255]), "completion 2: alpha is 0 or 1"),
])
def test_pictures_that_do_not_fit_are_named(predictor, change, complaint):
    scene = draw_scene(1, (50, 70), 3)
    with pytest.raises(SceneError, match=complaint):
        predictor.fuse(*change(scene.partial, scene.mask, scene.completions))


def test_batching_changes_nothing(predictor):
    scenes = [draw_scene(seed, (50, 70), n) for seed, n in ((0, 1), (1, 4))]
    together = predictor.fuse_scenes(scenes)
    for scene, result in zip(scenes, together):
        (alone,) = predictor.fuse_scenes([scene])
        assert torch.allclose(alone["fused"], result["fused"], atol=1e-5)
        total = result["weights"].sum(1, keepdim=True) + result["residual"]
        assert torch.allclose(total, result["mask"], atol=1e-5)


def test_exported_weights_fuse_alike_and_are_small(tmp_path, checkpoint, predictor):
    export_weights(checkpoint, tmp_path / "weights.pth")
    assert (tmp_path / "weights.pth").stat().st_size < 0.4 * checkpoint.stat().st_size
    exported = FusionPredictor(tmp_path / "weights.pth", "cpu", 64)
    assert exported.digest == predictor.digest
    scene = draw_scene(0)
    assert torch.equal(exported.fuse_scenes([scene])[0]["fused"], predictor.fuse_scenes([scene])[0]["fused"])


def test_a_checkpoint_recommends_its_size(tmp_path, checkpoint):
    assert FusionPredictor(checkpoint, "cpu").img_size == 64  # that of its training
    state = load_checkpoint(checkpoint)
    save_checkpoint(tmp_path / "weights.pth", state | {"config": state["config"] | {"inference_size": 96}})
    assert FusionPredictor(tmp_path / "weights.pth", "cpu").img_size == 96


def test_numbers_not_finite_never_become_a_picture(tmp_path, checkpoint, predictor):
    state = load_checkpoint(checkpoint)
    name = next(iter(state["ema"]))
    state["ema"][name] = torch.full_like(state["ema"][name], torch.nan, dtype=torch.float32)
    save_checkpoint(tmp_path / "nan.pth", state)
    with pytest.raises(UserError, match=r"nan\.pth: 1 of its tensors"):
        FusionPredictor(tmp_path / "nan.pth", "cpu")
    scene = draw_scene(0)
    logits = predictor.predict_logits([scene])[0]
    logits[2, 30, 30] = torch.nan
    with pytest.raises(SceneError, match="not finite"):
        blend_hole(scene, logits)
    torch.save({"model_state_dict": {}}, tmp_path / "old.pth")
    with pytest.raises(UserError, match=r"old\.pth: weights of another program"):
        FusionPredictor(tmp_path / "old.pth", "cpu")


def test_blending_hole_pixels_equals_blending_the_whole_picture(monkeypatch):
    torch.manual_seed(0)
    for size, count in (((60, 101), 3), ((97, 50), 7)):
        scene, logits = draw_scene(1, size, count), 4 * torch.randn(count + 1, 16, 12)
        blend = blend_hole(scene, logits)
        whole = {name: value[None] for name, value in to_tensors(scene, count).items()}
        candidates, _ = add_fill(whole["partial"], whole["mask"], whole["completions"])
        large = F.interpolate(logits[None], size=size, mode="bilinear")
        expected = composite(large, candidates, whole["partial"], whole["mask"])
        assert np.allclose(blend.weights, expected["weights"][0].numpy()[:, scene.mask], atol=1e-5)
        assert np.allclose(blend.colours, expected["fused"][0].permute(1, 2, 0).numpy()[scene.mask], atol=1e-5)
        monkeypatch.setattr("amodal_fusion.model.blending.BLOCK", 64)
        blocks = blend_hole(scene, logits)
        assert np.array_equal(blend.weights, blocks.weights) and np.array_equal(blend.colours, blocks.colours)
        monkeypatch.undo()
        assert np.array_equal(blend_hole(scene, logits, exact=False).weights, np.rint(blend.weights * 65535))


def test_large_scenes_stay_on_disk_and_fuse_alike(tmp_path, predictor, monkeypatch):
    (tmp_path / "data" / "s").mkdir(parents=True)
    write_scene(tmp_path / "data" / "s", draw_scene(3, (80, 120), 5))
    read = SceneReader(tmp_path / "data", 4, 64)
    pictures = []
    for limit, output in ((large_scenes.LARGE, "small"), (1000, "large")):
        monkeypatch.setattr(large_scenes, "LARGE", limit)
        small, scene, digest = read((0, "s"))
        assert (scene is None) == (output == "large")
        logits = predictor.predict_logits([small])[0].numpy()
        SceneWriter(tmp_path / "data", tmp_path / output, {}, 4)("s", scene, logits, digest)
        pictures.append({path.name: path.read_bytes() for path in (tmp_path / output / "s").iterdir()
                         if path.name != WRITTEN})
    assert len(pictures[0]) == 11 and pictures[0] == pictures[1]
    write_image(tmp_path / "data" / "s" / "comp1.png", draw_scene(4, (80, 120), 5).completions[0])
    writer = SceneWriter(tmp_path / "data", tmp_path / "later", {}, 4)
    logits = predictor.predict_logits([small])[0].numpy()
    writer("s", read_scene(tmp_path / "data" / "s", 4), logits, digest)  # it changed after it was looked at
    assert state_of(tmp_path / "later" / "s", tmp_path / "data" / "s", {}, lambda _: True) == "changed"
    with pytest.raises(SceneError, match="changed during the run"):
        writer("s", None, logits, digest)
    monkeypatch.setattr("amodal_fusion.output.scene_writer.LARGEST_MEASURED", 20_000)
    writer = SceneWriter(tmp_path / "data", tmp_path / "out", {}, 4)
    stored = large_scenes.read_large(tmp_path / "data" / "s", 4)
    row = writer.measure_smaller(stored, predictor.predict_logits([small])[0].numpy())
    assert 0 < row["scale"] < 1 and row["ours_psnr"] > 10
    stored.mask[:] = False
    stored.mask[41, 61] = True  # a speck, which no smaller copy has
    monkeypatch.setattr("amodal_fusion.output.scene_writer.LARGEST_MEASURED", 5_000)
    speck = writer.measure_smaller(stored, predictor.predict_logits([small])[0].numpy())
    assert speck["photo"] == row["photo"] and np.isfinite(speck["ours_psnr"])  # of one photo, at two scales


def test_scenes_of_different_aspects_are_not_fused_together(predictor):
    wide, tall = draw_scene(1, (32, 96)), draw_scene(2, (96, 32))
    with pytest.raises(SceneError, match="several aspects"):
        predictor.fuse_scenes([wide, tall])
    assert predictor.fuse_scenes([]) == [] and len(predictor.fuse_scenes([wide, draw_scene(3, (64, 192))])) == 2


def test_large_scenes_are_checked_like_all_others(tmp_path):
    (tmp_path / "s").mkdir()
    scene = draw_scene(3, 64, 3)
    scene.completions[1] = scene.completions[1][:-2]
    write_scene(tmp_path / "s", scene)
    write_image(tmp_path / "s" / "comp3.png", np.full_like(scene.completions[2], 255))  # not by one of our tools
    completions = large_scenes.read_large(tmp_path / "s").completions
    assert completions[0].shape == (64, 64, 4)
    with pytest.raises(SceneError, match=r"comp2\.png: 64×62, but partial\.png is 64×64"):
        completions[1]
    with pytest.raises(SceneError, match=r"comp3\.png: no alpha"):
        completions[2]
    write_image(tmp_path / "s" / "comp1.png", np.zeros_like(scene.completions[0]))  # one among others
    with pytest.raises(SceneError, match=r"comp2\.png: 64×62"):
        large_scenes.read_large(tmp_path / "s")
    write_image(tmp_path / "s" / "comp2.png", scene.completions[2])
    assert len(large_scenes.read_large(tmp_path / "s").completions) == 3
    with pytest.raises(SceneError, match="every completion is fully transparent"):
        large_scenes.read_large(tmp_path / "s", 1)


def test_many_completions_are_shown_to_the_network_smaller():
    assert network_size((256, 256), 256) == network_size((256, 256), 256, 30) == (256, 256)
    assert network_size((1080, 1920), 256) == (192, 336)
    assert network_size((10, 1000), 64) == (16, 640)
    rows, columns = network_size((1024, 1024), 256, 200)
    assert 200 * rows * columns < 2.6e6 and rows == columns > 96
    scene = draw_scene(0, (64, 64), 3)
    scene.completions += [scene.completions[0]] * 20 + [np.zeros_like(scene.completions[0])] * 20
    assert count_candidates(scene, 512) == 3  # copies and transparent ones need no memory
    assert count_candidates(scene, 64) == 43  # enough memory: not counted


def test_figures_have_bounds(tmp_path):
    for size, count in (((1500, 2), 2), ((64, 64), 60)):
        scene = draw_scene(0, size, count)
        blend = blend_hole(scene, torch.zeros(count + 1, 4, 4), exact=False)
        draw_figure(tmp_path / "figure.png", for_figure(scene, blend), "title")
        with Image.open(tmp_path / "figure.png") as figure:
            assert figure.width < 1700 and figure.height < 3600, figure.size


def test_figure_explains_its_colours(tmp_path):
    scene = draw_scene(0, (300, 400), 3)
    scene.numbers, scene.sources = [1, 2, 7], ["comp4.png", "comp2.png", "parts/car.png"]
    blend = blend_hole(scene, torch.zeros(4, 4, 4))
    arrays = for_figure(scene, blend)
    assert arrays["labels"] == ["1: comp4", "comp2", "7: parts/car"] and arrays["fused"].shape == (192, 256, 3)
    texts = [text for text, _ in scene_legend(arrays)]
    assert set(arrays["labels"]) < set(texts) and {"weight, 0 to 1", "error, 0 to 1", "none of them"} < set(texts)
    draw_figure(tmp_path / "figure.png", arrays, "title")
    figure = read_image(tmp_path / "figure.png", "RGB").astype(int)
    for place in range(3):  # a frame, pixels of the winner map, and a swatch in the last line
        exact = (np.abs(figure - np.rint(np.array(winner_colour(place)) * 255)).sum(2) == 0)
        assert exact[-24:].sum() >= 150 and exact[:-24].sum() >= 2 * 4 * (256 + 184), place
    lowest, highest = (np.rint(np.array(colormaps["magma"](value)[:3]) * 255) for value in (0.0, 1.0))
    assert all((np.abs(figure[-24:] - colour).sum(2) == 0).any() for colour in (lowest, highest))


def test_building_a_predictor_leaves_random_state(checkpoint):
    before = torch.get_rng_state()
    FusionPredictor(checkpoint, "cpu")
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("size", [0, "256px", 15, 2.5, -16])
def test_img_size_is_checked_from_python(checkpoint, size):
    with pytest.raises(ConfigError, match="img_size"):
        FusionPredictor(checkpoint, "cpu", img_size=size)


def test_network_version_is_raised_with_its_results():
    """When this fails because equal weights give other results: raise NETWORK_VERSION and write the new numbers."""
    model = AmodalFusionTransformer(width=32, heads=2).eval()
    for name, weights in model.named_parameters():
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        weights.data = 0.1 * torch.randn(weights.shape, generator=generator)
    batch = {name: value[None] for name, value in to_tensors(draw_scene(1, (48, 64), 3), 4).items()}
    with torch.no_grad():
        logits = model(**inputs_of(batch))["logits"][0, :4]
    found = [NETWORK_VERSION, *(round(number, 4) for number in logits.mean((1, 2)).tolist())]
    assert found == pytest.approx([2, -0.4442, -0.2449, -0.6632, -0.3078], abs=2e-3)


def test_messages_name_flags_on_terminals_alone():
    error = ConfigError("there is no GPU", "device", "gpus")
    assert str(error) == "there is no GPU" and error.for_terminal() == "there is no GPU (--device, --gpus)"
    assert pickle.loads(pickle.dumps(error)).for_terminal() == error.for_terminal()
    error = UserError("no scenes; make some", "data_dir", terminal="no scenes: create --input_dir RESULTS")
    assert str(error) == "no scenes; make some" and message_of(error) == "no scenes: create --input_dir RESULTS"
    assert message_of(pickle.loads(pickle.dumps(error))) == message_of(error)


@pytest.mark.parametrize("seed", range(3))
def test_copies_and_transparent_completions_change_nothing(predictor, seed):
    scene = draw_scene(seed, (60, 90), 3)
    alone = predictor.fuse(scene.partial, scene.mask, scene.completions)
    empty, copy = np.zeros_like(scene.completions[0]), scene.completions[1].copy()
    empty[..., :3] = 200
    copy[copy[..., 3] == 0] = (9, 9, 9, 0)
    more = [empty, *scene.completions, copy, copy, empty, copy, copy]
    result = predictor.fuse(scene.partial, scene.mask, more)
    assert np.abs(result["fused"].astype(int) - alone["fused"]).max() <= 1
    assert np.allclose(result["weights"][1:4], alone["weights"], atol=1e-4)
    assert not result["weights"][[0, 4, 5, 6, 7, 8]].any()


def test_the_network_ignores_transparent_completions():
    model = AmodalFusionTransformer(width=32, heads=2).eval()
    torch.nn.init.normal_(model.head.correction.weight, std=0.15)
    inputs = inputs_of({name: value[None] for name, value in to_tensors(draw_scene(1, (48, 64), 3), 3).items()})
    more = inputs | {"completions": F.pad(inputs["completions"], (0, 0, 0, 0, 0, 0, 1, 2)), "valid": None}
    with torch.no_grad():
        alone, padded = model(**inputs), model(**more)
    assert torch.allclose(alone["logits"][:, 1:], padded["logits"][:, 2:5], atol=1e-4)
    assert torch.allclose(alone["fused"], padded["fused"], atol=1e-4)


def test_own_results_are_keyed_and_read_from_paths(predictor, tmp_path):
    scene = draw_scene(1, (50, 70), 3)
    write_scene(tmp_path, scene)
    expected = predictor.fuse(scene.partial, scene.mask, scene.completions)
    names = [tmp_path / f"comp{number}.png" for number in (1, 2, 3)]
    result = predictor.fuse(str(tmp_path / "partial.png"), tmp_path / "mask.png", names)
    assert np.array_equal(result["weights"], expected["weights"])
    coloured = np.stack([scene.mask * np.uint8(255)] * 3, 2)
    result = predictor.fuse(scene.partial, Image.fromarray(coloured), scene.completions, background="auto")
    assert np.array_equal(result["weights"], expected["weights"])  # what has alpha keeps it
    white = [np.where(c[..., 3:] > 0, c[..., :3], 255).astype(np.uint8) for c in scene.completions]
    for given in (white, [Image.fromarray(rgb) for rgb in white]):
        keyed = predictor.fuse(scene.partial, scene.mask, given, background="auto")
        covered = np.stack(scene.completions)[..., 3] == 0
        assert (keyed["weights"][covered] == 0).mean() > 0.97 and keyed["weights"].max() > 0.5
    with pytest.raises(SceneError, match=r'needs alpha.*background="auto"'):
        predictor.fuse(scene.partial, scene.mask, white)
    write_image(tmp_path / "white.png", white[0])
    with pytest.raises(SceneError, match=r"white\.png, a picture of mode RGB; .*needs alpha"):
        predictor.fuse(scene.partial, scene.mask, tmp_path / "white.png")
    with pytest.raises(SceneError, match="mask: a picture in colour"):
        predictor.fuse(scene.partial, scene.original, scene.completions)
    with pytest.raises(ConfigError, match="not one of auto"):
        predictor.fuse(scene.partial, scene.mask, white, background="grey")
