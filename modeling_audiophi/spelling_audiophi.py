"""Spelling of the alignment's classes: what a rarely heard word shares with all the others.

An LLM's embedding says what a word means. From sound to meaning is an arbitrary map, to be learned word by word; from
sound to spelling is a regular one. So every class also gets a vector made of its character n-grams (Bojanowski et al.
2017, https://arxiv.org/abs/1607.04606), whose n-grams are learned from all words that have them.
"""

import math
import zlib

import torch
from torch import nn

NGRAM_SIZES = (1, 2, 3)


def spell(text, buckets):
    """Sorted n-gram ids (below `buckets`) of a token's text; a leading space marks the beginning of a word."""
    marked = "<" + text[1:] + ">" if text.startswith(" ") else text + ">"
    ngrams = {marked[i : i + size] for size in NGRAM_SIZES for i in range(len(marked) - size + 1)}
    return sorted({zlib.crc32(ngram.encode()) % buckets for ngram in ngrams})


class Spelling(nn.Module):
    """Scores audio tokens against the spelling of each class.

    Args:
        vocab_size: classes (without the blank).
        hidden_size: of the audio tokens.
        entries: n-grams of all classes together. buckets: rows of the n-gram table. size: of its vectors.

    `ngrams` (entries,) int16 and `starts` (vocab_size,) int32, where each class begins in it, are buffers.
    """

    def __init__(self, vocab_size, hidden_size, entries, buckets, size):
        super().__init__()
        self.register_buffer("ngrams", torch.zeros(entries, dtype=torch.int16))
        self.register_buffer("starts", torch.zeros(vocab_size, dtype=torch.int32))
        self.table = nn.Parameter(torch.randn(buckets, size) / math.sqrt(size))
        self.query = nn.Linear(hidden_size, size, bias=False)

    @torch.no_grad()
    def match(self, spellings):
        """Take over the n-gram ids of every class (a list of lists)."""
        counts = torch.tensor([len(ngrams) for ngrams in spellings])
        self.ngrams.copy_(torch.tensor([ngram for ngrams in spellings for ngram in ngrams]))
        self.starts.copy_(counts.cumsum(0) - counts)

    def vectors(self):
        """Spelling vectors (vocab_size, size), of similar length whatever the number of n-grams."""
        starts = self.starts.long()
        counts = torch.diff(starts, append=starts.new_tensor([len(self.ngrams)]))
        sums = nn.functional.embedding_bag(self.ngrams.long(), self.table, starts, mode="sum")
        return sums / counts.clamp(min=1).sqrt().to(sums.dtype)[:, None]  # of integers it is float32

    def forward(self, tokens, scores):
        """`tokens` (B, T, hidden_size), `scores` (B, T, vocab_size) -> scores with those of the spelling added."""
        # One fused product: with a vocabulary of 23,000 another pass over the scores costs as much as the product.
        total = torch.addmm(scores.flatten(0, 1), self.query(tokens).flatten(0, 1), self.vectors().T)
        return total.view_as(scores)
