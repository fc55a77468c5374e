"""Metrics of a fused scene beside the simple rules and the oracle, also after an inpainter."""

import functools
import hashlib
import zlib

import torch

from amodal_fusion.evaluation.inpainters import GIVEN, OPENCV, grow, inpaint, inpaint_opencv, run_command
from amodal_fusion.evaluation.metrics import compare_methods, overlap_region, region_l1, region_ssim, undecided_share
from amodal_fusion.evaluation.rules import apply_rules, oracle
from amodal_fusion.evaluation.tables import METHODS


@torch.no_grad()
def evaluate_scene(scene_id, result, perceptual, downstream=False, command=None, seam=0):
    """All metrics of one fused scene, inside the hole.

    Args:
        result: tensors with a batch dimension of 1: partial, mask, completions, valid, original, weights, residual,
            fill, fused.
        perceptual: PerceptualLoss or None.
        downstream: also inpaint the bare hole, the visible-fit result and ours.
        command: words of the user's inpainter, named "command" in the columns; see `check_command`.
        seam: pixels by which the region to inpaint grows inside the hole.

    Returns:
        dict of scene, photo (a digest of the original), completions, hole (share of the picture), overlap (share of
        the hole), winner_accuracy (share of the overlap where our winner is the oracle's), ours_undecided (see
        `undecided_share`), <method>_<metric>, and with `downstream` <inpainter>_<given>_<metric>. A value
        is nan if it is undefined: no overlap, or a picture too small for LPIPS.

    Raises:
        SceneError: the command fails.
    """
    mask, original = result["mask"], result["original"]
    best, choice = oracle(result)
    images = {"ours": result["fused"], "oracle": best, **apply_rules(result, seed=zlib.crc32(scene_id.encode()))}
    overlap = overlap_region(result)
    winner = torch.cat([result["weights"], result["residual"]], 1).argmax(1)
    agrees = (winner == choice)[overlap[:, 0] > 0].float()
    pixels = (original[0] * 255).round().to(torch.uint8).cpu().numpy()
    row = {"scene": scene_id, "photo": photo_digest(pixels), "completions": result["valid"].sum().item(),
           "hole": mask.mean().item(), "overlap": (overlap.sum() / mask.sum()).item(),
           "winner_accuracy": agrees.mean().item(), "ours_undecided": undecided_share(result).item()}
    row |= measure(result, {method: images[method] for method in METHODS}, perceptual)
    if downstream:
        bare = result["completions"][:, :, 3].amax(1, keepdim=True) <= 0.5  # no completion covers it
        none_wins = (winner == len(result["weights"][0]))[:, None]
        todo = {"hole": mask > 0.5, "visible_fit": (mask > 0.5) & bare, "ours": (mask > 0.5) & none_wins}
        start = {"hole": result["partial"], "visible_fit": images["visible_fit"], "ours": result["fused"]}
        inpainters = {name: functools.partial(inpaint_opencv, method) for name, method in OPENCV.items()}
        if command:
            inpainters["command"] = functools.partial(run_command, command)
        hole = mask[0, 0].cpu().numpy() > 0.5
        regions = {given: grow(region[0, 0].cpu().numpy(), seam) & hole for given, region in todo.items()}
        row |= measure(result, {f"{name}_{given}": inpaint(start[given], regions[given], method)
                                for name, method in inpainters.items() for given in GIVEN}, perceptual)
    return row


def measure(scene, images, perceptual):
    """PSNR, SSIM, L1 and LPIPS of pictures of one scene; `images` as in `compare_methods`, perceptual may be None."""
    values = compare_methods(scene, images)
    mask, original = scene["mask"], scene["original"]
    for method, image in images.items():
        values[f"{method}_ssim"] = region_ssim(image, original, mask)
        values[f"{method}_l1"] = region_l1(image, original, mask)
        if perceptual is not None and min(mask.shape[-2:]) >= 32:
            values[f"{method}_lpips"] = perceptual(torch.where(mask > 0.5, image, original), original)
    return {name: value.item() for name, value in values.items()}


def photo_digest(pixels):
    """Digest of a scene's photo, (3,H,W) uint8: equal for all holes in one photo."""
    return hashlib.blake2b(pixels.tobytes(), digest_size=6).hexdigest()
