"""Objects on a near-white background: gaps, white objects, shadows, close-ups."""

import cv2
import numpy as np
import pytest

from amodal_fusion.ingest.matting import is_silhouette, key_background


def near_white(seed=0, noise=1.5):
    return np.random.default_rng(seed).normal(252, noise, (128, 128, 3))


def drawn(draw, colour=(60, 120, 90)):
    shape = np.zeros((128, 128), np.uint8)
    draw(shape)
    picture = np.where(shape[..., None] > 0, colour, near_white())
    return np.clip(np.rint(picture), 0, 255).astype(np.uint8), shape > 0


def ring(shape):
    cv2.circle(shape, (64, 64), 45, 255, 14)


def chair(shape):
    cv2.rectangle(shape, (30, 30), (98, 60), 255, -1)
    for row, column in ((60, 30), (60, 90), (100, 30)):
        cv2.rectangle(shape, (column, row), (column + (68 if row == 100 else 8), 108), 255, -1)


def arm_on_a_hip(shape):
    cv2.rectangle(shape, (40, 20), (70, 110), 255, -1)
    cv2.polylines(shape, [np.array([[70, 30], [105, 60], [70, 85]])], False, 255, 8)


@pytest.mark.parametrize("draw", [ring, chair, arm_on_a_hip])
def test_gaps_of_an_object_are_background(draw):
    picture, shape = drawn(draw)
    keyed = key_background(picture)[0][..., 3] > 127
    assert (keyed == shape).mean() > 0.98
    _, labels = cv2.connectedComponents((~shape).astype(np.uint8))
    gap = (labels > 0) & (labels != labels[0, 0])
    assert gap.sum() > 300 and keyed[gap].mean() < 0.2


@pytest.mark.parametrize(("level", "waves"), [(245, 3), (240, 0), (255, 0)])
def test_a_white_object_is_no_background(level, waves):
    """A plate in a dark ring and a bare white shirt: neither has the background's noise."""
    y, _ = np.mgrid[:128, :128]
    white = np.clip(level + waves * np.sin(y / 6), 0, 255)[..., None] + np.zeros(3)
    for rim in (6, 0):
        picture, shape = drawn(lambda shape: cv2.circle(shape, (64, 64), 40, 255, -1), white)
        if rim:
            cv2.circle(picture, (64, 64), 42, (40, 40, 40), rim)
        elif level > 252:
            continue  # nothing but noise tells 255 from 252 ± 1.5 without a rim
        inner = cv2.erode(shape.astype(np.uint8), np.ones((15, 15))) > 0
        assert (key_background(picture, "white")[0][..., 3] > 127)[inner].mean() > 0.8


@pytest.mark.parametrize(("depth", "blur", "tint"), [(40, 12, 0), (60, 9, 0), (60, 5, 0), (40, 12, 3)])
def test_a_soft_shadow_is_no_object(depth, blur, tint):
    picture, shape = drawn(lambda shape: cv2.circle(shape, (55, 55), 28, 255, -1))
    cast = cv2.GaussianBlur(np.roll(shape.astype(np.float32), 14, (0, 1)), (0, 0), blur)[..., None]
    picture = np.where(shape[..., None], picture, np.clip(picture - (depth, depth, depth + tint) * cast, 0, 255))
    keyed = key_background(picture.astype(np.uint8))[0][..., 3] > 127
    assert keyed[shape].mean() > 0.95 and keyed[~shape].mean() < 0.04


def test_gradual_shading_of_an_object_is_no_shadow():
    """A pale bird: where its shadow is as dark, no edge divides them, but the bird is not quite neutral."""
    y, x = np.mgrid[:128, :128]
    darker = (20 + 0.2 * (x + y - 50))[..., None] * (1, 1.04, 1.09) + (0, 1, 2)
    picture, shape = drawn(lambda shape: cv2.circle(shape, (55, 55), 28, 255, -1), 252 - darker)
    cast = cv2.GaussianBlur(np.roll(shape.astype(np.float32), 14, (0, 1)), (0, 0), 7)[..., None]
    picture = np.where(shape[..., None], picture, np.clip(picture - 60 * cast, 0, 255)).astype(np.uint8)
    assert (key_background(picture)[0][..., 3] > 127)[shape].mean() > 0.9


def test_a_textured_close_up_is_no_mask():
    rng = np.random.default_rng(0)
    opaque = np.full((64, 64, 1), 255)
    wool = np.dstack([np.clip(rng.normal(251, 3, (64, 64, 3)), 0, 255), opaque]).astype(np.uint8)
    mask = np.dstack([np.full((64, 64, 3), 255), opaque]).astype(np.uint8)
    assert not is_silhouette(wool) and is_silhouette(mask)
