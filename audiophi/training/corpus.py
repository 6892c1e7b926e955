"""The training rows: what can be used, how long it is, and its audio as encoder outputs, features or samples.

Rows that cannot be used are listed in `bad_rows.jsonl` and left out; above a settable share of them the run stops,
naming that list. A row is known by its source and number, never by its id, which may repeat.
"""

import contextlib
import copy
import dataclasses
import gc
import itertools
import os
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import NamedTuple

from accelerate import PartialState
from torch.utils.data import Dataset

from audiophi.data.augment import speed_perturb, stretch_time
from audiophi.data.collator import training_item
from audiophi.data.dataset_registry import missing_audio_is_normal
from audiophi.data.datasets import load_examples
from audiophi.data.example import Clip, Example, drawing, posed
from audiophi.tasks import wordings
from processing.audio_io import AudioError

from .audio_index import AudioIndex
from .bad_rows import BadRows, TooManyBadRows
from .batches import Draw
from .feature_cache import FeatureCache, clip_key
from .recipe import Source
from .row_facts import Facts, measure_seconds
from .row_index import RowIndex
from .simulated import Confusions


class Row(NamedTuple):
    """A usable row, and what is asked of all rows before a training: to make every example again would take minutes.

    Where it is (`table`, `index`); the seconds of its clips and their files, None for audio that the row itself holds;
    the bytes of its longest prompt's text with the answer, and its turns, none where its task asks in its own words;
    whether CTC can learn from it, whether a readout that `learns_sounds` can, and whether clip tokens can.
    """

    table: int
    index: int
    lengths: tuple[float, ...]
    files: tuple[str | None, ...]
    bytes: int
    turns: int
    spoken: bool
    sounds: bool
    described: bool

    @property
    def seconds(self) -> float:
        return sum(self.lengths)

    @property
    def tokens(self) -> int:
        """About how many of text there are at most: a third of its bytes."""
        return self.bytes // 3 + 1


class Corpus:
    """The usable rows of one or more sources.

    Args:
        sources: from the recipe. bad: collects the others. text_case: see `normalise_transcript`.
        cache_dir: where lengths and hashes of audio files are kept, None for nowhere. together: see `AudioIndex`.
    Raises:
        ValueError for sources that hold nothing usable; TooManyBadRows.
    """

    def __init__(
        self,
        sources: list[Source],
        bad: BadRows,
        text_case: str = "lower",
        cache_dir: str | None = None,
        together: bool = True,
    ):
        self.sources, self.bad, self.rows, self.text_case = sources, bad, [], text_case
        self._hashes: dict[tuple[int, int, int], str] = {}
        self._said, self._sounds = {}, {}  # texts for the alignment's vocabulary, as keys
        # The first question about one clip of each kind, of each source where it names no kinds: what a demo offers.
        self.questions: dict[tuple, str] = {}
        paths = dict.fromkeys(source.path for source in sources)
        self._indexes = {path: AudioIndex(cache_dir, path, together) for path in paths}
        bad.total = 0
        self.tables = [load_examples(source_spec(source)) for source in sources]
        self.incomplete = [missing_audio_is_normal(source.path) for source in sources]
        total = sum(len(table) for table in self.tables)
        facts = [RowIndex(cache_dir, table, text_case) for table in self.tables]
        if together and cache_dir is not None and PartialState().num_processes > 1:
            self._measure_part(facts, PartialState())
        with no_garbage():
            for number, source in enumerate(facts):
                index = itertools.count()
                for rows, questions in source.parts():
                    for task, kind, question in questions:
                        self.questions.setdefault((task or number, kind), question)
                    for row in rows:
                        self._add(number, next(index), row)
        self.share()
        bad.total = total
        if not self.rows:
            raise ValueError(
                f"no usable rows in {', '.join(s.path for s in sources)}: {len(bad)} bad ones are listed in {bad.path}"
            )
        if len(bad) > bad.max_share * total:
            raise TooManyBadRows(
                f"{len(bad)} of {total} rows cannot be used, more than data.max_bad_rows = {bad.max_share:g} allows. "
                f"They are listed with the reasons in {bad.path}"
            )

    def _add(self, number: int, index: int, facts: Facts) -> None:
        source = self.sources[number]
        gone = [file for file in facts.files if file and not os.path.exists(file)] if self.incomplete[number] else []
        if gone:
            self.bad.add(source.path, index, facts.id, f"{gone[0]}: no such file", expected=True)
            return
        if facts.reason is not None:
            self.bad.add(source.path, index, facts.id, facts.reason)
            return
        try:
            lengths = tuple(self._lengths(source, facts))
        except (AudioError, OSError) as error:
            self.bad.add(source.path, index, facts.id, str(error))
            return
        if source.max_seconds is None or sum(lengths) <= source.max_seconds:
            if source.heard != "simulated":
                self._said |= dict.fromkeys(facts.said)
                self._sounds |= dict.fromkeys(facts.sounds)
            self._hashes |= {(number, index, clip): held for clip, held in enumerate(facts.hashes) if held}
            heard = (bool(facts.said), bool(facts.sounds), facts.described)
            self.rows.append(Row(number, index, lengths, tuple(facts.files), facts.bytes, facts.turns, *heard))

    def _lengths(self, source: Source, facts: Facts) -> Iterator[float]:
        """Seconds of a row's clips, of their files where the row does not say. Raises AudioError or OSError."""
        for seconds, file in zip(facts.lengths, facts.files, strict=True):
            measure = partial(measure_seconds, Clip({"path": file}), facts.id)
            yield seconds or self._indexes[source.path].seconds(file, measure)

    def _measure_part(self, facts: list[RowIndex], state: PartialState) -> None:
        """Looks at one of as many parts of rows and files as there are processes, and waits for the others."""
        part = slice(state.process_index, None, state.num_processes)
        for index in facts:
            index.make(part)
        state.wait_for_everyone()
        for source, index in zip(self.sources, facts, strict=True):
            for rows, _ in index.parts():
                for row in (row for row in rows[part] if row.reason is None):
                    with contextlib.suppress(AudioError, OSError):  # all will list it
                        list(self._lengths(source, row))
        self.share()

    def share(self) -> None:
        """Keeps what was found out about audio files; with several processes, all of them at once."""
        for index in self._indexes.values():
            index.share()

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def hours(self) -> float:
        return sum(row.seconds for row in self.rows) / 3600

    @property
    def tasks(self) -> list[str]:
        """Names of the sources' tasks, each once."""
        return list(dict.fromkeys(table.task for table in self.tables))

    def simulated(self, row: Row) -> bool:
        """Whether a row's clips are known by their words only."""
        return self.sources[row.table].heard == "simulated"

    def example(self, row: Row) -> Example:
        return self.tables[row.table][row.index]

    def texts(self, sounds: bool = False) -> Iterable[str]:
        """What is said in the clips, which the alignment's vocabulary must spell; with `sounds` also the words that
        say what is heard. Not of simulated clips: no audio would teach the alignment those words."""
        return itertools.chain(self._said, self._sounds if sounds else ())

    def waveform(self, row: Row, clip: int, speed: float, sampling_rate: int):
        """(samples,) float32 of a row's clip at `sampling_rate`, played `speed` times faster. Raises AudioError."""
        example = self.example(row)
        waveform = example.clips[clip].read(example.id, sampling_rate)
        return waveform if speed == 1 else speed_perturb(waveform, speed, sampling_rate)

    def key(self, row: Row, clip: int, speed: float) -> str:
        """The cache's key of a row's clip. Raises OSError for a file that cannot be read."""
        place = (row.table, row.index, clip)
        if place not in self._hashes:
            self._hashes[place] = self._indexes[self.sources[row.table].path].hash(row.files[clip])
        return clip_key(self._hashes[place], speed)

    def drop(self, row: Row, reason: str) -> None:
        """Records a row as bad; `prune()` removes it."""
        self.bad.add(self.sources[row.table].path, row.index, self.example(row).id, reason)

    def prune(self) -> None:
        """Removes the rows that were dropped."""
        rows = [row for row in self.rows if (self.sources[row.table].path, row.index) not in self.bad.reasons]
        if self.rows and not rows:
            raise ValueError(f"no usable rows are left; see {self.bad.path}")
        self.rows = rows

    def only(self, rows: list[Row]) -> "Corpus":
        """The same with some of the rows; bad rows are recorded for the whole."""
        part = copy.copy(self)
        part.rows = rows
        return part

    def part(self, number: int, parts: int) -> "Corpus":
        """One of `parts` equal parts, of long and short clips alike."""
        return self.only(sorted(self.rows, key=lambda row: row.seconds)[number::parts])


@contextlib.contextmanager
def no_garbage():
    """For work that makes many small objects and no cycles: Python would look for these in all of them, again and
    again."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def source_spec(source: Source) -> dict:
    """A source as `load_examples` takes it: weights and lengths are the batch schedule's and the corpus's business."""
    spec = dataclasses.asdict(source)
    return {key: value for key, value in spec.items() if key not in ("weight", "max_seconds") and value is not None}


class TrainingSet(Dataset):
    """`dataset[Draw]` -> an item for `AudioPhiCollator`: cached encoder outputs, or features where there is no cache.

    `instructions`: by task, as the recipe has them. `confusions`: make what is heard of clips without audio.
    """

    def __init__(
        self,
        corpus: Corpus,
        processor,
        cache: FeatureCache | None,
        instructions: dict[str, list[str]],
        seed: int = 0,
        time_stretch: float = 0.0,
        text_case: str = "lower",
        confusions: Confusions | None = None,
    ):
        self.confusions = confusions
        self.corpus, self.processor, self.cache = corpus, processor, cache
        self.instructions, self.text_case = instructions, text_case
        self.seed, self.time_stretch = seed, time_stretch

    def __len__(self) -> int:
        return len(self.corpus)

    def __getitem__(self, draw: Draw) -> dict:
        """An unreadable row is recorded and the next readable one takes its place."""
        for offset in range(len(self)):
            number = (draw.row + offset) % len(self)
            row = self.corpus.rows[number]
            try:
                return self._item(row, draw._replace(row=number))
            except (AudioError, OSError) as error:
                self.corpus.drop(row, str(error))
        raise ValueError(f"none of the {len(self)} rows can be read; see {self.corpus.bad.path}")

    def describe(self, epoch: int, number: int) -> dict:
        """What row `number` is, for people: its id and source, its words, and where its audio lies."""
        row = self.corpus.rows[number]
        example = self.corpus.example(row)
        path = next(((clip.audio or {}).get("path") for clip in example.clips), None)
        told = {"id": example.id, "source": example.source, "audio": path, "text": example.reference}
        return {**told, "row": number, "epoch": epoch}

    def _item(self, row: Row, draw: Draw) -> dict:
        clips = [self._clip(row, clip, draw) for clip in range(len(row.lengths))]
        choose = drawing(self.seed, draw.epoch, draw.row)
        return item_of(self.corpus.example(row), clips, self.instructions, choose, self.text_case, draw.row, draw.epoch)

    def _clip(self, row: Row, clip: int, draw: Draw) -> dict:
        if self.corpus.simulated(row):
            transcript = self.corpus.example(row).clips[clip].transcript
            return self.confusions.clip(transcript, self.seed, draw.epoch, draw.row, clip)
        if self.cache is None:
            waveform = self.corpus.waveform(row, clip, draw.speed, self.processor.sampling_rate)
            return self.processor.encode_audio((waveform, self.processor.sampling_rate))
        windows = self.cache.get(self.corpus.key(row, clip, draw.speed))
        if self.time_stretch:
            windows = [stretch_time(w, self.time_stretch, self.seed, draw.epoch, draw.row) for w in windows]
        return {"audio_hidden_states": windows}


def item_of(example: Example, clips, instructions, draw: Callable, text_case: str, number: int, epoch: int) -> dict:
    """An example as the collator takes it, asked in the recipe's words."""
    example = posed(example, draw)
    asked = wordings(example.task, instructions)
    return training_item(example, clips, wordings=asked, draw=draw, text_case=text_case, id=number, epoch=epoch)
