"""Recorded steps. There is no GPU here: what a CUDA graph does to memory is done by hand."""

import contextlib
from unittest import mock

import pytest
import torch

import amodal_fusion.training.cuda_graph
import amodal_fusion.training.run
from amodal_fusion.checkpoints import load_checkpoint, save_checkpoint
from amodal_fusion.data.toy import write_dataset
from amodal_fusion.errors import UserError
from amodal_fusion.training.cuda_graph import Recorded
from tests.conftest import SCRIPT, arguments, records
from tests.scripts import succeed


class ByHand(Recorded):
    """Reads and writes the same memory in every call, as a graph does."""

    def _record(self, tensors):
        self.tensors = {name: torch.full_like(tensor, -1) for name, tensor in tensors.items()}
        self.graph, self.results = self, None

    def replay(self):
        results = self.program(**self.tensors)
        if results is not None:
            self.results = self.results or results
            for kept, new in zip(tensors_of(self.results), tensors_of(results)):
                kept.copy_(new)


def tensors_of(results):
    loss, parts = results
    return loss, *parts.values()


def record_by_hand():
    torch.cuda.Stream, torch.cuda.current_stream = mock.MagicMock(), mock.MagicMock()
    torch.cuda.stream = lambda _: contextlib.nullcontext()
    amodal_fusion.training.cuda_graph.Recorded = amodal_fusion.training.run.Recorded = ByHand
    amodal_fusion.training.run.is_recorded = lambda config, _: config.cuda_graph


def test_a_recorded_run_is_the_run(tmp_path):
    """Over epochs, accumulated batches and the end of a term of the loss."""
    data = write_dataset(tmp_path / "data", train=32)
    common = ("--epochs", 3, "--batch_size", 2, "--accumulate", 2, "--log_every", 3, "--oracle_fade", 0.4)
    for name, more in (("plain", ()), ("recorded", ("--cuda_graph",))):
        succeed(SCRIPT, *arguments(data, tmp_path / name, *common, *more), setup=record_by_hand)
    first, second = (
        [{**record, "scenes_per_second": 0} for record in records(tmp_path / name)] for name in ("plain", "recorded")
    )
    assert first == second and len(first) == 10
    assert "oracle" in first[0] and "oracle" not in first[-1]
    weights = [load_checkpoint(tmp_path / name / "last.pth")["model"] for name in ("plain", "recorded")]
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])


@pytest.mark.parametrize(("message", "raised"), [
    ("operation not permitted when stream is capturing\nCompile with …", UserError),
    ("CUDA error: out of memory\nCUDA kernel errors …", RuntimeError),  # told as anywhere else
])
def test_what_cannot_be_recorded_is_told(monkeypatch, message, raised):
    class Graph(contextlib.nullcontext):
        def __exit__(self, *_):
            raise RuntimeError(message)

    monkeypatch.setattr(torch.cuda, "Stream", mock.MagicMock())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", mock.MagicMock())
    monkeypatch.setattr(torch.cuda, "graph", lambda *_, **__: Graph())
    with pytest.raises(raised) as error:
        Recorded(dict)._record({})
    assert type(error.value) is raised
    assert raised is RuntimeError or ("\n" not in str(error.value) and "not permitted" in str(error.value))


def test_it_has_no_effect_on_a_cpu_where_a_run_of_a_gpu_goes_on(dataset, tmp_path):
    """On a GPU the learning rate of a recorded run is a tensor, in its checkpoints, too."""
    common = ("--epochs", 2, "--cuda_graph")
    succeed(SCRIPT, *arguments(dataset, tmp_path / "straight", *common))
    succeed(SCRIPT, *arguments(dataset, tmp_path / "halves", *common, "--max_steps", 2))
    path = tmp_path / "halves" / "last.pth"
    state = load_checkpoint(path)
    for group in state["optimizer"]["param_groups"]:
        group |= {"lr": torch.tensor(group["lr"]), "capturable": True}
    save_checkpoint(path, state)
    succeed(SCRIPT, *arguments(dataset, tmp_path / "halves", *common, "--resume", "auto"))
    last = [records(tmp_path / name)[-1] for name in ("straight", "halves")]
    assert last[0] | {"scenes_per_second": 0} == last[1] | {"scenes_per_second": 0}
