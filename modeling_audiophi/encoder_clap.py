"""CLAP's audio tower (https://arxiv.org/abs/2211.06687) through transformers: 48 kHz, 3.2 tokens/s, 10 s windows.

Its last stage has 2 x 32 patches per window. As in its training a shorter clip is repeated and filled up with silence.
"""

import torch
from transformers import ClapAudioModelWithProjection
from transformers.models.clap.modeling_clap import ClapAudioModel

from .encoder_layers import LayerChoice
from .encoder_windows import WindowEncoder
from .frequency_pooling import pool_frequency, pooled_size

WINDOW_FRAMES = 1000  # 10 s every 10 ms; a centred spectrogram has one frame more


class ClapAudioEncoder(WindowEncoder):
    """`input_features` (B, 1001, 64) -> hidden states (B, T, 768), or (B, T, 2 * 768) with frequency_pooling "concat".

    `config` is a whole ClapConfig, of which only `audio_config` is used. Checkpoints with and without fusion; the
    spectrograms for fusion (crops of clips longer than a window) are not needed here.
    """

    sampling_rate = 48_000

    def __init__(self, config, layer="last"):
        super().__init__(config)
        if layer != "last":
            raise ValueError(f"encoder_layer {layer!r}: the stages of CLAP differ in size, so it must be 'last'")
        self.model = ClapAudioModel(config.audio_config)
        self.layer_choice = LayerChoice(1)

    @staticmethod
    def grid(config):
        """Patches of a window after the last stage: (frequency, time), 2 x 32."""
        audio = config.audio_config
        stride = audio.patch_stride if isinstance(audio.patch_stride, int) else audio.patch_stride[1]
        folds = audio.spec_size // audio.num_mel_bins  # the spectrogram is folded to a square
        side = audio.spec_size // stride // 2 ** (len(audio.depths) - 1)
        return side // folds, side * folds

    @staticmethod
    def length_rule(config):
        return [[1, 1, 0, ClapAudioEncoder.grid(config)[1]], [WINDOW_FRAMES, WINDOW_FRAMES, WINDOW_FRAMES - 1, 1]]

    @staticmethod
    def hidden_size(config):
        audio = config.audio_config
        size = audio.patch_embeds_hidden_size * 2 ** (len(audio.depths) - 1)
        return pooled_size(size, ClapAudioEncoder.grid(config)[0], WindowEncoder.pooling(config))

    @staticmethod
    def window_frames(config):
        return WINDOW_FRAMES

    @staticmethod
    def window_size(config):
        return WINDOW_FRAMES + 1

    @staticmethod
    def read_base(path, dtype=None):
        """Weights of the audio tower of the CLAP in folder `path`, keyed as in this module, and the missing keys."""
        model, info = ClapAudioModelWithProjection.from_pretrained(path, dtype=dtype, output_loading_info=True)
        missing = [key for key in info["missing_keys"] if key.startswith("audio_model.")]
        return {f"model.{key}": value for key, value in model.audio_model.state_dict().items()}, missing

    def tokens(self, features):
        is_longer = torch.zeros(len(features), 1, dtype=torch.bool, device=features.device)
        patches = self.model(features[:, None], is_longer=is_longer).last_hidden_state  # (B, D, F, T)
        return pool_frequency(patches.permute(0, 2, 3, 1), self.pooling(self.config))
