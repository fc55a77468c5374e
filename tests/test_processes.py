"""Helper processes end with the one that they help."""

import importlib
import os
import signal
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
from torch.utils.data import DataLoader

from amodal_fusion.pools import end_with_parent
from tests.scripts import server

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


def test_inference_and_preparation_import_without_what_windows_lacks():
    process = server.Process(target=import_as_on_windows)
    process.start()
    process.join(60)
    assert process.exitcode == 7
