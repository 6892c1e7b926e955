"""Speech encoders that transformers has under AutoModel: wav2vec 2.0, HuBERT, WavLM, data2vec, UniSpeech, w2v-BERT 2.0.

Padding: where the architecture lets padding leak into real frames (group-normalised feature extractors, see
https://arxiv.org/abs/2006.11477 base models; stacked positional convolutions; strided adapters) rows of different
length are run apart, so that a clip's features never depend on its neighbours.
"""

import torch
from torch import nn
from transformers import AutoModel

from .encoder_layers import LayerChoice
from .lengths_audiophi import length_mask, output_length, shortest_input

# Families whose forward masks padding wherever it could leak; tested in tests/test_encoders.py.
PADDING_SAFE = {"wav2vec2", "hubert", "wavlm", "unispeech", "unispeech-sat", "wav2vec2-bert"}


class HFAudioEncoder(nn.Module):
    """Waveform encoders: `input_values` (B, samples) at 16 kHz -> hidden states (B, T, hidden_size), about 50 per
    second."""

    feature_key = "input_values"
    time_axis = 1

    def __init__(self, config, layer="last"):
        super().__init__()
        if layer != "last" and getattr(config, "add_adapter", False):
            raise ValueError(
                "this encoder has its own adapter (add_adapter) after the last layer: encoder_layer must be 'last'"
            )
        self.config = config
        self.layer_choice = LayerChoice(config.num_hidden_layers + 1, layer)
        self.model = AutoModel.from_config(self.layer_choice.cut_config(config))
        if self.layer_choice.index is not None:  # what is behind the last block
            self.model.intermediate_ffn = None  # w2v-BERT's
            if getattr(config, "do_stable_layer_norm", False):  # without it the norm is in front of the first
                self.model.encoder.layer_norm = nn.Identity()

    @staticmethod
    def length_rule(config):
        rule = [[kernel, stride, 0, 1] for kernel, stride in zip(config.conv_kernel, config.conv_stride, strict=True)]
        if getattr(config, "add_adapter", False):
            rule += [[config.adapter_kernel_size, config.adapter_stride, 2, 1]] * config.num_adapter_layers
        return rule

    @staticmethod
    def hidden_size(config):
        return config.output_hidden_size if getattr(config, "add_adapter", False) else config.hidden_size

    @staticmethod
    def window_frames(config):
        """30 s of samples: these encoders have no hard limit, but attention is quadratic."""
        return 480_000

    @staticmethod
    def feature_rate(config):
        return 16_000

    @staticmethod
    def read_base(path, dtype=None):
        """Weights of the component in folder `path`, keyed as in this module, and the list of missing keys."""
        model, info = AutoModel.from_pretrained(path, dtype=dtype, output_loading_info=True)
        # The mask embedding is for masked pre-training only; fine-tuned checkpoints may lack it.
        missing = [key for key in info["missing_keys"] if not key.endswith("masked_spec_embed")]
        return {f"model.{key}": value for key, value in model.state_dict().items()}, missing

    @property
    def padding_safe(self):
        config = self.config
        return (
            config.model_type in PADDING_SAFE
            and getattr(config, "feat_extract_norm", "layer") != "group"
            and not getattr(config, "add_adapter", False)
        )

    def forward(self, features, mask):
        """`features` (B, S) or (B, S, bins), `mask` (B, S) bool -> hidden (B, T, D), mask (B, T) bool."""
        rule = self.length_rule(self.config)
        lengths = mask.sum(1)
        out_lengths = output_length(lengths, rule)
        features = features.to(next(self.model.parameters()).dtype)
        # A window shorter than the receptive field makes no token, but the convolutions still need that much input.
        shortest = shortest_input(rule)
        if features.shape[1] < shortest:
            padding = shortest - features.shape[1]
            features = nn.functional.pad(features, [0, 0] * (features.dim() - 2) + [0, padding])
            mask = nn.functional.pad(mask, (0, padding))
        frames = max(shortest, int(lengths.max()))
        if bool((lengths == frames).all()):
            hidden = self._run(features[:, :frames], None)
        elif self.padding_safe:
            hidden = self._run(features[:, :frames], mask[:, :frames])
        else:
            hidden = features.new_zeros(len(features), max(1, int(out_lengths.max())), self.hidden_size(self.config))
            for length in lengths.unique().tolist():
                rows = (lengths == length).nonzero()[:, 0]
                states = self._run(features[rows, : max(shortest, length)], None)
                filler = states.new_zeros(len(rows), hidden.shape[1] - states.shape[1], states.shape[2])
                hidden = hidden.to(states.dtype).index_copy(0, rows, torch.cat([states, filler], dim=1))
        return hidden, length_mask(out_lengths, hidden.shape[1])

    def _run(self, features, mask):
        output = self.model(
            **{self.feature_key: features},
            attention_mask=None if mask is None else mask.long(),
            output_hidden_states=self.layer_choice.needs_all,
        )
        return self.layer_choice(output.last_hidden_state, output.hidden_states)


class HFFeatureEncoder(HFAudioEncoder):
    """w2v-BERT 2.0: `input_features` (B, T, 160), two stacked 10 ms mel frames per row -> hidden states (B, T,
    hidden_size)."""

    feature_key = "input_features"

    @staticmethod
    def length_rule(config):
        if not getattr(config, "add_adapter", False):
            return []
        kernel, stride = config.adapter_kernel_size, config.adapter_stride
        return [[kernel, stride, 2 * (stride // 2), 1]] * config.num_adapter_layers

    @staticmethod
    def window_frames(config):
        return 1500

    @staticmethod
    def feature_rate(config):
        return 50
