"""Data, weights and a trained checkpoint that tests share."""

import json
import signal
import time

import pytest
import torch
import torchvision

from amodal_fusion.data.toy import write_dataset
from tests.scripts import succeed

for number in (signal.SIGINT, signal.SIGHUP):  # a runner in the background ignores them, and so would its children
    if signal.getsignal(number) == signal.SIG_IGN:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
torch.set_num_threads(1)  # two test processes share two cores


@pytest.fixture(scope="session")
def dataset(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="session")
def backbone(tmp_path_factory):
    """A file in the layout of torchvision's AlexNet; random, because the real one cannot be downloaded here."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "alexnet.pth"
    torch.save(torchvision.models.alexnet(weights=None).state_dict(), path)
    return path


# A network small enough for a step in tenths of a second, no downloads, and the same arithmetic on every CPU.
SMALL = ("--gpus", 0, "--amp", "off", "--img_size", 64, "--width", 32, "--encoder_layers", 1,
         "--decoder_layers", 1, "--heads", 2, "--workers", 0, "--batch_size", 4, "--log_every", 1,
         "--warmup_steps", 2, "--figure_scenes", 2)

SCRIPT = "amodal_fusion_transformer.py"  # for tests of how training starts, ends and goes on, smaller still
TINY = (*SMALL, "--lpips_weight", 0, "--img_size", 32, "--lr", 1e-3)


def arguments(data, folder, *more):
    return ("--data_dir", data, "--checkpoint_dir", folder, *TINY, *more)


def wait_for(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


def records(folder, kind="train"):
    """Lines of a run's metrics.jsonl; one that is being written is left out."""
    lines = (folder / "metrics.jsonl").read_text().split("\n")[:-1]
    return [record for record in map(json.loads, lines) if record["kind"] == kind]


@pytest.fixture(scope="session")
def checkpoint(dataset, backbone, tmp_path_factory):
    """best_model.pth of a short training run."""
    folder = tmp_path_factory.mktemp("run")
    succeed("amodal_fusion_transformer.py", "--data_dir", dataset, *SMALL, "--epochs", 2, "--lr", 1e-3,
            "--lpips_net", "alex", "--lpips_weights", backbone, "--checkpoint_dir", folder)
    return folder / "best_model.pth"

