"""What is read once is not read again, and what a checkpoint claims is not built before it is checked."""

import os
import shutil
from pathlib import Path

import pytest
import torch

import amodal_fusion.data.checks
import amodal_fusion_transformer as aft
from amodal_fusion.checkpoints import save_checkpoint
from amodal_fusion.data import splits
from amodal_fusion.data.checks import MEMORY, check_scenes, read_checked, write_checked
from amodal_fusion.data.scenes import read_list
from amodal_fusion.data.toy import write_dataset
from amodal_fusion.errors import SceneError, UserError

IDS = ["train_0", "train_1", "train_2", "val_0"]


@pytest.fixture
def read(monkeypatch):
    """Names of the scenes that have been read so far."""
    names, check_scene = [], amodal_fusion.data.checks.check_scene

    def counted(folder, **options):
        names.append(folder.name)
        return check_scene(folder, **options)

    monkeypatch.setattr(amodal_fusion.data.checks, "check_scene", counted)
    return names


def test_scenes_are_read_again_only_when_they_changed(tmp_path, read):
    data = write_dataset(tmp_path, train=3, val=1)

    def check(most=3):
        read.clear()
        faults, states = check_scenes(data, IDS, most, read_checked(data))
        assert write_checked(data, {**read_checked(data), **states})
        return sorted(read), faults

    assert check() == (IDS, []) and check() == ([], [])
    (data / "train_1" / "comp9.png").write_bytes(b"beyond those that training takes")
    assert check() == (["train_1"], []) and check() == ([], [])
    picture = data / "train_1" / "comp1.png"
    whole = picture.read_bytes()
    picture.write_bytes(whole[:-20])
    for _ in range(2):  # a fault is not remembered
        again, faults = check()
        assert again == ["train_1"] and len(faults) == 1 and str(picture) in faults[0]
    picture.write_bytes(whole)
    assert check() == (["train_1"], [])
    shutil.copy(picture, data / "train_2" / "comp3.png")  # one more
    os.utime(data / "val_0" / "mask.png", (0, 0))
    assert check() == (["train_2", "val_0"], [])
    again, faults = check(4)  # takes comp9.png, too
    assert again == IDS and len(faults) == 1 and "comp9.png" in faults[0]
    for rubbish in ("", "[]", '{"format": 1, "scenes": 3}', '{"format": 99, "scenes": {}}', "\0"):
        (data / MEMORY).write_text(rubbish)
        assert read_checked(data) == {}
    assert not write_checked(Path("/proc/nothing"), {})


def test_splitting_many_scenes_looks_at_each_once(tmp_path, monkeypatch):
    looked = 0

    class Name(str):
        def __hash__(self):
            nonlocal looked
            looked += 1
            return super().__hash__()

    data, count = write_dataset(tmp_path, train=20, val=0), 20
    monkeypatch.setattr(splits, "find_scenes", lambda _: [Name(f"train_{number}") for number in range(count)])
    splits.write_lists(data, splits.SplitOptions())
    assert count <= looked < 15 * count


@pytest.mark.parametrize(("changes", "fault"), [
    ({"width": 16000}, "has shape"), ({"width": 10**12}, ""), ({"width": "32"}, ""), ({"width": None}, ""),
    ({"encoder_layers": 10**9}, "encoder_layers"), ({"heads": 7}, "multiple"), ({"img_size": -1}, "img_size"),
    ({"decoder_layers": 2}, "decoder")])
def test_checkpoint_claiming_another_network_costs_no_memory(changes, fault, tmp_path, monkeypatch):
    config = {"width": 32, "encoder_layers": 1, "decoder_layers": 1, "heads": 2, "img_size": 64}
    weights = aft.build_model(config).state_dict()
    save_checkpoint(tmp_path / "model.pth", {"model": weights, "config": {**config, **changes}})
    build, built = aft.build_model, []

    def watched(asked):
        built.append(torch.get_default_device().type)
        return build(asked)

    monkeypatch.setattr(aft, "build_model", watched)
    with pytest.raises(UserError, match=rf"model\.pth: its weights do not fit this network .*{fault}"):
        aft.load_model(tmp_path / "model.pth")
    assert "cpu" not in built


def test_missing_list_of_raw_results_asks_for_create(tmp_path):
    (tmp_path / "a").mkdir()
    with pytest.raises(SceneError, match="no scene here"):
        read_list(tmp_path / "train_list.txt", tmp_path)
