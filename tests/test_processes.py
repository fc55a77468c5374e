"""Helper processes end with the one that they help."""

import datetime
import importlib
import os
import signal
import socket
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
from torch.utils.data import DataLoader

from amodal_fusion import distributed
from amodal_fusion.distributed import NoMeeting
from amodal_fusion.pools import end_with_parent
from tests.conftest import wait_for
from tests.scripts import Running, server

SCRIPTS = ("amodal_fusion_transformer_inference", "prepare_dataset")


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def read_slowly(item):
    time.sleep(0.01)
    return "x" * 100_000, os.getpid(), item  # more than a pipe holds: the process waits for a reader


def pool_and_loader(pids):
    """Start two pool processes and two loaders, write down their numbers, then work for ever."""
    with ProcessPoolExecutor(2, initializer=end_with_parent) as pool:
        jobs = [pool.submit(os.getpid) for _ in range(20)]
        helpers = {job.result() for job in jobs}
        loader = DataLoader(range(10**6), batch_size=None, num_workers=2, collate_fn=read_slowly,
                            worker_init_fn=end_with_parent)
        for number, (_, pid, _) in enumerate(loader):
            helpers.add(pid)
            if number == 20:
                pids.write_text(" ".join(map(str, helpers)))


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_pools_and_loaders_end_with_their_parent(number, tmp_path):
    pids = tmp_path / "pids"
    parent = server.Process(target=pool_and_loader, args=(pids,))
    parent.start()
    deadline = time.monotonic() + 20
    while not (pids.exists() and pids.read_text()):
        assert time.monotonic() < deadline and parent.is_alive()
        time.sleep(0.05)
    helpers = [int(pid) for pid in pids.read_text().split()]
    assert len(helpers) >= 3 and all(map(alive, helpers))
    os.kill(parent.pid, number)
    parent.join(10)
    while any(map(alive, helpers)):
        assert time.monotonic() < deadline, "left behind"
        time.sleep(0.05)


def import_as_on_windows():
    for name in list(sys.modules):
        if name.split(".")[0] in ("fusion", "amodal_fusion_transformer", *SCRIPTS):
            del sys.modules[name]
    sys.modules["fcntl"] = sys.modules["resource"] = None
    del signal.SIGHUP
    for name in SCRIPTS:
        importlib.import_module(name)
    sys.exit(7)


def test_inference_and_preparation_import_on_windows():
    process = server.Process(target=import_as_on_windows)
    process.start()
    process.join(60)
    assert process.exitcode == 7


def meet(monkeypatch, **variables):
    defaults = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    for name, value in {**defaults, **variables}.items():
        monkeypatch.setenv(name, value)
    return distributed.join_group()


@pytest.mark.parametrize(("name", "value"), [
    ("WORLD_SIZE", "x"), ("WORLD_SIZE", "0"), ("RANK", "-1"), ("RANK", "2"), ("RANK", ""), ("MASTER_PORT", "http"),
    ("MASTER_PORT", "99999"), ("TORCHELASTIC_RESTART_COUNT", "1.5"), ("MASTER_ADDR", "no.such.host.invalid")])
def test_a_wrong_variable_of_a_launcher_is_named(name, value, monkeypatch):
    with pytest.raises(NoMeeting, match=name) as error:
        meet(monkeypatch, **{name: value})
    assert value in str(error.value) and "\n" not in str(error.value)


def test_waiting_for_a_missing_process_has_a_limit(monkeypatch, capsys):
    monkeypatch.setattr(distributed, "MEETING", datetime.timedelta(seconds=2))
    monkeypatch.setattr(distributed, "SILENCE", 0.2)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    with pytest.raises(NoMeeting, match=f"process 0 of 2 did not find the others at 127.0.0.1:{port}"):
        meet(monkeypatch, MASTER_PORT=port)
    assert f"waiting for 2 processes at 127.0.0.1:{port}" in capsys.readouterr().err


def test_a_taken_port_is_named(monkeypatch):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(NoMeeting, match="a port that is free"):
            meet(monkeypatch, MASTER_PORT=str(taken.getsockname()[1]))


def wait_for_a_peer():
    distributed.SILENCE = 0.2
    os.environ.update(RANK="0", WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_end_the_waiting_for_a_peer(number, tmp_path):
    training = Running("amodal_fusion_transformer.py", "--data_dir", tmp_path, "--gpus", 0, setup=wait_for_a_peer)
    errors = Path(training.files[1])
    wait_for(lambda: errors.exists() and "waiting for 2 processes" in errors.read_text())
    os.kill(training.pid, number)
    assert training.finish(20).returncode == -number
