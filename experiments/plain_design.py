"""The plain design: a straightforward baseline network.

All images are concatenated as 3 + 1 + 3N channels, encoded to tokens at stride 4, and passed through PyTorch's
Transformer with default sizes (width 512, 8 heads, 6 + 6 layers). The decoder has one query, whose output is not used.
A softmax over the N slots gives the weights. N and the order of completions are fixed, and attention costs grow with
the square of the number of pixels.
"""

import torch
import torch.nn.functional as F
from torch import nn

from amodal_fusion.model.compositing import fill_hole
from amodal_fusion.model.layers import position_encoding


class PlainDesign(nn.Module):
    """Same inputs and outputs as AmodalFusionTransformer, for exactly `slots` completions; there is no residual."""

    def __init__(self, slots, width=512, layers=6, heads=8):
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv2d(4 + 3 * slots, 64, 3, padding=1), nn.ReLU(),
            nn.Conv2d(64, 128, 3, stride=2, padding=1), nn.ReLU(),
            nn.Conv2d(128, width, 3, stride=2, padding=1), nn.ReLU(),
        )
        self.transformer = nn.Transformer(width, heads, layers, layers, batch_first=True)
        self.query = nn.Parameter(torch.zeros(1, 1, width))
        self.decoder = nn.Sequential(
            nn.ConvTranspose2d(width, 128, 4, stride=2, padding=1), nn.ReLU(),
            nn.ConvTranspose2d(128, 64, 4, stride=2, padding=1), nn.ReLU(),
        )
        self.weight_head = nn.Conv2d(64, slots, 1)

    def forward(self, partial, mask, completions, valid=None):
        """As AmodalFusionTransformer.forward; sides must be multiples of 4."""
        colours = completions[:, :, :3] * completions[:, :, 3:]
        x = self.encoder(torch.cat([partial, mask, colours.flatten(1, 2)], 1))  # (B,C,H/4,W/4)
        grid = x.shape[-2:]
        tokens = x.flatten(2).transpose(1, 2)  # (B,L,C)
        tokens = tokens + position_encoding(grid, grid, tokens.shape[-1], x.device)
        memory = self.transformer.encoder(tokens)
        unused = self.transformer.decoder(self.query.expand(len(x), -1, -1), memory)
        memory = memory + 0 * unused  # gives all parameters a gradient
        logits = self.weight_head(self.decoder(memory.transpose(1, 2).unflatten(2, grid)))  # (B,N,H,W)
        if valid is not None:
            logits = logits.masked_fill(~valid[:, :, None, None], -1e4)
        weights, fill = logits.softmax(1), fill_hole(partial, mask)
        # A transparent completion is black here: the design has no other colour for it.
        fused = torch.where(mask > 0.5, (weights[:, :, None] * colours).sum(1), partial)
        logits = F.pad(logits, (0, 0, 0, 0, 1, 0), value=-1e4)  # the fill never wins
        return {"weights": weights, "residual": torch.zeros_like(mask), "fused": fused, "fill": fill, "logits": logits}
