"""From files and chat messages to model inputs: audio and prompts. Importing this package registers the processor with
transformers' AutoProcessor."""

from transformers import AutoProcessor

from modeling_audiophi import AudioPhiConfig, resolve_component

from .audio_io import AudioError, load_audio
from .processing_audiophi import COMPONENT_FINDERS, AudioPhiProcessor


def component_folder(component: str, revision: str | None = None) -> str:
    """Folder of a base component, its weights left out where that saves a download. Errors: `resolve_component`."""
    return resolve_component(component, revision, weights=False)


COMPONENT_FINDERS.append(component_folder)
AutoProcessor.register(AudioPhiConfig, AudioPhiProcessor, exist_ok=True)

__all__ = ["AudioError", "AudioPhiProcessor", "load_audio"]
