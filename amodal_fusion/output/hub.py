"""Weights in a folder as model hubs know it: the checkpoint, config.json, and README.md with metadata."""

import json
import re
from pathlib import Path

from amodal_fusion.checkpoints import check_writable, portable, save_checkpoint
from amodal_fusion.errors import UserError
from amodal_fusion.files import check_ours, record_written, write_text

WEIGHTS = "amodal_fusion_transformer.pth"
CARD = """\
---
library_name: amodal-fusion-transformer
pipeline_tag: image-to-image
tags: [amodal-completion, image-inpainting, image-fusion, pytorch]
---

# Amodal Fusion Transformer

Weights that fuse several amodal completions of the hole in a photo.

```python
from amodal_fusion_transformer_inference import FusionPredictor

predictor = FusionPredictor.from_pretrained(".")  # this folder, or its name on Hugging Face
result = predictor.fuse(partial, mask, completions)
```
"""


def find_weights(path_or_name):
    """Path of a checkpoint: the file itself, the one in a folder, or that of a repository on Hugging Face.

    Args:
        path_or_name: file; folder of `write_pretrained`, or of a training run; or "owner/name", which is downloaded
            once and needs the package huggingface_hub.

    Raises:
        UserError: there is no such thing, or it cannot be downloaded.
    """
    path = Path(path_or_name)
    if path.is_dir():
        for name in (WEIGHTS, "best_model.pth"):
            if (path / name).exists():
                return path / name
        raise UserError(f"{path}: no {WEIGHTS} and no best_model.pth in it; name the checkpoint itself")
    if path.exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", str(path_or_name)) or path.suffix == ".pth":
        return path  # reading it tells what is wrong
    try:
        from huggingface_hub import hf_hub_download
    except ImportError:
        raise UserError(f"{path_or_name}: no such folder here; to download it from Hugging Face: pip install "
                        "huggingface_hub") from None
    try:
        return Path(hf_hub_download(str(path_or_name), WEIGHTS))
    except Exception as error:  # the network, the name, or access to it
        raise UserError(f"{path_or_name}: no such folder here, and it cannot be downloaded ({error})") from None


def write_pretrained(folder, model, config):
    """Write a network's weights, config.json and README.md into `folder`; returns the path of the weights.

    Files of an earlier call are replaced. A README.md that was changed since stays.

    Raises:
        UserError: the folder cannot be written, or its weights or config.json are not ours.
    """
    path = Path(folder) / WEIGHTS
    check_writable(path)
    check_ours([path, path.with_name("config.json")])
    config = portable(config)
    save_checkpoint(path, {"model": {name: value.cpu() for name, value in model.state_dict().items()},
                           "config": config})
    record_written(path.parent, {path.name: path})
    text = json.dumps({"architectures": [type(model).__name__], **config}, indent=1)
    write_text(path.with_name("config.json"), text + "\n", owned=True)
    card = path.with_name("README.md")
    if not card.exists():
        write_text(card, CARD, owned=True)
    return path
