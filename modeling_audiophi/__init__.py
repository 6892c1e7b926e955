"""AudioPhi's model. Importing this package registers it, and its processor, with transformers' Auto classes."""

from transformers import AutoConfig, AutoModel, AutoModelForMultimodalLM
from transformers.pipelines import PIPELINE_REGISTRY

from .adapters import ADAPTERS
from .components_audiophi import resolve_component
from .configuration_audiophi import AudioPhiAdapterConfig, AudioPhiConfig
from .configuration_languagebind_audio import LanguageBindAudioConfig
from .configuration_xeus import XeusConfig
from .encoders import ENCODERS
from .modeling_audiophi import AudioPhiForConditionalGeneration, AudioPhiModel, AudioPhiPreTrainedModel
from .modeling_languagebind_audio import LanguageBindAudioModel
from .modeling_xeus import XeusModel
from .pipeline_audiophi import AudioTextToTextPipeline

AutoConfig.register("audiophi", AudioPhiConfig, exist_ok=True)
AutoConfig.register("audiophi_adapter", AudioPhiAdapterConfig, exist_ok=True)
AutoModel.register(AudioPhiConfig, AudioPhiForConditionalGeneration, exist_ok=True)
AutoModelForMultimodalLM.register(AudioPhiConfig, AudioPhiForConditionalGeneration, exist_ok=True)
if "audio-text-to-text" not in PIPELINE_REGISTRY.get_supported_tasks():  # should transformers have one of its own
    PIPELINE_REGISTRY.register_pipeline(
        "audio-text-to-text", AudioTextToTextPipeline, pt_model=AutoModelForMultimodalLM, type="multimodal"
    )
AudioPhiConfig.pipeline_is_registered = True

import processing  # noqa: E402, F401  (registers the processor, for which it needs the config above)

__all__ = [
    "ADAPTERS",
    "ENCODERS",
    "AudioPhiAdapterConfig",
    "AudioPhiConfig",
    "AudioPhiForConditionalGeneration",
    "AudioPhiModel",
    "AudioPhiPreTrainedModel",
    "AudioTextToTextPipeline",
    "LanguageBindAudioConfig",
    "LanguageBindAudioModel",
    "XeusConfig",
    "XeusModel",
    "resolve_component",
]
