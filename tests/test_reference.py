"""The shipped weights give the stored results on the example scenes. To store new ones:

    python -m tests.test_reference
"""

import json

import numpy as np

from amodal_fusion.data.scenes import find_scenes, read_scene
from amodal_fusion_transformer_inference import FusionPredictor
from tests.scripts import ROOT

REFERENCE = ROOT / "tests" / "reference" / "examples.json"
CELL = 16  # pixels


def cell_means(array):
    """Mean over cells of 16×16 pixels, (H,W,…) → nested lists, rounded."""
    height, width = (side // CELL * CELL for side in array.shape[:2])
    cells = array[:height, :width].reshape(height // CELL, CELL, width // CELL, CELL, -1)
    return np.round(cells.mean((1, 3)), 5).tolist()


def results_of(folder, predictor):
    """Fused colours and weights, in [0,1], of one scene."""
    scene = read_scene(folder)
    out = predictor.fuse(scene.partial, scene.mask, scene.completions)
    return {"fused": cell_means(out["fused"] / 255), "weights": cell_means(out["weights"].transpose(1, 2, 0))}


def compute():
    predictor, examples = FusionPredictor(device="cpu"), ROOT / "examples" / "scenes"
    return {name: results_of(examples / name, predictor) for name in find_scenes(examples)}


def test_fused_examples_are_those_stored():
    stored, found = json.loads(REFERENCE.read_text(encoding="utf-8")), compute()
    assert stored.keys() == found.keys()
    for name, values in found.items():
        for part, cells in values.items():
            assert np.abs(np.subtract(cells, stored[name][part])).max() < 1e-3, (name, part)


if __name__ == "__main__":
    REFERENCE.parent.mkdir(exist_ok=True)
    REFERENCE.write_text(json.dumps(compute()), encoding="utf-8")
