"""Promises that hold for any input, tried on inputs that hypothesis makes up."""

import tempfile
from pathlib import Path

import numpy as np
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from amodal_fusion.data.datasets import AmodalFusionDataset
from amodal_fusion.data.images import IMAGE_SUFFIXES, read_image, resize, write_image
from amodal_fusion.data.scenes import read_scene, write_scene
from amodal_fusion.data.tensors import to_tensors
from amodal_fusion.data.toy import draw_scene
from amodal_fusion.ingest.layouts import find_raw_scenes
from amodal_fusion.ingest.raw_scenes import read_raw_scene
from amodal_fusion.model.blending import blend_hole
from amodal_fusion.output.scene_reader import network_size
from amodal_fusion.output.scene_writer import SceneWriter
from amodal_fusion_transformer import AmodalFusionTransformer

settings.register_profile("suite", deadline=None, derandomize=True, max_examples=40,
                          suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
settings.load_profile("suite")
CPU = torch.device("cpu")


def network():
    torch.manual_seed(0)
    model = AmodalFusionTransformer(width=32, encoder_layers=1, decoder_layers=1, heads=2).eval()
    with torch.no_grad():
        model.head.correction.weight.normal_()  # an untrained head would hide what comes before it
    return model


MODEL = network()


@st.composite
def inputs(draw):
    """Any scene: partly, softly or not at all covered, with holes of any share, padded anywhere, of any size."""
    slots, height, width = draw(st.integers(1, 5)), draw(st.integers(1, 40)), draw(st.integers(1, 40))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))

    def noise(*shape):
        return torch.rand(shape, generator=generator)

    mask = (noise(1, 1, height, width) < draw(st.sampled_from([0.0, 0.3, 0.7, 1.0]))).float()
    completions = noise(1, slots, 4, height, width)
    kind = draw(st.sampled_from(["soft", "hard", "none", "full"]))
    if kind != "soft":
        share = {"hard": 0.5, "none": 0.0, "full": 1.0}[kind]
        completions[:, :, 3] = (completions[:, :, 3] < share).float()
    valid = torch.tensor([draw(st.lists(st.booleans(), min_size=slots, max_size=slots))])
    return noise(1, 3, height, width) * (1 - mask), mask, completions, valid


@given(inputs())
def test_weights_sum_to_one(scene):
    partial, mask, completions, valid = scene
    with torch.no_grad():
        out = MODEL(*scene)
    weights, residual = out["weights"], out["residual"]
    assert torch.isfinite(out["fused"]).all() and (weights >= 0).all() and (residual >= 0).all()
    assert torch.allclose(weights.sum(1, keepdim=True) + residual, torch.ones_like(residual), atol=1e-5)
    assert not weights[~valid].any()
    assert not weights[completions[:, :, 3] == 0].any()
    assert torch.equal(torch.where(mask > 0, 0, out["fused"]), torch.where(mask > 0, 0, partial))
    assert out["fused"].min() >= -1e-5 and out["fused"].max() <= 1 + 1e-5


@given(inputs(), st.randoms(use_true_random=False))
def test_order_and_padding_do_not_matter(scene, random):
    partial, mask, completions, valid = scene
    order = list(range(completions.shape[1]))
    random.shuffle(order)
    padding = torch.rand(1, random.randint(0, 2), *completions.shape[2:])
    shuffled = torch.cat([completions[:, order], padding], 1)
    present = torch.cat([valid[:, order], torch.zeros(1, padding.shape[1], dtype=torch.bool)], 1)
    with torch.no_grad():
        one, two = MODEL(partial, mask, completions, valid), MODEL(partial, mask, shuffled, present)
    assert torch.allclose(one["weights"][:, order], two["weights"][:, : len(order)], atol=1e-4)
    assert torch.allclose(one["fused"], two["fused"], atol=1e-4)


@given(st.integers(1, 5000), st.integers(1, 5000), st.integers(16, 512))
def test_network_size_is_of_its_stride(height, width, img_size):
    rows, columns = network_size((height, width), img_size)
    assert rows % 16 == columns % 16 == 0 and min(rows, columns) >= 16
    if max(height, width) < 4 * min(height, width) and img_size >= 128:
        assert 0.7 < rows * columns / img_size**2 < 1.4


@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 40), st.integers(1, 40), st.integers(0, 2**31))
def test_resizing_keeps_the_value_range(height, width, rows, columns, seed):
    rng = np.random.default_rng(seed)
    picture = rng.integers(0, 256, (height, width, 4), dtype=np.uint8)
    picture[rng.random((height, width)) < 0.5] = 0
    scaled = resize(picture, (rows, columns))
    assert scaled.shape == (rows, columns, 4) and scaled.dtype == np.uint8
    shown = scaled[..., 3] > 8
    if shown.any():  # colours of opaque pixels only, up to rounding
        opaque = picture[picture[..., 3] > 0][:, :3].astype(int)
        assert (scaled[shown][:, :3] >= opaque.min(0) - 16).all()
        assert (scaled[shown][:, :3] <= opaque.max(0) + 16).all()


@given(seed=st.integers(0, 10_000), size=st.tuples(st.integers(24, 80), st.integers(24, 80)), n=st.integers(1, 5),
       white_hole=st.booleans(), background=st.sampled_from(["alpha", "white", "black"]),
       name=st.text("abcXYZ 0189-.한글é🦊", min_size=1, max_size=12), suffix=st.sampled_from(sorted(IMAGE_SUFFIXES)))
@settings(max_examples=25)
def test_create_dataset_fuse_round_trip(seed, size, n, white_hole, background, name, suffix):
    truth = draw_scene(seed, size, n)
    if not any((c[..., 3] > 0)[truth.mask].mean() > 0.02 for c in truth.completions):
        return  # nothing to fuse: create says so
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        folder = root / "results" / f"s{name.strip(' .')}"
        folder.mkdir(parents=True)
        lossless = suffix not in (".jpg", ".jpeg")
        options = {"lossless": True} if suffix == ".webp" else {"quality": 95} if not lossless else {}
        Image.fromarray(truth.original).save(folder / f"original{suffix}", **options)
        Image.fromarray(truth.partial).save(folder / f"partial{suffix}", **options)
        write_image(folder / "mask.png", np.where(truth.mask == white_hole, 255, 0).astype(np.uint8))
        for number, completion in enumerate(truth.completions, 1):
            ground = {"white": 255, "black": 0}.get(background)
            inside = completion[..., 3:] > 0
            picture = completion if ground is None else np.where(inside, completion[..., :3], ground).astype(np.uint8)
            write_image(folder / f"comp{number}.png", picture)

        (raw,), faults = find_raw_scenes(root / "results")
        scene, report = read_raw_scene(raw, 5)
        assert not faults and np.array_equal(scene.mask, truth.mask)
        assert 1 <= len(scene.completions) <= n and len(report["completions"]) == n
        if lossless:
            assert np.array_equal(scene.partial, truth.partial)
        (root / "data" / scene.id).mkdir(parents=True)
        write_scene(root / "data" / scene.id, scene)
        back = read_scene(root / "data" / scene.id)
        assert np.array_equal(back.mask, scene.mask) and np.array_equal(back.partial, scene.partial)
        assert all(np.array_equal(a, b) for a, b in zip(back.completions, scene.completions, strict=True))

        item = AmodalFusionDataset(root / "data", [scene.id], 32, 5, augment=True)[3, 0]
        assert item["partial"].shape == (32, 32, 3) and item["completions"].shape == (5, 32, 32, 4)
        assert not item["partial"][item["mask"][..., 0] > 0].any() and item["valid"].any()

        small = back.resized(network_size(size, 32))
        with torch.no_grad():
            logits = MODEL(**{name: value[None] for name, value in to_tensors(small, len(small.completions)).items()
                              if name != "original"})["logits"][0]
        assert blend_hole(back, logits).weights.max() <= 1
        SceneWriter(root / "data", root / "out", {})(scene.id, back, logits.numpy(), "")
        fused = read_image(root / "out" / scene.id / "fused.png", "RGB")
        assert np.array_equal(fused[~back.mask], back.partial[~back.mask])
