"""The keys and values of earlier positions: transformers calls them `cache` since 5.24, before that `past_key_values`.

Models, outputs and `generate` of one version know one name only, so a checkpoint's code has to use the one of the
version that loads it.
"""

import inspect

from transformers import GenerationMixin

_arguments = inspect.signature(inspect.unwrap(GenerationMixin.prepare_inputs_for_generation)).parameters
CACHE_NAME = "cache" if "cache" in _arguments else "past_key_values"
