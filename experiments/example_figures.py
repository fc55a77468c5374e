"""The two figures of the README: the example scenes with the largest and the smallest gain over the best rule.

    python amodal_fusion_transformer_inference.py --data_dir examples/scenes --output_dir OUT
    python -m experiments.example_figures OUT

Run both again after the shipped weights change, and name the printed scenes in the READMEs and tests/test_shipped.py.
"""

import shutil
import sys
from pathlib import Path

from amodal_fusion.errors import UserError, exit_with_message
from amodal_fusion.evaluation.rules import best_rule
from amodal_fusion.output.records import read_record

DOCS = Path(__file__).parents[1] / "docs"


def gains(output_dir):
    """{scene id: PSNR in the hole minus that of the best rule, dB}, the largest first.

    Raises:
        UserError: no scene in the folder has metrics.
    """
    found = {}
    for folder in Path(output_dir).iterdir():
        metrics = (read_record(folder) or {}).get("metrics")
        if metrics:
            found[folder.name] = metrics["ours_psnr"] - metrics[f"{best_rule(metrics)}_psnr"]
    if not found:
        raise UserError(f"{output_dir}: no scene with metrics; run the inference script on scenes with originals")
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def main():
    output_dir = Path(sys.argv[1])
    found = gains(output_dir)
    for scene_id, gain in found.items():
        print(f"{gain:+.2f} dB over the best rule: {scene_id}")
    best, *_, worst = found
    shutil.copyfile(output_dir / best / "figure.png", DOCS / "figure.png")
    shutil.copyfile(output_dir / worst / "figure.png", DOCS / "figure_failure.png")


if __name__ == "__main__":
    with exit_with_message():
        main()
