"""What a stage trains on: corpus, cached encoder outputs, order of batches, augmentation, collator."""

import json
from dataclasses import asdict
from typing import TYPE_CHECKING

import torch
from accelerate import PartialState
from transformers import TrainingArguments

from audiophi.data.augment import Augment, seed_of
from audiophi.data.collator import AudioPhiCollator
from processing.chat_audiophi import HEARD

from .batches import BatchSchedule
from .cache_filling import encoding_progress, fill_cache, open_cache, uses_cache
from .corpus import Corpus, TrainingSet
from .feature_cache import FeatureCache
from .measured_clips import run_confusions
from .plan import token_rate
from .prompt_room import PromptRoom
from .recipe import Recipe, RecipeError, Stage
from .streams import StreamingSet

if TYPE_CHECKING:
    from .stages import Run


def data_key(recipe: Recipe, stage: Stage) -> str:
    """Equal for stages that train on the same sources."""
    return json.dumps([asdict(source) for source in stage.data or recipe.data.train])


def stage_cache(run: "Run", stage: Stage, corpus: Corpus) -> FeatureCache | None:
    """The filled cache of a stage with a frozen encoder; None where the encoder must run: tuned, a learned layer mix,
    or no cache; and where no row has audio."""
    recipe = run.recipe
    if all(corpus.simulated(row) for row in corpus.rows):
        return None
    if not uses_cache(recipe, stage, run.model.config.encoder_layer):
        if recipe.cache and stage.tune.encoder == "frozen":
            run.say("cache: off, a learned layer mix needs all layers of the encoder")
        return None
    cache, encode = open_cache(recipe, run.model, run.processor)
    report = encoding_progress(run.say)
    state = PartialState()
    if state.num_processes > 1:  # each encodes its part
        part = corpus.part(state.process_index, state.num_processes)
        fill_cache(part, cache, run.processor, encode, recipe.data.speeds, report=report, workers=recipe.num_workers)
        state.wait_for_everyone()
        cache.refresh()
    # All find it full, and leave out the same rows that cannot be read.
    fill_cache(corpus, cache, run.processor, encode, recipe.data.speeds, report=report, workers=recipe.num_workers)
    run.say(f"cache: {len(cache):,} clips, {cache.nbytes / 2**20:.0f} MB in {cache.folder}")
    return cache


def stage_data(run: "Run", stage: Stage, number: int, arguments: TrainingArguments):
    """(dataset, schedule or None for streams, cache or None, token rate or None)."""
    recipe = run.recipe
    rank, world_size = arguments.process_index, arguments.world_size
    sources = stage.data or recipe.data.train
    sounds, described = run.model.model.readout.learns_sounds, run.model.model.clip_tokens is not None
    room = PromptRoom(run.processor, run.model.config, recipe.instructions, recipe.text_case, run.align_tokenizer)
    confusions = run_confusions(run, stage)
    if recipe.data.streaming:
        fits = None if stage.loss == "align" else room
        stream = StreamingSet(sources, run.bad, run.processor, stage, recipe, rank, world_size, sounds, fits,
                              confusions, described)  # fmt: skip
        return stream, None, None, None
    corpus = run.corpora[data_key(recipe, stage)]
    if stage.loss == "align":
        corpus = teaching_alignment(run, corpus, sounds, described)
    cache = stage_cache(run, stage, corpus)
    rate = token_rate(room, corpus)
    check_rows_without_audio(stage, corpus)
    if stage.loss != "align":
        corpus = without_long_prompts(run, corpus, room)
    if stage.distills:
        corpus = teaching_to_hear(run, stage, corpus, room)
    schedule = BatchSchedule(
        [row.seconds for row in corpus.rows],
        steps=stage.steps,
        epochs=stage.epochs,
        batch_size=stage.batch_size,
        batch_seconds=stage.batch_seconds,
        batch_tokens=stage.batch_tokens,
        tokens=[row.tokens for row in corpus.rows],
        group_by_length=stage.group_by_length,
        grad_accum=stage.grad_accum,
        sources=[row.table for row in corpus.rows],
        weights=[source.weight for source in sources],
        speeds=recipe.data.speeds,
        seed=recipe.seed + number,
        rank=rank,
        world_size=world_size,
    )
    words = (recipe.instructions, recipe.seed, stage.time_stretch, recipe.text_case)
    dataset = TrainingSet(corpus, run.processor, cache, *words, confusions)
    return dataset, schedule, cache, rate


def check_rows_without_audio(stage: Stage, corpus: Corpus) -> None:
    """RecipeError where a stage could not train on rows of text alone: nothing bounds a batch of them, or there are no
    others to train the parts that hear."""
    silent = sum(not row.lengths for row in corpus.rows)
    unheard = sum(not row.lengths or corpus.simulated(row) for row in corpus.rows)
    if silent and stage.batch_seconds is not None and stage.batch_tokens is None:
        raise RecipeError(
            f"stage {stage.name}: {silent:,} rows have no audio, so batch_seconds does not bound a batch of them; give "
            "batch_tokens, too"
        )
    if unheard == len(corpus) and stage.tune.llm == "frozen":
        raise RecipeError(f"stage {stage.name}: no row with audio, so only the LLM could learn, and it is frozen")


def teaching_alignment(run: "Run", corpus: Corpus, sounds: bool, described: bool) -> Corpus:
    """The corpus without rows that teach the loss align nothing: it is not known what is said in their clips, with
    `sounds` not what is heard, and with `described` not what they are like as a whole."""
    rows = [
        row
        for row in corpus.rows
        if row.spoken or (row.lengths and ((sounds and row.sounds) or (described and row.described)))
    ]
    if len(rows) == len(corpus):
        return corpus
    if not rows:
        raise RecipeError(
            "a stage with loss align needs clips of which it is known what is said, words in the order in which they "
            "are heard; train these with loss lm, or with `readout: mixed` what is heard, with `clip_tokens` who speaks"
        )
    run.say(f"align: {len(corpus) - len(rows):,} rows are left out, nothing is known of what is said in their clips")
    return corpus.only(rows)


def teaching_to_hear(run: "Run", stage: Stage, corpus: Corpus, room: PromptRoom) -> Corpus:
    """The corpus for a stage that distills: with distill alone only the rows that have a teacher, beside another loss
    all of them. RecipeError where none has."""
    rows = [row for row in corpus.rows if room.can_be_taught(corpus.example(row))]
    if not rows:
        raise RecipeError(
            f"stage {stage.name}: distill needs questions about clips of which it is known what is said (a column "
            "`transcript` beside question and answer); a transcript alone would only be copied"
        )
    left = len(corpus) - len(rows)
    if left:
        what = "left out" if stage.loss == "distill" else f"trained with loss {stage.loss} alone"
        run.say(f"distill: {left:,} rows are {what}, who reads what is said in them, if that is known, is no teacher")
    return corpus.only(rows) if stage.loss == "distill" else corpus


def without_long_prompts(run: "Run", corpus: Corpus, room: PromptRoom) -> Corpus:
    """The corpus without rows whose prompt exceeds the LLM's context; they are listed among the bad rows."""
    if not room.context:
        return corpus
    slowest, rate = min(run.recipe.data.speeds), run.processor.sampling_rate
    kept = []
    for row in corpus.rows:
        samples, task = [int(seconds / slowest * rate) for seconds in row.lengths], corpus.tables[row.table].task
        fits = not corpus.simulated(row) and room.surely_holds(row, task, samples)
        excess = None if fits else room.excess(corpus.example(row), samples)
        if excess is None:
            kept.append(row)
        else:
            corpus.drop(row, f"{excess} ({row.seconds:.0f} s)")
    if not kept:
        raise ValueError(f"no usable rows are left; see {corpus.bad.path}")
    return corpus.only(kept)


def stage_augment(stage: Stage) -> Augment | None:
    """Noise and SpecAugment of a stage, on the encoder's output; None for neither."""
    if not stage.noise and stage.spec_augment is None:
        return None
    masks = stage.spec_augment
    return Augment(
        time_masks=masks.time_masks if masks else 0.0,
        time_width=masks.time_width if masks else 0,
        feature_dropout=masks.feature_prob if masks else 0.0,
        noise=stage.noise,
    )


class StageCollator:
    """AudioPhiCollator for a stage. Its batches also name their rows, `drawn`: (epoch, number) of each, those of a
    stream the `position` behind them, and where the stage augments `augment_seeds` (windows,) int64."""

    def __init__(self, run: "Run", stage: Stage):
        self.seed = run.recipe.seed if stage_augment(stage) else None
        self.collate = AudioPhiCollator(
            run.processor,
            mode="lm" if stage.loss == "distill" else stage.loss,
            align_tokenizer=run.align_tokenizer,
            learn_sounds=run.model.model.readout.learns_sounds,
            describe=run.model.model.clip_tokens is not None,
            text_case=run.recipe.text_case,
            loss_on=run.recipe.loss_on,
            length_normalization=stage.length_normalization,
            written=stage.written,
            distill=stage.distills,
            context=getattr(run.model.config.text_config, "max_position_embeddings", None),
        )

    def __call__(self, examples: list[dict]) -> dict:
        batch = dict(self.collate(examples))
        batch["drawn"] = [(example["epoch"], example["id"]) for example in examples]
        if "position" in examples[0]:
            batch["position"] = examples[0]["position"]
        if self.seed is not None and "audio_num_windows" in batch:
            clips = [
                (example["epoch"], example["id"], place)
                for example in examples
                for place, clip in enumerate(example["clips"])
                if HEARD not in clip
            ]
            windows = batch["audio_num_windows"].tolist()
            seeds = [
                seed_of(self.seed, *clip, window)
                for clip, count in zip(clips, windows, strict=True)
                for window in range(count)
            ]
            batch["augment_seeds"] = torch.tensor(seeds)
        return batch
