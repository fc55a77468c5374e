"""Options: names and files that people bring, and odd or hostile values in them."""

import dataclasses
import itertools
import os
import re
import subprocess
import sys
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from amodal_fusion.config import option, parse, read_yaml
from amodal_fusion.data.dataset_folder import agree_with_earlier_run
from amodal_fusion.data.images import read_image
from amodal_fusion.data.toy import write_dataset
from amodal_fusion.errors import ConfigError
from amodal_fusion.ingest.create import SHAPING
from amodal_fusion.prepare import CreateConfig
from amodal_fusion_transformer import TrainConfig
from tests.conftest import SMALL, records
from tests.scripts import ROOT, succeed

TRAIN = "amodal_fusion_transformer.py"

# A config as people have it from Transformer code elsewhere, beside keys of ours.
BROUGHT = """
data_dir: {data}
img_size: 64
n_max_completions: 5

# model
d_model: 256
nhead: 8
num_encoder_layers: 6
num_decoder_layers: 6
dim_feedforward: 1024
dropout: 0.1

# training
batch_size: 4
epochs: 1
lr: 1e-4
weight_decay: 0.01
lpips_weight: 0
num_workers: 0
gpus: 0

# logging
checkpoint_dir: {folder}/run
log_dir: {folder}/logs
log_interval: 1
vis_dir: {folder}/vis
vis_interval: 1
"""


def test_config_of_another_program_runs_unchanged(dataset, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(BROUGHT.format(data=dataset, folder=tmp_path))
    process = succeed(TRAIN, "--config", path, "--max_steps", 2)
    assert process.stderr.count("dropout 0.1 is ignored") == 1
    assert "d_model is width here" in process.stderr and "vis_interval is figure_every here" in process.stderr
    assert len(records(tmp_path / "run")) == 2
    board = EventAccumulator(str(tmp_path / "logs")).Reload()
    for kind in ("train", "val"):
        losses = [(record["step"], record["loss"]) for record in records(tmp_path / "run", kind)]
        assert np.allclose([(event.step, event.value) for event in board.Scalars(f"{kind}/loss")], losses)
    assert {"train/lr", "train/l1", "val/psnr", "val/psnr_overlap"} <= set(board.Tags()["scalars"])
    (figure,), (text,) = board.Images("val/scenes"), board.Tensors("config/text_summary")
    assert (figure.step, figure.width) == (2, read_image(tmp_path / "vis" / "val_epoch_001.png", "RGB").shape[1])
    assert b"width: 256" in text.tensor_proto.string_val[0]
    assert (tmp_path / "vis" / "val_epoch_001.png").exists() and not list((tmp_path / "run").glob("val_epoch*"))
    stored = torch.load(tmp_path / "run" / "last.pth", weights_only=True)["config"]
    names = ("width", "heads", "encoder_layers", "decoder_layers", "workers", "log_every", "figure_every")
    assert [stored[name] for name in names] == [256, 8, 6, 6, 0, 1, 1]


def hide_tensorboard():
    sys.modules["torch.utils.tensorboard"] = None


def test_resume_continues_tensorboard_or_notes_its_absence(dataset, tmp_path):
    arguments = ("--data_dir", dataset, *SMALL, "--lpips_weight", 0, "--checkpoint_dir", tmp_path / "run", "--log_dir",
                 tmp_path / "logs", "--epochs", 2, "--resume", "auto", "--max_steps")
    process = succeed(TRAIN, *arguments, 1, setup=hide_tensorboard)
    assert process.stdout.count("pip install tensorboard") == 1 and not (tmp_path / "logs").exists()
    succeed(TRAIN, *arguments, 3)
    succeed(TRAIN, *arguments, 4)
    board = EventAccumulator(str(tmp_path / "logs")).Reload()
    assert [event.step for event in board.Scalars("train/loss")] == [2, 3, 4]


def test_two_scene_folders_and_foreign_flag_names_work(tmp_path):
    """Scene ids may repeat between the folders; figures come every second epoch and after the last."""
    for name, count in (("train", 4), ("val", 2)):
        write_dataset(tmp_path / name, train=count, val=0)
        for listed in ("train_list.txt", "val_list.txt"):
            (tmp_path / name / listed).unlink()
    process = succeed(
        TRAIN, "--train_dir", tmp_path / "train", "--val_dir", tmp_path / "val", "--checkpoint_dir", tmp_path / "run",
        "--vis_dir", tmp_path / "vis", "--vis_interval", 2, "--log_interval", 1, "--d_model", 32, "--nhead", 2,
        "--num_encoder_layers", 1, "--num_decoder_layers", 1, "--dim_feedforward", 128, "--dropout", 0, "--nodes", 1,
        "--num_workers", 0, "--batch_size", 4, "--epochs", 3, "--learning_rate", "1e-3", "--lpips_weight", 0,
        "--gpus", 0, "--img_size", 64)
    assert "4 training scenes" in process.stdout and "dropout" not in process.stderr
    assert {path.name for path in (tmp_path / "vis").glob("*.png")} == {"val_epoch_002.png", "val_epoch_003.png"}


def wrong(capsys, *arguments, config_class=TrainConfig):
    with pytest.raises(SystemExit) as stop:
        parse(config_class, "", list(map(str, arguments)), yaml_file=True)
    assert stop.value.code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize(("arguments", "complaint"), [
    (("--d_model", 256, "--dim_feedforward", 2048), "4 × width = 1024 channels wide inside, not 2048"),
    (("--cpu",), "set gpus to 0 (--gpus)"),
    (("--nodes", 2, "--node_rank", 0), "torchrun --nnodes 2"),
    (("--node_rank", 1), "torchrun"),
    (("--width", 128, "--d_model", 256), "--width and --d_model are one option here, with two values"),
    (("--d_model", 7.5), "d_model: expected a whole number, got '7.5'"),
    (("--lr", "inf"), "lr: expected a finite number, got inf"),
    (("--seed", "1e23"), "seed: expected a whole number, got '1e23'"),
    (("--seed", "9" * 30), "seed: a number of 100 bits is too large"),
    (("--seed", "9" * 5000), "(5002 characters)"),
    (("--batch-size", 3), "unrecognized arguments: --batch-size 3; did you mean batch_size?"),
])
def test_wrong_flags(arguments, complaint, capsys):
    errors = wrong(capsys, *arguments)
    assert complaint in errors and len(errors.rsplit("error: ", 1)[-1]) < 500


@pytest.mark.parametrize(("name", "meant"), [
    ("batch_sise", "batch_size"), ("image_size", "img_size"), ("batchsize", "batch_size"), ("epoch", "epochs"),
    ("log_dirs", "log_dir"), ("num_worker", "num_workers"), ("max_completions", "n_max_completions"),
    # near in letters, far in meaning: nothing is proposed
    ("log_file", None), ("val_batch_size", None), ("save_dir", None), ("test_list", None), ("ssim_weight", None),
    ("max_epochs", None), ("l1_weight", None), ("x" * 10**5, None),
])
def test_hints_name_similar_options_or_none(name, meant, tmp_path):
    (tmp_path / "config.yaml").write_text(f"{name}: 1" if len(name) < 100 else f"? {name}\n: 1")
    with pytest.raises(ConfigError) as error:
        read_yaml(tmp_path / "config.yaml", TrainConfig)
    assert ("did you mean" in str(error.value)) == (meant is not None) and len(str(error.value)) < 2000
    assert meant is None or f"did you mean {meant!r}?" in str(error.value)


LETTERS = "abcdefghij"
BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join(['*' + before] * 9)}]\n" for before, name in itertools.pairwise(LETTERS))
MERGED = "a: &a {x: 1}\n" + "".join(
    f"{name}: &{name} {{<<: [{', '.join(['*' + before] * 9)}]}}\n" for before, name in itertools.pairwise(LETTERS))


@pytest.mark.parametrize(("text", "complaint"), [
    ("seed: " + "9" * 5000, "seed: expected a whole number"),
    ("lr: .inf", "lr: expected a number"),
    ("lr: inf", "lr: expected a finite number"),
    ("epochs: 2024-01-01", "epochs: expected a whole number, got '2024-01-01'"),
    ("epochs: 1:30", "epochs: expected a whole number, got '1:30'"),  # YAML 1.1 reads 90
    ("epochs:", "epochs: has no value"),
    ("data_dir: ~", "data_dir: has no value"),
    ("epochs: " + "[" * 3000, "nested lists"),
    (BOMB + "epochs: *j", "unknown key 'a'"),
    (BOMB.replace("a: &a", "epochs: &a", 1), "epochs: expected a whole number, got a list"),
    (MERGED, "unknown key 'a'"),
    ("epochs: &x [*x]", "not valid YAML"),
    ("epochs: !!python/object/apply:os.getcwd []", "epochs: expected a whole number, got a list"),
    ("# " + "x" * (1 << 20), "more than 1 MiB"),
    ("? [epochs]\n: 3", "not valid YAML"),
    ("data_dir: [a\n", "not valid YAML: line 2: expected ',' or ']'"),
    ("layers: [*>4]", "line 1: expected alphabetic or numeric character, but found '>', while scanning an alias that "
                      "begins in line 1; quote a text that begins with *, as in '*>4'"),
    ("model:\n  width: 32", "unknown key 'model', with keys below it; keys are flat here"),
    ("data_dir: \x01", "special characters are not allowed"),
])
def test_hostile_yaml(text, complaint, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as error:
        read_yaml(path, TrainConfig)
    assert str(error.value).startswith(f"{path}: ") and complaint in str(error.value) and len(str(error.value)) < 2000
    assert "\n" not in str(error.value)


def test_missing_yaml_names_flag(capsys):
    assert "no.yaml: no such file (--config)" in wrong(capsys, "--config", "no.yaml")


@pytest.mark.parametrize("text", ["made_by: 2024-13-45", "made_by: " + "9" * 5000, "[" * 3000, "made_by: [a]", "\xff"])
def test_a_data_set_whose_description_is_damaged(text, tmp_path):
    (tmp_path / "dataset.yaml").write_text(text, encoding="latin-1")
    config = CreateConfig(output_dir=str(tmp_path))
    with pytest.raises(ConfigError, match=r"dataset\.yaml: does not say how the data set was made"):
        agree_with_earlier_run("create", SHAPING, config, tmp_path)


def test_values_are_converted_to_option_types(tmp_path, monkeypatch):
    """No date, octal number or boolean where text is wanted; ~ is the home directory."""
    monkeypatch.setenv("HOME", "/home/somebody")
    path = tmp_path / "config.yaml"
    path.write_text("data_dir: ~/data\ntrain_list: ~\nval_list: null\ncheckpoint_dir: 2024-01-01\namp: off\n"
                    "init_from: 007\naugment: no\nlr: 1e-4\nmax_steps:\nlog_dir: NULL\nfigure_dir: Null\n")
    assert read_yaml(path, TrainConfig) == {
        "data_dir": "/home/somebody/data", "train_list": None, "val_list": None, "checkpoint_dir": "2024-01-01",
        "amp": "off", "init_from": "007", "augment": False, "lr": 1e-4, "max_steps": None, "log_dir": None,
        "figure_dir": None}
    assert parse(TrainConfig, "", ["--data_dir=~/data"]).data_dir == "/home/somebody/data"


@dataclass
class PairConfig:
    handover: tuple | None = option(None, "two values", choices=("KIND", "DIR"))


def test_an_option_of_two_values(capsys, tmp_path):
    assert parse(PairConfig, "", []).handover is None
    assert parse(PairConfig, "", ["--handover", "lama", "out"]).handover == ("lama", "out")
    assert "expected 2 arguments" in wrong(capsys, "--handover", "lama", config_class=PairConfig)
    (tmp_path / "config.yaml").write_text("handover: [lama, out, more]")
    assert "expected KIND and DIR, got 3 values" in wrong(capsys, "--config", tmp_path / "config.yaml",
                                                         config_class=PairConfig)


def test_notes_are_printed_once_for_all_processes(capsys, monkeypatch):
    monkeypatch.delenv("AMODAL_FUSION_NOTES_BY", raising=False)
    for rank, parent, told in (("0", None, True), ("1", None, False), ("0", "1", False)):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("AMODAL_FUSION_NOTES_BY", parent or str(os.getpid()))
        parse(TrainConfig, "", ["--dropout", "0.1", "--data_dir", "x"])
        assert ("dropout" in capsys.readouterr().err) is told


def test_help_shows_common_options_or_all():
    def shown(*arguments):
        process = subprocess.run([sys.executable, str(ROOT / TRAIN), *arguments], capture_output=True, text=True,
                                 timeout=120, check=False)
        assert process.returncode == 0, process.stderr
        return set(re.findall(r"^  --(\w+) ", process.stdout, re.M)), process.stdout

    names, text = shown("--help")
    assert names == {*TrainConfig.COMMON, "config"} and len(TrainConfig.COMMON) == 12
    fields = {field.name for field in dataclasses.fields(TrainConfig)}
    assert f"{len(fields) - 12} more options: --help all" in text
    switches = {field.name for field in dataclasses.fields(TrainConfig) if field.type is bool}  # --check, --no-check
    assert shown("--help", "all")[0] >= fields - switches


@pytest.mark.parametrize("encoding", ["ascii", "cp949"])
def test_terminal_replaces_unknown_characters(encoding):
    command = [sys.executable, str(ROOT / "prepare_dataset.py"), "create", "--help"]
    environment = {**os.environ, "PYTHONIOENCODING": encoding}
    process = subprocess.run(command, capture_output=True, env=environment, timeout=120, check=False)
    assert process.returncode == 0, process.stderr
    assert "img_size × img_size".encode(encoding, "replace") in process.stdout
