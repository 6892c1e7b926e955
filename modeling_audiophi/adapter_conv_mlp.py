"""Convolutional context on stacked frames, and the same with self-attention on top.

A token stands for about 80 ms, less than a syllable: a few depthwise convolutions let it see its neighbours, at a
    small part of the cost of attention. Blocks as in ConvNeXt (https://arxiv.org/abs/2201.03545): depthwise
    convolution, then a pointwise MLP.
"""

from torch import nn

from .adapter_stack import FrameStack


class ConvBlock(nn.Module):
    """x + depthwise_conv(norm x), then x + MLP(norm x), the convolution seeing zeros where `mask` is False."""

    def __init__(self, size, kernel_size, dropout):
        super().__init__()
        self.conv_norm = nn.LayerNorm(size)
        self.conv = nn.Conv1d(size, size, kernel_size, padding=kernel_size // 2, groups=size)
        self.mlp = nn.Sequential(
            nn.LayerNorm(size),
            nn.Linear(size, 2 * size),
            nn.GELU(),
            nn.Linear(2 * size, size),
            nn.Dropout(dropout),
        )

    def forward(self, hidden, mask):
        context = self.conv_norm(hidden).masked_fill(~mask[..., None], 0)
        hidden = hidden + self.conv(context.transpose(1, 2)).transpose(1, 2)
        return hidden + self.mlp(hidden)


class ConvMLPAdapter(nn.Module):
    """LayerNorm -> stack -> Linear -> `num_layers` x ConvBlock -> LayerNorm -> Linear; ceil(T / stack) tokens."""

    def __init__(self, config, input_size, output_size):
        super().__init__()
        if config.kernel_size % 2 == 0:
            raise ValueError(f"adapter kernel_size must be odd to keep the length, got {config.kernel_size}")
        self.stack = FrameStack(input_size, config.stack)
        self.dropout = nn.Dropout(config.dropout)
        self.proj_in = nn.Linear(input_size * config.stack, config.hidden_size)
        self.blocks = nn.ModuleList(
            ConvBlock(config.hidden_size, config.kernel_size, config.dropout) for _ in range(self.conv_layers(config))
        )
        self.norm_out = nn.LayerNorm(config.hidden_size)
        self.proj_out = nn.Linear(config.hidden_size, output_size)

    @staticmethod
    def conv_layers(config):
        return config.num_layers

    @staticmethod
    def length_rule(config):
        return FrameStack.length_rule(config)

    def context(self, hidden, mask):
        for block in self.blocks:
            hidden = block(hidden, mask)
        return hidden

    def forward(self, hidden, mask):
        """`hidden` (B, T, input_size), `mask` (B, T) bool -> tokens (B, T', output_size), mask (B, T')."""
        hidden, mask = self.stack(hidden, mask)
        hidden = self.context(self.proj_in(self.dropout(hidden)), mask)
        return self.proj_out(self.norm_out(hidden)), mask


class AttentionBlock(nn.Module):
    """Pre-norm self-attention and MLP; padding is masked as keys.

    Dropout acts on the two residual branches only: on attention weights it would rule out the fused attention kernels,
    and drawing the masks took 30 % of a training step on a CPU.
    """

    def __init__(self, size, num_heads, dropout):
        super().__init__()
        if size % num_heads:
            raise ValueError(f"adapter hidden_size {size} is not a multiple of num_heads {num_heads}")
        self.num_heads = num_heads
        self.dropout = dropout
        self.norm = nn.LayerNorm(size)
        self.qkv = nn.Linear(size, 3 * size)
        self.out = nn.Linear(size, size)
        self.mlp = nn.Sequential(nn.LayerNorm(size), nn.Linear(size, 4 * size), nn.GELU(), nn.Linear(4 * size, size))

    def forward(self, hidden, mask):
        batch, length, size = hidden.shape
        qkv = self.qkv(self.norm(hidden)).view(batch, length, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        # A row without any valid key would be NaN: let it see everything, its tokens are masked out anyway.
        keys = (mask | ~mask.any(1, keepdim=True))[:, None, None, :]
        context = nn.functional.scaled_dot_product_attention(*qkv, attn_mask=keys)
        context = context.transpose(1, 2).reshape(batch, length, size)
        hidden = hidden + nn.functional.dropout(self.out(context), p=self.dropout, training=self.training)
        return hidden + nn.functional.dropout(self.mlp(hidden), p=self.dropout, training=self.training)


class TransformerAdapter(ConvMLPAdapter):
    """LayerNorm -> stack -> Linear -> one ConvBlock (positions) -> `num_layers` x AttentionBlock -> LayerNorm ->
    Linear."""

    def __init__(self, config, input_size, output_size):
        super().__init__(config, input_size, output_size)
        self.attention = nn.ModuleList(
            AttentionBlock(config.hidden_size, config.num_heads, config.dropout) for _ in range(config.num_layers)
        )

    @staticmethod
    def conv_layers(config):
        return 1

    def context(self, hidden, mask):
        hidden = super().context(hidden, mask)
        for block in self.attention:
            hidden = block(hidden, mask)
        return hidden
