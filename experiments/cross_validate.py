"""How good is training with layers on photos that it never saw? Five folds over photos with real completions.

    python -m experiments.cross_validate --layers REAL_LAYERS REAL --work_dir cv --config pretrained/recipe.yaml \\
        --train "--init_from pretrained/amodal_fusion_transformer.pth --scenes_per_epoch 2000 --batch_size 8"
    python -m experiments.cross_validate --layers REAL_LAYERS REAL --work_dir cv_before \\
        --checkpoint FIRST_STAGE

For each fold the trainer runs on the photos of the other folds, and the resulting weights fuse holes in the photos of
this fold. With --checkpoint the given weights fuse all holes and nothing is trained; "untrained" stands for those of a
new network, which are written to WORK_DIR/untrained.pth. layer_folds.txt has the folds.
Holes are those of experiments/real_holes.py. Finished folds are skipped when the command runs again. The tables at the
end are over all photos, and per completer (the part of a photo's name before the first "_").
"""

import argparse
import csv
import dataclasses
import os
import shlex
import subprocess
import sys
from pathlib import Path

import torch

from amodal_fusion.checkpoints import save_checkpoint
from amodal_fusion.errors import UserError, exit_with_message
from amodal_fusion.evaluation.tables import write_metrics
from amodal_fusion_transformer import TrainConfig, build_model

ROOT = Path(__file__).parent.parent
FOLDS = Path(__file__).with_name("layer_folds.txt")


def read_folds(path=FOLDS):
    """{photo: number of its fold}."""
    lines = [line.split() for line in path.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
    return {name: int(fold) for name, fold in lines}


def find_photos(folders, folds):
    """{photo: its folder} of all that have a fold.

    Raises:
        UserError: a photo of the folds is missing.
    """
    paths = [path for folder in folders for path in sorted(folder.iterdir())]
    photos = {path.name: path.resolve() for path in paths if path.name in folds}
    missing = sorted(set(folds) - set(photos))
    if missing:
        raise UserError(f"{len(missing)} photos of {FOLDS.name} are in none of the --layers folders: {missing[0]}, …")
    return photos


def link(photos, folder):
    """A folder with links to the folders of these photos."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, target in photos.items():
        if not (folder / name).is_symlink():
            (folder / name).symlink_to(target)
    return folder


def run(*command):
    """Raises UserError when the command fails."""
    line = [sys.executable, *map(str, command)]
    print("$", shlex.join(line), flush=True)
    if subprocess.run(line, cwd=ROOT, check=False).returncode:
        raise UserError(f"{shlex.join(line)} failed")


def write_untrained(path):
    """Save the weights of a network before training, and return the path."""
    torch.manual_seed(0)
    config = dataclasses.asdict(TrainConfig(inference_size=256))
    numbers = {name: value for name, value in config.items() if not isinstance(value, (str, tuple))}
    path.parent.mkdir(parents=True, exist_ok=True)
    save_checkpoint(path, {"model": build_model(config).state_dict(), "config": numbers, "metrics": {},
                           "epoch": 0, "step": 0})
    return path


def judge_fold(fold, photos, folds, options):
    """Rows of metrics.csv of the holes in this fold's photos."""
    folder = options.work_dir.resolve() / f"fold_{fold}"
    table = folder / "fused" / "metrics.csv"
    if not table.exists():
        held_out = link({name: path for name, path in photos.items() if folds[name] == fold}, folder / "held_out")
        others = link({name: path for name, path in photos.items() if folds[name] != fold}, folder / "train")
        run("-m", "experiments.real_holes", "--input_dir", held_out, "--output_dir", folder / "scenes",
            "--per_photo", options.per_photo, "--seed", options.seed)
        checkpoint = options.checkpoint and Path(options.checkpoint).resolve()
        if not checkpoint:
            checkpoint = folder / "weights.pth"
            config = ("--config", options.config) if options.config else ()
            run("amodal_fusion_transformer.py", *config, "--layers", others, *shlex.split(options.train),
                "--checkpoint_dir", folder / "run", "--resume", "auto", "--export", checkpoint)
        lpips = ("--lpips_weights", options.lpips_weights) if options.lpips_weights else ()
        run("amodal_fusion_transformer_inference.py", "--data_dir", folder / "scenes", "--output_dir", folder / "fused",
            "--checkpoint", checkpoint, "--no-figures", *lpips)
    with open(table, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    numbers = [{key: float(value) for key, value in row.items() if key not in ("scene", "photo") and value}
               for row in rows]
    return [{"scene": row["scene"], "photo": row["scene"].rsplit("_", 1)[0], **values}
            for row, values in zip(rows, numbers)]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=Path, nargs="+", required=True, help="folders of photos with layers")
    parser.add_argument("--work_dir", type=Path, required=True)
    parser.add_argument("--checkpoint", help='judge these weights, or "untrained" ones, and train nothing')
    parser.add_argument("--config", help="YAML file for the trainer")
    parser.add_argument("--train", default="", help="more options for the trainer, in one text")
    parser.add_argument("--folds", type=int, nargs="+", default=list(range(5)))
    parser.add_argument("--per_photo", type=int, default=5)
    parser.add_argument("--seed", type=int, default=21, help="of the holes")
    parser.add_argument("--lpips_weights")
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    folds = read_folds()
    photos = find_photos(options.layers, folds)
    if options.checkpoint == "untrained":
        options.checkpoint = write_untrained(options.work_dir / "untrained.pth")
    rows = [row for fold in options.folds for row in judge_fold(fold, photos, folds, options)]
    for name in ("all", *sorted({row["photo"].split("_")[0] for row in rows})):
        folder = options.work_dir / name
        folder.mkdir(exist_ok=True)
        chosen = [row for row in rows if name in ("all", row["photo"].split("_")[0])]
        print(f"\n## {name}\n\n{write_metrics(folder, chosen)}")


if __name__ == "__main__":
    with exit_with_message():
        main()
