"""TinyLLaVA's connector `resampler`: Flamingo's perceiver resampler (https://arxiv.org/abs/2204.14198), in windows.

In TinyLLaVA a picture always makes `queries` tokens. Audio has a length, so here each window of `window` frames does:
tokens grow with duration and never see beyond their window. Against `qformer`: latents and frames are keys together in
one attention per block, without biases.
"""

import torch
from torch import nn

from .lengths_audiophi import length_mask


class PerceiverBlock(nn.Module):
    """Pre-norm: latents attend to the window's frames and to themselves at once, then an MLP."""

    def __init__(self, size, num_heads, dropout):
        super().__init__()
        self.num_heads, self.dropout = num_heads, dropout
        self.frames_norm, self.latents_norm = nn.LayerNorm(size), nn.LayerNorm(size)
        self.query = nn.Linear(size, size, bias=False)
        self.key_value = nn.Linear(size, 2 * size, bias=False)
        self.out = nn.Linear(size, size, bias=False)
        self.mlp = nn.Sequential(
            nn.LayerNorm(size),
            nn.Linear(size, 4 * size, bias=False),
            nn.GELU(),
            nn.Dropout(dropout),
            nn.Linear(4 * size, size, bias=False),
        )

    def forward(self, latents, frames, visible):
        """`latents` (N, Q, D), `frames` (N, W, D), `visible` (N, 1, 1, W + Q) bool -> latents (N, Q, D)."""
        normed = self.latents_norm(latents)
        keys = self.key_value(torch.cat([self.frames_norm(frames), normed], dim=1)).chunk(2, dim=-1)
        query, key, value = (
            part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for part in (self.query(normed), *keys)
        )
        attended = nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=visible)
        attended = self.out(attended.transpose(1, 2).flatten(2))
        latents = latents + nn.functional.dropout(attended, self.dropout, self.training)
        return latents + self.mlp(latents)


class ResamplerAdapter(nn.Module):
    """LayerNorm -> Linear -> per window `num_layers` x PerceiverBlock -> LayerNorm -> Linear; ceil(T / window) *
    queries tokens."""

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
        self.latents = nn.Embedding(config.queries, config.hidden_size)
        self.blocks = nn.ModuleList(
            PerceiverBlock(config.hidden_size, config.num_heads, config.dropout) for _ in range(config.num_layers)
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
        frames = hidden.reshape(-1, self.window, hidden.shape[-1]) + self.frame_positions.weight
        # Latents always see each other, so a window of padding only is no NaN; its tokens are masked out.
        visible = nn.functional.pad(mask, (0, missing)).reshape(-1, self.window)
        visible = nn.functional.pad(visible, (0, self.num_queries), value=True)[:, None, None]
        latents = self.latents.weight.expand(len(frames), -1, -1)
        for block in self.blocks:
            latents = block(latents, frames, visible)
        tokens = self.proj_out(self.norm_out(latents)).reshape(batch, -1, self.proj_out.out_features)
        windows = torch.div(mask.sum(1) + self.window - 1, self.window, rounding_mode="floor")
        return tokens, length_mask(windows * self.num_queries, tokens.shape[1])
