"""Weights in folders as hubs know them, torch.hub, and the ComfyUI node without ComfyUI."""

import importlib.util
import json

import numpy as np
import pytest
import torch
import yaml

from amodal_fusion.checkpoints import load_checkpoint
from amodal_fusion.data.toy import draw_scene
from amodal_fusion.errors import UserError
from amodal_fusion_transformer_inference import SHIPPED, FusionPredictor
from tests.scripts import ROOT


@pytest.fixture(scope="module")
def predictor(checkpoint):
    return FusionPredictor(checkpoint, "cpu")


def metadata(path):
    """The YAML between the first two lines of dashes of a model card."""
    _, header, _ = path.read_text(encoding="utf-8").split("---\n", 2)
    return yaml.safe_load(header)


def test_saved_weights_load_from_their_folder(predictor, tmp_path):
    path = predictor.save_pretrained(tmp_path / "mine")
    again = FusionPredictor.from_pretrained(tmp_path / "mine", device="cpu")
    assert again.digest == predictor.digest and again.img_size == predictor.img_size
    scene = draw_scene(0)
    given = scene.partial, scene.mask, scene.completions
    assert np.array_equal(again.fuse(*given)["fused"], predictor.fuse(*given)["fused"])
    assert not any(isinstance(value, str) and "/" in value for value in load_checkpoint(path)["config"].values())
    described = json.loads((tmp_path / "mine" / "config.json").read_text())
    assert described["architectures"] == ["AmodalFusionTransformer"] and described["width"] == 32
    (tmp_path / "mine" / "README.md").write_text("my own words")
    predictor.save_pretrained(tmp_path / "mine")
    assert (tmp_path / "mine" / "README.md").read_text() == "my own words"
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "config.json").write_text("{}")
    with pytest.raises(UserError, match="not written by this program"):
        predictor.save_pretrained(tmp_path / "theirs")
    assert not (tmp_path / "theirs" / path.name).exists()


def test_weights_are_found_or_the_error_says_where(checkpoint, predictor, tmp_path, monkeypatch):
    assert FusionPredictor.from_pretrained(checkpoint.parent, device="cpu").digest == predictor.digest
    with pytest.raises(UserError, match=r"no amodal_fusion_transformer\.pth and no best_model\.pth"):
        FusionPredictor.from_pretrained(tmp_path)
    with pytest.raises(UserError, match="no such checkpoint"):
        FusionPredictor.from_pretrained("runs/none.pth")
    monkeypatch.setitem(__import__("sys").modules, "huggingface_hub", None)
    with pytest.raises(UserError, match="pip install huggingface_hub"):
        FusionPredictor.from_pretrained("somebody/weights")


def test_model_cards_have_what_hubs_read(predictor, tmp_path):
    predictor.save_pretrained(tmp_path)
    for path in (tmp_path / "README.md", SHIPPED.parent / "README.md"):
        card = metadata(path)
        assert card["pipeline_tag"] == "image-to-image" and "amodal-completion" in card["tags"]
        assert card["library_name"] == "amodal-fusion-transformer"
    assert metadata(SHIPPED.parent / "README.md")["license"] == "other"


def test_torch_hub_loads_from_the_repository(checkpoint, predictor):
    loaded = torch.hub.load(str(ROOT), "amodal_fusion_predictor", source="local", pretrained=checkpoint, device="cpu")
    assert loaded.digest == predictor.digest


@pytest.fixture(scope="module")
def node():
    path = ROOT / "integrations" / "comfyui" / "amodal_fusion_node.py"
    spec = importlib.util.spec_from_file_location("custom_nodes.amodal_fusion_node", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def as_comfyui(scene):
    """image (1,H,W,3), mask (1,H,W), completions (N,H,W,4) as ComfyUI hands them on."""
    stacked = torch.from_numpy(np.stack(scene.completions)).float() / 255
    return torch.from_numpy(scene.partial)[None].float() / 255, torch.from_numpy(scene.mask)[None].float(), stacked


def test_comfyui_node_keeps_its_conventions(node, checkpoint, predictor):
    scene = draw_scene(2, (48, 80), 3)
    image, mask, completions = as_comfyui(scene)
    kind = node.NODE_CLASS_MAPPINGS["AmodalFusion"]
    names = kind.INPUT_TYPES()
    assert set(names["required"]) == {"image", "mask", "completions"} and len(kind.RETURN_TYPES) == 3
    run = getattr(kind(), kind.FUNCTION)
    fused, residual_mask, weights = run(image, mask, completions, checkpoint=str(checkpoint))
    assert fused.shape == (1, 48, 80, 3) and residual_mask.shape == (1, 48, 80) and weights.shape == (3, 48, 80)
    expected = predictor.fuse(scene.partial, scene.mask, scene.completions)
    assert (fused[0] * 255 - torch.from_numpy(expected["fused"])).abs().max() <= 1
    assert torch.equal(fused[0][~mask[0].bool()], image[0][~mask[0].bool()])
    assert set(residual_mask.unique().tolist()) <= {0, 1} and not residual_mask[mask == 0].any()
    apart = run(image, mask, completions[..., :3], completions[..., 3], str(checkpoint))[0]
    assert torch.allclose(apart, fused, atol=1e-5)
    on_white = completions[..., :3] * completions[..., 3:] + 1 - completions[..., 3:]
    keyed = run(image, mask, on_white, checkpoint=str(checkpoint))[0]
    assert (keyed - fused).abs().mean() < 0.05
    with pytest.raises(ValueError, match="one image and one mask"):
        run(image.repeat(2, 1, 1, 1), mask, completions)
    with pytest.raises(ValueError, match="do not fit the completions"):
        run(image, mask, completions, mask)
    with pytest.raises(ValueError, match="mask"):
        run(image, mask * 0, completions, checkpoint=str(checkpoint))
