"""LPIPS (Zhang et al. 2018). Its backbone always has true ImageNet weights."""

import warnings
from pathlib import Path

import lpips
import torch
from torch import nn

from amodal_fusion.distributed import local_rank
from amodal_fusion.errors import LpipsUnavailable

# torchvision's ImageNet checkpoints, of which LPIPS uses the `features.*` part
BACKBONES = {
    "alex": "alexnet-owt-7be5be79.pth",
    "vgg": "vgg16-397923af.pth",
    "squeeze": "squeezenet1_1-b8a52dc0.pth",
}


def find_backbone(net, weights=None):
    """State dict of the ImageNet backbone: `weights` (a torchvision checkpoint), else torch hub's cache, else download.

    Raises:
        LpipsUnavailable: all three failed.
    """
    name = BACKBONES[net]
    cached = Path(torch.hub.get_dir()) / "checkpoints" / name
    path = Path(weights) if weights else cached
    if path.is_file():
        try:
            return torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:
            raise LpipsUnavailable(f"{path}: not a torchvision checkpoint ({error})") from None
    if weights:
        raise LpipsUnavailable(f"{weights}: no such file; expected torchvision's {name}", "lpips_weights")
    url = f"https://download.pytorch.org/models/{name}"
    try:
        return torch.hub.load_state_dict_from_url(url, map_location="cpu", check_hash=True, progress=False)
    except Exception as error:
        raise LpipsUnavailable(
            f"torchvision's weights could not be downloaded ({error}); put {url} at {cached}, or name the file",
            "lpips_weights") from None


class PerceptualLoss(nn.Module):
    """Frozen LPIPS between whole composites.

    Args:
        net: "alex" (fast, for reports and CPU runs), "vgg" (the usual training loss) or "squeeze".
        weights: torchvision checkpoint of the backbone; None looks in torch hub's cache, then downloads.
    """

    def __init__(self, net="vgg", weights=None):
        super().__init__()
        self.net = net
        with warnings.catch_warnings():  # lpips uses a deprecated argument of torchvision
            warnings.simplefilter("ignore")
            self.lpips = lpips.LPIPS(net=net, pnet_rand=True, verbose=False)  # the linear heads come with the package
        backbone = find_backbone(net, weights)
        state = {}
        for key, random in self.lpips.net.state_dict().items():
            source = "features." + key.split(".", 1)[1]  # lpips calls features.2 of its second slice slice2.2
            if source not in backbone or backbone[source].shape != random.shape:
                raise LpipsUnavailable(f"{weights or BACKBONES[net]}: no {source} of {net}'s shape in it; "
                                       f"{net} needs torchvision's {BACKBONES[net]}", "lpips_net")
            state[key] = backbone[source]
        self.lpips.net.load_state_dict(state)
        self.requires_grad_(False)
        self.to(memory_format=torch.channels_last)  # a tenth faster on CPUs
        self.eval()

    def train(self, mode=True):  # noqa: ARG002
        """Stay in eval mode even if the parent trains: lpips has dropout in its heads."""
        return super().train(False)

    def forward(self, fused, original):
        """fused, original (B,3,H,W) in [0,1], at least 32×32 → distance per scene, (B,)."""
        device = fused.device.type
        # The backbone may run in bf16, which has the range of fp32, but not in fp16: there the features of flat regions
        # are zero, and the gradient of their norm is NaN.
        bf16 = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == torch.bfloat16
        with torch.autocast(device, torch.bfloat16, enabled=bf16):
            features = self._features(fused)
            with torch.no_grad():
                targets = self._features(original)
        with torch.autocast(device, enabled=False):
            distance = 0
            for feature, target, head in zip(features, targets, self.lpips.lins):
                distance = distance + head((feature - target).square()).mean((1, 2, 3))
            return distance

    def _features(self, image):
        """Unit-length features of each slice; image in [0,1] is scaled to the [−1,1] that LPIPS was fitted to."""
        slices = [x.float() for x in self.lpips.net(self.lpips.scaling_layer(2 * image.float() - 1))]
        # vector_norm, because the gradient of lpips' own sqrt(sum) is NaN where all features are zero.
        return [x / (torch.linalg.vector_norm(x, dim=1, keepdim=True) + 1e-10) for x in slices]


def load_perceptual(config, process):
    """PerceptualLoss on every rank, or None. Local rank 0 goes first, so each machine downloads once."""
    if config.lpips_weight == 0:
        return None
    try:
        loss = PerceptualLoss(config.lpips_net, config.lpips_weights) if local_rank() == 0 else None
    except LpipsUnavailable as error:
        raise LpipsUnavailable(f"{error}; a weight of 0 trains without LPIPS", *error.options, "lpips_weight") from None
    process.any(False)  # the others wait here
    return (loss or PerceptualLoss(config.lpips_net, config.lpips_weights)).to(process.device)
