"""Amodal Fusion Transformer: weight maps that fuse several amodal completions of one scene.

This file has the network, the loss, the options and the training loop. Train on six GPUs, as set in the config:

    python amodal_fusion_transformer.py --config transformer_train_config.yaml
    torchrun --nproc_per_node 6 amodal_fusion_transformer.py --config transformer_train_config.yaml

on one GPU, or a small run on the CPU:

    python amodal_fusion_transformer.py --data_dir DATA --gpus 1
    python amodal_fusion_transformer.py --data_dir DATA --gpus 0 --img_size 128 --lpips_net alex --workers 1
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from amodal_fusion import distributed
from amodal_fusion.checkpoints import averaged_weights, check_shapes, load_checkpoint
from amodal_fusion.config import ANY_NUMBER, check_values, option, parse
from amodal_fusion.errors import UserError
from amodal_fusion.evaluation.metrics import overlap_region
from amodal_fusion.evaluation.perceptual import load_perceptual
from amodal_fusion.model.backbone import ImageNetFeatures
from amodal_fusion.model.compositing import add_fill, composite
from amodal_fusion.model.cues import VisibleCues, photometric_error, visible_cues
from amodal_fusion.model.layers import (
    ConvBlock,
    DecoderLayer,
    EncoderLayer,
    add_shared,
    candidate_groups,
    coarse_grid,
    join_groups,
    pad_to,
    pooling_matrix,
    position_encoding,
    upsample,
)
from amodal_fusion.precision import HALF_PRECISION
from amodal_fusion.training.config_aliases import CONFIG_ALIASES
from amodal_fusion.training.loaders import load_data
from amodal_fusion.training.loop import TrainStep, evaluate, train_one_epoch
from amodal_fusion.training.optimizers import USUAL_RATES, choose_optimizer
from amodal_fusion.training.run import Run
from amodal_fusion.training.run_folder import check_start, checkpoint_to_resume, claim_files, lock_checkpoint_dir
from amodal_fusion.training.shutdown import Stopped, StopSignal, clean_shutdown

# ----------------------------------------------------------------------------
# Network. B scenes of M = N + 1 candidates each: the fill of the hole, then N completions.

NETWORK_VERSION = 2  # raise it if equal weights give other results; outputs of inference record it
STRIDE = 16  # of the Transformer's tokens
C2, C4, C8 = 24, 48, 96  # channels at strides 2, 4 and 8
PRIOR_WEIGHTS = {"local_fit": 0.5, "overall_fit": 0.5, "order": 1.0, "containment": 0.6}  # of VisibleCues, untrained


class AmodalFusionTransformer(nn.Module):
    """Partial image, mask and any number of completions → one weight map per completion.

    The smooth fill of the hole is candidate 0: its weight is the residual, "none of these". All candidates share every
    layer and have no slot number, so their order does not matter. Untrained, the network is a soft version of the
    strongest simple rule, visible fit: the candidate that agrees best with the visible photo wins.

    Args:
        width: channels of the tokens, a multiple of 8 and of `heads`.
        encoder_layers: self-attention layers over the scene.
        decoder_layers: layers in which candidates attend to each other and to the scene, at least one.
        heads: attention heads.

    Raises:
        UserError: width is no multiple of 8 and of `heads`.
    """

    def __init__(self, width=128, encoder_layers=2, decoder_layers=2, heads=4):
        super().__init__()
        if width % 8 or width % heads:
            raise UserError(f"width {width} must be a multiple of 8 and of heads, {heads}")
        self.prior = VisiblePrior()
        self.encoder = ConvEncoder(width)
        self.transformer = SceneTransformer(width, heads, encoder_layers, decoder_layers)
        self.decoder = UpsamplingDecoder(width)
        self.head = WeightHead()
        self.to(memory_format=torch.channels_last)  # faster convolutions, also on CPUs

    def forward(self, partial: Tensor, mask: Tensor, completions: Tensor,
                valid: Tensor | None = None) -> dict[str, Tensor]:
        """Weigh the completions and fuse them.

        Args:
            partial: (B,3,H,W) in [0,1], zero in the hole.
            mask: (B,1,H,W) in {0,1}, 1 = hole.
            completions: (B,N,4,H,W) in [0,1], RGB + straight alpha; any N ≥ 1.
            valid: (B,N) bool, False = padded slot; None: all are real.

        Returns:
            dict of
            weights: (B,N,H,W) and residual (B,1,H,W), non-negative, together 1 at every pixel; see `composite`.
            fused: (B,3,H,W), equal to `partial` outside the hole.
            fill: (B,3,H,W), the smooth fill, whose weight is the residual.
            logits: (B,M,H,W), the fill first.
        """
        candidates, present = add_fill(partial, mask, completions, valid)  # (B,M,4,H,W), (B,M)
        padded, hole = pad_to(STRIDE, candidates, mask)
        photo = torch.where(hole > 0.5, padded[:, 0, :3], pad_to(STRIDE, partial)[0])  # (B,3,H,W), the hole filled

        error, visible = photometric_error(padded, photo, hole)  # (B,M,1,H,W)
        cues = visible_cues(error, visible, padded[:, :, 3:])  # (B,M,H/4,W/4) each
        del visible  # what is large goes when it has been used
        skips, x16 = self.encoder(padded, photo, hole, error, cues)  # strides 2, 4, 8; 16
        tokens, prior = self.transformer(x16, present), self.prior(cues)  # (B,M,C,H/16,W/16), (B,M,H/4,W/4)
        logits = []
        for group in candidate_groups(padded):  # (B,M',C2,H/2,W/2) → (B,M',H,W)
            x2 = self.decoder(tokens[:, group], [x[group] for x in skips])
            logits.append(self.head(x2, prior[:, group]))
        del skips, error
        logits = torch.cat(logits, 1)[..., : mask.shape[-2], : mask.shape[-1]]  # (B,M,H,W)

        fused = composite(logits, candidates, partial, mask)
        return {**fused, "fill": candidates[:, 0, :3], "logits": logits}


class VisiblePrior(nn.Module):
    """Logits from the visible cues alone: a soft visible-fit rule, and the result of an untrained network."""

    def __init__(self):
        super().__init__()
        self.cue_weights = nn.Parameter(torch.tensor(list(PRIOR_WEIGHTS.values())))
        self.fill_logit = nn.Parameter(torch.tensor(0.0))

    def forward(self, cues):
        """VisibleCues, (B,M,h,w) each → prior_logits (B,M,h,w)."""
        weighted = [weight * getattr(cues, name) for name, weight in zip(PRIOR_WEIGHTS, self.cue_weights)]
        prior_logits = sum(weighted[1:], weighted[0])
        return torch.cat([self.fill_logit.expand_as(prior_logits[:, :1]), prior_logits[:, 1:]], 1)


class ConvEncoder(nn.Module):
    """Convolutional encoder, shared by all candidates: features at strides 2, 4, 8 and 16.

    ImageNet features enter at strides 4, 8 and 16: those of the candidate painted over the filled photo, and their
    difference from those of the filled photo. They show whether the picture makes sense with this object.
    """

    def __init__(self, width):
        super().__init__()
        self.stem_scene = nn.Conv2d(8, C2, 4, stride=2, padding=1)  # linear: the shared input is convolved once
        self.stem_candidate = nn.Conv2d(5, C2, 4, stride=2, padding=1, bias=False)
        self.embed_cues = nn.Conv2d(len(VisibleCues._fields), C4, 1)
        self.down4, self.block4 = nn.Conv2d(C2, C4, 3, stride=2, padding=1), ConvBlock(C4)
        self.down8, self.block8 = nn.Conv2d(C4, C8, 3, stride=2, padding=1), ConvBlock(C8)
        self.down16 = nn.Conv2d(C8, width, 3, stride=2, padding=1)
        self.block16 = nn.Sequential(ConvBlock(width), ConvBlock(width))
        self.backbone = ImageNetFeatures()
        sizes = list(zip(self.backbone.CHANNELS, (C4, C8, width)))
        self.embed_painted = nn.ModuleList(nn.Conv2d(features, c, 1) for features, c in sizes)
        self.embed_change = nn.ModuleList(nn.Conv2d(features, c, 1, bias=False) for features, c in sizes)
        self.embed_context = nn.ModuleList(nn.Conv2d(features, c, 1, bias=False) for features, c in sizes)

    def forward(self, candidates, photo, mask, error, cues):
        """candidates (B,M,4,H,W), photo (B,3,H,W), mask (B,1,H,W), error (B,M,1,H,W), cues (B,M,H/4,W/4) each →
        [x2, x4, x8], (B·M,C,H/s,W/s) at strides s of 2, 4 and 8, and x16, (B,M,C,H/16,W/16)."""
        shared, cues = self.stem_scene(scene_input(candidates, photo, mask)), torch.stack(cues, 2)
        groups = candidate_groups(candidates)
        context = None if len(groups) == 1 else self.backbone(photo)
        *skips, x16 = join_groups((self.encode(candidates[:, group], photo, shared, error[:, group], cues[:, group],
                                               context) for group in groups), candidates[:, :, 0, 0, 0].numel())
        return skips, x16.unflatten(0, candidates.shape[:2])

    def encode(self, candidates, photo, shared, error, cues, context):
        """A group of M candidates, (B,M,…) each; shared (B,C,H/2,W/2); context: see `backbone_features` →
        [x2, x4, x8, x16], (B·M,C,H/s,W/s)."""
        rgb, alpha = candidates.split([3, 1], 2)
        x2 = self.stem_candidate(torch.cat([(rgb - 0.5) * alpha, alpha, error], 2).flatten(0, 1))
        x2 = add_shared(x2.unflatten(0, candidates.shape[:2]), shared)  # (B·M,C,H/2,W/2)
        seen4, seen8, seen16 = self.backbone_features(candidates, photo, context)
        x4 = self.down4(F.gelu(x2)) + self.embed_cues(cues.flatten(0, 1)) + seen4
        x4 = self.block4(x4)
        x8 = self.block8(self.down8(x4) + seen8)
        x16 = self.block16(self.down16(x8) + seen16)
        return [x2, x4, x8, x16]

    def backbone_features(self, candidates, photo, context):
        """Embedded ImageNet features of the candidates: [(B·M,C,H/s,W/s) at strides 4, 8, 16].

        context: features of the filled photo; None: those of the first candidate, the fill, which is no other picture.
        """
        count, (rgb, alpha) = candidates.shape[:2], candidates.split([3, 1], 2)
        painted = torch.lerp(photo[:, None], rgb, alpha).flatten(0, 1)  # (B·M,3,H,W)
        seen = []
        for level, features in enumerate(self.backbone(painted)):  # (B·M,F,h,w)
            behind = features.unflatten(0, count)[:, 0] if context is None else context[level]  # (B,F,h,w)
            change = (features.unflatten(0, count) - behind[:, None]).flatten(0, 1).abs_()
            embedded = self.embed_painted[level](features) + self.embed_change[level](change)
            seen.append(add_shared(embedded.unflatten(0, count), self.embed_context[level](behind)))
        return seen


class SceneTransformer(nn.Module):
    """Encoder: global self-attention over the scene. Decoder: candidates attend to their rivals at the same place, then
    to the whole scene.

    The encoder gains nothing in the ablation (docs/experiments.md). It stays because the design asks for it.
    """

    SCENE_GRID = 16  # at most 16×16 tokens of the scene, so that cost is linear in pixels

    def __init__(self, width, heads, encoder_layers, decoder_layers):
        super().__init__()
        self.fill_token = nn.Parameter(0.02 * torch.randn(width))
        self.pool_candidates = nn.Linear(3 * width, width)
        self.encoder = nn.ModuleList(EncoderLayer(width, heads) for _ in range(encoder_layers))
        self.norm_scene = nn.LayerNorm(width)
        self.decoder = nn.ModuleList(DecoderLayer(width, heads) for _ in range(decoder_layers))
        self.norm = nn.LayerNorm(width)

    def forward(self, x16, present):
        """x16 (B,M,C,h,w), present (B,M) → tokens of the same shape; L = h·w places, S of them in the scene."""
        *_, channels, height, width = x16.shape
        places = height, width
        grid = coarse_grid(places, self.SCENE_GRID)
        tokens = x16.float().permute(0, 3, 4, 1, 2).flatten(1, 2)  # (B,L,M,C); sums over layers overflow fp16
        scene = self.pool_scene(tokens, present, places, grid)  # (B,S,C)
        position = position_encoding(grid, places, channels, scene.device)  # (S,C)
        for layer in self.encoder:
            scene = layer(scene, position)
        scene = self.norm_scene(scene) + position

        tokens = torch.cat([tokens[:, :, :1] + self.fill_token, tokens[:, :, 1:]], 2)
        position = position_encoding(places, places, channels, scene.device)  # (L,C)
        for layer in self.decoder:
            tokens = layer(tokens, present, scene, position)
        return self.norm(tokens).unflatten(1, places).permute(0, 3, 4, 1, 2)  # (B,M,C,h,w)

    def pool_scene(self, tokens, present, places, grid):
        """Fill, mean and maximum over the candidates: tokens (B,L,M,C) at `places` (h,w) → (B,S,C) on `grid`."""
        fill, completions = tokens[:, :, 0], tokens[:, :, 1:]
        real = present[:, None, 1:, None]
        mean = completions.masked_fill(~real, 0).sum(2) / real.sum(2).clamp(min=1)
        # an absent candidate must not win the maximum; without completions the maximum must not be −inf
        most = completions.masked_fill(~real, -1e4).amax(2).clamp(min=-1e2)
        scene = torch.cat([fill, mean, most], 2).transpose(1, 2).unflatten(2, places)  # (B,3C,h,w)
        rows, columns = (pooling_matrix(size, cells, scene) for size, cells in zip(places, grid))
        scene = (rows @ scene @ columns.mT).flatten(2).transpose(1, 2)  # (B,S,3C)
        return self.pool_candidates(scene).float()


class UpsamplingDecoder(nn.Module):
    """Upsample to stride 2, with skip connections from the encoder."""

    def __init__(self, width):
        super().__init__()
        self.up8, self.block8 = nn.Conv2d(width, C8, 1), ConvBlock(C8)
        self.up4, self.block4 = nn.Conv2d(C8, C4, 1), ConvBlock(C4)
        self.up2, self.block2 = nn.Conv2d(C4, C2, 1), nn.Conv2d(C2, C2, 3, padding=1)

    def forward(self, tokens, skips):
        """tokens (B,M,C,H/16,W/16), skips [(B·M,C,H/s,W/s) at strides 2, 4, 8] → (B,M,C,H/2,W/2)."""
        x2, x4, x8 = skips
        x = self.block8(upsample(self.up8(tokens.flatten(0, 1))) + x8)
        x = self.block4(upsample(self.up4(x)) + x4)
        x = self.block2(upsample(self.up2(x)) + x2)
        return F.gelu(x).unflatten(0, tokens.shape[:2])


class WeightHead(nn.Module):
    """One logit per candidate and pixel: the prior plus a correction, which starts at zero."""

    def __init__(self):
        super().__init__()
        self.correction = nn.Conv2d(C2, 1, 1)
        nn.init.zeros_(self.correction.weight)
        nn.init.zeros_(self.correction.bias)

    def forward(self, x2, prior_logits):
        """x2 (B,M,C,H/2,W/2), prior_logits (B,M,H/4,W/4) → logits (B,M,H,W)."""
        correction = self.correction(x2.flatten(0, 1)).float().unflatten(0, x2.shape[:2]).squeeze(2)  # (B,M,H/2,W/2)
        # Logits are upsampled, not weights: alpha then gives objects sharp edges at full resolution.
        return upsample(correction + upsample(prior_logits))


def scene_input(candidates, photo, mask):
    """Input shared by all candidates, (B,8,H,W): filled photo, mask, mean completion, log number of completions here.
    """
    rgb, alpha = candidates[:, 1:].split([3, 1], 2)
    cover = alpha.sum(1)  # (B,1,H,W)
    mean = ((rgb - 0.5) * alpha).sum(1) / cover.clamp(min=1)
    return torch.cat([photo - 0.5, mask, mean, cover.log1p()], 1)


# ----------------------------------------------------------------------------
# Loss

LEAST_MSE = 1e-5  # of colours in [0,1]: limits the PSNR term to 50 dB
SIMILAR_COLOUR = 0.05  # mean absolute difference in [0,1]; candidates within it are nearly equal targets
EDGE = 0.05  # difference of neighbours in the original, in [0,1]; there the cost of switching falls to 1/e


def fusion_loss(out: dict[str, Tensor], batch: dict[str, Tensor], perceptual: nn.Module | None, lpips_weight: float,
                oracle_weight: float | None = None, psnr_weight: float = 0.0,
                coherence=None) -> tuple[Tensor, dict[str, Tensor]]:
    """L1 + lpips_weight · LPIPS + psnr_weight · PSNR term + oracle_weight · oracle term + coherence terms.

    Args:
        out: output of the network; batch: its inputs and `original` (B,3,H,W).
        perceptual: PerceptualLoss; None: no LPIPS.
        lpips_weight, psnr_weight, oracle_weight: factors of the terms; oracle_weight None: no oracle term.
        coherence: factors of switching and of hedging, see `incoherence`; None: neither.

    Returns:
        the scalar to minimise (mean over scenes) and a dict of terms per scene, (B,) each: "objective" is their
        weighted sum, "loss" that of L1 and LPIPS only, for training and validation alike.
    """
    original, mask = batch["original"], batch["mask"]
    parts = {"l1": l1_loss(out["fused"], original, mask)}
    total = parts["l1"]
    if perceptual is not None:
        # The original surrounds the hole, so that only fused pixels count.
        parts["lpips"] = perceptual(torch.where(mask > 0.5, out["fused"], original), original)
        total = total + lpips_weight * parts["lpips"]
    parts["loss"] = total
    if psnr_weight > 0:
        parts["psnr_loss"] = psnr_loss(out["fused"], batch)
        total = total + psnr_weight * parts["psnr_loss"]
    if oracle_weight is not None:
        parts["oracle"] = oracle_loss(out, batch)
        total = total + oracle_weight * parts["oracle"]
    if coherence is not None:
        parts["switching"], parts["hedging"] = incoherence(out, batch)
        total = total + coherence[0] * parts["switching"] + coherence[1] * parts["hedging"]
    parts["objective"] = total
    return total.mean(), parts


def l1_loss(fused, original, mask):
    """Mean absolute difference in the hole, (B,)."""
    return ((fused - original).abs() * mask).sum((1, 2, 3)) / (3 * mask.sum((1, 2, 3)).clamp(min=1))


def psnr_loss(fused, batch):
    """Minus the mean of the PSNR in the hole and in the overlap, in units of 100 dB, (B,).

    If one completion is exact, blending others into it costs little L1 but much PSNR.
    """
    squared = (fused - batch["original"]).square().sum(1, keepdim=True)  # (B,1,H,W)
    loss = 0
    for region in (batch["mask"], overlap_region(batch)):
        mse = (squared * region).sum((1, 2, 3)) / (3 * region.sum((1, 2, 3)).clamp(min=1))
        loss += 0.05 * (mse + LEAST_MSE).log10()  # PSNR is −10·log10(MSE): divided by 100 dB, and by two regions
    return loss


def oracle_loss(out, batch):
    """Cross-entropy in the hole between weights and the candidates nearest to the original, (B,)."""
    original, mask = batch["original"], batch["mask"]
    colours = torch.cat([out["fill"][:, None], batch["completions"][:, :, :3]], 1)  # (B,M,3,H,W)
    alpha = batch["completions"][:, :, 3] * batch["valid"][:, :, None, None]
    covers = F.pad(alpha > 0, (0, 0, 0, 0, 1, 0), value=True)  # (B,M,H,W)
    distance = (colours - original[:, None]).abs().mean(2)
    target = (-distance / SIMILAR_COLOUR).masked_fill(~covers, -math.inf).softmax(1)
    log_p = out["logits"].masked_fill(~covers, -math.inf).log_softmax(1).masked_fill(~covers, 0)
    cross_entropy = -(target * log_p).sum(1, keepdim=True)  # (B,1,H,W)
    return (cross_entropy * mask).sum((1, 2, 3)) / mask.sum((1, 2, 3)).clamp(min=1)


def incoherence(out, batch):
    """Switching and hedging of the weights, per scene, (B,) each.

    Switching: total variation of the weights between neighbours in the hole with the same candidates, where the
    original has no edge. Hedging: 1 − Σ w², the probability that two draws from the weights differ (Gini 1912).
    """
    weights = torch.cat([out["residual"], out["weights"]], 1)  # (B,M,H,W)
    alpha = batch["completions"][:, :, 3] * batch["valid"][:, :, None, None]
    mask, original = batch["mask"], batch["original"]
    hole = mask.sum((1, 2, 3)).clamp(min=1)
    hedging = ((1 - weights.square().sum(1, keepdim=True)) * mask).sum((1, 2, 3)) / hole
    switching = 0
    for axis in (-1, -2):
        step = [x.diff(dim=axis).abs() for x in (weights, alpha, original)]
        size = mask.shape[axis] - 1
        inside = mask.narrow(axis, 0, size) * mask.narrow(axis, 1, size)
        alike = (1 - step[1].amax(1, keepdim=True)).clamp(min=0) * torch.exp(-step[2].mean(1, keepdim=True) / EDGE)
        switching = switching + (step[0].sum(1, keepdim=True) / 2 * alike * inside).sum((1, 2, 3)) / hole
    return switching, hedging


# ----------------------------------------------------------------------------
# Training


@dataclass
class TrainConfig:
    """All options of the training script, for flags, YAML keys and defaults."""

    ALIASES = CONFIG_ALIASES  # a plain attribute, no option
    COMMON = ("data_dir", "train_list", "val_list", "img_size", "n_max_completions", "epochs", "batch_size", "lr",
              "gpus", "checkpoint_dir", "init_from", "resume")  # what --help shows

    data_dir: str = option("", "data set made by prepare_dataset.py, packed or not", "data")
    train_list: str | None = option(None, "training scenes, one id per line; None: DATA_DIR/train_list.txt", "data")
    val_list: str | None = option(None, "validation scenes; None: DATA_DIR/val_list.txt", "data")
    train_dir: str | None = option(None, "folder of training scenes: those of train_list, or all", "data")
    val_dir: str | None = option(None, "folder of validation scenes: those of val_list, or all", "data")
    img_size: int = option(256, "side of the square network input, px; cost grows with its area", "data", least=32)
    n_max_completions: int = option(5, "completions per scene; the network itself takes any number", "data", least=1)
    augment: bool = option(True, "mirror and recolour scenes, shuffle and drop completions", "data")
    workers: int = option(4, "data loading processes per GPU; 0 loads in the training process", "data", least=0,
                         aliases={"num_workers": ""})
    check: bool = option(True, "read every scene before the first step, except those that were read before", "data")
    cache: str | None = option(None, "folder for packed copies of the data sets, which are read many times faster",
                               "data")

    synthesize: bool = option(False, "compose training scenes on the fly instead of reading train_list", "synthesis")
    objects: str | None = option(None, "folder of RGBA cut-outs, with --synthesize", "synthesis")
    backgrounds: str | None = option(None, "folder of photos to put them on", "synthesis")
    coco: str | None = option(None, "COCO-style annotations beside their photos, as well or instead", "synthesis")
    scenes_per_epoch: int = option(4000, "scenes of an epoch", "synthesis", least=1)
    repeat: int = option(1, "how often a composed scene is used, augmented from the second time on, if composing "
                            "is slower than training; needs 1, 2, 4, 8 or 16 workers", "synthesis", least=1)

    layers: tuple | None = option(None, "folders of photos with completed layers: raw results, or data sets with "
                                  "originals. Each use of a photo cuts another hole into it", "synthesis",
                                  choices=("DIR", ANY_NUMBER))
    layers_share: float = option(0.5, "share of the training scenes that come from layers; 1 needs no others",
                                 "synthesis", least=0.01, most=1)

    width: int = option(128, "channels of the Transformer", "model", least=8, most=65536,
                        aliases={"d_model": "the same number gives another network size than elsewhere; the "
                                            "number of parameters is printed at the start"})
    encoder_layers: int = option(2, "self-attention layers over the scene", "model", least=0, most=200,
                                 aliases={"num_encoder_layers": ""})
    decoder_layers: int = option(2, "layers that compare completions with each other", "model", least=1, most=200,
                                 aliases={"num_decoder_layers": ""})
    heads: int = option(4, "attention heads", "model", least=1, aliases={"nhead": ""})

    epochs: int = option(50, "passes over the training scenes", "optimisation", least=1, aliases={"num_epochs": ""})
    max_steps: int | None = option(None, "stop early, with the schedule of the full run. On resume, a step in an "
                                   "option still means the scenes of a step at the start of the run",
                                   "optimisation", least=1)
    batch_size: int = option(16, "scenes per process and forward pass; times processes times accumulate = effective",
                             "optimisation", least=1)
    accumulate: int = option(1, "forward passes per step: a larger batch in the same memory", "optimisation", least=1)
    optimizer: str | None = option(None, "muon learns more per scene, with slower steps; None: muon, or adamw for an "
                                   "lr that is usual for it", "optimisation", tuple(USUAL_RATES))
    lr: float | None = option(None, f"peak learning rate; None: the usual one of the optimizer, {USUAL_RATES}",
                              "optimisation", least=0,
                              aliases={"learning_rate": "the peak, after a warm-up and before a cosine decay"})
    warmup_steps: int = option(200, "steps of linear warm-up; then a cosine to a hundredth", "optimisation", least=0)
    weight_decay: float = option(0.05, "weight decay, on matrices only", "optimisation", least=0)
    grad_clip: float = option(1.0, "largest gradient norm; 0: no limit", "optimisation", least=0)
    ema_decay: float = option(0.998, "decay of the averaged (exported) weights", "optimisation", least=0, most=1)
    max_bad_steps: int = option(20, "bad gradients in a row after which the run stops", "optimisation", least=1)

    lpips_weight: float = option(0.5, "factor of LPIPS beside L1 in the hole; 0 turns it off", "loss", least=0)
    lpips_net: str = option("alex", "backbone of LPIPS; vgg takes more time than the rest of a step", "loss",
                            ("alex", "vgg", "squeeze"))
    lpips_weights: str | None = option(None, "torchvision file of the backbone; None: cache, then download", "loss")
    psnr_weight: float = option(4.0, "factor of minus the PSNR in hole and overlap, per 100 dB", "loss", least=0)
    oracle_weight: float = option(0.1, "factor of the pull to the candidate nearest to the original", "loss", least=0)
    switching_weight: float = option(0.0, "factor of switching between completions away from edges", "loss",
                                     least=0)
    hedging_weight: float = option(0.0, "factor of weights that are neither 0 nor 1", "loss", least=0)
    oracle_fade: float = option(0.5, "share of the run over which oracle_weight fades to zero", "loss", least=0, most=1)

    gpus: int = option(1, "GPUs on this machine, one process each; 0: the CPU", "compute", least=0)
    amp: str = option("bf16", "half precision; bf16 only with support of CPU or GPU (from Ampere on), else fp32",
                      "compute", tuple(HALF_PRECISION))
    cuda_graph: bool = option(False, "start all kernels of a step at once: faster on one GPU; no effect with fp16 or "
                                     "several GPUs", "compute")
    compile: bool = option(False, "torch.compile the network: minutes at the start, faster steps", "compute")
    seed: int = option(0, "of initial weights, order and augmentation", "compute", least=0)

    checkpoint_dir: str = option("checkpoints/transformer_run1", "folder of checkpoints, logs and figures", "output")
    init_share: float = option(0.0, "share of the weights of init_from in the exported ones; a mean of both often "
                               "generalizes better than either", "output", least=0, most=1)
    init_from: str | None = option(None, "weights to fine-tune, such as those in pretrained/", "output")
    resume: str | None = option(None, "'auto': from CHECKPOINT_DIR/last.pth if it exists; or a path", "output")
    export: str | None = option(None, "file for the best averaged weights, written at the end of the run", "output")
    inference_size: int | None = option(None, "side of the input at inference, px; None: img_size", "output", least=16)
    save_every: int = option(500, "steps between checkpoints within an epoch", "output", least=1,
                             aliases={"save_interval": "in steps; there is also one after each epoch"})
    log_every: int = option(20, "steps between lines of metrics.jsonl", "output", least=1, aliases={"log_interval": ""})
    log_dir: str | None = option(None, "folder of TensorBoard's event files; None: none", "output")
    figure_scenes: int = option(6, "validation scenes in a figure; 0 draws none", "output", least=0)
    figure_every: int = option(1, "epochs between figures of validation scenes; also after the last epoch", "output",
                               least=1, aliases={"vis_interval": "in epochs"})
    figure_dir: str | None = option(None, "folder of these figures; None: CHECKPOINT_DIR", "output",
                                    aliases={"vis_dir": ""})


    def __post_init__(self):
        self.optimizer, self.lr = choose_optimizer(self.optimizer, self.lr)


MODEL_OPTIONS = ("width", "encoder_layers", "decoder_layers", "heads")


def build_model(config):
    """The network that a config, or a checkpoint's stored config, describes."""
    return AmodalFusionTransformer(**{name: config[name] for name in MODEL_OPTIONS})


def load_model(path, *options):
    """The network of a checkpoint with its averaged weights, in eval mode, and the stored config.

    Args:
        path, options: as in `load_checkpoint`.

    Raises:
        UserError: see `load_checkpoint`; or the weights are not those of this network.
    """
    state = load_checkpoint(path, *options)
    try:
        config, weights = state["config"], averaged_weights(state)
        checked = {name: config[name] for name in (*MODEL_OPTIONS, "img_size")}
        if config.get("inference_size") is not None:
            checked["inference_size"] = config["inference_size"]
        check_values({name: value if type(value) is int else [value] for name, value in checked.items()}, TrainConfig,
                     "its config")
        check_shapes(build_model, config, weights)
        model = build_model(config)
        model.load_state_dict(weights)
    except (KeyError, AttributeError, TypeError, ValueError, RuntimeError, UserError) as error:
        raise UserError(f"{path}: its weights do not fit this network ({error!r}); use another file") from None
    return model.eval(), config


def take_shape(config, checkpoint, process):
    """Set the network's options in `config` to those of `init_from`, or of the checkpoint to resume.

    Returns:
        the network of `init_from`; None if a checkpoint is resumed.
    """
    if checkpoint is None:
        weights, stored = load_model(config.init_from, "init_from")
    else:
        weights, stored = None, load_checkpoint(checkpoint, "resume").get("config", {})
    for name in MODEL_OPTIONS:
        if type(stored.get(name)) is int and stored[name] != getattr(config, name):
            if process.is_main:
                print(f"note: {name} {getattr(config, name)} is ignored, {checkpoint or config.init_from} has "
                      f"{stored[name]}", flush=True)
            setattr(config, name, stored[name])
    return weights


def train(config, process, stop_signal, build=build_model):
    """Train the network `build(options)` as `config` says.

    Raises:
        Stopped: a signal ends the run early, with everything saved.
    """
    torch.set_float32_matmul_precision("high")
    lock = lock_checkpoint_dir(config, process)  # noqa: F841, held until the process ends
    checkpoint = checkpoint_to_resume(config, process)
    claim_files(config, checkpoint)

    train_loader, sampler, val_loader, val_digest = load_data(config, process)
    perceptual = load_perceptual(config, process)

    torch.manual_seed(config.seed)
    weights = take_shape(config, checkpoint, process) if config.init_from else None
    model = build(vars(config)).to(process.device)
    if weights is not None:
        model.load_state_dict(weights.state_dict())
    run = Run(model, config, process, len(train_loader.dataset), val_digest)
    run.resume(checkpoint, MODEL_OPTIONS)
    if config.compile:
        torch._dynamo.config.suppress_errors = True  # where the compiler fails, PyTorch warns and runs uncompiled
        model.compile()  # in place: state dict keys stay clean
    step = TrainStep(run, distributed.parallel(model, process), fusion_loss, perceptual)

    run.announce()
    stop_signal.hold()
    while not run.finished:
        stopped = train_one_epoch(step, train_loader, sampler, stop_signal)
        run.save("last.pth")  # before validation, which may take longer than schedulers wait after SIGTERM
        if stopped:
            raise Stopped
        metrics, drawn = evaluate(run.ema.module, fusion_loss, val_loader, perceptual, config, process, stop_signal)
        run.finish_epoch(metrics, drawn, val_loader.dataset.scene_ids)
    run.export()


def main(build=build_model):
    config = parse(TrainConfig, __doc__, yaml_file=True)
    stop_signal = StopSignal()
    with clean_shutdown(config, stop_signal):
        check_start(config)
        train(config, distributed.join(config.gpus), stop_signal, build)


if __name__ == "__main__":
    main()
