"""What moves the weights: optimizer, learning rate, and their average."""

import math
from collections import defaultdict

import torch

from amodal_fusion.precision import training_precision
from amodal_fusion.training.cuda_graph import is_recorded


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


# ----------------------------------------------------------------------------
# Muon, an optimizer that moves every direction of a weight matrix equally far.



NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # of Jordan's quintic
ROUNDS = 5
MOMENTUM = 0.95
RMS_OF_ADAM = 0.2  # of a step of AdamW, in learning rates


class Muon(torch.optim.AdamW):
    """Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon) for matrices, AdamW for all other parameters.

    Gradients of a matrix lie mostly in a few directions; here all singular values of their momentum are made alike,
    then scaled to the size of AdamW's steps (Liu et al. 2025, arXiv 2502.16982, equation 4), so that one learning rate
    serves both. A convolution counts as a matrix of (channels out, channels in · kernel).

    Args:
        params: parameters, or groups of them; all may have a `weight_decay` of their own.
        lr, weight_decay, capturable: as of AdamW.
        half: type that the iterations are computed in, Jordan's bf16 for one; None: that of the parameters.
    """

    def __init__(self, params, lr, weight_decay=0.0, half=None, capturable=False):
        super().__init__(params, lr, weight_decay=weight_decay, capturable=capturable)
        self.half = half

    @torch.no_grad()
    def step(self):
        gradients = {}
        for group in self.param_groups:
            alike = defaultdict(list)  # matrices by shape: a GPU takes as long for one of them as for many
            for parameter in group["params"]:
                if parameter.grad is None or parameter.dim() < 2:
                    continue
                shape = len(parameter), parameter[0].numel()
                if min(shape) > 1:
                    alike[shape].append(parameter)
                    gradients[parameter] = parameter.grad
            for parameters in alike.values():
                self._move(parameters, group["lr"], group["weight_decay"])
        for parameter in gradients:
            parameter.grad = None  # which AdamW passes over
        super().step()
        for parameter, gradient in gradients.items():
            parameter.grad = gradient

    def _move(self, parameters, lr, weight_decay):
        """A step with matrices of one shape."""
        for parameter in parameters:
            if not self.state[parameter]:  # `step` stays 0; AdamW looks for it wherever there is a state
                self.state[parameter].update(momentum=torch.zeros_like(parameter), step=torch.tensor(0.0))
        gradients = [parameter.grad for parameter in parameters]
        momenta = [self.state[parameter]["momentum"] for parameter in parameters]
        torch._foreach_lerp_(momenta, gradients, 1 - MOMENTUM)
        ahead = torch._foreach_lerp(gradients, momenta, MOMENTUM)  # Nesterov's
        moves = orthogonalized(torch.stack([move.flatten(1) for move in ahead]), self.half)  # (K,rows,columns)
        moves = moves.float() * (lr * RMS_OF_ADAM * max(moves.shape[1:]) ** 0.5)
        torch._foreach_mul_(parameters, 1 - lr * weight_decay)
        torch._foreach_sub_(parameters, [move.view_as(p) for move, p in zip(moves, parameters)])


def orthogonalized(matrices, half=None):
    """(…,rows,columns) → the same with singular values near 1, by Newton–Schulz iterations in `half`, or its own type.

    Those above a three-hundredth of the norm come to lie between about 0.7 and 1.2, smaller ones grow some 480-fold.
    """
    a, b, c = NEWTON_SCHULZ
    x = (matrices / (torch.linalg.matrix_norm(matrices, keepdim=True) + 1e-7)).to(half or matrices.dtype)
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    for _ in range(ROUNDS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x
