"""Which rows make prompts that the LLM's context can hold: one that is longer would end the run when its turn comes."""

from collections.abc import Iterable

from audiophi.data.alignment_text import normalise_transcript


class PromptRoom:
    """What the context leaves for audio and words beside the chat's marks and the longest instruction.

    Args:
        processor: with its length rule. context: of the LLM, in tokens.
        instructions: all that may be asked.
        counts_audio: whether every audio token goes to the LLM; with a readout that collapses them only the words are
            certain.
        text_case: see `normalise_transcript`.
    """

    def __init__(
        self, processor, context: int, instructions: Iterable[str], counts_audio: bool, text_case: str = "lower"
    ):
        self.tokenizer, self.context = processor.tokenizer, context
        self.counts_audio, self.text_case = counts_audio, text_case
        frame = [{"role": "user", "content": max(instructions, key=len)}, {"role": "assistant", "content": ""}]
        ids = processor.apply_chat_template(frame, tokenize=True, return_dict=True)["input_ids"]
        self.left = context - len(ids[0])

    def excess(self, texts: Iterable[str], audio_tokens: int) -> str | None:
        """Why a row with these possible texts does not fit; None for one that does."""
        audio_tokens = audio_tokens if self.counts_audio else 0
        texts = [normalise_transcript(text, self.text_case) for text in texts]
        # No tokenizer makes more tokens than there are bytes: most rows need not be tokenised to know.
        if audio_tokens + max(len(text.encode()) + 1 for text in texts) <= self.left:
            return None
        words = max(len(self.tokenizer(" " + text, add_special_tokens=False)["input_ids"]) for text in texts)
        if audio_tokens + words <= self.left:
            return None
        audio = f"{audio_tokens} audio tokens and " if audio_tokens else ""
        return (
            f"{audio}{words} tokens of text exceed the context of {self.context}, of which the prompt leaves "
            f"{self.left}; cut it into shorter clips"
        )
