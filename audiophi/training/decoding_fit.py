"""How much the alignment, the LLM that hears and the LLM that does not shall say in a transcript: tried out on the
recipe's development clips when training is done, so that writing with the LLM is no worse there than the alignment."""

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from audiophi.tasks.transcribe import Transcribe

from .callbacks import Development
from .checkpoints import write_atomically

# What is tried, the cheaper first, which wins where two do equally well. At 1 the alignment is alone.
ALONE = {"ctc_weight": 1.0, "lm_prior_weight": 0.0}
START = {"ctc_weight": 0.7, "lm_prior_weight": 0.2, "ctc_temperature": 1.7, "no_repeat_ngram_size": 4}
GRID = {
    "ctc_weight": (0.85, 0.5, 0.95, 0.3),
    "lm_prior_weight": (0.0, 0.4),
    "ctc_temperature": (1.0, 2.5),
    "no_repeat_ngram_size": (0,),
}
ENOUGH = 2  # values of a setting in a row that are worse, after which the others are not tried
NAME = "decoding.json"


def fit_decoding(
    model, development: Development, given: dict, folder: Path, say: Callable[[str], None], llm_learned: bool = True
) -> None:
    """Sets the decoding of transcripts in `model.generation_config.tasks` to the best that was tried, one setting after
    the other, by real decoding of all development clips that are to be transcribed.

    given: what the recipe says of it, which is left as it is. folder: gets `decoding.json`, all that was tried, the
    error rates, and on how many clips of which data. llm_learned: without, the alignment alone is chosen,
    untried. Does nothing without such clips, without an alignment head, and where the recipe says all itself.
    """
    free = {name: value for name, value in START.items() if name not in given}
    alone = {*ALONE} <= {*free}
    rows = development.of_task(Transcribe.name)
    tasks = getattr(model.generation_config, "tasks", None) or {}
    if not free or not rows.rows or model.model.alignment is None or Transcribe.name not in tasks:
        return
    if alone and not llm_learned:
        tasks[Transcribe.name] = {**tasks[Transcribe.name], **ALONE}
        return
    say(f"decoding: which weights write the fewest errors on {len(rows.rows)} development clips?")
    rows.prepare(model, frozen_encoder=True)
    own, tried = tasks[Transcribe.name], []

    def error(settings: dict) -> float:
        tasks[Transcribe.name] = {**own, **settings}
        scores, _ = rows.evaluate(model, with_lm=True)
        found = scores[scores["main_score"]]
        tried.append((float("inf") if found is None else found, settings))
        say(f"  {shown(settings)}: {tried[-1][0]:.4g} % errors")
        return tried[-1][0]

    if alone:
        error(ALONE)
    around, lowest = free, error(free)
    for name in free:
        worse = 0
        for value in GRID[name]:
            settings = {**around, name: value}
            if (found := error(settings)) < lowest:
                around, lowest, worse = settings, found, 0
            elif (worse := worse + 1) == ENOUGH:
                break
    least, best = min(tried, key=lambda trial: trial[0])  # of equals the first
    tasks[Transcribe.name] = {**own, **best}
    told = [{**settings, "error_rate": found} for found, settings in tried]
    of = Counter((source.path, source.split) for *_, source in rows.rows)
    data = [{"path": path, "split": split, "clips": clips} for (path, split), clips in of.items()]
    told = {"clips": len(rows.rows), "data": data, "chosen": best, "tried": told}
    write_atomically(folder / NAME, json.dumps(told, indent=1))
    say(f"decoding: {shown(best)}, with {least:.4g} % errors")


def given_decoding(generation: dict) -> dict:
    """What a recipe's `generation` says of transcripts: what is not to be chosen."""
    return {**generation, **generation.get(Transcribe.name, {})}


def shown(settings: dict) -> str:
    return ", ".join(f"{name} {value:g}" for name, value in settings.items())
