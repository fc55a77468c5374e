"""Reading and writing pictures, rules and figures of merit, LPIPS."""

import struct
import warnings

import cv2
import lpips
import numpy as np
import pytest
import torch
from PIL import Image, ImageCms, PngImagePlugin

from amodal_fusion.checkpoints import load_checkpoint
from amodal_fusion.data.images import read_image, resize, write_image
from amodal_fusion.errors import LpipsUnavailable, SceneError
from amodal_fusion.evaluation.metrics import (
    MOST_PSNR,
    compare_methods,
    gap_closed,
    overlap_region,
    region_l1,
    region_psnr,
    region_ssim,
    undecided_share,
)
from amodal_fusion.evaluation.perceptual import PerceptualLoss
from amodal_fusion.evaluation.rules import RULES, apply_rules, oracle, visible_error, visible_score
from amodal_fusion.files import atomic_file
from amodal_fusion.model.compositing import fill_hole, paint_over, push_pull
from tests.scripts import ROOT

TRAINED = ROOT / "pretrained" / "squeezenet1_1_features.pth"


def picture(height=40, width=30, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize("suffix", ["png", "bmp", "tif", "webp"])
def test_lossless_formats_come_back_exactly(tmp_path, suffix):
    path = tmp_path / f"그림 😀.{suffix}"
    Image.fromarray(picture()).save(path, **({"lossless": True} if suffix == "webp" else {}))
    assert np.array_equal(read_image(path, "RGB"), picture())


def test_modes_that_pillow_misreads(tmp_path):
    grey16 = (np.arange(1200, dtype=np.uint16).reshape(40, 30) * 54)
    Image.fromarray(grey16).save(tmp_path / "16.png")
    assert np.abs(read_image(tmp_path / "16.png", "L").astype(int) - grey16 / 257).max() <= 0.5
    night = np.full((40, 30, 4), 65535, np.uint16)
    night[..., :3] = 3000  # below 12 bits, but its alpha is not
    cv2.imwrite(str(tmp_path / "night.png"), night)
    assert (read_image(tmp_path / "night.png", "RGBA") == (12, 12, 12, 255)).all()
    Image.fromarray(picture()).quantize(256).save(tmp_path / "palette.png")
    assert np.abs(read_image(tmp_path / "palette.png", "RGB").astype(int) - picture()).mean() < 30
    Image.fromarray(picture()).convert("CMYK").save(tmp_path / "cmyk.jpg", quality=100)
    assert read_image(tmp_path / "cmyk.jpg", "RGB").shape == (40, 30, 3)
    hidden = np.dstack([picture(), np.zeros((40, 30), np.uint8)])
    Image.fromarray(hidden).save(tmp_path / "hidden.png")
    assert not read_image(tmp_path / "hidden.png", "RGB").any()
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(picture()).save(tmp_path / "turned.png", exif=exif)
    assert np.array_equal(read_image(tmp_path / "turned.png", "RGB"), np.rot90(picture(), -1))


@pytest.mark.parametrize(("content", "fault"), [
    (None, "no such file"), (b"", "empty file"), (b"hello", "not a picture"), ("half", "damaged or truncated"),
    ("frames", "has 2 frames"), ("float", "floating-point"),
])
def test_faulty_pictures_are_named(tmp_path, content, fault):
    path = tmp_path / "victim.png"
    if content == "half":
        write_image(path, picture())
        path.write_bytes(path.read_bytes()[:2000])
    elif content == "frames":
        frames = [Image.fromarray(picture(seed=i)) for i in range(2)]
        frames[0].save(path, save_all=True, append_images=frames[1:])
    elif content == "float":
        path = tmp_path / "victim.tif"
        Image.fromarray(picture()[..., 0].astype(np.float32)).save(path)
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises(SceneError, match="victim") as error:
        read_image(path, "RGB")
    assert fault in str(error.value)


def test_decompression_bomb_is_refused(tmp_path, monkeypatch):
    write_image(tmp_path / "bomb.png", picture(400, 400))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(SceneError, match=r"bomb\.png.*decompression bomb"):
        read_image(tmp_path / "bomb.png", "RGB")


def test_resizing_never_bleeds_the_colour_of_transparent_pixels():
    image = np.zeros((64, 64, 4), np.uint8)
    image[..., :3] = (0, 255, 0)
    image[16:48, 16:48] = (200, 10, 30, 255)
    for size in ((24, 24), (100, 90)):
        small = resize(image, size)
        assert np.abs(small[small[..., 3] > 8, :3].astype(int) - (200, 10, 30)).max() <= 8


def test_an_interrupted_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt), atomic_file(path) as temporary:
        temporary.write_text("ne")
        raise KeyboardInterrupt
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_push_pull_keeps_known_pixels_and_smooths_others():
    x = torch.linspace(0, 1, 50).expand(1, 1, 37, 50)
    mask = torch.zeros(1, 1, 37, 50)
    mask[..., 10:25, 15:35] = 1
    filled = push_pull(x * (1 - mask), 1 - mask)
    assert torch.equal(filled[mask == 0], x[mask == 0])
    assert (filled - x).abs().max() < 0.06  # a ramp is a membrane; without relaxation 0.12
    assert torch.equal(push_pull(x, torch.zeros_like(mask)), torch.zeros_like(x))
    constant = fill_hole(torch.full((1, 3, 37, 50), 0.3) * (1 - mask), mask)
    assert torch.allclose(constant, torch.full_like(constant, 0.3), atol=1e-6)


def batch_of_two_squares():
    """Square 0 is the true front one; square 1 runs on under it. 8 px of both are visible left of the hole."""
    original = torch.full((1, 3, 32, 32), 0.5)
    front, rear = (torch.zeros(1, 4, 32, 32) for _ in range(2))
    front[:, 0, 8:24, 8:28], front[:, 3, 8:24, 8:28] = 1.0, 1.0
    rear[:, 2, 4:28, 4:20], rear[:, 3, 4:28, 4:20] = 1.0, 1.0
    for layer in (rear, front):
        original = original + layer[:, 3:] * (layer[:, :3] - original)
    mask = torch.zeros(1, 1, 32, 32)
    mask[..., 12:] = 1
    partial = original * (1 - mask)
    return {"partial": partial, "mask": mask, "completions": torch.stack([front, rear], 1),
            "valid": torch.ones(1, 2, dtype=torch.bool), "original": original, "fill": fill_hole(partial, mask)}


def test_rules_and_oracle_match_a_known_answer():
    batch = batch_of_two_squares()
    error = visible_error(batch)
    assert error[0, 0] == 0 and error[0, 1] > 0.2
    fused = apply_rules(batch)
    assert set(fused) == set(RULES)
    overlap = overlap_region(batch)
    assert overlap.sum() == 16 * 8
    psnr = compare_methods(batch, fused)
    score = {name: psnr[f"{name}_psnr_overlap"].item() for name in fused}
    assert score["visible_fit"] == pytest.approx(MOST_PSNR)  # the front one fits
    assert score["best_one"] == score["best_three"] == pytest.approx(MOST_PSNR)  # the front one fits
    assert psnr["best_one_psnr"] < psnr["best_three_psnr"]  # the rear one is there, too
    assert score["over_given"] < 10  # paints the rear one last
    assert score["over_area"] == pytest.approx(MOST_PSNR)  # the smaller one in front
    assert score["over_lowest"] < 10  # the rear one reaches lower
    assert score["over_given"] < score["mean"] < MOST_PSNR
    assert psnr["over_given_psnr"] == region_psnr(fused["over_given"], batch["original"], batch["mask"])
    best, choice = oracle(batch)
    assert region_psnr(best, batch["original"], overlap) == MOST_PSNR
    assert (choice[overlap[:, 0] > 0] == 0).all()
    for image in [*fused.values(), best]:
        assert torch.equal(image * (1 - batch["mask"]), batch["partial"])


def test_visible_score_mixes_mse_and_lpips(backbone):
    batch = batch_of_two_squares()
    batch["completions"][:, 0, :3] += 0.1  # MSE 0.01 wherever it is seen
    score = visible_score(batch)
    assert score[0, 0] == pytest.approx(100, rel=1e-4) and 0 < score[0, 1] < 100
    perceptual = PerceptualLoss("alex", backbone)
    seen = batch["completions"][:, :1, 3] * (1 - batch["mask"])
    pasted = batch["partial"] + seen * (batch["completions"][:, 0, :3] - batch["partial"])
    distance = perceptual(pasted, batch["partial"]) / seen.mean()
    assert visible_score(batch, perceptual)[0, 0] == pytest.approx(100 + 1 / distance.item(), rel=1e-3)
    hidden = batch | {"completions": batch["completions"] * batch["mask"][:, None]}
    assert (visible_score(hidden) == 0).all()  # nothing to compare
    assert visible_score(batch | {"valid": torch.tensor([[True, False]])})[0, 1] == -1


def test_invalid_slots_are_never_painted():
    batch = batch_of_two_squares() | {"valid": torch.tensor([[False, True]])}
    with_padding = apply_rules(batch)
    without = apply_rules({**batch, "completions": batch["completions"][:, 1:], "valid": batch["valid"][:, 1:]})
    for name, image in with_padding.items():
        assert torch.equal(image, without[name]), name
    assert (oracle(batch)[1] != 0).all()


def test_undecided_pixels_have_no_candidate_with_most_weight():
    mask, weights = torch.ones(1, 1, 1, 4), torch.tensor([[0.9, 0.5, 0.1, 0.8], [0.1, 0.2, 0.1, 0.1]])[None, :, None]
    mask[..., 3] = 0
    batch = {"mask": mask, "weights": weights, "residual": 1 - weights.sum(1, keepdim=True)}
    assert undecided_share(batch).item() == pytest.approx(1 / 3)  # the second; in the third the residual has 0.8


def test_paint_over_blends_soft_alpha():
    zeros = torch.zeros(1, 3, 4, 4)
    half = torch.full((1, 1, 4, 4, 4), 0.5)
    ones = torch.ones(1, 1, 4, 4)
    painted = paint_over(zeros, ones, half, torch.ones(1, 1, dtype=torch.bool), zeros, torch.zeros(1, 1).long())
    assert torch.allclose(painted, torch.full_like(painted, 0.25))


def test_metrics_count_the_region_only():
    original, region = torch.rand(2, 3, 32, 32), torch.zeros(2, 1, 32, 32)
    region[0, :, 8:16, 8:16] = 1
    fused = original + 0.1 * region
    fused[..., 0] = 0
    assert region_psnr(fused, original, region)[0].item() == pytest.approx(20, abs=1e-3)
    assert region_l1(fused, original, region)[0].item() == pytest.approx(0.1, abs=1e-5)
    assert region_psnr(fused, original, region)[1].isnan()
    everywhere = torch.ones_like(region)
    assert torch.allclose(region_ssim(original, original, everywhere), torch.ones(2), atol=1e-5)
    assert (region_ssim(1 - original, original, everywhere) < 0.1).all()
    assert gap_closed(3, 2, 4) == 0.5


def test_lpips_equals_the_package_and_is_frozen(backbone):
    loss = PerceptualLoss("alex", backbone)
    with warnings.catch_warnings(action="ignore"):
        reference = lpips.LPIPS(net="alex", pnet_rand=True, verbose=False)
    features = torch.load(backbone, weights_only=True)
    for key, value in reference.net.state_dict().items():
        value.copy_(features["features." + key.split(".", 1)[1]])
    a, b = torch.rand(2, 3, 64, 64), torch.rand(2, 3, 64, 64)
    expected = reference(2 * a - 1, 2 * b - 1).flatten()
    assert torch.allclose(loss(a, b), expected, atol=1e-6)
    assert not torch.allclose(loss(a, b), reference(a, b).flatten(), atol=1e-4)  # [0,1] by mistake would show
    assert not any(p.requires_grad for p in loss.parameters())
    loss.train()
    assert not any(module.training for module in loss.modules())
    assert torch.equal(loss(a, b), loss(a, b))


def test_lpips_follows_bf16_and_never_fp16(backbone):
    loss = PerceptualLoss("alex", backbone)
    torch.manual_seed(0)
    a, b = torch.rand(2, 3, 64, 64), torch.rand(2, 3, 64, 64)
    exact = loss(a, b)
    with torch.autocast("cpu", torch.bfloat16):
        half = loss(a, b)
    with torch.autocast("cpu", torch.float16):
        assert torch.equal(loss(a, b), exact)
    assert half.dtype == torch.float32 and not torch.equal(half, exact)
    assert torch.allclose(half, exact, rtol=0.02)


@pytest.mark.parametrize("half", [None, torch.bfloat16, torch.float16])
def test_lpips_gradient_is_finite_where_features_vanish(backbone, half):
    loss = PerceptualLoss("alex", backbone)
    for parameter in loss.lpips.net.parameters():
        parameter.data.zero_()
    flat = torch.zeros(1, 3, 64, 64, requires_grad=True)
    with torch.autocast("cpu", half, enabled=half is not None):
        distance = loss(flat, torch.rand(1, 3, 64, 64)).sum()
    distance.backward()
    assert flat.grad.isfinite().all()


def test_lpips_is_zero_for_equals_and_follows_noise(tmp_path):
    weights = load_checkpoint(TRAINED)["model"]
    torch.save({f"features.{name}": value for name, value in weights.items()}, tmp_path / "squeezenet.pth")
    loss = PerceptualLoss("squeeze", tmp_path / "squeezenet.pth")
    torch.manual_seed(0)
    image = torch.nn.functional.interpolate(torch.rand(1, 3, 16, 16), size=128, mode="bicubic").clamp(0, 1)
    noisy = (image + 0.1 * torch.randn_like(image)).clamp(0, 1)
    assert loss(image, image) == 0 and 0.1 < loss(noisy, image) < 2


def test_missing_backbone_says_what_to_fetch(tmp_path, monkeypatch):
    with pytest.raises(LpipsUnavailable, match="no such file"):
        PerceptualLoss("alex", tmp_path / "nothing.pth")
    torch.save({"features.0.weight": torch.zeros(1)}, tmp_path / "wrong.pth")
    with pytest.raises(LpipsUnavailable, match=r"wrong\.pth.*alex's shape"):
        PerceptualLoss("alex", tmp_path / "wrong.pth")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))

    def offline(*_, **__):
        raise OSError("offline")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", offline)
    with pytest.raises(LpipsUnavailable) as error:
        PerceptualLoss("vgg")
    assert "vgg16-397923af.pth" in str(error.value) and "--" not in str(error.value)
    assert "--lpips_weights" in error.value.for_terminal()


def tiff(values, photometric, planar=1, **tags):
    """A TIFF without compression, as bytes: values (H,W,C) of 8, 16 or 32 bits, and more tags as t338=(2,)."""
    height, width, count = values.shape
    bits, data = values.itemsize * 8, (values if planar == 1 else np.moveaxis(values, -1, 0)).tobytes()
    planes = count if planar == 2 else 1
    entries = {256: [width], 257: [height], 258: [bits] * count, 259: [1], 262: [photometric], 273: [0] * planes,
               277: [count], 278: [height], 279: [len(data) // planes] * planes, 284: [planar]}
    entries |= {int(tag[1:]): list(value) for tag, value in tags.items()}
    kinds = {tag: ("I", 4) if tag in (273, 279) else ("H", 3) for tag in entries}
    start = 8 + 2 + 12 * len(entries) + 4
    lengths = [len(value) * struct.calcsize(kinds[tag][0]) for tag, value in entries.items()]
    begin = start + sum(length for length in lengths if length > 4)
    entries[273] = [begin + plane * len(data) // planes for plane in range(planes)]
    table, far = b"", b""
    for tag, value in sorted(entries.items()):
        packed = struct.pack(f"<{len(value)}{kinds[tag][0]}", *value)
        if len(packed) > 4:
            packed, far = struct.pack("<I", start + len(far)), far + packed
        table += struct.pack("<HHI", tag, kinds[tag][1], len(value)) + packed.ljust(4, b"\0")
    return b"II*\0" + struct.pack("<IH", 8, len(entries)) + table + bytes(4) + far + data


@pytest.mark.parametrize("bits", [8, 16])
def test_tiff_tags_are_read_right_or_refused(bits, tmp_path):
    rng, path, factor = np.random.default_rng(0), tmp_path / "a.tif", 257 if bits == 16 else 1
    rgb = rng.integers(0, 256, (20, 30, 3))
    alpha = np.tile(np.linspace(60, 255, 30).round(), (20, 1))[..., None].astype(int)
    opaque, rgba = np.full_like(alpha, 255), np.dstack([rgb, alpha])
    grey = np.dstack([rgb[..., :1].repeat(3, 2), opaque])

    def read(values, *tags, **more):
        path.write_bytes(tiff((values * factor).round().astype(f"<u{bits // 8}"), *tags, **more))
        return read_image(path, "RGBA").astype(int)

    assert (read(rgb, 2) == np.dstack([rgb, opaque])).all()
    assert (read(rgba, 2) == rgba).all() and (read(rgba, 2, t338=(2,)) == rgba).all()  # OpenCV writes no ExtraSamples
    assert np.abs(read(np.dstack([rgb * (alpha / 255), alpha]), 2, t338=(1,)) - rgba).max() <= 3  # associated alpha
    assert (read(grey[..., :1], 1) == grey).all() and (read(255 - grey[..., :1], 0) == grey).all()
    for turn, upright in ((3, grey[::-1, ::-1]), (6, np.rot90(grey, -1)), (8, np.rot90(grey))):
        assert (read(grey[..., :1], 1, t274=(turn,)) == upright).all()
        assert (read(grey[..., :3], 2, t274=(turn,)) == upright).all()
    refused = [(rgba, 2, {"t338": (0,)}, "ExtraSamples 0"), (grey[..., :1], 1, {"t339": (2,)}, "SampleFormat 2"),
               (rgb, 2, {"t301": [0] * 256}, "transfer function"), (rgba, 5, {"t332": (2,)}, "InkSet"),
               (rgb, 2, {"t532": (0, 200) * 3}, "ReferenceBlackWhite")]
    if bits == 16:
        refused += [(rgb, 2, {"planar": 2}, "PlanarConfiguration 2"), (rgba, 2, {"planar": 2}, "PlanarConfiguration 2"),
                    (rgba[..., 2:], 1, {"t338": (2,)}, "a TIFF of a kind that is not read")]
    else:
        assert (read(rgba, 2, planar=2) == rgba).all()
        assert (read(rgba[..., [0, 3]], 1, t338=(2,)) == np.dstack([grey[..., :3], alpha])).all()
    for values, photometric, tags, fault in refused:
        with pytest.raises(SceneError, match=fault):
            read(values, photometric, **tags)


def profile_of(red, green, blue, name):
    """An ICC profile of a display with these primaries (XYZ under D50) and a gamma of 2.2, as bytes."""
    def numbers(*values):
        return struct.pack(f">{len(values)}i", *(round(65536 * value) for value in values))

    text = name.encode() + b"\0"
    desc = b"desc" + bytes(4) + struct.pack(">I", len(text)) + text + bytes(12 + 67)
    tags = {b"desc": desc, b"cprt": b"text" + bytes(4) + b"none\0",
            b"wtpt": b"XYZ " + bytes(4) + numbers(0.9642, 1, 0.8249)}
    tags |= {key: b"XYZ " + bytes(4) + numbers(*primary) for key, primary in
             ((b"rXYZ", red), (b"gXYZ", green), (b"bXYZ", blue))}
    tags |= {key: b"curv" + bytes(4) + struct.pack(">IH", 1, round(2.2 * 256)) for key in (b"rTRC", b"gTRC", b"bTRC")}
    table, body, start = struct.pack(">I", len(tags)), b"", 128 + 4 + 12 * len(tags)
    for key, value in tags.items():
        table += key + struct.pack(">II", start + len(body), len(value))
        body += value.ljust(-(-len(value) // 4) * 4, b"\0")
    head = struct.pack(">IIIIIIIIIIII", start + len(body), 0, 0x02100000, 0x6D6E7472, 0x52474220, 0x58595A20, 0, 0, 0,
                       0x61637370, 0, 0)
    return (head + bytes(20) + numbers(0.9642, 1, 0.8249)).ljust(128, b"\0") + table + body


def test_colour_profiles_are_converted_and_named(tmp_path):
    red, green, blue = (0.4361, 0.2225, 0.0139), (0.3851, 0.7169, 0.0971), (0.1431, 0.0606, 0.7141)
    swapped = profile_of(green, red, blue, "Swapped")
    rgba = np.dstack([np.random.default_rng(0).integers(0, 256, (20, 30, 4))]).astype(np.uint8)
    for suffix in ("png", "tif", "webp"):
        path, notes = tmp_path / f"a.{suffix}", []
        lossless = {"lossless": True, "exact": True} if suffix == "webp" else {}
        Image.fromarray(rgba).save(path, icc_profile=swapped, **lossless)
        read = read_image(path, "RGBA", notes)
        assert np.abs(read.astype(int) - rgba[..., [1, 0, 2, 3]]).max() <= 12  # a gamma of 2.2 is not quite sRGB's
        assert len(notes) == 1 and "from the profile Swapped to sRGB" in notes[0]
        assert (read_image(path, "L") == np.asarray(Image.fromarray(rgba).convert("L"))).all()
        own = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
        for harmless in (own, b"rubbish" * 50, swapped[:200]):
            notes.clear()
            Image.fromarray(rgba).save(path, icc_profile=harmless, **lossless)
            assert (read_image(path, "RGBA", notes) == rgba).all() and not notes


def test_pixels_decide_not_what_lies_beside_them(tmp_path):
    picture, path = np.random.default_rng(0).integers(0, 256, (20, 30, 3)).astype(np.uint8), tmp_path / "a.png"
    for compressed in (False, True):
        text = PngImagePlugin.PngInfo()
        text.add_itxt("workflow", "x" * (3 << 20), zip=compressed)
        Image.fromarray(picture).save(path, pnginfo=text)
        assert (read_image(path, "RGB") == picture).all()
    text = PngImagePlugin.PngInfo()
    text.add_text("bomb", "x" * (100 << 20), zip=True)
    Image.fromarray(picture).save(path, pnginfo=text)
    with pytest.raises(SceneError, match="more than 64 MiB of text"):
        read_image(path, "RGB")
    turned = struct.pack("<HHII", 0x0112, 3, 1, 6)
    odd = [turned + struct.pack("<HHII", 0x9999, 12, 999999, 8), turned + struct.pack("<HHII", 0x010F, 2, 200, 9999),
           struct.pack("<HHII", 0x0112, 2, 1, 0x36), turned + struct.pack("<HHII", 0x8769, 4, 1, 8)]
    for entries in (*odd, None):
        tags = b"rubbish"
        if entries:
            tags = b"II*\0\x08\0\0\0" + struct.pack("<H", len(entries) // 12) + entries + bytes(4)
        Image.fromarray(picture).save(path, exif=b"Exif\0\0" + tags)
        expected = np.rot90(picture, -1) if entries and turned in entries else picture
        assert (read_image(path, "RGB") == expected).all()


def test_16_bit_png_keeps_its_transparent_grey(tmp_path):
    grey = np.full((20, 30), 200 * 257, np.uint16)
    grey[5:15, 5:20] = 90 * 257
    Image.fromarray(grey).save(tmp_path / "a.png", transparency=200 * 257)
    assert (read_image(tmp_path / "a.png", "RGBA")[..., 3] == np.where(grey == 200 * 257, 0, 255)).all()


@pytest.mark.parametrize(("fourth", "expected"), [("alpha", "alpha"), (0, 255), (255, 255)])
def test_bmp_of_32_bits_keeps_its_alpha(fourth, expected, tmp_path):
    rgba = np.random.default_rng(0).integers(0, 256, (20, 30, 4)).astype(np.uint8)
    alpha, path = rgba[..., 3].copy(), tmp_path / "a.bmp"
    rgba[..., 3] = alpha if fourth == "alpha" else fourth
    Image.fromarray(rgba).save(path)
    read = read_image(path, "RGBA")
    assert (read[..., :3] == rgba[..., :3]).all()
    assert (read[..., 3] == (alpha if expected == "alpha" else expected)).all()
