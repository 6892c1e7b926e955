"""AudioPhi's model. Importing this package registers it, and its processor, with transformers' Auto classes."""

from transformers import AutoConfig, AutoModel, AutoModelForCTC, AutoModelForMultimodalLM
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


class _NoRecogniser:
    """What `pipeline("automatic-speech-recognition")` gets: the one thing to know, as an error of a kind that
    transformers does not wrap into pages of tracebacks."""

    config_class = AudioPhiConfig

    @classmethod
    def from_pretrained(cls, name, *args, **kwargs):
        raise LookupError(f'{name}: not a model for this pipeline; pipeline("audio-text-to-text") transcribes with it')


AutoModelForCTC.register(AudioPhiConfig, _NoRecogniser, exist_ok=True)

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
