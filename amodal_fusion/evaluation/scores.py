"""Metrics of a fused scene beside the simple rules and the oracle, also after an inpainter."""

import functools
import hashlib
import zlib

import torch

from amodal_fusion.evaluation.inpainters import OPENCV, PATCHMATCH, grow, inpaint, inpaint_opencv, run_command
from amodal_fusion.evaluation.metrics import (
    compare_methods,
    overlap_region,
    region_l1,
    region_psnr,
    region_ssim,
    undecided_share,
)
from amodal_fusion.evaluation.rules import apply_rules, oracle
from amodal_fusion.evaluation.tables import METHODS


@torch.no_grad()
def evaluate_scene(scene_id, result, perceptual, downstream=False, command=None, seam=0):
    """All metrics of one fused scene, inside the hole.

    Args:
        result: tensors with a batch dimension of 1: partial, mask, completions, valid, original, weights, residual,
            fill, fused; with `downstream` also guide (1,3,H,W) and inpaint_mask (1,1,H,W).
        perceptual: PerceptualLoss or None.
        downstream: also inpaint what `given_pictures` returns.
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
    rules = apply_rules(result, seed=zlib.crc32(scene_id.encode()), perceptual=perceptual)
    images = {"ours": result["fused"], "oracle": best, **rules}
    overlap = overlap_region(result)
    winner = torch.cat([result["weights"], result["residual"]], 1).argmax(1)
    agrees = (winner == choice)[overlap[:, 0] > 0].float()
    pixels = (original[0] * 255).round().to(torch.uint8).cpu().numpy()
    row = {"scene": scene_id, "photo": photo_digest(pixels), "completions": result["valid"].sum().item(),
           "hole": mask.mean().item(), "overlap": (overlap.sum() / mask.sum()).item(),
           "winner_accuracy": agrees.mean().item(), "ours_undecided": undecided_share(result).item()}
    row |= measure(result, {method: images[method] for method in METHODS}, perceptual)
    if downstream:
        inpainters = {name: functools.partial(inpaint_opencv, method) for name, method in OPENCV.items()}
        for name, words in (("patchmatch", PATCHMATCH), ("command", command)):
            if words:
                inpainters[name] = functools.partial(run_command, words)
        hole = mask[0, 0].cpu().numpy() > 0.5
        given = {name: (picture, grow(region[0, 0].cpu().numpy() > 0.5, seam) & hole)
                 for name, (picture, region) in given_pictures(result, images["visible_fit"]).items()}
        row |= measure(result, {f"{inpainter}_{name}": inpaint(picture, region, method)
                                for inpainter, method in inpainters.items()
                                for name, (picture, region) in given.items()}, perceptual)
    return row


def given_pictures(result, visible_fit):
    """What an inpainter may be given, one of GIVEN → picture (1,3,H,W) and the region to draw (1,1,H,W).

    The bare hole; visible fit (a picture of `apply_rules`), where no completion covers; the fused image, where the fill
    has the largest weight; the guide and its mask.
    """
    bare = result["completions"][:, :, 3].amax(1, keepdim=True) <= 0.5
    none_wins = result["residual"] > result["weights"].amax(1, keepdim=True)
    return {"hole": (result["partial"], result["mask"]), "visible_fit": (visible_fit, result["mask"] * bare),
            "ours": (result["fused"], result["mask"] * none_wins), "guide": (result["guide"], result["inpaint_mask"])}


def measure_picture(image, original, mask, perceptual):
    """Metrics of one picture in the hole, and of the whole picture, which an inpainter may have changed elsewhere.

    Args:
        image, original: (1,3,H,W) in [0,1]; mask (1,1,H,W), 1 = hole; perceptual: PerceptualLoss or None.

    Returns:
        dict of psnr, ssim, l1 and lpips as in `measure`, psnr_whole, ssim_whole and lpips_whole.
    """
    everywhere = torch.ones_like(mask)
    values = {"psnr": region_psnr(image, original, mask), "ssim": region_ssim(image, original, mask),
              "l1": region_l1(image, original, mask), "psnr_whole": region_psnr(image, original, everywhere),
              "ssim_whole": region_ssim(image, original, everywhere)}
    if perceptual is not None and min(mask.shape[-2:]) >= 32:
        values["lpips"] = perceptual(torch.where(mask > 0.5, image, original), original)
        values["lpips_whole"] = perceptual(image, original)
    return {name: value.item() for name, value in values.items()}


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
