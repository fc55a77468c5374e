"""Mistakes of completion models: invented content, damaged edges, redrawn pixels.

All pictures here are windows of a scene, (h,w,3) or (h,w,4) uint8 with straight alpha. `size` is the side of the scene
in pixels. `known` (h,w) bool is where the completion model saw the object.
"""

import cv2
import numpy as np

from amodal_fusion.ingest.matting import key_background


def invent_content(colour, known, unknown, unrelated_texture, size, rng):
    """Replace the colours of the unknown part by invented ones, in place.

    The content is a smooth continuation of the known part, often with its texture; a moved copy of the known part; or
    an unrelated texture.

    Args:
        colour: (h,w,3). unknown: (h,w) bool.
        unrelated_texture: function of rng → (h,w,3) uint8.
    """
    draw = rng.random()
    if not unknown.any():
        return
    if draw < 0.65 or not known.any():
        invented = inpaint(colour, known)
        if known.any() and rng.random() < 0.6:
            detail = _borrowed_detail(colour, known, invented, size, rng)
            invented = np.clip(invented + np.float32(0.8) * detail, 0, 255).astype(np.uint8)
    elif draw < 0.85:
        invented = _moved_copy(np.dstack([colour, known * np.uint8(255)]), known, size, rng)
    else:
        texture = unrelated_texture(rng).astype(np.float32)
        if rng.random() < 0.7:
            texture += colour[known].mean(0) - texture.mean((0, 1))
        invented = np.clip(texture, 0, 255).astype(np.uint8)
    np.copyto(colour, invented, where=unknown[..., None])


def smear(colour, unknown, size, rng):
    """Sometimes blur the unknown part, in place: out of focus, or along one direction."""
    if rng.random() < 0.4 and unknown.any():
        widths = 2 * rng.integers(0, max(2, size // 24), 2) + 1
        np.copyto(colour, cv2.blur(colour, tuple(int(w) for w in widths)), where=unknown[..., None])


def cut_short(alpha, known, hidden, rng):
    """Sometimes make some of the hidden part transparent, in place: behind a line, or 1-5 pixels around the known
    part."""
    if rng.random() >= 0.25:
        return
    if rng.random() < 0.7:
        y, x = np.mgrid[: alpha.shape[0], : alpha.shape[1]].astype(np.float32)
        angle = rng.uniform(0, 2 * np.pi)
        along = x * np.float32(np.cos(angle)) + y * np.float32(np.sin(angle))
        alpha[hidden & (along > np.quantile(along[hidden], rng.uniform(0.1, 0.9)))] = 0
    elif known.any():
        alpha[hidden & _dilated(known, int(rng.integers(1, 4)))] = 0


def _dilated(region, radius):
    """(h,w) bool, grown by `radius` pixels in a square."""
    return cv2.dilate(region.astype(np.uint8), np.ones((2 * radius + 1,) * 2, np.uint8)) > 0


def imagine_shape(visible, rng):
    """A guess of the whole shape behind a visible part, (H,W) bool: its hull, the part with a rotated copy of itself,
    or the part dilated."""
    kind = rng.integers(3)
    binary = visible.astype(np.uint8)
    if kind == 0:
        return convex_hull(visible)
    if kind == 1:
        rows, columns = np.nonzero(visible)
        centre = (float(columns.mean()), float(rows.mean()))
        rotated = cv2.warpAffine(binary, cv2.getRotationMatrix2D(centre, rng.uniform(90, 270), 1), binary.shape[::-1])
        return (rotated > 0) | visible
    radius = max(2, int(np.sqrt(visible.sum()) * rng.uniform(0.1, 0.4)))
    return cv2.dilate(binary, cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * radius + 1,) * 2)).astype(bool)


def convex_hull(region):
    """The convex hull of a region that is not empty, (H,W) bool → (H,W) bool."""
    contours, _ = cv2.findContours(region.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
    hull = cv2.convexHull(np.concatenate(contours))
    return cv2.fillPoly(np.zeros(region.shape, np.uint8), [hull], 1).astype(bool)


def inpaint(colour, known):
    """Smooth continuation of the known pixels, (h,w,3), by push-pull (Gortler et al. 1996).

    It is computed at 64 pixels at most, since the result has no detail.
    """
    if not known.any():
        return np.full_like(colour, 128)
    height, width = known.shape
    scale = min(1, 64 / max(height, width))
    small = max(1, round(width * scale)), max(1, round(height * scale))
    masked = cv2.bitwise_and(colour, colour, mask=known.view(np.uint8)).astype(np.float32)
    planes = total = np.dstack([cv2.resize(x, small, interpolation=cv2.INTER_AREA).reshape(small[1], small[0], -1)
                                for x in (masked, known.astype(np.float32))])
    weight = np.float32(1)
    while max(planes.shape[:2]) > 1:  # coarser means, each with a tenth of the weight of the previous one
        half = (planes.shape[1] + 1) // 2, (planes.shape[0] + 1) // 2
        planes, weight = cv2.resize(planes, half, interpolation=cv2.INTER_AREA), weight * np.float32(0.1)
        total = total + weight * cv2.resize(planes, small, interpolation=cv2.INTER_LINEAR)
    filled = np.clip(total[..., :3] / np.maximum(total[..., 3:], 1e-12), 0, 255)
    return cv2.resize(filled.astype(np.uint8), (width, height), interpolation=cv2.INTER_LINEAR)


def _borrowed_detail(colour, known, smooth, size, rng):
    """Fine texture of the known part, moved by a random offset, (h,w,3) float32 around 0."""
    height, width = known.shape
    filled = np.where(known[..., None], colour, smooth)
    coarse = max(1, round(width * 24 / size)), max(1, round(height * 24 / size))
    low = cv2.resize(cv2.resize(filled, coarse, interpolation=cv2.INTER_AREA), (width, height),
                     interpolation=cv2.INTER_LINEAR)
    detail = cv2.subtract(filled, low, dtype=cv2.CV_32F)
    detail = np.roll(detail, rng.integers(-size // 4, size // 4, 2), (0, 1))
    return detail[:, ::-1] if rng.random() < 0.5 else detail


def _moved_copy(rgba, known, size, rng):
    """The known part, rotated, scaled and shifted, (h,w,3); a smooth continuation fills the rest."""
    rows, columns = np.nonzero(known)
    matrix = cv2.getRotationMatrix2D((float(columns.mean()), float(rows.mean())), rng.uniform(-60, 60),
                                     rng.uniform(0.8, 1.4))
    matrix[:, 2] += rng.normal(0, size * 0.05, 2)
    moved = cv2.warpAffine(rgba, matrix, rgba.shape[1::-1], flags=cv2.INTER_LINEAR)
    return np.where(moved[..., 3:] > 200, moved[..., :3], inpaint(rgba[..., :3], known))


def leave_traces(photo, mask, colour, known, alpha, rng):
    """Mix the occluder's colour into the invented part beside the known one, in place: the colour of the photo, or in
    the hole black or white."""
    seam = _dilated(known, int(rng.integers(1, 5))) & (alpha > 0) & ~known
    share = rng.uniform(0.3, 1)
    occluder = np.where(mask[..., None], 0 if rng.random() < 0.5 else 255, photo)
    colour[seam] = ((1 - share) * colour[seam] + share * occluder[seam]).astype(np.uint8)


def grow_alpha(colour, alpha, source, mask, size, rng):
    """Alpha that reaches too far, into the hole or under other objects.

    `colour` continues there the pixels of `source` (h,w) bool, in place. Returns a new alpha.
    """
    radius = int(rng.integers(1, max(3, size // 12)))
    kernel = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * radius + 1,) * 2)
    ring = (cv2.dilate(alpha, kernel) > 127) & (alpha < 128) & (mask | bool(rng.random() < 0.3))
    np.copyto(colour, inpaint(colour, source), where=ring[..., None])
    alpha = alpha.copy()
    alpha[ring] = 255
    return alpha


def damage_edges(rgba, rng):
    """Erode, dilate (with a halo) or soften alpha; sometimes shift the whole picture by up to 3 pixels.

    Changes `rgba` in place and returns the result.
    """
    alpha = rgba[..., 3]
    draw = rng.random()
    if draw < 0.15:
        alpha = cv2.erode(alpha, np.ones((2 * int(rng.integers(1, 3)) + 1,) * 2, np.uint8))
    elif draw < 0.3:
        wide = cv2.dilate(alpha, np.ones((2 * int(rng.integers(1, 3)) + 1,) * 2, np.uint8))
        rim = (wide > 0) & (alpha < 128)
        halo = rng.choice((0, 255, -1))
        rgba[rim, :3] = inpaint(rgba[..., :3], alpha > 200)[rim] if halo < 0 else halo
        alpha = wide
    elif draw < 0.45:
        alpha = cv2.GaussianBlur(alpha, (0, 0), rng.uniform(0.5, 2))
        alpha[rgba[..., 3] == 0] = 0  # there is no colour
    rgba[..., 3] = alpha
    return np.roll(rgba, rng.integers(-3, 4, 2), (0, 1)) if rng.random() < 0.06 else rgba


def redraw(rgba, window, size, rng, strong):
    """Draw the whole object again: slight warp, colour shift, blur, resampling, noise, JPEG.

    The weak form follows PACO's diffusion completions where the photo shows the object (88 layers of 31 photos, median
    and 10–90 %): colour shift 0.3 (0.1–0.9) levels, uneven shift 0.8 (0.5–1.3) levels, contrast 1.00 (0.99–1.03) times
    the photo's, gradient energy 1.1 (0.8–1.6) times, 0.6 (0.3–0.8) pixels off, and a fine residue of 9 (5–12) levels
    that grows with the local gradient. Larger errors stay possible but rare. There are no measurements for the strong
    form.

    Args:
        window: two slices, the rows and columns of the scene that `rgba` shows.
        strong: mostly larger errors, and a non-rigid warp.
    """
    height, width = rgba.shape[:2]
    amount = rng.uniform(0.5, 2.5) if strong else rng.lognormal(np.log(0.2), 0.8)
    offset = 0.003 * amount if strong else 0.0015  # of the side
    matrix = cv2.getRotationMatrix2D((size / 2, size / 2), rng.normal(0, 0.3 * amount),
                                     1 + rng.normal(0, 0.004 * amount))
    corner = np.array([window[1].start, window[0].start])
    matrix[:, 2] += matrix[:, :2] @ corner - corner + rng.normal(0, offset * size, 2)
    drawn = rgba.astype(np.float32)
    drawn[..., :3] *= drawn[..., 3:] * np.float32(1 / 255)
    if strong or rng.random() < 0.5:
        scale = rng.uniform(0.4, 0.9)
        small = max(8, round(width * scale)), max(8, round(height * scale))
        drawn = cv2.resize(drawn, small, interpolation=cv2.INTER_AREA)
        drawn = cv2.resize(drawn, (width, height), interpolation=cv2.INTER_CUBIC)
    if strong and rng.random() < 0.5:
        bend = rng.normal(0, 0.006 * amount * size, (3, 3, 2)).astype(np.float32)
        bend = cv2.resize(bend, (width, height), interpolation=cv2.INTER_CUBIC)
        bend += np.dstack(np.meshgrid(np.arange(width), np.arange(height)))
        drawn = cv2.remap(drawn, cv2.transform(bend, cv2.invertAffineTransform(matrix)), None, cv2.INTER_LINEAR)
    else:
        drawn = cv2.warpAffine(drawn, matrix, (width, height), flags=cv2.INTER_LINEAR)
    alpha = np.clip(drawn[..., 3:], 0, 255)
    colour = drawn[..., :3] * (255 * rng.normal(1, 0.03 * amount, 3).astype(np.float32) / np.maximum(alpha, 1))
    wave = rng.normal(0, 6 * amount, (4, 4, 3)).astype(np.float32)
    colour += cv2.resize(wave, (width, height), interpolation=cv2.INTER_CUBIC)
    colour += 2 * rng.standard_normal(colour.shape, np.float32)
    if not strong:
        colour += _fine_errors(colour, rng)
        if rng.random() < 0.6:  # most models of this kind write hard masks
            alpha = np.where(alpha > 127, np.float32(255), np.float32(0))
    result = np.empty_like(rgba)
    result[..., :3], result[..., 3:] = np.clip(colour, 0, 255, out=colour), alpha
    if rng.random() < 0.3:
        result[..., :3] = through_jpeg(result[..., :3], rng.integers(40, 90))
    return result


def _fine_errors(colour, rng):
    """Errors in fine detail, stronger where the picture has more of it, (h,w,1) float32."""
    grey = colour.mean(2)
    gradient = np.hypot(cv2.Sobel(grey, cv2.CV_32F, 1, 0, scale=1 / 8), cv2.Sobel(grey, cv2.CV_32F, 0, 1, scale=1 / 8))
    strength = np.float32(rng.uniform(0, 4)) + np.float32(rng.uniform(0.1, 0.6)) * gradient
    return (strength * rng.standard_normal(strength.shape, np.float32))[..., None]


def through_jpeg(rgb, quality):
    """A picture after JPEG compression."""
    _, data = cv2.imencode(".jpg", rgb, [cv2.IMWRITE_JPEG_QUALITY, int(quality)])
    return cv2.imdecode(data, cv2.IMREAD_COLOR)


def on_white(rgba, edge, rng):
    """Put an object on near-white, compress it, and key out the white again, as in the pix2gestalt pipeline.

    Args:
        edge: share of the scene's border that the object covers. Where it covers most of the border, `create` finds no
            white background and keys nothing; here too.
    """
    white = rng.uniform(243, 255, 3).astype(np.float32)
    alpha = rgba[..., 3:] * np.float32(1 / 255)
    drawn = white + alpha * (rgba[..., :3] - white) + rng.standard_normal(alpha.shape, np.float32)
    drawn = np.clip(drawn, 0, 255).astype(np.uint8)
    if rng.random() < 0.7:
        drawn = through_jpeg(drawn, rng.integers(70, 96))
    return key_background(drawn, "white" if edge < 0.85 else "opaque")[0]
