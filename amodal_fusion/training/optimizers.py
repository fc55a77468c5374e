"""Optimizer, learning rate schedule, and average of the weights (EMA)."""

import math
from collections import defaultdict

import torch

from amodal_fusion.config import note
from amodal_fusion.precision import training_precision

USUAL_RATES = {"muon": 1e-3, "adamw": 3e-4}  # peak learning rates


def choose_optimizer(optimizer, lr):
    """Optimizer and learning rate for options that may be None; prints a note about unusual values.

    A rate below a third of Muon's usual one is an AdamW rate: Muon hardly learns with it.
    """
    if optimizer is None and lr is not None and 3 * lr < USUAL_RATES["muon"]:
        note(f"lr {lr:g} is a learning rate for AdamW, so the optimizer is adamw; muon with lr {USUAL_RATES['muon']:g} "
             "learns more per scene")
        return "adamw", lr
    optimizer = optimizer or "muon"
    usual = USUAL_RATES[optimizer]
    if lr is not None and not usual / 5 <= lr <= usual * 5:
        note(f"lr {lr:g} is far from {usual:g}, the usual rate of {optimizer}; expect slow or unstable learning")
    return optimizer, usual if lr is None else lr


def make_optimizer(model, config, process):
    """The optimizer of `config`; weight decay applies to matrices and convolutions only."""
    matrices = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
    if config.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=config.lr)
    half = training_precision(config.amp, process.device) is torch.bfloat16
    # the same on all processes: otherwise their weights would drift apart
    return Muon(groups, lr=config.lr, half=None if process.any(not half) else torch.bfloat16)


def set_rate(optimizer, rate):
    for group in optimizer.param_groups:
        if torch.is_tensor(group["lr"]):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


def learning_rate(step, total_steps, warmup_steps):
    """Factor of the peak rate at a step (may be fractional): linear warm-up, then a cosine down to 0.01."""
    if step < warmup_steps:
        return min(1, (step + 1) / warmup_steps)
    progress = min(1, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress))


def average(decay):
    """EMA with a decay that grows from 0.1 to `decay`, so that short runs forget their initial weights."""

    def update(averaged, current, count):
        torch._foreach_lerp_(averaged, current, 1 - min(decay, (1 + int(count)) / (10 + int(count))))

    return update


NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # of Jordan's quintic
ROUNDS = 5
MOMENTUM = 0.95
RMS_OF_ADAM = 0.2  # root mean square of a step of AdamW, in learning rates


class Muon(torch.optim.AdamW):
    """Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon) for matrices, AdamW for all other parameters.

    Gradients of a matrix lie mostly in a few directions. Muon makes all singular values of their momentum nearly equal,
    and scales the step to the size of AdamW's (Liu et al. 2025, arXiv 2502.16982, equation 4), so that one learning
    rate serves both. A convolution counts as a matrix of (channels out, channels in · kernel).

    torch.optim.Muon does the same for matrices, but not for convolutions. It has only bf16, no learning rate on the GPU
    (needed by CUDA graphs), and takes one matrix at a time (slow).

    Args:
        params: parameters, or groups of them with their own `weight_decay`.
        lr, weight_decay: as in AdamW.
        half: type of the iterations, such as Jordan's bf16; None: that of the parameters.
    """

    def __init__(self, params, lr, weight_decay=0.0, half=None):
        super().__init__(params, lr, weight_decay=weight_decay)
        self.half = half

    @torch.no_grad()
    def step(self):
        gradients = {}
        for group in self.param_groups:
            alike = defaultdict(list)  # shape → matrices: a GPU needs the same time for many as for one
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
            parameter.grad = None  # AdamW skips these
        super().step()
        for parameter, gradient in gradients.items():
            parameter.grad = gradient

    def _move(self, parameters, lr, weight_decay):
        """Move matrices of one shape."""
        for parameter in parameters:
            if not self.state[parameter]:  # `step` stays 0; AdamW expects it in every state
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
    """(…,rows,columns) → nearest matrices with singular values near 1, by Newton–Schulz iterations in `half`.

    Singular values above 1/300 of the norm end between about 0.7 and 1.2. Smaller ones grow about 480-fold.
    """
    a, b, c = NEWTON_SCHULZ
    x = (matrices / (torch.linalg.matrix_norm(matrices, keepdim=True) + 1e-7)).to(half or matrices.dtype)
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    for _ in range(ROUNDS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x
