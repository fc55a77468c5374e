"""What happens to a training run when something goes wrong, each fault really made."""

import atexit
import multiprocessing
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import amodal_fusion.data.datasets
from amodal_fusion.checkpoints import load_checkpoint, rng_state, set_rng_state
from amodal_fusion.data.toy import write_dataset
from amodal_fusion.distributed import own_gpu
from amodal_fusion.errors import UserError, is_out_of_memory
from amodal_fusion.files import record_written, temporary_path
from amodal_fusion.training.loaders import read_batches
from amodal_fusion.training.shutdown import Stopped, clean_shutdown, ignore_signals
from tests.conftest import SCRIPT, arguments, records, wait_for
from tests.scripts import ROOT, Running, run, succeed, torchrun


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_saves_exact_step_and_resume_loses_nothing(dataset, tmp_path, number):
    folder = tmp_path / "run"
    training = Running(SCRIPT, *arguments(dataset, folder, "--epochs", 500, "--workers", 1))
    wait_for((folder / "metrics.jsonl").exists)
    os.killpg(training.pid, number)  # as Ctrl-C does: the loader process is hit, too
    process = training.finish()
    assert process.returncode == 128 + number, process.stderr
    assert "--resume auto" in process.stdout
    step = records(folder)[-1]["step"]
    assert load_checkpoint(folder / "last.pth")["step"] == step
    if number == signal.SIGTERM:
        more = ("--epochs", 500, "--max_steps", step + 3)
        succeed(SCRIPT, *arguments(dataset, folder, *more, "--resume", "auto"))
        succeed(SCRIPT, *arguments(dataset, tmp_path / "straight", *more))
        broken, straight = ([r["loss"] for r in records(path)] for path in (folder, tmp_path / "straight"))
        assert broken == pytest.approx(straight, abs=1e-6)


def wait_for_loaders_at_the_end():
    """As PyTorch does, five seconds for each, where batches go to a GPU."""
    iterator = torch.utils.data.dataloader._MultiProcessingDataLoaderIter
    start = iterator.__init__

    def wait(worker):
        worker.join(10)
        print("waited in vain" if worker.is_alive() else "a loader had ended")

    def start_and_register(self, loader):
        start(self, loader)
        for worker in self._workers:
            atexit.register(wait, worker)

    iterator.__init__ = start_and_register


def test_error_does_not_wait_for_loaders(tmp_path):
    """In a process that a shell started: others do not call what `atexit` knows."""
    program = ("import runpy, sys; from tests.test_faults import wait_for_loaders_at_the_end as wait; wait(); del "
               "sys.argv[0]; runpy.run_path(sys.argv[0], run_name='__main__')")
    data = write_dataset(tmp_path / "data")
    options = map(str, arguments(data, tmp_path / "run", "--epochs", 500, "--workers", 2))
    with subprocess.Popen([sys.executable, "-c", program, SCRIPT, *options], cwd=ROOT, text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE) as training:
        wait_for((tmp_path / "run" / "metrics.jsonl").exists)
        (data / "train_5" / "mask.png").unlink()
        output, errors = training.communicate(timeout=100)
    assert training.returncode == 1 and "train_5" in errors
    assert output.count("a loader had ended") > 1 and "in vain" not in output


def test_signal_does_not_wait_for_loaders():
    busy = multiprocessing.get_context("fork").Process(target=lambda: (ignore_signals(), time.sleep(60)))
    busy.start()
    asked = SimpleNamespace(number=signal.SIGTERM, held=True)
    with pytest.raises(SystemExit), clean_shutdown(SimpleNamespace(checkpoint_dir="run"), asked):
        raise Stopped
    busy.join(30)
    assert busy.exitcode == -signal.SIGKILL


def test_kill_at_any_moment_leaves_a_whole_checkpoint(dataset, tmp_path):
    folder, rng = tmp_path / "run", np.random.default_rng(0)
    steps = []
    for _ in range(20):
        training = Running(SCRIPT, *arguments(dataset, folder, "--epochs", 5000, "--resume", "auto", "--save_every", 2))
        logged = len(records(folder)) if steps else 0
        wait_for(lambda logged=logged: (folder / "last.pth").exists() and len(records(folder)) > logged + 1)
        time.sleep(rng.uniform(0, 0.3))
        os.killpg(training.pid, signal.SIGKILL)
        assert training.finish().returncode == -signal.SIGKILL
        state = load_checkpoint(folder / "last.pth")
        done = records(folder)[-1]["step"]
        assert done - 2 <= state["step"] <= done + 1
        steps.append(state["step"])
    assert steps == sorted(steps) and steps[-1] > steps[0] + 10


def children(pid):
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs /proc")
def test_group_restarts_from_checkpoint_after_rank_is_killed(dataset, tmp_path):
    folder = tmp_path / "run"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "--max-restarts",
               "1", SCRIPT, *arguments(dataset, folder, "--batch_size", 2, "--epochs", 12, "--save_every", 1)]
    with subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                          cwd=ROOT) as group:
        wait_for(lambda: (folder / "metrics.jsonl").exists() and len(records(folder)) >= 5)
        os.kill(children(group.pid)[1], signal.SIGKILL)
        output, _ = group.communicate(timeout=120)
    assert group.returncode == 0, output
    starts = [int(line.rsplit(" ", 1)[1]) for line in output.splitlines() if "starting at step" in line]
    assert starts[0] == 0 and starts[1] >= 4  # it resumes without being told
    assert [r["step"] for r in records(folder, "val")][-1] == 24
    losses = {}
    for record in records(folder):  # steps that were done twice had the same result
        assert losses.setdefault(record["step"], record["loss"]) == pytest.approx(record["loss"], abs=1e-5)


def half_the_disk():
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))


def test_full_disk_keeps_the_older_checkpoint(dataset, tmp_path):
    folder = tmp_path / "run"
    succeed(SCRIPT, *arguments(dataset, folder, "--epochs", 1))
    before = (folder / "last.pth").read_bytes()
    assert len(before) > 200_000
    process = run(SCRIPT, *arguments(dataset, folder, "--epochs", 2, "--resume", "auto"), setup=half_the_disk)
    assert process.returncode == 1 and "Traceback" not in process.stderr
    assert "last.pth: could not be written" in process.stderr and "untouched" in process.stderr
    assert (folder / "last.pth").read_bytes() == before
    assert not [path for path in folder.iterdir() if ".tmp" in path.name]


def poison_one_scene():
    with_draws = amodal_fusion.data.datasets.with_draws

    def poisoned(scene, *arguments):
        item = with_draws(scene, *arguments)
        if scene.id == "train_3":
            item |= {"recoloured": torch.tensor(True), "gamma": torch.full((3,), float("nan"))}
        return item

    amodal_fusion.data.datasets.with_draws = poisoned


def test_step_without_a_finite_gradient_names_its_scenes(dataset, tmp_path):
    folder = tmp_path / "run"
    process = run(SCRIPT, *arguments(dataset, folder, "--epochs", 3), setup=poison_one_scene)
    assert process.returncode == 0, process.stderr
    lines = (folder / "bad_steps_rank0.txt").read_text().splitlines()
    assert len(lines) == 3 and all("train_3" in line for line in lines)  # once an epoch
    assert max(record["skipped"] for record in records(folder)) >= 1
    state = load_checkpoint(folder / "last.pth")
    assert state["step"] == 6 and all(torch.isfinite(value).all() for value in state["model"].values())


def test_lasting_nan_gradient_ends_training_naming_scenes(tmp_path):
    data = write_dataset(tmp_path / "data", train=20)
    process = run(SCRIPT, *arguments(data, tmp_path / "run", "--epochs", 50, "--max_bad_steps", 3, "--lr", 1e30,
                                     "--warmup_steps", 1))
    assert process.returncode == 1 and "no finite gradient for 3 steps in a row" in process.stderr
    lines = (tmp_path / "run" / "bad_steps_rank0.txt").read_text().splitlines()
    assert len(lines) == 3 and "train_" in lines[0]


def test_diverged_run_is_reported_and_not_exported(dataset, tmp_path):
    weights = tmp_path / "weights.pth"
    process = run(SCRIPT, *arguments(dataset, tmp_path / "run", "--epochs", 2, "--lr", 1e30, "--warmup_steps", 1,
                                     "--export", weights))
    assert process.returncode == 1 and "diverged, its validation loss is nan; start a run" in process.stderr
    assert "Warning" not in process.stderr and not weights.exists()


def scale_the_loss():
    """As --amp fp16 does on a GPU: a factor that is too large at first and is halved until nothing overflows."""
    poison_one_scene()
    scaler = torch.amp.GradScaler
    torch.amp.GradScaler = lambda **_: scaler("cpu", init_scale=2.0**125)


def test_fp16_overflow_is_not_a_bad_scene(dataset, tmp_path):
    folder = tmp_path / "run"
    process = run(SCRIPT, *arguments(dataset, folder, "--epochs", 3), setup=scale_the_loss)
    assert process.returncode == 0, process.stderr
    assert sum(record["skipped"] > 0 for record in records(folder)) == 6  # nothing but overflows so far
    lines = (folder / "bad_steps_rank0.txt").read_text().splitlines()
    assert len(lines) == 3 and all("train_3" in line for line in lines)


def run_out_of_memory():
    def clip(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has …\nmore lines")

    torch.nn.utils.clip_grad_norm_ = clip


def test_full_gpu_memory_names_options_to_lower(dataset, tmp_path):
    process = run(SCRIPT, *arguments(dataset, tmp_path / "run"), setup=run_out_of_memory)
    assert process.returncode == 1 and process.stderr.startswith("error: out of memory (CUDA out of memory)")
    assert "lower --batch_size and raise --accumulate" in process.stderr and process.stderr.count("\n") == 1


@pytest.mark.parametrize(("error", "expected"), [
    (torch.OutOfMemoryError("CUDA out of memory. Tried …"), True), (RuntimeError("CUDA error: out of memory"), True),
    (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling …"), True), (MemoryError(), True),
    (RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory: …"), True),
    (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
])
def test_out_of_memory_errors_are_recognised(error, expected):
    assert is_out_of_memory(error) is expected


def scale_by_one():
    scaler = torch.amp.GradScaler
    torch.amp.GradScaler = lambda **_: scaler("cpu", init_scale=1.0)


def test_run_resumes_with_another_precision(dataset, tmp_path):
    """From bf16 to fp16, whose factor on the loss no other precision has, and back."""
    for epochs, setup in ((1, None), (2, scale_by_one), (3, None)):
        options = arguments(dataset, tmp_path, "--epochs", epochs, "--resume", "auto")
        process = run(SCRIPT, *options, setup=setup)
        assert process.returncode == 0, process.stderr
    assert [record["step"] for record in records(tmp_path)] == [1, 2, 3, 4, 5, 6]


def test_random_state_on_cpu_does_not_touch_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_rng_state", None)  # would open it
    set_rng_state(rng_state(torch.device("cpu")), torch.device("cpu"))


@pytest.mark.parametrize(("visible", "local_rank", "others", "expected"), [
    (1, 3, "bcd", 0), (4, 3, "bcd", 3), (1, 1, "a", "2 processes, but 1 GPUs"), (2, 1, "bcd", "4 GPUs asked for")])
def test_each_process_has_a_gpu_of_its_own(visible, local_rank, others, expected, monkeypatch):
    """Also where a scheduler shows each of four processes its own alone."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: visible)
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(uuid="a"))
    monkeypatch.setenv("LOCAL_RANK", str(local_rank))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(len(others) + 1))
    store = torch.distributed.HashStore()
    for rank, uuid in enumerate(others, 1):
        store.set(f"gpu_{rank}", f"{socket.gethostname()} {uuid}")
    if isinstance(expected, int):
        assert own_gpu(store, 0, len(others) + 1) == torch.device("cuda", expected)
    else:
        with pytest.raises(UserError, match=expected):
            own_gpu(store, 0, len(others) + 1)


def test_log_is_complete_and_leftovers_are_removed(dataset, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    temporary_path(folder / "last.pth").write_bytes(b"half a checkpoint")
    (folder / "metrics.jsonl").write_text('{"kind": "train", "step": 1, "loss": 1}\n{"kind": "train", "st')
    record_written(folder, {"metrics.jsonl": folder / "metrics.jsonl"})
    common = ("--epochs", 3, "--figure_scenes", 0, "--oracle_fade", 0.8)  # the oracle term is not in the last step
    succeed(SCRIPT, *arguments(dataset, folder, *common, "--log_every", 3))
    assert not [path.name for path in folder.iterdir() if ".tmp" in path.name]
    assert [record["step"] for record in records(folder)] == [1, 2, 3, 4, 6]  # two steps an epoch, whose end has a line
    assert (folder / "curves.png").exists()
    succeed(SCRIPT, *arguments(dataset, tmp_path / "all", *common))
    every = {record["step"]: record for record in records(tmp_path / "all")}
    last = records(folder)[-1]
    assert last["loss"] == pytest.approx((every[5]["loss"] + every[6]["loss"]) / 2, rel=1e-5)
    assert last["oracle"] == pytest.approx(every[5]["oracle"], rel=1e-5) and "oracle" not in every[6]
    assert [record["loss"] for record in records(folder)[2:4]] == [every[step]["loss"] for step in (3, 4)]


def lack_shared_memory():
    def fail(*_):
        raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)")

    amodal_fusion.data.datasets.to_uint8 = fail


def touch_missing_memory():
    amodal_fusion.data.datasets.to_uint8 = lambda *_: os.kill(os.getpid(), signal.SIGBUS)


@pytest.mark.parametrize("fault", [lack_shared_memory, touch_missing_memory])
def test_little_shared_memory_names_the_remedy(dataset, tmp_path, fault):
    process = run(SCRIPT, *arguments(dataset, tmp_path / "run", "--workers", 1), setup=fault)
    assert process.returncode == 1 and "Traceback" not in process.stderr, process.stderr
    assert "--shm-size" in process.stderr and "--workers 0" in process.stderr


def kill_the_loader():
    read_scene = amodal_fusion.data.datasets.read_scene

    def read_or_die(folder, *options, **more):
        if folder.name == "train_5":
            os.kill(os.getpid(), signal.SIGKILL)  # what the kernel does when memory runs out
        return read_scene(folder, *options, **more)

    amodal_fusion.data.datasets.read_scene = read_or_die


def test_loader_that_dies_names_the_scene(dataset, tmp_path):
    process = run(SCRIPT, *arguments(dataset, tmp_path / "run", "--workers", 1), setup=kill_the_loader)
    assert process.returncode == 1 and "Traceback" not in process.stderr.split("error: ")[-1]
    assert "data loading process died" in process.stderr and "while it read: train_5" in process.stderr


def test_loader_that_dies_before_gpu_names_the_scene():
    class Loader:
        num_workers, dataset = 1, SimpleNamespace(reading=torch.tensor([0]), scene_ids=["bus"])

        def __iter__(self):
            raise RuntimeError("Pin memory thread exited unexpectedly")

    with pytest.raises(UserError, match="while it read: bus"):
        next(read_batches(Loader()))


@pytest.mark.parametrize("workers", [0, 1])
def test_picture_damaged_during_the_run_is_named(tmp_path, workers):
    data = write_dataset(tmp_path / "data")
    training = Running(SCRIPT, *arguments(data, tmp_path / "run", "--workers", workers, "--epochs", 5000))
    wait_for((tmp_path / "run" / "metrics.jsonl").exists)
    victim = data / "train_5" / "comp1.png"
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 0xFF  # header, length and end are right: only decoding tells
    (tmp_path / "rotten").write_bytes(content)
    (tmp_path / "rotten").replace(victim)
    process = training.finish()
    assert process.returncode == 1 and "Traceback" not in process.stderr
    assert f"error: {victim}: damaged" in process.stderr


def test_cut_off_picture_stops_training_before_first_step(tmp_path):
    data = write_dataset(tmp_path / "data")
    victim = data / "train_3" / "comp1.png"
    victim.write_bytes(victim.read_bytes()[:-20])
    (data / "val_1" / "mask.png").unlink()
    process = run(SCRIPT, *arguments(data, tmp_path / "run"))
    assert process.returncode == 1 and "Traceback" not in process.stderr
    assert str(victim) in process.stderr and "val_1/mask.png" in process.stderr
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_uneven_shards_and_few_scenes_do_not_hang(tmp_path):
    data = write_dataset(tmp_path / "data", train=7, val=1)  # 3 and 4 scenes, 1 and 0 validation scenes
    process = torchrun(SCRIPT, *arguments(data, tmp_path / "run", "--batch_size", 2, "--epochs", 2), timeout=90)
    assert process.returncode == 0, process.stderr
    assert [record["step"] for record in records(tmp_path / "run", "val")] == [1, 2]
    process = torchrun(SCRIPT, *arguments(data, tmp_path / "other"), timeout=90)  # one scene less than a step takes
    assert process.returncode == 1 and "7 training scenes are fewer than one step takes" in process.stderr


def test_resume_with_other_options(dataset, tmp_path):
    folder = tmp_path / "run"
    succeed(SCRIPT, *arguments(dataset, folder, "--batch_size", 2, "--epochs", 3, "--max_steps", 3), start=torchrun)
    # from two processes with 2 scenes each to one process with 3, in the middle of an epoch
    process = succeed(SCRIPT, *arguments(dataset, folder, "--batch_size", 3, "--epochs", 3, "--resume", "auto", "--lr",
                                         5e-4))
    assert "batch_size 2 → 3" in process.stdout and "lr 0.001 → 0.0005" in process.stdout
    assert "starting at step 3" in process.stdout
    rates = [record["lr"] for record in records(folder)]
    assert max(rates[3:]) <= 5e-4 < max(rates[:3])
    state = load_checkpoint(folder / "last.pth")
    assert state["epoch"] == 3 and state["step"] == 6
    for option, complaint in ((("--width", 64), "width=32, not 64; set it to 32 (--width)"),
                              (("--heads", 4), "heads=2, not 4; set it to 2 (--heads)"),
                              (("--width", 36), "width 36 must be a multiple of 8")):
        process = run(SCRIPT, *arguments(dataset, folder, "--resume", "auto", *option))
        assert process.returncode == 1 and complaint in process.stderr


def test_a_folder_belongs_to_one_run(dataset, tmp_path):
    folder = tmp_path / "run"
    first = Running(SCRIPT, *arguments(dataset, folder, "--epochs", 5000))
    wait_for((folder / "last.pth").exists)
    process = run(SCRIPT, *arguments(dataset, folder, "--resume", "auto"))
    assert process.returncode == 1 and "another run is writing there" in process.stderr
    os.killpg(first.pid, signal.SIGKILL)
    first.finish()
    process = run(SCRIPT, *arguments(dataset, folder))
    assert process.returncode == 1 and "holds a run already; resume it with --resume auto" in process.stderr
    step = load_checkpoint(folder / "last.pth")["step"]
    process = succeed(SCRIPT, *arguments(dataset, folder, "--resume", "auto", "--epochs", 5000, "--max_steps",
                                         step + 1))
    assert f"starting at step {step}" in process.stdout


def test_fine_tuning_starts_from_weights_alone(dataset, checkpoint, tmp_path):
    process = run(SCRIPT, *arguments(dataset, tmp_path / "run", "--init_from", checkpoint, "--epochs", 1, "--lr", 0))
    assert process.returncode == 0, process.stderr
    given, kept = load_checkpoint(checkpoint)["ema"], load_checkpoint(tmp_path / "run" / "last.pth")["model"]
    assert all(torch.equal(value, given[f"module.{name}"]) for name, value in kept.items())
    shipped = ROOT / "pretrained" / "amodal_fusion_transformer.pth"
    process = run(SCRIPT, *arguments(dataset, tmp_path / "other", "--resume", shipped))
    assert process.returncode == 1 and "start a new run from them (--init_from)" in process.stderr
