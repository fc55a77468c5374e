"""Half precision: the types of `amp`, and where they are available."""

import torch

HALF_PRECISION = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}  # value of `amp` → type


def training_precision(amp, device):
    """The autocast type of a training step, None for fp32.

    bf16 is used only with hardware support (avx512_bf16 or AMX of a CPU, GPUs from Ampere on): emulated it is slower
    than fp32.
    """
    if device.type == "cuda" and amp == "bf16" and not torch.cuda.is_bf16_supported(including_emulation=False):
        return None
    if device.type == "cpu":
        known = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}  # not in older torch
        if amp != "bf16" or not (known.get("avx512_bf16") or known.get("amx_bf16")):
            return None
    return HALF_PRECISION[amp]
