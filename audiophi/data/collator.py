"""Examples → one training batch.

Training goes through the same chat template and the same placeholder expansion as inference
(`processor.apply_chat_template`); the only difference is that clips arrive as features, or as cached outputs of the
frozen encoder, instead of as audio.
"""

from dataclasses import dataclass

import torch

from processing.processing_audiophi import MASK_NAMES, AudioPhiProcessor, count_tokens
from processing.prompts import TRANSCRIBE

from .alignment_text import AlignmentTokenizer, normalise_transcript
from .augment import Augment

MODES = ("align", "lm", "both")
IGNORED = -100


@dataclass
class AudioPhiCollator:
    """Callable for a DataLoader.

    An example is a dict with
        text: the transcript;
        one of  audio: anything that the processor reads;
                input_features / input_values and their mask, num_audio_tokens: from `processor.encode_audio`;
                audio_hidden_states: cached encoder outputs, (frames, size), or a list of them, one per window;
        instruction (optional): what the user asks, instead of the collator's `instruction`;
        task (optional): "caption" has no order to align, so its CTC target is empty: all blank;
        id, epoch (optional): name the example for the augmentation's random numbers;
        num_audio_tokens (optional with cached states): else counted by `adapter_length_rule`.

    Args:
        processor: with its length rule set.
        mode: "align" (CTC targets, no prompt), "lm" (prompt and labels) or "both".
        align_tokenizer: makes the CTC targets; needed unless mode is "lm".
        learn_captions: whether the loss align also takes the words of captions.
        augment: applied to the features of every clip.
        padding_side: of the text.
        text_case: see `normalise_transcript`; for targets of both losses.
        adapter_length_rule: encoder frames → audio tokens, for cached states when there is a prompt.
        instruction: default of the examples'.
    """

    processor: AudioPhiProcessor
    mode: str = "lm"
    align_tokenizer: AlignmentTokenizer | None = None
    learn_captions: bool = False
    augment: Augment | None = None
    padding_side: str = "right"
    text_case: str = "lower"
    adapter_length_rule: list[list[int]] | None = None
    instruction: str = TRANSCRIBE

    def __post_init__(self):
        if self.mode not in MODES:
            raise ValueError(f"collator mode {self.mode!r} is not one of {', '.join(MODES)}.")
        if self.mode != "lm" and self.align_tokenizer is None:
            raise ValueError(f"collator mode {self.mode!r} needs align_tokenizer for the CTC targets.")

    def __call__(self, examples: list[dict]) -> dict[str, torch.Tensor]:
        """
        Returns:
            audio inputs as from `processor.pad_audio`; in mode lm or both `input_ids`, `attention_mask`, `labels`
            (batch, length), -100 except on the assistant's words and the end token; in mode align or both
            `align_labels` (clips, targets), padded with -100, and with learn_captions `caption_labels` likewise.
        """
        clips = [self._clip(example) for example in examples]
        texts = [normalise_transcript(example["text"], self.text_case) for example in examples]
        if self.mode == "align":
            batch = self.processor.pad_audio(clips)
        else:
            batch = self._prompts(examples, clips, texts)
        if self.mode != "lm":
            captioned = [example.get("task") == "caption" for example in examples]
            batch["align_labels"] = self._targets("" if c else t for c, t in zip(captioned, texts, strict=True))
            if self.learn_captions:
                batch["caption_labels"] = self._targets(t if c else "" for c, t in zip(captioned, texts, strict=True))
        return batch

    def _targets(self, texts) -> torch.Tensor:
        """Token ids (clips, longest), padded with -100."""
        targets = [torch.tensor(self.align_tokenizer.encode(text), dtype=torch.long) for text in texts]
        return torch.nn.utils.rnn.pad_sequence(targets, batch_first=True, padding_value=IGNORED)

    def _prompts(self, examples, clips, texts) -> dict[str, torch.Tensor]:
        conversations = [
            [
                {
                    "role": "user",
                    "content": [
                        {"type": "audio", "encoded": clip},
                        {"type": "text", "text": example.get("instruction") or self.instruction},
                    ],
                },
                # With a space, as in running text: so its tokens are the alignment's, first word included.
                {"role": "assistant", "content": " " + text if text else ""},
            ]
            for example, clip, text in zip(examples, clips, texts, strict=True)
        ]
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
        batch["labels"] = batch["input_ids"].masked_fill(~spoken, IGNORED)
        return batch

    def _clip(self, example: dict) -> dict:
        """The example's audio as `processor.pad_audio` wants it, augmented."""
        if "audio_hidden_states" in example:
            clip = self._cached_clip(example)
        elif self.processor.feature_key in example:
            key = self.processor.feature_key
            clip = {name: example[name] for name in (key, MASK_NAMES[key], "num_audio_tokens")}
        elif "audio" in example:
            clip = self.processor.encode_audio(example["audio"])
        else:
            raise ValueError(
                f"example {example.get('id', '')} has neither audio, features nor cached states: {sorted(example)}"
            )
        return clip if self.augment is None else self._augmented(clip, example)

    def _cached_clip(self, example: dict) -> dict:
        states = example["audio_hidden_states"]
        windows = states if isinstance(states, (list, tuple)) else [states]
        windows = [torch.as_tensor(window).float() for window in windows]
        lengths = [len(window) for window in windows]
        tokens = example.get("num_audio_tokens")
        if tokens is None and self.mode == "align":
            tokens = 0  # no prompt, so nothing to count
        elif tokens is None:
            if self.adapter_length_rule is None:
                raise ValueError(
                    "cached encoder states in a prompt need adapter_length_rule, or num_audio_tokens in every example."
                )
            tokens = sum(count_tokens(length, self.adapter_length_rule) for length in lengths)
        return {
            "audio_hidden_states": torch.nn.utils.rnn.pad_sequence(windows, batch_first=True),
            "audio_hidden_mask": torch.arange(max(lengths))[None] < torch.tensor(lengths)[:, None],
            "num_audio_tokens": tokens,
        }

    def _augmented(self, clip: dict, example: dict) -> dict:
        key = next(name for name in MASK_NAMES if name in clip)
        if key == "input_values":
            return clip  # a waveform has no features to mask
        time_last = key == self.processor.feature_key and self.processor.time_axis == -1
        features = clip[key].transpose(1, 2).clone() if time_last else clip[key].clone()
        for window, length in enumerate(clip[MASK_NAMES[key]].sum(-1).tolist()):
            name = (example.get("epoch", 0), example.get("id"), window)
            features[window, :length] = self.augment(features[window, :length], *name)
        return {**clip, key: features.transpose(1, 2) if time_last else features}
