"""A packed data set gives what its folder gives, and says when it no longer fits it."""

import json
import shutil

import numpy as np
import pytest
import torch

from amodal_fusion.checkpoints import load_checkpoint
from amodal_fusion.data import packed
from amodal_fusion.data.datasets import AmodalFusionDataset
from amodal_fusion.data.images import read_image, write_image
from amodal_fusion.data.packed import PackedScenes, ShardWriter, from_record, pack_scenes, to_record
from amodal_fusion.data.scenes import Scene, find_scenes
from amodal_fusion.data.toy import draw_scene, write_dataset
from amodal_fusion.errors import ConfigError, SceneError, UserError
from tests.conftest import SCRIPT, arguments
from tests.scripts import run, succeed, torchrun

PREPARE = "prepare_dataset.py"


@pytest.fixture
def data(tmp_path):
    return write_dataset(tmp_path / "data")


def pack(data, output, size=64, n=5):
    pack_scenes(ShardWriter(data, output, size, n), find_scenes(data), 0)
    return output


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr(packed, "SHARD_SCENES", 4)


def noise(size, share, n=3):
    """A scene in which nothing repeats: noise even under alpha 0, a share of pixels entirely zero."""
    rng = np.random.default_rng(0)
    completions = [rng.integers(0, 256, (*size, 4), np.uint8) for _ in range(n)]
    for completion in completions:
        completion[rng.random(size) < share] = 0
    mask = rng.random(size) < 0.5
    partial, original = (rng.integers(0, 256, (*size, 3), np.uint8) for _ in range(2))
    partial[mask] = 0
    return Scene("noise", partial, mask, completions, original)


@pytest.mark.parametrize("scene", [draw_scene(1), draw_scene(2, (33, 47), 5), noise((31, 50), 0.0), noise((5, 7), 0.9),
                                   noise((64, 64), 1.0), noise((1, 1), 0.5, 1)])
def test_records_are_lossless(scene):
    found = from_record(to_record(scene), scene.id, 9)
    for name in ("partial", "mask", "original"):
        assert np.array_equal(getattr(found, name), getattr(scene, name)), name
    assert len(found.completions) == len(scene.completions)
    assert all(np.array_equal(a, b) for a, b in zip(found.completions, scene.completions))
    assert len(from_record(to_record(scene), scene.id, 1).completions) == 1


@pytest.mark.usefixtures("small_shards")
@pytest.mark.parametrize(("size", "n"), [(64, 5), (48, 2)])
def test_packed_items_equal_those_of_the_folder(data, tmp_path, size, n):
    sets = [AmodalFusionDataset(folder, find_scenes(data), size, n, augment=True, seed=3)
            for folder in (data, pack(data, tmp_path / "pack", size, n))]
    for index in range(len(sets[0])):
        of_folder, of_pack = (scenes[2, index] for scenes in sets)
        assert of_folder.keys() == of_pack.keys()
        assert all(np.array_equal(of_folder[name], of_pack[name]) for name in of_folder), index


def test_training_on_packed_data_is_the_same(data, tmp_path):
    succeed(PREPARE, "pack", "--data_dir", data, "--output_dir", tmp_path / "pack", "--img_size", 32, "--workers", 2)
    assert succeed(PREPARE, "check", "--data_dir", tmp_path / "pack").stdout == "11 scenes read, 0 faults\n"
    runs = {"folder": (data,), "pack": (tmp_path / "pack",), "cached": (data, "--cache", tmp_path / "cache")}
    for name, (folder, *more) in runs.items():
        succeed(SCRIPT, *arguments(folder, tmp_path / name, "--max_steps", 3, *more))
    first, *others = (load_checkpoint(tmp_path / name / "last.pth") for name in runs)
    for other in others:
        assert all(torch.equal(first["model"][name], other["model"][name]) for name in first["model"])
        assert str(first["metrics"]) == str(other["metrics"])  # NaN included
    # the folder's run goes on with the packed set
    process = succeed(SCRIPT, *arguments(tmp_path / "pack", tmp_path / "folder", "--max_steps", 3, "--resume", "auto"))
    best = tmp_path / "folder" / "best_model.pth"
    assert process.stdout.endswith("finished at step 3; raise --epochs or --max_steps to go on\n"
                                   f"best weights: {best}\n")
    assert "data_dir" in process.stdout and "cannot be compared" not in process.stdout


def test_processes_pack_into_one_cache(data, tmp_path):
    done = succeed(SCRIPT, *arguments(data, tmp_path / "run", "--batch_size", 1, "--max_steps", 2, "--workers", 1,
                                      "--cache", tmp_path / "cache"), start=torchrun)
    assert "2 × cpu" in done.stdout and load_checkpoint(tmp_path / "run" / "last.pth")["step"] == 2
    (cached,) = (tmp_path / "cache").iterdir()
    assert len(PackedScenes(cached).places) == 11


@pytest.mark.usefixtures("small_shards")
def test_packing_continues_and_repairs(data, tmp_path):
    output = pack(data, tmp_path / "pack")
    times = {path.name: path.stat().st_mtime_ns for path in output.glob("*.npy")}
    assert len(times) == 3
    (output / "00001.npy").write_bytes(b"half")
    with pytest.raises(UserError, match=r"00001\.npy: missing or truncated"):
        PackedScenes(output)
    pack(data, output)
    changed = [name for name, time in times.items() if (output / name).stat().st_mtime_ns != time]
    assert changed == ["00001.npy"] and len(PackedScenes(output).places) == 11
    for scene_id in find_scenes(data)[4:]:
        shutil.rmtree(data / scene_id)
    pack(data, output)
    assert [path.name for path in output.glob("*.npy")] == ["00000.npy"]


@pytest.mark.usefixtures("small_shards")
def test_interrupted_packing_is_no_data_set(data, tmp_path, monkeypatch):
    write, calls = packed.write_text, []

    def stop(path, text, **options):
        calls.append(path)
        if len(calls) == 3:  # the index, a shard, and the next shard
            raise KeyboardInterrupt
        write(path, text, **options)

    monkeypatch.setattr(packed, "write_text", stop)
    with pytest.raises(KeyboardInterrupt):
        pack(data, tmp_path / "pack")
    monkeypatch.undo()
    with pytest.raises(UserError, match="interrupted"):
        PackedScenes(tmp_path / "pack")
    assert not list((tmp_path / "pack").glob(".*.tmp*"))


def test_flipped_byte_is_noticed(data, tmp_path):
    output = pack(data, tmp_path / "pack")
    content = bytearray((output / "00000.npy").read_bytes())
    content[-1000] ^= 1
    (output / "00000.npy").write_bytes(content)
    with pytest.raises(SceneError, match=r"00000\.npy: damaged at scene val_2"):
        PackedScenes(output).read("val_2")
    assert run(PREPARE, "check", "--data_dir", output).returncode == 1


def test_stale_packed_set_is_refused(data, tmp_path):
    output, path = pack(data, tmp_path / "pack", 32), data / "train_3" / "comp1.png"
    write_image(path, read_image(path, "RGBA")[::-1])
    start = arguments(output, tmp_path / "run", "--max_steps", 1)
    refused = run(SCRIPT, *start)
    assert refused.returncode == 1 and "train_3: changed since" in refused.stderr
    pack(data, output, 32)
    succeed(SCRIPT, *start)
    data.rename(tmp_path / "elsewhere")  # a cluster has the packed set alone
    succeed(SCRIPT, *start, "--checkpoint_dir", tmp_path / "alone")


def test_packed_set_must_fit_the_options(data, tmp_path):
    output = pack(data, tmp_path / "pack", 32, 2)
    for options, flag in ((("--img_size", 64, "--n_max_completions", 2), "64 with 2"),
                          (("--n_max_completions", 3), "32 with 3")):
        refused = run(SCRIPT, *arguments(output, tmp_path / "run", *options))
        assert refused.returncode == 1 and flag in refused.stderr
    with pytest.raises(ConfigError, match="choose another folder"):
        pack(data, output, 64, 2)


def test_packing_refuses_faults_and_foreign_folders(data, tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "00000.npy").write_text("mine")
    with pytest.raises(ConfigError, match="neither empty nor"):
        pack(data, tmp_path / "photos")
    assert (tmp_path / "photos" / "00000.npy").read_text() == "mine"
    (data / "train_1" / "mask.png").write_bytes(b"")
    with pytest.raises(UserError, match=r"train_1/mask\.png: empty file"):
        pack(data, tmp_path / "pack")
    assert json.loads((tmp_path / "pack" / "packed.json").read_text())["shards"] == {}
