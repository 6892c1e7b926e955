"""Clip tokens: a few tokens of a clip as a whole, which the language model reads before what the readout keeps.

Words tell what is said, not who says it, how, or what is heard behind it. Learned queries look at all of the encoder's
states (attentive pooling), each for what it needs, and take the deviation along with the mean: how a voice varies tells
speakers apart better than what it is on average. Okabe et al. 2018, "Attentive Statistics Pooling for Deep Speaker
Embedding" (https://arxiv.org/abs/1803.10963), after the statistics pooling of x-vectors (Snyder et al. 2018, ICASSP);
ECAPA-TDNN pools so, too (Desplanques et al. 2020, https://arxiv.org/abs/2005.07143).

A yes or no at the end of a language model teaches them little. Where it is known what a clip is like ("woman", "dog
bark"), `description_loss` puts them near the LLM's own embeddings of these words.
"""

import torch
from torch import nn

from .readout_mixed import SoundWords, bag_losses

BOTTLENECK = 256
HEADS = 4
DROPOUT = 0.1


class ClipTokens(nn.Module):
    """`count` tokens per clip, of however many windows, at the size of the LLM's embeddings.

    Args:
        hidden_size, encoder_size: of the LLM's embeddings and of the encoder's states. count: tokens, 1 or more.
    """

    def __init__(self, hidden_size, encoder_size, count):
        super().__init__()
        self.queries = nn.Parameter(torch.randn(count, BOTTLENECK))
        self.state_norm = nn.LayerNorm(encoder_size)
        self.keys = nn.Linear(encoder_size, BOTTLENECK)
        self.values = nn.Linear(encoder_size, BOTTLENECK)
        self.pooled_norm = nn.LayerNorm(2 * BOTTLENECK)
        # The query comes along: what a token is to tell does not depend on where its query looked.
        self.made = nn.Sequential(
            nn.Linear(3 * BOTTLENECK, 2 * BOTTLENECK),
            nn.GELU(),
            nn.Dropout(DROPOUT),
            nn.Linear(2 * BOTTLENECK, hidden_size),
            nn.LayerNorm(hidden_size),
        )
        self.words = SoundWords(hidden_size)

    def start_at(self, rms):
        """Fit new parameters to the root mean square of the LLM's embeddings."""
        self.made[-1].weight.fill_(rms)
        self.words.start_at(rms)

    def forward(self, hidden, mask):
        """Encoder states (C, T, E) and mask (C, T) bool, a clip's windows joined -> (C, count, hidden_size)."""
        states = self.state_norm(hidden.to(self.queries.dtype))
        pooled = attentive_statistics(self.queries, self.keys(states), self.values(states), mask, HEADS)
        pooled = self.pooled_norm(pooled.to(self.queries.dtype))
        return self.made(torch.cat([pooled, self.queries.expand(len(hidden), -1, -1)], -1))

    def description_loss(self, tokens, labels, table):
        """Cross-entropy between each token's scores of the words and its clip's description, a bag of words.

        `tokens` (C, count, D), `labels` (C, S) ids of `table` (V, D), negative where padded. The sum over clips with
        labels of the mean over their tokens.
        """
        described = (labels >= 0).any(1)
        tokens, labels = tokens[described], labels[described]
        clip = torch.arange(len(labels), device=labels.device).repeat_interleave(tokens.shape[1])
        losses = bag_losses(self.words(tokens.flatten(0, 1), table), labels, clip)
        return losses.sum() / tokens.shape[1]


def attentive_statistics(queries, keys, values, mask, heads):
    """Mean and standard deviation over time, weighted by each query's attention.

    `queries` (Q, D), `keys` and `values` (C, T, D), each of `heads` equal parts along D, `mask` (C, T) bool which
    frames are real -> (C, Q, 2 D) float32, under autocast too. A clip without real frames counts as zeros.
    """
    with torch.autocast(values.device.type, enabled=False):
        queries = queries.float().unflatten(-1, (heads, -1))
        keys, values = (part.float().unflatten(-1, (heads, -1)) for part in (keys, values))
        scores = torch.einsum("qhd,cthd->chqt", queries, keys) * queries.shape[-1] ** -0.5
        real = mask[:, None, None]
        weights = scores.masked_fill(~real, torch.finfo(scores.dtype).min).softmax(-1) * real
        # Around the clip's plain mean, so that a difference of squares loses no digits to what all frames share.
        present = mask[..., None, None]
        middle = (values * present).sum(1, keepdim=True) / present.sum(1, keepdim=True).clamp(min=1)
        values = (values - middle) * present
        mean = torch.einsum("chqt,cthd->cqhd", weights, values)
        variance = torch.einsum("chqt,cthd->cqhd", weights, values.square()) - mean.square()
        deviation = (variance.clamp(min=0) + 1e-6).sqrt()
        return torch.cat([(mean + middle).flatten(2), deviation.flatten(2)], -1)
