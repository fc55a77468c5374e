"""Checkpoints of other programs, old and damaged ones, logs with damage: one line, no traceback; and options that meet
weights or runs."""

import json
import math
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

import amodal_fusion_transformer as aft
from amodal_fusion import checkpoints
from amodal_fusion.checkpoints import load_checkpoint, save_checkpoint
from amodal_fusion.distributed import Process
from amodal_fusion.errors import UserError
from amodal_fusion.files import temporary_path
from amodal_fusion.training import run_folder, tensorboard
from amodal_fusion.training.loaders import read_batches
from amodal_fusion.training.optimizers import choose_optimizer
from amodal_fusion.training.run import Run
from tests.scripts import ROOT

CPU = torch.device("cpu")
SHAPE = {"width": 8, "encoder_layers": 0, "decoder_layers": 1, "heads": 1}


def make_run(folder, **options):
    config = aft.TrainConfig(batch_size=2, checkpoint_dir=str(folder), **options)
    torch.manual_seed(0)
    return Run(torch.nn.Linear(3, 2), config, Process(0, 1, CPU), 8, "names")


def step(run):
    run.model(torch.ones(1, 3)).sum().backward()
    run.optimizer.step()
    run.advance()


@pytest.fixture
def saved(tmp_path):
    """Path of a checkpoint of a run of one step."""
    run = make_run(tmp_path)
    step(run)
    run.save("last.pth")
    return tmp_path / "last.pth"


@pytest.mark.parametrize("version", [None, [4], "4", 4.0, True, 1, 5])
def test_unknown_checkpoint_version_is_refused(version, saved):
    state = torch.load(saved, weights_only=True) | {"version": version}
    if version is None:
        del state["version"]
    torch.save(state, saved)
    with pytest.raises(UserError, match=r"version|format"):
        load_checkpoint(saved)


@pytest.mark.parametrize(("tensor", "kind"), [
    (torch.eye(3).to_sparse(), "sparse"), (torch.empty(3, device="meta"), "without data"),
    (torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8), "quantized"), (torch.ones(2) * 1j, "complex")])
def test_unusual_tensors_are_named(tensor, kind, saved):
    for state in ({"model": {"weight": tensor}}, {"model": {}, "rng": [{"torch": tensor}]}):
        torch.save({"kind": checkpoints.KIND, "version": checkpoints.VERSION, **state}, saved)
        with pytest.raises(UserError, match=f"is a tensor that is {kind}"):
            load_checkpoint(saved)


@pytest.mark.parametrize(("name", "value"), [
    ("step", -1), ("step", "7"), ("epoch", 1.5), ("scenes_done", None), ("nominal_batch", 0), ("nominal_batch", True),
    ("bad_steps", [0]), ("best", "good"), ("best", math.nan), ("metrics", None), ("validated_at", -2), ("rng", 3),
    ("config", []), ("optimizer", {"param_groups": []})])
def test_counts_of_a_wrong_type_or_sign(name, value, saved):
    save_checkpoint(saved, {**load_checkpoint(saved), name: value})
    with pytest.raises(UserError, match="training cannot resume from this state"):
        make_run(saved.parent).resume(saved, ())


@pytest.mark.parametrize("moment", [torch.zeros(7), torch.zeros(3, 2), 0.5])
def test_moments_of_another_shape(moment, saved):
    state = load_checkpoint(saved)
    state["optimizer"]["state"][0]["momentum"] = moment
    save_checkpoint(saved, state)
    with pytest.raises(UserError, match="momentum of the optimizer does not fit"):
        make_run(saved.parent).resume(saved, ())


@pytest.mark.parametrize("size", [-3, 0, "256", 64.5])
def test_invalid_inference_size_is_refused(size, tmp_path):
    model = aft.build_model(SHAPE)
    config = {**SHAPE, "img_size": 64, "inference_size": size}
    save_checkpoint(tmp_path / "x.pth", {"model": model.state_dict(), "config": config})
    with pytest.raises(UserError, match="inference_size"):
        aft.load_model(tmp_path / "x.pth")


def test_pipe_in_place_of_file_is_refused(saved):
    log, pipe = saved.parent / "metrics.jsonl", saved.parent / "pipe.pth"
    os.mkfifo(log)
    os.mkfifo(pipe)
    with pytest.raises(UserError, match=r"metrics\.jsonl: is not a regular file"):
        make_run(saved.parent).resume(saved, ())
    with pytest.raises(UserError, match="is not a regular file"):
        load_checkpoint(pipe)


def test_resume_repairs_the_log(saved):
    log = saved.parent / "metrics.jsonl"
    good = [{"kind": "train", "scenes": 2}, {"kind": "other"}]
    newer = [{"kind": "train", "scenes": 4}, {"kind": "val", "scenes": 2}]  # killed between log and save
    lines = [json.dumps(record).encode() + b"\n" for record in good + newer]
    log.write_bytes(b"".join(lines) + b'{"kind": "tr\xff"}\n{"kind": "tr')
    make_run(saved.parent).resume(saved, ())
    assert [json.loads(line) for line in log.read_text().splitlines()] == good


def test_a_validated_checkpoint_keeps_its_log_line(saved):
    log = saved.parent / "metrics.jsonl"
    save_checkpoint(saved, {**load_checkpoint(saved), "validated_at": 2})
    log.write_text('{"kind": "val", "scenes": 2}\n')
    make_run(saved.parent).resume(saved, ())
    assert log.read_text() == '{"kind": "val", "scenes": 2}\n'


@pytest.mark.parametrize(("given", "chosen", "said"), [
    ((None, None), ("muon", 1e-3), ""), (("adamw", None), ("adamw", 3e-4), ""), ((None, 1e-3), ("muon", 1e-3), ""),
    ((None, 1e-4), ("adamw", 1e-4), "so the optimizer is adamw"), (("adamw", 1e-4), ("adamw", 1e-4), ""),
    (("muon", 1e-4), ("muon", 1e-4), "far from 0.001"), (("adamw", 0.01), ("adamw", 0.01), "far from 0.0003")])
def test_learning_rate_belongs_to_its_optimizer(given, chosen, said, capsys):
    assert choose_optimizer(*given) == chosen
    errors = capsys.readouterr().err
    assert said in errors and bool(said) == bool(errors)


def test_the_shape_of_given_weights_wins(tmp_path, capsys):
    save_checkpoint(tmp_path / "x.pth", {"model": aft.build_model(SHAPE).state_dict(),
                                         "config": {**SHAPE, "img_size": 64}})
    config = aft.TrainConfig(init_from=str(tmp_path / "x.pth"), width=256, heads=8)
    weights = aft.take_shape(config, None, Process(0, 1, CPU))
    assert {name: getattr(config, name) for name in SHAPE} == SHAPE
    assert "note: width 256 is ignored" in capsys.readouterr().out
    aft.build_model(vars(config)).load_state_dict(weights.state_dict())
    config = aft.parse(aft.TrainConfig, "", ["--init_from", "x.pth", "--width", "128", "--dim_feedforward", "1024"])
    assert config.width == 128 and "dim_feedforward 1024 is ignored" in capsys.readouterr().err


def test_folder_that_cannot_sync_is_no_error(tmp_path, monkeypatch):
    fsync = os.fsync

    def refuse(handle):
        if os.path.isdir(f"/proc/self/fd/{handle}"):
            raise OSError(22, "Invalid argument")
        fsync(handle)

    monkeypatch.setattr(os, "fsync", refuse)
    save_checkpoint(tmp_path / "x.pth", {"model": {}})
    assert load_checkpoint(tmp_path / "x.pth")["model"] == {}


def test_only_own_leftovers_of_exports_are_removed(tmp_path):
    ours, other = temporary_path(tmp_path / "x.pth"), temporary_path(tmp_path / "y.pth")
    for path in (ours, other, tmp_path / ".x.tmp.pth"):
        path.touch()
    run_folder.check_export(aft.TrainConfig(export=str(tmp_path / "x.pth"), checkpoint_dir=str(tmp_path / "run")))
    assert not ours.exists() and other.exists() and (tmp_path / ".x.tmp.pth").exists()


@pytest.mark.parametrize("error", [TypeError, AttributeError, ImportError])
def test_failing_tensorboard_prints_a_note(error, tmp_path, monkeypatch, capsys):
    def fail(*_, **__):
        raise error("broken")

    monkeypatch.setattr("torch.utils.tensorboard.SummaryWriter", fail)
    assert tensorboard.open_board(aft.TrainConfig(log_dir=str(tmp_path)), 0) is None
    assert "note: log_dir is not written" in capsys.readouterr().out


def test_figure_interval_longer_than_run_is_noted(tmp_path, capsys):
    make_run(tmp_path, epochs=50, figure_every=100).announce()
    assert "figure_every 100 is in epochs, but the run has 50" in capsys.readouterr().out


def test_a_notebooks_backend_does_not_stop_the_import():
    environment = {**os.environ, "MPLBACKEND": "module://no_such_backend"}
    code = "import os, amodal_fusion.evaluation.figures; print(os.environ['MPLBACKEND'])"
    process = subprocess.run([sys.executable, "-c", code], env=environment, cwd=ROOT, capture_output=True, text=True,
                             timeout=100, check=False)
    assert process.stdout == "module://no_such_backend\n", process.stderr


def test_a_tensorboard_that_fails_later_is_a_note(capsys):
    def fail(*_, **__):
        raise OSError("disk")

    board = SimpleNamespace(add_scalar=fail, flush=fail)
    assert tensorboard.add_record(board, "train", {"loss": 1.0}, 1) is None
    assert "log_dir is not written any more" in capsys.readouterr().out


@pytest.mark.parametrize("error", [RuntimeError("received 0 items of ancdata"), OSError(24, "Too many open files")])
def test_too_many_open_files_names_the_limit(error):
    class Loader:
        num_workers = 1

        def __iter__(self):
            raise error

    with pytest.raises(UserError, match="too many open files; raise the limit"):
        next(read_batches(Loader()))


def test_an_export_replaces_no_other_file(tmp_path):
    (tmp_path / "thesis.pth").write_bytes(b"mine")
    with pytest.raises(UserError, match=r"thesis\.pth: not a whole checkpoint"):
        run_folder.check_export(aft.TrainConfig(export=str(tmp_path / "thesis.pth"), checkpoint_dir=str(tmp_path)))
    assert (tmp_path / "thesis.pth").read_bytes() == b"mine"
