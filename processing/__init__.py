"""From files and chat messages to model inputs: audio, prompts, datasets, batches."""

from .alignment_text import AlignmentTokenizer, normalise_transcript
from .audio_io import AudioError, load_audio
from .augment import Augment, speed_perturb
from .collator import AudioPhiCollator
from .datasets import load_audio_dataset, read_clip
from .processing_audiophi import COMPONENT_FINDERS, AudioPhiProcessor


def component_folder(component: str, revision: str | None = None) -> str:
    """Folder of a base component, its weights left out where that saves a download. Errors: `resolve_component`."""
    from modeling_audiophi import resolve_component  # which imports this package

    return resolve_component(component, revision, weights=False)


COMPONENT_FINDERS.append(component_folder)

__all__ = [
    "AlignmentTokenizer",
    "AudioError",
    "AudioPhiCollator",
    "AudioPhiProcessor",
    "Augment",
    "load_audio",
    "load_audio_dataset",
    "normalise_transcript",
    "read_clip",
    "speed_perturb",
]
