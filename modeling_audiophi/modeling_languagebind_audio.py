"""LanguageBind-Audio's encoder (https://arxiv.org/abs/2310.01852, code and weights MIT) in transformers' CLIP layers.

A window of 10.36 s is a picture, 112 mel bins x 1036 frames, cut into 8 x 74 patches of 14 x 14. The patch tokens of
the penultimate layer, pooled over frequency, are 74 tokens of 140 ms. The pooled embedding that LanguageBind is known
for is not offered: one vector for a whole clip cannot carry a sentence. Parameter names are those of
`vision_model.*` in the released checkpoint (`pre_layrnorm` included).
"""

import torch
from torch import nn
from transformers import AutoModel, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.clip.modeling_clip import CLIPAttention, CLIPEncoder, CLIPEncoderLayer

from .configuration_languagebind_audio import LanguageBindAudioConfig
from .frequency_pooling import pool_frequency


class LanguageBindAudioEmbeddings(nn.Module):
    """Patches, a class token and learned positions; CLIP's own class knows square pictures only."""

    def __init__(self, config):
        super().__init__()
        size, (rows, columns) = config.hidden_size, config.grid
        self.num_channels = config.num_channels
        self.class_embedding = nn.Parameter(torch.randn(size))
        self.patch_embedding = nn.Conv2d(
            config.num_channels, size, kernel_size=config.patch_size, stride=config.patch_size, bias=False
        )
        self.position_embedding = nn.Embedding(rows * columns + 1, size)

    def forward(self, input_features):
        """(B, frames, bins) -> (B, 1 + F * T, D): class token, then patches row by row, lowest frequency first."""
        picture = input_features.transpose(1, 2)[:, None].expand(-1, self.num_channels, -1, -1)
        patches = self.patch_embedding(picture.to(self.patch_embedding.weight.dtype)).flatten(2).transpose(1, 2)
        first = self.class_embedding.expand(len(patches), 1, -1)
        return torch.cat([first, patches], dim=1) + self.position_embedding.weight


class LanguageBindAudioModel(PreTrainedModel):
    """`input_features` (B, target_length, num_mel_bins) -> tokens in time; see `forward`."""

    config_class = LanguageBindAudioConfig
    base_model_prefix = "vision_model"
    main_input_name = "input_features"
    input_modalities = ("audio",)
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True
    _no_split_modules = ["LanguageBindAudioEmbeddings", "CLIPEncoderLayer"]
    _can_record_outputs = {"hidden_states": CLIPEncoderLayer, "attentions": CLIPAttention}

    def __init__(self, config):
        super().__init__(config)
        self.embeddings = LanguageBindAudioEmbeddings(config)
        self.pre_layrnorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.encoder = CLIPEncoder(config)
        # Part of the checkpoint; only LanguageBind's pooled embedding goes through it.
        self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, LanguageBindAudioEmbeddings):
            init.normal_(module.class_embedding, mean=0.0, std=self.config.hidden_size**-0.5)

    def get_input_embeddings(self):
        return self.embeddings.patch_embedding

    def pool(self, states):
        """A hidden state (B, 1 + F * T, D), without its class token, pooled: (B, T, D) or (B, T, F * D)."""
        rows, columns = self.config.grid
        patches = states[:, 1:].unflatten(1, (rows, columns))
        return pool_frequency(patches, self.config.frequency_pooling)

    def forward(self, input_features, output_hidden_states=None, return_dict=None, **kwargs):
        """Whole windows (B, target_length, num_mel_bins), as LanguageBindAudioFeatureExtractor makes them.

        Returns `last_hidden_state` (B, T, D), with frequency_pooling "concat" (B, T, F * D): the pooled patch tokens of
        the penultimate hidden state, the last layer is not run. With `output_hidden_states` all layers run, and
        `hidden_states` are the num_hidden_layers + 1 states (B, 1 + F * T, D), not pooled. Raises ValueError for
        features of another shape.
        """
        expected = (self.config.target_length, self.config.num_mel_bins)
        if tuple(input_features.shape[1:]) != expected:
            raise ValueError(
                f"LanguageBind-Audio takes windows of {expected[0]} frames x {expected[1]} mel bins, got "
                f"{tuple(input_features.shape[1:])}: make them with LanguageBindAudioFeatureExtractor"
            )
        states = [self.pre_layrnorm(self.embeddings(input_features))]
        layers = self.encoder.layers if output_hidden_states else self.encoder.layers[:-1]
        for layer in layers:
            states.append(layer(states[-1], None))
        penultimate = states[-2] if output_hidden_states else states[-1]
        output = BaseModelOutput(
            last_hidden_state=self.pool(penultimate), hidden_states=tuple(states) if output_hidden_states else None
        )
        return output if return_dict is not False else output.to_tuple()


AutoModel.register(LanguageBindAudioConfig, LanguageBindAudioModel, exist_ok=True)
