"""Compare the pictures of one scene: where they agree, what is blank, whose outline a region has.

`create` uses it on raw results, `check` on prepared scenes. Pictures are uint8, regions (H,W) bool.
"""

import cv2
import numpy as np

WHOLE_FRAME = 0.95  # share of the picture; a completion that covers more is a background
MOST_CHANGED = 0.02  # share of the visible photo; JPEG of quality 10 stays below
DIFFERENT_PHOTO = 12  # mean difference in levels between photo and partial image; JPEG noise stays below 5
FITS = 40  # levels; a completion may show what the photo shows below this difference
FITS_CLOSELY = 16  # stricter: a wall of a similar colour fits loosely everywhere
BLANK = 20  # levels from black or white; JPEG noise in a blank hole stays below


def grown(region, pixels):
    """`region` grown by `pixels` in a square."""
    return cv2.dilate(region.astype(np.uint8), np.ones((2 * pixels + 1,) * 2, np.uint8)) > 0


def core(region):
    """`region` without its edge, where JPEG mixes both sides; a thin region is returned unchanged."""
    inner = cv2.erode(region.astype(np.uint8), np.ones((7, 7), np.uint8)) > 0
    return inner if inner.any() else region


def largest(colours):
    """(…,3) → (…): `max(-1)`, many times faster."""
    return np.maximum(np.maximum(colours[..., 0], colours[..., 1]), colours[..., 2])


def alike(picture, other):
    """Two (…,3) → (…) bool: where both may show the same, up to JPEG noise or redrawing."""
    return largest(cv2.absdiff(picture, other)) <= FITS


def blank_share(picture, region):
    """The share of `region` that has one colour, up to JPEG noise."""
    pixels = picture[core(region)]
    if not len(pixels):
        return 0.0
    return float((largest(np.abs(pixels - np.median(pixels, 0))) <= BLANK).mean())


def agreement(picture, other, region):
    """The share of `region` where two pictures are alike; 1 if it is empty."""
    region = core(region)
    if not region.any():
        return 1.0
    return float(alike(picture[region], other[region]).mean())


def is_blank_exactly_in(picture, region):
    """Whether a picture has one colour in all of `region` and not around it: then the region was blanked.

    The sky of a photo may be as flat, but it does not end with the region.
    """
    inner, edge, ring = core(region), region & ~grown(~region, 1), grown(region, 4) & ~grown(region, 1)
    if np.count_nonzero(inner) < 50 or not edge.any() or not ring.any():
        return False
    colour = np.median(picture[inner], 0)
    flat, around = (largest(np.abs(picture[place] - colour)) <= BLANK for place in (edge, ring))
    return bool(flat.mean() > 0.97 and picture[inner].std(0).max() <= 3 and around.mean() < 0.5)


def photo_fault(original, partial, hole):
    """The fault if the partial image shows another photo than the original, or a shifted one; else None."""
    visible = ~grown(hole, 4)
    visible[:2] = visible[-2:] = visible[:, :2] = visible[:, -2:] = False
    if not visible.any():
        return None
    shown = partial[visible].astype(np.float32)

    def distance(dy, dx):
        return np.abs(np.roll(original, (dy, dx), (0, 1))[visible] - shown).mean()

    here = float(cv2.absdiff(original, partial)[visible].mean())
    if here > 2:
        shifts = range(-2, 3)
        nearest, dy, dx = min((distance(dy, dx), dy, dx) for dy in shifts for dx in shifts)
        if nearest < 0.5 * here:
            return f"shifted by {dx},{dy} pixels against"
    if here > DIFFERENT_PHOTO:
        return f"another photo? It differs by {here:.0f} levels outside the hole from"
    changed = (largest(cv2.absdiff(original, partial)) > 2 * BLANK) & visible
    changed = cv2.morphologyEx(changed.astype(np.uint8), cv2.MORPH_OPEN, np.ones((5, 5), np.uint8))[visible].mean()
    if changed > MOST_CHANGED:  # similar photos: frames of one camera, products before one background
        return f"another photo? {changed:.0%} of the visible part differs from"
    return None


def outlined_object(region, alphas):
    """The completion whose visible part is `region`, judged by outlines.

    A modal mask lies within its object, and its edge is the object's edge or that of an object in front. A hole cuts
    through objects.

    Args:
        region: (H,W) bool; alphas: list of (H,W) uint8.

    Returns:
        the completion's index, or None.
    """
    step = max(1, round(max(region.shape) / 128))  # outlines need no full resolution
    region = region[::step, ::step].astype(np.uint8)
    edge = region > cv2.erode(region, np.ones((3, 3), np.uint8))
    length = np.count_nonzero(edge)
    if length < 8:
        return None
    shapes = [alpha[::step, ::step] > 127 for alpha in alphas]
    shapes = [shape.astype(np.uint8) if shape.mean() < WHOLE_FRAME else np.zeros_like(region) for shape in shapes]
    inside = [np.count_nonzero(region & shape) / np.count_nonzero(region) for shape in shapes]
    if max(inside, default=0) < 0.8:
        return None
    reach = np.ones((2 * round(max(region.shape) / 64) + 1,) * 2, np.uint8)
    outlines = [cv2.dilate(shape - cv2.erode(shape, np.ones((3, 3), np.uint8)), reach) > 0 for shape in shapes]
    on_any = np.count_nonzero(edge & np.any(outlines, 0)) / length
    for index, (share, outline) in enumerate(zip(inside, outlines)):
        on_own = np.count_nonzero(edge & outline) / length
        if share >= 0.97:  # parts of its edge belong to what hides it, which may have no completion
            on_others = 0.85 if on_own >= 0.4 else 0.95
            follows = on_own >= 0.6 or (on_own >= 0.3 and (on_any >= on_others or min(inside) >= 0.97))
        else:  # masks of small objects are rarely exact
            follows = share >= 0.8 and on_own >= 0.9
        if follows:
            return index
    return None


LIKE_SIZED = 0.4  # ratio of two areas; below it their fits cannot be compared
OTHER_WAYS = {  # other ways in which completions may fit the photo → the fault
    "swapped": "red and blue are swapped in the completions: swapped back, they fit the photo; write them again "
               "(cv2.imwrite takes BGR)",
    "mirrored": "the completions are mirrored against the photo, left to right; write them again, or mirror the photo",
    "upside down": "the completions are upside down against the photo; write them again, or turn the photo",
    "transparent": "the alpha of the completions is inverted: they fit the photo only where they are transparent; "
                   "write 255 where the object is",
}


def misfit(photo, completions, visible, hole):
    """Whether completions fit the photo better in another way: red and blue swapped, mirrored, with inverted alpha.

    One object may be hidden everywhere outside the hole; of several at least one is visible.

    Args:
        photo: (H,W,3) uint8; completions: N × (H,W,4) uint8; visible: N × (H,W) bool or None; hole: (H,W) bool.

    Returns:
        the fault as a message, or None; and the largest share of the visible part of a completion that agrees with
        the photo, None if fewer than two have a visible part.
    """
    step = max(1, round(max(hole.shape) / 128))
    photo, beside = photo[::step, ::step], ~grown(hole, step + 1)[::step, ::step]
    # way → (pixels that fit, that fit closely, all) of each completion
    counts = {way: [] for way in ("as they are", *OTHER_WAYS)}
    for completion, shown in zip(completions, visible):
        colours, opaque = completion[::step, ::step, :3], completion[::step, ::step, 3] > 127
        if np.count_nonzero(opaque & beside) < 20:
            continue
        # transparent pixels are often plain black or white
        written = (colours > 2).any(2) & (colours < 253).any(2)
        hidden = ~opaque & written
        if shown is not None and (opaque & beside & shown[::step, ::step]).any():
            opaque = opaque & shown[::step, ::step]
        views = {"as they are": (colours, opaque), "swapped": (colours[..., ::-1], opaque),
                 "mirrored": (colours[:, ::-1], opaque[:, ::-1]), "upside down": (colours[::-1], opaque[::-1]),
                 "transparent": (colours, hidden)}
        for way, (view, place) in views.items():
            seen = place & beside
            if seen.any():
                apart = largest(cv2.absdiff(photo[seen], np.ascontiguousarray(view[seen])))
                fits, closely = (np.count_nonzero(apart <= levels) for levels in (FITS, FITS_CLOSELY))
                counts[way].append((fits, closely, len(apart)))
    own = [fits / pixels for fits, _, pixels in counts["as they are"]]
    if not own:
        return None, None
    fitting, closely, seen = (
        {way: sum(count[i] for count in found) for way, found in counts.items()} for i in range(3))
    shares = {way: fitting[way] / max(1, seen[way]) for way in counts}
    as_they_are = shares.pop("as they are")
    # a whole photo with an alpha also fits where it is transparent
    if as_they_are > 0.05 or len(own) < 2:
        shares.pop("transparent")
    for way in ("mirrored", "upside down"):  # turned, content of the hole may lie on a wall of the same colour
        if not LIKE_SIZED < seen[way] / seen["as they are"] < 1 / LIKE_SIZED:
            shares.pop(way)
    way = max(shares, key=shares.get)
    if shares[way] > max(2.5 * as_they_are, 0.3) and (way == "transparent" or closely[way] > 0.15 * seen[way]):
        return OTHER_WAYS[way], None
    return None, max(own) if len(own) > 1 else None
