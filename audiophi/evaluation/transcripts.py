"""Predictions of transcripts and their scores.

Beside what `loop.py` says, a prediction has substitutions, deletions, insertions (of the hypothesis) and words (of the
reference), all after normalisation.
"""

import re
from collections.abc import Iterable

from .metrics import (
    ErrorCounts,
    bootstrap_interval,
    character_error_rate,
    count_errors,
    derangement,
    percent,
    word_error_rate,
)
from .text_normalization import is_unspaced, normalize, normalizer_name


def errors_of(reference: str, hypothesis: str | None, language: str | None = None) -> dict:
    """The error counts that a prediction carries."""
    if hypothesis is None:
        return {}
    counts = count_errors(reference, hypothesis, language)
    return {name: getattr(counts, name) for name in ("substitutions", "deletions", "insertions", "words")}


def rate_so_far(predictions: Iterable[dict]) -> str:
    """The word error rate of these predictions, as it is shown."""
    scored = [p for p in predictions if "words" in p]
    errors = sum(p["substitutions"] + p["deletions"] + p["insertions"] for p in scored)
    rate = percent(errors, sum(p["words"] for p in scored))
    return "-" if rate is None else f"{rate:.2f}"


def summarize(predictions: Iterable[dict], conditions: dict[str, list[dict]] | None = None, seed: int = 0, **_) -> dict:
    """Scores of predictions (those with an error are left out). Rates are percentages, None where undefined.

    `wer_shuffled_audio`: every reference against what the model heard in another utterance's audio. Decoding without
    sampling and one instruction for all make that the other utterance's hypothesis, so nothing is decoded twice.
    `wer_silence`: of the predictions of the condition "silence". `listening_gap`: shuffled minus true. Where every
    language is written without spaces between words, `cer*` and `characters` stand for `wer*` and `words`; beside other
    languages each of their characters is a word. `main_score`: "wer" or "cer".
    """
    scored = sorted((p for p in predictions if "error" not in p), key=lambda p: p["row"])
    with_lm = [p for p in scored if p["hypothesis"] is not None]
    counts = [errors(p, p["hypothesis"]) for p in with_lm]
    wer = word_error_rate(counts)
    interval, unit = bootstrap_interval(counts, [p["speaker"] for p in with_lm], seed=seed) if counts else (None, None)
    shuffled = shuffled_error_rate(with_lm, "hypothesis", seed)
    quiet = [p for p in (conditions or {}).get("silence", ()) if "error" not in p]
    seconds = sum(p["seconds"] for p in scored)
    endings = [p["stopped"] for p in with_lm if p["stopped"] is not None]
    scores = {
        "wer": wer,
        "wer_ci95": interval,
        "wer_ci95_unit": unit,
        "cer": character_error_rate(counts),
        **{
            name: sum(getattr(count, name) for count in counts) for name in ("substitutions", "deletions", "insertions")
        },
        "words": sum(errors(p, "").words for p in scored),
        "utterances": len(scored),
        "audio_seconds": round(seconds, 3),
        "normalizer": normalizer_name(p.get("language") for p in scored) or normalizer_name(),
        "wer_align": word_error_rate(align_counts(scored)),
        "wer_shuffled_audio": shuffled,
        "wer_silence": word_error_rate([errors(p, p["hypothesis"]) for p in quiet]),
        "listening_gap": None if shuffled is None or wer is None else shuffled - wer,
        "never_stopped": percent(sum(not end for end in endings), len(endings)),
        "empty": percent(sum(not normalize(p["hypothesis"], p.get("language")) for p in with_lm), len(with_lm)),
        "rtf": sum(p["compute_seconds"] for p in scored) / seconds if seconds else None,
        "main_score": "wer",
    }
    if scored and all(is_unspaced(p.get("language")) for p in scored):
        del scores["cer"]  # which is the same
        scores = {of_characters(key): value for key, value in scores.items()} | {"main_score": "cer"}
    return scores


def of_characters(text: str) -> str:
    """The key or label of a score of words as that of characters."""
    return re.sub(r"^wer", "cer", text).replace("WER", "CER").replace("word", "character")


def errors(prediction: dict, hypothesis: str) -> ErrorCounts:
    return count_errors(prediction["reference"], hypothesis, prediction.get("language"))


def align_counts(predictions: Iterable[dict]) -> list[ErrorCounts]:
    """Error counts of the alignment head's own readings, where there are any."""
    heard = [p for p in predictions if p["hypothesis_align"] is not None]
    return [errors(p, p["hypothesis_align"]) for p in heard]


def shuffled_error_rate(predictions: list[dict], key: str = "hypothesis", seed: int = 0) -> float | None:
    """WER of each reference against `key` of another utterance with other words; None for fewer than two of them."""
    order = derangement([normalize(p["reference"], p.get("language")) for p in predictions], seed)
    if order is None:
        return None
    return word_error_rate([errors(p, predictions[other][key]) for p, other in zip(predictions, order, strict=True)])
