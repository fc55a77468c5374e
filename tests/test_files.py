"""Files of other people stay: what this program removes or overwrites, it has written."""

import json
import os
import shutil

import numpy as np
import pytest

from amodal_fusion.data.dataset_folder import add_record, read_records, tidy_records
from amodal_fusion.errors import ConfigError, UserError
from amodal_fusion.files import (
    WRITTEN,
    atomic_file,
    check_ours,
    clear_folder,
    is_ours,
    is_temporary,
    lock_run_dir,
    record_written,
    remove_ours,
    take_output,
    temporary_path,
    write_text,
)
from amodal_fusion.pools import usable_cpus
from tests.conftest import SCRIPT, arguments
from tests.scripts import run


def test_only_unchanged_written_files_are_ours(tmp_path):
    ours, foreign = tmp_path / "a.csv", tmp_path / "b.csv"
    write_text(ours, "one\n", owned=True)
    foreign.write_text("one\n")
    assert is_ours(ours) and not is_ours(foreign) and not is_ours(tmp_path / "missing")
    os.utime(ours, (1, 1))  # a copy has another time
    assert is_ours(ours)
    with open(ours, "a") as file:
        file.write("two\n")
    assert not is_ours(ours) and is_ours(ours, grown=True)
    ours.write_text("1ne\ntwo\n")
    assert not is_ours(ours, grown=True)
    for path in (ours, foreign):
        with pytest.raises(UserError, match=f"{path.name}: was not written"), atomic_file(path, True):
            pass
        with pytest.raises(UserError, match=path.name):
            check_ours([path])
        assert not remove_ours(path) and path.exists()
    link = tmp_path / "c.csv"
    write_text(link, "one\n", owned=True)
    link.unlink()
    link.symlink_to(foreign)
    assert not is_ours(link)


def test_killed_runs_keep_ownership_of_files(tmp_path):
    path = tmp_path / "a.txt"
    for number in range(4):
        write_text(path, f"{number}\n", owned=True)
        new = tmp_path / "new"
        new.write_text(f"killed {number}\n")
        record_written(tmp_path, {path.name: new})  # and killed before the new file has its name
        assert is_ours(path)
        os.replace(new, path)
        assert is_ours(path)
    assert len(json.loads((tmp_path / WRITTEN).read_text())["files"][path.name]) == 2


def test_a_foreign_record_is_kept(tmp_path):
    for content in ("[]", "{", '{"files": 3, "written_by": "amodal_fusion"}', "\0"):
        (tmp_path / WRITTEN).write_text(content)
        (tmp_path / "a").write_text("a")
        with pytest.raises(UserError, match="move it elsewhere"):
            record_written(tmp_path, {"a": tmp_path / "a"})
        assert clear_folder(tmp_path) == ["a"] and (tmp_path / WRITTEN).read_text() == content


def test_clearing_a_folder_leaves_foreign_files(tmp_path):
    folder = tmp_path / "scene"
    folder.mkdir()
    write_text(folder / "a", "a", owned=True)
    temporary_path(folder / "a").write_text("half")
    (folder / ".git").mkdir()
    assert clear_folder(folder) == [".git"] and not (folder / "a").exists() and (folder / ".git").is_dir()
    (folder / ".git").rmdir()
    assert clear_folder(folder) == [] and not folder.exists()
    (tmp_path / "link").symlink_to(tmp_path)
    assert clear_folder(tmp_path / "link") == [] and (tmp_path / "link").is_symlink()


def test_leftovers_are_known_by_their_check_sum(tmp_path):
    names = (".notes.tmp.txt", ".tmp-backup", ".last.k1lled.tmp.pth", ".a.0123456789abcdef01234567.tmp.txt")
    for name in names:
        (tmp_path / name).write_text("mine")
    (tmp_path / ".old.tmp").mkdir()
    own = [temporary_path(tmp_path / name) for name in ("사진.png", "no suffix", "x" * 200 + ".pth", ".hidden")]
    for path in own:
        path.write_text("half")
    temporary_path(tmp_path / "folder").mkdir()
    assert all(is_temporary(path.name) for path in own) and not any(map(is_temporary, names))
    assert lock_run_dir(tmp_path) is not None
    assert {path.name for path in tmp_path.iterdir()} == {*names, ".old.tmp", ".lock"}


# What a user may have in and around a folder that this program writes to; {} is a scene or an image of it.
FOREIGN = ("notes.txt", ".lock", ".draft.tmp.md", ".tmp-backup/thesis.txt", ".old.tmp/a.png", "a.tmp.png", WRITTEN,
           "{}/comp9_visible.png", "{}/comp9.png", "{}/mask.png", "{}/.labels.json", "{}/.git/config",
           "{}/__pycache__/a.pyc", "{}/notes.txt", "{}/" + WRITTEN, "mine/mask.png", "mine/partial.png",
           "mine/comp1.png")
DATA = ("dataset.yaml", "report.csv", "skipped.csv", "report.png", "made_from.csv", "preview.png", "train_list.txt",
        "val_list.txt", "test_list.txt", ".checked.json")
OUT = ("metrics.csv", "summary.md", "report.html", "failed.csv", "by_group.csv", "{}/figure.png", "{}/fused.png",
       "{}/scene.json", "{}/weight_1.png")
RUN = ("best_model.pth", "metrics.jsonl", "curves.png", "val_epoch_001.png", ".run", "last.pth")


def put_foreign(folder, scenes, names, rng):
    """Random files of somebody else in the folder, YOLO's dataset.yaml among them; {path: content}."""
    files = {}
    for name in rng.choice(names, rng.integers(1, 5), replace=False):
        path = folder / str(name).format(rng.choice(scenes))
        if path.exists() and rng.random() < 0.7:
            continue
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"path: {rng.random()}\ntrain: images\nnames: [car]\n")
            files[path] = path.read_bytes()
        except OSError:  # a folder is there
            continue
    return files


@pytest.mark.parametrize("seed", range(3))
def test_foreign_files_survive_every_command(seed, dataset, checkpoint, tmp_path):
    rng, foreign, refused = np.random.default_rng(seed), {}, []
    raw, scenes = tmp_path / "raw", ["train_0", "train_1"]
    data, composed, out, training = (tmp_path / name for name in ("data", "composed", "out", "run"))
    for name in scenes:
        shutil.copytree(dataset / name, raw / name)
    folders = {data: (scenes, DATA), composed: (["synthetic_0000000", "synthetic_0000001"], DATA),
               out: (scenes, OUT), training: (["x"], RUN)}
    create = ("prepare_dataset.py", "create", "--input_dir", raw, "--output_dir", data, "--workers", 1, "--split")
    commands = [
        create, (*create, "--overwrite"), ("prepare_dataset.py", "split", "--data_dir", data, "--seed", 3),
        ("prepare_dataset.py", "check", "--data_dir", data, "--workers", 1),
        ("prepare_dataset.py", "synthesize", "--backgrounds", raw, "--output_dir", composed, "--n_scenes", 2,
         "--img_size", 64, "--workers", 1, *["--overwrite"] * (seed % 2)),
        ("amodal_fusion_transformer_inference.py", "--checkpoint", checkpoint, "--data_dir", dataset, "--output_dir",
         out, "--workers", 0, "--gpus", 0, *["--overwrite"] * (seed % 2)),
        (SCRIPT, *arguments(dataset, training, "--epochs", 1, "--figure_every", 1))]
    for attempt in range(2):
        for folder, (names, own) in folders.items():
            if (seed + attempt) % 3:
                foreign |= put_foreign(folder, names, (*FOREIGN, *own), rng)
        for path in raw.rglob("*.png") if attempt else ():
            os.utime(path, (1, 1))
        for command in commands:
            process = run(*command)
            assert "Traceback" not in process.stderr, process.stderr
            refused.append(process.returncode)
            for path, content in foreign.items():
                assert path.read_bytes() == content, (path, command)
    assert 0 in refused and (not foreign or {1, 2} & set(refused))


@pytest.mark.parametrize(("variables", "hint"), [
    ({"OMPI_COMM_WORLD_SIZE": "4"}, "started 4 copies"), ({"SLURM_NTASKS": "2"}, "started 2 copies"),
    ({"PMI_SIZE": "3"}, "started 3 copies"), ({"SLURM_NTASKS": "2", "RANK": "1"}, ""), ({"SLURM_NTASKS": "1"}, ""),
    ({"PMI_SIZE": "many"}, "")])
def test_copies_of_a_launcher_are_named(variables, hint, tmp_path, monkeypatch):
    for name in ("OMPI_COMM_WORLD_SIZE", "SLURM_NTASKS", "PMI_SIZE", "PMIX_SIZE", "RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("amodal_fusion.files.lock_run_dir", lambda *_: None)
    with pytest.raises(ConfigError, match="another run is writing to it") as error:
        take_output(tmp_path)
    assert ("The launcher" in str(error.value)) == bool(hint) and hint in str(error.value)


def test_processes_are_as_many_as_usable_cpus(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3}, raising=False)
    assert usable_cpus() == 1


def test_records_hold_names_that_look_like_formulas(tmp_path):
    names = ["=1+1", "+a", "plain"]
    for name in names:
        (tmp_path / name).mkdir()
        (tmp_path / name / "mask.png").write_bytes(b"png")
        add_record(tmp_path, name, "digest")
    tidy_records(tmp_path, names)
    assert "\n=1+1" not in (tmp_path / "made_from.csv").read_text()
    assert set(read_records(tmp_path)) == set(names)
