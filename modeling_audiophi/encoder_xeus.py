"""XEUS as AudioPhi's audio encoder. A clip's features do not depend on its batch, unless the config says
`espnet_exact`.

`encoder_layer="last"` is ESPnet's output, after `after_norm`; -1 is the last block's own output, which XEUS's authors
recommend.
"""

from torch import nn

from .encoder_layers import LayerChoice
from .lengths_audiophi import length_mask, output_length, shortest_input
from .modeling_xeus import XeusModel, xeus_length_rule


class XeusAudioEncoder(nn.Module):
    """`input_values` (B, samples) at 16 kHz, not normalised -> hidden states (B, T, hidden_size), about 50 per
    second."""

    feature_key = "input_values"
    takes_float32 = True  # whatever the weights are in
    time_axis = 1
    # Said when a checkpoint is saved that contains weights of this encoder.
    weights_licence = "XEUS: CC-BY-NC-SA-4.0, non-commercial"

    def __init__(self, config, layer="last"):
        super().__init__()
        self.config = config
        self.layer_choice = LayerChoice(config.num_hidden_layers + 1, layer)
        self.model = XeusModel(self.layer_choice.cut_config(config))
        if self.layer_choice.index is not None:
            self.model.after_norm = nn.Identity()

    @staticmethod
    def length_rule(config):
        return xeus_length_rule(config)

    @staticmethod
    def hidden_size(config):
        return config.hidden_size

    @staticmethod
    def window_frames(config):
        """30 s of samples: XEUS has no hard limit, but attention is quadratic."""
        return 480_000

    @staticmethod
    def feature_rate(config):
        return 16_000

    @staticmethod
    def read_base(path, dtype=None):
        """Weights of the component in folder `path`, keyed as in this module, and the list of missing keys."""
        model, info = XeusModel.from_pretrained(path, dtype=dtype, output_loading_info=True)
        return {f"model.{key}": value for key, value in model.state_dict().items()}, list(info["missing_keys"])

    def forward(self, features, mask):
        """`features` (B, S), `mask` (B, S) bool -> hidden (B, T, D), mask (B, T) bool."""
        rule = self.length_rule(self.config)
        lengths = mask.sum(1)
        # A clip shorter than a frame makes no token, but the convolutions still need that much input.
        samples = max(shortest_input(rule), int(lengths.max()))
        missing = max(0, samples - features.shape[1])
        features = nn.functional.pad(features[:, :samples], (0, missing))
        mask = nn.functional.pad(mask[:, :samples], (0, missing))
        output = self.model(features, mask, output_hidden_states=self.layer_choice.needs_all)
        hidden = self.layer_choice(output.last_hidden_state, output.hidden_states)
        return hidden, length_mask(output_length(lengths, rule), hidden.shape[1])
