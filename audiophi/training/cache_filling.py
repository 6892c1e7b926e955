"""Filling the cache of encoder outputs: before a stage, or beforehand as a job of `datasets.map` that is split over
machines and processes (tools/build_cache.py). Both write the same cache, and skip what is in it."""

import functools
import json
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import datasets
import torch
from torch.utils.data import DataLoader, Dataset

from modeling_audiophi import AudioPhiConfig
from processing.audio_io import AudioError

from .bad_rows import BadRows
from .build import build_model, build_processor
from .callbacks import duration
from .corpus import Corpus, Row
from .feature_cache import FeatureCache, fingerprint_of, hash_weights
from .precision import fast_precision
from .recipe import Recipe, RecipeError, Source, Stage, recipe_from_dict, recipe_to_dict

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


def uses_cache(recipe: Recipe, stage: Stage, encoder_layer: str | int) -> bool:
    """Whether a stage reads encoder outputs from the disk: not with a tuned encoder, nor where the model's
    `encoder_layer` is a learned mix."""
    return recipe.cache and stage.tune.encoder == "frozen" and encoder_layer != "mix"


def encoder_name(audio_config) -> str:
    """The encoder's family, with what its config changes about its outputs beside the weights."""
    pooling = getattr(audio_config, "frequency_pooling", None)
    return audio_config.model_type + (f" {pooling}" if pooling else "")


def open_cache(recipe: Recipe, model, processor) -> tuple[FeatureCache, Callable]:
    """The cache of the model's encoder as it is now, and (features, mask) -> hidden, mask of that encoder.

    It runs in the precision of the first stage that reads the cache, so that all stages read the same one.
    """
    tower = model.model.audio_tower
    device = next(tower.parameters()).device
    layer = model.config.encoder_layer
    wanted = next((stage.precision for stage in recipe.stages if uses_cache(recipe, stage, layer)), "fp32")
    precision, _ = fast_precision(wanted, device.type)
    features = json.loads(processor.feature_extractor.to_json_string())
    for key in ("auto_map", "processor_class"):  # written into it when the processor is saved
        features.pop(key, None)
    fingerprint = fingerprint_of(
        weights=hash_weights(tower),
        encoder=encoder_name(model.config.audio_config),
        layer=layer,
        window_frames=processor.window_frames,
        features=features,
        **({} if precision == "fp32" else {"precision": precision}),
    )
    tower.eval()

    def encode(features, mask):
        with torch.autocast(device.type, AUTOCAST.get(precision), enabled=precision in AUTOCAST):
            return model.model.encode(features.to(device), mask.to(device))

    return FeatureCache(recipe.cache_dir, fingerprint, recipe.cache_dtype), encode


def encoding_progress(say: Callable[[str], None], seconds: float = 10.0) -> Callable[[int, int], None]:
    """A `report` for `fill_cache`: how far it is, after the first batch, every so many seconds and at the end."""
    began = time.monotonic()
    said = float("-inf")

    def report(done: int, total: int) -> None:
        nonlocal said
        now = time.monotonic()
        if done == total or now - said >= seconds:
            said = now
            left = (now - began) / max(1, done) * (total - done)
            say(f"cache: {done:,} of {total:,} clips encoded" + (f", ETA {duration(left)}" if done < total else ""))

    return report


def fill_cache(
    corpus: Corpus,
    cache: FeatureCache,
    processor,
    encode: Callable,
    speeds: list[float],
    batch_seconds: float = 120.0,
    report: Callable[[int, int], None] = lambda done, total: None,
    workers: int = 0,
) -> int:
    """Encodes every row at every speed that is not cached yet; returns how many were. Unreadable rows are dropped."""
    told = (batch_seconds, report, workers)
    encoded = encode_missing(corpus, corpus.rows, cache, processor, encode, speeds, corpus.drop, *told)
    corpus.share()
    corpus.prune()
    return encoded


@torch.inference_mode()
def encode_missing(
    corpus: Corpus,
    rows: list[Row],
    cache: FeatureCache,
    processor,
    encode: Callable,
    speeds: list[float],
    drop: Callable[[Row, str], None],
    batch_seconds: float = 120.0,
    report: Callable[[int, int], None] = lambda done, total: None,
    workers: int = 0,
) -> int:
    """Encodes those of a corpus's rows that are not cached yet; returns how many clips.

    Args:
        encode: (features, mask) of windows, on the CPU -> hidden (windows, frames, size), mask: `AudioPhiModel.encode`.
        drop: called with rows that cannot be read, and the reason.
        batch_seconds: padded audio encoded at a time. report: called with (done, total) clips. workers: processes
            that decode and make features meanwhile; 0: this one does.
    """
    missing: dict[str, list[tuple[Row, int, float]]] = {}  # several rows may ask about one clip
    for row in rows:
        try:
            for clip in range(0 if corpus.simulated(row) else len(row.lengths)):
                for speed in speeds:
                    key = corpus.key(row, clip, speed)
                    if key not in cache:
                        missing.setdefault(key, []).append((row, clip, speed))
        except (OSError, ValueError) as error:  # ValueError: a NUL in a file's name
            drop(row, str(error))
    clips = Clips(corpus, processor, {key: rows[0] for key, rows in missing.items()})
    batches, encoded = clips.batches(batch_seconds), 0
    loader = DataLoader(
        clips,
        sampler=batches,
        batch_size=None,
        num_workers=min(workers, len(batches)),
        collate_fn=tuple,
        generator=torch.Generator(),  # else it draws from what the training is seeded with
    )
    for keys, unreadable, batch in loader:
        for key, reason in unreadable:
            for row, _, _ in missing[key]:
                drop(row, reason)
        if keys:
            windows = batch.pop("audio_num_windows").tolist()
            hidden, mask = encode(batch.pop(processor.feature_key), next(iter(batch.values())))
            valid = [states[real].float().cpu() for states, real in zip(hidden, mask, strict=True)]
            for key, count in zip(keys, windows, strict=True):
                cache.put(key, valid[:count])
                del valid[:count]
        encoded += len(keys)
        report(encoded, len(missing))
    cache.flush()
    return encoded


class Clips(Dataset):
    """`[keys]` -> (keys, [(key, reason)] of clips that cannot be read, the others as one padded batch).

    missing: key -> row, its clip, speed.
    """

    def __init__(self, corpus: Corpus, processor, missing: dict[str, tuple[Row, int, float]]):
        self.corpus, self.processor, self.missing = corpus, processor, missing

    def batches(self, seconds: float) -> list[list[str]]:
        """All keys, clips of like length together, about so many padded seconds each."""
        lengths = {key: row.lengths[place] / speed for key, (row, place, speed) in self.missing.items()}
        batches: list[list[str]] = []
        for key in sorted(lengths, key=lengths.get):
            if not batches or lengths[batches[-1][-1]] * len(batches[-1]) >= seconds:
                batches.append([])
            batches[-1].append(key)
        return batches

    def __getitem__(self, keys: list[str]) -> tuple:
        rate, clips, unreadable = self.processor.sampling_rate, {}, []
        for key in keys:
            try:
                waveform = self.corpus.waveform(*self.missing[key], rate)
                clips[key] = self.processor.encode_audio((waveform, rate))
            except (AudioError, OSError) as error:
                unreadable.append((key, str(error)))
        return list(clips), unreadable, self.processor.pad_audio(list(clips.values()))


# ---- beforehand ------------------------------------------------------------------------------------------------------


def cached_sources(recipe: Recipe) -> list[Source]:
    """The data of all stages that train on the components' own encoder outputs, each source once.

    Raises RecipeError where there is no such stage.
    """
    start = recipe.init_from
    layer = recipe.encoder_layer if start is None else AudioPhiConfig.from_pretrained(start).encoder_layer
    found: dict[str, Source] = {}
    for stage in recipe.stages:
        if stage.tune.encoder != "frozen":
            break  # the stages after it have another encoder
        if uses_cache(recipe, stage, layer):
            real = [source for source in stage.data or recipe.data.train if source.heard != "simulated"]
            found |= {json.dumps(asdict(source)): source for source in real}
    if recipe.data.streaming or not found:
        reason = {
            "data.streaming: true": recipe.data.streaming,
            "cache: false": not recipe.cache,
            "encoder_layer: mix": layer == "mix",
        }
        named = next((key for key, holds in reason.items() if holds), "stages.0.tune.encoder")
        raise RecipeError(f"{named}: this recipe trains on no cached encoder outputs, so there is nothing to build")
    return list(found.values())


@functools.cache
def encoder_of(recipe: str):
    """(processor, cache, encode) of a recipe in JSON, without the language model. Forked processes share it."""
    recipe = replace(recipe_from_dict(json.loads(recipe)), alignment=None, readout=None, clip_tokens=None)
    processor = build_processor(recipe)
    model = build_model(recipe, processor, None)
    model.model.language_model = model.lm_head = None
    if torch.accelerator.is_available():
        model.to(torch.accelerator.current_accelerator())
    return processor, *open_cache(recipe, model, processor)


@functools.cache
def corpus_of(recipe: str, bad_rows: str) -> Corpus:
    """The clips of `cached_sources`, the same in every process."""
    recipe = recipe_from_dict(json.loads(recipe))
    bad = BadRows(Path(bad_rows), recipe.data.max_bad_rows)
    return Corpus(cached_sources(recipe), bad, recipe.text_case, recipe.cache_dir, together=False)


def encode_rows(batch: dict, recipe: str, bad_rows: str, threads: int | None) -> dict:
    """For `Dataset.map`: encodes the rows of these numbers; which of them cannot be read, and why."""
    if threads is not None:
        torch.set_num_threads(threads)
    processor, cache, encode = encoder_of(recipe)
    corpus, speeds = corpus_of(recipe, bad_rows), json.loads(recipe)["data"]["speeds"]
    unreadable: list[tuple[Row, str]] = []
    rows = [corpus.rows[number] for number in batch["number"]]
    workers = 0 if threads else json.loads(recipe)["num_workers"]  # one of several processes has none of its own
    drop = lambda *told: unreadable.append(told)  # noqa: E731
    clips = encode_missing(corpus, rows, cache, processor, encode, speeds, drop, workers=workers)
    corpus.share()
    reasons = {(row.table, row.index): reason for row, reason in unreadable}
    found = [reasons.get((row.table, row.index), "") for row in rows]
    return {"number": batch["number"], "reason": found, "clips": [clips, *[0] * (len(rows) - 1)]}


def build_cache(recipe: Recipe, shard: int = 0, shards: int = 1, num_proc: int = 1, batch_size: int = 256) -> dict:
    """Encodes one of `shards` equal parts of a recipe's clips, in `num_proc` processes.

    Returns {"rows", "clips" (encoded now), "bad" (rows that cannot be used), "folder"}. Run again, it skips what is in
    the cache. Raises RecipeError for a recipe without cached stages, and for several processes on a GPU; ValueError
    for data that cannot be used.
    """
    cached_sources(recipe)
    if num_proc > 1 and torch.accelerator.is_available():
        raise RecipeError(
            f"--num_proc {num_proc}: processes cannot share a GPU; start one shard per GPU instead, each with its own "
            "CUDA_VISIBLE_DEVICES"
        )
    told = json.dumps(recipe_to_dict(recipe))
    bad_rows = str(Path(recipe.output_dir) / f"bad_rows_cache_{shard}_of_{shards}.jsonl")
    encoder_of.cache_clear()
    corpus_of.cache_clear()
    _, cache, _ = encoder_of(told)
    corpus = corpus_of(told, bad_rows)
    by_length = sorted(range(len(corpus)), key=lambda number: corpus.rows[number].seconds)
    mine = by_length[shard::shards]
    if mine:
        # Neighbours in length share a batch, but no process gets only long ones.
        batches = [mine[start : start + batch_size] for start in range(0, len(mine), batch_size)]
        order = [number for first in range(num_proc) for batch in batches[first::num_proc] for number in batch]
        settings = {"recipe": told, "bad_rows": bad_rows, "threads": 1 if num_proc > 1 else None}
        done = datasets.Dataset.from_dict({"number": order}).map(
            encode_rows,
            batched=True,
            batch_size=batch_size,
            num_proc=num_proc if num_proc > 1 else None,
            fn_kwargs=settings,
            keep_in_memory=True,
            load_from_cache_file=False,
            desc=f"shard {shard + 1}/{shards}",
        )
        for number, reason in zip(done["number"], done["reason"], strict=True):
            if reason:
                corpus.drop(corpus.rows[number], reason)
    cache.refresh()
    clips = sum(done["clips"]) if mine else 0
    return {"rows": len(mine), "clips": clips, "bad": len(corpus.bad), "folder": cache.folder}
