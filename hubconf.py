"""For torch.hub: the network with its weights, ready for `fuse` (see FusionPredictor).

    predictor = torch.hub.load("REPOSITORY", "amodal_fusion_predictor", source="local")  # a folder with this file
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # torch.hub takes it away again before the function is called

from amodal_fusion_transformer_inference import FusionPredictor

dependencies = ["torch", "torchvision", "numpy", "PIL", "cv2", "yaml", "matplotlib", "tqdm", "lpips"]


def amodal_fusion_predictor(pretrained=None, **options):
    """FusionPredictor of `pretrained`: a checkpoint, a folder, or owner/name on Hugging Face; None: shipped weights."""
    return FusionPredictor.from_pretrained(pretrained, **options)
