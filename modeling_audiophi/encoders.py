"""Registry of audio encoders: transformers `model_type` of the audio config -> class. One small file per family.

To add one: write `encoder_<name>.py` with a class that has the interface of `WhisperAudioEncoder` (feature_key,
    time_axis, length_rule, hidden_size, window_frames, feature_rate, read_base, forward) and add its line here; the
    relative import is also what makes the file ship to the Hub. A `model_type` that transformers does not know must
    be registered with AutoConfig by that file.
"""

from .encoder_hf import HFAudioEncoder, HFFeatureEncoder
from .encoder_whisper import WhisperAudioEncoder

ENCODERS = {
    "whisper": WhisperAudioEncoder,
    "wav2vec2": HFAudioEncoder,
    "hubert": HFAudioEncoder,
    "wavlm": HFAudioEncoder,
    "data2vec-audio": HFAudioEncoder,
    "unispeech": HFAudioEncoder,
    "unispeech-sat": HFAudioEncoder,
    "wav2vec2-bert": HFFeatureEncoder,
}


def encoder_class(audio_config):
    """Class for `audio_config`; raises ValueError naming the encoders there are."""
    if audio_config.model_type not in ENCODERS:
        raise ValueError(f"unknown audio encoder {audio_config.model_type!r}; known: {', '.join(sorted(ENCODERS))}")
    return ENCODERS[audio_config.model_type]
