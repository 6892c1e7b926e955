"""Predictions of captions and their scores.

Beside what `loop.py` says, a prediction has references (all of the clip's captions) and label (None without classes).
"""

from collections.abc import Iterable

from .caption_metrics import SCORES, caption_scores, has_metrics, label_accuracy, official_scores
from .metrics import derangement, percent

__all__ = ["check_packages", "has_metrics", "summarize"]


def check_packages(official: bool = False) -> None:
    """MetricsMissing where a package, program or file is missing without which captions cannot be scored."""
    probe = (["a dog barks", "it is raining"], [["a dog is barking"], ["rain falls"]])
    caption_scores(*probe)
    if official:
        official_scores(*probe)


def summarize(
    predictions: Iterable[dict],
    classes: Iterable[str] = (),
    seed: int = 0,
    with_package: bool = True,
    official: bool = False,
    **_,
) -> dict:
    """Scores of predictions (those with an error are left out), as `caption_metrics` defines them.

    `classes`: those that a caption may name wrongly beside the predictions' own.
    `..._shuffled`: the caption of another clip (of another class, or where there are none with another caption)
    against each clip's references and label; decoding without sampling makes that what the model says with the other
    clip's audio. `listening_gap`: true minus shuffled, of `listening_gap_of`: label_accuracy (percent) where clips have
    classes, else cider_d. Without `with_package`: no scores but the classes'. `official`: DCASE's set, too.
    """
    score = caption_scores if with_package else lambda heard, wanted: dict.fromkeys(SCORES)
    scored = sorted(
        (p for p in predictions if "error" not in p and p["hypothesis"] is not None), key=lambda p: p["row"]
    )
    labelled = [p for p in scored if p["label"]]
    classes = sorted({p["label"] for p in labelled} | set(classes))
    own = score([p["hypothesis"] for p in scored], [p["references"] for p in scored])
    others = _shuffled(scored, seed)
    other = score(others, [p["references"] for p in scored]) if others else {"cider_d": None}
    truth = [p["label"] for p in labelled]
    accuracy = label_accuracy([p["hypothesis"] for p in labelled], truth, classes)
    shuffled_accuracy = None
    if len(set(truth)) > 1:
        shuffled_accuracy = label_accuracy(_shuffled(labelled, seed), truth, classes)
    gap_of = "label_accuracy" if labelled else "cider_d"
    pair = (accuracy, shuffled_accuracy) if labelled else (own["cider_d"], other["cider_d"])
    seconds = sum(p["seconds"] for p in scored)
    endings = [p["stopped"] for p in scored if p["stopped"] is not None]
    texts = ([p["hypothesis"] for p in scored], [p["references"] for p in scored])
    return {
        **own,
        **({"official": official_scores(*texts) if len(scored) > 1 else None} if official else {}),
        "cider_d_shuffled": other["cider_d"],
        "label_accuracy": accuracy,
        "label_accuracy_shuffled": shuffled_accuracy,
        "classes": len(classes),
        "listening_gap": None if None in pair else pair[0] - pair[1],
        "listening_gap_of": gap_of,
        "clips": len(scored),
        "references": sum(len(p["references"]) for p in scored),
        "distinct_captions": len({p["hypothesis"] for p in scored}),
        "audio_seconds": round(seconds, 3),
        "never_stopped": percent(sum(not end for end in endings), len(endings)),
        "empty": percent(sum(not p["hypothesis"].strip() for p in scored), len(scored)),
        "rtf": sum(p["compute_seconds"] for p in scored) / seconds if seconds else None,
    }


def _shuffled(predictions: list[dict], seed: int) -> list[str] | None:
    """For each clip the caption of another one; None where all are of one kind."""
    order = derangement([p["label"] or p["references"][0] for p in predictions], seed)
    return None if order is None else [predictions[index]["hypothesis"] for index in order]
