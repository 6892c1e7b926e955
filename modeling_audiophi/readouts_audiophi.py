"""Readouts: what of the adapter's tokens the language model gets to read.

To add one: write a class with this interface and its line in READOUTS.
    needs_alignment: whether it looks at the alignment's labels.
    forward(tokens, mask, alignment, logits, embedding_weight) -> embeds (B, T, D) and keep (B, T) bool, or None for
        all: `tokens` (B, T, D) from the adapter, `mask` (B, T), `alignment` the `AlignmentHead` and its `logits`
        (B, T, V' + 1) (None without needs_alignment), `embedding_weight` (V, D) the LLM's table.
    start_at(rms): fit new parameters to the root mean square of the LLM's embeddings.
"""

import torch
from torch import nn

# Posteriors are raised to this power before the embeddings are averaged: plain ones blur the words, and the LLM then
# guesses instead of copying (dev/LOG.md: 72 % word errors at 1, 58 % at 3, 68 % at 30, which is the best token alone).
SHARPNESS = 3.0
# Frames without words that make one sound token, 0.5 s of the default adapters'.
SOUND_FRAMES = 6


class FramesReadout(nn.Module):
    """Every audio token, normalised to the size of the LLM's own embeddings."""

    needs_alignment = False

    def __init__(self, hidden_size):
        super().__init__()
        self.norm = nn.LayerNorm(hidden_size)

    def start_at(self, rms):
        self.norm.weight.fill_(rms)

    def forward(self, tokens, mask, alignment, logits, embedding_weight):
        """See the module."""
        return self.norm(tokens), None


class CollapseReadout(nn.Module):
    """Words only: one embedding per run of equal labels on the alignment's best path; blanks make none.

    It is the mean over the run's frames of the posterior (without the blank, sharpened) times the LLM's embeddings,
    plus a linear map, zero at first, of the mean adapter state. Kept is each run's first frame.
    """

    needs_alignment = True

    def __init__(self, hidden_size):
        super().__init__()
        self.norm = nn.LayerNorm(hidden_size)
        self.proj = nn.Linear(hidden_size, hidden_size)
        self.proj.starts_at_zero = True

    def start_at(self, rms):
        pass

    def forward(self, tokens, mask, alignment, logits, embedding_weight):
        """See the module."""
        path = logits.argmax(-1).masked_fill(~mask, 0)
        starts = torch.ones_like(mask)
        starts[:, 1:] = path[:, 1:] != path[:, :-1]
        return self.read(tokens, path, starts, starts & (path > 0), alignment, logits, embedding_weight)

    def read(self, tokens, path, starts, keep, alignment, logits, embedding_weight):
        """Embeddings of the runs that begin at `starts` (B, T), at the frames `keep` (B, T), zeros elsewhere."""
        table = embedding_weight[alignment.vocab_ids]
        words = path > 0  # blank frames, most of them, have no embedding: no need for their posteriors
        posterior = (SHARPNESS * logits[words][:, 1:].float()).softmax(-1)
        means = posterior.to(table.dtype) @ table
        expected = means.new_zeros(tokens.shape).index_put((words,), means)
        run = run_numbers(starts)
        states = run_means(tokens, run)
        embeds = run_means(expected, run) + self.proj(self.norm(states)).to(expected.dtype)
        embeds = torch.where(words[..., None], embeds, self.sound(states).to(embeds.dtype))
        return embeds * keep[..., None], keep

    def sound(self, states):
        """Embeddings (B, T, D) of mean adapter states (B, T, D) where there are no words."""
        return torch.zeros_like(states)


class MixedReadout(CollapseReadout):
    """Words as in the collapse, and one token per SOUND_FRAMES frames without words: pauses, music, a barking dog.

    Those tokens are the mean adapter state through an MLP, at the size of the LLM's embeddings. Audio that is too
    short for either gives one such token, so that no clip is empty.
    """

    def __init__(self, hidden_size):
        super().__init__(hidden_size)
        self.sounds = nn.Sequential(
            nn.LayerNorm(hidden_size),
            nn.Linear(hidden_size, hidden_size),
            nn.GELU(),
            nn.Linear(hidden_size, hidden_size),
            nn.LayerNorm(hidden_size),
        )

    def start_at(self, rms):
        self.sounds[-1].weight.fill_(rms)

    def sound(self, states):
        return self.sounds(states)

    def forward(self, tokens, mask, alignment, logits, embedding_weight):
        """See the module."""
        path = logits.argmax(-1).masked_fill(~mask, 0)
        starts = torch.ones_like(mask)
        starts[:, 1:] = (path[:, 1:] != path[:, :-1]) | (mask[:, 1:] != mask[:, :-1])
        keep = starts & (path > 0)
        position = torch.arange(path.shape[1], device=path.device).expand_as(path)
        since = position - torch.where(starts, position, 0).cummax(1).values
        silent = (path == 0) & mask
        pieces = silent & (since % SOUND_FRAMES == 0)
        # Only whole pieces: the last frame must belong to the same run.
        whole = torch.zeros_like(pieces)
        last = SOUND_FRAMES - 1
        if path.shape[1] > last:
            whole[:, : path.shape[1] - last] = since[:, last:] == since[:, : path.shape[1] - last] + last
            whole[:, : path.shape[1] - last] &= silent[:, last:]
        keep = keep | (pieces & whole)
        empty = ~keep.any(1) & mask[:, 0]
        keep[:, 0] |= empty
        # In an empty row the whole clip is one piece.
        return self.read(tokens, path, starts | (pieces & ~empty[:, None]), keep, alignment, logits, embedding_weight)


READOUTS = {"frames": FramesReadout, "collapse": CollapseReadout, "mixed": MixedReadout}


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
