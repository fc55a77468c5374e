"""The frozen ImageNet features."""

import pytest
import torch

from fusion.errors import UserError
from fusion.model import backbone
from fusion.model.backbone import ImageNetFeatures
from tests.scripts import ROOT

TRAINED = ROOT.parent / "shared" / "weights" / "squeezenet1_1_features.pth"


def test_nothing_of_it_is_trained_or_saved():
    features = ImageNetFeatures()
    assert list(features.parameters()) == [] and features.state_dict() == {}
    assert not any(f.requires_grad for f in features(torch.rand(1, 3, 32, 32, requires_grad=True)))


@pytest.mark.parametrize("height, width", [(16, 16), (48, 32), (64, 160)])
def test_grids_are_those_of_the_strides_and_lengths_are_equal(height, width):
    features = ImageNetFeatures()(torch.rand(2, 3, height, width))
    assert [f.shape for f in features] == [
        (2, channels, height // stride, width // stride) for channels, stride in ((128, 4), (256, 8), (512, 16))]
    for feature in features:
        length = feature.square().mean(1).sqrt()
        assert torch.allclose(length, torch.ones_like(length), atol=1e-3)


@pytest.mark.skipif(not TRAINED.exists(), reason="no ImageNet backbone on this machine")
def test_weights_are_those_of_torchvision():
    trained = torch.load(TRAINED, weights_only=True)
    layers = ImageNetFeatures().layers
    buffers = dict(layers.named_buffers())
    assert len(buffers) == 50
    for name, value in buffers.items():
        assert torch.equal(value, trained[f"features.{name}"]), name


@pytest.mark.parametrize("content", [None, b"half a file"])
def test_without_its_file_the_message_names_it(tmp_path, monkeypatch, content):
    path = tmp_path / "features.pth"
    if content:
        path.write_bytes(content)
    monkeypatch.setattr(backbone, "WEIGHTS", path)
    with pytest.raises(UserError, match=r"features\.pth"):
        ImageNetFeatures()
