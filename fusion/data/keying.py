"""Alpha for completions that came without one: an object on a white or black background."""

import cv2
import numpy as np

TOLERANCE = 24  # levels; a diffusion model's white is rarely 255
BACKGROUNDS = ("auto", "white", "black", "opaque")


def key_background(rgb, background="auto"):
    """Cut an object out of the flat background around it.

    The background is what a flood fill from the picture's border reaches, so a white shirt stays. The object's
    edge, two pixels wide, is un-mixed: alpha from how far its colour is on the way from the background to the
    nearest inner pixel, whose colour it takes.

    Args:
        rgb: (H,W,3) uint8.
        background: "white" or "black" forces that colour, "opaque" keys nothing, "auto" decides by the border.

    Returns:
        (H,W,4) uint8 with straight alpha, and what was keyed: "white", "black" or "opaque".
    """
    opaque = np.dstack([rgb, np.full(rgb.shape[:2], 255, np.uint8)])
    if background == "auto":
        background = border_colour(rgb)
    if background == "opaque":
        return opaque, "opaque"
    border = np.concatenate([rgb[0], rgb[-1], rgb[:, 0], rgb[:, -1]]).astype(np.float32)
    near = border[_near(border, background)]
    colour = np.median(near, 0) if len(near) else np.full(3, 255.0 if background == "white" else 0.0)
    outside = _flood_from_border(np.abs(rgb - colour).max(2) <= TOLERANCE)
    if outside.all():
        return np.zeros_like(opaque), background
    return _soft_edge(rgb, outside, colour), background


def border_colour(rgb):
    """"white" or "black" when enough of the border is flat and near that colour, else "opaque"."""
    border = np.concatenate([rgb[:2].reshape(-1, 3), rgb[-2:].reshape(-1, 3), rgb[:, :2].reshape(-1, 3),
                             rgb[:, -2:].reshape(-1, 3)]).astype(np.float32)
    shares = {}
    for name in ("white", "black"):
        near = _near(border, name)
        flat = near.any() and border[near].std(0).max() <= 8  # an overcast sky is bright, too, but not flat
        shares[name] = near.mean() if flat else 0.0
    name = max(shares, key=shares.get)
    return name if shares[name] >= 0.15 else "opaque"  # a floor leaves white at the top of the frame only


def _near(colours, name):
    return colours.min(-1) >= 255 - TOLERANCE if name == "white" else colours.max(-1) <= TOLERANCE


def _flood_from_border(like_background):
    _, labels = cv2.connectedComponents(like_background.astype(np.uint8), connectivity=4)
    touching = np.unique(np.concatenate([labels[0], labels[-1], labels[:, 0], labels[:, -1]]))
    return np.isin(labels, touching[touching > 0])


def _soft_edge(rgb, outside, colour):
    inner = cv2.dilate(outside.astype(np.uint8), np.ones((5, 5), np.uint8)) == 0
    alpha = np.where(outside, 0.0, 1.0)
    result = rgb.astype(np.float32)
    if inner.any():
        # nearest inner pixel of every other pixel
        distance, labels = cv2.distanceTransformWithLabels(
            (~inner).astype(np.uint8), cv2.DIST_L2, 5, labelType=cv2.DIST_LABEL_PIXEL
        )
        rows = np.zeros(labels.max() + 1, int)
        rows[labels[inner]] = np.flatnonzero(inner)
        edge = ~outside & ~inner & (distance < 5)  # thin parts have no inner pixel near them and stay as they are
        pure = result.reshape(-1, 3)[rows[labels[edge]]]
        way = pure - colour
        length = (way**2).sum(1)
        mixed = ((result[edge] - colour) * way).sum(1) / np.maximum(length, 1)
        mixed = np.where(length < 30**2, 1.0, np.clip(mixed, 0, 1))
        alpha[edge] = mixed
        result[edge] = np.where(mixed[:, None] < 0.95, pure, result[edge])
    result[outside] = 0
    return np.dstack([np.rint(result), np.rint(alpha * 255)]).astype(np.uint8)
