"""`prepare_dataset.py create` by several processes that share one data set."""

import os
import shutil
import signal

import numpy as np
import pytest

from amodal_fusion.data.dataset_folder import tidy_rows
from amodal_fusion.data.images import write_image
from amodal_fusion.data.splits import SAME_PHOTO, _near
from amodal_fusion.data.toy import draw_scene
from amodal_fusion.errors import ConfigError
from amodal_fusion.files import WRITTEN
from amodal_fusion.ingest.shards import Shard, shard_of
from tests.conftest import wait_for
from tests.scripts import Running, run, succeed, torchrun

SCRIPT = "prepare_dataset.py"
SCENES = 12


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Twelve scenes, one of them bad, two of one photo; and a scene whose id is taken."""
    tree = tmp_path_factory.mktemp("results")
    for number in range(SCENES):
        scene, folder = draw_scene(min(number, SCENES - 2)), tree / f"s{number:02d}"
        folder.mkdir()
        write_image(folder / "original.png", scene.original)
        write_image(folder / "partial.png", scene.partial)
        write_image(folder / "mask.png", scene.mask.astype(np.uint8) * 255)
        for at, completion in enumerate(scene.completions, 1):
            write_image(folder / f"comp{at}.png", completion)
    (tree / "s05" / "comp1.png").write_bytes(b"")
    shutil.copytree(tree / "s00", tree / "a" / "b")
    shutil.copytree(tree / "s00", tree / "a__b")
    return tree


@pytest.fixture(scope="module")
def whole(results, tmp_path_factory):
    """The data set that one process makes."""
    data = tmp_path_factory.mktemp("whole") / "data"
    succeed(SCRIPT, *arguments(results, data))
    return data


def arguments(results, data, *more):
    return ("create", "--input_dir", results, "--output_dir", data, "--workers", 1, "--split", "--max_bad", 0.5, *more)


def contents(data):
    """{path: bytes} of all files but the records, which hold times."""
    return {path.relative_to(data).as_posix(): path.read_bytes().replace(str(data).encode(), b"DATA")
            for path in data.rglob("*") if path.is_file() and path.name not in (WRITTEN, ".lock")}


def hidden(data):
    return sorted(path.name for path in data.iterdir() if path.name.startswith(".") and path.is_dir())


def test_shards_make_what_one_process_makes(results, whole, tmp_path):
    data = tmp_path / "data"
    running = [Running(SCRIPT, *arguments(results, data, "--shard", f"{number}/3")) for number in (1, 2, 3)]
    ended = [process.finish() for process in running]
    assert [process.returncode for process in ended] == [0, 0, 0], [p.stdout + p.stderr for p in ended]
    assert sum("merging 3 shards" in process.stdout for process in ended) == 1
    assert contents(data) == contents(whole) and not hidden(data) and "report.png" in contents(data)
    said = succeed(SCRIPT, *arguments(results, data)).stdout  # an ordinary data set
    assert f"{SCENES} already there" in said and contents(data) == contents(whole)


def test_missing_shard_is_told_and_made(results, whole, tmp_path):
    data = tmp_path / "data"
    said = succeed(SCRIPT, *arguments(results, data, "--shard", "2/3")).stdout
    assert "shard 2/3 has ended, but not 1/3, 3/3" in said and hidden(data) == [".shard_2_of_3"]
    assert "complete: false" in (data / "dataset.yaml").read_text()
    process = run(SCRIPT, *arguments(results, data, "--shard", "1/2"))
    assert process.returncode == 2 and "shard 1/2: " in process.stderr and "with 3 shards, not 2" in process.stderr
    process = run(SCRIPT, *arguments(results, data, "--shard", "1/3", "--n_max_completions", 2))
    assert process.returncode == 2 and "shard 1/3: " in process.stderr and "not 2" in process.stderr
    process = run(SCRIPT, *arguments(results, data, "--shard", "1/3", "--overwrite"))
    assert process.returncode == 2 and "shards only continue" in process.stderr
    said = succeed(SCRIPT, *arguments(results, data)).stdout
    assert "merging 1 shards; 1/3, 3/3 did not end" in said or "1/3, 3/3 did not end" in said
    assert contents(data) == contents(whole) and not hidden(data)


def test_killed_shard_resumes(results, tmp_path):
    results, data, whole = shutil.copytree(results, tmp_path / "results"), tmp_path / "data", tmp_path / "whole"
    for number in range(60):  # a shard must not end before it is stopped
        shutil.copytree(results / "s00", results / f"t{number:02d}")
    succeed(SCRIPT, *arguments(results, whole))
    table = data / ".shard_1_of_2" / "made_from.csv"
    running = Running(SCRIPT, *arguments(results, data, "--shard", "1/2"))
    wait_for(lambda: table.exists() and table.read_text().count("\n") > 1)
    os.kill(running.pid, signal.SIGSTOP)
    second = run(SCRIPT, *arguments(results, data, "--shard", "1/2"))
    os.kill(running.pid, signal.SIGKILL)
    assert running.finish().returncode == -signal.SIGKILL
    assert second.returncode == 2 and "shard 1/2: " in second.stderr and "another run is writing" in second.stderr
    with open(table, "a") as file:
        file.write("s01,half a li")  # as a kill may leave it
    assert "but not 1/2" in succeed(SCRIPT, *arguments(results, data, "--shard", "2/2")).stdout
    said = succeed(SCRIPT, *arguments(results, data, "--shard", "1/2")).stdout
    assert " 0 already there" not in said.split("merging")[0] and "merging 2 shards" in said
    assert contents(data) == contents(whole) and not hidden(data)


def test_launcher_gives_the_shards(results, whole, tmp_path):
    data = tmp_path / "data"
    succeed(SCRIPT, *arguments(results, data), start=torchrun)
    assert contents(data) == contents(whole)


@pytest.mark.parametrize(("option", "variables", "shard"), [
    (None, {}, None), ("1/1", {}, None), ("2/6", {"RANK": "0", "WORLD_SIZE": "3"}, Shard(2, 6)),
    (None, {"RANK": "2", "WORLD_SIZE": "3", "MASTER_ADDR": "a"}, Shard(3, 3)),
    (None, {"SLURM_PROCID": "1", "SLURM_NTASKS": "4", "SLURM_STEP_ID": "0"}, Shard(2, 4)),
    (None, {"SLURM_PROCID": "0", "SLURM_NTASKS": "4"}, None),  # the batch script itself
    ("0/6", {}, "0/6: no shard"), ("7/6", {}, "no shard"), ("two", {}, "no shard"),
    (None, {"RANK": "x", "WORLD_SIZE": "3", "MASTER_ADDR": "a"}, "RANK=x, WORLD_SIZE=3: no shard"),
])
def test_shard_comes_from_option_or_launcher(option, variables, shard, monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "SLURM_PROCID", "SLURM_NTASKS", "SLURM_STEP_ID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    if isinstance(shard, str):
        with pytest.raises(ConfigError, match=shard):
            shard_of(option)
    else:
        assert shard_of(option) == shard


def test_every_scene_has_one_shard():
    ids = [f"scene {number}" for number in range(3000)]
    shares = [[scene_id for scene_id in ids if Shard(number, 6).has(scene_id)] for number in range(1, 7)]
    assert sorted(scene_id for share in shares for scene_id in share) == sorted(ids)
    assert all(400 < len(share) < 600 for share in shares)


def test_tidy_keeps_latest_rows_in_order(tmp_path):
    table = tmp_path / "t.csv"
    rows = ["b,1,old", "b,2,old", "b,1,new", "a,1,\"two\nlines\"", "gone,1,x", "half", "c,1,x", "b,1,newest",
            "c,1,last"]
    table.write_bytes("\r\n".join(["scene,file,why", *rows]).encode())
    tidy_rows(table, ("scene", "file", "why"), ["a", "b", "c"], key=1)
    kept = ["scene,file,why", "a,1,\"two\nlines\"", "b,1,newest", "c,1,last"]
    assert table.read_bytes() == "".join(f"{row}\r\n" for row in kept).encode()


def test_near_thumbnails_connect_as_all_pairs_do():
    rng = np.random.default_rng(0)
    photos = rng.integers(0, 256, (150, 192)) * rng.random((150, 1)) * (rng.random((150, 1)) < 0.7)
    photos = photos[rng.integers(0, 150, 400)] + rng.integers(-2, 3, (400, 192)) * (rng.random((400, 192)) < 0.02)
    photos = np.clip(photos, 0, 255).astype(np.uint8)

    def parts(pairs):
        part = list(range(len(photos)))
        for i, j in pairs:
            old, new = part[i], part[j]
            part = [new if value == old else value for value in part]
        return {tuple(i for i in range(len(photos)) if part[i] == name) for name in set(part)}

    far = np.abs(photos[:, None].astype(np.int16) - photos[None]).max(2)
    assert 1 < len(parts(_near(photos, np.arange(400)))) < 400
    assert parts(_near(photos, np.arange(400))) == parts(np.argwhere(far <= SAME_PHOTO))
