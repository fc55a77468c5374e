"""Rewrite the weights of a checkpoint of format 1, from before the network was split into blocks.

    python -m experiments.convert_checkpoint OLD.pth NEW.pth

Training checkpoints become weights alone: their averaged ones.
"""

import re
import sys

import torch

from fusion.checkpoints import averaged_weights, save_checkpoint

RENAMED = (
    (r"(encoder|decoder)\.(\d)", r"transformer.\1.\2"), (r"(fill_token|pool_candidates|norm)\.", r"transformer.\1."),
    (r"fill_token$", "transformer.fill_token"), (r"embed_evidence", "encoder.embed_cues"),
    (r"embed_draft", "encoder.embed_context"), (r"down4\.1", "encoder.down4"),
    (r"(stem_|down8|down16|block\d|embed_)", r"encoder.\1"),
    (r"up(\d)_block", r"decoder.block\1"), (r"(up\d)", r"decoder.\1"),
    (r"weight_head", "head.weight_head"), (r"vote_head", "head.order_head"), (r"trust", "prior.cue_weights"),
    (r"fill_logit", "prior.fill_logit"), (r"sharpness", "prior.log_inverse_temperature"),
)


def renamed(name):
    for pattern, new in RENAMED:
        if re.match(pattern, name):
            return re.sub("^" + pattern, new, name)
    return name


if __name__ == "__main__":
    old, new = sys.argv[1:]
    state = torch.load(old, map_location="cpu", weights_only=True)
    weights = {renamed(name): value for name, value in averaged_weights(state).items()}
    kept = {name: state[name] for name in ("config", "metrics", "epoch", "step") if name in state}
    save_checkpoint(new, {"model": weights, **kept})
