"""Examples -> one training batch.

Training goes through the same prompt builder as inference (`processor.apply_chat_template`); the only difference is
that clips arrive as features, or as cached outputs of the frozen encoder, instead of as audio.
"""

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from audiophi.tasks import TASKS, Row, task_of_source
from modeling_audiophi.alignment_audiophi import NO_TARGET
from processing.processing_audiophi import HEARD, AudioPhiProcessor

from .alignment_text import AlignmentTokenizer, normalise_transcript
from .example import Clip, Example, in_words, with_clips

MODES = ("align", "lm", "both")
LEARNED = ("all", "last")
IGNORED = -100


def training_item(
    example: Example,
    clips: list[dict],
    *,
    wordings: Sequence[str],
    draw: Callable[[str, Sequence], object] | None = None,
    text_case: str = "lower",
    id=None,
    epoch: int = 0,
) -> dict:
    """An example as the collator takes it: {"messages": all turns, the answer too, "clips", "transcripts" (text, "" or
    None per clip), "described" (text or None per clip), "read" (`Task.read`), "sounds" (text or None), "id", "epoch"}.

    `clips`: the example's, encoded (`processor.encode_audio`, cached {"audio_hidden_states"}, or simulated
    {"heard_ids", "heard_weights"}). `wordings`: what may be asked; `draw` ("instruction" or "reference", choices) ->
    one of them, None: the first. `id`, `epoch` name it for the augmentation's random numbers.
    """
    task = TASKS[example.task]
    answer = draw("reference", example.references) if draw else example.references[0]
    turns = task.messages(example, wordings, draw)
    messages = [*with_clips(turns, [{"encoded": clip} for clip in clips]),
                {"role": "assistant", "content": task.target(answer, text_case)}]  # fmt: skip
    return {
        "messages": messages,
        "clips": clips,
        "transcripts": [clip.transcript for clip in example.clips],
        "described": [clip.described for clip in example.clips],
        "read": task.read(example),
        "sounds": task.sounds(answer),
        "id": id if id is not None else example.id,
        "epoch": epoch,
    }


def item_of_row(row: Mapping, processor: AudioPhiProcessor, text_case: str = "lower") -> dict:
    """`training_item` of a row as data sets have them: {"audio": what the processor loads, "text": what is said}, or
    with "instruction" {"text": the answer to it}. Raises ValueError, AudioError among them."""
    missing = [name for name in ("audio", "text") if row.get(name) is None]
    if missing:
        raise ValueError(f"a row without {' and '.join(missing)}: it has {', '.join(map(repr, row)) or 'nothing'}.")
    asked = row.get("instruction") or None
    task = task_of_source({"audio", "text"} | ({"instruction"} if asked else set()), asked)
    name = str(row.get("id", row["audio"] if isinstance(row["audio"], str) else "a row"))
    example = task.example(Row(0, name, "", clips=(Clip(None),), text=row["text"], instruction=asked))
    clips = [processor.encode_audio(row["audio"])]
    return training_item(example, clips, wordings=task.wordings, text_case=text_case, id=name)


@dataclass
class AudioPhiCollator:
    """Callable for a DataLoader; its items are dicts from `training_item`, or rows as `item_of_row` takes them, with
    which transformers' own Trainer works, too.

    Args:
        processor: of the model.
        mode: "align" (CTC targets, no prompt), "lm" (prompt and labels) or "both".
        align_tokenizer: makes the CTC targets; needed unless mode is "lm".
        describe: whether to make `clip_labels`, the words that describe a clip as a whole.
        learn_sounds: whether the loss align also takes the words that say what is heard.
        padding_side: of the text.
        text_case: see `normalise_transcript`; of CTC's targets.
        loss_on: which of the assistant's turns are learned, "all" or the "last".
        length_normalization: an answer of n tokens counts n ** (1 - this) in the loss, so that a yes is not drowned by
            transcripts: 0.5 as InternVL 2.5 weighs (https://arxiv.org/abs/2412.05271), 0: not weighed.
        written: share of clips with a transcript of which the LLM reads that instead of the readout's words, in
            `text_case`, as where the encoder's decoder is an ear (`hear_with`).
        distill: beside the prompts that are heard, make those that the teacher of the loss distill reads.
        context: tokens that the LLM can read, None: any number; a teacher's longer prompt is left out.
    """

    processor: AudioPhiProcessor
    mode: str = "lm"
    align_tokenizer: AlignmentTokenizer | None = None
    learn_sounds: bool = False
    describe: bool = False
    padding_side: str = "right"
    text_case: str = "lower"
    loss_on: str = "all"
    length_normalization: float = 0.0
    written: float = 0.0
    distill: bool = False
    context: int | None = None

    def __post_init__(self):
        if self.mode not in MODES:
            raise ValueError(f"collator mode {self.mode!r} is not one of {', '.join(MODES)}.")
        if self.loss_on not in LEARNED:
            raise ValueError(f"loss_on {self.loss_on!r} is not one of {', '.join(LEARNED)}.")
        if self.mode != "lm" and self.align_tokenizer is None:
            raise ValueError(f"collator mode {self.mode!r} needs align_tokenizer for the CTC targets.")
        if self.mode == "align" and self.distill:
            raise ValueError("collator mode 'align' makes no prompts, so there is nothing to distill.")

    def __call__(self, items: list[dict]) -> dict[str, torch.Tensor]:
        """
        Returns:
            audio inputs as from `processor.pad_audio`, where there are clips; in mode lm or both `input_ids`,
            `attention_mask`, `labels` (batch, length), -100 except on the assistant's words and the end token, with
            length_normalization `label_weights` (batch, length) of these, with written `written`: token ids, or None,
            per real clip; in mode
            align or both `align_labels` (clips, targets), padded with -100, NO_TARGET first for a clip that CTC learns
            nothing from, and with learn_sounds `sound_labels` likewise, empty for a clip without. Simulated clips have
            no frames, hence no row in either. With distill `teacher_input_ids`, `teacher_attention_mask`,
            `teacher_labels` (batch, another length): the same chats with transcripts in the place of clips, and the
            same tokens labelled. A row without a teacher (`Task.read`, or too long for the context) is all padding.

        Raises:
            ValueError naming an item whose answer makes other tokens where the transcript is read, or of `item_of_row`.
        """
        items = [item if "clips" in item else item_of_row(item, self.processor, self.text_case) for item in items]
        items = [{**item, "clips": [as_windows(clip) for clip in item["clips"]]} for item in items]
        if self.mode == "align":
            batch = self.processor.pad_audio([clip for item in items for clip in item["clips"]])
        else:
            batch = self._prompts(items)
            if self.distill:
                batch |= self._read_prompts(items, batch["labels"])
        real = [(item, place) for item in items for place, clip in enumerate(item["clips"]) if HEARD not in clip]
        if self.describe and real:
            texts = [" " + item["described"][place] if item["described"][place] else "" for item, place in real]
            found = self.processor.tokenizer(texts, add_special_tokens=False)["input_ids"]
            batch["clip_labels"] = padded(found)
        if self.written and self.mode != "align" and real:
            batch["written"] = [self._written(item, place) for item, place in real]
        if self.mode != "lm" and real:
            batch["align_labels"] = self._targets([item["transcripts"][place] for item, place in real])
            if self.learn_sounds:
                # Of one clip it is known what the words are about.
                words = [item["sounds"] if len(item["clips"]) == 1 else None for item, _ in real]
                batch["sound_labels"] = self._targets([text or "" for text in words])
        return batch

    def _written(self, item: dict, place: int) -> list[int] | None:
        """The words of a clip's transcript as tokens, for the drawn share of clips that have one."""
        text = item["transcripts"][place]
        drawn = zlib.crc32(f"{item['id']} {item['epoch']} {place}".encode()) / 2**32
        if not text or drawn >= self.written:
            return None
        text = " " + normalise_transcript(text, self.text_case)
        return self.processor.tokenizer(text, add_special_tokens=False)["input_ids"]

    def _targets(self, texts: list[str | None]) -> torch.Tensor:
        """Token ids (clips, longest), padded with -100."""
        known = [None if text is None else normalise_transcript(text, self.text_case) for text in texts]
        targets = [[NO_TARGET] if text is None else self.align_tokenizer.encode(text) for text in known]
        return padded(targets)

    def _prompts(self, items: list[dict]) -> dict[str, torch.Tensor]:
        conversations = []
        for item in items:
            rest = iter(item["clips"])
            conversations.append([_replaced(message, rest) for message in item["messages"]])
        return self._labelled(conversations)

    def _read_prompts(self, items: list[dict], labels: torch.Tensor) -> dict[str, torch.Tensor]:
        """What the teacher reads, beside `labels` (batch, length) of what is heard."""
        rows = [row for row, item in enumerate(items) if item["read"] is not None]
        read = {name: torch.zeros(0, 1, dtype=torch.long) for name in ("input_ids", "attention_mask", "labels")}
        if rows:
            read = self._labelled([in_words(items[row]["messages"], items[row]["read"]) for row in rows])
            if self.context is not None:
                fits = read["attention_mask"].sum(1) <= self.context
                rows = [row for row, kept in zip(rows, fits.tolist(), strict=True) if kept]
                columns = read["attention_mask"][fits].any(0)
                columns[0] |= not rows  # a batch without a teacher has one column
                read = {name: read[name][fits][:, columns] for name in ("input_ids", "attention_mask", "labels")}
        for row, told in zip(rows, read["labels"], strict=True):
            if not torch.equal(labels[row][labels[row] != IGNORED], told[told != IGNORED]):
                raise ValueError(
                    f"row {items[row]['id']}: its answer makes other tokens where the transcript is read than where "
                    "the audio is heard, so the loss distill cannot compare them; the chat template is to blame."
                )
        batch = {}
        for name, fill in (("input_ids", 0), ("attention_mask", 0), ("labels", IGNORED)):
            whole = torch.full((len(items), read[name].shape[1]), fill, dtype=torch.long)
            whole[rows] = read[name].long()
            batch[f"teacher_{name}"] = whole
        return batch

    def _labelled(self, conversations: list[list[dict]]) -> dict[str, torch.Tensor]:
        """Prompts and `labels`, the assistant's words, of chats whose clips are encoded."""
        batch = dict(
            self.processor.apply_chat_template(
                conversations,
                tokenize=True,
                return_dict=True,
                return_assistant_tokens_mask=True,
                processor_kwargs={"padding_side": self.padding_side},
            )
        )
        spoken = batch.pop("assistant_masks").bool() & batch["attention_mask"].bool()
        if self.loss_on == "last":
            spoken = last_run(spoken)
        batch["labels"] = batch["input_ids"].masked_fill(~spoken, IGNORED)
        if self.length_normalization:
            batch["label_weights"] = run_lengths(spoken).float() ** -self.length_normalization
        return batch


def padded(targets: list[list[int]]) -> torch.Tensor:
    """Lists of ids as one (rows, longest), padded with -100; one column at least."""
    rows = [torch.tensor(ids, dtype=torch.long) for ids in targets]
    whole = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=IGNORED)
    return whole if whole.shape[1] else whole.new_full((len(rows), 1), IGNORED)


def _replaced(message: dict, clips) -> dict:
    """`message` with its audio items holding the next of `clips`."""
    if isinstance(message["content"], str):
        return message
    content = [
        {"type": "audio", "encoded": next(clips)} if item["type"] == "audio" else item for item in message["content"]
    ]
    return {**message, "content": content}


def as_windows(clip: dict) -> dict:
    """Cached encoder states, (frames, size) or a list of them, one per window, as one padded tensor and its mask; other
    clips as they are."""
    if "audio_hidden_states" not in clip or "audio_hidden_mask" in clip:
        return clip
    states = clip["audio_hidden_states"]
    windows = states if isinstance(states, (list, tuple)) else [states]
    windows = [torch.as_tensor(window).float() for window in windows]
    lengths = torch.tensor([len(window) for window in windows])
    return {
        "audio_hidden_states": torch.nn.utils.rnn.pad_sequence(windows, batch_first=True),
        "audio_hidden_mask": torch.arange(int(lengths.max()))[None] < lengths[:, None],
    }


def run_numbers(mask: torch.Tensor) -> torch.Tensor:
    """Of `mask` (B, L) how many stretches have begun."""
    return (mask & ~torch.nn.functional.pad(mask, (1, 0))[:, :-1]).long().cumsum(1)


def last_run(mask: torch.Tensor) -> torch.Tensor:
    """Of `mask` (B, L) the last stretch of each row."""
    number = run_numbers(mask)
    return mask & (number == number.amax(1, keepdim=True))


def run_lengths(mask: torch.Tensor) -> torch.Tensor:
    """How long the stretch of `mask` (B, L) is that each place lies in; 1 outside."""
    number = run_numbers(mask) * mask
    counts = torch.zeros_like(number).scatter_add_(1, number, mask.long())
    return counts.gather(1, number).masked_fill(~mask, 1)
