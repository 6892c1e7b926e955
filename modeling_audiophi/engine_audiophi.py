"""Chats in, words out: the one way in which pipeline, evaluation, development scores and demo ask a model.

It knows no task: what the model was trained for, and how each of that is decoded, comes with the checkpoint
(`processor.tasks`, `generation_config.tasks`).
"""

import copy
import inspect
from dataclasses import dataclass
from functools import cached_property

import torch
from transformers import GenerationConfig, GenerationMixin

from .confidence_audiophi import word_confidence
from .generation_audiophi import AUDIO_INPUTS, GENERATION_SETTINGS
from .word_times_audiophi import word_times

MAX_NEW_TOKENS = 512  # where neither the call nor the model's generation config says
GENERATE_ARGUMENTS = {*inspect.signature(GenerationMixin.generate).parameters} - {"self", "inputs", "kwargs"}
GENERATE_ARGUMENTS |= {"tokenizer", "assistant_tokenizer"}  # `generate` takes them out of its kwargs
NEEDS_BOTH = 'how sure a word is takes two ears: hear_with="both", for a model whose encoder has a decoder of words'
UNSAVED = {"_from_model_config", "_commit_hash", "transformers_version"}


@dataclass
class Answer:
    """To one prompt. texts: as many as num_return_sequences; stopped: whether the first of them has come to its end;
    none and None where the language model was not run. heard: what the alignment alone hears in each clip of the
    prompt, None where it was not asked. words: of the first text, (word, start, end in seconds of its one clip), None
    where they were not asked for. confidence: how sure both ears are of each word of the first text, split at
    spaces, from 0 to 1; None likewise."""

    texts: list[str]
    stopped: bool | None = None
    heard: list[str] | None = None
    words: list[tuple[str, float, float]] | None = None
    confidence: list[float] | None = None


class Engine:
    """A model (`AudioPhiForConditionalGeneration`, in whatever mode it is) and its processor."""

    def __init__(self, model, processor):
        self.model, self.processor = model, processor

    @torch.inference_mode()
    def __call__(
        self,
        prompts,
        task=None,
        continued=False,
        with_alignment=False,
        with_lm=True,
        with_times=False,
        with_confidence=False,
        **settings,
    ):
        """A batch of prompts → a list of `Answer`s. The audio is encoded once.

        Args:
            prompts: chats, their clips as the processor takes them.
            task: how to decode, see `generate`; None: as the prompts ask, where they all ask for the same.
            continued: go on with the last turn's words, instead of answering it.
            with_alignment, with_lm: which of the two hear: the alignment head alone, and the language model.
            with_times, with_confidence: find out when the words of each answer are said, and how sure two ears are of
                them; for prompts of one clip each.
            settings: of `generate`.
        Raises TypeError for settings that nobody knows; ValueError for what is out of range, chats that cannot be
        read, an unknown task, `with_alignment` or `with_times` without an alignment head, and `with_confidence` without
        two ears.
        """
        inputs = self.processor.apply_chat_template(
            prompts,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            add_generation_prompt=not continued,
            continue_final_message=continued,
            processor_kwargs={"padding_side": "left"},
        )
        inputs = {name: value.to(self.model.device) for name, value in inputs.items()}
        was_training = self.model.training
        self.model.eval()
        try:
            heard, arguments = [None] * len(prompts), {}
            if with_lm:
                arguments = self.arguments(task, inputs["asked"], **settings)
                arguments["generation_config"].verbatim &= not continued
            config = arguments.get("generation_config")
            if with_confidence and (config is None or config.hear_with != "both"):
                raise ValueError(NEEDS_BOTH)
            if with_alignment or with_times or with_confidence:
                audio = {name: inputs.pop(name) for name in AUDIO_INPUTS if name in inputs}
                if audio:
                    ears = (config.hear_with, config.hear_beams) if with_lm else ()
                    how = {"with_alignment": True, "with_readout": with_lm}
                    inputs["audio_features"] = self.model.hear(audio, *ears, **how)
            if with_alignment:
                heard = self._heard(inputs)
            if not with_lm:
                return [Answer([], None, clips) for clips in heard]
            answers = self._written(inputs, heard, continued, arguments)
            if with_times:
                for answer, times in zip(answers, self._times(answers, inputs["audio_features"]), strict=True):
                    answer.words = times
            if with_confidence:
                audio = inputs["audio_features"]
                for answer, pairs, spelled in zip(answers, audio.words, audio.spelled, strict=True):
                    sure = word_confidence(answer.texts[0], pairs, spelled, config.hear_confidence)
                    answer.confidence = [round(value, 3) for value in sure]
            return answers
        finally:
            self.model.train(was_training)

    def _heard(self, inputs):
        """Per prompt the alignment's reading of each of its clips."""
        audio, texts = inputs.get("audio_features"), iter(())
        if audio is not None:
            transcripts = self.model.model.alignment.greedy(audio.align_logits, audio.tokens_mask)
            texts = iter([self.decode(words).strip() for words in transcripts])
        counts = (inputs["input_ids"] == self.processor.audio_token_id).sum(1).tolist()
        return [[next(texts) for _ in range(count)] for count in counts]

    def _times(self, answers, audio):
        """Per answer its words with their times."""
        seconds = 1 / self.model.config.audio_tokens_per_second
        for answer, logits, mask in zip(answers, audio.align_logits, audio.tokens_mask, strict=True):
            words = answer.texts[0].split()
            times = word_times(words, logits[mask].float().log_softmax(-1), self._pieces, seconds)
            yield [(word, round(start, 3), round(end, 3)) for word, (start, end) in zip(words, times, strict=True)]

    @cached_property
    def _pieces(self):
        """Text of each token of the alignment → its class."""
        ids = self.model.model.alignment.vocab_ids.tolist()
        return {self.decode([index]): number for number, index in enumerate(ids, 1)}

    def _written(self, inputs, heard, continued, arguments):
        asked = inputs.pop("asked")
        ends = arguments["generation_config"].eos_token_id
        # The task's settings are among the arguments; how many clips a turn has is still to be told.
        output = self.model.generate(**inputs, asked=asked * torch.tensor([0, 1], device=asked.device), **arguments)
        output = output if isinstance(output, torch.Tensor) else output.sequences
        texts = []
        for words in output[:, inputs["input_ids"].shape[1] :].tolist():
            length = next((index for index, token in enumerate(words) if token in ends), None)
            text = self.decode(words[:length])
            texts.append((text if continued else text.strip(), length is not None))
        each = len(texts) // len(heard)
        rows = [texts[start : start + each] for start in range(0, len(texts), each)]
        return [Answer([t for t, _ in row], row[0][1], clips) for row, clips in zip(rows, heard, strict=True)]

    def decode(self, token_ids):
        """Token ids → text, special tokens left out."""
        return self.processor.tokenizer.decode(token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def arguments(self, task=None, asked=None, **settings):
        """Keyword arguments for `generate` with all that `task` (or the one that `asked` names, see `generate`) and the
        caller's `settings` say in one generation config, the chat's end of turn among its end tokens."""
        given = settings.pop("generation_config", None)
        unknown = [name for name in settings if not is_setting(name, given)]
        if unknown:
            raise TypeError(
                f"nobody knows the setting {', '.join(map(repr, unknown))}: neither `generate` nor this model"
            )
        more = {name: settings.pop(name) for name in [*settings] if name in GENERATE_ARGUMENTS}
        own = self.model.generation_config
        if task is not None and task not in (getattr(own, "tasks", None) or {}) and task in self.processor.tasks:
            task, asked = None, None  # known, and decoded as everything else
        changed, decided, fusion = self.model.decoding_settings(given, settings, task, asked)
        config = copy.deepcopy(own if changed is None else changed)
        vars(config).update({**decided, **fusion})
        if config.max_new_tokens is None and config.max_length is None:
            config.max_new_tokens = MAX_NEW_TOKENS
        if "max_length" not in settings and config.max_new_tokens is not None:
            config.max_length = None  # transformers warns where both are set
        if more.get("streamer") is not None and "num_beams" not in settings:
            config.num_beams, config.length_penalty = 1, GenerationConfig().length_penalty
        ends = own.eos_token_id if config.eos_token_id is None else config.eos_token_id
        ends = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
        # The chat's end of turn: some LLMs name only the end of a text.
        config.eos_token_id = ends if "eos_token_id" in settings else sorted({*ends, self._end_of_turn})
        if config.pad_token_id is None:
            config.pad_token_id = self.processor.tokenizer.pad_token_id
        config.validate()
        return {**more, "generation_config": config}

    @cached_property
    def _end_of_turn(self):
        return self.processor.end_token_id


def is_setting(name, config):
    """Whether `generate` knows an argument of this name, or a setting of a config (the caller's, or any)."""
    known = {*vars(GenerationConfig()), *GENERATION_SETTINGS, *(vars(config) if config is not None else ())}
    return name in GENERATE_ARGUMENTS or (name in known - UNSAVED and not name.startswith("_"))
