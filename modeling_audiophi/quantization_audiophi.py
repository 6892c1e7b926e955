"""Which matrices bitsandbytes can keep in 4 bits: the same on every machine."""

import torch
from transformers.utils import logging

from .lora_audiophi import is_lora_key

logger = logging.get_logger(__name__)

# A row must be whole blocks of values that share a scale, and rows come in groups: what bitsandbytes 0.50's kernels for
# CPUs with AVX512-BF16 need. Elsewhere odd sizes would do, but a model shall not depend on where it was loaded.
BLOCK, ROWS = 64, 32


def matrices_for_4bit(language_model):
    """Names of a language model's linear layers (not LoRA's) that fit 4 bits, and of those that do not, which is said.

    Raises ValueError where none fits.
    """
    linear = {n: m for n, m in language_model.named_modules() if type(m) is torch.nn.Linear and not is_lora_key(n)}
    fitting = [n for n, m in linear.items() if m.in_features % BLOCK == 0 and m.out_features % ROWS == 0]
    others = [name for name in linear if name not in fitting]
    if not others:
        return fitting, others
    sizes = ", ".join(sorted({f"{linear[n].in_features} x {linear[n].out_features}" for n in others}))
    needed = f"4 bits need inputs in multiples of {BLOCK} and outputs in multiples of {ROWS}"
    if not fitting:
        raise ValueError(f"the language model cannot be kept in 4 bits: {needed}, its matrices are {sizes}")
    logger.warning(f"{len(others)} of {len(linear)} matrices keep their precision: {needed}, these are {sizes}")
    return fitting, others
