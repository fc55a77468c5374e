"""Building blocks of the network."""

import math

import torch
import torch.nn.functional as F
from torch import nn


class ConvBlock(nn.Module):
    """x + conv(gelu(conv(norm(x)))), with group norm: no scene depends on the rest of its batch."""

    def __init__(self, width):
        super().__init__()
        self.layers = nn.Sequential(
            nn.GroupNorm(8, width),
            nn.Conv2d(width, width, 3, padding=1),
            nn.GELU(),
            nn.Conv2d(width, width, 3, padding=1),
        )

    def forward(self, x):
        return x + self.layers(x)


class Attention(nn.Module):
    """Multi-head attention of x (B,L,C) over memory (B,S,C); `allowed` broadcasts to (B,heads,L,S)."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x, memory, allowed=None):
        query, key, value = (
            t.unflatten(-1, (self.heads, -1)).transpose(-3, -2)  # (B,L,C) → (B,heads,L,C/heads)
            for t in (self.query(x), *self.key_value(memory).chunk(2, -1))
        )
        y = F.scaled_dot_product_attention(query, key, value, attn_mask=allowed)
        return self.out(y.transpose(-3, -2).flatten(-2))


def mlp(width):
    return nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))


class EncoderLayer(nn.Module):
    """Global self-attention over the scene (pre-norm)."""

    def __init__(self, width, heads):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.mlp = mlp(width)

    def forward(self, scene, position):  # (B,S,C), (S,C)
        x = self.norm(scene) + position
        scene = scene + self.attention(x, x)
        return scene + self.mlp(scene)


class DecoderLayer(nn.Module):
    """Candidates attend to their rivals at the same place, then to the whole scene (pre-norm)."""

    def __init__(self, width, heads):
        super().__init__()
        self.norm_rivals = nn.LayerNorm(width)
        self.rivals = Attention(width, heads)
        self.norm_scene = nn.LayerNorm(width)
        self.scene = Attention(width, heads)
        self.mlp = mlp(width)

    def forward(self, tokens, present, scene, position):  # (B,L,M,C), (B,M), (B,S,C), (L,C)
        places = tokens.shape[1]
        x = self.norm_rivals(tokens).flatten(0, 1)  # (B·L,M,C): no attention between places
        allowed = present[:, None, None, None].expand(-1, places, -1, -1, -1).flatten(0, 1)  # (B·L,1,1,M)
        tokens = tokens + self.rivals(x, x, allowed).view_as(tokens)
        x = self.norm_scene(tokens) + position[:, None]
        tokens = tokens + self.scene(x.flatten(1, 2), scene).view_as(tokens)
        return tokens + self.mlp(tokens)


def position_encoding(grid, picture, channels, device):
    """Sine-cosine encoding of a grid of tokens (after Carion et al. 2020, DETR), (rows·columns, channels).

    It is computed for the given grid, relative to the longer side of the picture. So there is no largest size, and
    the same place has the same encoding at every resolution.

    Args:
        grid: (rows, columns) of the tokens.
        picture: (height, width) of the picture that the grid covers, in any unit.
    """
    frequency = math.pi * 2 ** torch.linspace(0, 5, channels // 4, device=device)  # periods 2 to 1/16 of the side
    y, x = ((torch.arange(n, device=device) + 0.5) / n * side / max(picture) for n, side in zip(grid, picture))
    y, x = y[:, None] * frequency, x[:, None] * frequency  # (rows, C/4), (columns, C/4)
    y, x = torch.cat([y.sin(), y.cos()], 1), torch.cat([x.sin(), x.cos()], 1)
    return torch.cat([y[:, None].expand(-1, grid[1], -1), x.expand(grid[0], -1, -1)], 2).flatten(0, 1)


def pad_to(stride, *pictures):
    """(…,H,W) each, the last row and column repeated until `stride` divides both sides."""
    edge = (0, -pictures[0].shape[-1] % stride, 0, -pictures[0].shape[-2] % stride)
    return [F.pad(x.flatten(0, -4), edge, mode="replicate").view(*x.shape[:-2], x.shape[-2] + edge[3], -1)
            if any(edge) else x for x in pictures]


def coarse_grid(places, most):
    """(rows, columns) of tokens → at most `most` of each."""
    return tuple(min(count, most) for count in places)


def pooling_matrix(size, cells, like):
    """Rows that average `size` places into `cells` windows, (cells,size).

    The windows are those of `adaptive_avg_pool2d`, which ONNX does not have for a dynamic size.
    """
    place, cell = torch.arange(size, device=like.device), torch.arange(cells, device=like.device)[:, None]
    inside = (place >= cell * size // cells) & (place < ((cell + 1) * size + cells - 1) // cells)
    return (inside / inside.sum(1, keepdim=True)).to(like)


def add_shared(x, shared):
    """x (B,M,C,h,w) of all candidates, plus shared (B,C,h,w) of their scenes → (B·M,C,h,w)."""
    return (x + shared[:, None]).flatten(0, 1)


GROUP = 2**22  # candidates × pixels that are computed at once where memory is short


def candidate_groups(candidates):
    """Slices of (B,M,4,H,W) along M: all at once, but few at a time for a large scene without gradients."""
    scenes, count, _, height, width = candidates.shape
    if scenes > 1 or torch.is_grad_enabled() or torch.compiler.is_exporting() or count * height * width <= GROUP:
        return [slice(None)]
    step = max(1, GROUP // (height * width))
    return [slice(start, start + step) for start in range(0, count, step)]


def join_groups(groups, count):
    """Lists of tensors, one list per group of candidates → a list with those of all `count` candidates."""
    joined, start = [], 0
    for parts in groups:
        stop = start + parts[0].shape[0]  # len() would fix the number in an exported graph
        if stop - start == count:
            return parts
        if not joined:  # torch.cat would hold all parts beside the result
            joined = [torch.empty((count, *part.shape[1:]), dtype=part.dtype, device=part.device,
                                  memory_format=torch.channels_last) for part in parts]
        for whole, part in zip(joined, parts):
            whole[start:stop] = part
        start = stop
    return joined


def upsample(x):
    """Bilinear, (…,h,w) of 4 dimensions → (…,2h,2w)."""
    return F.interpolate(x, scale_factor=2, mode="bilinear")
