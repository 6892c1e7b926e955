"""The confusions of a run, which its simulated clips are made with: on which real clips they are measured, and when."""

from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
from accelerate import PartialState

from audiophi.data.collator import as_windows
from audiophi.data.dataset_streams import stream_examples
from audiophi.data.example import RowError
from processing.audio_io import AudioError

from .bad_rows import BadRows
from .cache_filling import encoding_progress, fill_cache, open_cache, uses_cache
from .corpus import Corpus, source_spec
from .recipe import RecipeError, Source, Stage
from .simulated import Confusions, hear_clips, measure, reference_tokenizer

if TYPE_CHECKING:
    from .stages import Run

CONFUSIONS_NAME = "confusions.safetensors"  # in the run's folder
MEASURED = 400  # rows of real clips; some ten thousand tokens
# Sources are searched for clips with known words up to so many rows.
SEARCHED = 20 * MEASURED


def run_confusions(run: "Run", stage: Stage) -> Confusions | None:
    """The run's confusions, measured by the first stage that needs them with the model as it is then, and kept for all
    later ones and for a resumed run. None for a stage without simulated clips.

    Raises RecipeError for a readout that does not read words, without a real clip of which the words are known, and
    where the alignment hears none of them.
    """
    recipe = run.recipe
    if not any(source.heard == "simulated" for source in stage.data or recipe.data.train):
        return None
    readout = run.model.config.readout
    if readout == "frames":
        raise RecipeError(
            f"stage {stage.name}: heard: simulated gives the LLM words, but readout {readout} gives it frames; use "
            "collapse or mixed"
        )
    tokenize = reference_tokenizer(run.align_tokenizer, recipe.text_case)
    path, state = run.folder / CONFUSIONS_NAME, PartialState()
    if state.is_main_process and not path.exists():
        hear = partial(hear_clips, run.model, run.processor)
        confusions = measure(hear, measured_clips(run, stage), tokenize)
        if not len(confusions.times):
            raise RecipeError(
                f"stage {stage.name}: heard: simulated needs real clips of which it is known what is said, to measure "
                "what the alignment confuses, but there are none in its data or data.train; name some in "
                "data.heard_from"
            )
        if not len(confusions.tokens):
            raise RecipeError(
                f"stage {stage.name}: heard: simulated: the alignment hears none of the words of "
                f"{confusions.times.sum():,} tokens of real clips, so nothing would be left of any text; train it first"
            )
        confusions.save(path)
    state.wait_for_everyone()
    confusions = Confusions.load(path, tokenize)
    run.say(f"stage {stage.name}: simulated clips: {confusions.describe()}")
    return confusions


def measured_clips(run: "Run", stage: Stage) -> Iterator[tuple[str, dict]]:
    """(what is said, encoded clip) of up to MEASURED real rows: of `data.heard_from`, else of the stage's own sources,
    else of data.train's."""
    data = run.recipe.data
    choices = [data.heard_from] if data.heard_from else [stage.data or data.train, data.train]
    for sources in choices:
        real = [source for source in sources if source.heard != "simulated"]
        if not real:
            continue
        found = False
        for clip in streamed_clips(run, real) if data.streaming else corpus_clips(run, stage, real):
            found = True
            yield clip
        if found:
            return


def streamed_clips(run: "Run", sources: list[Source]) -> Iterator[tuple[str, dict]]:
    """Of the first rows of a stream."""
    found, rate = 0, run.processor.sampling_rate
    for number, example in enumerate(stream_examples([source_spec(source) for source in sources])):
        if found >= MEASURED or number >= SEARCHED:
            return
        if isinstance(example, RowError) or not any(clip.transcript for clip in example.clips):
            continue
        found += 1
        for clip in example.clips:
            if clip.transcript:
                try:
                    waveform = clip.read(example.id, rate)
                except (AudioError, OSError):
                    continue  # training will list it
                yield clip.transcript, run.processor.encode_audio((waveform, rate))


def corpus_clips(run: "Run", stage: Stage, sources: list[Source]) -> Iterator[tuple[str, dict]]:
    """Of rows drawn from a corpus, by the encoder's cached outputs where the stage reads these."""
    recipe, processor = run.recipe, run.processor
    # A list of its own: rows that are only measured do not count among those to train on.
    bad = BadRows(run.folder / "bad_rows_heard.jsonl", 1.0)
    corpus = Corpus(sources, bad, recipe.text_case, recipe.cache_dir, together=False)
    rows = [row for row in corpus.rows if row.spoken]
    drawn = np.random.default_rng(recipe.seed).permutation(len(rows))[:MEASURED]
    # Neighbours in length are heard together.
    corpus = corpus.only(sorted((rows[number] for number in drawn), key=lambda row: row.seconds))
    speed = 1.0 if 1.0 in recipe.data.speeds else recipe.data.speeds[0]
    cache = None
    if uses_cache(recipe, stage, run.model.config.encoder_layer) and corpus.rows:
        cache, encode = open_cache(recipe, run.model, processor)
        report = encoding_progress(run.say)
        fill_cache(corpus, cache, processor, encode, [speed], report=report, workers=recipe.num_workers)
    for row in corpus.rows:
        for place, clip in enumerate(corpus.example(row).clips):
            if not clip.transcript:
                continue
            if cache is not None:
                yield clip.transcript, as_windows({"audio_hidden_states": cache.get(corpus.key(row, place, speed))})
                continue
            try:
                waveform = corpus.waveform(row, place, speed, processor.sampling_rate)
                yield clip.transcript, processor.encode_audio((waveform, processor.sampling_rate))
            except (AudioError, OSError) as error:
                corpus.drop(row, str(error))
