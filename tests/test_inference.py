"""The inference script on a folder of scenes."""

import csv

import numpy as np
import pytest
import torch
from PIL import Image

from amodal_fusion_transformer import load_model
from amodal_fusion_transformer_inference import fuse_scenes, network_size
from fusion.data.images import read_image, write_image
from fusion.data.scenes import write_scene
from fusion.data.toy import draw_scene
from fusion.evaluation import METHODS, mean_and_interval, write_metrics
from fusion.training.checkpoints import export_weights
from tests.scripts import run

SCRIPT = "amodal_fusion_transformer_inference.py"


def write_test_folder(folder):
    """Scenes of different sizes and numbers of completions, one without an original."""
    sizes = {"wide 1": ((60, 100), 2), "tall": ((97, 50), 3), "넓은 장면": ((60, 100), 4), "no_original": ((64, 64), 2)}
    for seed, (name, (size, n)) in enumerate(sizes.items()):
        (folder / name).mkdir(parents=True)
        scene = draw_scene(seed, size, n, name)
        if name == "no_original":
            scene.original = None
        write_scene(folder / name, scene)
    return folder


def fuse(data, output, checkpoint, backbone, *arguments):
    return run(SCRIPT, "--data_dir", data, "--output_dir", output, "--checkpoint", checkpoint,
               "--lpips_weights", backbone, "--workers", 1, *arguments)


def test_inference_writes_every_output_at_the_scenes_size(tmp_path, checkpoint, backbone):
    data, output = write_test_folder(tmp_path / "test"), tmp_path / "out"
    process = fuse(data, output, checkpoint, backbone, "--n_max_completions", 3, "--img_size", 64)
    assert process.returncode == 0, process.stderr
    for folder in data.iterdir():
        mask = read_image(folder / "mask.png", "L") > 0
        partial = read_image(folder / "partial.png", "RGB")
        count = min(3, len(list(folder.glob("comp*.png"))))
        names = {f"weight_{k}.png" for k in range(1, count + 1)} | {"fused.png", "residual_mask.png", "figure.png"}
        assert {path.name for path in (output / folder.name).iterdir()} == names
        fused = read_image(output / folder.name / "fused.png", "RGB")
        assert np.array_equal(fused[~mask], partial[~mask]) and fused[mask].any()
        residual = read_image(output / folder.name / "residual_mask.png", "L")
        assert set(np.unique(residual)) <= {0, 255} and not residual[~mask].any()
        covered = np.max([read_image(folder / f"comp{k}.png", "RGBA")[..., 3] for k in range(1, count + 1)], 0) > 0
        assert (residual[mask & ~covered] == 255).all()
        total = np.zeros(mask.shape)
        for k in range(1, count + 1):
            with Image.open(output / folder.name / f"weight_{k}.png") as image:
                assert image.mode == "I;16" and image.size == mask.shape[::-1]
                weight = np.asarray(image) / 65535
            assert not weight[read_image(folder / f"comp{k}.png", "RGBA")[..., 3] == 0].any()
            total += weight
        assert total.max() <= 1.0001 and total[mask & covered].max() > 0.5


def test_metrics_stand_beside_rules_and_oracle(tmp_path, checkpoint, backbone):
    data, output = write_test_folder(tmp_path / "test"), tmp_path / "out"
    assert fuse(data, output, checkpoint, backbone, "--no-figures", "--evaluate").returncode == 0
    with open(output / "metrics.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert {row["scene"] for row in rows} == {"wide 1", "tall", "넓은 장면"}
    for row in rows:
        scores = {method: float(row[f"{method}_psnr"]) for method in METHODS}
        assert {"ours", "fill", "mean", "over_given", "over_random", "over_area", "over_lowest", "visible_fit",
                "oracle"} == set(METHODS)
        assert max(scores.values()) == scores["oracle"] > scores["fill"]
        assert float(row["fill_lpips"]) > float(row["oracle_lpips"]) >= 0
        assert 0 <= float(row["winner_accuracy"]) <= 1
        # the discs are given: painting over them again can only lose
        assert float(row["telea_visible_fit_psnr"]) > float(row["telea_hole_psnr"])
    summary = (output / "summary.md").read_text()
    assert "| visible_fit |" in summary and "Gap closed in the hole" in summary
    assert (output / "summary.png").stat().st_size > 1000


def test_bootstrap_interval_holds_the_mean_and_shrinks_with_photos():
    rng = np.random.default_rng(0)
    for count in (20, 2000):
        values = rng.normal(20, 3, count)
        table = {"psnr": np.append(values, np.nan)}
        mean, low, high = mean_and_interval(table, np.arange(count + 1))["psnr"]
        assert low < mean < high and mean == pytest.approx(values.mean())
        assert (high - low) / 2 == pytest.approx(1.96 * values.std() / count ** 0.5, rel=0.2)
    # twenty holes in each photo, all alike: no more is known than from one hole each
    photo = np.repeat(np.arange(100), 20)
    (_, low, high), (_, wrong_low, wrong_high) = (
        mean_and_interval({"psnr": values[:100][photo]}, group)["psnr"] for group in (photo, np.arange(2000)))
    assert (high - low) / 2 == pytest.approx(1.96 * values[:100].std() / 10, rel=0.2)
    assert high - low > 3 * (wrong_high - wrong_low)


def test_what_no_scene_has_is_left_out_of_the_table(tmp_path):
    rng = np.random.default_rng(0)
    rows = [{"scene": name, "photo": name[1], "completions": 1, "hole": 0.2, "overlap": 0.0, "winner_accuracy": None,
             "ours_undecided": 0.5} | {f"{method}_{metric}": number for method in METHODS for metric, number in (
                 ("psnr", 30 if method == "oracle" else rng.uniform(10, 20)), ("psnr_overlap", None), ("ssim", 0.5),
                 ("l1", 0.1))}
            for name in ("=2+3", "b3")]
    text = write_metrics(tmp_path, iter(rows))
    assert "nan" not in text and "PSNR overlap" not in text and "LPIPS" not in text
    assert "2 scenes cut from 2 photos" in text and "| 0.5000 |" in text
    lines = (tmp_path / "metrics.csv").read_text().splitlines()
    assert "psnr_overlap" not in lines[0] and [line.split(",")[0] for line in lines[1:]] == ["'=2+3", "b3"]
    assert write_metrics(tmp_path, []) is None


def test_existing_outputs_are_kept_unless_overwritten(tmp_path, checkpoint, backbone):
    data, output = write_test_folder(tmp_path / "test"), tmp_path / "out"
    assert fuse(data, output, checkpoint, backbone, "--no-figures", "--no-metrics").returncode == 0
    (output / "tall" / "fused.png").unlink()
    marker = output / "wide 1" / "fused.png"
    marker.write_bytes(b"mine")
    process = fuse(data, output, checkpoint, backbone, "--no-figures")
    assert process.returncode == 0 and "3 of 4 scenes are done already" in process.stdout
    assert marker.read_bytes() == b"mine" and (output / "tall" / "fused.png").exists()
    assert fuse(data, output, checkpoint, backbone, "--no-figures", "--overwrite").returncode == 0
    assert marker.read_bytes() != b"mine"


def test_a_broken_scene_is_named_and_the_others_are_done(tmp_path, checkpoint, backbone):
    data, output = write_test_folder(tmp_path / "test"), tmp_path / "out"
    broken = data / "tall" / "comp2.png"
    broken.write_bytes(broken.read_bytes()[:50])
    (data / "list.txt").write_text("tall\r\nwide 1\r\n", encoding="utf-8-sig")
    process = fuse(data, output, checkpoint, backbone, "--list", data / "list.txt", "--no-metrics", "--no-figures")
    assert process.returncode == 1
    assert "tall" in process.stderr and "comp2.png" in process.stderr and "Traceback" not in process.stderr
    assert (output / "wide 1" / "fused.png").exists() and not (output / "no_original").exists()


def test_raw_results_are_refused_with_the_remedy(tmp_path, checkpoint, backbone):
    scene = draw_scene(0)
    (tmp_path / "raw" / "s").mkdir(parents=True)
    write_scene(tmp_path / "raw" / "s", scene)
    white = np.where(scene.completions[0][..., 3:] > 0, scene.completions[0][..., :3], 255).astype(np.uint8)
    write_image(tmp_path / "raw" / "s" / "comp1.png", white)
    process = fuse(tmp_path / "raw", tmp_path / "out", checkpoint, backbone)
    assert process.returncode == 1 and "prepare_dataset.py create" in process.stderr


@pytest.mark.parametrize(("content", "complaint"), [
    (None, "no such checkpoint"),
    (b"", "not a whole checkpoint"),
    ("truncated", "not a whole checkpoint"),
    ("flipped", "fails its checksum"),
    ({"weights": 1}, "not a checkpoint of amodal_fusion_transformer.py"),
    (print, "pickled code"),
])
def test_checkpoints_of_another_kind(tmp_path, checkpoint, content, complaint):
    path = tmp_path / "model.pth"
    whole = checkpoint.read_bytes()
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content == "truncated":
        path.write_bytes(whole[: len(whole) // 2])
    elif content == "flipped":
        middle = len(whole) // 2
        path.write_bytes(whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :])
    elif content is not None:
        torch.save(content, path)
    write_test_folder(tmp_path / "test")
    process = run(SCRIPT, "--data_dir", tmp_path / "test", "--output_dir", tmp_path / "out", "--checkpoint", path)
    assert process.returncode == 1 and "Traceback" not in process.stderr
    assert complaint in process.stderr and "model.pth" in process.stderr


def test_wrong_usage_exits_with_2(tmp_path, checkpoint):
    folders = ("--data_dir", tmp_path, "--output_dir", tmp_path, "--checkpoint", checkpoint)
    for arguments in (("--data_dir", ""), (*folders, "--img_size", "big"), (*folders, "--device", "cuda")):
        assert run(SCRIPT, *arguments).returncode == 2


def test_batching_changes_nothing(checkpoint):
    model, _ = load_model(checkpoint)
    scenes = [draw_scene(seed, (50, 70), n) for seed, n in ((0, 1), (1, 4))]
    together = fuse_scenes(model, scenes, (64, 64), torch.device("cpu"))
    for scene, result in zip(scenes, together):
        (alone,) = fuse_scenes(model, [scene], (64, 64), torch.device("cpu"))
        assert torch.allclose(alone["fused"], result["fused"], atol=1e-5)
        total = result["weights"].sum(1, keepdim=True) + result["residual"]
        assert torch.allclose(total, torch.ones_like(total), atol=1e-5)


def test_exported_weights_fuse_alike_and_are_small(tmp_path, checkpoint):
    export_weights(checkpoint, tmp_path / "weights.pth")
    assert (tmp_path / "weights.pth").stat().st_size < 0.4 * checkpoint.stat().st_size
    device, scene = torch.device("cpu"), draw_scene(0)
    (one,), (two,) = (fuse_scenes(load_model(path)[0], [scene], (64, 64), device)
                      for path in (checkpoint, tmp_path / "weights.pth"))
    assert torch.equal(one["fused"], two["fused"])


def test_network_size_keeps_aspect_and_area():
    assert network_size((256, 256), 256) == (256, 256)
    assert network_size((1080, 1920), 256) == (192, 336)
    assert network_size((10, 1000), 64) == (16, 640)
