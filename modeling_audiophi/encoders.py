"""Registry of audio encoders: transformers `model_type` of the audio config -> class. One small file per family.

To add one: write `encoder_<name>.py` with a class that has the interface of `WhisperAudioEncoder` (feature_key,
    time_axis, length_rule, hidden_size, window_frames, feature_rate, read_base, forward) and add its line here; the
    relative import is also what makes the file ship to the Hub. A `model_type` that transformers does not know must
    be registered with AutoConfig by that file. Optional: weights_licence, said when a checkpoint contains them.
"""

from transformers.utils import logging

from .encoder_hf import HFAudioEncoder, HFFeatureEncoder
from .encoder_whisper import WhisperAudioEncoder
from .encoder_xeus import XeusAudioEncoder

logger = logging.get_logger(__name__)

ENCODERS = {
    "whisper": WhisperAudioEncoder,
    "wav2vec2": HFAudioEncoder,
    "hubert": HFAudioEncoder,
    "wavlm": HFAudioEncoder,
    "data2vec-audio": HFAudioEncoder,
    "unispeech": HFAudioEncoder,
    "unispeech-sat": HFAudioEncoder,
    "wav2vec2-bert": HFFeatureEncoder,
    "xeus": XeusAudioEncoder,
}


def encoder_class(audio_config):
    """Class for `audio_config`; raises ValueError naming the encoders there are."""
    if audio_config.model_type not in ENCODERS:
        raise ValueError(f"unknown audio encoder {audio_config.model_type!r}; known: {', '.join(sorted(ENCODERS))}")
    return ENCODERS[audio_config.model_type]


def warn_of_licence(audio_config, folder):
    """Log that the checkpoint in `folder` contains encoder weights whose licence restricts what may be done with it."""
    licence = getattr(encoder_class(audio_config), "weights_licence", None)
    if licence is not None:
        logger.warning(
            f"{folder} contains encoder weights whose licence holds for the whole checkpoint ({licence}): do not "
            "publish it under another one. A slim checkpoint with a frozen encoder leaves them out and names them."
        )
