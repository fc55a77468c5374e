"""The inference script on a folder of scenes."""

import contextlib
import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from amodal_fusion.checkpoints import export_weights, load_checkpoint, save_checkpoint
from amodal_fusion.data.dataset_folder import write_scene_folder
from amodal_fusion.data.images import read_image, write_image
from amodal_fusion.data.scenes import write_scene
from amodal_fusion.data.toy import draw_scene
from amodal_fusion.errors import ConfigError
from amodal_fusion.evaluation.tables import METHODS, gap_with_interval, mean_and_interval, summarize, write_metrics
from amodal_fusion.files import WRITTEN, lock_run_dir, write_text
from amodal_fusion.output.records import input_digest, state_of, write_record
from amodal_fusion_transformer_inference import FusionPredictor
from tests.scripts import ROOT, Running, run, torchrun

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
        names = {f"weight_{k}.png" for k in range(1, count + 1)} | {
            "fused.png", "residual_mask.png", "guide.png", "inpaint_mask.png",
            "figure.png", "order.json", "scene.json", WRITTEN}
        assert {path.name for path in (output / folder.name).iterdir()} == names
        fused = read_image(output / folder.name / "fused.png", "RGB")
        assert np.array_equal(fused[~mask], partial[~mask]) and fused[mask].any()
        residual = read_image(output / folder.name / "residual_mask.png", "L")
        assert set(np.unique(residual)) <= {0, 255} and not residual[~mask].any()
        covered = np.max([read_image(folder / f"comp{k}.png", "RGBA")[..., 3] for k in range(1, count + 1)], 0) > 0
        assert (residual[mask & ~covered] == 255).all()
        guide = read_image(output / folder.name / "guide.png", "RGB")
        todo = read_image(output / folder.name / "inpaint_mask.png", "L") > 0
        assert np.array_equal(guide[~mask], partial[~mask]) and not todo[~mask].any()
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
    process = fuse(data, output, checkpoint, backbone, "--no-figures", "--evaluate", "--group_by", "(x)?")
    assert process.returncode == 0 and "3 scenes cut from 3 photos" in process.stdout  # that names no photo
    with open(output / "metrics.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert {row["scene"] for row in rows} == {"wide 1", "tall", "넓은 장면"}
    for row in rows:
        scores = {method: float(row[f"{method}_psnr"]) for method in METHODS}
        assert {"ours", "fill", "mean", "over_given", "over_random", "over_area", "over_lowest", "visible_fit",
                "best_one", "best_three", "oracle"} == set(METHODS)
        assert max(scores.values()) == scores["oracle"] > scores["fill"]
        assert float(row["fill_lpips"]) > float(row["oracle_lpips"]) >= 0
        assert 0 <= float(row["winner_accuracy"]) <= 1
        # the discs are given: painting over them again can only lose
        assert float(row["telea_visible_fit_psnr"]) > float(row["telea_hole_psnr"])
        assert float(row["telea_guide_psnr"]) > 5
    summary = (output / "summary.md").read_text()
    assert "| visible_fit |" in summary and "Gap closed in the hole" in summary
    assert (output / "summary.png").stat().st_size > 1000


def test_bootstrap_interval_holds_mean_and_shrinks_with_photos():
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


def test_the_gap_has_an_interval_over_photos():
    rng = np.random.default_rng(0)
    scene = rng.normal(0, 3, 400)  # easy and hard scenes are so for all methods: the gap knows nothing of that
    level = {"ours": 19, "visible_fit": 18, "oracle": 20}
    table = {f"{method}_psnr": scene + level.get(method, 10) for method in METHODS}
    assert gap_with_interval(table, np.arange(400), "psnr") == ("visible_fit", pytest.approx((0.5, 0.5, 0.5)))
    table["ours_psnr"] += rng.normal(0, 2, 400)
    _, (gap, low, high) = gap_with_interval(table, np.arange(400), "psnr")
    assert low < gap < high and (high - low) / 2 == pytest.approx(1.96 * 2 / 2 / 20, rel=0.25)
    for photos in (1, 4):  # too few for an interval
        assert np.isnan(gap_with_interval(table, np.arange(400) % photos, "psnr")[1][1:]).all()
    table["visible_fit_psnr"] = table["oracle_psnr"] + 1
    text = summarize(table | {name: np.full(400, 0.2) for name in ("hole", "completions", "overlap")},
                     {}, np.arange(400))
    assert "nan" not in text and "to the oracle: – (the rule is better" in text and "| – |" in text


def test_metrics_without_values_are_left_out_of_table(tmp_path):
    rng = np.random.default_rng(0)
    rows = [{"scene": name, "photo": name[1], "completions": 1, "hole": 0.2, "overlap": 0.0, "winner_accuracy": None,
             "ours_undecided": 0.5} | {f"{method}_{metric}": number for method in METHODS for metric, number in (
                 ("psnr", 30 if method == "oracle" else rng.uniform(10, 20)), ("psnr_overlap", None), ("ssim", 0.5),
                 ("l1", 0.1))}
            for name in ("=2+3", "b3")]
    text = write_metrics(tmp_path, iter(rows))
    assert "nan" not in text and "PSNR overlap" not in text and "LPIPS" not in text
    assert "2 scenes cut from 2 photos" in text and "| 0.5000 |" in text
    assert "2 scenes cut from 1 photo, " in write_metrics(tmp_path, [row | {"photo": "p"} for row in rows])
    lines = (tmp_path / "metrics.csv").read_text().splitlines()
    assert "psnr_overlap" not in lines[0] and [line.split(",")[0] for line in lines[1:]] == ["'=2+3", "b3"]
    assert [line.split(",")[1] for line in lines] == ["photo", "p", "p"]
    assert write_metrics(tmp_path, []) is None


def rows_of(output):
    with open(output / "metrics.csv", newline="", encoding="utf-8") as file:
        return {row["scene"]: row for row in csv.DictReader(file)}


def test_resumed_run_never_takes_other_outputs_as_own(tmp_path, checkpoint, backbone):
    data, output = write_test_folder(tmp_path / "test"), tmp_path / "out"
    assert fuse(data, output, checkpoint, backbone, "--img_size", 64).returncode == 0
    rows, text = rows_of(output), (output / "summary.md").read_text()

    # interrupted: what was done stays, metrics included
    (output / "tall" / "fused.png").unlink()
    write_image(data / "wide 1" / "comp2.png", read_image(data / "wide 1" / "comp1.png", "RGBA"))
    marker = output / "넓은 장면" / "fused.png"
    time_before = marker.stat().st_mtime_ns
    process = fuse(data, output, checkpoint, backbone, "--img_size", 64)
    assert process.returncode == 0, process.stderr
    assert "2 of 4 scenes are done" in process.stdout and "2 scenes are recomputed" in process.stdout
    assert marker.stat().st_mtime_ns == time_before and (output / "tall" / "fused.png").exists()
    again = rows_of(output)
    assert {name for name in rows if again[name] == rows[name]} == {"tall", "넓은 장면"}

    # other weights or options are refused before anything is written
    export_weights(checkpoint, tmp_path / "weights.pth")
    state = load_checkpoint(tmp_path / "weights.pth")
    next(iter(state["model"].values())).add_(0.01)
    save_checkpoint(tmp_path / "weights.pth", state)
    for weights, size, sharpness in ((checkpoint, 80, 1), (checkpoint, 64, 2), (tmp_path / "weights.pth", 64, 1)):
        process = fuse(data, output, weights, backbone, "--img_size", size, "--sharpness", sharpness)
        assert process.returncode == 2 and "were made by other weights, by another version" in process.stderr
    assert marker.stat().st_mtime_ns == time_before and rows_of(output) == again

    # with --overwrite nothing stays of the earlier runs
    process = fuse(data, output, checkpoint, backbone, "--overwrite", "--no-figures", "--n_max_completions", 2)
    assert process.returncode == 0 and marker.stat().st_mtime_ns != time_before
    assert not list(output.glob("*/weight_3.png")) and not list(output.glob("*/figure.png"))
    for folder in data.iterdir():
        total = sum(read_weight(output / folder.name / f"weight_{k}.png") for k in (1, 2))
        assert total.max() <= 1.0001
    assert (output / "summary.md").read_text() != text

    # nor a table of them, when this run makes none; the report is written again
    process = fuse(data, output, checkpoint, backbone, "--no-figures", "--n_max_completions", 2, "--no-metrics",
                   "--report")
    assert process.returncode == 0 and (output / "metrics.csv").exists() and (output / "report.html").exists()
    process = fuse(data, output, checkpoint, backbone, "--no-figures", "--overwrite", "--no-metrics")
    assert process.returncode == 0 and {path.name for path in output.iterdir() if path.is_file()} == {
        ".lock", WRITTEN, "report.html"}
    assert "metrics.csv, summary.md, summary.png removed" in process.stdout and "report: " in process.stdout


def test_scene_that_fails_loses_its_earlier_outputs(tmp_path, checkpoint, backbone):
    data, output = write_test_folder(tmp_path / "test"), tmp_path / "out"
    assert fuse(data, output, checkpoint, backbone, "--no-figures").returncode == 0
    (output / "tall" / "mine.txt").write_text("stays")
    (data / "tall" / "comp1.png").write_bytes(b"broken since")
    process = fuse(data, output, checkpoint, backbone, "--no-figures", "--overwrite")
    assert process.returncode == 1 and "Means over 2 scenes" in process.stdout  # of four, one without an original
    assert "tall" not in rows_of(output)
    assert {path.name for path in (output / "tall").iterdir()} == {"mine.txt", WRITTEN}


def test_outputs_of_another_network_version_are_refused(tmp_path, checkpoint, backbone):
    data, output = write_test_folder(tmp_path / "test"), tmp_path / "out"
    fuse(data, output, checkpoint, backbone, "--no-figures", "--no-metrics")
    record = json.loads((output / "tall" / "scene.json").read_text())
    record["made_by"]["network"] = 0
    write_text(output / "tall" / "scene.json", json.dumps(record), owned=True)
    process = fuse(data, output, checkpoint, backbone, "--no-figures", "--no-metrics")
    assert process.returncode == 2 and "1 of the scenes" in process.stderr and '"network": 0' in process.stderr
    process = fuse(data, output, checkpoint, backbone, "--no-figures", "--no-metrics", "--overwrite")
    assert process.returncode == 0 and "4 scenes fused" in process.stdout


def test_other_lpips_backbone_recomputes_metrics(tmp_path, checkpoint, backbone):
    data, output = write_test_folder(tmp_path / "test"), tmp_path / "out"
    fuse(data, output, checkpoint, backbone, "--no-figures")
    record = json.loads((output / "tall" / "scene.json").read_text())
    other = json.dumps(record | {"asked": record["asked"] | {"lpips": "vgg"}})
    write_text(output / "tall" / "scene.json", other, owned=True)
    process = fuse(data, output, checkpoint, backbone, "--no-figures")
    assert "3 of 4 scenes are done" in process.stdout
    assert json.loads((output / "tall" / "scene.json").read_text()) == record


def test_locked_folder_and_undecodable_names_are_refused(tmp_path, checkpoint, backbone):
    data, output = write_test_folder(tmp_path / "test"), tmp_path / "out"
    lock = lock_run_dir(output)
    process = fuse(data, output, checkpoint, backbone)
    assert process.returncode == 2 and "another run is writing to it" in process.stderr
    lock.close()
    os.mkdir(os.fsencode(data) + b"/a\xff")
    write_image(data / os.fsdecode(b"a\xff") / "mask.png", np.zeros((8, 8), np.uint8))
    process = fuse(data, output, checkpoint, backbone)
    assert process.returncode == 1 and "the name of the folder a\\xff is not UTF-8" in process.stderr
    assert "Traceback" not in process.stderr


def read_weight(path):
    with Image.open(path) as image:
        return np.asarray(image) / 65535


def test_another_data_set_has_its_own_table(tmp_path, checkpoint, backbone):
    data, output = write_test_folder(tmp_path / "test"), tmp_path / "out"
    assert fuse(data, output, checkpoint, backbone, "--no-figures").returncode == 0
    (tmp_path / "more" / "=1+2").mkdir(parents=True)
    write_scene(tmp_path / "more" / "=1+2", draw_scene(9))
    (tmp_path / "more" / "-broken").mkdir()
    (tmp_path / "more" / "-broken" / "mask.png").write_bytes(b"")
    process = fuse(tmp_path / "more", output, checkpoint, backbone, "--no-figures")
    assert process.returncode == 1 and "Means over 1 scenes" in process.stdout
    assert set(rows_of(output)) == {"'=1+2"}
    assert "\n'-broken," in (output / "failed.csv").read_text()


def test_several_processes_write_the_same_bytes(tmp_path, checkpoint, backbone):
    data = write_test_folder(tmp_path / "test")
    for seed in range(6):
        (data / f"more_{seed}").mkdir()
        write_scene(data / f"more_{seed}", draw_scene(seed, (60, 100), 1 + seed % 3))
    (data / "bad").mkdir()
    (data / "bad" / "mask.png").write_bytes(b"")
    options = ("--data_dir", data, "--checkpoint", checkpoint, "--lpips_weights", backbone, "--workers", 1,
               "--batch_size", 2, "--gpus", 0)
    one = run(SCRIPT, "--output_dir", tmp_path / "one", *options)
    two = torchrun(SCRIPT, "--output_dir", tmp_path / "two", *options)
    assert one.returncode == two.returncode == 1
    for process in (one, two):
        assert process.stdout.count("10 scenes fused into") == 1 and process.stdout.count("Means over 9 scenes") == 1
        assert process.stderr.count("bad/mask.png") == 1, process.stderr
    files = [{path.relative_to(folder): path.read_bytes() for path in folder.rglob("*")
              if path.is_file() and path.name != WRITTEN}
             for folder in (tmp_path / "one", tmp_path / "two")]
    assert files[0].keys() == files[1].keys() and len(files[0]) > 50
    assert [name for name in files[0] if files[0][name] != files[1][name]] == []


def test_broken_scene_is_named_and_others_are_done(tmp_path, checkpoint, backbone):
    data, output = write_test_folder(tmp_path / "test"), tmp_path / "out"
    broken = data / "tall" / "comp2.png"
    broken.write_bytes(broken.read_bytes()[:50])
    (data / "list.txt").write_text("tall\r\nwide 1\r\n", encoding="utf-8-sig")
    process = fuse(data, output, checkpoint, backbone, "--list", data / "list.txt", "--no-metrics", "--no-figures")
    assert process.returncode == 1
    assert "tall" in process.stderr and "comp2.png" in process.stderr and "Traceback" not in process.stderr
    assert (output / "wide 1" / "fused.png").exists() and not (output / "no_original").exists()


def test_missing_gpu_is_reported(tmp_path, checkpoint, backbone):
    data = write_test_folder(tmp_path / "test")
    process = fuse(data, tmp_path / "out", checkpoint, backbone, "--gpus", 1)
    assert process.returncode == 2
    assert "1 GPU asked for, but this machine has 0; use 0 for the CPU (--gpus)" in process.stderr


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
    folders = ("--data_dir", tmp_path, "--output_dir", tmp_path / "out", "--checkpoint", checkpoint)
    for arguments, complaint in (
        (("--data_dir", ""), "data_dir"), ((*folders, "--img_size", "big"), "img_size"),
        ((*folders, "--device", "cuda"), "no GPU"), ((*folders, "--group_by", "("), "not a regular expression"),
        ((*folders[:2], "--output_dir", tmp_path), "is the folder of the scenes; choose another one (--output_dir)"),
    ):
        process = run(SCRIPT, *arguments)
        assert process.returncode == 2 and complaint in process.stderr.splitlines()[-1]


def test_missing_device_is_named():
    with pytest.raises(ConfigError, match="device gpu7: "):
        FusionPredictor(device="gpu7")


def test_unusual_names_and_links(tmp_path, checkpoint):
    data, output = write_test_folder(tmp_path / "test"), tmp_path / "out"
    (data / "list.txt").write_text("tall\nno_original\nwide 1\n")
    output.mkdir()
    (tmp_path / "elsewhere").mkdir()
    (output / "tall").symlink_to(tmp_path / "elsewhere")
    (output / "wide 1").symlink_to(data / "wide 1")
    process = run(SCRIPT, "--input_dir", data, "--image_list", data / "list.txt", "--output_dir", output, "--config",
                  "train.yaml", "--checkpoint", checkpoint, "--d_model", 256, "--nhead", 8, "--num_workers", 1,
                  "--no-metrics", "--no-figures")
    assert process.returncode == 1
    for name in ("config train.yaml", "d_model 256", "nhead 8"):
        assert process.stderr.count(f"{name} is not used: the checkpoint decides") == 1
    assert (output / "no_original" / "fused.png").exists()
    assert "tall: is a link, and links are not followed" in process.stderr
    assert not any((tmp_path / "elsewhere").iterdir())
    assert "is the scene's own folder" in process.stderr and not (data / "wide 1" / "fused.png").exists()


def test_raw_results_get_the_command_that_prepares_them(tmp_path, checkpoint):
    raw = tmp_path / "results" / "Places365_val_00000007"
    raw.mkdir(parents=True)
    for name in ("", "_partial", "_comp1"):
        Image.new("RGB", (8, 8)).save(raw / f"{raw.name}{name}.jpg")
    process = run(SCRIPT, "--data_dir", raw.parent, "--output_dir", tmp_path / "out", "--checkpoint", checkpoint)
    assert process.returncode == 1
    assert f"prepare_dataset.py create --input_dir {raw.parent} --output_dir {raw.parent}_scenes" in process.stderr


def test_ctrl_c_is_one_line_and_ends_helpers(tmp_path, checkpoint):
    data = tmp_path / "data"
    for seed in range(300):
        (data / f"s{seed}").mkdir(parents=True)
        write_scene(data / f"s{seed}", draw_scene(seed % 3))
    arguments = (SCRIPT, "--data_dir", data, "--output_dir", tmp_path / "out", "--checkpoint", checkpoint,
                 "--no-metrics", "--workers", 2)
    for number, status in ((signal.SIGINT, 130), (signal.SIGKILL, -signal.SIGKILL)):
        done = len(list(tmp_path.glob("out/*/fused.png")))
        process = Running(*arguments)
        while len(list(tmp_path.glob("out/*/fused.png"))) < done + 3:
            time.sleep(0.05)
        os.killpg(process.pid, number) if number == signal.SIGINT else os.kill(process.pid, number)
        finished = process.finish(30)
        assert finished.returncode == status, finished.stderr
        if number == signal.SIGINT:
            assert finished.stderr == "stopped; finished scenes stay, the same command resumes\n"
            assert len(list(tmp_path.glob("out/*/fused.png"))) < 300
        until = time.monotonic() + 10
        while members(process.pid) and time.monotonic() < until:
            time.sleep(0.1)
        assert members(process.pid) == []
    assert not [path for path in tmp_path.glob("out/*/weight_*.png") if read_weight(path).max() > 1.0001]


def members(group):
    """Processes of a process group that are still there, zombies left out."""
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = status.read_text().rsplit(")", 1)[1].split()
            if int(fields[2]) == group and fields[0] != "Z":
                found.append(status.parent.name)
    return found


def test_without_fcntl_and_on_an_ascii_terminal(tmp_path, checkpoint):
    (tmp_path / "data" / "넓은").mkdir(parents=True)
    (tmp_path / "data" / "넓은" / "mask.png").write_bytes(b"")
    arguments = ["--data_dir", tmp_path / "data", "--output_dir", tmp_path / "out", "--checkpoint", checkpoint]
    code = (f"import sys, runpy; sys.modules['fcntl'] = None; import prepare_dataset; "
            f"sys.argv = {[SCRIPT, *map(str, arguments), '--workers', '0']}; runpy.run_path({SCRIPT!r}, "
            "run_name='__main__')")
    process = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60,
                             check=False, env=os.environ | {"PYTHONIOENCODING": "ascii"})
    assert process.returncode == 1 and "??/mask.png" in process.stderr and "Traceback" not in process.stderr


FOREIGN = ("metrics.csv", "summary.md", "report.html", "failed.csv", "fused.png", "figure.png", "weight_7.png",
           "order.json", ".draft.tmp.md", ".notes.tmp", ".git", "thesis.txt", "scenes.csv", "guide.png", "mine.png")


def scatter(rng, folders):
    """Put files of somebody else into folders, each with some of FOREIGN; {path: bytes}."""
    written = {}
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
        for name in rng.choice(FOREIGN, rng.integers(0, 4), replace=False):
            if not (folder / name).exists():
                written[folder / name] = rng.bytes(20)
                (folder / name).write_bytes(written[folder / name])
    return written


@pytest.mark.parametrize("seed", range(6))
def test_files_of_others_survive_every_run(tmp_path, checkpoint, backbone, seed):
    rng = np.random.default_rng(seed)
    data, output, to = write_test_folder(tmp_path / "test"), tmp_path / "out", tmp_path / "to"
    (data / "wide 1" / "comp2.png").write_bytes(b"broken")
    if seed % 2:
        fuse(data, output, checkpoint, backbone, "--handover", "iopaint", to)
    foreign = scatter(rng, [tmp_path, output, output / "tall", output / "wide 1", output / "other", to, to / "images"])
    options = (("--report", "--handover", "iopaint", to), ("--overwrite", "--no-metrics", "--no-figures"),
               ("--overwrite", "--handover", "lama", to), ("--n_max_completions", 1))
    for number in rng.permutation(len(options))[:3]:
        process = fuse(data, output, checkpoint, backbone, *options[number])
        assert process.returncode in (1, 2) and "Traceback" not in process.stderr
        assert {path: path.read_bytes() for path in foreign} == foreign


def test_linked_scene_folders_keep_their_files(tmp_path, checkpoint, backbone):
    data, output = write_test_folder(tmp_path / "test"), tmp_path / "out"
    output.mkdir()
    (data / "tall").rename(output / "tall")
    (data / "tall").symlink_to(output / "tall")
    foreign = scatter(np.random.default_rng(0), [output / "tall"] * 9)
    before = {path: path.read_bytes() for path in (output / "tall").iterdir()}
    process = fuse(data, output, checkpoint, backbone, "--overwrite")
    assert process.returncode == 1 and "is the scene's own folder" in process.stderr
    assert len(foreign) > 5 and {path: path.read_bytes() for path in (output / "tall").iterdir()} == before


@pytest.mark.parametrize("letter", ["\r", "\x85", "\u2029", "\x1b"])
def test_names_that_no_font_draws_are_fused(tmp_path, checkpoint, backbone, letter):
    for name in (f"a{letter}b", "plain"):
        (tmp_path / "test" / name).mkdir(parents=True)
        write_scene(tmp_path / "test" / name, draw_scene(1, 64, 2))
    process = fuse(tmp_path / "test", tmp_path / "out", checkpoint, backbone)
    assert process.returncode == 0, process.stderr
    assert (tmp_path / "out" / f"a{letter}b" / "figure.png").exists()


def test_ids_that_one_disk_joins_are_refused(tmp_path, checkpoint, backbone):
    for name in ("Hall", "hall"):
        (tmp_path / "test" / name).mkdir(parents=True)
        write_scene(tmp_path / "test" / name, draw_scene(1, 64, 2))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".lock").touch()
    os.link(tmp_path / "out" / ".lock", tmp_path / "out" / ".LOCK")  # as a disk that ignores case shows it
    process = fuse(tmp_path / "test", tmp_path / "out", checkpoint, backbone)
    assert process.returncode == 2 and "hall and Hall would be one folder" in process.stderr
    assert not [path for path in (tmp_path / "out").iterdir() if path.is_dir()]


def test_a_limit_that_changes_nothing_continues(tmp_path):
    write_scene_folder(tmp_path, draw_scene(1, n=3, scene_id="in"))
    (tmp_path / "out").mkdir()
    made_by = {"checkpoint": "x", "n_max_completions": None}
    write_record(tmp_path / "out", made_by, input_digest(tmp_path / "in"), None, {})
    (tmp_path / "out" / "fused.png").touch()

    def state(**options):
        return state_of(tmp_path / "out", tmp_path / "in", made_by | options, lambda _: True)

    assert state() == state(n_max_completions=3) == state(n_max_completions=9) == "done"
    assert state(n_max_completions=2) == state(checkpoint="y") == "other"
