"""Windowed Q-Former (SALMONN, https://arxiv.org/abs/2310.13289): tokens grow with duration.

Each window of `window` encoder frames is read by the same `queries` learned queries through cross-attention, so a
clip makes ceil(T / window) * queries tokens and a token never sees beyond its window.
"""

from torch import nn

from .adapter_windows import WindowAdapter


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


class QFormerAdapter(WindowAdapter):
    """Per window `num_layers` x QueryBlock."""

    def __init__(self, config, input_size, output_size):
        super().__init__(config, input_size, output_size, QueryBlock)
        self.queries = nn.Embedding(config.queries, config.hidden_size)

    def read(self, frames, real):
        # A window of padding only would make NaN in attention: let it see everything, its tokens are masked out anyway.
        padding = ~real & real.any(1, keepdim=True)
        queries = self.queries.weight.expand(len(frames), -1, -1)
        for block in self.blocks:
            queries = block(queries, frames, padding)
        return queries
