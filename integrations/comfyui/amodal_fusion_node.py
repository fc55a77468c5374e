"""A ComfyUI node that fuses amodal completions in the hole of a photo.

Install this repository where ComfyUI runs (`pip install PATH_OF_THE_REPOSITORY`), and copy this file to
ComfyUI/custom_nodes/. ComfyUI's pictures are float (B,H,W,C) in [0,1]; masks are (B,H,W), 1 = hole.
"""

import torch

from amodal_fusion.errors import UserError
from amodal_fusion_transformer_inference import FusionPredictor

predictors = {}  # by checkpoint: the weights are read once


def predictor_of(checkpoint):
    if checkpoint not in predictors:
        predictors[checkpoint] = FusionPredictor.from_pretrained(checkpoint or None)
    return predictors[checkpoint]


class AmodalFusion:
    """Photo, hole and completions → fused picture, the mask of what no completion fills, and weights."""

    CATEGORY = "image/inpaint"
    FUNCTION = "fuse"
    RETURN_TYPES = ("IMAGE", "MASK", "MASK")
    RETURN_NAMES = ("fused", "residual_mask", "weights")
    DESCRIPTION = ("Completions: a batch of pictures of the photo's size, with alpha (Join Image with Alpha), with "
                   "completion_masks, or on a flat background.")

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"image": ("IMAGE",), "mask": ("MASK",), "completions": ("IMAGE",)},
                "optional": {
                    "completion_masks": ("MASK", {"tooltip": "1 = the object. The mask of Load Image is the opposite: "
                                                             "put Invert Mask between"}),
                    "checkpoint": ("STRING", {"default": "", "tooltip": "file or folder; empty: the shipped weights"})}}

    def fuse(self, image, mask, completions, completion_masks=None, checkpoint=""):
        """One scene: image (1,H,W,3), mask (1,H,W), completions (N,H,W,3 or 4), completion_masks (N,H,W).

        Returns:
            fused (1,H,W,3); residual_mask (1,H,W), 1 where no completion has the largest weight; weights (N,H,W).

        Raises:
            ValueError: shapes do not fit together.
        """
        if len(image) != 1 or len(mask) != 1:
            raise ValueError(f"one image and one mask at a time, got {len(image)} and {len(mask)}")
        layers, background = completions, None
        if completion_masks is not None:
            if completion_masks.shape != completions.shape[:3]:
                raise ValueError(f"completion_masks {tuple(completion_masks.shape)} do not fit the completions "
                                 f"{tuple(completions.shape[:3])}")
            layers = torch.cat([completions[..., :3], completion_masks[..., None].to(completions)], -1)
        elif completions.shape[-1] == 3:
            background = "auto"
        try:
            result = predictor_of(checkpoint).fuse(image[0, ..., :3].movedim(-1, 0), mask[0][None] > 0.5,
                                                   list(layers.movedim(-1, 1)), background)
        except UserError as error:
            raise ValueError(str(error)) from None
        weights, residual = result["weights"], result["residual"]  # (N,H,W), (1,H,W)
        return (result["fused"].movedim(0, -1)[None], (residual > weights.max(0).values).float(), weights)


NODE_CLASS_MAPPINGS = {"AmodalFusion": AmodalFusion}
NODE_DISPLAY_NAME_MAPPINGS = {"AmodalFusion": "Fuse Amodal Completions"}
