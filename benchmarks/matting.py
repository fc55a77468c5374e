"""How well objects on a near-white background are cut out: alpha against the truth.

    python -m benchmarks.matting --objects ../shared/data/objects

Cut-outs with alpha are pasted on a background of 252 ± 1.5 levels, as diffusion models draw it, and keyed again. The
files are divided into two halves by a hash of their names: thresholds were chosen on `develop`, `held out` is the
result. Per half and kind of picture the table has the mean error of alpha, the share of enclosed gaps (a ring, the legs
of a chair) that stays opaque, and the share of the objects' own near-white area that stays.
"""

import argparse
import hashlib
import time

import cv2
import numpy as np

from amodal_fusion.data.images import read_image
from amodal_fusion.ingest.matting import key_background
from amodal_fusion.synthesis.assets import find_pictures

KINDS = ("noise", "flat", "jpeg 95", "jpeg 80", "shadow")


def paste(rgba, kind, rng):
    """A cut-out on near-white, (H,W,3) uint8, and its true alpha (H,W) in [0,1]."""
    margin = max(rgba.shape[:2]) // 8
    rgba = cv2.copyMakeBorder(rgba, *[margin] * 4, cv2.BORDER_CONSTANT)
    alpha = rgba[..., 3:] / 255.0
    background = np.full((*rgba.shape[:2], 3), 252.0)
    if kind == "shadow":
        cast = cv2.GaussianBlur(np.roll(alpha[..., 0], margin // 3, (0, 1)), (0, 0), margin / 4)
        background -= 60 * cast[..., None]
    if kind != "flat":
        background += rng.normal(0, 1.5, background.shape)
    picture = np.clip(np.rint(alpha * rgba[..., :3] + (1 - alpha) * background), 0, 255).astype(np.uint8)
    if kind.startswith("jpeg"):
        _, data = cv2.imencode(".jpg", picture, [cv2.IMWRITE_JPEG_QUALITY, int(kind.split()[1])])
        picture = cv2.imdecode(data, cv2.IMREAD_COLOR)
    return picture, alpha[..., 0]


def enclosed(alpha):
    """Where the background shows through an object, (H,W) bool."""
    _, labels = cv2.connectedComponents((alpha < 0.02).astype(np.uint8), connectivity=4)
    outer = np.unique(np.concatenate([labels[0], labels[-1], labels[:, 0], labels[:, -1]]))
    return (labels > 0) & ~np.isin(labels, outer)


def score(rgba, kind, rng):
    """Error of alpha; gap kept and gap; near-white kept and near-white, in pixels; seconds."""
    picture, alpha = paste(rgba, kind, rng)
    start = time.perf_counter()
    keyed = key_background(picture)[0][..., 3] / 255.0
    seconds = time.perf_counter() - start
    gap = enclosed(alpha)
    if gap.sum() < 0.01 * (alpha > 0.5).sum():
        gap[:] = False
    white = (alpha > 0.98) & (picture.min(2) >= 228)
    return (np.abs(keyed - alpha).mean(), (keyed[gap] > 0.5).sum(), gap.sum(), (keyed[white] > 0.5).sum(), white.sum(),
            seconds)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--objects", required=True, help="folder of cut-outs with alpha")
    parser.add_argument("--kinds", nargs="+", default=KINDS, choices=KINDS, metavar="KIND", help=", ".join(KINDS))
    parser.add_argument("--halves", nargs="+", default=("develop", "held out"))
    options = parser.parse_args()
    cv2.setNumThreads(1)
    halves = {"develop": [], "held out": []}
    for path in find_pictures(options.objects)[0]:
        rgba = read_image(path, "RGBA")
        digest = hashlib.sha256(path.read_bytes()).digest()
        if digest[1] < 148 and (rgba[..., 3] < 10).mean() > 0.02:  # about 300 files
            halves["develop" if digest[0] < 128 else "held out"].append((rgba, list(digest[:4])))
    print("| kind | half | pictures | alpha error | with gaps | gaps kept | near-white kept | ms |")
    print("|---" * 8 + "|")
    for kind in options.kinds:
        for half in options.halves:
            rows = np.array([score(rgba, kind, np.random.default_rng(seed)) for rgba, seed in halves[half]])
            error, gap_kept, gap, white_kept, white, seconds = rows.T
            print(f"| {kind} | {half} | {len(rows)} | {error.mean():.4f} | {(gap > 0).sum()} | "
                  f"{gap_kept.sum() / gap.sum():.3f} | {white_kept.sum() / white.sum():.3f} | "
                  f"{1000 * seconds.mean():.1f} |")


if __name__ == "__main__":
    main()
