"""What a stage trains on: corpus, cached encoder outputs, order of batches, augmentation, collator."""

import copy
import json
from dataclasses import asdict
from typing import TYPE_CHECKING

from accelerate import PartialState
from transformers import TrainingArguments

from audiophi.data.augment import Augment
from audiophi.data.collator import AudioPhiCollator
from modeling_audiophi.adapters import adapter_class

from .batches import BatchSchedule
from .cache_filling import fill_cache, open_cache, uses_cache
from .corpus import Corpus, StreamingSet, TrainingSet
from .feature_cache import FeatureCache
from .plan import token_rate
from .prompt_room import PromptRoom
from .recipe import Recipe, RecipeError, Stage

if TYPE_CHECKING:
    from .stages import Run


def data_key(recipe: Recipe, stage: Stage) -> str:
    """Equal for stages that train on the same sources."""
    return json.dumps([asdict(source) for source in stage.data or recipe.data.train])


def stage_cache(run: "Run", stage: Stage, corpus: Corpus) -> FeatureCache | None:
    """The filled cache of a stage with a frozen encoder; None where the encoder must run: tuned, a learned layer mix,
    or no cache."""
    recipe = run.recipe
    if not uses_cache(recipe, stage):
        if recipe.cache and stage.tune.encoder == "frozen":
            run.say("cache: off, a learned layer mix needs all layers of the encoder")
        return None
    cache, encode = open_cache(recipe, run.model, run.processor)

    def report(done, total):
        if done == total or done // 1000 != (done - 16) // 1000:
            run.say(f"cache: {done:,} of {total:,} clips encoded")

    state = PartialState()
    if state.num_processes > 1:  # each encodes its part
        part = corpus.part(state.process_index, state.num_processes)
        fill_cache(part, cache, run.processor, encode, recipe.data.speeds, report=report)
        state.wait_for_everyone()
        cache.refresh()
    # All find it full, and leave out the same rows that cannot be read.
    fill_cache(corpus, cache, run.processor, encode, recipe.data.speeds, report=report)
    run.say(f"cache: {len(cache):,} clips, {cache.nbytes / 2**20:.0f} MB in {cache.folder}")
    return cache


def stage_data(run: "Run", stage: Stage, number: int, arguments: TrainingArguments):
    """(dataset, schedule or None for streams, cache or None, token rate or None)."""
    recipe = run.recipe
    rank, world_size = arguments.process_index, arguments.world_size
    sources = stage.data or recipe.data.train
    if recipe.data.streaming:
        captions = run.model.model.readout.learns_captions
        context = getattr(run.model.config.text_config, "max_position_embeddings", None)
        asked = [source.instruction for source in sources if source.instruction]
        room = prompt_room(run, context, asked) if context and stage.loss != "align" else None
        stream = StreamingSet(sources, run.bad, run.processor, stage, recipe, rank, world_size, captions, room)
        return stream, None, None, None
    corpus = run.corpora[data_key(recipe, stage)]
    if stage.loss == "align" and not run.model.model.readout.learns_captions:
        corpus = with_transcripts(run, corpus)
    cache = stage_cache(run, stage, corpus)
    rate = token_rate(run.model, run.processor, corpus, recipe.instructions + recipe.caption_instructions)
    if stage.loss != "align":
        corpus = without_long_prompts(run, corpus, rate["context"])
    schedule = BatchSchedule(
        [row.seconds for row in corpus.rows],
        steps=stage.steps,
        epochs=stage.epochs,
        batch_size=stage.batch_size,
        batch_seconds=stage.batch_seconds,
        grad_accum=stage.grad_accum,
        sources=[row.table for row in corpus.rows],
        weights=[source.weight for source in sources],
        speeds=recipe.data.speeds,
        seed=recipe.seed + number,
        rank=rank,
        world_size=world_size,
    )
    words = (recipe.instructions, recipe.seed, stage.time_stretch, recipe.caption_instructions)
    dataset = TrainingSet(corpus, run.processor, cache, *words)
    return dataset, schedule, cache, rate


def with_transcripts(run: "Run", corpus: Corpus) -> Corpus:
    """The corpus without captioned clips: CTC needs words in the order in which they are heard."""
    rows = [row for row in corpus.rows if row.task != "caption"]
    if len(rows) == len(corpus):
        return corpus
    if not rows:
        raise RecipeError(
            "a stage with loss align has only captions as data; train them with loss lm, or with `readout: mixed`"
        )
    left_out = len(corpus) - len(rows)
    run.say(f"align: {left_out:,} captioned clips are left out, only the readout mixed learns their words")
    spoken = copy.copy(corpus)
    spoken.rows = rows
    return spoken


def prompt_room(run: "Run", context: int, asked: list[str]) -> PromptRoom:
    """What the stage's prompts must fit into; `asked`: instructions beside the recipe's."""
    recipe = run.recipe
    instructions = [*recipe.instructions, *recipe.caption_instructions, *asked]
    return PromptRoom(run.processor, context, instructions, run.model.config.readout == "frames", recipe.text_case)


def without_long_prompts(run: "Run", corpus: Corpus, context: int) -> Corpus:
    """The corpus without clips whose prompt exceeds the LLM's context; they are listed among the bad rows."""
    if not context:
        return corpus
    room = prompt_room(run, context, [row.instruction for row in corpus.rows if row.instruction])
    slowest = min(run.recipe.data.speeds)
    kept = []
    for row in corpus.rows:
        tokens = run.processor.num_audio_tokens(int(row.seconds / slowest * run.processor.sampling_rate))
        excess = room.excess([row.text, *row.captions], tokens)
        if excess is None:
            kept.append(row)
        else:
            corpus.drop(row, f"{excess} ({row.seconds:.0f} s)")
    if not kept:
        raise ValueError(f"no usable rows are left; see {corpus.bad.path}")
    shorter = copy.copy(corpus)
    shorter.rows = kept
    return shorter


def stage_augment(recipe: Recipe, stage: Stage) -> Augment | None:
    """Feature noise and SpecAugment of a stage; None for neither."""
    if not stage.noise and stage.spec_augment is None:
        return None
    masks = stage.spec_augment
    return Augment(
        time_masks=masks.time_masks if masks else 0.0,
        time_width=masks.time_width if masks else 0,
        feature_dropout=masks.feature_prob if masks else 0.0,
        noise=stage.noise,
        seed=recipe.seed,
    )


class StageCollator:
    """AudioPhiCollator for a stage. Its batches also name their rows, `drawn`: (epoch, number) of each; with `live`
    also every window, for the augmentation of live encoder outputs."""

    def __init__(self, run: "Run", stage: Stage, augment: Augment | None, live: bool):
        adapter = run.model.config.adapter_config
        self.live = live
        self.collate = AudioPhiCollator(
            run.processor,
            mode=stage.loss,
            align_tokenizer=run.align_tokenizer,
            learn_captions=run.model.model.readout.learns_captions,
            augment=augment,
            text_case=run.recipe.text_case,
            adapter_length_rule=adapter_class(adapter).length_rule(adapter),
        )

    def __call__(self, examples: list[dict]) -> dict:
        batch = dict(self.collate(examples))
        batch["drawn"] = [(example["epoch"], example["id"]) for example in examples]
        if self.live:
            windows = batch["audio_num_windows"].tolist()
            batch["augment_keys"] = [
                (example["epoch"], example["id"], window)
                for example, count in zip(examples, windows, strict=True)
                for window in range(count)
            ]
        return batch
