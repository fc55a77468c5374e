"""Amodal Fusion Transformer: which of several amodal completions does each hidden pixel belong to?

This file holds the network, the loss and the training loop. Train on six GPUs, as the config says:

    python amodal_fusion_transformer.py --config transformer_train_config.yaml
    torchrun --nproc_per_node 6 amodal_fusion_transformer.py --config transformer_train_config.yaml

on one GPU, or on the CPU (a small run; LPIPS with VGG would take most of the time there):

    python amodal_fusion_transformer.py --data_dir DATA --gpus 1
    python amodal_fusion_transformer.py --data_dir DATA --gpus 0 --img_size 128 --lpips_net alex --workers 1
"""

import dataclasses
import functools
import math
import sys
import warnings
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from fusion.config import check_values, option, parse
from fusion.data.tensors import HALF_PRECISION
from fusion.engine import describe, evaluate, explain_memory, train_one_epoch
from fusion.errors import ConfigError, UserError
from fusion.figures import draw_curves, draw_scenes
from fusion.metrics import overlap_region
from fusion.model.backbone import ImageNetFeatures
from fusion.model.compositing import fill_hole, fuse, weigh
from fusion.model.cues import settle, weigh_evidence
from fusion.model.layers import ConvBlock, DecoderLayer, EncoderLayer, position_encoding
from fusion.training import distributed
from fusion.training.checkpoints import averaged_weights, check_shapes, load_checkpoint
from fusion.training.loaders import load_data
from fusion.training.perceptual import load_perceptual
from fusion.training.run import Run, check_same_model, checkpoint_to_resume, claim
from fusion.training.signals import Stopped, StopSignal

# ----------------------------------------------------------------------------
# Model


class AmodalFusionTransformer(nn.Module):
    """Partial image, mask and any number of completions → one weight map per completion.

    The smooth fill of the hole competes as one more candidate that covers everything; its weight is the residual,
    "none of these". All M = N + 1 candidates share every layer and carry no slot number, so their order cannot
    matter. The network starts as a soft version of the strongest simple rule (who agrees best with the visible
    photo wins) and learns where that rule is wrong.

    Args:
        width: channels of the tokens, a multiple of 8 and of `heads`.
        encoder_layers: self-attention layers over the scene.
        decoder_layers: layers in which candidates look at each other and at the scene, at least one.
        heads: attention heads.

    Raises:
        ValueError: width is not such a multiple.
    """

    STRIDE = 16
    GROUP_PIXELS = 2**20  # candidates of a batch go through the convolutions in groups of about so many pixels
    GROUP_PLACES = 2**12  # and through the Transformer decoder at so many places at a time
    KEPT_PIXELS = 2**24  # above so many pixels of candidates, features at stride 2 are computed twice, not kept
    SCENE_GRID = 16  # the scene is seen on at most 16×16 tokens: cost stays linear in pixels

    def __init__(self, width=128, encoder_layers=2, decoder_layers=2, heads=4):
        super().__init__()
        if width % 8 or width % heads:
            raise ValueError(f"width {width} must be a multiple of 8 and of heads, {heads}")
        c2, c4, c8 = 24, 48, 96  # channels at strides 2, 4, 8
        # convolutional encoder; the stem is linear, so what all candidates share is convolved once
        self.stem_scene = nn.Conv2d(8, c2, 4, stride=2, padding=1)
        self.stem_candidate = nn.Conv2d(5, c2, 4, stride=2, padding=1, bias=False)
        self.embed_evidence = nn.Conv2d(6, c4, 1)
        self.down4 = nn.Sequential(nn.GELU(), nn.Conv2d(c2, c4, 3, stride=2, padding=1))
        self.block4 = ConvBlock(c4)
        self.down8, self.block8 = nn.Conv2d(c4, c8, 3, stride=2, padding=1), ConvBlock(c8)
        self.down16 = nn.Conv2d(c8, width, 3, stride=2, padding=1)
        self.block16 = nn.Sequential(ConvBlock(width), ConvBlock(width))
        # what ImageNet features, at strides 4, 8 and 16, see in a draft of the result and in a candidate on top of it
        self.backbone = ImageNetFeatures()
        sizes = list(zip(self.backbone.CHANNELS, (c4, c8, width)))
        self.embed_draft = nn.ModuleList(nn.Conv2d(features, c, 1, bias=False) for features, c in sizes)
        self.embed_painted = nn.ModuleList(nn.Conv2d(features, c, 1) for features, c in sizes)
        self.embed_change = nn.ModuleList(nn.Conv2d(features, c, 1, bias=False) for features, c in sizes)
        # Transformer encoder and decoder
        self.fill_token = nn.Parameter(0.02 * torch.randn(width))
        self.pool_candidates = nn.Linear(3 * width, width)
        self.encoder = nn.ModuleList(EncoderLayer(width, heads) for _ in range(encoder_layers))
        self.decoder = nn.ModuleList(DecoderLayer(width, heads) for _ in range(decoder_layers))
        self.norm = nn.LayerNorm(width)
        # upsampling decoder with skip connections
        self.up8, self.up8_block = nn.Conv2d(width, c8, 1), ConvBlock(c8)
        self.up4, self.up4_block = nn.Conv2d(c8, c4, 1), ConvBlock(c4)
        self.up2, self.up2_block = nn.Conv2d(c4, c2, 1), nn.Conv2d(c2, c2, 3, padding=1)
        # both heads start at zero, which leaves the rule below, a soft relative of visible fit
        self.weight_head = nn.Conv2d(c2, 1, 1)
        self.vote_head = nn.Conv2d(c2, 2, 1)  # who is in front where two candidates meet, and how surely
        for head in (self.weight_head, self.vote_head):
            nn.init.zeros_(head.weight)
            nn.init.zeros_(head.bias)
        self.trust = nn.Parameter(torch.tensor([0.5, 0.5, 1.0, 0.6]))  # in local and overall error, duels, shapes
        self.fill_logit = nn.Parameter(torch.tensor(0.0))
        # between exact copies one wins outright, guesses share: log of a factor on all logits, where nothing is copied,
        # and what is added where everything is
        self.sharpness = nn.Parameter(torch.tensor([-1.0, 2.8]))
        self.to(memory_format=torch.channels_last)  # convolutions are faster this way round, on CPUs, too

    def forward(self, partial, mask, completions, valid=None):
        """Weigh the completions and fuse them.

        Args:
            partial: (B,3,H,W) in [0,1], zero in the hole.
            mask: (B,1,H,W) in {0,1}, 1 = hole.
            completions: (B,N,4,H,W) in [0,1], RGB + straight alpha; any N ≥ 1.
            valid: (B,N) bool, False = padded slot; None means that all are real.

        Returns:
            dict of
            weights: (B,N,H,W) and residual (B,1,H,W), non-negative, together 1 at every pixel. A weight is
                proportional to alpha·exp(logit), so zero where alpha is zero or the slot is padding.
            fused: (B,3,H,W), equal to `partial` outside the hole.
            fill: (B,3,H,W), the smooth fill that the residual stands for.
            logits, log_weights: (B,N+1,H,W), before and after alpha and softmax; the fill's last.
        """
        if valid is None:
            valid = torch.ones(completions.shape[:2], dtype=torch.bool, device=completions.device)
        else:  # whatever an empty slot holds
            completions = completions.masked_fill(~valid[:, :, None, None, None], 0)
        size = mask.shape[-2:]
        fill = fill_hole(partial, mask)
        canvas = torch.where(mask > 0.5, fill, partial)  # (B,3,H,W)
        groups = self.in_groups(completions, fill)  # of (B,G,4,H,W), all M candidates together

        evidence, alpha = self.examine(groups, canvas, mask)  # (B,M,6,H/4,W/4), (B,M,H/4,W/4)
        rule, sharpness = self.follow_rule(evidence)  # logits (B,M,H/4,W/4), and a factor on them (B,1,H/4,W/4)
        with torch.no_grad():  # the result as the rule alone would have it: what a candidate is seen among
            draft = fuse(weigh(enlarge(rule * sharpness, 4, size), completions),
                         partial, mask, completions, fill)["fused"]
        shared = self.stem_scene(self.padded(survey(canvas, mask, completions)))  # (B,C,H/2,W/2)
        skips, x16 = self.encode(groups, canvas, mask, shared, evidence, draft)
        tokens = self.relate(x16, valid)  # (B,M,C,H/16,W/16)
        learned, votes = self.upsample(tokens, skips)  # (B,M,H/2,W/2), (B,M,2,H/4,W/4)

        with torch.autocast(alpha.device.type, enabled=False):
            copied = evidence[:, :, 5, 0, 0]  # (B,M), of a completion alike all over the picture
            rule = rule + settle(votes, alpha, copied)
        # Logits are upsampled, not weights: alpha then cuts the objects' edges sharply at full resolution.
        logits = learned + F.interpolate(rule, scale_factor=2, mode="bilinear")
        logits = enlarge(logits * F.interpolate(sharpness, scale_factor=2, mode="bilinear"), 2, size)  # (B,M,H,W)
        log_weights = weigh(logits, completions)
        return {**fuse(log_weights, partial, mask, completions, fill), "fill": fill, "logits": logits,
                "log_weights": log_weights}

    def padded(self, x):
        """(B,C,H,W), the last row and column repeated until STRIDE divides both sides."""
        edge = (0, -x.shape[-1] % self.STRIDE, 0, -x.shape[-2] % self.STRIDE)
        return F.pad(x, edge, mode="replicate") if any(edge) else x

    def in_groups(self, completions, fill):
        """The candidates as a list of (B,G,4,H,W), so that large pictures need little memory at a time."""
        opaque = torch.ones_like(fill[:, :1])
        size = max(1, self.GROUP_PIXELS // opaque.numel())
        groups = list(completions.split(size, 1))
        last = groups.pop() if groups[-1].shape[1] < size else completions[:, :0]  # has room for the fill, or is full
        return [*groups, torch.cat([last, torch.cat([fill, opaque], 1)[:, None]], 1)]

    def examine(self, groups, canvas, mask):
        """What the photo around the hole says: `weigh_evidence`, (B,M,6,H/4,W/4), and alpha, (B,M,H/4,W/4)."""
        def view(group):
            parts = torch.cat(compare(group, canvas, mask), 2).float()  # (B,G,3,H,W)
            return F.avg_pool2d(self.padded(parts.flatten(0, 1)), 4).unflatten(0, group.shape[:2])

        views = torch.cat([view(group) for group in groups], 1)  # (B,M,3,H/4,W/4)
        with torch.autocast(mask.device.type, enabled=False):  # ratios of small errors want all their digits
            return weigh_evidence(views), views[:, :, 2]

    def follow_rule(self, evidence):
        """Evidence (B,M,6,H/4,W/4) → logits (B,M,H/4,W/4) of the rule and a factor (B,1,H/4,W/4) on them."""
        rule = (evidence[:, :, :4] * self.trust[:, None, None]).sum(2)
        rule = torch.cat([rule[:, :-1], self.fill_logit.expand_as(rule[:, -1:])], 1)
        return rule, (self.sharpness[0] + self.sharpness[1] * evidence[:, -1, 5:]).exp()

    def encode(self, groups, canvas, mask, shared, evidence, draft):
        """Convolutional encoder, a group of candidates at a time.

        Returns:
            skips, per group a function that gives the features at stride 2, and those at strides 4 and 8,
            (B,G,C,h,w); and the features of all candidates at stride 16, (B,M,C,h,w).
        """
        expected = self.backbone(self.padded(draft))  # (B,C,h,w) at strides 4, 8, 16
        embedded = [embed(features) for embed, features in zip(self.embed_draft, expected)]
        large = evidence.shape[1] * mask.numel() > self.KEPT_PIXELS
        skips, deepest = [], []
        for group, known in zip(groups, evidence.split([group.shape[1] for group in groups], 1)):
            stem = functools.partial(self.stem, group, canvas, mask, shared)
            x2 = stem()
            seen4, seen8, seen16 = self.recognise(group, draft, expected, embedded)
            x4 = self.block4(self.down4(x2.flatten(0, 1)) + self.embed_evidence(known.flatten(0, 1)) + seen4)
            x8 = self.block8(self.down8(x4) + seen8)
            x16 = self.block16(self.down16(x8) + seen16)
            skips.append([stem if large else lambda x2=x2: x2, *(x.unflatten(0, group.shape[:2]) for x in (x4, x8))])
            deepest.append(x16.unflatten(0, group.shape[:2]))
        return skips, torch.cat(deepest, 1)

    def stem(self, group, canvas, mask, shared):
        """Features (B,G,C,H/2,W/2) of candidates (B,G,4,H,W)."""
        disagreement, _, alpha = compare(group, canvas, mask)
        own = torch.cat([(group[:, :, :3] - 0.5) * alpha, alpha, disagreement], 2).flatten(0, 1)  # (B·G,5,H,W)
        return self.stem_candidate(self.padded(own)).unflatten(0, group.shape[:2]) + shared[:, None]

    def recognise(self, group, draft, expected, embedded):
        """What ImageNet features see in candidates (B,G,4,H,W) painted over the draft: (B·G,C,h,w) at strides 4, 8, 16.

        `expected` are those features of the draft alone, `embedded` the same after `embed_draft`.
        """
        colours, alpha = group.split([3, 1], 2)
        painted = self.backbone(self.padded(torch.lerp(draft[:, None], colours, alpha).flatten(0, 1)))
        layers = zip(self.embed_painted, self.embed_change, painted, expected, embedded)
        for embed, embed_change, own, beside, common in layers:
            change = (own.unflatten(0, group.shape[:2]) - beside[:, None]).abs_().flatten(0, 1)
            seen = (embed(own) + embed_change(change)).unflatten(0, group.shape[:2])
            yield (seen + common[:, None]).flatten(0, 1)

    def relate(self, x16, valid):
        """Transformer: candidates' features (B,M,C,h,w) see the scene and each other → the same shape."""
        _, _, channels, height, width = x16.shape
        tokens = x16.permute(0, 3, 4, 1, 2).flatten(1, 2)  # (B,L,M,C)
        real = valid[:, None, :, None]
        count = real.sum(2).clamp(min=1)
        mean = tokens[:, :, :-1].masked_fill(~real, 0).sum(2) / count
        # an empty slot must not win the maximum, nor may −inf reach a scene without any completion
        most = tokens[:, :, :-1].masked_fill(~real, -1e4).amax(2).clamp(min=-1e2)
        scene = self.pool_candidates(torch.cat([tokens[:, :, -1], mean, most], 2))  # (B,L,C)
        picture, grid = (height, width), (min(height, self.SCENE_GRID), min(width, self.SCENE_GRID))
        scene = F.adaptive_avg_pool2d(scene.transpose(1, 2).unflatten(2, picture), grid)
        scene = scene.flatten(2).transpose(1, 2)  # (B,S,C), S ≤ 256
        position = position_encoding(grid, picture, channels, scene.device)
        for layer in self.encoder:
            scene = layer(scene, position)
        scene = scene + position

        tokens = torch.cat([tokens[:, :, :-1], tokens[:, :, -1:] + self.fill_token], 2)
        present = F.pad(valid, (0, 1), value=True)  # (B,M), the fill always is
        position = position_encoding(picture, picture, channels, scene.device)
        decoded = []  # no place looks at another one from here on
        for part, where in zip(tokens.split(self.GROUP_PLACES, 1), position.split(self.GROUP_PLACES)):
            x = part  # (B,P,M,C), P places
            for layer in self.decoder:
                x = layer(x, present, scene, where)
            decoded.append(self.norm(x))
        return torch.cat(decoded, 1).unflatten(1, picture).permute(0, 3, 4, 1, 2)  # (B,M,C,h,w)

    def upsample(self, tokens, skips):
        """Upsampling decoder: tokens (B,M,C,h,w) meet the encoder's features on the way up to stride 2.

        `skips` is empty afterwards.

        Returns:
            logits (B,M,H/2,W/2) and votes (B,M,2,H/4,W/4).
        """
        learned, votes = [], []
        for group in tokens.split([x4.shape[1] for _, x4, _ in skips], 1):
            stem, x4, x8 = skips.pop(0)  # large: gone as soon as it has been used
            x = self.up8(group.flatten(0, 1))
            x = self.up8_block(F.interpolate(x, scale_factor=2, mode="bilinear") + x8.flatten(0, 1))
            x = self.up4_block(F.interpolate(self.up4(x), scale_factor=2, mode="bilinear") + x4.flatten(0, 1))
            x2 = stem()  # (B,G,C,H/2,W/2)
            x = self.up2_block(F.interpolate(self.up2(x), scale_factor=2, mode="bilinear") + x2.flatten(0, 1))
            x = F.gelu(x)
            learned.append(self.weight_head(x).float().view(*group.shape[:2], *x2.shape[-2:]))
            votes.append(F.avg_pool2d(self.vote_head(x), 2).float().unflatten(0, group.shape[:2]))
        return torch.cat(learned, 1), torch.cat(votes, 1)


# Functions, so that what they make at full size is given back when they return.


def survey(canvas, mask, completions):
    """What all candidates share, (B,8,H,W): the filled photo, the mask, the mean completion and how many there are."""
    rivals = completions[:, :, 3:].sum(1)  # (B,1,H,W)
    mean = sum((c[:, :3] - 0.5) * c[:, 3:] for c in completions.unbind(1)) / rivals.clamp(min=1)
    return torch.cat([canvas - 0.5, mask, mean, rivals.log1p()], 1)


def compare(group, canvas, mask):
    """Candidates (B,G,4,H,W) → |candidate − photo|·visible, how visible each is, and its alpha, (B,G,1,H,W)."""
    alpha = group[:, :, 3:]
    visible = alpha * (1 - mask)[:, None]
    return visible * (group[:, :, :3] - canvas[:, None]).abs().mean(2, keepdim=True), visible, alpha


def enlarge(logits, factor, size):
    """Logits (B,M,h,w) → (B,M,H,W), without what `padded` had added."""
    return F.interpolate(logits, scale_factor=factor, mode="bilinear")[..., : size[0], : size[1]]


# ----------------------------------------------------------------------------
# Loss


def fusion_loss(out, batch, perceptual, lpips_weight, oracle_weight=0.0, psnr_weight=0.0):
    """L1 in the hole + LPIPS of the whole composite + PSNR in the hole + a pull towards the nearest candidate.

    Args:
        out: what the model returned; batch: what it was given, with `original`.
        perceptual: PerceptualLoss, or None for lpips_weight 0.
        lpips_weight, psnr_weight, oracle_weight: factors of the other terms. PSNR counts per 100 dB, in the hole and
            in the overlap: a network that hedges loses little L1 but much PSNR where one completion is exact.

    Returns:
        what to minimise (a scalar, the mean over scenes) and a dict of its parts per scene, (B,) each; "objective" is
        all of it, "loss" L1 and LPIPS alone.
    """
    original, mask = batch["original"], batch["mask"]
    hole = mask.sum((1, 2, 3)).clamp(min=1)
    parts = {"l1": ((out["fused"] - original).abs() * mask).sum((1, 2, 3)) / (3 * hole)}
    total = parts["l1"]
    if perceptual is not None:
        # Around the hole stands the original, so that nothing but the fusion is judged.
        parts["lpips"] = perceptual(torch.where(mask > 0.5, out["fused"], original), original)
        total = total + lpips_weight * parts["lpips"]
    parts["loss"] = total  # without the terms below it means the same in training and validation
    if psnr_weight > 0:
        squared = (out["fused"] - original).square().sum(1, keepdim=True)  # (B,1,H,W)
        psnr_loss = 0
        for region in (mask, overlap_region(mask, batch["completions"], batch["valid"])):
            mse = (squared * region).sum((1, 2, 3)) / (3 * region.sum((1, 2, 3)).clamp(min=1))
            psnr_loss = psnr_loss + 0.05 * (mse + 1e-5).log10()  # floor: 50 dB, and where a region is empty
        parts["psnr_loss"] = psnr_loss
        total = total + psnr_weight * parts["psnr_loss"]
    if oracle_weight > 0:
        candidates = torch.cat([batch["completions"][:, :, :3], out["fill"][:, None]], 1)  # (B,M,3,H,W)
        possible = out["log_weights"] > -math.inf
        distance = (candidates - original[:, None]).abs().mean(2)  # (B,M,H,W)
        target = (-distance / 0.05).masked_fill(~possible, -math.inf).softmax(1)
        surprise = -(target * out["log_weights"].masked_fill(~possible, 0)).sum(1, keepdim=True)  # (B,1,H,W)
        parts["oracle"] = (surprise * mask).sum((1, 2, 3)) / hole
        total = total + oracle_weight * parts["oracle"]
    parts["objective"] = total
    return total.mean(), parts


# ----------------------------------------------------------------------------
# Training


@dataclass
class TrainConfig:
    """Every option of the training script; flags, YAML keys and defaults all come from here."""

    data_dir: str = option("", "data set made by prepare_dataset.py", "data")
    train_list: str | None = option(None, "training scenes, one id per line; None: DATA_DIR/train_list.txt", "data")
    val_list: str | None = option(None, "validation scenes; None: DATA_DIR/val_list.txt", "data")
    img_size: int = option(256, "side of the square that the network sees, px; cost grows with its square",
                           "data", least=32)
    n_max_completions: int = option(5, "completions per scene; the network itself takes any number", "data", least=1)
    augment: bool = option(True, "mirror and recolour scenes, shuffle and drop completions", "data")
    workers: int = option(4, "data loading processes per GPU; 0 loads in the training process", "data", least=0)
    check: bool = option(True, "read every scene before the first step, save those that were read already", "data")

    synthesize: bool = option(False, "compose training scenes on the fly instead of reading train_list", "synthesis")
    objects: str | None = option(None, "folder of RGBA cut-outs, with --synthesize", "synthesis")
    backgrounds: str | None = option(None, "folder of photos to put them on", "synthesis")
    coco: str | None = option(None, "COCO-style annotations beside their photos, as well or instead", "synthesis")
    scenes_per_epoch: int = option(4000, "scenes composed per epoch", "synthesis", least=1)

    width: int = option(128, "channels of the Transformer", "model", least=8)
    encoder_layers: int = option(2, "self-attention layers over the scene", "model", least=0, most=200)
    decoder_layers: int = option(2, "layers in which completions compare themselves", "model", least=1, most=200)
    heads: int = option(4, "attention heads", "model", least=1)

    epochs: int = option(50, "passes over the training scenes", "optimisation", least=1)
    max_steps: int | None = option(None, "stop after so many steps, with the schedule of the full run; a step in an "
                                   "option is as many scenes as one took when the run was begun, so that a change of "
                                   "batch size or processes on the way disturbs nothing", "optimisation", least=1)
    batch_size: int = option(8, "scenes per process and forward pass; times processes times accumulate = effective",
                             "optimisation", least=1)
    accumulate: int = option(1, "forward passes per step, to reach a larger batch in the same memory",
                             "optimisation", least=1)
    lr: float = option(1e-4, "peak learning rate of AdamW", "optimisation", least=0)
    warmup_steps: int = option(500, "steps of linear warm-up before the cosine decay to a hundredth",
                               "optimisation", least=0)
    weight_decay: float = option(0.05, "AdamW weight decay, on matrices only", "optimisation", least=0)
    grad_clip: float = option(1.0, "largest gradient norm", "optimisation", least=0)
    ema_decay: float = option(0.999, "decay of the averaged weights that are validated and exported",
                              "optimisation", least=0, most=1)
    max_bad_steps: int = option(20, "give up after so many steps in a row without a finite gradient",
                                "optimisation", least=1)

    lpips_weight: float = option(0.5, "factor of LPIPS beside L1 in the hole; 0 turns it off", "loss", least=0)
    lpips_net: str = option("vgg", "backbone of LPIPS; alex is far cheaper, for CPU runs", "loss",
                            ("vgg", "alex", "squeeze"))
    lpips_weights: str | None = option(None, "torchvision checkpoint of the backbone; None: cache, then download",
                                       "loss")
    psnr_weight: float = option(1.0, "factor of minus the PSNR in hole and overlap, per 100 dB", "loss", least=0)
    oracle_weight: float = option(0.05, "factor of the pull towards the nearest candidate at each pixel",
                                  "loss", least=0)
    oracle_fade: float = option(0.5, "share of the run over which that pull fades to zero", "loss", least=0, most=1)

    gpus: int = option(1, "GPUs on this machine; more than 1 starts that many workers, 0 is the CPU",
                       "compute", least=0)
    amp: str = option("bf16", "half precision; a CPU takes bf16 if it has instructions for it, else fp32", "compute",
                      tuple(HALF_PRECISION))
    compile: bool = option(False, "torch.compile the network: minutes at the start, faster steps", "compute")
    seed: int = option(0, "of initial weights, order and augmentation", "compute", least=0, most=2**63 - 1)

    checkpoint_dir: str = option("checkpoints/transformer_run1", "folder of checkpoints, logs and figures", "output")
    init_from: str | None = option(None, "weights to start from, pretrained/… for one, to fine-tune them", "output")
    resume: str | None = option(None, "'auto' goes on from CHECKPOINT_DIR/last.pth if there is one; or a path",
                                "output")
    save_every: int = option(500, "steps between checkpoints within an epoch", "output", least=1)
    log_every: int = option(20, "steps between lines of metrics.jsonl", "output", least=1)
    figure_scenes: int = option(6, "validation scenes drawn after each epoch", "output", least=0)


MODEL_OPTIONS = ("width", "encoder_layers", "decoder_layers", "heads")


def build_model(config):
    """The network that a config, or a checkpoint's stored config, describes."""
    return AmodalFusionTransformer(**{name: config[name] for name in MODEL_OPTIONS})


def load_model(path):
    """The network of a checkpoint with its averaged weights, in eval mode, and the stored config.

    Raises:
        UserError: see `load_checkpoint`; or the weights are not those of this network.
    """
    state = load_checkpoint(path)
    try:
        config, weights = state["config"], averaged_weights(state)
        check_values({name: config[name] for name in (*MODEL_OPTIONS, "img_size")}, TrainConfig, "its config")
        # A config that asks for more than the file holds must not cost memory. Meta tensors warn that they stay empty.
        with torch.device("meta"), warnings.catch_warnings(action="ignore"):
            check_shapes(build_model(config).state_dict(), weights)
        model = build_model(config)
        model.load_state_dict(weights)
    except (KeyError, AttributeError, TypeError, ValueError, RuntimeError, ConfigError) as error:
        raise UserError(f"{path}: its weights do not fit this network ({error!r}); use another file") from None
    return model.eval(), config


def create_model(config, device):
    """The network to train: new, or with the weights of `init_from`."""
    torch.manual_seed(config.seed)
    try:
        model = build_model(dataclasses.asdict(config)).to(device)
    except ValueError as error:
        raise UserError(str(error)) from None
    if config.init_from:
        weights, stored = load_model(config.init_from)
        check_same_model(config.init_from, stored, config, MODEL_OPTIONS)
        model.load_state_dict(weights.state_dict())
    return model


def train(config, process, stop_signal):
    """Train as `config` says. Returns False when a signal ended the run early, with everything saved."""
    torch.set_float32_matmul_precision("high")
    lock = claim(config, process)  # noqa: F841, held until the process ends
    checkpoint = checkpoint_to_resume(config)

    train_loader, sampler, val_loader = load_data(config, process)
    perceptual = load_perceptual(config, process)

    run = Run(create_model(config, process.device), config, process, len(train_loader.dataset))
    run.resume(checkpoint, MODEL_OPTIONS)
    network = run.model
    if config.compile:
        network.compile()  # in place: state dict keys stay clean
    if process.distributed:
        device_ids = [process.device] if process.device.type == "cuda" else None
        network = DistributedDataParallel(network, device_ids=device_ids, gradient_as_bucket_view=True)
        # All buffers are constants, read from the same file. As an argument it is deprecated from torch 2.13 on.
        network.broadcast_buffers = False

    run.announce()
    stop_signal.hold()
    while not run.finished:
        stopped = train_one_epoch(run, network, fusion_loss, train_loader, sampler, perceptual, stop_signal)
        run.save("last.pth")  # before validation, which may take longer than a scheduler waits after SIGTERM
        if stopped:
            return False
        metrics, drawn = evaluate(run.ema.module, fusion_loss, val_loader, perceptual, config, process, stop_signal)
        if metrics is None:
            return False
        epoch = run.epoch + 1
        run.finish_epoch(metrics)
        if process.is_main:
            print(f"epoch {epoch}, step {run.step}: " + describe(metrics), flush=True)
            draw_curves(run.folder / "curves.png", run.folder / "metrics.jsonl")
            if drawn:
                draw_scenes(run.folder / f"val_epoch_{epoch:03d}.png", drawn,
                            val_loader.dataset.scene_ids[: len(drawn)])
    return True


def main():
    config = parse(TrainConfig, __doc__, yaml_file=True)
    stop_signal = StopSignal()
    try:
        if not config.data_dir:
            raise ConfigError("no data set: give --data_dir, or data_dir in the YAML file")
        if config.gpus > 1 and not distributed.under_launcher():
            distributed.check_gpus(config.gpus)
            distributed.launch(config.gpus)
        process = distributed.join(config.gpus)
        finished = train(config, process, stop_signal)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except UserError as error:
        sys.exit(f"error: {error}")
    except OSError as error:  # a full or read-only disk
        sys.exit(f"error: {error.filename or config.checkpoint_dir}: {error.strerror or error}")
    except (RuntimeError, MemoryError) as error:
        sys.exit(f"error: {explain_memory(error)}")
    except Stopped:
        print("stopped by a signal before the first step, nothing is lost", file=sys.stderr)
        sys.exit(stop_signal.status)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    if not finished:
        if process.is_main:
            print(f"stopped by a signal after saving {config.checkpoint_dir}/last.pth; go on with --resume auto")
        sys.exit(stop_signal.status if not distributed.under_launcher() else 0)  # another status starts it again


if __name__ == "__main__":
    main()
