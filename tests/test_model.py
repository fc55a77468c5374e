"""The promises of the network: one test each."""

import itertools
import shutil
from collections import namedtuple

import cv2
import numpy as np
import pytest
import torch
from torch import nn

from amodal_fusion.data.tensors import inputs_of, to_tensors
from amodal_fusion.data.toy import draw_scene
from amodal_fusion.model import layers
from amodal_fusion.model.compositing import add_fill, candidate_weights, composite
from amodal_fusion.model.cues import VisibleCues, photometric_error, visible_cues
from amodal_fusion.model.layers import DecoderLayer, position_encoding
from amodal_fusion_transformer import PRIOR_WEIGHTS, AmodalFusionTransformer, VisiblePrior, fusion_loss


def make_model(seed=0):
    """A network whose head is not at its neutral start, so that every layer shows in the output."""
    torch.manual_seed(seed)
    model = AmodalFusionTransformer(width=32, encoder_layers=1, decoder_layers=2, heads=2)
    nn.init.normal_(model.head.correction.weight, std=0.15)
    return model.eval()


def make_batch(size=64, n=3, slots=None, count=2):
    items = [to_tensors(draw_scene(seed, size, n), slots or n) for seed in range(count)]
    return {name: torch.stack([item[name] for item in items]) for name in items[0]}


def fuse(model, batch):
    with torch.no_grad():
        return model(**inputs_of(batch))


def test_weights_are_shares_and_zero_where_transparent():
    batch = make_batch(slots=5)
    out = fuse(make_model(), batch)
    weights, residual = out["weights"], out["residual"]
    assert weights.shape == (2, 5, 64, 64) and residual.shape == (2, 1, 64, 64)
    assert (weights >= 0).all() and (residual >= 0).all()
    assert torch.allclose(weights.sum(1, keepdim=True) + residual, torch.ones_like(residual), atol=1e-5)
    alpha = batch["completions"][:, :, 3]
    assert (weights[alpha == 0] == 0).all()
    assert (weights[~batch["valid"]] == 0).all()


@pytest.mark.parametrize("at_once", [1, 2])
def test_groups_of_candidates_change_nothing(monkeypatch, at_once):
    model, batch = make_model(), make_batch(80, n=5, count=1)
    whole = fuse(model, batch)
    monkeypatch.setattr(layers, "GROUP", at_once * 80 * 80)
    assert len(layers.candidate_groups(torch.empty(1, 6, 4, 80, 80))) == 1  # with gradients all at once
    encoded, encode = [], model.encoder.encode
    monkeypatch.setattr(model.encoder, "encode", lambda x, *rest: encoded.append(x.shape[1]) or encode(x, *rest))
    parts = fuse(model, batch)
    assert encoded == [at_once] * (6 // at_once)
    assert all(torch.allclose(whole[name], parts[name], atol=1e-5) for name in whole)


def test_weights_are_the_softmax_of_covering_candidates():
    out = fuse(make_model(), batch := make_batch())
    alpha = torch.cat([torch.ones(2, 1, 64, 64), batch["completions"][:, :, 3]], 1)
    assert set(alpha.unique().tolist()) == {0, 1}
    expected = out["logits"].masked_fill(alpha == 0, -torch.inf).softmax(1)
    assert torch.allclose(torch.cat([out["residual"], out["weights"]], 1), expected, atol=1e-5)


@pytest.mark.parametrize("scale", [1, 10, 100])
def test_unused_weight_of_transparent_candidates_goes_to_others(scale):
    torch.manual_seed(0)
    logits = (scale * torch.randn(2, 5, 8, 8, dtype=torch.float64)).requires_grad_()
    alpha = torch.rand(2, 5, 8, 8) * torch.randint(0, 2, (2, 5, 8, 8)) / 3
    alpha[:, 0] = 1
    weights = candidate_weights(logits, alpha)
    p, a = logits.masked_fill(alpha == 0, -torch.inf).softmax(1), (4 * alpha.double()).clamp(max=1)
    for i in range(1, 5):  # the formula as it stands in the docstring
        rival = [j for j in range(5) if j != i]
        share = [p[:, i] / torch.stack([p[:, k] for k in range(5) if k != j]).sum(0).clamp(min=1e-300) for j in rival]
        expected = a[:, i] * (p[:, i] + sum((1 - a[:, j]) * p[:, j] * s for j, s in zip(rival, share)))
        assert torch.allclose(weights[:, i].double(), expected, atol=1e-5)
    assert (weights >= 0).all() and torch.allclose(weights.sum(1), torch.ones(2, 8, 8), atol=1e-6)
    assert (weights[:, 1:] <= 4 * alpha[:, 1:] + 1e-6).all()
    weights[:, 2].sum().backward()
    assert logits.grad.isfinite().all()


def test_a_faint_rim_stays_faint():
    """A ring of alpha 10/255 around an object, as resizing leaves it, with a colour of its own."""
    scene = draw_scene(3, n=1)
    completion = scene.completions[0]
    ring = cv2.dilate(completion[..., 3], np.ones((7, 7), np.uint8)) > completion[..., 3]
    completion[ring] = (0, 255, 255, 10)
    batch = {name: t[None] for name, t in to_tensors(scene, 1).items()}
    logits = torch.tensor([-50.0, 0.0]).view(1, 2, 1, 1).expand(1, 2, 64, 64)  # as sure of the completion as can be
    candidates, _ = add_fill(**inputs_of(batch))
    weights = composite(logits, candidates, batch["partial"], batch["mask"])["weights"][0, 0].numpy()
    assert weights[ring & scene.mask].max() < 0.17 and weights[~ring & (completion[..., 3] > 0)].min() > 0.99


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_permuting_completions_permutes_weights(order):
    model, batch = make_model(), make_batch()
    out = fuse(model, batch)
    shuffled = fuse(model, {**batch, "completions": batch["completions"][:, list(order)]})
    assert torch.allclose(shuffled["weights"], out["weights"][:, list(order)], atol=1e-5)
    assert torch.allclose(shuffled["fused"], out["fused"], atol=1e-5)


def test_content_of_invalid_slots_changes_nothing():
    model, batch = make_model(), make_batch()
    out = fuse(model, batch)
    padded = make_batch(slots=6)
    padded["completions"][:, 3:] = torch.nan
    more = fuse(model, padded)
    assert torch.allclose(more["weights"][:, :3], out["weights"], atol=1e-5)
    assert torch.allclose(more["fused"], out["fused"], atol=1e-5)


@pytest.mark.parametrize(("size", "n"), [((64, 64), 1), ((768, 1111), 12), ((37, 91), 2), ((8, 5), 3), ((1, 1), 1)])
def test_any_number_of_completions_and_any_size(size, n):
    batch = make_batch(n=n, count=1)
    batch = {name: nn.functional.interpolate(t.flatten(0, -4) if t.dim() > 4 else t, size) if t.dim() > 3 else t
             for name, t in batch.items()}
    batch["completions"] = batch["completions"].unflatten(0, (1, n))
    batch["mask"] = (batch["mask"] > 0.5).float()
    out = fuse(make_model(), batch)
    assert out["weights"].shape == (1, n, *size) and out["fused"].shape == (1, 3, *size)
    assert out["fused"].isfinite().all()


def test_fused_equals_partial_exactly_outside_the_hole():
    batch = make_batch()
    fused = fuse(make_model(), batch)["fused"]
    outside = (batch["mask"] == 0).expand_as(fused)
    assert torch.equal(fused[outside], batch["partial"][outside])
    assert not torch.equal(fused[~outside], batch["partial"][~outside])


def test_every_parameter_gets_a_gradient():
    model, batch = make_model().train(), make_batch(slots=5)
    fusion_loss(model(**inputs_of(batch)), batch, None, 0, 0.1)[0].backward()
    grads = {name: p.grad for name, p in model.named_parameters()}
    for name in grads:
        if name.endswith("key_value.bias"):  # softmax ignores what all keys share: the values' half is what counts
            grads[name] = grads[name].chunk(2)[1]
    assert [name for name, grad in grads.items() if grad is None or not grad.abs().sum() > 0] == []


def test_a_scene_does_not_depend_on_its_batch():
    model, batch = make_model(), make_batch(count=3)
    assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())
    together = fuse(model, batch)["fused"]
    alone = fuse(model, {name: t[1:2] for name, t in batch.items()})["fused"]
    assert torch.allclose(together[1:2], alone, atol=1e-5)


def cues_of(photo, mask, completions):
    """Cues of the completions, without the fill: (N,h,w) each."""
    candidates, _ = add_fill(photo * (1 - mask), mask, completions)
    cues = visible_cues(*photometric_error(candidates, photo, mask), candidates[:, :, 3:])
    return VisibleCues(*(cue[0, 1:] for cue in cues))


def square(size, start, stop):
    picture = torch.zeros(1, 1, size, size)
    picture[..., start:stop, start:stop] = 1
    return picture


@pytest.mark.parametrize("noise, copied", [(0.0, True), (0.1, False)])
def test_cues_find_better_candidate_and_copies_of_photo(noise, copied):
    torch.manual_seed(0)
    photo, mask, opaque = torch.rand(1, 3, 64, 64), square(64, 24, 40), torch.ones(1, 1, 64, 64)
    drawn = [(photo + off + noise * torch.randn_like(photo)).clamp(0, 1) for off in (0, 0.1)]
    cues = cues_of(photo, mask, torch.stack([torch.cat([rgb, opaque], 1) for rgb in drawn], 1))
    for cue in (cues.local_fit, cues.overall_fit, cues.order):
        assert (cue[0] > cue[1]).all()
    ahead = (cues.overall_fit[0] - cues.overall_fit[1]).mean()
    assert (ahead > 2) == copied and (cues.copied[0] > 0.9).all() == copied and (cues.copied[1] < 0.1).all()


def test_cues_put_contained_candidates_in_front():
    """A small thing wholly in the hole, on a large one that surrounds it: nothing visible tells their order."""
    photo, mask, opaque = torch.full((1, 3, 64, 64), 0.5), square(64, 16, 48), torch.ones(1, 1, 64, 64)
    small, large = torch.cat([photo, square(64, 24, 40)], 1), torch.cat([photo - 0.05, opaque], 1)
    within = cues_of(photo, mask, torch.stack([small, large], 1)).containment[:, 7:9, 7:9]
    assert (within[0] > 1).all() and (within[1] < -1).all()


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_half_precision_agrees_with_fp32(half):
    model, batch = make_model(), make_batch()
    model.transformer.pool_candidates.weight.data *= 1e4  # a scene beyond 65,504, where fp16 ends
    exact = fuse(model, batch)["fused"]
    with torch.autocast("cpu", half):
        out = fuse(model, batch)["fused"]
    assert 0 < (out - exact).abs().max() < 1e-2


def test_compile_changes_nothing():
    model, batch = make_model(), make_batch()
    exact = fuse(model, batch)["fused"]
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)  # no C++ compiler needed
    assert torch.allclose(fuse(compiled, batch)["fused"], exact, atol=1e-5)


@pytest.mark.skipif(not shutil.which("g++"), reason="inductor needs a C++ compiler")
def test_attention_among_candidates_compiles_for_real():
    """Inductor's own patterns of attention once met ours and failed; the whole network would take minutes."""
    torch.manual_seed(0)
    layer, tokens, scene = DecoderLayer(16, 2), torch.randn(2, 4, 3, 16, requires_grad=True), torch.randn(2, 4, 16)
    inputs = (tokens, torch.tensor([[True, True, True], [True, True, False]]), scene, torch.randn(4, 16))
    torch._dynamo.reset()
    results = [module(*inputs) for module in (layer, torch.compile(layer))]
    grads = [torch.autograd.grad(out.square().sum(), tokens)[0] for out in results]
    assert torch.allclose(*results, atol=1e-5) and torch.allclose(*grads, atol=1e-5)


def test_untrained_network_is_the_visible_fit_rule():
    """Two copies of one disc; the one that agrees with the visible photo must win."""
    scene = draw_scene(3, n=1)
    good = scene.completions[0]
    bad = good.copy()
    bad[..., :3] = 255 - bad[..., :3]
    scene.completions = [bad, good]
    batch = {name: t[None] for name, t in to_tensors(scene, 2).items()}
    torch.manual_seed(0)
    weights = fuse(AmodalFusionTransformer().eval(), batch)["weights"]
    inside = (batch["mask"][:, 0] > 0) & (batch["completions"][:, 0, 3] > 0)
    assert (weights[:, 1][inside] > 10 * weights[:, 0][inside]).all()


def test_position_encoding_agrees_at_every_resolution():
    fine = position_encoding((8, 16), (8, 16), 32, "cpu").view(8, 16, 32)
    coarse = position_encoding((4, 8), (8, 16), 32, "cpu").view(4, 8, 32)
    middle = (fine[0, 0] + fine[1, 1]) / 2
    assert (coarse[0, 0, :2] - middle[:2]).abs().max() < 0.01  # lowest frequency: nearly linear between neighbours
    assert torch.equal(position_encoding((3, 3), (3, 3), 32, "cpu"), position_encoding((3, 3), (30, 30), 32, "cpu"))
    assert len({tuple(row.tolist()) for row in fine.flatten(0, 1)}) == 128


def test_prior_takes_its_cues_by_name():
    cues = VisibleCues(*torch.randn(len(VisibleCues._fields), 1, 3, 4, 4, generator=torch.Generator().manual_seed(0)))
    longer = namedtuple("LongerCues", ("new_cue", *VisibleCues._fields))(torch.full((1, 3, 4, 4), 100.0), *cues)
    prior = VisiblePrior()
    logits = prior(cues)
    assert torch.equal(prior(longer), logits)
    for name in VisibleCues._fields:  # a cue counts exactly if it has a weight
        changed = prior(cues._replace(**{name: getattr(cues, name) + 1}))
        assert torch.equal(changed, logits) == (name not in PRIOR_WEIGHTS), name


def test_joined_groups_export_for_any_number():
    class Joined(torch.nn.Module):
        def forward(self, x):
            return layers.join_groups(([2 * x],), x.shape[0])[0]

    count = torch.export.Dim("n", min=1, max=99)
    program = torch.export.export(Joined(), (torch.rand(3, 4),), dynamic_shapes=({0: count},))
    assert (program.module()(torch.ones(7, 4)) == 2).all()
