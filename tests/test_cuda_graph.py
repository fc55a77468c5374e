"""CUDA graphs of training steps. Without a GPU: what a graph does to memory is imitated."""

import contextlib
from unittest import mock

import pytest
import torch

import amodal_fusion_transformer_inference as inference
from amodal_fusion.checkpoints import load_checkpoint, save_checkpoint
from amodal_fusion.data.toy import draw_scene, write_dataset
from amodal_fusion.errors import UserError
from amodal_fusion.training import cuda_graph, loop
from tests.conftest import SCRIPT, arguments, records
from tests.scripts import succeed


class ByHand(cuda_graph.CudaGraph):
    """Reads and writes the same memory in every call, as a graph does."""

    def _capture(self, tensors):
        self.tensors = {name: torch.full_like(tensor, -1) for name, tensor in tensors.items()}
        self.graph, self.results = self, None

    def replay(self):
        results = self.function(**self.tensors)
        if results is not None:
            self.results = self.results or results
            for name, kept in self.results.items():
                kept.copy_(results[name])


def capture_by_hand():
    torch.cuda.Stream, torch.cuda.current_stream = mock.MagicMock(), mock.MagicMock()
    torch.cuda.stream = lambda _: contextlib.nullcontext()
    cuda_graph.CudaGraph, cuda_graph.make_capturable = ByHand, lambda *_: None
    loop.uses_cuda_graphs = lambda config, _: config.cuda_graph


def test_cuda_graphs_change_nothing_in_a_run(tmp_path):
    """Over epochs, accumulated batches and the end of a term of the loss."""
    data = write_dataset(tmp_path / "data", train=32)
    common = ("--epochs", 3, "--batch_size", 2, "--accumulate", 2, "--log_every", 3, "--oracle_fade", 0.4)
    for name, more in (("plain", ()), ("graphs", ("--cuda_graph",))):
        succeed(SCRIPT, *arguments(data, tmp_path / name, *common, *more), setup=capture_by_hand)
    first, second = (
        [{**record, "scenes_per_second": 0} for record in records(tmp_path / name)] for name in ("plain", "graphs")
    )
    assert first == second and len(first) == 10
    assert "oracle" in first[0] and "oracle" not in first[-1]
    weights = [load_checkpoint(tmp_path / name / "last.pth")["model"] for name in ("plain", "graphs")]
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])


@pytest.mark.parametrize(("message", "raised"), [
    ("operation not permitted when stream is capturing\nCompile with …", UserError),
    ("CUDA error: out of memory\nCUDA kernel errors …", RuntimeError),  # reported as anywhere else
])
def test_uncapturable_step_is_reported(monkeypatch, message, raised):
    class Graph(contextlib.nullcontext):
        def __exit__(self, *_):
            raise RuntimeError(message)

    monkeypatch.setattr(torch.cuda, "Stream", mock.MagicMock())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", mock.MagicMock())
    monkeypatch.setattr(torch.cuda, "graph", lambda *_, **__: Graph())
    with pytest.raises(raised) as error:
        cuda_graph.CudaGraph(dict)._capture({})
    assert type(error.value) is raised
    assert raised is RuntimeError or ("\n" not in str(error.value) and "not permitted" in str(error.value))


def test_a_cpu_resumes_a_run_with_cuda_graphs(dataset, tmp_path):
    """In the checkpoints of such a run the learning rate is a tensor."""
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


def test_optimizer_in_a_graph_reads_tensors():
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.AdamW([weight], lr=0.5)
    weight.grad = torch.ones(2)
    optimizer.step()
    cuda_graph.make_capturable(optimizer, torch.device("cpu"))
    (group,), state = optimizer.param_groups, optimizer.state[weight]
    assert torch.equal(group["lr"], torch.tensor(0.5)) and group["capturable"] and state["step"] == 1


def test_predictor_records_a_graph_per_shape(monkeypatch, checkpoint):
    for name in ("Stream", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, mock.MagicMock())
    monkeypatch.setattr(torch.cuda, "stream", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "device", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(inference, "CudaGraph", ByHand)
    monkeypatch.setattr(inference, "MOST_GRAPHS", 2)
    predictor = inference.FusionPredictor(checkpoint, "cpu", 64, cuda_graph=True)
    assert predictor.graphs is None  # no GPU
    scenes = [[draw_scene(seed, 64, 2 + seed % 2)] for seed in range(12)]
    expected = [predictor.predict_logits(scene)[0] for scene in scenes]
    predictor.graphs = {}
    found = [predictor.predict_logits(scene)[0] for scene in scenes]
    assert all(torch.equal(a, b) for a, b in zip(expected, found))
    assert len(predictor.graphs) == 2 and all(graph.graph for graph in predictor.graphs.values())
    kept = list(predictor.graphs)[1]
    predictor.predict_logits([draw_scene(0, 64, 5)])
    assert len(predictor.graphs) == 2 and next(iter(predictor.graphs)) == kept


def test_results_of_a_graph_survive_the_next_call(monkeypatch):
    monkeypatch.setattr(torch.cuda, "Stream", mock.MagicMock())
    monkeypatch.setattr(torch.cuda, "current_stream", mock.MagicMock())
    monkeypatch.setattr(torch.cuda, "stream", lambda _: contextlib.nullcontext())
    double = ByHand(lambda x: {"y": 2 * x})
    results = [double(x=torch.tensor(float(number))) for number in range(cuda_graph.WARM_UP + 3)]
    assert [result["y"].item() for result in results] == [2.0 * number for number in range(cuda_graph.WARM_UP + 3)]
