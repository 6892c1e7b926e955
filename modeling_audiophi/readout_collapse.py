"""Readout "collapse": the words that the alignment hears, one embedding each."""

import torch
from torch import nn

# Posteriors are raised to this power before the embeddings are averaged: plain ones blur the words, and the LLM then
# guesses instead of copying (dev/LOG.md: 72 % word errors at 1, 58 % at 3, 68 % at 30, which is the best token alone).
SHARPNESS = 3.0


class CollapseReadout(nn.Module):
    """Words only: one embedding per run of equal labels on the alignment's best path; blanks make none.

    It is the mean over the run's frames of the posterior (without the blank, sharpened) times the LLM's embeddings,
    plus a linear map, zero at first, of the mean adapter state. Kept is each run's first frame.
    """

    needs_alignment = True
    needs_encoder = learns_sounds = False

    def __init__(self, hidden_size, encoder_size):
        super().__init__()
        self.norm = nn.LayerNorm(hidden_size)
        self.proj = nn.Linear(hidden_size, hidden_size)
        self.proj.starts_at_zero = True

    def start_at(self, rms):
        pass

    def forward(self, tokens, mask, logits, table, encoded=None):
        """See `readouts.py`."""
        path = logits.argmax(-1).masked_fill(~mask, 0)
        starts = torch.ones_like(mask)
        starts[:, 1:] = path[:, 1:] != path[:, :-1]
        keep = starts & (path > 0)
        run = run_numbers(starts)
        states = run_means(tokens, run)
        embeds = word_embeddings(path, run, logits, table)
        embeds = embeds + self.proj(self.norm(states)).to(embeds.dtype)
        return embeds * keep[..., None], keep


def word_embeddings(path, run, logits, table):
    """Mean over each run (numbered in `run` (B, T)) of its frames' expected embeddings (B, T, D); zeros without words.

    `path` (B, T) are the best classes, 0 the blank, of `logits` (B, T, V' + 1), `table` (V', D) the words' embeddings.
    """
    words = path > 0  # blank frames, most of them, have no embedding: no need for their posteriors
    means = word_posterior(logits[words]).to(table) @ table
    return run_means(means.new_zeros(*path.shape, table.shape[-1]).index_put((words,), means), run)


def word_posterior(logits):
    """Sharpened posterior over words, the blank left out: `logits` (..., V' + 1) -> (..., V') float32."""
    return (SHARPNESS * logits[..., 1:].float()).softmax(-1)


def run_numbers(starts):
    """A number for every run that begins at `starts` (B, T) bool, unique over the batch -> (B, T)."""
    batch, length = starts.shape
    return starts.cumsum(1) - 1 + length * torch.arange(batch, device=starts.device)[:, None]


def run_means(values, run):
    """Mean of `values` (B, T, D) over positions with the same index in `run` (B, T), at every position of the run."""
    flat, index = values.reshape(-1, values.shape[-1]), run.reshape(-1)
    sums = torch.zeros_like(flat).index_add(0, index, flat)
    counts = torch.bincount(index, minlength=len(flat)).clamp(min=1)
    return (sums / counts[:, None].to(sums.dtype))[index].view_as(values)
