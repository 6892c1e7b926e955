"""How much the alignment shall say, with two ears, in choosing from the texts of the encoder's own decoder and its own:
tried out on the recipe's development clips when training is done, each of which is heard once."""

import json
from collections.abc import Callable
from pathlib import Path

import torch

from audiophi.tasks.transcribe import Transcribe

from .callbacks import Development
from .checkpoints import write_atomically
from .decoding_fit import NAME

WEIGHTS = (0.1, 0.05, 0.15, 0.2, 0.02, 0.3, 0.5, 0.0, 1.0)  # of equals the first


@torch.inference_mode()
def fit_ears(model, development: Development, given: dict, folder: Path, say: Callable[[str], None]) -> None:
    """Sets `model.generation_config.hear_ctc_weight` to that of `WEIGHTS` with the fewest errors.

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
    heard = [texts_of(model, development.processor, clips) for _, _, clips, _ in rows]

    def error(weight: float) -> float:
        best = (max(texts, key=lambda found: found[1] + weight * found[2], default=("",))[0] for texts in heard)
        scores = Transcribe().development(
            [development.prediction(Transcribe.name, number, text) for number, text in enumerate(best)]
        )
        found = scores[scores["main_score"]]
        return float("inf") if found is None else found

    tried = [{"hear_ctc_weight": weight, "error_rate": error(weight)} for weight in WEIGHTS]
    best = min(tried, key=lambda trial: trial["error_rate"])
    model.generation_config.hear_ctc_weight = best["hear_ctc_weight"]
    file = folder / NAME
    told = json.loads(file.read_text()) if file.is_file() else {}
    told["ears"] = {"clips": len(rows), "chosen": best["hear_ctc_weight"], "tried": tried}
    write_atomically(file, json.dumps(told, indent=1))
    say(f"two ears: hear_ctc_weight {best['hear_ctc_weight']:g}, with {best['error_rate']:.4g} % errors")


def texts_of(model, processor, clips: list[dict]) -> list[tuple[str, float, float]]:
    """(text, decoder's score, alignment's score) of the candidates of one example's clips, which are one recording."""
    batch = processor.pad_audio(clips)
    return model.score_words(model.hear({name: value.to(model.device) for name, value in batch.items()}, "both"))[0]
