"""The training rows: what can be used, how long it is, and its audio as encoder outputs, features or samples.

Rows without text or with audio that cannot be read are listed in `bad_rows.jsonl` and left out; above a settable
share of them the run stops, naming that list.
"""

import copy
import dataclasses
import io
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import soundfile
from torch.utils.data import Dataset, IterableDataset

from audiophi.data.alignment_text import normalise_transcript
from audiophi.data.augment import speed_perturb, stretch_time
from audiophi.data.dataset_registry import missing_audio_is_normal
from audiophi.data.datasets import load_audio_dataset, read_clip
from processing.audio_io import MAX_SECONDS, AudioError, check_file
from processing.prompts import DESCRIBE

from .bad_rows import BadRows, TooManyBadRows
from .batches import BatchSchedule, Draw
from .feature_cache import FeatureCache, clip_key, hash_audio
from .prompt_room import PromptRoom
from .recipe import Source


class Row(NamedTuple):
    """A usable row: where its audio is (`table`, `index`), its text, and its length in seconds.

    `captions`: of which one is drawn per epoch instead of `text`. `instruction`: its source's own."""

    table: int
    index: int
    id: str
    text: str
    seconds: float
    task: str = "transcribe"
    captions: tuple[str, ...] = ()
    label: str | None = None
    instruction: str | None = None


class Corpus:
    """The usable rows of one or more sources.

    Args:
        sources: from the recipe. bad: collects the others. text_case: see `normalise_transcript`.
    Raises:
        ValueError for sources that hold nothing usable; TooManyBadRows.
    """

    def __init__(self, sources: list[Source], bad: BadRows, text_case: str = "lower"):
        self.sources, self.bad, self.tables, self.rows = sources, bad, [], []
        self._hashes: dict[tuple[int, int], str] = {}
        bad.total = 0
        for source in sources:
            self.tables.append(load_audio_dataset(source_spec(source)))
        self.incomplete = [missing_audio_is_normal(source.path) for source in sources]
        total = sum(len(table) for table in self.tables)
        for number, table in enumerate(self.tables):
            for index, row in enumerate(table):
                self._add(number, index, row, text_case)
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

    def _add(self, number: int, index: int, row: dict, text_case: str) -> None:
        source = self.sources[number]
        row_id = row["id"] or f"row-{index}"
        if lacks_text(row, text_case):
            self.bad.add(source.path, row_id, "has no text")
            return
        if self.incomplete[number] and not Path(row["audio"]["path"]).exists():
            self.bad.add(source.path, row_id, f"{row['audio']['path']}: no such file", expected=True)
            return
        try:
            seconds = row["seconds"] or measure_seconds(row)
        except (AudioError, OSError) as error:
            self.bad.add(source.path, row_id, str(error))
            return
        if source.max_seconds is None or seconds <= source.max_seconds:
            told = (row.get("task") or "transcribe", tuple(row.get("captions") or ()))
            self.rows.append(
                Row(number, index, row_id, row["text"], seconds, *told, row.get("label"), row.get("instruction"))
            )

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def hours(self) -> float:
        return sum(row.seconds for row in self.rows) / 3600

    def texts(self, text_case: str, captions: bool = False) -> list[str]:
        """The transcripts, which the alignment's vocabulary must spell; with `captions` those, too."""
        texts = [row.text for row in self.rows if row.task == "transcribe"]
        if captions:
            texts += [text for row in self.rows if row.task == "caption" for text in row.captions or (row.text,)]
        return [normalise_transcript(text, text_case) for text in texts]

    def audio(self, row: Row) -> dict:
        """The undecoded audio and names of a row, as `read_clip` takes it."""
        return {**self.tables[row.table][row.index], "id": row.id}

    def waveform(self, row: Row, speed: float, sampling_rate: int):
        """(samples,) float32 at `sampling_rate`, played `speed` times faster. Raises AudioError."""
        waveform = read_clip(self.audio(row), sampling_rate)
        return waveform if speed == 1 else speed_perturb(waveform, speed, sampling_rate)

    def key(self, row: Row, speed: float) -> str:
        """The cache's key of a row. Raises OSError for a file that cannot be read."""
        place = (row.table, row.index)
        if place not in self._hashes:
            audio = self.audio(row)["audio"]
            self._hashes[place] = hash_audio(audio["bytes"] if audio["bytes"] is not None else audio["path"])
        return clip_key(self._hashes[place], speed)

    def drop(self, row: Row, reason: str) -> None:
        """Records a row as bad; `prune()` removes it."""
        self.bad.add(self.sources[row.table].path, row.id, reason)

    def prune(self) -> None:
        """Removes the rows that were dropped."""
        rows = [row for row in self.rows if (self.sources[row.table].path, row.id) not in self.bad.reasons]
        if self.rows and not rows:
            raise ValueError(f"no usable rows are left; see {self.bad.path}")
        self.rows = rows

    def part(self, number: int, parts: int) -> "Corpus":
        """One of `parts` equal parts, of long and short clips alike; bad rows are recorded for the whole."""
        part = copy.copy(self)
        part.rows = sorted(self.rows, key=lambda row: row.seconds)[number::parts]
        return part


def source_spec(source: Source) -> dict:
    """A source as `load_audio_dataset` takes it: weights and lengths are the batch schedule's and the corpus's
    business."""
    spec = dataclasses.asdict(source)
    return {key: value for key, value in spec.items() if key not in ("weight", "max_seconds") and value is not None}


def lacks_text(row: dict, text_case: str) -> bool:
    """Whether a row that should have words has none."""
    return row.get("task") != "no_speech" and not normalise_transcript(row["text"] or "", text_case)


def measure_seconds(row: dict) -> float:
    """Length of a row's audio, from the file's header where possible, else by decoding. Raises AudioError or
    OSError."""
    audio = row["audio"]
    if audio is not None and (audio["bytes"] is not None or audio["path"]):
        try:
            if audio["bytes"] is None:
                check_file(audio["path"])
            info = soundfile.info(io.BytesIO(audio["bytes"]) if audio["bytes"] is not None else audio["path"])
            if info.frames > 0:
                seconds = info.frames / info.samplerate
                if seconds <= MAX_SECONDS:
                    return seconds
        except AudioError:
            raise
        except (RuntimeError, TypeError, ValueError, OSError):
            pass  # not a container of libsndfile's: decoding tells more
    return len(read_clip(row)) / 16000


class TrainingSet(Dataset):
    """`dataset[Draw]` -> an example for `AudioPhiCollator`: cached encoder outputs, or features where there is no
    cache."""

    def __init__(
        self,
        corpus: Corpus,
        processor,
        cache: FeatureCache | None,
        instructions: list[str],
        seed: int = 0,
        time_stretch: float = 0.0,
        caption_instructions: Sequence[str] = (DESCRIBE,),
    ):
        self.corpus, self.processor, self.cache = corpus, processor, cache
        self.instructions = task_instructions(instructions, caption_instructions)
        self.seed, self.time_stretch = seed, time_stretch

    def __len__(self) -> int:
        return len(self.corpus)

    def __getitem__(self, draw: Draw) -> dict:
        """An unreadable row is recorded and the next readable one takes its place."""
        for offset in range(len(self)):
            number = (draw.row + offset) % len(self)
            row = self.corpus.rows[number]
            try:
                return self._example(row, draw._replace(row=number))
            except (AudioError, OSError) as error:
                self.corpus.drop(row, str(error))
        raise ValueError(f"none of the {len(self)} rows can be read; see {self.corpus.bad.path}")

    def describe(self, epoch: int, number: int) -> dict:
        """What row `number` is, for people: its id and source, its words, and where its audio lies."""
        row = self.corpus.rows[number]
        path = (self.corpus.audio(row)["audio"] or {}).get("path")
        source = self.corpus.sources[row.table].path
        return {"id": row.id, "source": source, "audio": path, "text": row.text, "row": number, "epoch": epoch}

    def _example(self, row: Row, draw: Draw) -> dict:
        if self.cache is not None:
            windows = self.cache.get(self.corpus.key(row, draw.speed))
            if self.time_stretch:
                windows = [stretch_time(w, self.time_stretch, self.seed, draw.epoch, draw.row) for w in windows]
            audio = {"audio_hidden_states": windows}
        else:
            waveform = self.corpus.waveform(row, draw.speed, self.processor.sampling_rate)
            audio = self.processor.encode_audio((waveform, self.processor.sampling_rate))
        words = draw_words(row._asdict(), self.instructions, self.seed, draw.epoch, draw.row)
        return {**audio, **words, "id": draw.row, "epoch": draw.epoch}


def task_instructions(instructions: Sequence[str], caption_instructions: Sequence[str]) -> dict[str, Sequence[str]]:
    """What the user may ask, by task."""
    return {"transcribe": instructions, "no_speech": instructions, "caption": caption_instructions}


def draw_words(row: dict, instructions: dict[str, Sequence[str]], seed: int, epoch: int, number: int) -> dict:
    """text, instruction and task of an example: one of the row's captions and one of its task's instructions, drawn by
    (seed, epoch, number of the row)."""

    def draw(what: str, choices: Sequence[str]) -> str:
        return choices[zlib.crc32(f"{what}{seed} {epoch} {number}".encode()) % len(choices)]

    task, captions = row.get("task") or "transcribe", row.get("captions")
    return {
        "text": draw("caption ", captions) if captions else row["text"],
        "instruction": row.get("instruction") or draw("", instructions[task]),
        "task": task,
    }


class StreamingSet(IterableDataset):
    """Batches of examples as the rows of a stream come, for data that does not fit on the disk.

    `captions`: whether the loss align learns from them. `room`: what prompts must fit into. Length grouping happens
    inside a buffer of rows. The order follows from the seed, so that skipping batches resumes a run.
    """

    def __init__(
        self,
        sources: list[Source],
        bad: BadRows,
        processor,
        stage,
        recipe,
        rank: int = 0,
        world_size: int = 1,
        captions: bool = False,
        room: PromptRoom | None = None,
    ):
        self.sources, self.bad, self.processor, self.stage, self.recipe = sources, bad, processor, stage, recipe
        self.rank, self.world_size, self.captions, self.room, self.buffer = rank, world_size, captions, room, 512

    def __iter__(self) -> Iterator[list[dict]]:
        epoch, batches = 0, 0
        while True:
            before = batches
            buffer: list[dict] = []
            for example in self._examples(epoch):
                buffer.append(example)
                if len(buffer) >= self.buffer:
                    for batch in self._group(buffer, epoch, batches):
                        batches += 1
                        if (batches - 1) % self.world_size == self.rank:
                            yield batch
                    buffer = []
            for batch in self._group(buffer, epoch, batches):
                batches += 1
                if (batches - 1) % self.world_size == self.rank:
                    yield batch
            if batches == before:
                raise ValueError(f"the stream gave no usable rows; see {self.bad.path}")
            epoch += 1

    def describe(self, epoch: int, number: int) -> dict:
        """All that is still known of a row of the stream: that it was the `number`-th."""
        return {"row": number, "epoch": epoch}

    def _examples(self, epoch: int) -> Iterator[dict]:
        specs = [
            {**source_spec(source), **({"weight": source.weight} if source.weight else {})} for source in self.sources
        ]
        instructions = task_instructions(self.recipe.instructions, self.recipe.caption_instructions)
        incomplete = any(missing_audio_is_normal(source.path) for source in self.sources)
        rate, speeds, seed = self.processor.sampling_rate, self.recipe.data.speeds, self.recipe.seed
        for number, row in enumerate(load_audio_dataset(specs, streaming=True, seed=seed + epoch)):
            pick = zlib.crc32(f"{seed} {epoch} {number}".encode())
            captioned = row.get("task") == "caption"
            if captioned and self.stage.loss == "align" and not self.captions:
                continue  # they have no order to align
            try:
                if lacks_text(row, self.recipe.text_case):
                    raise AudioError("has no text")
                waveform = read_clip(row, rate)
                speed = speeds[pick // 7 % len(speeds)]
                waveform = waveform if speed == 1 else speed_perturb(waveform, speed, rate)
                audio = self.processor.encode_audio((waveform, rate))
                words = draw_words(row, instructions, seed, epoch, number)
                excess = self.room and self.room.excess([words["text"]], audio["num_audio_tokens"])
                if excess:
                    raise AudioError(excess)
            except (AudioError, OSError) as error:
                self.bad.total = 0  # unknown: checked below against the rows seen so far
                absent = incomplete and captioned and not Path(row["audio"]["path"]).exists()
                self.bad.add(self.recipe.name, row["id"] or f"row-{number}", str(error), expected=absent)
                if epoch == 0 and number >= 100 and len(self.bad) > self.bad.max_share * (number + 1):
                    raise TooManyBadRows(
                        f"{len(self.bad)} of the first {number + 1} rows cannot be used, more than data.max_bad_rows = "
                        f"{self.bad.max_share:g} allows. They are listed in {self.bad.path}"
                    ) from error
                continue
            yield {**audio, **words, "id": number, "epoch": epoch, "seconds": len(waveform) / rate}

    def _group(self, buffer: list[dict], epoch: int, batches: int) -> list[list[dict]]:
        if not buffer:
            return []
        size = {"batch_size": self.stage.batch_size, "batch_seconds": self.stage.batch_seconds}
        schedule = BatchSchedule(
            [example.pop("seconds") for example in buffer],
            epochs=1,
            seed=self.recipe.seed + 31 * epoch + batches,
            **size,
        )
        return [[buffer[draw.row] for draw in batch] for batch in schedule]
