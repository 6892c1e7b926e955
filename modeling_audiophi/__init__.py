"""AudioPhi's model. Importing this package registers it with transformers' Auto classes."""

from transformers import AutoConfig, AutoModel, AutoModelForMultimodalLM, AutoProcessor

from processing.processing_audiophi import AudioPhiProcessor

from . import wheel_components  # noqa: F401  (registers the PyPI fallback for base components)
from .adapters import ADAPTERS
from .components_audiophi import FALLBACKS, resolve_component
from .configuration_audiophi import AudioPhiAdapterConfig, AudioPhiConfig
from .configuration_languagebind_audio import LanguageBindAudioConfig
from .configuration_xeus import XeusConfig
from .encoders import ENCODERS
from .modeling_audiophi import AudioPhiForConditionalGeneration, AudioPhiModel, AudioPhiPreTrainedModel
from .modeling_languagebind_audio import LanguageBindAudioModel
from .modeling_xeus import XeusModel

AutoConfig.register("audiophi", AudioPhiConfig, exist_ok=True)
AutoConfig.register("audiophi_adapter", AudioPhiAdapterConfig, exist_ok=True)
AutoModel.register(AudioPhiConfig, AudioPhiForConditionalGeneration, exist_ok=True)
AutoModelForMultimodalLM.register(AudioPhiConfig, AudioPhiForConditionalGeneration, exist_ok=True)
AutoProcessor.register(AudioPhiConfig, AudioPhiProcessor, exist_ok=True)

__all__ = [
    "ADAPTERS",
    "ENCODERS",
    "FALLBACKS",
    "AudioPhiAdapterConfig",
    "AudioPhiConfig",
    "AudioPhiForConditionalGeneration",
    "AudioPhiModel",
    "AudioPhiPreTrainedModel",
    "LanguageBindAudioConfig",
    "LanguageBindAudioModel",
    "XeusConfig",
    "XeusModel",
    "resolve_component",
]
