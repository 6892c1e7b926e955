"""Which rows make prompts that the LLM's context can hold: one that is longer would end the run when its turn comes."""

import math
from dataclasses import replace
from typing import TYPE_CHECKING

from audiophi.data.alignment_text import AlignmentTokenizer, normalise_transcript
from audiophi.data.example import Example, in_words, longest, with_clips
from audiophi.tasks import TASKS, wordings

if TYPE_CHECKING:
    from .corpus import Row

# Of simulated clips more tokens may be heard than are said, by as much as this.
ADDED = 1.25


class PromptRoom:
    """What the context leaves for audio beside the words of a row.

    Args:
        processor: of the model. config: the model's.
        instructions: of the recipe, by task.
        text_case: see `normalise_transcript`.
        align_tokenizer: where clips are simulated, by whose tokens the LLM reads them.
    """

    def __init__(
        self,
        processor,
        config,
        instructions: dict[str, list[str]],
        text_case: str = "lower",
        align_tokenizer: AlignmentTokenizer | None = None,
    ):
        self.align_tokenizer = align_tokenizer
        self.processor, self.config, self.text_case = processor, config, text_case
        self.context = getattr(config.text_config, "max_position_embeddings", None)
        self.instructions = instructions
        self._made: dict[int, int] = {}  # samples -> tokens
        frame = [{"role": "user", "content": ""}, {"role": "assistant", "content": ""}]
        self.frame = len(processor.apply_chat_template(frame, tokenize=True, return_dict=True)["input_ids"][0])

    def turns(self, example: Example) -> list[dict]:
        """What comes before the answer, asked in the longest wording."""
        return TASKS[example.task].messages(longest(example), [self.asked(example.task)])

    def asked(self, task: str) -> str:
        """The longest wording of a task."""
        return max(wordings(task, self.instructions), key=len, default="")

    def words(self, example: Example) -> tuple[list[str], int]:
        """All texts of the longest prompt that a row can make, and how many turns it has."""
        task, turns = TASKS[example.task], self.turns(example)
        texts = []
        for message in with_clips(turns, [{} for _ in example.clips]):
            content = message["content"]
            texts += [content] if isinstance(content, str) else [item.get("text", "") for item in content]
        return [*texts, max((task.target(text, self.text_case) for text in example.references), key=len)], len(turns)

    def audio_tokens(self, samples: list[int]) -> int:
        """Tokens of clips of so many samples each; of a readout that collapses them none are certain."""
        whole = self.config.clip_tokens * len(samples)
        if self.config.readout != "frames":
            return whole
        return whole + sum(map(self.adapter_tokens, samples))

    def adapter_tokens(self, samples: int) -> int:
        """What the adapter makes of a clip of so many samples."""
        if samples not in self._made:
            self._made[samples] = self.config.num_audio_tokens(self.processor.frame_counts(samples))
        return self._made[samples]

    def heard_tokens(self, example: Example) -> int:
        """Tokens that simulated clips are likely to be at most."""
        said = (normalise_transcript(clip.transcript, self.text_case) for clip in example.clips if clip.simulated)
        return math.ceil(ADDED * sum(len(self.align_tokenizer.encode(text)) for text in said))

    def tokens(self, example: Example, samples: list[int]) -> int:
        """Positions of a row's longest prompt."""
        texts, turns = self.words(example)
        words = sum(map(len, self.processor.tokenizer(texts, add_special_tokens=False)["input_ids"]))
        return self.audio_tokens(samples) + words + self.frame * max(1, turns // 2 + turns % 2)

    def can_be_taught(self, example: Example) -> bool:
        """Whether a row has a teacher of the loss distill, whose prompt, words in the place of audio, fits."""
        said = TASKS[example.task].read(example)
        if said is None:
            return False
        turns = in_words(self.turns(example), said)
        return self.excess(replace(example, clips=(), messages=tuple(turns), questions=()), []) is None

    def surely_holds(self, row: "Row", task: str, samples: list[int]) -> bool:
        """Whether a row of real clips fits whatever its tokens are: no tokenizer makes more of them than there are
        bytes."""
        asked = 0 if row.turns else len(self.asked(task).encode())
        most = self.audio_tokens(samples) + row.bytes + asked + self.frame * (max(1, row.turns) + 1)
        return not self.context or most <= self.context

    def excess(self, example: Example, samples: list[int]) -> str | None:
        """Why a row whose clips have so many samples each does not fit; None for one that does."""
        if not self.context:
            return None
        texts, turns = self.words(example)
        audio = self.audio_tokens(samples)
        said = ADDED * sum(len(clip.transcript.encode()) + 1 for clip in example.clips if clip.simulated)
        # No tokenizer makes more tokens than there are bytes: most rows need not be tokenised to know.
        if audio + said + sum(len(text.encode()) for text in texts) + self.frame * (turns + 1) <= self.context:
            return None
        audio += self.heard_tokens(example)
        total = audio + self.tokens(example, [])
        if total <= self.context:
            return None
        told = f"{audio} audio tokens and " if audio else ""
        return f"{told}{total - audio} tokens of text exceed the context of {self.context}; cut it into shorter clips"
