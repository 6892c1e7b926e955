"""Placeholders in the prompt: the processor writes one per clip, the model makes room there for what the LLM reads.

How many embeddings a clip becomes is known only after the encoder has run, and it may be none at all. The expanded
prompt has that many placeholders and no gaps, so that positions are contiguous and the result depends neither on the
batch nor on the padding side.
"""

from dataclasses import dataclass

import torch


@dataclass
class ExpandedPrompt:
    """A batch of prompts as the language model reads them.

    `input_ids` (B, L'), `attention_mask` (B, L'), padded to the longest, where ids are 0; `latest` (B, L) the column
    that every original position ends at, for a clip without embeddings (and padding) that of the position before.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    latest: torch.Tensor

    def gather(self, hidden):
        """States (B, L', D) of this prompt -> (B, L, D) of the original one."""
        latest = self.latest.to(hidden.device)
        return hidden.gather(1, latest[..., None].expand(-1, -1, hidden.shape[-1]))


def expand_placeholders(input_ids, attention_mask, counts, audio_token_id, padding_side):
    """Put as many placeholders in the place of each as its clip has embeddings, and pad again.

    `input_ids` (B, L), `attention_mask` (B, L) or None, `counts` (C,) embeddings of each clip, with one clip per
    placeholder in row-major order, `padding_side` "left" or "right". Returns an `ExpandedPrompt`; raises ValueError
    when clips and placeholders differ in number.
    """
    if attention_mask is None:
        attention_mask = torch.ones_like(input_ids)
    placeholders = input_ids == audio_token_id
    check_placeholders(int(placeholders.sum()), len(counts))
    width = attention_mask.long().clone()
    width[placeholders] = counts.to(width.device)
    lengths = width.sum(1)
    size = max(1, int(lengths.max()))
    shift = size - lengths if padding_side == "left" else torch.zeros_like(lengths)
    latest = (width.cumsum(1) - 1 + shift[:, None]).clamp(0, size - 1)
    columns = torch.arange(size, device=input_ids.device)[None]
    real = (columns >= shift[:, None]) & (columns < (shift + lengths)[:, None])
    expanded = input_ids.new_zeros(real.shape)
    expanded[real] = input_ids.flatten().repeat_interleave(width.flatten())
    return ExpandedPrompt(expanded, real.to(attention_mask.dtype), latest)


def check_placeholders(wanted, given):
    """ValueError unless a batch with `wanted` placeholders has as many clips."""
    if wanted != given:
        raise ValueError(
            f"the prompt has {wanted} audio placeholder{'s' * (wanted != 1)}, but "
            f"{given or 'no'} clip{'s are' if given != 1 else ' is'} given"
        )


def check_context(prompt, config):
    """ValueError when an `ExpandedPrompt` is longer than the language model's context."""
    context = getattr(config.text_config, "max_position_embeddings", None)
    length = prompt.input_ids.shape[1]
    if context is None or length <= context:
        return
    audio, rate = int((prompt.input_ids == config.audio_token_id).sum(1).max()), config.audio_tokens_per_second
    seconds = f"about {audio / rate:.0f} s" if config.readout == "frames" else "as the readout keeps them"
    raise ValueError(
        f"the prompt has {length} tokens, {audio} of them audio ({seconds}), but the language model's context is "
        f"{context}: shorten the audio, or use an adapter with fewer tokens per second (now {rate:.1f})"
    )


def padding_side_of(attention_mask):
    """ "left" if a row starts with padding, else "right"."""
    return "left" if attention_mask is not None and bool((attention_mask[:, 0] == 0).any()) else "right"


def repeat_audio(audio_embeds, input_ids, audio_token_id, times):
    """Embeddings (N, D) of a batch whose rows are each repeated `times` times (beams, several return sequences)."""
    counts = (input_ids == audio_token_id).sum(1).tolist()
    return torch.cat([row.repeat(times, 1) for row in audio_embeds.split(counts)])
