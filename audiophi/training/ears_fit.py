"""How much the alignment shall say, with two ears, in choosing from the texts of the encoder's own decoder and its own,
and how sure a word is: tried out on the recipe's development clips when training is done, each heard once."""

import json
from collections.abc import Callable
from pathlib import Path

import torch

from audiophi.tasks.transcribe import Transcribe
from modeling_audiophi.confidence_audiophi import fitted, found_in, word_votes

from .callbacks import Development
from .checkpoints import write_atomically
from .decoding_fit import NAME

WEIGHTS = (0.1, 0.05, 0.15, 0.2, 0.02, 0.3, 0.5, 0.0, 1.0)  # of equals the first


@torch.inference_mode()
def fit_ears(model, development: Development, given: dict, folder: Path, say: Callable[[str], None]) -> None:
    """Sets `model.generation_config.hear_ctc_weight` to that of `WEIGHTS` with the fewest errors, and `hear_confidence`
    to what makes the words' being right or wrong likeliest then.

    given: what the recipe says of decoding, which is left as it is. folder: `decoding.json` there gets what was tried,
    as "ears". Does nothing for a model that hears with one ear, and without development clips that are to be
    transcribed.
    """
    development = development.of_task(Transcribe.name)
    rows = development.rows
    if model.config.hear_with != "both" or "hear_ctc_weight" in given or not rows:
        return
    say(f"two ears: how much the alignment shall say, on {len(rows)} development clips")
    model.eval()
    heard = [heard_of(model, development.processor, clips) for _, _, clips, _ in rows]

    def best(weight: float) -> list[str]:
        return [max(texts, key=lambda found: found[1] + weight * found[2], default=("",))[0] for texts, _ in heard]

    def error(weight: float) -> float:
        scores = Transcribe().development(
            [development.prediction(Transcribe.name, number, text) for number, text in enumerate(best(weight))]
        )
        found = scores[scores["main_score"]]
        return float("inf") if found is None else found

    tried = [{"hear_ctc_weight": weight, "error_rate": error(weight)} for weight in WEIGHTS]
    least = min(tried, key=lambda trial: trial["error_rate"])
    votes, right = [], []
    for (example, *_), text, (texts, spelled) in zip(rows, best(least["hear_ctc_weight"]), heard, strict=True):
        votes += word_votes(text, [pair[:2] for pair in texts], spelled)
        right += found_in(text, example.reference)
    weights = fitted(votes, right) if votes else None
    model.generation_config.hear_ctc_weight, model.generation_config.hear_confidence = least["hear_ctc_weight"], weights
    file = folder / NAME
    told = json.loads(file.read_text()) if file.is_file() else {}
    told["ears"] = {"clips": len(rows), "chosen": least["hear_ctc_weight"], "tried": tried}
    told["ears"]["confidence"] = {"words": len(right), "wrong": len(right) - sum(right), "chosen": weights}
    write_atomically(file, json.dumps(told, indent=1))
    say(f"two ears: hear_ctc_weight {least['hear_ctc_weight']:g}, with {least['error_rate']:.4g} % errors")


def heard_of(model, processor, clips: list[dict]) -> tuple[list[tuple[str, float, float]], str]:
    """(text, decoder's score, alignment's score) of the candidates of one example's clips, which are one recording, and
    what the alignment spells."""
    batch = processor.pad_audio(clips)
    audio = model.hear({name: value.to(model.device) for name, value in batch.items()}, "both")
    return model.score_words(audio)[0], audio.spelled[0]
