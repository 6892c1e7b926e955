"""Whisper's encoder without the 30-second padding.

Whisper's own class insists on 3000 mel frames. Here a clip costs what it is long: the convolutions run on the frames
there are, the first T position embeddings are added, and padding is masked in attention (0.036 s against 0.31 s for a
5 s clip on two CPU cores with tiny.en). A clip's features do not depend on what it is batched with.
"""

import torch
from torch import nn
from transformers import WhisperModel
from transformers.masking_utils import create_bidirectional_mask
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from .decoder_whisper import WhisperDecoder
from .encoder_layers import LayerChoice
from .lengths_audiophi import length_mask, output_length


class WhisperAudioEncoder(nn.Module):
    """`input_features` (B, mel bins, T) log-mel at 100 frames/s -> hidden states (B, ceil(T / 2), d_model)."""

    feature_key = "input_features"
    time_axis = 2
    decoder = WhisperDecoder

    def __init__(self, config, layer="last"):
        super().__init__()
        self.config = config
        self.layer_choice = LayerChoice(config.encoder_layers + 1, layer)
        self.encoder = WhisperEncoder(self.layer_choice.cut_config(config, "encoder_layers"))

    @staticmethod
    def length_rule(config):
        return [[3, 1, 2, 1], [3, 2, 2, 1]]

    @staticmethod
    def hidden_size(config):
        return config.d_model

    @staticmethod
    def window_frames(config):
        """Longest window in mel frames: two per position embedding (3000 = 30 s)."""
        return 2 * config.max_source_positions

    @staticmethod
    def feature_rate(config):
        """Feature frames per second of audio."""
        return 100

    @staticmethod
    def read_base(path, dtype=None):
        """Weights of the component in folder `path`, keyed as in this module, and the list of missing keys."""
        model, info = WhisperModel.from_pretrained(path, dtype=dtype, output_loading_info=True)
        missing = [key for key in info["missing_keys"] if key.startswith("encoder.")]
        return {f"encoder.{key}": value for key, value in model.encoder.state_dict().items()}, missing

    def forward(self, features, mask):
        """`features` (B, mel bins, T), `mask` (B, T) bool -> hidden (B, T', d_model), mask (B, T') bool.

        Raises ValueError for windows longer than the position embeddings.
        """
        encoder = self.encoder
        lengths = mask.sum(1)
        frames = max(1, int(lengths.max()))
        if frames > self.window_frames(self.config):
            raise ValueError(
                f"a Whisper window holds {self.window_frames(self.config)} mel frames, got {frames}: cut long audio "
                "in windows (the processor does, see window_frames)"
            )
        # Padding must be zero wherever a convolution can see it, as beyond the end of an unpadded clip.
        mask = mask[:, :frames, None].transpose(1, 2)
        hidden = features[:, :, :frames].to(encoder.conv1.weight.dtype).masked_fill(~mask, 0)
        hidden = nn.functional.gelu(encoder.conv1(hidden)).masked_fill(~mask, 0)
        hidden = nn.functional.gelu(encoder.conv2(hidden)).transpose(1, 2)
        out_mask = length_mask(output_length(lengths, self.length_rule(self.config)), hidden.shape[1])
        hidden = hidden + encoder.embed_positions.weight[: hidden.shape[1]].to(hidden.dtype)
        hidden = nn.functional.dropout(hidden, p=encoder.dropout, training=self.training)
        attention_mask = create_bidirectional_mask(config=encoder.config, inputs_embeds=hidden, attention_mask=out_mask)
        states = [hidden]
        for block in encoder.layers:
            if not (self.training and encoder.layerdrop > 0 and torch.rand([]) < encoder.layerdrop):
                hidden = block(hidden, attention_mask)
            if self.layer_choice.needs_all:
                states.append(hidden)
        if self.layer_choice.index in (None, self.config.encoder_layers):
            states[-1] = hidden = encoder.layer_norm(hidden)
        return self.layer_choice(hidden, states), out_mask
