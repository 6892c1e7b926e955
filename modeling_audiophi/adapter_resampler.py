"""TinyLLaVA's connector `resampler`: Flamingo's perceiver resampler (https://arxiv.org/abs/2204.14198), in windows.

In TinyLLaVA a picture always makes `queries` tokens. Audio has a length, so here each window of `window` frames does:
tokens grow with duration and never see beyond their window. Against `qformer`: latents and frames are keys together in
one attention per block, without biases.
"""

import torch
from torch import nn

from .adapter_windows import WindowAdapter


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


class ResamplerAdapter(WindowAdapter):
    """Per window `num_layers` x PerceiverBlock."""

    def __init__(self, config, input_size, output_size):
        super().__init__(config, input_size, output_size, PerceiverBlock)
        self.latents = nn.Embedding(config.queries, config.hidden_size)

    def read(self, frames, real):
        # Latents always see each other, so a window of padding only is no NaN; its tokens are masked out.
        visible = nn.functional.pad(real, (0, self.num_queries), value=True)[:, None, None]
        latents = self.latents.weight.expand(len(frames), -1, -1)
        for block in self.blocks:
            latents = block(latents, frames, visible)
        return latents
