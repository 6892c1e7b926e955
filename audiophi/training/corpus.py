"""The training rows: what can be used, how long it is, and its audio as encoder outputs, features or samples.

Rows that cannot be used are listed in `bad_rows.jsonl` and left out; above a settable share of them the run stops,
naming that list. A row is known by its source and number, never by its id, which may repeat.
"""

import contextlib
import copy
import dataclasses
import io
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import soundfile
from accelerate import PartialState
from torch.utils.data import Dataset

from audiophi.data.alignment_text import normalise_transcript
from audiophi.data.augment import speed_perturb, stretch_time
from audiophi.data.collator import training_item
from audiophi.data.dataset_registry import missing_audio_is_normal
from audiophi.data.datasets import load_examples
from audiophi.data.example import Clip, Example, RowError, drawing, longest, posed
from audiophi.tasks import TASKS, wordings
from processing.audio_io import MAX_SECONDS, AudioError, check_file

from .audio_index import AudioIndex
from .bad_rows import BadRows, TooManyBadRows
from .batches import Draw
from .feature_cache import FeatureCache, clip_key, hash_audio
from .recipe import Source
from .simulated import Confusions

# How long a clip would be that is known by its words only, for batches by seconds: what English is read at.
CHARACTERS_PER_SECOND = 15


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
        if together and PartialState().num_processes > 1:
            self._measure_part(PartialState())
        for number, table in enumerate(self.tables):
            for index in range(len(table)):
                self._add(number, index)
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

    def _add(self, number: int, index: int) -> None:
        source = self.sources[number]
        try:
            example = self.tables[number][index]
        except RowError as error:
            self.bad.add(source.path, index, error.id or f"row {index + 1}", str(error))
            return
        gone = self.incomplete[number] and missing_file(example)
        if gone:
            self.bad.add(source.path, index, example.id, f"{gone}: no such file", expected=True)
            return
        if lacks_words(example, self.text_case):
            self.bad.add(source.path, index, example.id, "has no text")
            return
        try:
            lengths = tuple(clip.seconds or self._measure(source, clip, example.id) for clip in example.clips)
        except (AudioError, OSError) as error:
            self.bad.add(source.path, index, example.id, str(error))
            return
        if source.max_seconds is None or sum(lengths) <= source.max_seconds:
            task, asked = TASKS[example.task], longest(example)
            size = text_bytes(asked, (task.target(text, self.text_case) for text in example.references))
            said = [clip.transcript for clip in example.clips if clip.transcript is not None]
            sounds = [text for text in map(task.sounds, example.references) if text is not None]
            if source.heard != "simulated":
                self._said |= dict.fromkeys(said)
                self._sounds |= dict.fromkeys(sounds)
            if len(example.clips) == 1:
                self._note_questions(number, example)
            files = tuple(file_of(clip) for clip in example.clips)
            turns = len(asked.messages)
            described = any(clip.described for clip in example.clips)
            self.rows.append(Row(number, index, lengths, files, size, turns, bool(said), bool(sounds), described))

    def _note_questions(self, number: int, example: Example) -> None:
        for question in example.questions:
            key = (example.task, question.kind)
            if key not in self.questions and question.templates:
                self.questions[key] = question.wordings[0]
        key = (number, example.kind)
        if key not in self.questions and [message["role"] for message in example.messages] == ["user"]:
            content = example.messages[0]["content"]
            texts = [content] if isinstance(content, str) else [item.get("text", "") for item in content]
            self.questions[key] = " ".join(filter(None, texts))

    def _measure(self, source: Source, clip: Clip, name: str) -> float:
        measure, file = partial(measure_seconds, clip, name), file_of(clip)
        return self._indexes[source.path].seconds(file, measure) if file else measure()

    def _measure_part(self, state: PartialState) -> None:
        """Measures one of as many parts of the files as there are processes, and waits for the others."""
        for source, table in zip(self.sources, self.tables, strict=True):
            for index in range(state.process_index, len(table), state.num_processes):
                with contextlib.suppress(RowError, AudioError, OSError):  # all will list it
                    example = table[index]
                    for clip in example.clips:
                        if clip.seconds is None and file_of(clip):
                            self._measure(source, clip, example.id)
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

    def texts(self, text_case: str, sounds: bool = False) -> Iterable[str]:
        """What is said in the clips, which the alignment's vocabulary must spell; with `sounds` also the words that
        say what is heard. Not of simulated clips: no audio would teach the alignment those words."""
        for text in [*self._said, *(self._sounds if sounds else ())]:
            yield normalise_transcript(text, text_case)

    def waveform(self, row: Row, clip: int, speed: float, sampling_rate: int):
        """(samples,) float32 of a row's clip at `sampling_rate`, played `speed` times faster. Raises AudioError."""
        example = self.example(row)
        waveform = example.clips[clip].read(example.id, sampling_rate)
        return waveform if speed == 1 else speed_perturb(waveform, speed, sampling_rate)

    def key(self, row: Row, clip: int, speed: float) -> str:
        """The cache's key of a row's clip. Raises OSError for a file that cannot be read."""
        place = (row.table, row.index, clip)
        if place not in self._hashes and row.files[clip]:
            self._hashes[place] = self._indexes[self.sources[row.table].path].hash(row.files[clip])
        elif place not in self._hashes:
            audio = self.example(row).clips[clip].audio
            self._hashes[place] = hash_audio(repr_bytes(audio) if audio.get("bytes") is None else audio["bytes"])
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


def source_spec(source: Source) -> dict:
    """A source as `load_examples` takes it: weights and lengths are the batch schedule's and the corpus's business."""
    spec = dataclasses.asdict(source)
    return {key: value for key, value in spec.items() if key not in ("weight", "max_seconds") and value is not None}


def lacks_words(example: Example, text_case: str) -> bool:
    """Whether nothing that can be learned is left of a right answer."""
    task = TASKS[example.task]
    return any(text.strip() and not task.target(text, text_case).strip() for text in example.references)


def file_of(clip: Clip) -> str | None:
    """The path of a clip whose audio is in a file of its own."""
    audio = clip.audio or {}
    return audio.get("path") if audio.get("bytes") is None and "array" not in audio else None


def missing_file(example: Example) -> str | None:
    """The path of a clip that is not there."""
    paths = [(clip.audio or {}).get("path") for clip in example.clips]
    return next((path for path in paths if path and not Path(path).exists()), None)


def text_tokens(example: Example) -> int:
    """About how many tokens of text an example has at most: a third of its bytes."""
    return text_bytes(longest(example), example.references) // 3 + 1


def text_bytes(example: Example, answers: Iterable[str]) -> int:
    """Bytes of the text of an example's turns and of the longest of its answers."""
    texts = [max(answers, key=len, default="")]
    for message in example.messages:
        content = message["content"]
        texts += [content] if isinstance(content, str) else [item.get("text", "") for item in content]
    return sum(len(text.encode()) for text in texts)


def repr_bytes(audio: dict) -> bytes:
    """Samples that a row itself holds, and their rate, as bytes."""
    samples = np.asarray(audio["array"], dtype=np.float32)
    return f"{audio.get('sampling_rate')} ".encode() + samples.tobytes()


def measure_seconds(clip: Clip, name: str) -> float:
    """Length of a clip, from the file's header where possible, else by decoding; of a simulated one estimated. Raises
    AudioError or OSError."""
    if clip.simulated:
        return max(1, len(clip.transcript)) / CHARACTERS_PER_SECOND
    audio = clip.audio
    if audio is not None and (audio.get("bytes") is not None or audio.get("path")):
        try:
            if audio.get("bytes") is None:
                check_file(audio["path"])
            info = soundfile.info(audio["path"] if audio.get("bytes") is None else io.BytesIO(audio["bytes"]))
            if info.frames > 0:
                seconds = info.frames / info.samplerate
                if seconds <= MAX_SECONDS:
                    return seconds
        except AudioError:
            raise
        except (RuntimeError, TypeError, ValueError, OSError):
            pass  # not a container of libsndfile's: decoding tells more
    return len(clip.read(name)) / 16000


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
