"""Pictures that an inpainter made of a handed-over folder come back and are measured."""

import csv
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from amodal_fusion.checkpoints import load_checkpoint, save_checkpoint
from amodal_fusion.data.images import read_image, write_image
from amodal_fusion.errors import ConfigError, SceneError, UserError
from amodal_fusion.evaluation.image_networks import load_clip, load_fid
from amodal_fusion.evaluation.perceptual import PerceptualLoss
from amodal_fusion.output.handover import CONSUMERS, write_handover
from amodal_fusion.output.results import Results, parse_results
from amodal_fusion_transformer_inference import FusionPredictor
from tests.scripts import run
from tests.test_inference import fuse, write_test_folder
from tests.test_outputs import write_fused

SCENES = ["wide", "a_mask_shop"]


def results(data, *specs, **options):
    given = {"clip_weights": None, "clip_net": "ViT-B-32", "fid_weights": None, **options}
    return Results(SimpleNamespace(results=specs, data_dir=data, **given), SCENES, None)


def inpaint(handed, made, consumer, grey=90):
    """An inpainter that draws grey; it names its pictures as the consumer does."""
    rules = CONSUMERS[consumer]
    made.mkdir(parents=True, exist_ok=True)
    with open(handed / "scenes.csv", newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            stem = row["file"].removesuffix(".png")
            picture = read_image(handed / rules.image.format(stem), "RGB")
            drawn = read_image(handed / rules.mask.format(stem), "L")[..., None] == rules.hole
            picture = np.where(drawn, grey, picture)
            name = f"{stem}_mask.png" if consumer == "lama" else f"{stem}.png"
            write_image(made / name, picture.astype(np.uint8))


@pytest.mark.parametrize("consumer", CONSUMERS)
def test_results_of_each_consumer_are_measured(tmp_path, consumer):
    data, output = write_fused(tmp_path)
    for given in ("guide", "hole"):
        handed = tmp_path / "to" / given
        write_handover(consumer, handed, data, output, SCENES, 3, given)
        inpaint(handed, tmp_path / "to_results" / given, consumer)
    found = results(data, f"grey={tmp_path / 'to_results'}")
    rows = {scene_id: found.measure(scene_id) for scene_id in SCENES}
    for scene_id, row in rows.items():
        guide = read_image(output / scene_id / "guide.png", "RGB")
        hole = read_image(data / scene_id / "mask.png", "L")
        assert row["grey_guide_psnr"] > row["grey_hole_psnr"]
        assert row["grey_hole_psnr_whole"] > row["grey_hole_psnr"]
        grey = np.where(hole[..., None] > 0, 90, guide)  # write_fused's guide is the original
        error = (grey[hole > 0] / 255 - guide[hole > 0] / 255) ** 2
        assert row["grey_hole_psnr"] == pytest.approx(-10 * np.log10(error.mean()), abs=0.1)


def test_wrong_results_are_refused_by_name(tmp_path):
    data, output = write_fused(tmp_path)
    handed, made = tmp_path / "to", tmp_path / "elsewhere"
    write_handover("iopaint", handed, data, output, SCENES)
    inpaint(handed, made, "iopaint")
    with pytest.raises(SceneError, match=r"no scenes\.csv here"):
        results(data, f"grey={made}")
    (made / "scenes.csv").write_bytes((handed / "scenes.csv").read_bytes())
    results(data, f"grey={made}").measure("wide")
    picture = read_image(made / "wide.png", "RGB")
    with pytest.raises(ConfigError, match="given twice"):
        results(data, f"grey={made}", f"grey={made}")

    write_image(made / "wide.png", picture[:-9])
    with pytest.raises(SceneError, match=r"wide\.png: 100×51 pixels; expected 100×60, as handed over"):
        results(data, f"grey={made}").measure("wide")
    write_image(made / "wide.png", 255 - picture)
    with pytest.raises(SceneError, match=r"wide\.png: differs from the photo of wide by .* another scene"):
        results(data, f"grey={made}").measure("wide")
    (made / "wide.png").rename(made / "wide_out.png")
    with pytest.raises(SceneError, match=r"wide\.png: missing.*1 of 2 .*wide_out\.png is of no scene: is it misnamed"):
        results(data, f"grey={made}")
    write_image(made / "wide.png", picture)
    with pytest.raises(SceneError, match=r"wide_out\.png: belongs to no scene"):
        results(data, f"grey={made}")
    (made / "wide_out.png").unlink()
    write_handover("iopaint", handed, data, output, ["wide"])
    (made / "scenes.csv").write_bytes((handed / "scenes.csv").read_bytes())
    (made / "a_mask_shop.png").unlink()
    with pytest.raises(SceneError, match="a_mask_shop was not handed over"):
        results(data, f"grey={made}")
    for spec, wrong in (("grey", "NAME=DIR"), ("a_b=.", "NAME=DIR"), (f"grey={tmp_path / 'none'}", "no such folder")):
        with pytest.raises(ConfigError, match=wrong):
            parse_results([spec])


def test_results_stand_in_table_and_report(tmp_path, checkpoint, backbone):
    data, output = write_test_folder(tmp_path / "test"), tmp_path / "out"
    to = tmp_path / "to"
    options = ("--no-figures", "--handover", "lama", to, "--handover_given", "guide", "hole", "visible_fit")
    assert fuse(data, output, checkpoint, backbone, *options).returncode == 0
    for given in ("guide", "hole", "visible_fit"):
        inpaint(to / given, tmp_path / "to_results" / given, "lama")
    process = fuse(data, output, checkpoint, backbone, "--no-figures", "--report", "--results",
                   f"grey={tmp_path / 'to_results'}")
    assert process.returncode == 0, process.stderr
    assert "4 of 4 scenes are done" in process.stdout
    assert "| grey | guide | " in process.stdout and "| inpainter | less the bare hole |" in process.stdout
    with open(output / "metrics.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 3 and all(float(row["grey_guide_lpips_whole"]) >= 0 for row in rows)
    assert '"grey_hole_lpips"' in (output / "report.html").read_text()
    wrong = fuse(data, output, checkpoint, backbone, "--results", f"grey={tmp_path / 'nothing'}")
    assert wrong.returncode == 2 and "nothing: no such folder" in wrong.stderr


def test_optional_metrics_say_what_is_missing(tmp_path, monkeypatch, capsys):
    with pytest.raises(ConfigError, match=r"weights\.pt: no such file"):
        load_clip(tmp_path / "weights.pt", "ViT-B-32")
    torch.save({}, tmp_path / "weights.pt")
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    assert load_clip(tmp_path / "weights.pt", "ViT-B-32") is None
    assert load_fid(tmp_path / "weights.pt", [("grey", "hole")]) is None
    said = capsys.readouterr().err
    assert "open_clip is not installed" in said and "torchmetrics is not installed" in said
    assert load_clip(None, "") is load_fid(None, []) is None


def test_whole_metrics_see_changes_outside_the_hole(tmp_path, backbone):
    data, output = write_fused(tmp_path)
    write_handover("iopaint", tmp_path / "to", data, output, SCENES)
    inpaint(tmp_path / "to", tmp_path / "to_results", "iopaint")
    found = results(data, f"grey={tmp_path / 'to_results'}")
    found.perceptual = PerceptualLoss("alex", backbone)
    before = found.measure("wide")
    picture = read_image(tmp_path / "to_results" / "wide.png", "RGB").copy()
    hole = read_image(data / "wide" / "mask.png", "L")
    picture[hole == 0] = np.clip(picture[hole == 0].astype(int) + 12, 0, 255)  # as an autoencoder may change them
    write_image(tmp_path / "to_results" / "wide.png", picture)
    after = found.measure("wide")
    for metric in ("psnr", "lpips"):
        assert after[f"grey_guide_{metric}"] == before[f"grey_guide_{metric}"]
        assert after[f"grey_guide_{metric}_whole"] != before[f"grey_guide_{metric}_whole"]


def test_best_guide_confidence_is_stored(tmp_path, checkpoint, backbone):
    data, stored = write_test_folder(tmp_path / "test"), tmp_path / "weights.pth"
    shutil.rmtree(data / "no_original")
    process = run("experiments/guide_choice.py", "--data_dir", data, "--n_scenes", 2, "--checkpoint", checkpoint,
                  "--confidence", 0.2, 0.9, "--completions", 1, "all", "--lpips_weights", backbone, "--store", stored)
    assert process.returncode == 0, process.stderr
    assert process.stdout.count("| 1 (1.0) |") == 2 and "Lowest LPIPS" in process.stdout
    best = float(process.stdout.split("confidence ")[-1].split()[0])
    predictor = FusionPredictor(stored, "cpu")
    assert predictor.guide_confidence == best and predictor.digest == FusionPredictor(checkpoint, "cpu").digest
    state = load_checkpoint(stored)
    state["config"]["guide_confidence"] = 2
    save_checkpoint(stored, {name: state[name] for name in state if name not in ("kind", "version")})
    with pytest.raises(UserError, match="guide_confidence is 2"):
        FusionPredictor(stored, "cpu")


def test_peer_says_what_it_needs(tmp_path):
    process = run("benchmarks/peer.py", "--csf_net", tmp_path)
    assert process.returncode == 1 and "name a checkout of CSF-Net" in process.stderr
