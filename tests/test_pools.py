"""Helper processes: what goes wrong in one job stops no other, and what is done is known to be done."""

import csv
import functools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import amodal_fusion.ingest.create
import amodal_fusion.prepare
from amodal_fusion import pools
from amodal_fusion.data.dataset_folder import RECORD_COLUMNS, RECORDS, append_rows, read_records, write_scene_folder
from amodal_fusion.data.images import read_image, write_image
from amodal_fusion.data.scenes import read_scene
from amodal_fusion.data.toy import draw_scene
from amodal_fusion.errors import SceneError
from amodal_fusion.files import lock_run_dir, record_written, temporary_path
from amodal_fusion.ingest.report import REPORT_COLUMNS
from amodal_fusion.pools import Failure, Helpers
from tests.scripts import ROOT, Running, run, succeed
from tests.test_processes import alive

SCRIPT = "prepare_dataset.py"


def write_raw(tree, names):
    for seed, name in enumerate(names):
        folder, scene = tree / name, draw_scene(seed)
        folder.mkdir(parents=True)
        write_image(folder / "original.png", scene.original)
        write_image(folder / "partial.png", scene.partial)
        write_image(folder / "mask.png", scene.mask.astype("uint8") * 255)
        for number, completion in enumerate(scene.completions, 1):
            write_image(folder / f"comp{number}.png", completion)
    return tree


def create(tree, output, *arguments, start=run, **options):
    return start(SCRIPT, "create", "--input_dir", tree, "--output_dir", output, "--workers", 2, *arguments, **options)


def scenes(output):
    return sorted(path.name for path in output.iterdir() if path.is_dir())


def report_rows(output):
    with open(output / "report.csv", newline="", encoding="utf-8") as file:
        return [(row["scene"], row["file"]) for row in csv.DictReader(file)]


def job(item):
    if item == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    errors = {"memory": MemoryError(), "bad": SceneError("bad: no scene"), "bug": ZeroDivisionError(),
              "disk": OSError(28, "No space left", "x.png")}
    if item in errors:
        raise errors[item]
    return len(item)


@pytest.mark.parametrize("workers", [1, 2])
def test_faulty_jobs_do_not_stop_others(workers):
    items = ["a", "bb", "killed", "memory", "ccc", "bad", "killed", "disk", *"defghijk"]
    with Helpers(job, workers) as helpers:
        found = list(helpers.map(items, 4))
    assert [item for item, _ in found] == items
    faults = {item: outcome for item, outcome in found if isinstance(outcome, Failure)}
    assert set(faults) == {"killed", "memory", "bad", "disk"}
    assert "was killed" in faults["killed"] and "memory ran out" in faults["memory"]
    assert faults["bad"] == "bad: no scene" and faults["disk"] == "x.png: No space left"
    assert all(outcome == len(item) for item, outcome in found if item not in faults)


@pytest.mark.parametrize("workers", [0, 2])
def test_unforeseen_error_is_named(workers):
    with Helpers(job, workers) as helpers:
        assert helpers.outcome(helpers.submit("aa")) == 2
        assert helpers.outcome(helpers.submit("memory")).startswith("memory ran out")
        assert re.match(r"unforeseen error.*ZeroDivisionError: .* \(test_pools\.py, line \d+\)",
                        helpers.outcome(helpers.submit("bug")))


def die_late(item):
    if item == 2:
        time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGKILL)
    return item


def test_process_dying_between_jobs_is_no_crash():
    found = []
    with Helpers(die_late, 2) as helpers:
        for entry in helpers.map(range(8), 2):
            found.append(entry)
            time.sleep(0.2)  # the pool breaks while the caller writes its report
    assert [item for item, _ in found] == list(range(8))
    assert [item for item, outcome in found if isinstance(outcome, Failure)] == [2]


def be_alone_or_die(folder, number):
    """Beside another one of its kind, number 1 or 4 takes too much memory for this machine."""
    (folder / str(os.getpid())).touch()
    time.sleep(0.3)
    others = [int(path.name) for path in folder.iterdir() if path.name != str(os.getpid())]
    if number in (1, 4) and any(map(alive, others)):
        os.kill(os.getpid(), signal.SIGKILL)
    (folder / str(os.getpid())).unlink()
    return number


def test_lost_jobs_are_repeated_one_at_a_time(tmp_path):
    with Helpers(functools.partial(be_alone_or_die, tmp_path), 3) as helpers:
        assert dict(helpers.map(range(7), 3)) == {number: number for number in range(7)}


def start_a_program(folder, _):
    """A program that goes on for long, from a process that answers nothing any more."""
    program = subprocess.Popen(["sleep", "60"])
    (folder / f"{program.pid}").touch()
    os.kill(os.getpid(), signal.SIGSTOP)


def test_abandoned_jobs_end_with_the_programs_they_started(tmp_path):
    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt), Helpers(functools.partial(start_a_program, tmp_path), 2) as helpers:
        jobs = [helpers.submit(number) for number in range(4)]
        while len(list(tmp_path.iterdir())) < 2:
            time.sleep(0.05)
        raise KeyboardInterrupt
    assert len(jobs) == 4 and time.monotonic() - start < 20
    assert not any(alive(int(path.name)) for path in tmp_path.iterdir())


def start_a_program_and_die(folder, _):
    program = subprocess.Popen(["sleep", "60"])
    (folder / f"{program.pid}").touch()
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_process_leaves_no_program_behind(tmp_path):
    with Helpers(functools.partial(start_a_program_and_die, tmp_path), 2) as helpers:
        assert "was killed" in helpers.outcome(helpers.submit(0))
        assert len(list(tmp_path.iterdir())) == 2  # done again
    assert not any(alive(int(path.name)) for path in tmp_path.iterdir())


def die_then_sleep(marker, _):
    if not marker.exists():
        marker.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)


def test_repeated_job_can_be_interrupted(tmp_path):
    def interrupt(*_):
        raise KeyboardInterrupt
    start, before = time.monotonic(), signal.signal(signal.SIGALRM, interrupt)
    signal.alarm(2)
    try:
        with pytest.raises(KeyboardInterrupt), Helpers(functools.partial(die_then_sleep, tmp_path / "x"), 2) as helpers:
            helpers.outcome(helpers.submit(0))
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    assert time.monotonic() - start < 20


@pytest.mark.parametrize("deaths", [3, 1000])
def test_processes_killed_at_start_are_started_again(deaths, tmp_path, monkeypatch):
    def die():
        (tmp_path / str(os.getpid())).touch()
        if len(list(tmp_path.iterdir())) <= deaths:
            os.kill(os.getpid(), signal.SIGKILL)
    monkeypatch.setattr(pools, "start_helper", die)
    if deaths == 3:
        with Helpers(job, 1) as helpers:
            assert dict(helpers.map(["a", "bb"], 2)) == {"a": 1, "bb": 2}
    else:
        with pytest.raises(SceneError, match="killed as they started"), Helpers(job, 1):
            pass


INTERRUPTED_FORK = """
import logging, multiprocessing, os, signal
from amodal_fusion.pools import Helpers
if __name__ == "__main__":
    os.register_at_fork(before=lambda: os.kill(os.getpid(), signal.SIGINT))
    try:
        with Helpers(len, 2):
            print("not interrupted")
    except KeyboardInterrupt:
        logging.getLogger().setLevel(10)  # takes the lock that a fork takes
        print("interrupted,", len(multiprocessing.active_children()), "left")
"""


def test_ctrl_c_during_fork_takes_effect_after_it():
    process = subprocess.run([sys.executable, "-c", INTERRUPTED_FORK], cwd=ROOT, capture_output=True, text=True,
                             timeout=60, check=False)
    assert (process.stdout, process.stderr) == ("interrupted, 0 left\n", "")


def test_scene_cut_off_by_dying_process_is_rewritten(tmp_path):
    scene = draw_scene(0)
    leftover = temporary_path(tmp_path / "scene")
    leftover.mkdir()
    (leftover / "comp9.png").write_bytes(b"half")
    write_scene_folder(tmp_path, scene)
    assert lock_run_dir(tmp_path) is not None and not leftover.exists()
    assert len(read_scene(tmp_path / scene.id).completions) == 3 and scenes(tmp_path) == [scene.id]


def read_with(trouble):
    """Have raw scenes read with trouble, by their ids."""
    read = amodal_fusion.ingest.create.read_raw_scene

    @functools.wraps(read)
    def troubled(raw, *rest):
        trouble(raw.id)
        return read(raw, *rest)
    amodal_fusion.ingest.create.read_raw_scene = troubled


def die_or_run_out():
    read_with(job)


def slowly():
    read_with(lambda _: time.sleep(0.2))


def test_create_continues_when_process_is_killed_or_starved(tmp_path):
    tree, output = write_raw(tmp_path / "raw", ["a", "b", "c", "killed", "memory"]), tmp_path / "data"
    process = create(tree, output, "--max_bad", 0.5, setup=die_or_run_out)
    assert process.returncode == 0, process.stderr
    assert scenes(output) == ["a", "b", "c"] and "written 3, bad 2" in process.stdout
    skipped = (output / "skipped.csv").read_text()
    assert "its process was killed" in skipped and "memory ran out; use" in skipped
    assert scenes(output) == ["a", "b", "c"]
    process = create(tree, output, start=succeed)  # on a machine with enough memory
    assert scenes(output) == ["a", "b", "c", "killed", "memory"] and "3 already there" in process.stdout


@pytest.mark.parametrize("left", [b"", b"scene00,0f", b"scene00,0f,comp1.png\r\nscene"])
def test_lists_that_a_killed_run_left_unfinished(left, tmp_path):
    tree, output = write_raw(tmp_path / "raw", ["scene00", "scene01"]), tmp_path / "data"
    output.mkdir()
    for name, columns in (("report.csv", REPORT_COLUMNS), (RECORDS, RECORD_COLUMNS)):
        append_rows(output / name, columns, [])
        with open(output / name, "ab") as file:
            file.write(left)
    append_rows(output / RECORDS, RECORD_COLUMNS, [("scene09", "0f", "comp1.png")])
    assert read_records(output)["scene09"] == ("0f", "comp1.png")
    create(tree, output, start=succeed)
    assert set(read_records(output)) == {"scene00", "scene01"}
    assert {scene for scene, _ in report_rows(output)} == {"scene00", "scene01"}


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_interrupted_create_resumes(number, tmp_path):
    tree, output = write_raw(tmp_path / "raw", [f"scene{i:02}" for i in range(24)]), tmp_path / "data"
    process = create(tree, output, start=Running, setup=slowly)
    deadline = time.monotonic() + 30
    while not read_records(output):  # a scene that has none yet is made again
        assert time.monotonic() < deadline
        time.sleep(0.02)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    start = time.monotonic()
    if number == signal.SIGINT:
        os.killpg(process.pid, number)  # Ctrl-C reaches the whole group
    else:
        os.kill(process.pid, number)
    ended = process.finish(20)
    assert len(children) >= 2
    while any(alive(int(child)) for child in children):
        assert time.monotonic() < start + 8, "left behind"
        time.sleep(0.05)
    done = len(scenes(output))
    assert done < 20
    if number == signal.SIGINT:
        assert ended.returncode == 130 and "Traceback" not in ended.stderr
        assert "interrupted" in ended.stderr.splitlines()[-1]
    rest = create(tree, output, start=succeed)
    assert len(scenes(output)) == 24 and "written 24" not in rest.stdout
    assert len(report_rows(output)) == len(set(report_rows(output)))


def test_one_run_at_a_time_in_a_folder(tmp_path):
    tree, output = write_raw(tmp_path / "raw", ["a"]), tmp_path / "data"
    lock = lock_run_dir(output)
    for process in (create(tree, output),
                    run(SCRIPT, "synthesize", "--backgrounds", tree, "--output_dir", output, "--n_scenes", 1)):
        assert process.returncode == 2 and "another run" in process.stderr
    lock.close()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (output / "a").symlink_to(elsewhere)
    process = create(tree, output)
    assert process.returncode == 2 and "no dataset.yaml beside it" in process.stderr
    assert (output / "a").is_symlink() and not list(elsewhere.iterdir())
    (output / "a").unlink()
    create(tree, output, start=succeed)
    (tree / "link").symlink_to(output)
    process = create(tree, output)
    assert process.returncode == 2 and "a link into the output folder" in process.stderr


def test_changed_or_incomplete_scenes_are_made_again(tmp_path):
    tree, output = write_raw(tmp_path / "raw", [f"scene{i}" for i in range(5)]), tmp_path / "data"
    create(tree, output, start=succeed)
    (output / "scene0" / "comp2.png").unlink()  # half of a scene
    write_image(tree / "scene1" / "comp1.png", draw_scene(50).completions[0])  # results made again
    (tree / "scene2" / "comp1.png").write_bytes(b"broken since")
    process = create(tree, output, "--max_bad", 0.5, start=succeed)
    assert "2 already there, 3 are made again" in process.stdout and "written 2, bad 1" in process.stdout
    assert (output / "scene0" / "comp2.png").exists() and scenes(output) == ["scene0", "scene1", "scene3", "scene4"]
    rows = report_rows(output)
    assert len(rows) == len(set(rows)) == 4 * len([row for row in rows if row[0] == "scene1"])

    shutil.rmtree(tree / "scene3")
    assert "--overwrite removes them (such as scene3)" in create(tree, output, "--max_bad", 0.5, start=succeed).stdout
    assert "scene3" in scenes(output)
    create(tree, output, "--max_bad", 0.5, "--overwrite", start=succeed)
    assert scenes(output) == ["scene0", "scene1", "scene4"]
    assert {scene for scene, _ in report_rows(output)} == {"scene0", "scene1", "scene4"}
    assert len(report_rows(output)) == len(set(report_rows(output)))


def test_scene_written_but_not_recorded_is_made_again(tmp_path):
    """What a run leaves that is stopped between the two: its raw files may change without anybody's knowing."""
    tree, output = write_raw(tmp_path / "raw", ["a", "b", "c"]), tmp_path / "data"
    create(tree, output, start=succeed)
    whole = {name: (output / name).read_bytes() for name in ("made_from.csv", "report.csv")}
    for name in whole:
        lines = (output / name).read_text().splitlines(keepends=True)
        (output / name).write_text("".join(line for line in lines if not line.startswith("b,")))
    record_written(output, {name: output / name for name in whole})
    assert "2 already there, 1 are made again" in create(tree, output, start=succeed).stdout
    for name, content in whole.items():
        assert sorted((output / name).read_bytes().splitlines()) == sorted(content.splitlines())


def no_memory_for_figures():
    def draw_selection(*_):
        raise MemoryError
    amodal_fusion.prepare.draw_selection = draw_selection


def test_figure_without_memory_loses_nothing_else(tmp_path):
    tree, output = write_raw(tmp_path / "raw", ["a", "b", "c"]), tmp_path / "data"
    process = create(tree, output, "--split", start=succeed, setup=no_memory_for_figures)
    assert "written 3, bad 0" in process.stdout and "report.png: memory ran out" in process.stderr
    assert (output / "train_list.txt").exists() and "complete: true" in (output / "dataset.yaml").read_text()
    assert not (output / "report.png").exists()


@pytest.fixture
def material(tmp_path):
    """Cut-outs and photos, one of each damaged; COCO and COCOA annotations, one photo missing."""
    folders = {name: tmp_path / name for name in ("objects", "photos", "coco")}
    for folder in folders.values():
        folder.mkdir()
    for seed in range(5):
        scene = draw_scene(seed, 80, 3)
        write_image(folders["objects"] / f"{seed}.png", scene.completions[0])
        write_image(folders["photos"] / f"{seed}.png", scene.original)
        write_image(folders["coco"] / f"{seed}.png", scene.original)
    for name in ("objects", "photos"):
        (folders[name] / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    images = [{"id": i, "file_name": f"{i}.png"} for i in range(6)]
    squares = [[x, 20, x + 28, 20, x + 28, 60, x, 60] for x in (10, 26, 44)]
    coco = [{"image_id": i, "segmentation": [square], "iscrowd": 0} for i in range(6) for square in squares]
    coco.append({"image_id": 77, "segmentation": [squares[0]], "iscrowd": 0})
    (folders["coco"] / "instances.json").write_text(json.dumps({"images": images, "annotations": coco}))
    cocoa = [{"image_id": i, "regions": [{"segmentation": square, "order": order + 1, "name": "thing"}
                                         for order, square in enumerate(squares)]} for i in range(6)]
    (folders["coco"] / "amodal.json").write_text(json.dumps({"images": images, "annotations": cocoa}))
    return folders


def test_synthesize_skips_damaged_or_missing_files(material, tmp_path):
    output = tmp_path / "data"
    process = succeed(SCRIPT, "synthesize", "--objects", material["objects"], "--backgrounds", material["photos"],
                      "--coco", material["coco"] / "instances.json", "--output_dir", output, "--n_scenes", 24,
                      "--img_size", 64, "--workers", 2)
    assert len(scenes(output)) == 24 and "24 scenes in" in process.stdout
    for name in ("objects/broken.png", "photos/broken.png", "coco/5.png"):
        assert process.stdout.count(f"left out: {tmp_path / name}") == 1, name
    assert "1 annotations belong to photos that the file does not list" in process.stdout
    again = ("--objects", material["objects"], "--backgrounds", material["photos"], "--coco",
             material["coco"] / "instances.json", "--output_dir", output, "--img_size", 64, "--workers", 2)
    before = (output / "synthetic_0000000" / "original.png").stat().st_mtime_ns
    succeed(SCRIPT, "synthesize", *again, "--n_scenes", 26)
    assert (output / "synthetic_0000000" / "original.png").stat().st_mtime_ns == before
    (material["objects"] / "0.png").unlink()
    succeed(SCRIPT, "synthesize", *again, "--n_scenes", 26)  # other scenes come of other material
    assert (output / "synthetic_0000000" / "original.png").stat().st_mtime_ns > before
    for folder in (material["objects"], material["photos"]):
        for path in folder.iterdir():
            path.write_bytes(b"nothing")
    process = run(SCRIPT, "synthesize", "--objects", material["objects"], "--backgrounds", material["photos"],
                  "--output_dir", output, "--n_scenes", 200, "--img_size", 64, "--workers", 2, "--overwrite")
    assert process.returncode == 1 and "Traceback" not in process.stderr
    assert "none of 10 scenes could be composed" in process.stderr and "not a picture" in process.stderr


def test_synthesize_trusts_amodal_annotations(material, tmp_path):
    from amodal_fusion.synthesis.assets import Material
    from amodal_fusion.synthesis.synthesizer import Synthesizer

    synthesizer = Synthesizer(Material(coco=material["coco"] / "amodal.json"), img_size=64, style="copy")
    assert len(synthesizer.material.photos) == 5 and str(material["coco"] / "5.png") in synthesizer.material.faults[0]
    for index in range(6):
        objects = synthesizer.compose(index).objects
        covers = [item.whole[..., 3] > 127 for item in objects]
        for rank, item in enumerate(objects):
            nearer = sum(covers[rank + 1 :], start=covers[0] & False) > 0
            rim = (item.whole[..., 3] > 0) & (item.whole[..., 3] < 255)
            assert not (item.visible & nearer & ~rim).any()
            assert (item.visible | nearer | rim)[covers[rank]].mean() > 0.95
    output = tmp_path / "data"
    succeed(SCRIPT, "synthesize", "--coco", material["coco"] / "amodal.json", "--output_dir", output, "--n_scenes", 4,
            "--img_size", 64, "--workers", 1)
    assert read_image(output / "synthetic_0000000" / "original.png", "RGB").shape == (64, 64, 3)
