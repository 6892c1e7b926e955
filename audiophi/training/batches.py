"""Which clips make up which batch: the whole schedule of a stage follows from the seed, so a resumed run only has to
skip."""

import itertools
import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from torch.utils.data import Sampler


class Draw(NamedTuple):
    """One use of a row: which row, in which pass over the data, at which speed. Augmentation is seeded by (seed, row,
    epoch)."""

    row: int
    epoch: int
    speed: float


class Steps(NamedTuple):
    """The optimiser steps of a pass as numbers of draws; each draw's row, speed and length (s)."""

    rng: np.random.Generator
    steps: list[list[int]]
    rows: list[int]
    speeds: list[float]
    lengths: list[float]


class BatchSchedule(Sampler[list[Draw]]):
    """Length-grouped batches of Draws for one stage (a `batch_sampler`).

    An optimiser step's clips are chosen first (neighbours in a noisy sort by length, in random order), then split into
    `grad_accum * world_size` micro-batches. So 8 clips once and 1 clip eight times are the same step, and each rank
    walks through its own part. Iterating yields `steps * grad_accum` micro-batches.

    Args:
        seconds: length of each row.
        sources: index of each row's source in the mixture. weights: of each source; its share of an epoch's draws is
            its weight over the sum (None counts as 1). No weights at all: every row once per epoch.
        tokens: of text, of each row.
        steps, epochs: give one. batch_size (clips) or batch_seconds (padded seconds), per micro-batch: give one;
            batch_tokens (padded tokens of text) beside either.
        group_by_length: False draws a step's clips at random, so that clips of one length, often of one source, do not
            fill a step of their own.
    """

    def __init__(
        self,
        seconds: list[float],
        *,
        steps: int | None = None,
        epochs: float | None = None,
        batch_size: int | None = None,
        batch_seconds: float | None = None,
        batch_tokens: int | None = None,
        tokens: list[int] | None = None,
        group_by_length: bool = True,
        grad_accum: int = 1,
        sources: list[int] | None = None,
        weights: list[float | None] | None = None,
        speeds: list[float] = (1.0,),
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ):
        if not len(seconds):
            raise ValueError("no rows to train on")
        self.seconds = np.asarray(seconds, dtype=np.float64)
        self.sources = np.zeros(len(seconds), dtype=int) if sources is None else np.asarray(sources)
        self.weights = weights if weights and any(weight is not None for weight in weights) else None
        self.tokens = np.zeros(len(seconds), dtype=int) if tokens is None else np.asarray(tokens)
        self.batch_size, self.batch_seconds, self.grad_accum = batch_size, batch_seconds, grad_accum
        self.batch_tokens, self.group_by_length = batch_tokens, group_by_length
        self.speeds, self.seed, self.rank, self.world_size = list(speeds), seed, rank, world_size
        self.split = grad_accum * world_size
        if steps is None:
            whole = sum(len(self._steps(epoch).steps) for epoch in range(math.floor(epochs)))
            part = math.ceil((epochs % 1) * len(self._steps(math.floor(epochs)).steps)) if epochs % 1 else 0
            steps = max(1, whole + part)
        self.steps = steps

    def __len__(self) -> int:
        return self.steps * self.grad_accum

    def __iter__(self) -> Iterator[list[Draw]]:
        done, epoch = 0, 0
        while done < self.steps:
            for step in self._epoch(epoch)[: self.steps - done]:
                yield from self._micro_batches(step)[self.rank :: self.world_size]
                done += 1
            epoch += 1

    def largest(self) -> list[list[Draw]]:
        """The micro-batches with the most padded seconds and with the most padded text in the first pass (often one
        that is both): what memory must hold."""
        batches = self._first_pass()
        found = [max(batches, key=lambda batch: self.padded(batch)[:: step]) for step in (1, -1)]
        return found[: 1 + (found[0] != found[1])]

    def sample(self, count: int) -> list[list[Draw]]:
        """Micro-batches of the first pass, to time a step: of equal parts of it, from those with the least audio and
        text to those with the most, the one in the middle of each, so that a few stand for all."""
        batches = sorted(self._first_pass(), key=lambda batch: sum(self.work(draw) for draw in batch))
        count = min(count, len(batches))
        return [batches[(2 * part + 1) * len(batches) // (2 * count)] for part in range(count)]

    def work(self, draw: Draw) -> float:
        """About how many tokens the model computes for a draw; an adapter makes about ten of a second."""
        return 10 * self._length(draw) + self.tokens[draw.row]

    def _first_pass(self) -> list[list[Draw]]:
        return [batch for step in self._epoch(0) for batch in self._micro_batches(step)]

    def padded(self, batch: list[Draw]) -> tuple[float, int]:
        """Padded seconds of audio and padded tokens of text."""
        tokens = len(batch) * max(int(self.tokens[draw.row]) for draw in batch)
        return len(batch) * max(self._length(draw) for draw in batch), tokens

    def _length(self, draw: Draw) -> float:
        return self.seconds[draw.row] / draw.speed

    def _rows(self, rng: np.random.Generator) -> np.ndarray:
        """Rows of one pass: all of them once, or as many draws in the mixture's proportions."""
        if self.weights is None:
            return np.arange(len(self.seconds))
        sources = np.unique(self.sources)
        share = np.array([1.0 if self.weights[source] is None else self.weights[source] for source in sources])
        counts = np.round(len(self.seconds) * share / share.sum()).astype(int)
        drawn = []
        for source, count in zip(sources, counts, strict=True):
            rows = np.flatnonzero(self.sources == source)
            # Whole passes first, then a random part of one: no row is used twice before all are used once.
            drawn += [np.tile(rows, count // len(rows)), rng.choice(rows, count % len(rows), replace=False)]
        return np.concatenate(drawn)

    def _epoch(self, epoch: int) -> list[list[Draw]]:
        """The optimiser steps of one pass, over all ranks: lists of Draws, sorted by length inside a step."""
        rng, steps, rows, speeds, length = self._steps(epoch)
        draws = []
        for index in rng.permutation(len(steps)):
            step = sorted(steps[index], key=lambda i: length[i])
            draws.append([Draw(rows[i], epoch, speeds[i]) for i in step])
        return draws

    def _steps(self, epoch: int) -> Steps:
        """The same before their order is drawn: which draws of the pass make up each."""
        rng = np.random.default_rng([self.seed, epoch])
        rows = self._rows(rng)
        speeds = np.array(self.speeds)[rng.integers(len(self.speeds), size=len(rows))]
        length = self.seconds[rows] / speeds
        # Rows without audio are as long as their text.
        cost = np.where(length > 0, length, 1e-3 * self.tokens[rows])
        noisy = cost * rng.uniform(0.8, 1.25, size=len(rows))
        order = np.argsort(noisy, kind="stable") if self.group_by_length else rng.permutation(len(rows))
        starts = self._starts(length[order].tolist(), self.tokens[rows[order]].tolist())
        # The tail is no step of its own where it has no clip for every micro-batch.
        if len(starts) > 1 and len(order) - starts[-1] < self.split:
            starts.pop()
        order = order.tolist()
        steps = [order[a:b] for a, b in itertools.pairwise([*starts, len(order)])]
        while len(steps[-1]) < self.split:
            steps[-1] += steps[-1][: self.split - len(steps[-1])]
        return Steps(rng, steps, rows.tolist(), speeds.tolist(), length.tolist())

    def _starts(self, lengths: list[float], words: list[int]) -> list[int]:
        """Where each step of a pass begins, of its draws' lengths and tokens in their order: a step ends before it
        would be too large, but has a clip for every micro-batch, however short batch_seconds is."""
        infinite, split = float("inf"), self.split
        most = infinite if self.batch_size is None else self.batch_size * split
        seconds = infinite if self.batch_size is not None else self.batch_seconds * split
        tokens = infinite if self.batch_tokens is None else self.batch_tokens * split
        starts, count, longest, wordiest = [0], 0, 0.0, 0
        # A start walks through every row of every epoch: comparisons take a third of the time of `max`.
        for place, (length, word) in enumerate(zip(lengths, words, strict=True)):
            count += 1
            if length > longest:
                longest = length
            if word > wordiest:
                wordiest = word
            if (longest * count > seconds or count > most or wordiest * count > tokens) and count > split:
                starts.append(place)
                count, longest, wordiest = 1, length, word
        return starts

    def _micro_batches(self, step: list[Draw]) -> list[list[Draw]]:
        edges = np.linspace(0, len(step), self.split + 1).round().astype(int)
        return [step[a:b] for a, b in itertools.pairwise(edges)]
