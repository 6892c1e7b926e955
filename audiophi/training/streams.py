"""Batches of rows as they come, for data that does not fit on the disk."""

import itertools
import zlib
from collections.abc import Iterator

from torch.utils.data import IterableDataset, get_worker_info

from audiophi.data.augment import speed_perturb
from audiophi.data.dataset_registry import missing_audio_is_normal, split_kind
from audiophi.data.dataset_streams import stream_examples
from audiophi.data.example import RowError
from processing.audio_io import AudioError

from .bad_rows import BadRows, TooManyBadRows
from .batches import BatchSchedule
from .corpus import drawing, item_of, source_spec
from .prompt_room import PromptRoom
from .recipe import RecipeError, Source
from .row_facts import lacks_words, measure_seconds, missing_file, text_tokens
from .simulated import Confusions


class StreamingSet(IterableDataset):
    """Batches of items as the rows of a stream come.

    Every process and every worker of its loader takes its share of the rows, decodes no others, and makes batches of
    its own; length grouping happens inside a buffer of rows. The order follows from the seed. Of a run that is resumed
    by `load_state_dict`, no more is decoded again than the buffer that it was in.

    Args:
        sounds, described: whether the loss align learns from answers that say what is heard, and from clips of which it
            is known what they are like as a whole. room: what prompts must fit into.
        confusions: make what is heard of clips without audio.
    Raises RecipeError for sources of one path with different `max_seconds`: a row tells its path alone.
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
        sounds: bool = False,
        room: PromptRoom | None = None,
        confusions: Confusions | None = None,
        described: bool = False,
    ):
        self.confusions, self.described = confusions, described
        self.sources, self.bad, self.processor, self.stage, self.recipe = sources, bad, processor, stage, recipe
        self.rank, self.world_size, self.sounds, self.room, self.buffer = rank, world_size, sounds, room, 512
        self.turn: int = 0  # of which worker the next batch is
        self.positions: dict[int, list[int]] = {}  # of each worker, behind its last batch that was trained on
        self.longest: dict[str, float | None] = {}
        self.incomplete: dict[str, bool] = {}
        for source in sources:
            path = split_kind(source.path)[1]  # as examples name it
            if self.longest.setdefault(path, source.max_seconds) != source.max_seconds:
                raise RecipeError(f"data.streaming: {path} is read more than once, with different max_seconds")
            self.incomplete[path] = missing_audio_is_normal(source.path)

    def __iter__(self) -> Iterator[list[dict]]:
        info = get_worker_info()
        # Batches are taken from the workers in turn, and from the first one first.
        worker = (info.id + self.turn) % info.num_workers if info else 0
        epoch, behind, done, batches = self.positions.get(worker, (0, -1, 0, 0))
        batches -= done
        while True:
            before, items = batches, self._items(epoch, behind, worker)
            while buffer := list(itertools.islice(items, self.buffer)):
                for place, batch in enumerate(self._group(buffer, epoch, batches), 1):
                    batches += 1
                    if place > done:
                        batch[0]["position"] = (worker, [epoch, behind, place, batches])
                        yield batch
                behind, done = buffer[-1]["id"], 0
            if batches == before:
                raise ValueError(
                    f"the stream gave this process no usable rows; see {self.bad.path}, and use fewer processes or "
                    "workers (num_workers) than there are rows"
                )
            epoch, behind = epoch + 1, -1

    @property
    def shares(self) -> int:
        """Into how many parts the rows are divided: one for every worker of every process."""
        return self.world_size * max(1, self.recipe.num_workers)

    def trained_on(self, position: tuple[int, list[int]]) -> None:
        """To be called with the `position` of every batch, in order."""
        worker, self.positions[worker] = position
        self.turn = (worker + 1) % max(1, self.recipe.num_workers)

    def state_dict(self) -> dict:
        """How far this process has read, for `load_state_dict`."""
        return {"shares": self.shares, "turn": self.turn, "positions": self.positions}

    def load_state_dict(self, state: dict) -> bool:
        """Goes on behind the batches that were trained on; False, and nothing done, where the rows were divided among
        another number of processes or workers."""
        if state["shares"] != self.shares:
            return False
        self.turn = state["turn"]
        self.positions = {int(worker): position for worker, position in state["positions"].items()}
        return True

    def describe(self, epoch: int, number: int) -> dict:
        """All that is still known of a row of the stream: that it was the `number`-th."""
        return {"row": number, "epoch": epoch}

    def _items(self, epoch: int, behind: int, worker: int) -> Iterator[dict]:
        """Items of the rows of a worker whose numbers are above `behind`."""
        specs = [
            {**source_spec(source), **({"weight": source.weight} if source.weight else {})} for source in self.sources
        ]
        shares, share = self.shares, self.rank * max(1, self.recipe.num_workers) + worker
        rate, seed = self.processor.sampling_rate, self.recipe.seed
        read = len(range(share, behind + 1, shares))
        for count, example in enumerate(stream_examples(specs, seed + epoch, (share, shares), read), read + 1):
            number = share + (count - 1) * shares
            try:
                if isinstance(example, RowError):
                    raise example
                if lacks_words(example, self.recipe.text_case):
                    raise AudioError("has no text")
                draw = drawing(seed, epoch, number)
                item, seconds = self._item(example, draw, rate, number, epoch)
            except (RowError, AudioError, OSError) as error:
                known = not isinstance(example, RowError)
                absent = known and self.incomplete[example.source] and missing_file(example) is not None
                self._bad(error, number, example.id or f"row {number + 1}", absent, epoch, count)
                continue
            if item is not None:
                yield {**item, "seconds": seconds, "tokens": text_tokens(example)}

    def _item(self, example, draw, rate: int, number: int, epoch: int) -> tuple[dict | None, float]:
        """The item and the seconds of its audio; None for one that is too long for its source, or that the stage's loss
        cannot learn from."""
        item = item_of(example, [{}] * len(example.clips), self.recipe.instructions, draw, self.recipe.text_case,
                       number, epoch)  # fmt: skip
        learned = any(text is not None for text in item["transcripts"]) or (self.sounds and item["sounds"] is not None)
        learned = learned or (self.described and any(item["described"]))
        if self.stage.loss == "align" and not learned:
            return None, 0.0
        if self.stage.loss == "distill" and not self.room.can_be_taught(example):
            return None, 0.0
        limit = self.longest[example.source]
        if limit is not None and sum(measure_seconds(clip, example.id) for clip in example.clips) > limit:
            return None, 0.0  # undecoded: hours of audio may not fit into memory
        speeds = self.recipe.data.speeds
        speed = speeds[zlib.crc32(f"{self.recipe.seed} {epoch} {number}".encode()) // 7 % len(speeds)]
        clips, samples = [], []
        for place, clip in enumerate(example.clips):
            if clip.simulated:
                samples.append(int(rate * measure_seconds(clip, example.id) / speed))
                clips.append(self.confusions.clip(clip.transcript, self.recipe.seed, epoch, number, place))
                continue
            waveform = clip.read(example.id, rate)
            waveform = waveform if speed == 1 else speed_perturb(waveform, speed, rate)
            samples.append(len(waveform))
            clips.append(waveform)
        clips = [
            clip if known.simulated else self.processor.encode_audio((clip, rate))
            for known, clip in zip(example.clips, clips, strict=True)
        ]
        excess = self.room and self.room.excess(example, samples)
        if excess:
            raise AudioError(excess)
        item = item_of(example, clips, self.recipe.instructions, draw, self.recipe.text_case, number, epoch)
        return item, sum(samples) / rate

    def _bad(self, error: Exception, number: int, name: str, expected: bool, epoch: int, seen: int) -> None:
        """`seen`: how many rows this process or worker has read."""
        self.bad.total = 0  # unknown: checked below against the rows seen so far
        self.bad.add(self.recipe.name, number, name, str(error), expected=expected)
        if epoch == 0 and seen > 100 and len(self.bad) > self.bad.max_share * seen:
            raise TooManyBadRows(
                f"{len(self.bad)} of the first {seen} rows cannot be used, more than data.max_bad_rows = "
                f"{self.bad.max_share:g} allows. They are listed in {self.bad.path}"
            ) from error

    def _group(self, buffer: list[dict], epoch: int, batches: int) -> list[list[dict]]:
        size = {name: getattr(self.stage, name) for name in ("batch_size", "batch_seconds", "batch_tokens")}
        schedule = BatchSchedule(
            [item.pop("seconds") for item in buffer],
            tokens=[item.pop("tokens") for item in buffer],
            group_by_length=self.stage.group_by_length,
            epochs=1,
            seed=self.recipe.seed + 31 * epoch + batches,
            **size,
        )
        return [[buffer[draw.row] for draw in batch] for batch in schedule]
