"""Which arithmetic a stage runs in on the machine that it runs on."""

import torch

from .recipe import Recipe


def training_device() -> torch.device:
    """Of the kind that stages run on here."""
    return torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")


def frozen_dtype(recipe: Recipe, kind: str | None = None) -> torch.dtype:
    """What frozen weights are kept in on a kind of device ("cuda"; None: on this machine's, as far as it has bf16).

    "auto" is bfloat16 where all stages run in bf16, which would else round the weights in every step.
    """
    if recipe.frozen_dtype != "auto":
        return getattr(torch, recipe.frozen_dtype)
    here = training_device().type
    used = {stage.precision if kind else fast_precision(stage.precision, here)[0] for stage in recipe.stages}
    return torch.bfloat16 if used == {"bf16"} else torch.float32


def fast_precision(wanted: str, device_type: str) -> tuple[str, str | None]:
    """What to run `wanted` ("fp32", "bf16" or "fp16") in on "cpu", "cuda" ..., and why, if not in that.

    bf16 where nothing multiplies it falls back to loops on one core (a CPU with AVX2 only: 2 to 137 GFLOP/s) or to
    errors (GPUs before Ampere), so there it is fp32.
    """
    if wanted != "bf16":
        return wanted, None
    if device_type == "cpu" and not cpu_multiplies_bf16():
        return "fp32", "this CPU has no instructions for bf16, which would be slower"
    if device_type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        return "fp32", f"{torch.cuda.get_device_name()} has no bf16; fp16 is faster, where it does not overflow"
    return "bf16", None


def cpu_multiplies_bf16() -> bool:
    """Whether oneDNN, which PyTorch multiplies bf16 matrices with, takes them on this CPU."""
    supported = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
    return bool(torch.backends.mkldnn.is_available() and supported is not None and supported())
