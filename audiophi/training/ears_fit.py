"""How much the alignment shall say, with two ears, in choosing from the texts of the encoder's own decoder and its own:
tried out on the recipe's development clips when training is done, each of which is heard once."""

import json
from collections.abc import Callable
from pathlib import Path

import torch

from audiophi.tasks.transcribe import Transcribe

from .callbacks import Development
from .checkpoints import write_atomically

WEIGHTS = (0.1, 0.05, 0.15, 0.2, 0.02, 0.3, 0.5, 0.0, 1.0)  # of equals the first
NAME = "ears.json"


@torch.inference_mode()
def fit_ears(model, development: Development, given: dict, folder: Path, say: Callable[[str], None]) -> None:
    """Sets `model.generation_config.hear_ctc_weight` to that of `WEIGHTS` with the fewest errors.

    given: what the recipe says of decoding, which is left as it is. folder: gets `ears.json`: clips, what was tried.
    Does nothing for a model that hears with one ear, and without development clips that are to be transcribed.
    """
    rows = development.of_task(Transcribe.name).rows
    if model.config.hear_with != "both" or "hear_ctc_weight" in given or not rows:
        return
    say(f"two ears: how much the alignment shall say, on {len(rows)} development clips")
    model.eval()
    heard = [texts_of(model, development.processor, clips) for _, _, clips, _ in rows]

    def error(weight: float) -> float:
        predictions = []
        for number, ((example, seconds, *_), texts) in enumerate(zip(rows, heard, strict=True)):
            text = max(texts, key=lambda found: found[1] + weight * found[2])[0] if texts else ""
            predictions.append(
                {
                    "row": number, "id": example.id, "speaker": example.speaker, "seconds": seconds,
                    "reference": example.reference, "hypothesis": text, "hypothesis_align": None, "stopped": True,
                    "compute_seconds": 0.0, **Transcribe().fields(example, text),
                }
            )  # fmt: skip
        scores = Transcribe().development(predictions)
        found = scores[scores["main_score"]]
        return float("inf") if found is None else found

    tried = [{"hear_ctc_weight": weight, "error_rate": error(weight)} for weight in WEIGHTS]
    best = min(tried, key=lambda trial: trial["error_rate"])
    model.generation_config.hear_ctc_weight = best["hear_ctc_weight"]
    write_atomically(folder / NAME, json.dumps({"clips": len(rows), "tried": tried}, indent=1))
    say(f"two ears: hear_ctc_weight {best['hear_ctc_weight']:g}, with {best['error_rate']:.4g} % errors")


def texts_of(model, processor, clips: list[dict]) -> list[tuple[str, float, float]]:
    """(text, decoder's score, alignment's score) of the candidates of one example's clips, which are one recording."""
    batch = processor.pad_audio(clips)
    return model.score_words(model.hear({name: value.to(model.device) for name, value in batch.items()}, "both"))[0]
