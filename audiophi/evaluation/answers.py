"""Answers against the right ones, by rule, as each row's `metric` says (`answer_metrics.py`), and their scores.

Beside what `loop.py` says, a prediction has references, metric, kind, choices, correct (0 to 1; None for the metrics
that are of many rows together) and parsed (False: it cannot be told what the answer says, so it is wrong).
"""

from collections import Counter
from collections.abc import Iterable

from audiophi.data.example import RowError

from .answer_metrics import CORPUS, METRICS, has_bleu, plain
from .metrics import percent, ratio_interval
from .transcripts import errors_of


def fields(example, hypothesis: str | None) -> dict:
    """What a prediction has beside what was heard. RowError for a metric that is not known, or needs choices."""
    metric = (example.metric or ("choice" if example.choices else "exact")).lower()
    if metric not in METRICS and metric not in CORPUS:
        known = ", ".join((*METRICS, *CORPUS))
        raise RowError(f"{example.id}: metric {metric!r} is not known; known: {known}")
    if metric == "choice" and not example.choices:
        raise RowError(f"{example.id}: metric 'choice', but no choices")
    if metric == "bleu":
        has_bleu()
    correct, parsed, more = None, True, {}
    if metric in METRICS:
        correct, parsed = METRICS[metric](hypothesis or "", example.references, example.choices)
    elif metric == "wer":
        more = errors_of(example.reference, hypothesis, example.language)
    return {
        "references": list(example.references),
        "metric": metric,
        "kind": example.kind,
        "choices": list(example.choices),
        "correct": correct,
        "parsed": parsed,
        **more,
    }


def rate_so_far(predictions: Iterable[dict]) -> str:
    """The accuracy of these predictions, as it is shown."""
    rate = accuracy(predictions)
    return "-" if rate is None else f"{rate:.2f}"


def accuracy(predictions: Iterable[dict] | None) -> float | None:
    """Percent; None where nothing was answered."""
    correct = [p["correct"] for p in predictions or () if "error" not in p and p["correct"] is not None]
    return percent(sum(correct), len(correct))


def summarize(predictions: Iterable[dict], conditions: dict[str, list[dict]] | None = None, seed: int = 0, **_) -> dict:
    """Scores of predictions (those with an error are left out), in percent, None where undefined.

    `accuracy_by_kind`: {kind: accuracy, rows, chance}, rows without a kind under their metric; chance is what always
    giving the commonest answer would score. `conditions`: name -> predictions of the same rows, asked in another way.
    `listening_gap`: accuracy minus `accuracy_shuffled_audio`. `delta_text`: what reading the transcript gives more than
    hearing, over the rows that have one. `scores_by_kind`: of the metrics that are no accuracy.
    """
    conditions = conditions or {}
    scored = sorted((p for p in predictions if "error" not in p), key=lambda p: p["row"])
    judged = [p for p in scored if p["correct"] is not None]
    own = accuracy(judged)
    interval, unit = None, None
    if judged:
        values = [float(p["correct"]) for p in judged]
        interval, unit = ratio_interval(values, [1] * len(values), [p["speaker"] for p in judged], seed=seed)
    shuffled, silence, text = (accuracy(conditions.get(name)) for name in ("shuffled_audio", "silence", "text"))
    read = {p["row"] for p in conditions.get("text", ()) if "error" not in p}
    hearing = accuracy([p for p in judged if p["row"] in read])
    seconds = sum(p["seconds"] for p in scored)
    endings = [p["stopped"] for p in scored if p["stopped"] is not None]
    return {
        "accuracy": own,
        "accuracy_ci95": interval,
        "accuracy_ci95_unit": unit,
        "accuracy_by_kind": {kind: score_of_kind(rows) for kind, rows in by_kind(judged).items()},
        "accuracy_shuffled_audio": shuffled,
        "accuracy_silence": silence,
        "accuracy_text": text,
        "delta_text": None if None in (text, hearing) else text - hearing,
        "listening_gap": None if None in (own, shuffled) else own - shuffled,
        "unparsed": percent(sum(not p["parsed"] for p in judged), len(judged)),
        "never_stopped": percent(sum(not end for end in endings), len(endings)),
        "rows": len(scored),
        "scores_by_kind": {
            kind: corpus_score(rows) for kind, rows in by_kind(p for p in scored if p["correct"] is None).items()
        },
        "audio_seconds": round(seconds, 3),
        "rtf": sum(p["compute_seconds"] for p in scored) / seconds if seconds else None,
    }


def by_kind(predictions: Iterable[dict]) -> dict[str, list[dict]]:
    groups: dict[str, list[dict]] = {}
    for prediction in predictions:
        groups.setdefault(prediction["kind"] or prediction["metric"], []).append(prediction)
    return dict(sorted(groups.items()))


def score_of_kind(rows: list[dict]) -> dict:
    commonest = Counter(plain(p["references"][0]) for p in rows).most_common(1)[0][0]
    hits = sum(any(plain(reference) == commonest for reference in p["references"]) for p in rows)
    return {"accuracy": accuracy(rows), "rows": len(rows), "chance": percent(hits, len(rows))}


def corpus_score(rows: list[dict]) -> dict:
    """{metric: score, "rows"} of one kind's rows, whose metrics are those of `CORPUS`."""
    scores = {}
    for metric in sorted({p["metric"] for p in rows}):
        chosen = [p for p in rows if p["metric"] == metric]
        texts = [p["hypothesis"] or "" for p in chosen], [p["references"] for p in chosen]
        scores[metric] = CORPUS[metric](*texts, [p.get("language") for p in chosen])
    return {**scores, "rows": len(rows)}
