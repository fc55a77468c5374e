"""What moves the weights: optimizer, learning rate, and their average."""

import math

import torch

from fusion.precision import training_precision
from fusion.training.cuda_graph import is_recorded
from fusion.training.muon import Muon


def make_optimizer(model, config, process):
    """The optimizer that `config` names; weights decay in matrices and convolutions only."""
    matrices = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
    recorded = is_recorded(config, process)  # a graph reads its learning rate from a tensor
    options = {"lr": torch.tensor(config.lr, device=process.device) if recorded else config.lr, "capturable": recorded}
    if config.optimizer == "adamw":
        return torch.optim.AdamW(groups, **options)
    half = training_precision(config.amp, process.device) is torch.bfloat16
    # all processes alike: another update on one of them, and their weights drift apart
    return Muon(groups, half=None if process.any(not half) else torch.bfloat16, **options)


def set_rate(optimizer, rate):
    for group in optimizer.param_groups:
        if torch.is_tensor(group["lr"]):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


def learning_rate(step, total_steps, warmup_steps):
    """Factor of the peak rate: linear warm-up, then a cosine down to 0.01; a pure function of the step, or part of one.
    """
    if step < warmup_steps:
        return min(1, (step + 1) / warmup_steps)
    progress = min(1, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress))


def average(decay):
    """EMA whose decay grows from 0.1 to `decay`, so that short runs do not drag their initial weights along."""

    def update(averaged, current, count):
        torch._foreach_lerp_(averaged, current, 1 - min(decay, (1 + int(count)) / (10 + int(count))))

    return update
