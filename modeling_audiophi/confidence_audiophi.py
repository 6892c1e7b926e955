"""How sure two ears are of each word of a transcript: how many of the decoder's other texts have it, and whether the
alignment has heard it.

Recognisers that err differently rarely agree on an error: voting among them is ROVER (Fiscus 1997,
https://doi.org/10.1109/ASRU.1997.659110). Both votes together become a probability by a logistic function, whose three
numbers are fitted on development clips when training is done (audiophi/training/ears_fit.py).
"""

import difflib
import math

import torch
from transformers.models.whisper.english_normalizer import EnglishTextNormalizer

ENGLISH = EnglishTextNormalizer({})
# Bias, weight of the texts' vote, weight of the alignment's, where the generation config has none of its own.
UNFITTED = (-1.0, 3.0, 2.0)


def plain(text):
    """A text as it is compared, without capitals and marks, in ASCII also with "9" for "nine", "doctor" for "Dr."."""
    if text.isascii():  # elsewhere Whisper's normaliser takes "schön" for "schon"
        return ENGLISH(text).strip()
    return "".join(c for c in text.lower() if c.isalnum() or c == " ")


def found_in(text, other):
    """Which words of `text` (split at spaces) stand in `other`, in order, however it writes them: a list of bool."""
    words, others = text.split(), other.split()
    matcher = difflib.SequenceMatcher(None, [*map(plain, words)], [*map(plain, others)], autojunk=False)
    found = []
    for kind, start, end, first, last in matcher.get_opcodes():
        same = kind == "equal"
        if kind == "replace":  # "209" and "two hundred and nine" are of different lengths
            same = plain(" ".join(words[start:end])) == plain(" ".join(others[first:last]))
        found += [same] * (end - start)
    return found


def word_votes(text, pairs, spelled):
    """Per word of `text` (split at spaces) the share of texts that have it, from 0 to 1, and whether the alignment does
    (0 or 1).

    `pairs`: the decoder's texts and their mean log probability per token, each as likely as that says of all its
    words. `spelled`: what the alignment heard.
    """
    lengths = [len(other.split()) + 1 for other, _ in pairs]
    logs = [score * length for (_, score), length in zip(pairs, lengths, strict=True)]
    shares = [math.exp(value - max(logs)) for value in logs]  # none without texts
    votes = [0.0] * len(text.split())
    for share, (other, _) in zip(shares, pairs, strict=True):
        for place, found in enumerate(found_in(text, other)):
            votes[place] += found * share / sum(shares)
    return list(zip(votes, map(float, found_in(text, spelled or "")), strict=True))


def word_confidence(text, pairs, spelled, weights=None):
    """Probability that each word of `text` is right; `weights`: bias, of the texts' vote, of the alignment's."""
    bias, vote, heard = weights or UNFITTED
    return [1 / (1 + math.exp(-(bias + vote * votes + heard * has))) for votes, has in word_votes(text, pairs, spelled)]


def fitted(votes, right):
    """Weights of `word_confidence` that make what is `right` (bool per word) likeliest, with a weak pull towards
    UNFITTED, so that a few clips without errors do not make it sure of everything."""
    rows = torch.tensor([(1.0, *pair) for pair in votes], dtype=torch.float64)
    target, start = torch.tensor(right, dtype=torch.float64), torch.tensor(UNFITTED, dtype=torch.float64)
    weights = start.clone()
    for _ in range(50):  # Newton's method
        found = (rows @ weights).sigmoid()
        gradient = rows.T @ (found - target) + 0.01 * (weights - start)
        curvature = (rows * (found * (1 - found))[:, None]).T @ rows + 0.01 * torch.eye(3, dtype=torch.float64)
        step = torch.linalg.solve(curvature, gradient)
        weights = weights - step * min(1.0, 2.0 / float(step.abs().max().clamp(min=1e-9)))
    return [round(value, 3) for value in weights.tolist()]
