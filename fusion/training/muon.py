"""Muon, an optimizer that moves every direction of a weight matrix equally far."""

import torch

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # of Jordan's quintic
ROUNDS = 5
MOMENTUM, BETAS, EPS = 0.95, (0.9, 0.999), 1e-8
RMS_OF_ADAM = 0.2  # of a step of AdamW, in learning rates


class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon) for matrices, AdamW for all other parameters.

    Gradients of a matrix lie mostly in a few directions; here all singular values of their momentum are made alike,
    then scaled to the size of AdamW's steps (Liu et al. 2025, arXiv 2502.16982, equation 4), so that one learning rate
    serves both. A convolution counts as a matrix of (channels out, channels in · kernel).

    Args:
        params: parameters, or groups of them; all may have a `weight_decay` of their own.
        lr, weight_decay: as of AdamW.
        half: type that the iterations are computed in, Jordan's bf16 for one; None: that of the parameters.
    """

    def __init__(self, params, lr, weight_decay=0.0, half=None):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})
        self.half = half

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    is_matrix = parameter.dim() > 1 and min(parameter.shape[0], parameter[0].numel()) > 1
                    move = (self._muon if is_matrix else self._adam)(parameter.grad, self.state[parameter])
                    parameter.mul_(1 - group["lr"] * group["weight_decay"]).sub_(group["lr"] * move)

    def _muon(self, gradient, state):
        if not state:
            state["momentum"] = torch.zeros_like(gradient)
        momentum = state["momentum"].mul_(MOMENTUM).add_(gradient)
        ahead = gradient + MOMENTUM * momentum  # Nesterov's
        matrix = orthogonalized(ahead.flatten(1), self.half)
        return (RMS_OF_ADAM * max(matrix.shape) ** 0.5 * matrix).view_as(gradient)

    def _adam(self, gradient, state):
        if not state:
            zeros = torch.zeros_like(gradient)
            state.update(steps=gradient.new_zeros(()), mean=zeros, square=zeros.clone())
        state["steps"] += 1
        state["mean"].lerp_(gradient, 1 - BETAS[0])
        state["square"].lerp_(gradient.square(), 1 - BETAS[1])
        mean, square = (state[name] / (1 - beta ** state["steps"]) for name, beta in zip(("mean", "square"), BETAS))
        return mean / (square.sqrt() + EPS)


def orthogonalized(matrix, half=None):
    """(rows,columns) → the same with singular values near 1, by Newton–Schulz iterations in `half`, or its own type.

    Those above a three-hundredth of the norm come to lie between about 0.7 and 1.2, smaller ones grow some 480-fold.
    """
    a, b, c = NEWTON_SCHULZ
    x = (matrix / (matrix.norm() + 1e-7)).to(half or matrix.dtype)
    tall = x.shape[0] > x.shape[1]
    x = x.T if tall else x
    for _ in range(ROUNDS):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if tall else x
