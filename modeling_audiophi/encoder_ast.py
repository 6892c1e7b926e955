"""Audio Spectrogram Transformer (https://arxiv.org/abs/2104.01778) through transformers: 10 tokens/s, 10.24 s windows.

Patches of 16 x 16 every 10 bins and 10 frames, 12 x 101 per window. As in its training a shorter clip is filled up with
silence; a patch that reaches into the filling makes no token.
"""

from torch import nn
from transformers import ASTModel

from .encoder_layers import LayerChoice
from .encoder_windows import WindowEncoder
from .frequency_pooling import pool_frequency, pooled_size


def bands(config):
    """Rows of patches, 12."""
    return (config.num_mel_bins - config.patch_size) // config.frequency_stride + 1


class ASTAudioEncoder(WindowEncoder):
    """`input_values` (B, 1024, 128) -> hidden states (B, T, 768), or (B, T, 12 * 768) with frequency_pooling
    "concat"."""

    feature_key = "input_values"

    def __init__(self, config, layer="last"):
        super().__init__(config)
        self.layer_choice = LayerChoice(config.num_hidden_layers + 1, layer)
        self.model = ASTModel(self.layer_choice.cut_config(config))
        if self.layer_choice.index is not None:
            self.model.layernorm = nn.Identity()  # is behind the last block

    @staticmethod
    def length_rule(config):
        return [[config.patch_size, config.time_stride, 0, 1]]

    @staticmethod
    def hidden_size(config):
        return pooled_size(config.hidden_size, bands(config), WindowEncoder.pooling(config))

    @staticmethod
    def window_frames(config):
        return config.max_length

    @staticmethod
    def window_size(config):
        return config.max_length

    @staticmethod
    def read_base(path, dtype=None):
        """Weights of the component in folder `path` (a classifier's head is left out), keyed as in this module, and
        the list of missing keys."""
        model, info = ASTModel.from_pretrained(path, dtype=dtype, output_loading_info=True)
        return {f"model.{key}": value for key, value in model.state_dict().items()}, list(info["missing_keys"])

    def tokens(self, features):
        output = self.model(features, output_hidden_states=self.layer_choice.needs_all)
        states = self.layer_choice(output.last_hidden_state, output.hidden_states)
        patches = states[:, 2:].unflatten(1, (bands(self.config), -1))  # behind a class and a distillation token
        return pool_frequency(patches, self.pooling(self.config))
