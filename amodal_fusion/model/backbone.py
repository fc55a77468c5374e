"""Frozen ImageNet features."""

import torch
import torchvision
from torch import nn

from amodal_fusion.checkpoints import PRETRAINED, load_checkpoint

WEIGHTS = PRETRAINED / "squeezenet1_1_features.pth"


class ImageNetFeatures(nn.Module):
    """Frozen features of SqueezeNet 1.1 (Iandola et al. 2016, arXiv 1602.07360), trained on ImageNet.

    They know how objects look, for which the training material is too small. The weights are torchvision's, stored in
    `pretrained/`. They never change, so they are buffers, and checkpoints do not store them.

    Raises:
        UserError: that file is missing or damaged.
    """

    TAPS, CHANNELS = (4, 7, 12), (128, 256, 512)  # the last layer at each of the strides 4, 8 and 16

    def __init__(self):
        super().__init__()
        self.layers = torchvision.models.squeezenet1_1().features
        self.layers.load_state_dict(load_checkpoint(WEIGHTS)["model"])
        self.layers[0].padding = (1, 1)  # without padding, torchvision's features have one row less than H / stride
        self.layers[1], self.layers[2] = self.layers[2], self.layers[1]  # pooling first leaves fewer pixels to the ReLU
        for layer in self.layers.modules():
            for name, weight in list(layer.named_parameters(recurse=False)):
                delattr(layer, name)
                layer.register_buffer(name, weight.detach(), persistent=False)
        statistics = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])  # ImageNet's mean and deviation
        self.register_buffer("statistics", statistics.view(2, 3, 1, 1), persistent=False)

    @torch.no_grad()
    def forward(self, pictures):
        """pictures (B,3,H,W) in [0,1], H and W multiples of 16 → (B,128,H/4,W/4), (B,256,H/8,W/8), (B,512,H/16,W/16).

        As in LPIPS (Zhang et al. 2018), only directions count: each place is scaled to length 1, times the root of the
        number of channels.
        """
        mean, deviation = self.statistics
        x = ((pictures - mean) / deviation).contiguous(memory_format=torch.channels_last)
        features = []
        for number, layer in enumerate(self.layers):
            x = layer(x)
            if number in self.TAPS:
                y = x.float()
                length = torch.linalg.vector_norm(y, dim=1, keepdim=True)
                features.append(y * (y.shape[1] ** 0.5 / (length + 1e-5)))
        return features
