"""Transcribe a data set with a model and turn the transcripts into scores: used by eval.py and during training.

A *prediction* is a JSON-able dict, one per row of the data:
    row (index), id, speaker, seconds (of audio), reference, hypothesis (the LLM's words; None without the LLM),
    hypothesis_align (the alignment head's; None without a head), stopped (the LLM ended by itself; None where unknown),
    compute_seconds (its share of its batch), substitutions, deletions, insertions (of the hypothesis), words (of the
    reference), these four after normalisation;
or, for a row without a score: row, id, error, readable (False: no text or no usable audio in the data; True: the model
could not take it, say because it is longer than the LLM's context).
"""

import copy
import itertools
import math
import time
from collections.abc import Callable, Collection, Iterable, Iterator

import numpy as np
import torch

from audiophi.data.datasets import read_clip
from processing.audio_io import AudioError
from processing.prompts import TRANSCRIBE

from .metrics import (
    ErrorCounts,
    bootstrap_interval,
    character_error_rate,
    count_errors,
    derangement,
    percent,
    word_error_rate,
)
from .text_normalization import NORMALIZER_NAME, normalize

SILENCE_STEP = 0.5  # seconds; silences are decoded once per length on this grid
AUDIO_INPUTS = ("input_features", "input_values", "audio_hidden_states")

# waveforms (float32, mono, 16 kHz) -> one {"hypothesis", "hypothesis_align", "stopped"} each
Transcriber = Callable[[list], list[dict]]


class AudioPhiTranscriber:
    """Transcripts of a batch of clips by an AudioPhi model, decoded as its generation_config says, without sampling.

    Args:
        model, processor: AudioPhiForConditionalGeneration, in whatever mode it is (put into eval mode while it works).
        instruction: text after the audio in the user's message; the one it was trained with.
        max_new_tokens: where a model that does not stop is stopped.
        ctc_weight: share of the alignment head in the beams' scores; None: as the generation_config says.
        with_lm, with_alignment: which of the two readings to make; the alignment's only where there is such a head.
    """

    def __init__(
        self,
        model,
        processor,
        instruction: str = TRANSCRIBE,
        max_new_tokens: int = 256,
        ctc_weight: float | None = None,
        with_lm: bool = True,
        with_alignment: bool = True,
    ):
        self.model, self.processor = model, processor
        self.instruction, self.max_new_tokens = instruction, max_new_tokens
        self.ctc_weight = ctc_weight
        self.with_lm = with_lm
        self.with_alignment = with_alignment and model.config.align_vocab_size > 0
        self.sampling_rate = processor.sampling_rate

    @torch.inference_mode()
    def __call__(self, clips: list) -> list[dict]:
        """`clips` are waveforms at the processor's rate, or dicts as `processor.encode_audio` makes them."""
        encoded = [
            clip if isinstance(clip, dict) else self.processor.encode_audio(clip, self.sampling_rate) for clip in clips
        ]
        was_training = self.model.training
        self.model.eval()
        try:
            heard = self._read_alignment(encoded) if self.with_alignment else [None] * len(clips)
            words = self._generate(encoded) if self.with_lm else [(None, None)] * len(clips)
        finally:
            self.model.train(was_training)
        return [
            {"hypothesis": text, "hypothesis_align": align, "stopped": stopped}
            for (text, stopped), align in zip(words, heard, strict=True)
        ]

    def _read_alignment(self, encoded: list[dict]) -> list[str]:
        ids = self.model.transcribe_alignment(**self._to_device(self.processor.pad_audio(encoded)))
        return [self._decode(clip_ids) for clip_ids in ids]

    def _generate(self, encoded: list[dict]) -> list[tuple[str, bool]]:
        conversations = [
            [
                {
                    "role": "user",
                    "content": [{"type": "audio", "encoded": clip}, {"type": "text", "text": self.instruction}],
                }
            ]
            for clip in encoded
        ]
        inputs = self.processor.apply_chat_template(
            conversations, tokenize=True, return_dict=True, add_generation_prompt=True,
            processor_kwargs={"padding_side": "left"},
        )  # fmt: skip
        ends = self._end_tokens()
        settings = copy.deepcopy(self.model.generation_config)
        settings.update(
            max_new_tokens=self.max_new_tokens,
            max_length=None,
            do_sample=False,
            eos_token_id=ends,
            pad_token_id=self.processor.tokenizer.pad_token_id,
        )
        if self.ctc_weight is not None:
            settings.ctc_weight = self.ctc_weight
        output = self.model.generate(**self._to_device(inputs), generation_config=settings)
        results = []
        for new in output[:, inputs["input_ids"].shape[1] :].tolist():
            length = next((index for index, token in enumerate(new) if token in ends), None)
            results.append((self._decode(new[:length]), length is not None))
        return results

    def _end_tokens(self) -> list[int]:
        own = self.model.generation_config.eos_token_id
        return sorted(
            {self.processor.end_token_id, *(own if isinstance(own, list) else [own] if own is not None else [])}
        )

    def _decode(self, ids: Iterable[int]) -> str:
        tokenizer = self.processor.tokenizer
        return tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False).strip()

    def _to_device(self, inputs) -> dict:
        inputs = {name: value.to(self.model.device) for name, value in inputs.items()}
        for name in AUDIO_INPUTS:
            if name in inputs:
                inputs[name] = inputs[name].to(self.model.dtype)
        return inputs


def transcribe_dataset(
    rows: Iterable[dict],
    transcribe: Transcriber,
    batch_size: int = 16,
    sampling_rate: int = 16_000,
    done: Collection[int] = (),
    score: Callable[[dict, str | None], dict] | None = None,
) -> Iterator[dict]:
    """Predictions for rows of `audiophi.data.datasets.load_audio_dataset`, in batches of clips of similar length.

    Rows are read in chunks of 8 batches, so that memory does not grow with the data; within a chunk the longest come
    first. `done` are indices of rows to leave out. Rows without text or readable audio yield their error instead.
    `score` (row, hypothesis) makes what a prediction has beside what was heard: by default its error counts.
    """
    wanted = ((index, row) for index, row in enumerate(rows) if index not in done)
    while chunk := list(itertools.islice(wanted, 8 * batch_size)):
        clips = []
        for index, row in chunk:
            try:
                clips.append((index, row, read_clip(row, sampling_rate, require_text=True)))
            except AudioError as error:
                yield {"row": index, "id": row.get("id"), "error": str(error), "readable": False}
        clips.sort(key=lambda clip: -len(clip[2]))
        for start in range(0, len(clips), batch_size):
            batch = clips[start : start + batch_size]
            yield from _transcribe_batch(batch, transcribe, sampling_rate, score or transcript_errors)


def _transcribe_batch(
    batch: list[tuple[int, dict, np.ndarray]], transcribe: Transcriber, sampling_rate: int, score: Callable
) -> Iterator[dict]:
    before = time.perf_counter()
    try:
        results = transcribe([waveform for _, _, waveform in batch])
    except ValueError as error:
        if len(batch) == 1:
            index, row, _ = batch[0]
            yield {"row": index, "id": row.get("id"), "error": str(error), "readable": True}
        else:  # find the clip that the model refuses
            for clip in batch:
                yield from _transcribe_batch([clip], transcribe, sampling_rate, score)
        return
    spent = time.perf_counter() - before
    samples = sum(len(waveform) for _, _, waveform in batch)
    for (index, row, waveform), result in zip(batch, results, strict=True):
        yield {
            "row": index,
            "id": row.get("id"),
            "speaker": row.get("speaker"),
            "seconds": round(len(waveform) / sampling_rate, 3),
            "reference": row["text"],
            **result,
            "compute_seconds": spent * len(waveform) / samples,
            **score(row, result["hypothesis"]),
        }


def transcript_errors(row: dict, hypothesis: str | None) -> dict:
    """The error counts of a transcript."""
    return errors_of(row["text"], hypothesis)


def errors_of(reference: str, hypothesis: str | None) -> dict:
    """The error counts that a prediction carries."""
    if hypothesis is None:
        return {}
    counts = count_errors(reference, hypothesis)
    return {name: getattr(counts, name) for name in ("substitutions", "deletions", "insertions", "words")}


def summarize(predictions: Iterable[dict], silence: dict[float, str] | None = None, seed: int = 0) -> dict:
    """Scores of predictions (those with an error are left out). Rates are percentages, None where undefined.

    `wer_shuffled_audio`: every reference against what the model heard in another utterance's audio. Decoding without
    sampling and one instruction for all make that the other utterance's hypothesis, so nothing is decoded twice.
    `wer_silence`: against `silence`, from `transcribe_silence`. `listening_gap`: shuffled minus true.
    """
    scored = sorted((p for p in predictions if "error" not in p), key=lambda p: p["row"])
    with_lm = [p for p in scored if p["hypothesis"] is not None]
    counts = [count_errors(p["reference"], p["hypothesis"]) for p in with_lm]
    wer = word_error_rate(counts)
    interval, unit = bootstrap_interval(counts, [p["speaker"] for p in with_lm], seed=seed) if counts else (None, None)
    shuffled = shuffled_error_rate(with_lm, "hypothesis", seed)
    quiet = None
    if silence is not None and with_lm:
        quiet = word_error_rate([count_errors(p["reference"], silence[silence_length(p["seconds"])]) for p in with_lm])
    seconds = sum(p["seconds"] for p in scored)
    endings = [p["stopped"] for p in with_lm if p["stopped"] is not None]
    return {
        "wer": wer,
        "wer_ci95": interval,
        "wer_ci95_unit": unit,
        "cer": character_error_rate(counts),
        **{
            name: sum(getattr(count, name) for count in counts) for name in ("substitutions", "deletions", "insertions")
        },
        "words": sum(len(normalize(p["reference"]).split()) for p in scored),
        "utterances": len(scored),
        "audio_seconds": round(seconds, 3),
        "normalizer": NORMALIZER_NAME,
        "wer_align": word_error_rate(align_counts(scored)),
        "wer_shuffled_audio": shuffled,
        "wer_silence": quiet,
        "listening_gap": None if shuffled is None or wer is None else shuffled - wer,
        "never_stopped": percent(sum(not end for end in endings), len(endings)),
        "empty": percent(sum(not normalize(p["hypothesis"]) for p in with_lm), len(with_lm)),
        "rtf": sum(p["compute_seconds"] for p in scored) / seconds if seconds else None,
    }


def align_counts(predictions: Iterable[dict]) -> list[ErrorCounts]:
    """Error counts of the alignment head's own readings, where there are any."""
    heard = [p for p in predictions if p["hypothesis_align"] is not None]
    return [count_errors(p["reference"], p["hypothesis_align"]) for p in heard]


def shuffled_error_rate(predictions: list[dict], key: str = "hypothesis", seed: int = 0) -> float | None:
    """WER of each reference against `key` of another utterance with other words; None for fewer than two of them."""
    order = derangement([normalize(p["reference"]) for p in predictions], seed)
    if order is None:
        return None
    return word_error_rate(
        [count_errors(p["reference"], predictions[other][key]) for p, other in zip(predictions, order, strict=True)]
    )


def silence_length(seconds: float) -> float:
    """The length on the grid of silences that stands for a clip: rounded up, and never nothing."""
    return max(1, math.ceil(seconds / SILENCE_STEP)) * SILENCE_STEP


def transcribe_silence(
    seconds: Iterable[float], transcribe: Transcriber, batch_size: int = 16, sampling_rate: int = 16_000
) -> dict[float, str]:
    """What the model hears in digital silence as long as each clip, by length (`silence_length`)."""
    lengths = sorted({silence_length(value) for value in seconds})
    heard = {}
    for start in range(0, len(lengths), batch_size):
        batch = lengths[start : start + batch_size]
        results = transcribe([np.zeros(round(length * sampling_rate), dtype=np.float32) for length in batch])
        heard.update({length: result["hypothesis"] for length, result in zip(batch, results, strict=True)})
    return heard
