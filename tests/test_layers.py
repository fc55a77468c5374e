"""Training scenes out of photos with completed layers."""

import shutil

import numpy as np
import pytest
import torch

from amodal_fusion.checkpoints import export_weights, load_checkpoint
from amodal_fusion.data.datasets import SceneDataset, WithLayers
from amodal_fusion.data.images import write_image
from amodal_fusion.data.toy import draw_scene, write_dataset
from amodal_fusion.errors import SceneError
from amodal_fusion.synthesis.layers import LayeredScenes
from tests.conftest import SMALL, TINY, records
from tests.scripts import run, succeed


@pytest.fixture(scope="module")
def layered(tmp_path_factory):
    """Three raw photos with full-frame RGBA layers, as a layer model leaves them."""
    folder = tmp_path_factory.mktemp("layers")
    for number in range(3):
        scene = draw_scene(number, size=96)
        place = folder / f"photo_{number}"
        place.mkdir()
        write_image(place / "photo.png", scene.original)
        for slot, completion in enumerate(scene.completions):
            write_image(place / f"obj_{slot:03d}.png", completion)
    return folder


def test_scenes_depend_on_seed_and_index(layered):
    first, again = LayeredScenes([layered], 64), LayeredScenes([layered], 64)
    scenes = [first(index) for index in range(12)]
    for index in (11, 3, 0):
        repeated = again(index)
        assert np.array_equal(repeated.partial, scenes[index].partial)
        assert all(map(np.array_equal, repeated.completions, scenes[index].completions))
    assert len({scene.partial.tobytes() for scene in scenes}) == 12
    other = LayeredScenes([layered], 64, seed=1)(0)
    assert not np.array_equal(other.partial, scenes[0].partial)


def test_holes_are_cut_over_completions(layered):
    for index in range(20):
        scene = LayeredScenes([layered], 64, n_max_completions=4)(index)
        assert scene.partial.shape == scene.original.shape == (64, 64, 3) and len(scene.completions) <= 4
        assert np.array_equal(scene.partial[~scene.mask], scene.original[~scene.mask])
        assert not scene.partial[scene.mask].any() and 0.02 <= scene.mask.mean() <= 0.85
        assert any((completion[..., 3] > 127)[scene.mask].any() for completion in scene.completions)


def test_prepared_data_sets_work_as_layers(tmp_path):
    write_dataset(tmp_path / "data", train=3, val=1)
    (tmp_path / "data" / "dataset.yaml").write_text("command: create\n")
    scenes = LayeredScenes([tmp_path / "data"], 64)
    assert len(scenes.sources) == 4 and scenes(0).original is not None


def test_useless_folders_are_refused_by_name(tmp_path):
    with pytest.raises(SceneError, match="nothing_here"):
        LayeredScenes([tmp_path / "nothing_here"], 64)
    (tmp_path / "empty").mkdir()
    with pytest.raises(SceneError, match=r"empty: no photo with completions"):
        LayeredScenes([tmp_path / "empty"], 64)


@pytest.mark.parametrize("share", [0.25, 0.5])
def test_every_step_has_its_share_of_layers(share):
    mixed = WithLayers(SceneDataset(range(64)), None, share, batch=16)
    for step in range(4):
        layered = [mixed.is_layered(0, index) for index in range(16 * step, 16 * step + 16)]
        assert sum(layered) == 16 * share
        assert abs(sum(layered[::2]) - sum(layered[1::2])) <= 2  # both of two processes have some


def test_training_uses_layers_alone_or_mixed(layered, tmp_path):
    data = write_dataset(tmp_path / "data", train=4, val=2)
    alone = ("--val_dir", data, "--layers", layered, layered, "--layers_share", 1, "--scenes_per_epoch", 4)
    beside = ("--data_dir", data, "--layers", layered, "--switching_weight", 0.3, "--hedging_weight", 0.1)
    for name, options in (("alone", alone), ("beside", beside)):
        succeed("amodal_fusion_transformer.py", *TINY, *options, "--epochs", 1, "--checkpoint_dir", tmp_path / name)
        (line,) = records(tmp_path / name)
        assert line["step"] == 1 and np.isfinite(line["objective"]) and ("switching" in line) == (name == "beside")


def test_exported_weights_lie_between(checkpoint, tmp_path):
    data = write_dataset(tmp_path / "data", train=4, val=2)
    start = tmp_path / "start.pth"
    export_weights(checkpoint, start)
    common = (*SMALL, "--lpips_weight", 0, "--data_dir", data, "--epochs", 1, "--lr", 1e-2, "--init_from", start)
    for share in (0, 0.25):
        succeed("amodal_fusion_transformer.py", *common, "--checkpoint_dir", tmp_path / f"run_{share}",
                "--init_share", share, "--export", tmp_path / f"{share}.pth")
    files = (start, tmp_path / "0.pth", tmp_path / "0.25.pth")
    before, after, mean = (load_checkpoint(path)["model"] for path in files)
    assert any(not torch.equal(before[name], after[name]) for name in before)
    for name in before:
        assert torch.allclose(mean[name], 0.25 * before[name] + 0.75 * after[name], atol=1e-6), name


def test_damaged_layers_stop_training_before_it_starts(layered, tmp_path):
    shutil.copytree(layered, tmp_path / "bad")
    (tmp_path / "bad" / "photo_1" / "obj_001.png").write_bytes(b"no picture")
    data = write_dataset(tmp_path / "data", train=4, val=2)
    arguments = ("--data_dir", data, "--layers", tmp_path / "bad", "--checkpoint_dir", tmp_path / "run")
    process = run("amodal_fusion_transformer.py", *TINY, *arguments)
    assert process.returncode == 1 and "1 photos with layers have faults" in process.stderr
    assert "obj_001.png" in process.stderr and "Traceback" not in process.stderr
    scenes = LayeredScenes([tmp_path / "bad"], 64)
    assert {scenes(index).original.shape for index in range(8)} == {(64, 64, 3)}  # others are drawn instead
