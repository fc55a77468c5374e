"""Files of other people stay: what this program removes or overwrites, it has written."""

import json
import os

import pytest

from amodal_fusion.errors import UserError
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
    temporary_path,
    write_text,
)


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
