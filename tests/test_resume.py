"""Going on with a run: with other processes and batches, from another folder, after a signal at a bad moment."""

import os
import shutil
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

import amodal_fusion.data.checks
import amodal_fusion.training.loop
import amodal_fusion_transformer as aft
from amodal_fusion.checkpoints import load_checkpoint, save_checkpoint
from amodal_fusion.data.toy import write_dataset
from amodal_fusion.distributed import Process
from amodal_fusion.evaluation.figures import read_history
from amodal_fusion.training.run import Run
from amodal_fusion.training.shutdown import StopSignal
from tests.conftest import SCRIPT, TINY, arguments, records, wait_for
from tests.scripts import ROOT, Running, run, succeed, torchrun


def test_schedule_counts_scenes(tmp_path):
    """One process, then two, then one with half the batch: at equal scenes all is as in an unbroken run."""
    data, schedule = write_dataset(tmp_path / "data", train=24), ("lr", "oracle_weight")
    common = ("--epochs", 4, "--warmup_steps", 3, "--oracle_fade", 0.8, "--figure_scenes", 0)
    succeed(SCRIPT, *arguments(data, tmp_path / "straight", *common))
    folder = tmp_path / "run"
    succeed(SCRIPT, *arguments(data, folder, *common, "--max_steps", 2))
    go_on = arguments(data, folder, *common, "--resume", "auto")
    process = succeed(SCRIPT, *go_on, "--max_steps", 10, start=torchrun)
    assert "processes 1 → 2" in process.stdout and "scenes per step 4 → 8" in process.stdout
    process = succeed(SCRIPT, *go_on, "--batch_size", 2, "--log_every", 2, "--save_every", 1)
    assert "processes 2 → 1" in process.stdout and "scenes per step 8 → 2" in process.stdout

    unbroken = {r["scenes"] - 4: [r[name] for name in schedule] for r in records(tmp_path / "straight")}
    assert list(unbroken) == list(range(0, 96, 4))  # the scenes seen when each step began
    broken = records(folder)
    assert [r["scenes"] for r in broken] == [4, 8, *range(16, 41, 8), *range(48, 97, 8)]
    assert [r["step"] for r in broken] == [1, 2, 3, 4, 5, 6, *range(10, 35, 4)]
    for record, batch in zip(broken, [4] * 2 + [8] * 4):
        assert [record[name] for name in schedule] == unbroken[record["scenes"] - batch]
    for record in broken[6:-1]:  # these began two scenes before
        for name, before, after in zip(schedule, unbroken[record["scenes"] - 4], unbroken[record["scenes"]]):
            assert after <= record[name] <= before
    state = load_checkpoint(folder / "last.pth")
    assert (state["epoch"], state["nominal_batch"]) == (4, 4)


def place(batch, nominal, scenes, **options):
    """A Run of 50 scenes an epoch that was begun with `nominal` scenes a step and has seen so many `scenes`."""
    config = aft.TrainConfig(batch_size=batch, epochs=6, **options)
    state = Run(torch.nn.Linear(2, 2), config, Process(0, 1, torch.device("cpu")), 50, "names")
    state.nominal_batch = nominal
    state.epoch, state.scenes_done = divmod(scenes, state.epoch_scenes)
    return state


@pytest.mark.parametrize("batch", [1, 2, 3, 5, 8, 12])
def test_rates_saves_and_logs_ignore_the_batch_size(batch):
    for scenes in range(0, 288, 7):
        one, other = place(4, 4, scenes), place(batch, 4, scenes)
        assert (one.rate, one.oracle_weight, one.progress) == (other.rate, other.oracle_weight, other.progress)
    due, state = 0, place(batch, 4, 0, max_steps=60)
    while not state.finished:
        assert state.steps_left > 0
        for _ in range(state.steps_left):
            state.advance()
            due += state.is_due(5)
        assert state.scenes >= 240 or state.epoch_scenes - state.scenes_done < batch
        if state.epoch_scenes - state.scenes_done < batch:
            state.begin_epoch()
        state.validated_at = state.scenes
    # the last multiple may be passed between two epochs, where a run saves anyway
    assert due in (11, 12) and 240 <= state.scenes < 240 + batch + 12


def without_git():
    os.environ["PATH"] = ""


def test_epoch_ends_when_scenes_cannot_fill_a_step(tmp_path):
    data, folder = write_dataset(tmp_path / "data", train=20, val=1), tmp_path / "run"
    process = succeed(SCRIPT, *arguments(data, folder, "--batch_size", 2, "--max_steps", 8), setup=without_git)
    assert "no git, torch" in process.stdout
    succeed(SCRIPT, *arguments(data, folder, "--batch_size", 6, "--epochs", 2, "--resume", "auto"))
    assert [(r["epoch"], r["scenes"]) for r in records(folder, "val")] == [(1, 16), (1, 16), (2, 38)]
    process = run(SCRIPT, *arguments(data, folder, "--batch_size", 21, "--epochs", 3, "--resume", "auto"))
    assert process.returncode == 1 and "20 training scenes are fewer than one step takes" in process.stderr


def as_after_a_restart():
    os.environ["TORCHELASTIC_RESTART_COUNT"] = "1"
    reading_is_forbidden()


def reading_is_forbidden():
    amodal_fusion.data.checks.check_scene = None


def test_resume_from_a_path_loses_nothing(dataset, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    succeed(SCRIPT, *arguments(dataset, first, "--max_steps", 2, "--no-check"), setup=reading_is_forbidden)
    fork = arguments(dataset, second, "--resume", first / "last.pth")
    succeed(SCRIPT, *fork, "--max_steps", 3)
    # again: what the second folder holds would be overwritten
    process = run(SCRIPT, *fork, "--max_steps", 4, setup=reading_is_forbidden)
    assert process.returncode == 1 and "second holds a run already; resume it with --resume auto" in process.stderr
    # the launcher starts the same command again: the second folder has what was done since
    process = succeed(SCRIPT, *fork, "--max_steps", 4, setup=as_after_a_restart)
    assert "starting at step 3" in process.stdout
    # but it does not take over what another launch has left there
    state = load_checkpoint(second / "last.pth")
    save_checkpoint(second / "last.pth", {**state, "launch": "another"})
    process = run(SCRIPT, *fork, "--max_steps", 5, setup=as_after_a_restart)
    assert process.returncode == 1 and "second holds a run already" in process.stderr
    save_checkpoint(second / "last.pth", state)
    # back to an earlier state of the folder's own run, which a restart would then go on from
    os.rename(first / "last.pth", second / "earlier.pth")
    process = succeed(SCRIPT, *arguments(dataset, second, "--resume", second / "earlier.pth", "--max_steps", 2))
    assert "starting at step 2" in process.stdout and load_checkpoint(second / "last.pth")["step"] == 2
    save_checkpoint(second / "last.pth", {**load_checkpoint(second / "last.pth"), "optimizer": {}})
    process = run(SCRIPT, *arguments(dataset, second, "--resume", "auto"))
    assert process.returncode == 1 and "last.pth: training cannot resume from this state" in process.stderr
    assert "Traceback" not in process.stderr


def test_resume_does_not_need_the_initial_weights(dataset, checkpoint, tmp_path):
    first, common = tmp_path / "first.pth", ("--resume", "auto", "--epochs", 1)
    shutil.copy(checkpoint, first)
    run_arguments = arguments(dataset, tmp_path / "run", *common, "--init_from", first)
    succeed(SCRIPT, *run_arguments, "--max_steps", 1)
    first.unlink()
    assert "starting at step 1" in succeed(SCRIPT, *run_arguments).stdout


def test_weights_alone_never_replace_a_checkpoint(dataset, tmp_path):
    process = run(SCRIPT, *arguments(dataset, tmp_path, "--export", tmp_path / "last.pth"))
    assert process.returncode == 2 and "would replace a checkpoint of the run" in process.stderr


def test_unwritable_export_path_is_named_before_training(dataset, tmp_path):
    (tmp_path / "file").touch()
    for path, said in ((tmp_path, "is a folder"), (tmp_path / "file" / "w.pth", "cannot be written (")):
        process = run(SCRIPT, *arguments(dataset, tmp_path / "run", "--export", path))
        assert process.returncode == 1 and said in process.stderr and not (tmp_path / "run").exists()


def test_every_step_is_in_one_log_line(dataset, tmp_path):
    """Stopped in the middle of an epoch and gone on with; epochs of two steps, lines of three."""
    folder, common = tmp_path / "run", ("--epochs", 3, "--log_every", 3, "--resume", "auto")
    succeed(SCRIPT, *arguments(dataset, folder, *common, "--max_steps", 1))
    succeed(SCRIPT, *arguments(dataset, folder, *common))
    assert [record["step"] for record in records(folder)] == [1, 2, 3, 4, 6]


def test_muon_resumes_exactly_and_with_no_other_optimizer(dataset, tmp_path):
    straight, folder = tmp_path / "straight", tmp_path / "run"
    succeed(SCRIPT, *arguments(dataset, straight, "--max_steps", 4))
    succeed(SCRIPT, *arguments(dataset, folder, "--max_steps", 2))
    go_on = arguments(dataset, folder, "--max_steps", 4, "--resume", "auto")
    process = run(SCRIPT, *go_on, "--optimizer", "adamw")
    assert process.returncode == 1 and "was trained with optimizer=muon, not adamw" in process.stderr
    succeed(SCRIPT, *go_on)
    unbroken, broken = (load_checkpoint(path / "last.pth")["model"] for path in (straight, folder))
    assert all(torch.equal(unbroken[name], broken[name]) for name in unbroken)


def test_best_weights_and_log_belong_to_this_run(dataset, tmp_path):
    first, second, weights = tmp_path / "first", tmp_path / "second", tmp_path / "new" / "weights.pth"
    succeed(SCRIPT, *arguments(dataset, first, "--epochs", 1))
    state = load_checkpoint(first / "last.pth")
    save_checkpoint(first / "last.pth", {**state, "best": -1.0})  # better than all that is to come
    second.mkdir()
    shutil.copy(first / "last.pth", second / "early.pth")
    # an end that came before the export was asked for, or done
    succeed(SCRIPT, *arguments(dataset, first, "--epochs", 1, "--resume", "auto", "--export", weights,
                               "--inference_size", 48))
    exported = load_checkpoint(weights)
    assert exported["step"] == state["step"] and exported["config"]["inference_size"] == 48
    # the best weights of another folder are not this run's
    fork = ("--resume", first / "last.pth", "--epochs", 2, "--export", weights)
    succeed(SCRIPT, *arguments(dataset, second, *fork))
    assert load_checkpoint(second / "best_model.pth")["step"] == load_checkpoint(weights)["step"] == 2 * state["step"]
    # nor can losses of different options be compared
    other = arguments(dataset, first, "--resume", "auto", "--epochs", 2, "--img_size", 48)
    assert "kept as" in succeed(SCRIPT, *other).stdout
    assert (first / f"best_model_until_step_{state['step']}.pth").exists()
    assert load_checkpoint(first / "best_model.pth")["step"] == 2 * state["step"]
    # going back, or on from a save before the last lines: nothing stands in the log twice
    before = [record["scenes"] for record in records(second)]
    succeed(SCRIPT, *arguments(dataset, second, "--resume", second / "early.pth", "--epochs", 2))
    assert [record["scenes"] for record in records(second)] == before


def test_losses_of_other_validation_scenes_are_not_compared(dataset, tmp_path):
    data, folder = shutil.copytree(dataset, tmp_path / "data"), tmp_path / "run"
    succeed(SCRIPT, *arguments(data, folder, "--epochs", 1))
    names = (data / "val_list.txt").read_text().split()
    (data / "val_list.txt").write_text("\n".join(names[1:]))
    process = succeed(SCRIPT, *arguments(data, folder, "--epochs", 2, "--resume", "auto"))
    assert "other validation scenes" in process.stdout and "the validation loss cannot be compared" in process.stdout
    assert "other validation" not in succeed(SCRIPT, *arguments(data, folder, "--epochs", 3, "--resume", "auto")).stdout


@pytest.mark.parametrize(("option", "content", "complaint", "status"), [
    ("--resume", None, "no such checkpoint (--resume)", 1),
    ("--init_from", None, "no such checkpoint (--init_from)", 1),
    ("--init_from", "text", "another kind of file, or its end is missing; use another one (--init_from)", 1),
    ("--data_dir", None, "no such folder (--data_dir)", 2), ("--val_dir", "text", "no such folder (--val_dir)", 2)])
def test_missing_inputs_leave_no_folder(option, content, complaint, status, dataset, tmp_path):
    if content:
        (tmp_path / "given").write_text(content)
    process = run(SCRIPT, *arguments(dataset, tmp_path / "run", option, tmp_path / "given"))
    assert process.returncode == status and complaint in process.stderr and not (tmp_path / "run").exists()


NODES = """
import datetime, os, runpy, sys, time
import torch.distributed as dist
import amodal_fusion.data.checks

rank, (folder, script, *rest) = os.environ["RANK"], sys.argv[1:]
sys.argv = [script, *rest, "--checkpoint_dir", folder.replace("RANK", rank)]
begin, check_scene = dist.init_process_group, amodal_fusion.data.checks.check_scene
dist.init_process_group = lambda *a, **k: begin(*a, **k, timeout=datetime.timedelta(seconds=2))

def slowly(*arguments, **options):
    time.sleep(4)
    return check_scene(*arguments, **options)

if rank == "0":
    amodal_fusion.data.checks.check_scene = slowly
runpy.run_path(script, run_name="__main__")
"""


def test_nodes_without_a_common_folder_are_noticed(tmp_path):
    """Also: processes wait for one that reads for longer than a group may be silent in training."""
    data = write_dataset(tmp_path / "data")
    (tmp_path / "node.py").write_text(NODES)
    for _ in range(2):  # a new run; and one that one of them could go on with
        process = torchrun(tmp_path / "node.py", tmp_path / "runRANK", ROOT / SCRIPT, "--data_dir", data, *TINY,
                           "--batch_size", 2, "--resume", "auto")
        assert process.returncode == 1 and "put it on a disk that all nodes share (--checkpoint_dir)" in process.stderr
        succeed(SCRIPT, *arguments(data, tmp_path / "run0", "--max_steps", 1, "--no-check", "--resume", "auto"))
    process = torchrun(tmp_path / "node.py", tmp_path / "both", ROOT / SCRIPT, "--data_dir", data, *TINY,
                       "--batch_size", 2, "--max_steps", 1)
    assert process.returncode == 0, process.stderr


def test_curves_leave_out_repeated_steps(tmp_path):
    lines = [("train", 2), ("train", 4), ("val", 4), ("train", 6), ("val", 6),  # killed; the last save was at 4
             ("train", 5), ("val", 5), ("train", 10)]
    (tmp_path / "metrics.jsonl").write_text("".join(f'{{"kind": "{kind}", "step": {step}}}\n' for kind, step in lines))
    whole = (tmp_path / "metrics.jsonl").read_text().splitlines(keepends=True)
    strange = ['{"kind": "tr[1]\n', "[1]\n", "\n", '{"kind": "other", "step": 1}\n', '{"kind": "val"}\n']
    (tmp_path / "metrics.jsonl").write_text("".join([whole[0], *strange, *whole[1:]]))
    history = read_history(tmp_path / "metrics.jsonl")
    assert {kind: [record["step"] for record in history[kind]] for kind in history} == {
        "train": [2, 4, 5, 10], "val": [4, 5]}


def read_one_at_a_time():
    check_scene = amodal_fusion.data.checks.check_scene

    def slowly(folder, *more, **options):
        print(folder, file=sys.stderr, flush=True)
        time.sleep(1)
        return check_scene(folder, *more, **options)

    amodal_fusion.data.checks.check_scene = slowly
    amodal_fusion.data.checks.ThreadPoolExecutor = lambda _: ThreadPoolExecutor(1)


def validate_slowly():
    apply_rules = amodal_fusion.training.loop.apply_rules

    def slowly(*arguments, **options):
        print("validating", file=sys.stderr, flush=True)
        time.sleep(0.5)
        return apply_rules(*arguments, **options)

    amodal_fusion.training.loop.apply_rules = slowly


def stop_when(text, number, *options, setup):
    """Start training, send it a signal once it has written `text`; the finished process."""
    training = Running(SCRIPT, *options, setup=setup)
    errors = Path(training.files[1])
    wait_for(lambda: errors.exists() and text in errors.read_text(encoding="utf-8"))
    os.kill(training.pid, number)
    return training.finish()


def test_a_signal_during_the_first_reading_ends_it(tmp_path):
    data = write_dataset(tmp_path / "data")
    options = arguments(data, tmp_path / "run")
    process = stop_when("train_0", signal.SIGTERM, *options, setup=read_one_at_a_time)
    assert process.returncode == 128 + signal.SIGTERM, process.stderr
    assert "stopped by a signal before the first step" in process.stderr and "Traceback" not in process.stderr
    assert "train_6" not in process.stderr


def test_a_signal_during_validation_keeps_the_epoch(tmp_path):
    data, folder = write_dataset(tmp_path / "data", train=4, val=20), tmp_path / "run"
    options = arguments(data, folder, "--batch_size", 1, "--epochs", 1)
    process = stop_when("validating", signal.SIGHUP, *options, setup=validate_slowly)
    assert process.returncode == 128 + signal.SIGHUP and "--resume auto" in process.stdout, process.stderr
    assert process.stderr.count("validating") < 15 and not records(folder, "val")
    succeed(SCRIPT, *options, "--resume", "auto")
    assert [r["step"] for r in records(folder)] == [1, 2, 3, 4]  # nothing is trained twice
    assert [r["step"] for r in records(folder, "val")] == [4]
    options = arguments(data, folder, "--batch_size", 1, "--epochs", 2, "--max_steps", 6, "--resume", "auto",
                        "--export", tmp_path / "exported.pth")
    process = stop_when("validating", signal.SIGTERM, *options, setup=validate_slowly)  # in the middle of an epoch
    assert process.returncode == 128 + signal.SIGTERM and not (tmp_path / "exported.pth").exists()
    for _ in range(2):  # once more changes nothing
        succeed(SCRIPT, *options)
        assert [r["step"] for r in records(folder, "val")] == [4, 6] and len(records(folder)) == 6


def test_scene_count_stays_true_when_the_list_changes(tmp_path):
    data, folder = write_dataset(tmp_path / "data", train=8, val=1), tmp_path / "run"
    (data / "four.txt").write_text("".join(f"train_{number}\n" for number in range(4)))
    few, common = ("--train_list", data / "four.txt"), ("--batch_size", 2, "--epochs", 20, "--resume", "auto")
    for options, most, last in ((few, 6, 6), ((), 13, 13), (few, 15, 15), (few, 15, 15)):
        succeed(SCRIPT, *arguments(data, folder, *common, *options, "--max_steps", most))
        steps = [record["step"] for record in records(folder)]
        assert steps == list(range(1, last + 1))
        assert [record["scenes"] for record in records(folder)] == [2 * step for step in steps]


def test_processes_rarely_communicate_and_agree(monkeypatch):
    asked, clock = [], [0.0]

    class Group:
        distributed = True

        def max(self, values):
            asked.append(values)
            return list(map(float, values))

    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    for step_seconds, most in ((0.01, 60), (0.5, 300), (16, 1000)):
        stop = StopSignal()
        stop.hold()
        asked.clear()
        for _ in range(1000):
            clock[0] += step_seconds
            assert not stop.agreed(Group())
        assert len(asked) <= most
        stop.number, waited = signal.SIGTERM, 0
        while not stop.agreed(Group()):
            waited += step_seconds
            clock[0] += step_seconds
        assert waited <= 2
