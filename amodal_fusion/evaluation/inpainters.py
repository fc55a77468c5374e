"""Inpainters for the evaluation: two of OpenCV, PatchMatch of the package gmic, and a command of the user."""

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile

import cv2
import numpy as np
import torch

from amodal_fusion.data.images import read_image, write_image
from amodal_fusion.errors import ConfigError, SceneError

OPENCV = {"telea": cv2.INPAINT_TELEA, "navier_stokes": cv2.INPAINT_NS}
# PatchMatch (Barnes et al. 2009) of G'MIC: the words of a command, or None without its Python package
PATCHMATCH = None if importlib.util.find_spec("gmic") is None else [
    sys.executable, "-c", "import gmic, sys; gmic.run(sys.argv[1])",
    "{image} {mask} inpaint_matchpatch[0] [1] output[0] {output}"]
GIVEN = ("hole", "visible_fit", "ours", "guide")  # what an inpainter is given


def grow(region, pixels):
    """`region` (H,W) bool and everything within `pixels` of it."""
    if pixels == 0 or not region.any():
        return region
    return cv2.distanceTransform((~region).astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE) <= pixels


def inpaint(image, region, method):
    """Inpaint `region` (H,W) bool of an image (1,3,H,W) in [0,1] by `method`.

    Args:
        method: function of a picture (H,W,3) uint8 and the region → a picture (H,W,3) uint8.
    """
    if not region.any():
        return image
    picture = np.rint(image[0].permute(1, 2, 0).clamp(0, 1).cpu().numpy() * 255).astype(np.uint8)
    done = torch.tensor(method(picture, region)).permute(2, 0, 1)[None].to(image) / 255
    return torch.where(torch.from_numpy(region).to(image.device), done, image)  # elsewhere not rounded to 8 bits


def inpaint_opencv(method, picture, region):
    return cv2.inpaint(picture, region.astype(np.uint8), 3, method)


def check_command(command):
    """The words of an inpainting command.

    Raises:
        ConfigError: a placeholder is missing, a quote is not closed, or the program does not exist.
    """
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise ConfigError(f"{command!r}: {error}", "inpaint_command") from None
    missing = [p for p in ("{image}", "{mask}", "{output}") if not any(p in word for word in words)]
    if missing:
        raise ConfigError(f"{command!r}: {', '.join(missing)} is missing; write it as "
                          "'CMD {image} {mask} {output}'", "inpaint_command")
    if shutil.which(words[0]) is None:
        raise ConfigError(f"there is no program {words[0]!r}", "inpaint_command")
    return words


def run_command(words, picture, region):
    """Inpaint with a program of the user.

    Args:
        words: of `check_command`; {image}, {mask} (PNG, 255 = draw here) and {output} become paths. There is
            no shell; for one use bash -c '…'.
        picture: (H,W,3) uint8; region: (H,W) bool.

    Returns:
        (H,W,3) uint8.

    Raises:
        SceneError: the program failed, or wrote no picture of the same size.
    """
    with tempfile.TemporaryDirectory() as folder:
        paths = {f"{{{name}}}": os.path.join(folder, f"{name}.png") for name in ("image", "mask", "output")}
        write_image(paths["{image}"], picture)
        write_image(paths["{mask}"], region.astype(np.uint8) * 255)
        line = [re.sub(r"\{(image|mask|output)\}", lambda match: paths[match[0]], word) for word in words]
        process = subprocess.run(line, capture_output=True, text=True, errors="replace", check=False)
        if process.returncode or not os.path.exists(paths["{output}"]):
            said = "; ".join((process.stderr or process.stdout).strip().splitlines()[-3:]) or "nothing"
            fault = f"ended with status {process.returncode}" if process.returncode else "wrote no {output}"
            raise SceneError(f"the inpainter {words[0]} {fault}; it said: {said}", "inpaint_command")
        done = read_image(paths["{output}"], "RGB")
    if done.shape != picture.shape:
        raise SceneError(f"the inpainter {words[0]} wrote {done.shape[1]}×{done.shape[0]} pixels for a picture of "
                         f"{picture.shape[1]}×{picture.shape[0]}", "inpaint_command")
    return done
