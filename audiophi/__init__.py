"""AudioPhi: ears for a small language model. Importing this package registers it with transformers' Auto classes and
`pipeline("audio-text-to-text")`.

    modeling_audiophi/   the model: encoder, adapter, readout, LLM (ships to the Hub with a checkpoint)
    processing/          the processor: audio and chats to model inputs (ships, too)
    audiophi/tasks/      one file per task: how it is asked, answered, decoded, scored
    audiophi/data/       data sets to examples, examples to batches
    audiophi/training/   recipes and stages            audiophi/evaluation/   metrics and their loop
    audiophi/publishing/ model cards                   audiophi/cli/          the command line
    audiophi/components/ base components that transformers cannot load as they are released
"""

import logging

from .requirements import check_requirements

# bitsandbytes, which transformers imports where it is there, says so to everybody who has no use for it.
logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(lambda said: "gemm_4bit_forward" not in said.getMessage())
check_requirements()  # first: without torch, transformers imports for seconds and then blames something else

from modeling_audiophi import (  # noqa: E402
    AudioPhiAdapterConfig,
    AudioPhiConfig,
    AudioPhiForConditionalGeneration,
    AudioTextToTextPipeline,
)
from processing import AudioError, AudioPhiProcessor, load_audio  # noqa: E402

from . import components  # noqa: E402, F401  (registers converters)

__all__ = [
    "AudioError",
    "AudioPhiAdapterConfig",
    "AudioPhiConfig",
    "AudioPhiForConditionalGeneration",
    "AudioPhiProcessor",
    "AudioTextToTextPipeline",
    "load_audio",
]
