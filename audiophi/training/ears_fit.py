"""How much the alignment and the language model shall say, with two ears, in choosing from the texts of the encoder's
own decoder and the alignment's, and how sure a word is: tried out on development clips when training is done, each
heard once."""

import json
from collections.abc import Callable
from itertools import product
from pathlib import Path

import torch

from audiophi.evaluation.transcripts import errors_of
from audiophi.tasks.transcribe import Transcribe
from modeling_audiophi.confidence_audiophi import fitted, found_in, word_votes
from modeling_audiophi.ears_audiophi import together

from .callbacks import Development
from .checkpoints import write_atomically
from .decoding_fit import NAME, shown

# What is tried, from the least on.
GRID = {"hear_ctc_weight": (0.0, 0.005, 0.01, 0.02, 0.03, 0.05, 0.1), "hear_lm_weight": (0.0, 0.05, 0.1, 0.2)}


@torch.inference_mode()
def fit_ears(model, development: Development, given: dict, folder: Path, say: Callable[[str], None]) -> None:
    """Sets `hear_ctc_weight` and `hear_lm_weight` of `model.generation_config` to what `choose` takes of `GRID`, and
    `hear_confidence` to what makes the words' being right or wrong likeliest then.

    given: what the recipe says of decoding, which is left as it is. folder: `decoding.json` there gets what was tried,
    as "ears". Does nothing for a model that hears with one ear, where the recipe says both, and without development
    clips that are to be transcribed.
    """
    development = development.of_task(Transcribe.name)
    rows, grid = development.rows, list(product(*((given[name],) if name in given else GRID[name] for name in GRID)))
    if model.config.hear_with != "both" or len(grid) == 1 or not rows:
        return
    say(f"two ears: how much alignment and language model shall say, on {len(rows)} development clips")
    model.eval()
    heard = [heard_of(model, development.processor, clips) for _, _, clips, _ in rows]
    errors, words = torch.zeros(len(grid), len(rows)).double(), torch.zeros(len(rows)).double()
    for number, (example, *_) in enumerate(rows):
        texts = [best(heard[number][0], pair) for pair in grid]
        counts = {text: errors_of(example.reference, text, example.language) for text in {*texts}}
        wrong = {text: sum(found.values()) - found["words"] for text, found in counts.items()}
        errors[:, number] = torch.tensor([float(wrong[text]) for text in texts])
        words[number] = counts[texts[0]]["words"]
    domains = [source.path for *_, source in rows]
    rates, place = choose(grid, errors, words, domains)
    votes, right = [], []
    for (example, *_), (texts, spelled) in zip(rows, heard, strict=True):
        text = best(texts, grid[place])
        votes += word_votes(text, [pair[:2] for pair in texts], spelled)
        right += found_in(text, example.reference)
    settings = [dict(zip(GRID, pair, strict=True)) for pair in grid]
    chosen = {**settings[place], "hear_confidence": fitted(votes, right) if votes else None}
    for name, value in chosen.items():
        setattr(model.generation_config, name, value)
    file = folder / NAME
    told = json.loads(file.read_text()) if file.is_file() else {}
    tried = [{**pair, "error_rate": rate} for pair, rate in zip(settings, rates, strict=True)]
    found = {"clips": len(rows), "domains": len({*domains}), "words": len(right), "wrong": len(right) - sum(right)}
    told["ears"] = {**found, "chosen": chosen, "tried": tried}
    write_atomically(file, json.dumps(told, indent=1))
    say(f"two ears: {shown(settings[place])}, with {rates[place]:.4g} % errors")


def choose(grid: list[tuple[float, float]], errors, words, domains: list[str]) -> tuple[list[float], int]:
    """Error rates of the settings, %, and the number of the one to take.

    `grid`: weights of alignment and language model; `errors` (settings, clips), `words` (clips) of the references,
    `domains` of the clips. A rate is the mean of the domains', so that a large one does not decide alone. Taken is the
    least weight of the alignment that, with the language model's that is best beside it, is behind the best of all by
    no more than one standard error of the difference (Breiman et al. 1984, Classification and Regression Trees, 3.4.3):
    a few thousand words do not tell the best from the next, and the alignment, fitted to few voices, is the one to
    trust least.
    """
    shares = torch.zeros_like(words)
    for domain in {*domains}:
        mine = torch.tensor([other == domain for other in domains])
        shares[mine] = 100 / words[mine].sum().clamp(min=1) / len({*domains})
    weighted = errors * shares
    rates = weighted.sum(1)
    behind = weighted - weighted[rates.argmin()]
    near = behind.sum(1) <= (behind**2).sum(1).sqrt()
    least = min(pair[0] for pair, is_near in zip(grid, near.tolist(), strict=True) if is_near)
    return rates.tolist(), min((n for n, pair in enumerate(grid) if pair[0] == least), key=lambda n: float(rates[n]))


def best(texts: list[tuple[str, float, float, float]], weights: tuple[float, float]) -> str:
    """Of the candidates of `heard_of` the one that a model with these weights takes."""
    if not texts:
        return ""
    scores = together(*torch.tensor([text[1:] for text in texts]).T, weights)
    return texts[int(scores.argmax())][0]


def heard_of(model, processor, clips: list[dict]) -> tuple[list[tuple[str, float, float, float]], str]:
    """The candidates of one example's clips, which are one recording, with their scores (`score_words`), and what the
    alignment spells."""
    batch = processor.pad_audio(clips)
    audio = model.hear({name: value.to(model.device) for name, value in batch.items()}, "both")
    tasks = getattr(model.generation_config, "tasks", None) or {}
    fusion = model.decoding_settings(task=Transcribe.name if Transcribe.name in tasks else None)[2]
    return model.score_words(audio, fusion)[0], audio.spelled[0]
