"""Corpus-level word and character error rates in percent, with intervals.

jiwer aligns; its own `wer` is an unbounded fraction, so a hypothesis of nine words for a reference of two is 4.5 there
and 450 % here. Corpus level means errors of all utterances over words of all references, not a mean of utterances.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import jiwer
import numpy as np

from .text_normalization import is_unspaced, normalize

# Fewer speakers than this make a bootstrap over speakers meaningless.
MIN_SPEAKERS = 5


@dataclass(frozen=True)
class ErrorCounts:
    """Errors of one utterance after normalisation. `words` and `characters` count the reference; of a language without
    spaces between words each character is a word."""

    substitutions: int
    deletions: int
    insertions: int
    words: int
    character_errors: int
    characters: int

    @property
    def errors(self) -> int:
        """Word errors: substitutions, deletions and insertions."""
        return self.substitutions + self.deletions + self.insertions


def count_errors(reference: str, hypothesis: str, language: str | None = None) -> ErrorCounts:
    """Minimum-edit-distance errors between two texts, normalised first. Against an empty reference all is inserted."""
    reference, hypothesis = normalize(reference, language), normalize(hypothesis, language)
    characters = jiwer.process_characters(reference, hypothesis)
    words = characters if is_unspaced(language) else jiwer.process_words(reference, hypothesis)
    return ErrorCounts(
        substitutions=words.substitutions,
        deletions=words.deletions,
        insertions=words.insertions,
        words=words.hits + words.substitutions + words.deletions,
        character_errors=characters.substitutions + characters.deletions + characters.insertions,
        characters=len(reference),
    )


def percent(part: float, whole: float) -> float | None:
    """100 * part / whole; None without a whole."""
    return 100.0 * part / whole if whole else None


def word_error_rate(counts: Sequence[ErrorCounts]) -> float | None:
    """Corpus-level WER in percent; None when the references have no words."""
    return percent(sum(count.errors for count in counts), sum(count.words for count in counts))


def character_error_rate(counts: Sequence[ErrorCounts]) -> float | None:
    """Corpus-level CER in percent; None when the references have no characters."""
    return percent(sum(count.character_errors for count in counts), sum(count.characters for count in counts))


def bootstrap_interval(
    counts: Sequence[ErrorCounts], speakers: Sequence[str | None], samples: int = 1000, seed: int = 0
) -> tuple[list[float] | None, str]:
    """95 % interval of the WER ([low, high] in percent) and what was resampled: "speaker" or "utterance"."""
    errors, words = [count.errors for count in counts], [count.words for count in counts]
    return ratio_interval(errors, words, speakers, "utterance", samples, seed)


def ratio_interval(
    parts: Sequence[float],
    wholes: Sequence[float],
    speakers: Sequence[str | None],
    unit: str = "row",
    samples: int = 1000,
    seed: int = 0,
) -> tuple[list[float] | None, str]:
    """95 % interval of sum(parts) / sum(wholes) ([low, high] in percent) and what was resampled: "speaker" or `unit`.

    Percentile bootstrap (Bisani & Ney 2004). Utterances of one speaker share their difficulty, so speakers are
    resampled where every utterance has one and there are at least MIN_SPEAKERS; resampling utterances would give too
    narrow an interval there. None when the wholes are 0.
    """
    by_speaker = all(speakers) and len(set(speakers)) >= MIN_SPEAKERS
    names = list(speakers) if by_speaker else range(len(parts))
    sums: dict = {}
    for name, part, whole in zip(names, parts, wholes, strict=True):
        before = sums.get(name, (0.0, 0.0))
        sums[name] = (before[0] + part, before[1] + whole)
    part = np.array([pair[0] for pair in sums.values()], dtype=float)
    whole = np.array([pair[1] for pair in sums.values()], dtype=float)
    unit = "speaker" if by_speaker else unit
    if whole.sum() == 0:
        return None, unit
    rng = np.random.default_rng(seed)
    rates = []
    for _ in range(samples):
        drawn = rng.integers(len(sums), size=len(sums))
        if whole[drawn].sum():
            rates.append(100.0 * part[drawn].sum() / whole[drawn].sum())
    low, high = np.percentile(rates, [2.5, 97.5])
    return [float(low), float(high)], unit


def derangement(texts: Sequence[str], seed: int = 0) -> list[int] | None:
    """For each index another one whose text differs, as a random permutation; None when there is only one text.

    Indices are laid out group by group of equal texts, groups in random order, and shifted by the size of the largest
    group. Where one text makes up more than half of all, some indices must meet their own text again.
    """
    groups: dict[str, list[int]] = {}
    for index, text in enumerate(texts):
        groups.setdefault(text, []).append(index)
    if len(groups) < 2:
        return None
    rng = np.random.default_rng(seed)
    shuffled = [list(groups.values())[group] for group in rng.permutation(len(groups))]
    order = [index for group in shuffled for index in rng.permutation(group).tolist()]
    shift = max(len(group) for group in shuffled)
    result = [0] * len(order)
    for position, index in enumerate(order):
        result[index] = order[(position + shift) % len(order)]
    return result
