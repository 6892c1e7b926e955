"""Which arithmetic a stage runs in on the machine that it runs on."""

import torch


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
