"""Clip tokens: a few embeddings of a clip as a whole, before what the readout keeps of it.

Words alone do not tell who speaks, how, or what is heard behind them. Learned queries attend over the encoder's states
(attentive statistics pooling, https://arxiv.org/abs/1803.10963: mean and deviation under the attention's weights, since
deviation tells speakers apart), and an MLP makes an embedding of the LLM's size of what each of them found.
"""

import torch
from torch import nn

from .encoders import encoder_class

BOTTLENECK = 256
HEADS = 4


class ClipTokens(nn.Module):
    """`count` embeddings per clip. `hidden_size`: of the LLM's embeddings; `encoder_size`: of the encoder's states."""

    def __init__(self, hidden_size, encoder_size, count):
        super().__init__()
        self.norm = nn.LayerNorm(encoder_size)
        self.scores = nn.Sequential(
            nn.Linear(encoder_size, BOTTLENECK), nn.Tanh(), nn.Linear(BOTTLENECK, HEADS * count, bias=False)
        )
        self.values = nn.Linear(encoder_size, BOTTLENECK)
        self.found_norm = nn.LayerNorm(2 * BOTTLENECK)
        self.queries = nn.Embedding(count, 2 * BOTTLENECK)  # what tells one token from the other
        self.mlp = nn.Sequential(
            nn.Linear(2 * BOTTLENECK, 2 * BOTTLENECK),
            nn.GELU(),
            nn.Dropout(0.1),
            nn.Linear(2 * BOTTLENECK, hidden_size),
            nn.LayerNorm(hidden_size),
        )

    def start_at(self, rms):
        """Fit the tokens to the root mean square of the LLM's embeddings."""
        self.mlp[-1].weight.fill_(rms)

    def forward(self, hidden, mask):
        """`hidden` (C, T, E), `mask` (C, T) bool -> (C, count, D)."""
        states = self.norm(hidden.to(self.norm.weight.dtype))
        clips, length, _ = states.shape
        scores = self.scores(states).float().masked_fill(~mask[..., None], float("-inf"))
        weights = scores.softmax(1).view(clips, length, -1, HEADS)  # (C, T, count, heads)
        values = self.values(states).float().view(clips, length, HEADS, -1)
        mean = torch.einsum("ctnh,cthd->cnhd", weights, values)
        square = torch.einsum("ctnh,cthd->cnhd", weights, values.square())
        deviation = (square - mean.square()).clamp(min=1e-6).sqrt()
        found = torch.cat([mean, deviation], -1).flatten(2).to(states.dtype)
        return self.mlp(self.found_norm(found) + self.queries.weight)


def build_clip_tokens(config):
    """The untrained clip tokens of an `AudioPhiConfig`; None where it has none."""
    if not config.clip_tokens:
        return None
    encoder_size = encoder_class(config.audio_config).hidden_size(config.audio_config)
    return ClipTokens(config.text_config.hidden_size, encoder_size, config.clip_tokens)
