"""LanguageBind-Audio as AudioPhi's encoder: 74 tokens of 140 ms per window of 10.36 s."""

from .encoder_layers import LayerChoice
from .encoder_windows import WindowEncoder
from .frequency_pooling import pooled_size
from .modeling_languagebind_audio import LanguageBindAudioModel


class LanguageBindAudioEncoder(WindowEncoder):
    """`input_features` (B, 1036, 112) -> hidden states (B, T, 1024), or (B, T, 8192) with frequency_pooling "concat".

    The layer "last" is the encoder's own output, the penultimate hidden state.
    """

    def __init__(self, config, layer="last"):
        super().__init__(config)
        self.layer_choice = LayerChoice(config.num_hidden_layers + 1, layer)
        cut = self.layer_choice.cut_config(config)
        if self.layer_choice.index is not None:  # its own output is the penultimate state, of one block more
            cut.num_hidden_layers = min(self.layer_choice.index + 1, config.num_hidden_layers)
        self.model = LanguageBindAudioModel(cut)

    @staticmethod
    def length_rule(config):
        """A patch that has at least one real frame makes a token."""
        return [[config.patch_size, config.patch_size, config.patch_size - 1, 1]]

    @staticmethod
    def hidden_size(config):
        return pooled_size(config.hidden_size, config.grid[0], config.frequency_pooling)

    @staticmethod
    def window_frames(config):
        """10.36 s."""
        return config.grid[1] * config.patch_size

    @staticmethod
    def window_size(config):
        return config.target_length

    @staticmethod
    def read_base(path, dtype=None):
        """Weights of the converted component in folder `path`, keyed as in this module, and the missing keys."""
        model, info = LanguageBindAudioModel.from_pretrained(path, dtype=dtype, output_loading_info=True)
        return {f"model.{key}": value for key, value in model.state_dict().items()}, list(info["missing_keys"])

    def tokens(self, features):
        needs_last = self.layer_choice.index == self.config.num_hidden_layers
        output = self.model(features, output_hidden_states=self.layer_choice.layer == "mix" or needs_last)
        if output.hidden_states is None:
            return output.last_hidden_state
        return self.model.pool(self.layer_choice(output.hidden_states[-1], output.hidden_states))
