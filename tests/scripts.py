"""The scripts as processes of their own.

Most of a short run is importing torch. A fork server has done that already: what it starts is a process like any
other, with its own arguments, output, signals and exit status, seconds earlier.
"""

import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
os.environ.update(ENVIRONMENT)
server = multiprocessing.get_context("forkserver")
server.set_forkserver_preload(["amodal_fusion_transformer_inference", "prepare_dataset", "torch._dynamo"])


def _become(script, arguments, output, errors, setup):
    os.setsid()
    for path, descriptor in ((output, 1), (errors, 2)):
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, descriptor)
        os.close(file)
    os.chdir(ROOT)
    multiprocessing.set_start_method("fork", force=True)  # as in a script that a shell starts
    sys.argv = [str(ROOT / script), *arguments]
    if setup is not None:
        setup()
    runpy.run_path(sys.argv[0], run_name="__main__")


class Running:
    """A script that runs: `pid`, which is also its process group's, and `finish`."""

    def __init__(self, script, *arguments, setup=None):
        self.arguments = list(map(str, arguments))
        self.folder = tempfile.TemporaryDirectory()
        self.files = [os.path.join(self.folder.name, name) for name in ("output", "errors")]
        self.process = server.Process(target=_become, args=(script, self.arguments, *self.files, setup))
        self.process.start()
        self.pid = self.process.pid

    def finish(self, timeout=120):
        """Wait; returns a subprocess.CompletedProcess, whose status is −N after signal N. Raises TimeoutExpired."""
        self.process.join(timeout)
        if self.process.is_alive():
            self.process.kill()
            raise subprocess.TimeoutExpired(self.arguments, timeout, *(Path(f).read_bytes() for f in self.files))
        texts = [Path(f).read_text(encoding="utf-8") for f in self.files]
        self.folder.cleanup()
        return subprocess.CompletedProcess(self.arguments, self.process.exitcode, *texts)


def run(script, *arguments, timeout=120, setup=None):
    """Run a script to its end; returns a subprocess.CompletedProcess with output and errors as text.

    `setup` is a function of a module that the new process calls first.
    """
    return Running(script, *arguments, setup=setup).finish(timeout)


def torchrun(script, *arguments, processes=2, restarts=0, timeout=120):
    """Run the training script under PyTorch's launcher, in the ordinary way."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes),
               "--max-restarts", str(restarts), str(ROOT / script), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False, cwd=ROOT)


def succeed(*arguments, start=run, **options):
    """`run` or `torchrun`, and fail the test with the script's output unless it exits with 0."""
    process = start(*arguments, **options)
    assert process.returncode == 0, process.stdout + process.stderr
    return process
