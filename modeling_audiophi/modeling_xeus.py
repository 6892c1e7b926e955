"""XEUS in plain PyTorch: convolutions over the waveform, then E-Branchformer blocks (https://arxiv.org/abs/2210.00077).

Written from ESPnet's modules (Apache-2.0, release 202511: espnet2/asr/frontend/cnn.py, preencoder/linear.py,
encoder/e_branchformer_encoder.py, layers/cgmlp.py) and compared with them in tests/test_xeus.py; ESPnet itself is not
needed. Modules inside a block have ESPnet's names, see `audiophi/components/convert_xeus.py` for the rest.
"""

import math

import torch
from torch import nn
from transformers import AutoModel, PreTrainedModel
from transformers import initialization as init
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .configuration_xeus import XeusConfig
from .lengths_audiophi import length_mask, output_length

# ESPnet normalises waveforms with F.layer_norm's default.
WAVEFORM_EPS = 1e-5


def xeus_length_rule(config):
    """Samples -> frames, see `lengths_audiophi.py`."""
    return [[kernel, stride, 0, 1] for kernel, stride in zip(config.conv_kernel, config.conv_stride, strict=True)]


def normalize_waveforms(waveforms, mask):
    """(B, S) float32, `mask` (B, S) bool -> zero mean and unit variance over each clip's own samples, padding zero."""
    count = mask.sum(1, keepdim=True).clamp(min=1)
    centred = (waveforms - waveforms.masked_fill(~mask, 0).sum(1, keepdim=True) / count).masked_fill(~mask, 0)
    variance = centred.square().sum(1, keepdim=True) / count
    return centred * torch.rsqrt(variance + WAVEFORM_EPS)


def hide_padding(hidden, mask):
    """(B, T, D) with zeros where `mask` (B, T) is False, as beyond the end of an unpadded clip; None hides nothing."""
    return hidden if mask is None else hidden.masked_fill(~mask[..., None], 0)


def depthwise(conv, hidden):
    """Convolution over time of (B, T, D)."""
    return conv(hidden.transpose(1, 2)).transpose(1, 2)


class XeusFrontendLayer(nn.Module):
    """Convolution, LayerNorm over channels, GELU: (B, C, T) -> (B, C', T'). Without padding, so that a frame that is
    real depends on real samples only."""

    def __init__(self, input_size, output_size, kernel, stride):
        super().__init__()
        self.conv = nn.Conv1d(input_size, output_size, kernel, stride)
        self.layer_norm = nn.LayerNorm(output_size)

    def forward(self, hidden):
        hidden = self.layer_norm(self.conv(hidden).transpose(1, 2)).transpose(1, 2)
        return nn.functional.gelu(hidden)


class XeusPositionalConv(nn.Module):
    """Weight-normalised grouped convolution and GELU: (B, T, D) -> (B, T, D). Its output takes the place of its input;
    there is no residual connection.

    The weight is `magnitude` (1, 1, K) times `direction` (D, D / groups, K) over its norm for each of the K frames.
    The two are parameters of their own, and the norm is taken in float32, so that loading, copying and bfloat16 need no
    care.
    """

    def __init__(self, config):
        super().__init__()
        size, kernel, self.groups = (
            config.hidden_size,
            config.num_conv_pos_embeddings,
            config.num_conv_pos_embedding_groups,
        )
        self.magnitude = nn.Parameter(torch.ones(1, 1, kernel))
        self.direction = nn.Parameter(torch.randn(size, size // self.groups, kernel))
        self.bias = nn.Parameter(torch.zeros(size))

    def forward(self, hidden):
        # The function behind torch's weight_norm, which ESPnet uses: summed in another order, the norm of 65,536 values
        # changes the output by 2e-5.
        weight = torch._weight_norm(self.direction.float(), self.magnitude.float(), 2).to(self.direction.dtype)
        frames, kernel = hidden.shape[1], weight.shape[-1]
        hidden = nn.functional.conv1d(
            hidden.transpose(1, 2), weight, self.bias, padding=kernel // 2, groups=self.groups
        )
        return nn.functional.gelu(hidden[..., :frames]).transpose(1, 2)


def eager_attention(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
    """Attention written out, for `attn_implementation="eager"`: (B, H, T, d) -> (B, T, H, d) and weights."""
    scores = query @ key.transpose(2, 3) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = scores.softmax(-1, dtype=torch.float32).to(query.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


class XeusAttention(nn.Module):
    """Multi-head self-attention without positions: (B, T, D) -> (B, T, D)."""

    is_causal = False

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.head_size = config.hidden_size // config.num_attention_heads
        self.linear_q = nn.Linear(config.hidden_size, config.hidden_size)
        self.linear_k = nn.Linear(config.hidden_size, config.hidden_size)
        self.linear_v = nn.Linear(config.hidden_size, config.hidden_size)
        self.linear_out = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, hidden, attention_mask=None):
        shape = (*hidden.shape[:2], -1, self.head_size)
        query, key, value = (
            linear(hidden).view(shape).transpose(1, 2) for linear in (self.linear_q, self.linear_k, self.linear_v)
        )
        attention = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention)
        dropout = self.config.attention_dropout if self.training else 0.0
        output, _ = attention(self, query, key, value, attention_mask, scaling=self.head_size**-0.5, dropout=dropout)
        return self.linear_out(output.reshape(hidden.shape))


class XeusFeedForward(nn.Module):
    """Linear, SiLU, linear: (B, T, D) -> (B, T, D)."""

    def __init__(self, config):
        super().__init__()
        self.w_1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.w_2 = nn.Linear(config.intermediate_size, config.hidden_size)
        self.dropout = nn.Dropout(config.hidden_dropout)

    def forward(self, hidden):
        return self.w_2(self.dropout(nn.functional.silu(self.w_1(hidden))))


class XeusGateConv(nn.Conv1d):
    """A type of its own for its initial values: ESPnet's gate starts open."""


class XeusSpatialGate(nn.Module):
    """One half of the channels times a depthwise convolution of the other: (B, T, 2C) -> (B, T, C)."""

    def __init__(self, config):
        super().__init__()
        size, kernel = config.cgmlp_size // 2, config.cgmlp_kernel_size
        self.norm = nn.LayerNorm(size, eps=config.layer_norm_eps)
        self.conv = XeusGateConv(size, size, kernel, padding=kernel // 2, groups=size)
        self.dropout = nn.Dropout(config.hidden_dropout)

    def forward(self, hidden, mask=None):
        carried, gate = hidden.chunk(2, dim=-1)
        return self.dropout(carried * depthwise(self.conv, hide_padding(self.norm(gate), mask)))


class XeusGatingMLP(nn.Module):
    """The convolutional branch of a block: (B, T, D) -> (B, T, D)."""

    def __init__(self, config):
        super().__init__()
        self.channel_proj1 = nn.Sequential(nn.Linear(config.hidden_size, config.cgmlp_size), nn.GELU())
        self.csgu = XeusSpatialGate(config)
        self.channel_proj2 = nn.Linear(config.cgmlp_size // 2, config.hidden_size)

    def forward(self, hidden, mask=None):
        return self.channel_proj2(self.csgu(self.channel_proj1(hidden), mask))


class XeusBlock(GradientCheckpointingLayer):
    """E-Branchformer block: attention beside a convolutional gating MLP, merged by a depthwise convolution, between two
    half-step feed-forward modules."""

    def __init__(self, config):
        super().__init__()
        size, eps, kernel = config.hidden_size, config.layer_norm_eps, config.merge_kernel_size
        self.attn = XeusAttention(config)
        self.cgmlp = XeusGatingMLP(config)
        self.feed_forward = XeusFeedForward(config)
        self.feed_forward_macaron = XeusFeedForward(config)
        self.norm_ff = nn.LayerNorm(size, eps=eps)
        self.norm_ff_macaron = nn.LayerNorm(size, eps=eps)
        self.norm_mha = nn.LayerNorm(size, eps=eps)
        self.norm_mlp = nn.LayerNorm(size, eps=eps)
        self.norm_final = nn.LayerNorm(size, eps=eps)
        self.depthwise_conv_fusion = nn.Conv1d(2 * size, 2 * size, kernel, padding=kernel // 2, groups=2 * size)
        self.merge_proj = nn.Linear(2 * size, size)
        self.dropout = nn.Dropout(config.hidden_dropout)

    def forward(self, hidden, attention_mask=None, mask=None):
        """`hidden` (B, T, D); `attention_mask` as the attention takes it; `mask` (B, T) bool, what the convolutions may
        see (None: everything)."""
        hidden = hidden + 0.5 * self.dropout(self.feed_forward_macaron(self.norm_ff_macaron(hidden)))
        attended = self.dropout(self.attn(self.norm_mha(hidden), attention_mask))
        gated = self.dropout(self.cgmlp(self.norm_mlp(hidden), mask))
        both = hide_padding(torch.cat([attended, gated], dim=-1), mask)
        both = both + depthwise(self.depthwise_conv_fusion, both)
        hidden = hidden + self.dropout(self.merge_proj(both))
        hidden = hidden + 0.5 * self.dropout(self.feed_forward(self.norm_ff(hidden)))
        return self.norm_final(hidden)


class XeusPreTrainedModel(PreTrainedModel):
    config_class = XeusConfig
    base_model_prefix = "xeus"
    main_input_name = "input_values"
    input_modalities = ("audio",)
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _no_split_modules = ["XeusBlock"]

    @torch.no_grad()
    def _init_weights(self, module):
        if isinstance(module, XeusGateConv):
            init.normal_(module.weight, mean=0.0, std=1e-6)
            init.ones_(module.bias)
            return
        super()._init_weights(module)
        if isinstance(module, XeusPositionalConv):
            size, per_group, frames = module.direction.shape
            std = math.sqrt(4 / (frames * size))
            init.normal_(module.direction, mean=0.0, std=std)
            # The norm that `direction` has, on average: where weight normalisation starts from.
            init.constant_(module.magnitude, std * math.sqrt(size * per_group))
            init.zeros_(module.bias)


class XeusModel(XeusPreTrainedModel):
    """Waveforms at 16 kHz to speech representations, about 50 per second.

    `last_hidden_state` has been through `after_norm`, as in ESPnet; `hidden_states` have not: [0] is what enters the
    first block, [-1] is what leaves the last one, which XEUS's authors recommend for downstream use (its scale is
    large, so a LayerNorm should follow).
    """

    def __init__(self, config):
        super().__init__(config)
        sizes = [1, *config.conv_dim]
        self.frontend = nn.ModuleList(
            XeusFrontendLayer(*arguments)
            for arguments in zip(sizes[:-1], config.conv_dim, config.conv_kernel, config.conv_stride, strict=True)
        )
        self.feature_projection = nn.Linear(config.conv_dim[-1], config.hidden_size)
        self.pos_conv = XeusPositionalConv(config)
        self.layers = nn.ModuleList(XeusBlock(config) for _ in range(config.num_hidden_layers))
        self.after_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.post_init()

    def _get_feat_extract_output_lengths(self, input_lengths):
        """Samples -> frames; an int or an integer tensor."""
        return output_length(input_lengths, xeus_length_rule(self.config))

    def forward(self, input_values, attention_mask=None, output_hidden_states=None, return_dict=None, **kwargs):
        """Encode a batch.

        Args:
            input_values: (B, S) float waveforms at 16 kHz, padded on the right, not normalised. Keep them in float32
                whatever the weights' dtype is.
            attention_mask: (B, S), 1 on real samples; None means that all are.
            output_hidden_states: also return the states around every block (default: the config's).

        Returns:
            `BaseModelOutput` with `last_hidden_state` (B, T, hidden_size) and `hidden_states`, num_hidden_layers + 1 of
            the same shape, or None. Clip b's first `_get_feat_extract_output_lengths(samples of b)` frames are real.

        Raises ValueError for waveforms of another shape, or shorter than one frame (400 samples).
        """
        if input_values.dim() != 2:
            raise ValueError(
                f"xeus takes waveforms (batch, samples), got a tensor of shape {tuple(input_values.shape)}"
            )
        config = self.config
        if not self._get_feat_extract_output_lengths(input_values.shape[1]):
            raise ValueError(f"xeus: {input_values.shape[1]} samples make no frame; pad them to at least 400")
        mask = torch.ones_like(input_values, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
        # In float32: bfloat16 cannot tell neighbouring samples of a quiet passage apart.
        if config.espnet_exact:
            waveforms = nn.functional.layer_norm(input_values.float(), input_values.shape, eps=WAVEFORM_EPS)
        else:
            waveforms = normalize_waveforms(input_values.float(), mask)
        hidden = waveforms.to(self.feature_projection.weight.dtype)[:, None]
        for layer in self.frontend:
            hidden = layer(hidden)
        hidden = self.feature_projection(hidden.transpose(1, 2))

        frames = self._get_feat_extract_output_lengths(mask.sum(1))
        frames_mask = length_mask(frames, hidden.shape[1])
        conv_mask = None if config.espnet_exact or bool(frames_mask.all()) else frames_mask
        # A clip without any frame may attend to its padding: a softmax over nothing is NaN, also in the gradient.
        attention_mask = create_bidirectional_mask(
            config=config, inputs_embeds=hidden, attention_mask=length_mask(frames.clamp(min=1), hidden.shape[1])
        )
        hidden = self.pos_conv(hide_padding(hidden, conv_mask))
        states = [hidden]
        for layer in self.layers:
            hidden = layer(hidden, attention_mask, conv_mask)
            states.append(hidden)
        with_states = config.output_hidden_states if output_hidden_states is None else output_hidden_states
        output = BaseModelOutput(
            last_hidden_state=self.after_norm(hidden), hidden_states=tuple(states) if with_states else None
        )
        return output.to_tuple() if return_dict is False else output


AutoModel.register(XeusConfig, XeusModel, exist_ok=True)
