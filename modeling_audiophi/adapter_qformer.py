"""Windowed Q-Former (SALMONN, https://arxiv.org/abs/2310.13289): tokens grow with duration.

Each window of `window` encoder frames is read by the same `queries` learned queries through cross-attention, so a
clip makes ceil(T / window) * queries tokens and a token never sees beyond its window.
"""

import torch
from torch import nn

from .lengths_audiophi import length_mask


class QueryBlock(nn.Module):
    """Pre-norm: queries attend to each other, then to the window's frames, then an MLP."""

    def __init__(self, size, num_heads, dropout):
        super().__init__()
        self.self_norm = nn.LayerNorm(size)
        self.self_attention = nn.MultiheadAttention(size, num_heads, dropout, batch_first=True)
        self.cross_norm = nn.LayerNorm(size)
        self.cross_attention = nn.MultiheadAttention(size, num_heads, dropout, batch_first=True)
        self.mlp = nn.Sequential(
            nn.LayerNorm(size), nn.Linear(size, 4 * size), nn.GELU(), nn.Dropout(dropout), nn.Linear(4 * size, size)
        )

    def forward(self, queries, frames, padding):
        """`queries` (N, Q, D), `frames` (N, W, D), `padding` (N, W) True where there is no frame."""
        normed = self.self_norm(queries)
        queries = queries + self.self_attention(normed, normed, normed, need_weights=False)[0]
        normed = self.cross_norm(queries)
        attended = self.cross_attention(normed, frames, frames, key_padding_mask=padding, need_weights=False)[0]
        queries = queries + attended
        return queries + self.mlp(queries)


class QFormerAdapter(nn.Module):
    """LayerNorm -> Linear -> per window `num_layers` x QueryBlock -> LayerNorm -> Linear; ceil(T / window) * queries
    tokens."""

    def __init__(self, config, input_size, output_size):
        super().__init__()
        if config.hidden_size % config.num_heads:
            raise ValueError(
                f"adapter hidden_size {config.hidden_size} is not a multiple of num_heads {config.num_heads}"
            )
        self.window, self.num_queries = config.window, config.queries
        self.norm = nn.LayerNorm(input_size)
        self.proj_in = nn.Linear(input_size, config.hidden_size)
        self.frame_positions = nn.Embedding(config.window, config.hidden_size)
        self.queries = nn.Embedding(config.queries, config.hidden_size)
        self.blocks = nn.ModuleList(
            QueryBlock(config.hidden_size, config.num_heads, config.dropout) for _ in range(config.num_layers)
        )
        self.norm_out = nn.LayerNorm(config.hidden_size)
        self.proj_out = nn.Linear(config.hidden_size, output_size)

    @staticmethod
    def length_rule(config):
        return [[config.window, config.window, config.window - 1, config.queries]]

    def forward(self, hidden, mask):
        """`hidden` (B, T, input_size), `mask` (B, T) bool -> tokens (B, T', output_size), mask (B, T')."""
        batch, missing = len(hidden), -hidden.shape[1] % self.window
        hidden = nn.functional.pad(self.proj_in(self.norm(hidden)), (0, 0, 0, missing))
        padding = nn.functional.pad(~mask, (0, missing), value=True)
        frames = hidden.reshape(-1, self.window, hidden.shape[-1]) + self.frame_positions.weight
        padding = padding.reshape(-1, self.window)
        # A window of padding only would make NaN in attention: let it see everything, its tokens are masked out anyway.
        padding = padding & ~padding.all(1, keepdim=True)
        queries = self.queries.weight.expand(len(frames), -1, -1)
        for block in self.blocks:
            queries = block(queries, frames, padding)
        tokens = self.proj_out(self.norm_out(queries)).reshape(batch, -1, self.proj_out.out_features)
        windows = torch.div(mask.sum(1) + self.window - 1, self.window, rounding_mode="floor")
        return tokens, length_mask(windows * self.num_queries, tokens.shape[1])
