"""FID and CLIP similarity of inpainted pictures, by optional packages and weights on disk."""

import importlib.util
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

from amodal_fusion.errors import ConfigError

LEAST_PICTURES = 2  # for a covariance


def is_usable(weights, option, *packages):
    """Whether a metric is asked for and its packages are installed; if they are not, one line says so.

    Raises:
        ConfigError: the file of weights does not exist.
    """
    if weights is None:
        return False
    if not Path(weights).is_file():
        raise ConfigError(f"{weights}: no such file", option)
    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    if missing:
        print(f"note: no metric by {weights}: the package {missing[0]} is not installed", file=sys.stderr)
    return not missing


def load_clip(weights, net):
    """CLIP similarity in the hole, a function of picture, original (1,3,H,W) in [0,1] and mask (1,1,H,W) → number.

    Both pictures are grey outside the hole and cut to its bounding box; the number is the cosine of their embeddings
    (the C@m of Heo and Cho 2026).

    Args:
        weights: open_clip checkpoint; None, or without the package: returns None. net: its name in open_clip.

    Raises:
        ConfigError: open_clip has no such network, or the file is not of it.
    """
    if not is_usable(weights, "clip_weights", "open_clip"):
        return None
    import open_clip

    try:
        model = open_clip.create_model(net, pretrained=str(weights)).eval()
    except Exception as error:  # open_clip raises many kinds
        raise ConfigError(f"{weights}: not weights of {net} ({str(error).splitlines()[0]})", "clip_weights",
                          "clip_net") from None
    size, mean, std = model.visual.image_size, model.visual.image_mean, model.visual.image_std
    size = size if isinstance(size, tuple) else (size, size)
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (mean, std))

    @torch.no_grad()
    def similarity(picture, original, mask):
        rows, columns = torch.nonzero(mask[0, 0].amax(1))[:, 0], torch.nonzero(mask[0, 0].amax(0))[:, 0]
        box = ..., slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)
        both = torch.cat([torch.where(mask > 0.5, image, 0.5)[box] for image in (picture, original)])
        both = F.interpolate(both, size, mode="bicubic", antialias=True).clamp(0, 1)
        first, second = F.normalize(model.encode_image((both - mean) / std), dim=-1)
        return (first * second).sum().item()

    return similarity


class FrechetDistances:
    """FID (Heusel et al. 2017) of several sets of pictures against the originals, with one Inception network."""

    def __init__(self, weights, keys):
        from torchmetrics.image.fid import FrechetInceptionDistance

        try:
            torch.load(weights, map_location="cpu", weights_only=True)  # the package itself would run pickled code
            first = FrechetInceptionDistance(2048, normalize=True, feature_extractor_weights_path=str(weights))
        except Exception as error:  # torch and the package raise many kinds
            raise ConfigError(f"{weights}: not the weights of FID's network ({str(error).splitlines()[0]})",
                              "fid_weights") from None
        self.of = {}
        for key in keys:
            self.of[key] = first.clone()
            self.of[key].inception = first.inception

    def add(self, name, given, picture, original):
        """Add a picture and its original, (1,3,H,W) in [0,1]."""
        self.of[name, given].update(picture, real=False)
        self.of[name, given].update(original, real=True)

    def compute(self):
        """Column → FID; empty with fewer pictures than LEAST_PICTURES."""
        return {f"{name}_{given}_fid": distance.compute().item() for (name, given), distance in self.of.items()
                if distance.real_features_num_samples >= LEAST_PICTURES}


def load_fid(weights, keys):
    """FrechetDistances for `keys`, pairs (inpainter, given); None without weights or packages."""
    usable = is_usable(weights, "fid_weights", "torchmetrics", "torch_fidelity")
    return FrechetDistances(weights, keys) if usable else None
