"""The frozen ImageNet features."""

import hashlib

import pytest
import torch

from amodal_fusion.errors import UserError
from amodal_fusion.model import backbone
from amodal_fusion.model.backbone import ImageNetFeatures

# SHA-256 over names and values, sorted by name, of `features.*` in torchvision's squeezenet1_1-b8a52dc0.pth
TORCHVISIONS = "9a3cd24c3da63ec76ec50dabac44e862029b5c84992e5ddd582be22d0f9ef388"


def test_backbone_is_neither_trained_nor_saved():
    features = ImageNetFeatures()
    assert list(features.parameters()) == [] and features.state_dict() == {}
    assert not any(f.requires_grad for f in features(torch.rand(1, 3, 32, 32, requires_grad=True)))


@pytest.mark.parametrize("height, width", [(16, 16), (48, 32), (64, 160)])
def test_grids_follow_the_strides_and_lengths_are_equal(height, width):
    features = ImageNetFeatures()(torch.rand(2, 3, height, width))
    assert [f.shape for f in features] == [
        (2, channels, height // stride, width // stride) for channels, stride in ((128, 4), (256, 8), (512, 16))]
    for feature in features:
        length = feature.square().mean(1).sqrt()
        assert torch.allclose(length, torch.ones_like(length), atol=1e-3)


def test_weights_are_those_of_torchvision():
    digest = hashlib.sha256()
    buffers = {f"features.{name}": value for name, value in ImageNetFeatures().layers.named_buffers()}
    for name in sorted(buffers):
        digest.update(name.encode() + buffers[name].contiguous().numpy().tobytes())
    assert len(buffers) == 50 and digest.hexdigest() == TORCHVISIONS


@pytest.mark.parametrize("content", [None, b"half a file"])
def test_missing_backbone_file_is_named(tmp_path, monkeypatch, content):
    path = tmp_path / "features.pth"
    if content:
        path.write_bytes(content)
    monkeypatch.setattr(backbone, "WEIGHTS", path)
    with pytest.raises(UserError, match=r"features\.pth"):
        ImageNetFeatures()
