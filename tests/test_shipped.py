"""What ships: weights and example scenes."""

from pathlib import Path

import numpy as np
import torch

from amodal_fusion.data.images import read_image
from amodal_fusion.data.scenes import read_scene
from amodal_fusion.evaluation.rules import RULES
from amodal_fusion_transformer_inference import SHIPPED, FusionPredictor
from experiments.example_figures import gains
from tests.scripts import ROOT, succeed


def test_first_readme_command_beats_the_simple_rules(tmp_path, backbone):
    examples = ROOT / "examples" / "scenes"
    process = succeed("amodal_fusion_transformer_inference.py", "--data_dir", examples, "--output_dir",
                      tmp_path, "--lpips_weights", backbone)
    rows = [line.split("|")[1:3] for line in process.stdout.splitlines() if line.startswith("| ")]
    psnr = {name.strip(): float(cell.split()[0]) for name, cell in rows if name.strip() in ("ours", "oracle", *RULES)}
    assert psnr["ours"] > max(psnr[rule] for rule in RULES) and psnr["oracle"] > psnr["ours"]
    first, *_, last = gains(tmp_path)
    assert first == "football_camera" and last == "cactus_fox", "run experiments.example_figures and edit the READMEs"
    assert gains(tmp_path)[first] > 0 > gains(tmp_path)[last]
    for folder in filter(Path.is_dir, examples.iterdir()):
        assert read_image(tmp_path / folder.name / "fused.png", "RGB").shape == (224, 224, 3)
        assert (tmp_path / folder.name / "figure.png").exists()


def test_rim_of_a_rejected_completion_leaves_no_line():
    scene = read_scene(ROOT / "examples" / "scenes" / "bus_airplane", need_original=True)
    height, width = scene.mask.shape
    rows, columns = np.nonzero(scene.mask)
    distance = np.hypot(*(np.mgrid[:height, :width] - np.array([rows.mean(), columns.min()])[:, None, None]))
    right = np.dstack([scene.original, np.full((height, width), 255, np.uint8)])
    wrong = np.full((height, width, 4), (230, 30, 30, 0), np.uint8)
    wrong[..., 3] = 255 * np.clip((width / 4 - distance) / 6 + 0.5, 0, 1)  # reaches out of the hole; a soft rim
    assert (wrong[..., 3][~scene.mask] > 0).any() and (wrong[..., 3][scene.mask] > 0).any()
    predictor = FusionPredictor(device="cpu")
    alone, both = (predictor.fuse(scene.partial, scene.mask, completions)
                   for completions in ([right], [right, wrong]))
    assert 255 * both["weights"][1].max() < 2  # levels
    rim = (wrong[..., 3] > 0) & (wrong[..., 3] < 250) & scene.mask
    difference = np.abs(alone["fused"].astype(int) - both["fused"])
    assert rim.sum() > 100 and difference[rim].max() < 2 and difference[wrong[..., 3] == 0].max() < 2


def test_shipped_weights_are_plain_and_small():
    assert SHIPPED.stat().st_size < 30e6
    state = torch.load(SHIPPED, weights_only=True)
    assert {"kind", "version", "config", "model"} <= set(state) and "optimizer" not in state
