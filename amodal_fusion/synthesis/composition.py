"""Photos with known objects: cut-outs composed on a background, annotated photos, and photos split into regions.

A photo is (size, size, 3) uint8; its objects are a list of SceneObject from back to front. Sizes and positions of
placed objects are in units of the photo's side.
"""

import cv2
import numpy as np

from amodal_fusion.data.images import resize
from amodal_fusion.synthesis.assets import MARGIN, read_cutout, read_photo
from amodal_fusion.synthesis.completions import SceneObject
from amodal_fusion.synthesis.degradations import imagine_shape

LEAST_CROP = 0.7  # smallest crop, as a share of the photo's shorter side


def compose_cutouts(cutouts, backgrounds, size, rng):
    """Cut-outs composed on a background. Everything is known, including hidden parts.

    Args:
        cutouts, backgrounds: lists of paths. size: side of the photo in pixels.

    Returns:
        photo (H,W,3) uint8, its objects, and the background alone (H,W,3). None when fewer than two objects are
        visible.
    """
    placed = []
    for side, centre, plain in draw_layout(rng):
        thing = draw_object(_random_cutout(cutouts, plain, rng), size, centre, side, rng)
        if thing is not None and np.count_nonzero(thing[1][..., 3] > 127) > 0.01 * size**2:
            placed.append(thing)
    if len(placed) < 2:
        return None
    background = random_crop(backgrounds[rng.integers(len(backgrounds))], size, rng)
    photo, front = background.astype(np.float32), np.full((size, size), -1, np.int8)
    for i, (box, rgba) in enumerate(placed):
        front[box][paint(photo, box, rgba) > 0.5] = i
    if len(placed) >= 3 and rng.random() < 0.15:
        # A cyclic overlap: the rearmost object covers the foremost one where no other object lies between them.
        free = np.zeros((size, size), bool)
        free[placed[-1][0]] = placed[-1][1][..., 3] > 0
        for box, rgba in placed[1:-1]:
            free[box] &= rgba[..., 3] == 0
        box, rgba = placed[0]
        front[box][paint(photo, box, rgba, free[box]) > 0.5] = 0
    objects = []
    if rng.random() < 0.25:  # walls and floors can be objects
        free = front < 0
        for region in find_regions(background, rng)[: rng.integers(1, 3)]:
            whole = np.dstack([background, cv2.GaussianBlur(region * np.uint8(255), (0, 0), 0.6)])
            if np.count_nonzero(region & free) > 0.02 * size**2:
                objects.append(SceneObject(whole, region & free, True))
    for i, (box, rgba) in enumerate(placed):
        visible = front == i
        if np.count_nonzero(visible) > 0.003 * size**2:
            whole = np.zeros((size, size, 4), np.uint8)
            whole[box] = rgba
            objects.append(SceneObject(whole, visible, True))
    return (_uint8(photo), objects, background) if len(objects) >= 2 else None


def draw_layout(rng):
    """Sizes and positions, back to front: a list of (longer side, centre, probability of a plain object)."""
    draw, centre = rng.random(), rng.uniform(0.3, 0.7, 2)
    if draw < 0.5:  # a table or a shelf: large objects carry many small ones
        large, small = rng.integers(1, 4), rng.integers(3, 10)
        sides = [*rng.uniform(0.6, 1.4, large), *np.exp(rng.uniform(np.log(0.15), np.log(0.6), small))]
        return [(side, rng.uniform(0.1, 0.9, 2), 0.5 if i < large else 0.1) for i, side in enumerate(sides)]
    spread, count = rng.uniform(0.06, 0.22), rng.integers(2, 7)
    carried = draw < 0.75  # one large object, such as a plate, carries the others
    smallest, largest = (0.15, 0.5) if carried else (0.2, 0.9)
    sides = np.exp(rng.uniform(np.log(smallest), np.log(largest), count))
    if carried:
        sides[0] = rng.uniform(0.8, 1.4)
    plain = [0.5 if carried and i == 0 else 0.08 for i in range(count)]
    return [(side, centre + rng.normal(0, spread, 2), p) for side, p in zip(sides, plain)]


def add_clutter(photo, objects, mask, cutouts, rng):
    """Put additional objects without completion on the objects, outside the hole.

    The completion of an object behind one of them disagrees with the photo there, but is right in the hole.
    Returns a new photo and new objects, with less of them visible.
    """
    size = len(photo)
    free = [item.visible & ~mask for item in objects]
    carriers, things, largest_thing, enough = range(len(objects)), rng.integers(1, 13), 1.1, 0
    if rng.random() < 0.7:  # all on the largest object, until much of it is hidden
        areas = [np.count_nonzero(where) for where in free]
        carriers, things, largest_thing, enough = [np.argmax(areas)], 60, 0.7, max(areas) * rng.uniform(0.2, 0.8)
    photo, covered = photo.astype(np.float32), np.zeros_like(mask)
    for _ in range(things):
        pixels = np.flatnonzero(free[rng.choice(carriers)])
        if len(pixels) <= enough:
            break
        centre = np.array(divmod(pixels[rng.integers(len(pixels))], size)) / size
        side = np.sqrt(len(pixels)) / size * rng.uniform(0.3, largest_thing)
        thing = draw_object(_random_cutout(cutouts, 0, rng), size, centre, side, rng)
        if thing is None or (thing[1][..., 3][mask[thing[0]]] > 0).any():
            continue
        box, rgba = thing
        hides = paint(photo, box, rgba) > 0.5
        covered[box] |= hides
        for where in free:
            where[box] &= ~hides
    return _uint8(photo), [SceneObject(item.whole, item.visible & ~covered, item.true) for item in objects]


def _random_cutout(cutouts, plain, rng):
    """The path of a cut-out, or with probability `plain` None: `draw_object` then draws a plain object."""
    return None if rng.random() < plain else cutouts[rng.integers(len(cutouts))]


def open_annotated(annotations, size, rng):
    """A photo with its annotated objects. Their hidden parts are unknown, so their shapes are imagined.

    Args:
        annotations: one of the list that `read_annotations` returns. size: side of the photo in pixels.

    Returns:
        photo (H,W,3) uint8, its objects, and None for the unknown background. None when there is no object.
    """
    picture = read_photo(annotations.photo, round(size / LEAST_CROP))
    (top, left), side = _crop_box(picture.shape[:2], rng)
    photo = resize(picture[top : top + side, left : left + side], (size, size))
    whole = picture.shape[1::-1]  # width, height
    flip = rng.random() < 0.5
    photo = photo[:, ::-1].copy() if flip else photo
    instances = []
    for polygons in annotations.upright():
        mask = np.zeros((size, size), np.uint8)
        corners = [(points * whole - (left, top)) * (size / side) for points in polygons]
        cv2.fillPoly(mask, [np.rint(np.clip(p, -size, 2 * size)).astype(np.int32) for p in corners], 1)
        instances.append((mask[:, ::-1] if flip else mask).astype(bool))
    instances = [mask for mask in instances if 0.01 < mask.mean() < 0.8]
    objects = _layer_regions(instances, photo, rng, annotations.ordered)
    return (photo, objects, None) if objects else None


def open_photo(path, size, rng):
    """A photo without annotations, with its regions as objects; walls, floors and windows are among them.

    Returns:
        the same as open_annotated.
    """
    photo = random_crop(path, size, rng)
    objects = _layer_regions(find_regions(photo, rng), photo, rng)
    return (photo, objects, None) if objects else None


def find_regions(photo, rng):
    """Regions of similar colour whose borders follow edges of the photo, as an automatic segmenter finds them.

    Returns:
        list of (H,W) bool, disjoint, each between 1 % and 80 % of the photo.
    """
    size, side = len(photo), 128
    photo = cv2.resize(photo, (side, side), interpolation=cv2.INTER_AREA)
    colours = cv2.cvtColor(cv2.resize(photo, (32, 32), interpolation=cv2.INTER_AREA), cv2.COLOR_RGB2LAB)
    places = np.stack(np.mgrid[:32, :32], 2) * rng.uniform(1, 5)
    features = np.dstack([colours, places]).reshape(-1, 5).astype(np.float32)  # (1024, 5)
    count = int(rng.integers(4, 14))
    centres = features[rng.choice(len(features), count, replace=False)]
    for _ in range(4):  # k-means
        distances = (features**2).sum(1)[:, None] - 2 * features @ centres.T + (centres**2).sum(1)
        labels = distances.argmin(1)
        members = np.bincount(labels, minlength=count)
        sums = np.stack([np.bincount(labels, column, count) for column in features.T], 1)
        centres = np.where(members[:, None] > 0, sums / np.maximum(members, 1)[:, None], centres).astype(np.float32)
    labels = (labels.reshape(32, 32) + 1).astype(np.uint8)
    inner = (cv2.erode(labels, np.ones((3, 3))) == labels) & (cv2.dilate(labels, np.ones((3, 3))) == labels)
    markers = cv2.resize(np.where(inner, labels, 0).astype(np.uint8), (side, side), interpolation=cv2.INTER_NEAREST)
    regions = cv2.watershed(np.ascontiguousarray(photo), markers.astype(np.int32))
    regions = [cv2.resize((regions == label).astype(np.float32), (size, size)) > 0.5 for label in range(1, count + 1)]
    return [region for region in regions if 0.01 < region.mean() < 0.8]


def _layer_regions(instances, photo, rng, ordered=False):
    """Regions of a photo as objects, from back to front, that continue under nearer ones.

    Args:
        instances: list of (H,W) bool.
        ordered: whether the regions are whole and already sorted from back to front. If not, the order is guessed, and
            the hidden shape is imagined, for the seven largest regions.
    """
    if ordered:
        order = range(len(instances))
    else:
        instances = sorted(instances, key=np.count_nonzero, reverse=True)[:7]
        # Large objects are usually behind smaller ones.
        order = range(len(instances)) if rng.random() < 0.6 else rng.permutation(len(instances))
    objects, nearer = [], np.zeros(photo.shape[:2], bool)
    for i in reversed(order):
        visible = instances[i] & ~nearer
        if visible.mean() >= 0.005:
            alpha = instances[i] if ordered else visible | (imagine_shape(visible, rng) & nearer)
            alpha = cv2.GaussianBlur(alpha.astype(np.float32), (0, 0), 0.6)
            objects.append(SceneObject(np.dstack([photo, np.rint(alpha * 255).astype(np.uint8)]), visible, False))
        nearer |= instances[i]
    return objects[::-1]


def random_crop(path, size, rng):
    """A random crop of at least LEAST_CROP of a photo, mirrored or not, (size, size, 3) uint8."""
    picture = read_photo(path, round(size / LEAST_CROP))
    (top, left), side = _crop_box(picture.shape[:2], rng)
    crop = resize(picture[top : top + side, left : left + side], (size, size))
    return crop[:, ::-1] if rng.random() < 0.5 else crop


def _crop_box(size, rng):
    """(top, left) and side of a random square crop in pixels, of a photo of `size` = (height, width)."""
    side = int(min(size) * rng.uniform(LEAST_CROP, 1))
    return (rng.integers(size[0] - side + 1), rng.integers(size[1] - side + 1)), side


def _uint8(photo):
    """Round and clip a float32 photo, overwriting it."""
    return np.clip(np.rint(photo, out=photo), 0, 255, out=photo).astype(np.uint8)


def draw_object(path, size, centre, side, rng):
    """Draw a cut-out or a plain object, slightly rotated and with another light.

    Args:
        path: of a cut-out; None for a plain object: a plate, a sheet, a table top.
        size: side of the photo in pixels.
        centre: (row, column), and side: the longer side, both in units of `size`.

    Returns:
        the box as two slices, rows and columns, and (h,w,4) uint8 in it, straight alpha, 0 where alpha is 0. None when
        it lies outside the photo or the cut-out is damaged.
    """
    longer_side = max(1.0, size * side)
    picture = _plain_object(longer_side, rng) if path is None else read_cutout(path, longer_side)
    if picture is None:
        return None
    height, width = picture.shape[:2]
    scale = longer_side / (max(height, width) - 2 * MARGIN)
    if scale < 1:
        picture = cv2.resize(picture, (max(1, round(width * scale)), max(1, round(height * scale))),
                             interpolation=cv2.INTER_AREA)
        height, width, scale = *picture.shape[:2], 1.0
    matrix = cv2.getRotationMatrix2D((width / 2, height / 2), rng.normal(0, 12), scale)
    matrix[:, 2] += centre[1] * size - width / 2, centre[0] * size - height / 2
    corners = matrix @ np.array([[0, width, 0, width], [0, 0, height, height], [1, 1, 1, 1]])  # (2, 4) as x, y
    left, top = (max(0, int(low) - 1) for low in corners.min(1))
    right, bottom = (min(size, int(high) + 2) for high in corners.max(1))
    if rng.random() < 0.5:  # mirrored
        matrix[:, 2] += matrix[:, 0] * (width - 1)
        matrix[:, 0] *= -1
    light = np.exp(rng.normal(0, 0.2)), rng.uniform(0.8, 1.1, 3)
    if left >= right or top >= bottom:
        return None
    matrix[:, 2] -= left, top
    placed = cv2.warpAffine(picture, matrix, (right - left, bottom - top), flags=cv2.INTER_LINEAR)
    levels = np.linspace(0, 1, 256)[:, None]
    table = np.clip(np.hstack([255 * levels ** light[0] * light[1], 255 * levels]), 0, 255)
    placed = cv2.LUT(placed, np.rint(table).astype(np.uint8)[None])
    placed[placed[..., 3] == 0] = 0
    return (slice(top, bottom), slice(left, right)), placed


def _plain_object(longer_side, rng):
    """A plate, a sheet or a table top. Photos often show them, collections of cut-outs rarely do."""
    size = int(np.clip(longer_side, 16, 256))
    y, x = np.mgrid[:size, :size].astype(np.float32) / (size / 2) - 1.0
    power = rng.choice((2, 2, 4, 16))  # an ellipse, a rounded rectangle, a sheet
    radius = (np.abs(x) ** power + np.abs(y / rng.uniform(0.5, 1)) ** power) ** (1 / power)
    light = rng.normal(0, 25, 2)
    shade = light[0] * x + light[1] * y
    shade = shade + rng.normal(0, 15) * np.clip((radius - rng.uniform(0.5, 0.9)) * 12, 0, 1)  # a rim
    grain = rng.normal(0, rng.uniform(0, 3), (size, size))
    colour = rng.uniform(30, 250) + rng.normal(0, 20, 3) + (shade + grain)[..., None]
    return np.dstack([np.clip(colour, 0, 255), 255 * np.clip((0.97 - radius) * size / 2, 0, 1)]).astype(np.uint8)


def paint(photo, box, rgba, where=True):
    """Blend `rgba` over the photo (H,W,3) float32, in place, inside `box` and `where`. Returns the alpha used."""
    alpha = rgba[..., 3] * np.float32(1 / 255) * where
    region = photo[box]
    region += alpha[..., None] * (rgba[..., :3] - region)
    return alpha
