"""Recordings longer than the encoder's window: where to cut them, and how one streamer follows all the pieces."""

import numpy as np
import torch
from transformers.generation.streamers import BaseStreamer

PAUSE_SECONDS = 0.2  # a cut goes through the middle of the quietest stretch of this length
SMALLEST_PIECE = 0.25  # of the longest allowed


def split_at_pauses(waveform, sampling_rate, longest_seconds):
    """Cut a waveform (samples,) where it is quiet, so that words stay whole.

    Returns [(start, end), ...] in samples, without gaps or overlaps, each piece at most `longest_seconds` long; a
    waveform that is no longer stays in one. Every cut goes through the quietest 0.2 s (the last of equally quiet ones)
    of the second half of what a piece may be.
    """
    longest, total = int(longest_seconds * sampling_rate), len(waveform)
    pause = max(1, int(PAUSE_SECONDS * sampling_rate))
    pieces, start = [], 0
    while total - start > longest:
        # The rest must not become a scrap of a few syllables.
        latest = min(longest, total - start - int(SMALLEST_PIECE * longest))
        region = waveform[start + longest // 2 : start + latest].astype(np.float64)
        energy = np.concatenate([[0.0], np.cumsum(region**2)])
        loudness = energy[pause:] - energy[:-pause]
        # Rounding makes equally quiet stretches differ by a hair: those within a millionth of the sum are equal.
        quietest = np.flatnonzero(loudness <= loudness.min(initial=np.inf) + 1e-6 * energy[-1])
        end = start + longest // 2 + (int(quietest[-1]) + pause // 2 if len(quietest) else 0)
        pieces.append((start, end))
        start = end
    return [*pieces, (start, total)]


class OneStreamOfSeveral(BaseStreamer):
    """Passes to a streamer what `generate` writes in several calls, as if it were one.

    Args:
        streamer: gets the first prompt, all words, and one end.
        separator: token ids (list) between the words of two calls.
        end_ids: token ids that end a call's words; passed on only for the last one.

    `last` is to be set before the last call.
    """

    def __init__(self, streamer, separator, end_ids):
        self.streamer, self.separator, self.end_ids = streamer, separator, set(end_ids)
        self.calls, self.before_words, self.last = 0, True, False

    def put(self, value):
        """`value`: the prompt's token ids first, then each new token."""
        if self.before_words:  # of every call, only the first is of interest
            self.before_words = False
            if not self.calls:
                self.streamer.put(value)
            return
        if self.last or not set(value.flatten().tolist()) <= self.end_ids:
            self.streamer.put(value)

    def end(self):
        """At the end of each call."""
        self.calls, self.before_words = self.calls + 1, True
        if self.last:
            self.streamer.end()
            return
        for token in self.separator:
            self.streamer.put(torch.tensor([token]))
