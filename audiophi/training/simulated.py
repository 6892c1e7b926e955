"""Text as the alignment would have heard it: a posterior for every word token, with the errors of real clips.

The readouts `collapse` and `mixed` give the LLM one blurred word embedding per token that the alignment hears. Which
tokens it takes for which, leaves out and adds is measured once per run on clips whose words are known; any text then
becomes such posteriors without audio, encoder or adapter (TASU, https://arxiv.org/abs/2511.03310).

What the readouts add from the adapter's states is left out: the collapse's linear map, and a sound token for each long
pause.
"""

import os
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jiwer
import numpy as np
import torch
from safetensors.numpy import load_file, save_file

from audiophi.data.alignment_text import AlignmentTokenizer, normalise_transcript
from modeling_audiophi.readout_collapse import word_posterior

# Of each posterior only so many tokens are kept, and scaled to a sum of 1.
KEPT = 8
# A token's own statistics count as much as those of all tokens once it was seen this often.
PRIOR = 4.0
# Clips heard at a time: their posteriors span the whole alignment vocabulary.
AT_A_TIME = 4


class Heard(NamedTuple):
    """What the alignment heard of a clip, a row per run of its best path: `tokens` (N,) LLM ids; `ids`, `weights`
    (N, K) the KEPT best of the run's mean sharpened posterior, as `word_embeddings` weighs the LLM's embeddings."""

    tokens: np.ndarray
    ids: np.ndarray
    weights: np.ndarray


class Confusions:
    """What became of the tokens of known words.

    Args:
        tokenize: text -> reference token ids, those of the alignment's targets.
        arrays: as saved. `tokens` (N,), ascending: the reference token of each observation, `ids`, `weights` (N, K) its
            posterior. `seen` (R,), ascending: reference tokens, `times` (R,) how often they occurred, `lost` (R,) of
            these not heard at all. `added_ids`, `added_weights` (M, K): posteriors of heard tokens that no reference
            has. `places` (1,): how many places there were for them, before, between and behind the tokens.
    """

    def __init__(self, tokenize: Callable[[str], list[int]], **arrays: np.ndarray):
        self.tokenize, self.arrays = tokenize, arrays
        self.tokens, self.ids, self.weights = arrays["tokens"], arrays["ids"], arrays["weights"]
        self.seen, self.times, self.lost = arrays["seen"], arrays["times"], arrays["lost"]
        self.added_ids, self.added_weights = arrays["added_ids"], arrays["added_weights"]
        self.deletion_rate = float(self.lost.sum() / max(1, self.times.sum()))
        self.insertion_rate = len(self.added_ids) / max(1, int(arrays["places"][0]))

    @classmethod
    def load(cls, path: Path, tokenize: Callable[[str], list[int]]) -> "Confusions":
        return cls(tokenize, **load_file(path))

    def save(self, path: Path) -> None:
        """Complete or not at all."""
        partial_path = path.with_name(f"{path.name}.partial")
        save_file({name: np.ascontiguousarray(array) for name, array in self.arrays.items()}, partial_path)
        os.replace(partial_path, path)

    def describe(self) -> str:
        total = int(self.times.sum())
        right = int((self.ids[:, 0] == self.tokens).sum()) if len(self.ids) else 0
        shares = (right, len(self.tokens) - right, int(self.lost.sum()), len(self.added_ids))
        told = (f"{100 * share / max(1, total):.1f} %" for share in shares)
        return "of {:,} tokens of real clips {} are heard, {} as others, {} not; {} are added".format(total, *told)

    def simulate(self, text: str, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """What would be heard of a text: LLM token ids (T, K) and their weights (T, K) float32, summing to 1.

        Each token is lost, or gets the posterior of one of its own observations; the rarer it was, the more often that
        of any other token, with itself in the other one's place. So one that was never seen is heard with the
        certainty of the others, and confused with whatever they were.
        """
        wanted = np.asarray(self.tokenize(text), dtype=np.int64)
        kept = np.flatnonzero(rng.random(len(wanted)) >= self._losses(wanted))
        ids, weights = self._observed(wanted[kept], rng)
        extra = rng.poisson(self.insertion_rate, len(wanted) + 1)
        added = rng.integers(max(1, len(self.added_ids)), size=int(extra.sum()))
        places = np.concatenate([kept, np.repeat(np.arange(len(extra)), extra) - 0.5])
        order = np.argsort(places, kind="stable")
        ids = np.concatenate([ids, self.added_ids[added]])
        weights = np.concatenate([weights, self.added_weights[added]])
        return ids[order], weights[order]

    def clip(self, text: str, *key: int) -> dict[str, torch.Tensor]:
        """A text as `processor.pad_audio` takes it; equal keys, as (seed, epoch, row, clip), hear the same."""
        ids, weights = self.simulate(text, np.random.default_rng([number % 2**32 for number in key]))
        return {"heard_ids": torch.from_numpy(ids), "heard_weights": torch.from_numpy(weights)}

    def _losses(self, wanted: np.ndarray) -> np.ndarray:
        """The probability that each token is not heard."""
        if not len(self.seen):
            return np.full(len(wanted), self.deletion_rate)
        place = np.searchsorted(self.seen, wanted).clip(max=len(self.seen) - 1)
        known = self.seen[place] == wanted
        times, lost = self.times[place] * known, self.lost[place] * known
        return (lost + PRIOR * self.deletion_rate) / (times + PRIOR)

    def _observed(self, heard: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """A posterior for each token: ids, weights (T, K)."""
        first, past = (np.searchsorted(self.tokens, heard, side) for side in ("left", "right"))
        count = past - first
        own = rng.random(len(heard)) * (count + PRIOR) < count
        drawn = rng.random(len(heard))
        number = np.where(own, first + drawn * count, drawn * len(self.tokens)).astype(np.int64)
        ids = self.ids[number]
        return np.where(ids == self.tokens[number][:, None], heard[:, None], ids), self.weights[number]


def measure(
    hear: Callable[[list[dict]], list[Heard]],
    clips: Iterable[tuple[str, dict]],
    tokenize: Callable[[str], list[int]],
) -> Confusions:
    """The confusions of `clips`: (what is said, encoded clip). `hear`: see `hear_clips`."""
    observed, times, lost, added, places = [], {}, {}, [], 0
    for text, heard in heard_texts(hear, clips):
        wanted = tokenize(text)
        places += len(wanted) + 1
        for token in wanted:
            times[token] = times.get(token, 0) + 1
        for token, number in paired(wanted, heard.tokens.tolist()):
            if token is None:
                added.append((heard.ids[number], heard.weights[number]))
            elif number is None:
                lost[token] = lost.get(token, 0) + 1
            else:
                observed.append((token, heard.ids[number], heard.weights[number]))
    observed.sort(key=lambda found: found[0])
    seen = sorted(times)
    return Confusions(
        tokenize,
        tokens=np.array([token for token, _, _ in observed], dtype=np.int64),
        ids=stacked([ids for _, ids, _ in observed], np.int64),
        weights=stacked([weights for _, _, weights in observed], np.float32),
        seen=np.array(seen, dtype=np.int64),
        times=np.array([times[token] for token in seen], dtype=np.int64),
        lost=np.array([lost.get(token, 0) for token in seen], dtype=np.int64),
        added_ids=stacked([ids for ids, _ in added], np.int64),
        added_weights=stacked([weights for _, weights in added], np.float32),
        places=np.array([places], dtype=np.int64),
    )


def heard_texts(hear: Callable, clips: Iterable[tuple[str, dict]]) -> Iterator[tuple[str, Heard]]:
    """(what is said, what is heard) of clips, AT_A_TIME at a time."""
    waiting = []
    for clip in clips:
        waiting.append(clip)
        if len(waiting) == AT_A_TIME:
            yield from zip([text for text, _ in waiting], hear([clip for _, clip in waiting]), strict=True)
            waiting = []
    if waiting:
        yield from zip([text for text, _ in waiting], hear([clip for _, clip in waiting]), strict=True)


def paired(wanted: list[int], heard: list[int]) -> Iterator[tuple[int | None, int | None]]:
    """Minimum edit distance: (reference token, place of what was heard for it), None where there is none."""
    if not wanted or not heard:
        yield from ((token, None) for token in wanted)
        yield from ((None, place) for place in range(len(heard)))
        return
    aligned = jiwer.process_words(" ".join(map(str, wanted)), " ".join(map(str, heard)))
    for chunk in aligned.alignments[0]:
        said = wanted[chunk.ref_start_idx : chunk.ref_end_idx]
        places = range(chunk.hyp_start_idx, chunk.hyp_end_idx)
        if chunk.type == "delete":
            yield from ((token, None) for token in said)
        elif chunk.type == "insert":
            yield from ((None, place) for place in places)
        else:
            yield from zip(said, places, strict=True)


def stacked(rows: list[np.ndarray], dtype) -> np.ndarray:
    """Rows (N, KEPT), padded with zeros; also for none."""
    table = np.zeros((len(rows), KEPT), dtype=dtype)
    for number, row in enumerate(rows):
        table[number, : len(row)] = row
    return table


@torch.inference_mode()
def hear_clips(model, processor, clips: list[dict]) -> list[Heard]:
    """What a model's alignment hears of clips as `processor.pad_audio` takes them, by itself and without dropout."""
    was_training, device = model.training, model.device
    model.eval()
    inputs = {name: value.to(device) for name, value in processor.pad_audio(clips).items()}
    audio = model.get_audio_features(**inputs, with_alignment=True, with_readout=False, return_dict=True)
    model.train(was_training)
    return [
        heard_runs(logits[mask], model.model.alignment.vocab_ids)
        for logits, mask in zip(audio.align_logits, audio.tokens_mask, strict=True)
    ]


def heard_runs(logits: torch.Tensor, vocab_ids: torch.Tensor) -> Heard:
    """Runs of equal labels on a clip's best path, blanks left out: `logits` (T, V' + 1), `vocab_ids` (V',)."""
    path = logits.argmax(-1)
    labels, run = torch.unique_consecutive(path, return_inverse=True)
    words = path > 0
    run = (labels > 0).cumsum(0)[run[words]] - 1  # runs of words, numbered
    labels = labels[labels > 0]
    sums = logits.new_zeros(len(labels), len(vocab_ids), dtype=torch.float32)
    sums = sums.index_add(0, run, word_posterior(logits[words]))
    weights, best = sums.topk(min(KEPT, len(vocab_ids)), dim=-1)
    weights = weights / weights.sum(-1, keepdim=True)
    found = (vocab_ids[labels - 1], vocab_ids[best], weights)
    return Heard(*(tensor.cpu().numpy() for tensor in found))


def reference_tokenizer(align_tokenizer: AlignmentTokenizer, text_case: str) -> Callable[[str], list[int]]:
    """Text -> the ids that are the alignment's targets."""
    return partial(reference_tokens, align_tokenizer, text_case)


def reference_tokens(align_tokenizer: AlignmentTokenizer, text_case: str, text: str) -> list[int]:
    return align_tokenizer.encode(normalise_transcript(text, text_case))
