"""The training script as a process: what it writes, several processes, resume, options."""

import dataclasses
import math
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from torch.utils.data import default_collate

import amodal_fusion_transformer as aft
from amodal_fusion import distributed
from amodal_fusion.checkpoints import load_checkpoint
from amodal_fusion.config import read_yaml
from amodal_fusion.data.datasets import AmodalFusionDataset, recolour, to_batch, with_draws
from amodal_fusion.data.tensors import to_tensors
from amodal_fusion.data.toy import draw_scene, write_dataset
from amodal_fusion.distributed import Process
from amodal_fusion.errors import ConfigError
from amodal_fusion.precision import training_precision
from amodal_fusion.training.optimizers import Muon, learning_rate, make_optimizer, orthogonalized
from tests.conftest import SMALL, records
from tests.scripts import ROOT, run, succeed, torchrun

SCRIPT = "amodal_fusion_transformer.py"
L1_ONLY = ("--lpips_weight", 0)


def train(dataset, folder, *arguments, **options):
    return succeed(SCRIPT, "--data_dir", dataset, "--checkpoint_dir", folder, *SMALL, *arguments, **options)


def test_training_writes_checkpoints_logs_and_figures(checkpoint):
    folder = checkpoint.parent
    names = {path.name for path in folder.iterdir() if not path.name.startswith(".")}
    assert names == {"best_model.pth", "last.pth", "metrics.jsonl", "curves.png", "val_epoch_001.png",
                     "val_epoch_002.png"}
    assert [record["step"] for record in records(folder)] == [1, 2, 3, 4]
    assert {"l1", "lpips", "oracle", "objective", "lr", "grad_norm"} <= set(records(folder)[0])
    for record in records(folder) + records(folder, "val"):  # the same sum in both: curves.png draws them together
        assert record["loss"] == pytest.approx(record["l1"] + 0.5 * record["lpips"], rel=1e-5)
    assert all(record["objective"] != record["loss"] for record in records(folder))
    state = torch.load(folder / "last.pth", weights_only=True)
    assert {"model", "ema", "optimizer", "scaler", "epoch", "step", "rng", "config",
            "metrics"} <= set(state)
    assert (state["epoch"], state["step"]) == (2, 4)
    assert state["metrics"]["loss"] == records(folder, "val")[-1]["loss"]


def test_training_learns_what_no_rule_knows(tmp_path):
    data = write_dataset(tmp_path / "data", train=16, val=6, decoy=True)
    train(data, tmp_path / "run", *L1_ONLY, "--epochs", 8, "--lr", 2e-3)
    history = records(tmp_path / "run", "val")
    best = min(history, key=lambda record: record["loss"])
    assert best["loss"] < 0.8 * history[0]["loss"]
    assert best["psnr"] > best["visible_fit_psnr"] + 1
    assert torch.load(tmp_path / "run" / "best_model.pth", weights_only=True)["metrics"]["loss"] == best["loss"]


def test_unlimited_gradients_do_not_stop_training(dataset, tmp_path):
    folder = tmp_path / "run"
    succeed(SCRIPT, "--data_dir", dataset, *SMALL, "--lpips_weight", 0, "--max_steps", 2, "--grad_clip", 0,
            "--weight_decay", 0, "--checkpoint_dir", folder)
    state = load_checkpoint(folder / "last.pth")
    torch.manual_seed(state["config"]["seed"])
    first = aft.build_model(state["config"]).state_dict()
    assert any(not torch.equal(first[name], value) for name, value in state["model"].items())


def test_two_processes_train_like_one(dataset, tmp_path):
    common = (*L1_ONLY, "--epochs", 2, "--lr", 1e-3)
    train(dataset, tmp_path / "one", *common, "--batch_size", 4)
    train(dataset, tmp_path / "two", *common, "--batch_size", 2, start=torchrun)
    for kind in ("train", "val"):
        one, two = records(tmp_path / "one", kind), records(tmp_path / "two", kind)
        assert len(one) == len(two) > 0
        for a, b in zip(one, two):
            assert a["loss"] == pytest.approx(b["loss"], abs=1e-4)
            # three validation scenes on two ranks: a scene counted twice would show
            assert a.get("psnr") == pytest.approx(b.get("psnr"), abs=1e-3)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_gpus_option_starts_processes_with_the_elastic_launcher(dataset, tmp_path, number):
    """What --gpus 2 does once two GPUs are there, with processes on the CPU; and what a signal makes of it."""
    code = "import sys; from amodal_fusion import distributed; sys.argv = sys.argv[1:]; distributed.launch(2)"
    arguments = [SCRIPT, "--data_dir", dataset, "--checkpoint_dir", tmp_path, *SMALL, *L1_ONLY, "--epochs", 5000,
                 "--batch_size", 2]
    with subprocess.Popen([sys.executable, "-c", code, *map(str, arguments)], stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE, text=True, cwd=ROOT) as process:
        deadline = time.monotonic() + 90
        while not (tmp_path / "best_model.pth").exists():
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.1)
        process.send_signal(number)
        output, errors = process.communicate(timeout=60)  # until all of them have closed their ends
    assert process.returncode == (128 + number if number == signal.SIGTERM else -number), errors
    assert "2 × cpu" in output and "stopped by a signal after saving" in output
    assert "Traceback" not in errors
    state = torch.load(tmp_path / "last.pth", weights_only=True)
    assert state["step"] == records(tmp_path)[-1]["step"] and len(state["rng"]) == 2


def test_gpus_option_starts_a_module_as_a_module(monkeypatch):
    started = []
    monkeypatch.setattr("torch.distributed.run.main", started.append)
    monkeypatch.setattr(sys, "argv", ["experiments/plain_training.py", "--gpus", "6"])
    for spec, program in ((None, sys.argv), (SimpleNamespace(name="experiments.plain_training"),
                                             ["--module", "experiments.plain_training", "--gpus", "6"])):
        monkeypatch.setattr(sys.modules["__main__"], "__spec__", spec)
        with pytest.raises(SystemExit):
            distributed.launch(6)
        assert started.pop()[3:] == program


@pytest.mark.parametrize(("cpu", "amp", "expected"), [
    ({"avx512_bf16": True}, "bf16", torch.bfloat16), ({"amx_bf16": True}, "bf16", torch.bfloat16),
    ({"avx512_f": True}, "bf16", None), ({"avx512_bf16": True}, "fp16", None), ({"avx512_bf16": True}, "off", None),
])
def test_cpu_uses_bf16_only_with_instructions_for_it(cpu, amp, expected, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: cpu, raising=False)
    assert training_precision(amp, torch.device("cpu")) is expected
    assert training_precision("fp16", torch.device("cuda")) is torch.float16


@pytest.mark.parametrize("known", [True, False])
def test_gpu_uses_bf16_only_with_instructions_for_it(known, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: known)
    assert training_precision("bf16", torch.device("cuda")) is (torch.bfloat16 if known else None)


def bf16_at_any_price():
    torch.cpu.get_capabilities = lambda: {"amx_bf16": True}


def test_half_precision_trains_like_full_precision(dataset, tmp_path):
    common = (*L1_ONLY, "--epochs", 2, "--lr", 1e-3)
    train(dataset, tmp_path / "full", *common)
    train(dataset, tmp_path / "half", *common, "--amp", "bf16", setup=bf16_at_any_price)
    full, half = (records(tmp_path / name, "val")[-1]["loss"] for name in ("full", "half"))
    assert half != full and half == pytest.approx(full, abs=2e-3)


def test_muon_precision_is_the_same_on_all_processes(monkeypatch):
    process, model = Process(0, 1, torch.device("cpu")), torch.nn.Linear(2, 2)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": True}, raising=False)
    for amp, half in (("bf16", torch.bfloat16), ("fp16", None), ("off", None)):
        assert make_optimizer(model, aft.TrainConfig(amp=amp), process).half is half
    assert orthogonalized(torch.eye(2), torch.bfloat16).dtype is torch.bfloat16
    monkeypatch.setattr(Process, "any", lambda *_: True)  # another one's CPU cannot
    assert make_optimizer(model, aft.TrainConfig(), process).half is None


def test_accumulation_is_a_larger_batch(dataset, tmp_path):
    train(dataset, tmp_path / "whole", *L1_ONLY, "--epochs", 1)
    train(dataset, tmp_path / "parts", *L1_ONLY, "--epochs", 1, "--batch_size", 2, "--accumulate", 2)
    whole, parts = records(tmp_path / "whole"), records(tmp_path / "parts")
    assert [r["loss"] for r in whole] == pytest.approx([r["loss"] for r in parts], abs=1e-5)


def test_resume_continues_as_if_never_stopped(tmp_path):
    data = write_dataset(tmp_path / "data", train=12)  # 3 steps an epoch: step 5 is in the middle of one
    common = (*L1_ONLY, "--epochs", 4, "--lr", 1e-3)
    train(data, tmp_path / "straight", *common, "--max_steps", 10)
    train(data, tmp_path / "halves", *common, "--max_steps", 5, "--workers", 1)
    train(data, tmp_path / "halves", *common, "--max_steps", 10, "--resume", "auto")
    straight, halves = (records(tmp_path / name) for name in ("straight", "halves"))
    assert [r["step"] for r in halves] == list(range(1, 11))
    assert [r["loss"] for r in halves] == pytest.approx([r["loss"] for r in straight], abs=1e-6)
    one, two = (torch.load(tmp_path / name / "last.pth", weights_only=True) for name in ("straight", "halves"))
    for part in ("model", "ema"):
        for key, value in one[part].items():
            assert torch.allclose(value, two[part][key], atol=1e-6), key
    assert one["best"] == pytest.approx(two["best"])


def test_more_gpus_than_there_are(dataset):
    for start, asked in ((run, 6), (torchrun, 2)):  # under torchrun its own number counts
        process = start(SCRIPT, "--data_dir", dataset, "--gpus", 6)
        assert process.returncode != 0
        assert f"{asked} GPUs asked for, but this machine has 0; use 0 for the CPU (--gpus)" in process.stderr
    process = run(SCRIPT, "--data_dir", dataset, "--gpus", 6)
    assert process.returncode == 2 and "Traceback" not in process.stderr


def test_command_line_wins_over_the_file(tmp_path, dataset):
    config = {"data_dir": str(dataset), "gpus": 0, "img_size": 64, "width": 32, "encoder_layers": 1, "heads": 2,
              "decoder_layers": 1, "workers": 0, "batch_size": 4, "lpips_weight": 0, "epochs": 7, "lr": "1e-4",
              "checkpoint_dir": str(tmp_path / "run")}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    succeed(SCRIPT, "--config", tmp_path / "config.yaml", "--epochs", 1)
    stored = torch.load(tmp_path / "run" / "last.pth", weights_only=True)["config"]
    assert (stored["epochs"], stored["lr"], stored["width"]) == (1, 1e-4, 32)


@pytest.mark.parametrize(("text", "complaint"), [
    ("batch_sise: 8", "did you mean 'batch_size'"),
    ("batch_size: 8.5", "batch_size: expected a whole number"),
    ("augment: 1", "augment: expected true or false"),
    ("lr: fast", "lr: expected a number"),
    ("amp: fp8", "amp: 'fp8' is none of off, bf16, fp16"),
    ("epochs: 1\nepochs: 2", "'epochs' is given twice"),
    ("\tepochs: 1", "not valid YAML"),
    ("- epochs", "expected 'key: value' lines"),
])
def test_faults_in_the_yaml_name_the_key(tmp_path, text, complaint):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"config\.yaml") as error:
        read_yaml(path, aft.TrainConfig)
    assert complaint in str(error.value)


def test_shipped_config_has_every_option_and_six_gpus():
    values = read_yaml(ROOT / "transformer_train_config.yaml", aft.TrainConfig)
    assert set(values) == {field.name for field in dataclasses.fields(aft.TrainConfig)}
    assert values["gpus"] == 6


def test_learning_rate_warms_up_and_decays():
    rates = [learning_rate(step, 100, 10) for step in range(101)]
    assert rates[0] == pytest.approx(0.1) and rates[9] == 1 and max(rates) == 1
    assert rates[100] == pytest.approx(0.01) and rates == sorted(rates[:10]) + sorted(rates[10:], reverse=True)


def test_augmentation_depends_on_seed_epoch_and_index_alone(dataset):
    ids = [f"train_{i}" for i in range(8)]

    def item(seed=0, epoch=0, index=1):
        return AmodalFusionDataset(dataset, ids, 64, 5, augment=True, seed=seed)[epoch, index]

    assert torch.equal(item()["completions"], item()["completions"])
    changed = [not torch.equal(item()["completions"], item(epoch=epoch)["completions"]) for epoch in range(1, 9)]
    assert sum(changed) >= 4
    plain = AmodalFusionDataset(dataset, ids, 64, 5)[1]
    assert plain["valid"].tolist() == [True, True, True, False, False]
    assert plain["partial"][plain["mask"][..., 0] > 0].max() == 0
    assert not plain["completions"][3:].any()


def test_batches_are_augmented_as_drawn_per_scene():
    """Each scene of a batch by itself, with numpy."""
    scene = draw_scene(0)
    items = [with_draws(scene, 4, np.random.default_rng(seed) if seed else None) for seed in range(12)]
    batch = to_batch(default_collate(items), torch.device("cpu"))
    assert all(0 < sum(bool(item[name]) for item in items) < 12 for name in ("flip", "recoloured"))
    for i, item in enumerate(items):
        for name in ("partial", "original", "completions", "mask"):
            picture = item[name].numpy() / np.float32(255)
            picture = picture[..., ::-1, :] if item["flip"] else picture
            if item["recoloured"] and name != "mask":
                colours = picture[..., :3][..., item["order"].numpy()] ** item["gamma"].numpy()
                picture = np.concatenate([colours, picture[..., 3:]], -1)
            assert np.allclose(np.moveaxis(picture, -1, -3), batch[name][i], atol=2e-7), (i, name)
    assert all(torch.equal(batch[name][0], value) for name, value in to_tensors(scene, 4).items())  # bit for bit


def test_recolouring_keeps_agreement_with_the_photo():
    plain = to_tensors(draw_scene(0), 3)
    scene = {name: t.clone() for name, t in plain.items()}
    recolour({name: t[None] for name, t in scene.items()}, torch.tensor([0]), torch.tensor([[1, 2, 0]]),
             torch.tensor([[0.8, 1.3, 1.1]]))
    assert (scene["original"] - plain["original"]).abs().mean() > 0.02
    outside = plain["mask"] < 0.5
    assert torch.equal(*((scene[name] * outside) for name in ("partial", "original")))
    assert not (scene["partial"] * ~outside).any()
    before, after = ((t["completions"][:, :3] == t["original"]).all(1) for t in (plain, scene))  # exact copies
    assert before.any() and not before.all() and torch.equal(before, after)
    assert torch.equal(scene["completions"][:, 3], plain["completions"][:, 3])


def test_loss_judges_the_hole_only():
    batch = {name: t[None] for name, t in to_tensors(draw_scene(0), 3).items()}
    out = {"fused": batch["original"].clone()}
    out["fused"][..., 0, 0] += 0.5  # outside
    assert aft.fusion_loss(out, batch, None, 0)[0] == 0
    out["fused"] = torch.where(batch["mask"] > 0.5, batch["original"] + 0.25, batch["original"])
    assert aft.fusion_loss(out, batch, None, 0)[0].item() == pytest.approx(0.25, abs=1e-6)


def test_oracle_term_is_least_when_nearest_candidate_wins():
    batch = {name: t[None] for name, t in to_tensors(draw_scene(0, n=2), 2).items()}
    fill = torch.zeros_like(batch["partial"])

    def term(winner):
        logits = torch.zeros(1, 3, 64, 64)
        logits[:, winner] = 20
        out = {"fused": batch["original"], "fill": fill, "logits": logits}
        return aft.fusion_loss(out, batch, None, 0, 1.0)[1]["oracle"].item()

    batch["completions"][:, :, 3] = 1
    batch["completions"][:, 1, :3] = batch["original"]
    assert term(2) < min(term(0), term(1)) < math.inf


@pytest.mark.parametrize("half", [None, torch.bfloat16])
def test_muon_matches_the_library(half):
    """Matrices as torch's Muon, also in its bfloat16; a convolution as the matrix that it is; the rest as AdamW."""
    generator = torch.Generator().manual_seed(0)
    start = [torch.randn(shape, generator=generator) for shape in ((8, 24), (24, 8), (8, 6, 2, 2), (8,), (1, 8, 1, 1))]
    start[2] = start[2].contiguous(memory_format=torch.channels_last)
    ours = [x.clone().requires_grad_() for x in start]
    matrices = [x.clone().flatten(1).requires_grad_() for x in start[:3]]
    others = [x.clone().requires_grad_() for x in start[3:]]
    options = {"lr": 0.01, "weight_decay": 0.1}
    optimizers = (Muon(ours, **options, half=half), torch.optim.AdamW(others, **options),
                  torch.optim.Muon(matrices, **options, adjust_lr_fn="match_rms_adamw"))
    for _ in range(3):
        for mine, theirs in zip(ours, matrices + others):
            mine.grad = torch.randn(mine.shape, generator=generator)
            theirs.grad = mine.grad.reshape(theirs.shape)
        for optimizer in optimizers:
            optimizer.step()
    for mine, theirs, before in zip(ours, matrices + others, start):
        moved, expected = (mine - before).flatten(), theirs.flatten() - before.flatten()
        assert torch.nn.functional.cosine_similarity(moved, expected, 0) > (0.99 if mine.dim() > 1 else 0.999999)
        assert torch.allclose(moved.norm(), expected.norm(), rtol=0.05)
    assert torch.allclose(ours[3], others[0], atol=1e-6) and torch.allclose(ours[4], others[1], atol=1e-6)
