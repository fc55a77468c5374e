"""What the photo around the hole says about the candidates in it: whom to believe, and who is in front of whom."""

import torch
import torch.nn.functional as F

from fusion.model.compositing import push_pull


def weigh_evidence(view):
    """Who is right where one can tell, and what that says about the hole.

    Args:
        view: (B,M,3,H/4,W/4) in [0,1], |candidate − photo|·visible, how visible it is, and its alpha; the fill
            comes last.

    Returns:
        (B,M,6,H/4,W/4), larger is better: minus the log of the error where nobody else explains the photo better,
        carried smoothly into the hole; the same of its mean over the picture; against those that a candidate
        competes with at this pixel, log ratio of errors where they meet in plain view, and log ratio of the shares
        of their shapes that lie outside each other; as log of the share of the picture, how much of it is visible;
        and, from 0 to 1, how surely it copies the photo, by the share of it that is exact, which for a scaled copy
        is only a part (the fill's is the mean of the completions at this pixel). The first two say whom to believe,
        the next two who is in front, the last how firmly. Errors shrink towards a typical one when little is
        visible.
    """
    typical, doubt = 0.04, 1e-3  # an error in [0,1]; the share of the picture at which half of it is believed
    exact, some = 0.01, 0.15  # an error that is none; a share of exact pixels that half proves a copy
    slack = 0.02  # a share outside that means nothing
    slots, size = view.shape[:2], view.shape[-2] * view.shape[-1]
    disagreement, visible, alpha = view.split(1, 2)  # (B,M,1,H/4,W/4)

    # Where two completions overlap in plain view, the one behind is wrong: the clearest sign of their order.
    d, v, a = (x.flatten(2)[:, :-1] for x in (disagreement, visible, alpha))  # (B,N,P)
    wrong = (d @ v.mT + doubt / 10 * size * typical) / (v @ v.mT + doubt / 10 * size)
    wrong = wrong.log()  # (B,N,N), log error of the row's completion where it meets the column's
    # What lies within another one's shape is in front of it: behind it nobody would have seen it to complete it.
    outside = 1 - a @ a.mT / a.sum(2, keepdim=True).clamp(min=1e-3)  # (B,N,N), share of the row's completion
    outside = (outside + slack).log()
    duel, within = (F.pad((x.mT - x) @ a, (0, 0, 0, 1)).view_as(visible) for x in (wrong, outside))

    # A plate is not wrong where the food on it hides it: an error counts as far as nobody else fits better.
    error = disagreement / visible.clamp(min=1e-6)
    fits = visible * (-error / typical).exp()
    fits = torch.cat([fits[:, :-1] / fits[:, :-1].sum(1, keepdim=True).clamp(min=1e-6), fits[:, -1:]], 1)
    own = (visible * fits.clamp(max=1)).flatten(0, 1)  # (B·M,1,H/4,W/4)
    error = error.flatten(0, 1)
    seen = own.mean((2, 3), keepdim=True)
    overall = ((error * own).mean((2, 3), keepdim=True) + doubt * typical) / (seen + doubt)
    local = (seen * push_pull(error, own) + doubt * overall) / (seen + doubt)
    copied = ((own * (-error / exact).exp()).mean((2, 3), keepdim=True) + doubt / 4) / (seen + doubt)
    copied = (copied.square() / (copied.square() + some**2)).unflatten(0, slots).expand_as(alpha)  # (B,M,1,H/4,W/4)
    standing = alpha[:, :-1] + 1e-3 * alpha[:, :-1].mean((3, 4), keepdim=True)  # where nobody stands, all
    mean = (copied[:, :-1] * standing).sum(1, keepdim=True) / standing.sum(1, keepdim=True).clamp(min=1e-9)
    copied = torch.cat([copied[:, :-1], mean], 1)
    evidence = [-local.clamp(min=1e-4).log(), -overall.log(), duel.flatten(0, 1), within.flatten(0, 1),
                seen.clamp(min=1e-4).log(), copied.flatten(0, 1)]
    return torch.cat([e.expand_as(local) for e in evidence], 1).unflatten(0, slots)


def settle(votes, alpha, copied):
    """Two candidates have one order wherever they meet: all places where they do vote on it.

    Args:
        votes: (B,M,2,h,w), how much speaks for a candidate, and a logit of how much that counts; alpha (B,M,h,w).
            The fill comes last.
        copied: (B,M), from 0 to 1, how surely each copies the photo. Against the fill, votes count as far as it does
            not: with exact copies the evidence knows better (docs/experiments.md, point 18).

    Returns:
        logits (B,M,h,w): the lead of each over all those that it meets at this pixel.
    """
    lead, weight = votes.flatten(3).unbind(2)  # (B,M,P)
    cover = alpha.flatten(2)
    weight = cover * weight.sigmoid()
    lead = (weight * lead) @ weight.mT / (weight @ weight.mT + 1e-3 * cover.shape[2])  # (B,M,M)
    heard = torch.ones_like(lead)
    heard[:, -1] = heard[:, :, -1] = 1 - copied
    return ((lead - lead.mT) * heard @ cover).view_as(alpha)
