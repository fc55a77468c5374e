"""What completion models make of an object that is partly hidden, good and bad.

Three styles. "copy" keeps the visible pixels exactly (PCNet and its kin), "redraw" draws the whole object again
(diffusion), "pix2gestalt" draws it again through a lossy codec on white, many times at several granularities, and the
alpha is keyed from the white.
"""

from dataclasses import replace

import cv2
import numpy as np

from fusion.data.keying import key_background


def as_received(photo, layers, rng):
    """The photo and its objects as the completer had them: often saved again, or at its own size and scaled back, so
    that its copies are nearly exact, and its masks softer than the photo's edges."""
    size, draw = photo.shape[0], rng.random()
    if draw < 0.3:
        return photo, layers
    if draw < 0.75:
        small = int(size * rng.uniform(0.35, 1))
        enlarge = cv2.INTER_LINEAR if rng.random() < 0.5 else cv2.INTER_CUBIC

        def scaled(image):
            return cv2.resize(cv2.resize(image, (small, small), interpolation=cv2.INTER_AREA), (size, size),
                              interpolation=enlarge)

        photo = scaled(photo)
        layers = [replace(layer, whole=_with_alpha(layer.whole, scaled(layer.whole[..., 3]))) for layer in layers]
    if draw > 0.6:
        photo = _jpeg(photo, rng.integers(60, 96))
    return photo, layers


def _with_alpha(rgba, alpha):
    """Another alpha; where there was none, colours go on."""
    beyond = (alpha > 0) & (rgba[..., 3] == 0)
    rgba = np.dstack([rgba[..., :3], alpha])
    rgba[beyond, :3] = _inpainted(rgba[..., :3], ~beyond & (alpha > 200))[beyond]
    return rgba


def complete(photo, layers, mask, style, foreign, rng):
    """Completions of all objects.

    Args:
        photo (H,W,3) uint8, as the completer had it; layers: list of Layer; mask (H,W) bool, True = hole.
        style: "copy", "redraw" or "pix2gestalt".
        foreign: function of rng → (H,W,3), some other texture.

    Returns:
        list of (H,W,4) uint8, straight alpha, in no order.
    """
    # Either the completer saw the whole photo and the hole came later, or it had to work around the hole.
    seen = np.ones_like(mask) if style == "copy" and rng.random() < 0.9 else ~mask
    quality = rng.uniform(0, 1)  # models differ in how often they are right
    completions = []
    for layer in layers:
        samples = 1
        if style == "pix2gestalt":
            samples = rng.integers(1, 4)
        elif rng.random() < 0.15:
            samples = 2
        for _ in range(samples):
            completions.append(_complete_one(photo, layer, layers, seen, mask, style, quality, foreign, rng))
    if style == "pix2gestalt" and rng.random() < 0.5:
        completions.append(_other_granularity(completions, rng))
    if rng.random() < 0.06:  # a wrong object: one of these somewhere else
        wrong = completions[rng.integers(len(completions))]
        shift = rng.integers(-photo.shape[0] // 3, photo.shape[0] // 3, 2)
        completions.append(np.roll(wrong, shift, (0, 1)))
    if rng.random() < 0.06:
        nothing = np.zeros_like(completions[0])
        at = rng.integers(0, photo.shape[0] - 3, 2)
        nothing[at[0] : at[0] + 3, at[1] : at[1] + 3] = 255
        completions.append(nothing)
    return completions


def _complete_one(photo, layer, layers, seen, mask, style, quality, foreign, rng):
    colour, alpha, known = layer.whole[..., :3].copy(), layer.whole[..., 3].copy(), layer.visible & seen
    # It knows the photo, where an object's rim is mixed with what lies behind, and never the object alone.
    rim = (alpha > 0) & (alpha < 255) & (cv2.dilate(known.astype(np.uint8), np.ones((7, 7), np.uint8)) > 0) & seen
    colour[rim] = photo[rim]
    hidden = (alpha > 0) & ~known & ~rim
    if hidden.any():
        colour, alpha = _draw_hidden(layer, colour, alpha, known, hidden, quality, foreign, rng)
    # Those that copy are given clean masks and clear views, mostly: what they keep can be trusted.
    careless = style != "copy" or rng.random() < 0.2
    if careless and rng.random() < 0.15:
        colour = _leftovers(photo, mask, colour, known, alpha, rng)
    if careless and rng.random() < 0.3 and len(layers) > 1:
        alpha = _grow(colour, alpha, known, mask, layer, rng)
    result = np.dstack([colour, alpha])
    if careless:
        result = _damage_edges(result, rng)
    if style != "copy":
        result = _redraw(result, rng, strong=style == "pix2gestalt")
    elif rng.random() < 0.85:
        # copied exactly where the object can be seen, up to its rim
        kept = (known & (layer.whole[..., 3] == 255)) | rim
        result[kept] = np.dstack([photo, layer.whole[..., 3]])[kept]
        if rng.random() < 0.5:  # many completers write hard masks
            result[..., 3] = np.where(result[..., 3] > 127, 255, 0)
    if style == "pix2gestalt":
        result = _through_white(result, rng)
    return result


def _draw_hidden(layer, colour, alpha, known, hidden, quality, foreign, rng):
    """Make up the hidden part, in place of the truth."""
    unknown = hidden
    if rng.random() < 0.2 + 0.6 * quality:  # a model that got it right, as far as anybody knows
        unknown = hidden & ~layer.visible if not layer.true else np.zeros_like(hidden)
    draw = rng.random()
    if not unknown.any():
        pass
    elif draw < 0.65 or not known.any():
        colour[unknown] = _inpainted(colour, known)[unknown]
        if known.any() and rng.random() < 0.6:  # with texture of its own, from elsewhere on the object
            colour[unknown] = np.clip(colour[unknown] + 0.8 * _own_detail(colour, known, rng)[unknown], 0, 255)
    elif draw < 0.85:
        colour[unknown] = _warped(np.dstack([colour, known * np.uint8(255)]), known, rng)[unknown]
    else:
        texture = foreign(rng).astype(np.float32)
        if rng.random() < 0.7:
            texture += colour[known].mean(0) - texture.mean((0, 1))
        colour[unknown] = np.clip(texture, 0, 255)[unknown]
    if rng.random() < 0.25:  # cut short along a line, or 1-5 pixels from what is known
        size = alpha.shape[0]
        if rng.random() < 0.7:
            y, x = np.mgrid[:size, :size]
            angle = rng.uniform(0, 2 * np.pi)
            along = x * np.cos(angle) + y * np.sin(angle)
            alpha[hidden & (along > np.quantile(along[hidden], rng.uniform(0.1, 0.9)))] = 0
        elif known.any():
            near = cv2.dilate(known.astype(np.uint8), np.ones((2 * int(rng.integers(1, 4)) + 1,) * 2, np.uint8)) > 0
            alpha[hidden & near] = 0
    return colour, alpha


def _inpainted(colour, known):
    """Smooth continuation of the known pixels, computed small: it has no detail anyway."""
    if not known.any():
        return np.full_like(colour, 128)
    size = colour.shape[0]
    small = min(64, size)
    weight = cv2.resize(known.astype(np.float32), (small, small), interpolation=cv2.INTER_AREA)
    mean = cv2.resize(colour * known[..., None].astype(np.float32), (small, small), interpolation=cv2.INTER_AREA)
    total, weight = mean.copy(), weight.copy()
    scale = 1.0
    while scale < small:  # coarser and coarser means, each counting a hundredth of the one before
        mean, weight_now = (cv2.GaussianBlur(x, (0, 0), scale) for x in (mean, weight))
        total, weight = total + 0.01 * mean, weight + 0.01 * weight_now
        scale *= 2
    filled = np.clip(total / np.maximum(weight, 1e-9)[..., None], 0, 255)
    return cv2.resize(filled, (size, size), interpolation=cv2.INTER_LINEAR).astype(np.uint8)


def _own_detail(colour, known, rng):
    """Fine texture of the known part, moved to somewhere else."""
    filled = np.where(known[..., None], colour, _inpainted(colour, known)).astype(np.float32)
    detail = filled - cv2.GaussianBlur(filled, (0, 0), max(1.0, colour.shape[0] / 32))
    detail = np.roll(detail, rng.integers(-colour.shape[0] // 4, colour.shape[0] // 4, 2), (0, 1))
    return detail[:, ::-1] if rng.random() < 0.5 else detail


def _warped(rgba, known, rng):
    """The known part turned and shifted over the rest; smooth where nothing lands."""
    size = rgba.shape[0]
    rows, columns = np.nonzero(known)
    matrix = cv2.getRotationMatrix2D((float(columns.mean()), float(rows.mean())), rng.uniform(-60, 60),
                                     rng.uniform(0.8, 1.4))
    matrix[:, 2] += rng.normal(0, size * 0.05, 2)
    moved = cv2.warpAffine(rgba, matrix, (size, size), flags=cv2.INTER_LINEAR)
    return np.where(moved[..., 3:] > 200, moved[..., :3], _inpainted(rgba[..., :3], known))


def _leftovers(photo, mask, colour, known, alpha, rng):
    """The colour of what hides it shines through beside the seam: the nearer object's, or the blank of the hole."""
    seam = cv2.dilate(known.astype(np.uint8), np.ones((2 * int(rng.integers(1, 5)) + 1,) * 2, np.uint8)) > 0
    seam &= (alpha > 0) & ~known
    share = rng.uniform(0.3, 1)
    other = np.where(mask[..., None], 0 if rng.random() < 0.5 else 255, photo)
    colour[seam] = ((1 - share) * colour[seam] + share * other[seam]).astype(np.uint8)
    return colour


def _grow(colour, alpha, known, mask, layer, rng):
    """Alpha that runs on too far, into the hole or under other objects, with colours smeared outwards."""
    radius = int(rng.integers(1, max(3, alpha.shape[0] // 12)))
    kernel = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * radius + 1,) * 2)
    ring = (cv2.dilate(alpha, kernel) > 127) & (alpha < 128) & (mask | bool(rng.random() < 0.3))
    source = (layer.whole[..., 3] > 200) | known
    colour[ring] = _inpainted(colour, source)[ring]
    alpha = alpha.copy()
    alpha[ring] = 255
    return alpha


def _damage_edges(rgba, rng):
    """Alpha eroded, dilated, soft or with a halo; now and then all of it a few pixels off."""
    alpha = rgba[..., 3]
    draw = rng.random()
    if draw < 0.15:
        alpha = cv2.erode(alpha, np.ones((2 * int(rng.integers(1, 3)) + 1,) * 2, np.uint8))
    elif draw < 0.3:
        wide = cv2.dilate(alpha, np.ones((2 * int(rng.integers(1, 3)) + 1,) * 2, np.uint8))
        rim = (wide > 0) & (alpha < 128)
        halo = rng.choice((0, 255, -1))
        smeared = _inpainted(rgba[..., :3], alpha > 200)
        rgba[rim, :3] = smeared[rim] if halo < 0 else halo
        alpha = wide
    elif draw < 0.45:
        alpha = cv2.GaussianBlur(alpha, (0, 0), rng.uniform(0.5, 2))
        alpha[rgba[..., 3] == 0] = 0  # no colour is known there
    rgba = np.dstack([rgba[..., :3], alpha])
    if rng.random() < 0.06:
        rgba = np.roll(rgba, rng.integers(-3, 4, 2), (0, 1))
    return rgba


def _redraw(rgba, rng, strong):
    """Draw the whole object again: slight warp, colour shift, blur, resampling, noise, JPEG."""
    size = rgba.shape[0]
    amount = 2.0 if strong else 1.0
    matrix = cv2.getRotationMatrix2D((size / 2, size / 2), rng.normal(0, 0.3 * amount),
                                     1 + rng.normal(0, 0.004 * amount))
    matrix[:, 2] += rng.normal(0, 0.003 * amount * size, 2)
    premultiplied = rgba.astype(np.float32)
    premultiplied[..., :3] *= premultiplied[..., 3:] / 255
    if rng.random() < 0.5 * amount:
        small = max(8, int(size * rng.uniform(0.4, 0.9)))
        premultiplied = cv2.resize(premultiplied, (small, small), interpolation=cv2.INTER_AREA)
        premultiplied = cv2.resize(premultiplied, (size, size), interpolation=cv2.INTER_CUBIC)
    moved = cv2.warpAffine(premultiplied, matrix, (size, size), flags=cv2.INTER_LINEAR)
    alpha = np.clip(moved[..., 3:], 0, 255)
    colour = moved[..., :3] * 255 / np.maximum(alpha, 1)
    wave = cv2.resize(rng.normal(0, 6 * amount, (4, 4, 3)).astype(np.float32), (size, size),
                      interpolation=cv2.INTER_CUBIC)
    colour = colour * rng.normal(1, 0.03 * amount, 3) + wave + rng.normal(0, 2, colour.shape)
    result = np.dstack([np.clip(colour, 0, 255), alpha]).astype(np.uint8)
    if rng.random() < 0.3:
        result[..., :3] = _jpeg(result[..., :3], rng.integers(40, 90))
    return result


def _jpeg(rgb, quality):
    _, data = cv2.imencode(".jpg", rgb, [cv2.IMWRITE_JPEG_QUALITY, int(quality)])
    return cv2.imdecode(data, cv2.IMREAD_COLOR)


def _through_white(rgba, rng):
    """Onto near-white, through a codec, and keyed out again, as the user's pipeline does."""
    white = rng.uniform(243, 255, 3)
    alpha = rgba[..., 3:] / 255.0
    drawn = rgba[..., :3] * alpha + white * (1 - alpha) + rng.normal(0, 1, rgba.shape[:2])[..., None]
    drawn = np.clip(drawn, 0, 255).astype(np.uint8)
    if rng.random() < 0.7:
        drawn = _jpeg(drawn, rng.integers(70, 96))
    keyed, _ = key_background(drawn, "white")
    return keyed


def _other_granularity(completions, rng):
    """A part of one object, or two objects as one: proposals come at several granularities."""
    first = completions[rng.integers(len(completions))]
    if rng.random() < 0.5:
        second = completions[rng.integers(len(completions))]
        return np.where(second[..., 3:] > 127, second, first)
    size = first.shape[0]
    y, x = np.mgrid[:size, :size]
    angle, part = rng.uniform(0, 2 * np.pi), first.copy()
    along = x * np.cos(angle) + y * np.sin(angle)
    inside = first[..., 3] > 0
    if inside.any():
        part[along > np.quantile(along[inside], rng.uniform(0.3, 0.8))] = 0
    return part


def whole_background(photo, layers, mask, behind, rng):
    """The scene without its objects as one more completion that covers the whole frame.

    Args:
        behind: (H,W,3) the true background, or None when nobody knows it.
    """
    objects = np.max([layer.whole[..., 3] for layer in layers], 0) > 0
    known = ~cv2.dilate((objects | mask).astype(np.uint8), np.ones((3, 3), np.uint8)).astype(bool)
    if behind is None or rng.random() < 0.6:
        colour = np.where(known[..., None], photo, _inpainted(photo, known))
    else:
        colour = behind
    result = np.dstack([colour, np.full(photo.shape[:2], 255, np.uint8)]).astype(np.uint8)
    return result if rng.random() < 0.5 else _redraw(result, rng, strong=False)


