"""From the network's logits to the files of one scene; runs in helper processes."""

import sys
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch

from amodal_fusion.data.images import resize, write_image
from amodal_fusion.data.scenes import read_large
from amodal_fusion.data.tensors import as_tensor, to_tensors
from amodal_fusion.errors import SceneError
from amodal_fusion.evaluation.figures import TILE, draw_scene
from amodal_fusion.evaluation.rules import best_rule
from amodal_fusion.evaluation.scores import evaluate_scene, photo_digest
from amodal_fusion.model.blending import blend_hole, to_levels
from amodal_fusion.output.guide import CONFIDENCE, MIN_REGION, make_guide
from amodal_fusion.output.locks import lock_blend, to_slots
from amodal_fusion.output.order import order_of, write_order
from amodal_fusion.output.records import WHOLE, input_digest, scene_outputs, write_record

MOST_DRAWN = 24  # completions in a figure: those with the most weight
LARGEST_MEASURED = 2**24  # candidates × pixels; larger scenes are measured on a smaller copy


@dataclass
class SceneWriter:
    """Writes OUT/<id>/ of scene after scene. The fields are equal for all scenes: folders and wanted outputs."""

    data_dir: Path
    output_dir: Path
    made_by: dict
    max_completions: int | None = None
    figures: bool = True
    metrics: bool = True
    evaluate: bool = False
    inpaint_command: list | None = None  # from `check_command`
    seam: int = 0
    guide_confidence: float = CONFIDENCE
    min_region: int = MIN_REGION
    locks: dict = field(default_factory=dict)  # scene id → locks, see `parse_locks`
    perceptual: torch.nn.Module | None = field(default=None, repr=False)

    def asked(self, scene_id):
        """The user's decisions for a scene, for its record; if they change, it is recomputed."""
        return {"locks": [str(lock) for lock in self.locks.get(scene_id, [])],
                "inpaint_command": self.inpaint_command, "seam": self.seam,
                "guide": [self.guide_confidence, self.min_region],
                "lpips": None if self.perceptual is None else self.perceptual.net}

    def __call__(self, scene_id, scene, logits, digest):
        """Fuse and write a scene.

        Args:
            scene: Scene; None: read it here, completion by completion.
            logits: (M,h,w) float32 of the network.
            digest: `input_digest` before the scene was read for the network.

        Raises:
            SceneError, OSError: the scene has a fault, or cannot be written.
        """
        source = self.data_dir / scene_id
        folder = self.output_dir / scene_id
        if folder.resolve() == source.resolve():
            raise SceneError(f"{folder}: is the scene's own folder; choose another output folder", "output_dir")
        if scene is None:
            if input_digest(source) != digest:
                raise SceneError(f"{source}: its files changed during the run; run the same command again")
            scene = read_large(source, self.max_completions)
        wanted = self.metrics and scene.original is not None
        exact = wanted and measured_scale(scene) == 1
        locks = to_slots(self.locks.get(scene_id, []), scene.numbered())
        blend = blend_hole(scene, torch.from_numpy(logits), exact)
        unlocked = blend.weights.copy() if locks else blend.weights
        idle = [self.locks[scene_id][i] for i in lock_blend(locks, scene, blend)]
        if idle:
            print(f"note: {scene_id}: lock {', '.join(map(str, idle))} changes nothing; the two do not overlap in the "
                  "hole", file=sys.stderr, flush=True)
        row, made = None, make_guide(scene, blend, self.guide_confidence, self.min_region)
        if exact:
            row = self.measure(scene, blend, made)
        elif wanted:
            row = self.measure_smaller(scene, logits, locks)
        with scene_outputs(folder) as stage:
            write_outputs(stage, scene, blend, describe(scene_id, row), self.figures)
            write_unlocked(stage, scene, blend, unlocked)
            write_image(stage / "guide.png", made[0])
            write_image(stage / "inpaint_mask.png", made[1].astype(np.uint8) * 255)
            write_order(stage / "order.json", scene, order_of(scene, blend, logits, locks))
            write_record(stage, self.made_by, digest, row, self.asked(scene_id))
            write_image(stage / WHOLE, blend.fused(scene.partial))

    def measure(self, scene, blend, made):
        """`evaluate_scene`; `made`: guide and inpainting mask of `make_guide`, which only an evaluation needs."""
        result = as_result(scene, blend)
        if self.evaluate:
            guide, inpaint_mask = made
            result["guide"] = as_tensor(guide)
            result["inpaint_mask"] = torch.from_numpy(inpaint_mask)[None, None].float()
        return evaluate_scene(scene.id, result, self.perceptual, self.evaluate, self.inpaint_command, self.seam)

    def measure_smaller(self, scene, logits, locks=()):
        """`evaluate_scene` of a smaller copy; `scale` in the row is the factor on its sides."""
        scale = measured_scale(scene)
        small = scene.resized(tuple(max(16, round(side * scale)) for side in scene.mask.shape))
        if not small.mask.any():  # a tiny hole still needs one pixel
            place = np.argwhere(scene.mask).mean(0) / scene.mask.shape * small.mask.shape
            small.mask[tuple(place.astype(int))] = True
            small.partial[small.mask] = 0
        photo = photo_digest(np.moveaxis(scene.original, -1, 0))  # equal for all holes of the photo, at any scale
        blend = blend_hole(small, torch.from_numpy(logits))
        lock_blend(locks, small, blend, np.divide(small.mask.shape, scene.mask.shape)[::-1])
        made = make_guide(small, blend, self.guide_confidence, self.min_region) if self.evaluate else None
        return self.measure(small, blend, made) | {"scale": scale, "photo": photo}


def measured_scale(scene):
    """Factor on the sides of a scene for its metrics to fit into memory: 1 except for very large scenes."""
    return min(1.0, (LARGEST_MEASURED / (scene.mask.size * (len(scene.completions) + 3))) ** 0.5)


def as_result(scene, blend):
    """A Scene and its exact Blend as tensors with a batch dimension of 1, as metrics and rules take them.

    Returns:
        dict of partial, mask, completions, valid, original (if there is one), weights (1,N,H,W) and residual
        (1,1,H,W), both 0 outside the hole, fill and fused (1,3,H,W).
    """
    result = {name: value[None] for name, value in to_tensors(scene, len(scene.completions)).items()}
    hole = result["mask"][0, 0] > 0.5

    def outside(picture, values):  # (1,C,H,W), values (P,C) in the hole
        picture = picture.clone()
        picture[0][:, hole] = torch.from_numpy(values).T
        return picture

    zeros = torch.zeros_like(result["completions"][:, :, 0])
    return {**result, "weights": outside(zeros, blend.weights.T),
            "residual": outside(zeros[:, :1], blend.residual[:, None]),
            "fill": outside(result["partial"], blend.fill), "fused": outside(result["partial"], blend.colours)}


def describe(scene_id, row):
    """Heading of a scene's figure."""
    if row is None:
        return scene_id
    best = best_rule(row)
    gain = row["ours_psnr"] - row[f"{best}_psnr"]
    return (f"{scene_id}: {row['ours_psnr']:.2f} dB in the hole, best rule ({best}) {row[f'{best}_psnr']:.2f}, "
            f"gain {gain:+.2f}, oracle {row['oracle_psnr']:.2f}")


def write_outputs(folder, scene, blend, title, figure):
    """Write all pictures of one scene except fused.png, which comes last."""
    for number, weight in zip(scene.numbered(), blend.weights):
        write_image(folder / f"weight_{number}.png", blend.on_picture(to_levels(weight)))
    write_image(folder / "residual_mask.png", blend.none_wins().astype(np.uint8) * 255)
    if figure:
        draw_scene(folder / "figure.png", for_figure(scene, blend), title)


def write_unlocked(folder, scene, blend, unlocked):
    """Write unlocked_1.png …: the network's own weights, of those completions where locks have changed them."""
    for number, before, after in zip(scene.numbered(), unlocked, blend.weights):
        if (before != after).any():
            write_image(folder / f"unlocked_{number}.png", blend.on_picture(to_levels(before)))


def for_figure(scene, blend):
    """A scene for `amodal_fusion.evaluation.figures.scene_panels`, scaled down to the figure."""
    scale = min(1.0, TILE / scene.mask.shape[1], 3 * TILE / scene.mask.shape[0])
    size = tuple(max(1, round(side * scale)) for side in scene.mask.shape)
    most = np.argsort(-blend.weights.sum(1, dtype=np.float64), kind="stable")[:MOST_DRAWN]
    shown = sorted(most.tolist())
    small = replace(scene, completions=[scene.completions[slot] for slot in shown]).resized(size)

    def shrunk(picture):  # (H,W), (H,W,3), uint8 or uint16 → float32 in [0,1]
        return resize(picture, size) / np.float32(np.iinfo(picture.dtype).max)

    arrays = {"partial": small.partial / np.float32(255), "mask": small.mask.astype(np.float32), "shown": shown,
              "labels": [name if name == f"comp{number}" else f"{number}: {name}"
                         for number, name in zip(scene.numbered(), scene.source_names())],
              "completions": np.stack(small.completions) / np.float32(255),
              "weights": np.stack([shrunk(blend.on_picture(to_levels(weight))) for weight in blend.weights]),
              "residual": shrunk(blend.on_picture(to_levels(blend.residual))),
              "fused": shrunk(blend.fused(scene.partial))}
    return arrays | ({} if small.original is None else {"original": small.original / np.float32(255)})
