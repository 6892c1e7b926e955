"""Filling the cache of encoder outputs: before a stage, or beforehand as a job of `datasets.map` that is split over
machines and processes (tools/build_cache.py). Both write the same cache, and skip what is in it."""

import functools
import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import torch
from datasets import Dataset

from modeling_audiophi import AudioPhiConfig
from processing.audio_io import AudioError

from .bad_rows import BadRows
from .build import build_model, build_processor
from .corpus import Corpus, Row
from .feature_cache import FeatureCache, fingerprint_of, hash_weights
from .recipe import Recipe, RecipeError, Source, Stage, recipe_from_dict, recipe_to_dict


def uses_cache(recipe: Recipe, stage: Stage, encoder_layer: str | int) -> bool:
    """Whether a stage reads encoder outputs from the disk: not with a tuned encoder, nor where the model's
    `encoder_layer` is a learned mix."""
    return recipe.cache and stage.tune.encoder == "frozen" and encoder_layer != "mix"


def encoder_name(audio_config) -> str:
    """The encoder's family, with what its config changes about its outputs beside the weights."""
    pooling = getattr(audio_config, "frequency_pooling", None)
    return audio_config.model_type + (f" {pooling}" if pooling else "")


def open_cache(recipe: Recipe, model, processor) -> tuple[FeatureCache, Callable]:
    """The cache of the model's encoder as it is now, and (features, mask) -> hidden, mask of that encoder."""
    tower = model.model.audio_tower
    features = json.loads(processor.feature_extractor.to_json_string())
    for key in ("auto_map", "processor_class"):  # written into it when the processor is saved
        features.pop(key, None)
    fingerprint = fingerprint_of(
        weights=hash_weights(tower),
        encoder=encoder_name(model.config.audio_config),
        layer=model.config.encoder_layer,
        window_frames=processor.window_frames,
        features=features,
    )
    tower.eval()
    device = next(tower.parameters()).device

    def encode(features, mask):
        return model.model.encode(features.to(device), mask.to(device))

    return FeatureCache(recipe.cache_dir, fingerprint, recipe.cache_dtype), encode


def fill_cache(
    corpus: Corpus,
    cache: FeatureCache,
    processor,
    encode: Callable,
    speeds: list[float],
    batch_seconds: float = 120.0,
    report: Callable[[int, int], None] = lambda done, total: None,
) -> int:
    """Encodes every row at every speed that is not cached yet; returns how many were. Unreadable rows are dropped."""
    encoded = encode_missing(corpus, corpus.rows, cache, processor, encode, speeds, corpus.drop, batch_seconds, report)
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
) -> int:
    """Encodes those of a corpus's rows that are not cached yet; returns how many clips.

    Args:
        encode: (features, mask) of windows, on the CPU -> hidden (windows, frames, size), mask: `AudioPhiModel.encode`.
        drop: called with rows that cannot be read, and the reason.
        batch_seconds: padded audio encoded at a time. report: called with (done, total) clips.
    """
    missing, keys = [], set()  # several rows may ask about one clip
    for row in rows:
        try:
            for clip in range(0 if corpus.simulated(row) else len(row.lengths)):
                for speed in speeds:
                    key = corpus.key(row, clip, speed)
                    if key not in cache:
                        missing.append((row, clip, speed))
                        keys.add(key)
        except (OSError, ValueError) as error:  # ValueError: a NUL in a file's name
            drop(row, str(error))
    missing.sort(key=lambda item: item[0].lengths[item[1]] / item[2])
    waiting: list[tuple[str, dict]] = []
    encoded, seconds = 0, 0.0

    def flush() -> None:
        if not waiting:
            return
        batch = processor.pad_audio([clip for _, clip in waiting])
        windows = batch.pop("audio_num_windows").tolist()
        features = batch.pop(processor.feature_key)
        hidden, mask = encode(features, next(iter(batch.values())))
        valid = [states[real].float().cpu() for states, real in zip(hidden, mask, strict=True)]
        for (key, _), count in zip(waiting, windows, strict=True):
            cache.put(key, valid[:count])
            del valid[:count]
        waiting.clear()

    for row, place, speed in missing:
        key = corpus.key(row, place, speed)
        if key in cache or key in [k for k, _ in waiting]:
            continue
        try:
            waveform = corpus.waveform(row, place, speed, processor.sampling_rate)
            clip = processor.encode_audio((waveform, processor.sampling_rate))
        except (AudioError, OSError) as error:
            drop(row, str(error))
            continue
        waiting.append((key, clip))
        encoded, seconds = encoded + 1, max(seconds, row.lengths[place] / speed)
        if seconds * len(waiting) >= batch_seconds:
            flush()
            seconds = 0.0
            report(encoded, len(keys))
    flush()
    cache.flush()
    if keys:
        report(encoded, len(keys))
    return encoded


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
    clips = encode_missing(corpus, rows, cache, processor, encode, speeds, lambda *told: unreadable.append(told))
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
        done = Dataset.from_dict({"number": order}).map(
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
