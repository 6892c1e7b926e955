"""Registry of audio encoders: transformers `model_type` of the audio config -> class. One small file per family.

To add one: write `encoder_<name>.py` with a class that has the interface of `WhisperAudioEncoder` (feature_key,
    time_axis, length_rule, hidden_size, window_frames, feature_rate, read_base, forward) and add its line here; the
    relative import is also what makes the file ship to the Hub. A `model_type` that transformers does not know must
    be registered with AutoConfig by that file. Optional: sampling_rate (16,000 if not given), settings (names of config
    values that a recipe may change), fixed_window (see `encoder_windows.py`), takes_float32 (features, whatever the
    weights are in), weights_licence (for weights that a full checkpoint contains only if asked to), decoder (a class
    like `WhisperDecoder`, for `hear_with`).
"""

from transformers.utils import logging

from .encoder_ast import ASTAudioEncoder
from .encoder_clap import ClapAudioEncoder
from .encoder_hf import HFAudioEncoder, HFFeatureEncoder
from .encoder_languagebind import LanguageBindAudioEncoder
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
    "languagebind_audio": LanguageBindAudioEncoder,
    "audio-spectrogram-transformer": ASTAudioEncoder,
    "clap": ClapAudioEncoder,
}


def encoder_class(audio_config):
    """Class for `audio_config`; raises ValueError naming the encoders there are."""
    if audio_config.model_type not in ENCODERS:
        raise ValueError(f"unknown audio encoder {audio_config.model_type!r}; known: {', '.join(sorted(ENCODERS))}")
    return ENCODERS[audio_config.model_type]


def weights_licence(audio_config):
    """The licence of an encoder's weights where it restricts what may be done with a checkpoint of them, else None."""
    return getattr(encoder_class(audio_config), "weights_licence", None)


def warn_of_licence(audio_config, folder):
    """Log that the checkpoint in `folder` contains encoder weights whose licence restricts what may be done with it."""
    licence = weights_licence(audio_config)
    if licence is not None:
        logger.warning(
            f"{folder} contains encoder weights whose licence holds for the whole checkpoint ({licence}): do not "
            "publish it under another one. A slim checkpoint with a frozen encoder leaves them out and names them."
        )


def change_settings(audio_config, settings):
    """Set values of an encoder's config in place, of those that its class lists as `settings`.

    Raises ValueError naming a setting that this encoder does not have.
    """
    known = getattr(encoder_class(audio_config), "settings", ())
    for name, value in (settings or {}).items():
        if name not in known:
            raise ValueError(
                f"audio_settings: the {audio_config.model_type} encoder has no setting {name!r}; it has "
                f"{', '.join(known) or 'none'}"
            )
        setattr(audio_config, name, value)
