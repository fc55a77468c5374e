"""Half precision: what --amp names, and where it is to be had."""

import torch

HALF_PRECISION = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}  # by the values of --amp


def training_precision(amp, device):
    """The type in which autocast computes a training step, None for fp32.

    A CPU takes bf16 where it has instructions for it (avx512_bf16, AMX); others imitate it, slower than fp32.
    """
    if device.type == "cpu":
        known = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}  # not in older torch
        if amp != "bf16" or not (known.get("avx512_bf16") or known.get("amx_bf16")):
            return None
    return HALF_PRECISION[amp]
