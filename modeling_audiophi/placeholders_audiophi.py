"""Placeholders in the prompt: as many as there is audio, no more than the context holds, none that stays empty.

Placeholders that the collapse has no token for are removed before the language model runs.

The processor must put as many placeholders as there are audio tokens; how many survive the collapse is known only
after the encoder has run. Removing the rest physically (rather than masking) saves the LLM the work and keeps
positions contiguous, so the result does not depend on batching or padding side.
"""

from dataclasses import dataclass

import torch


def check_placeholders(input_ids, audio_embeds, config):
    """ValueError unless `input_ids` (B, L) have one placeholder per audio token in `audio_embeds` (N, D) or None."""
    wanted = int((input_ids == config.audio_token_id).sum())
    given = 0 if audio_embeds is None else len(audio_embeds)
    if wanted != given:
        raise ValueError(f"the prompt has {wanted} audio placeholders, but the audio makes {given} tokens")


def find_placeholders(inputs_embeds, embedding, audio_token_id):
    """`inputs_embeds` (B, L, D) of a prompt, `embedding` the LLM's input embedding layer -> ids (B, L): the
    placeholder's where its embedding stands, -1 elsewhere."""
    own = embedding(torch.tensor(audio_token_id, device=inputs_embeds.device)).to(inputs_embeds.dtype)
    return torch.where((inputs_embeds == own).all(-1), audio_token_id, -1)


def check_context(input_ids, config):
    """ValueError when a prompt that will go to the language model like this is longer than its context."""
    context = getattr(config.text_config, "max_position_embeddings", None)
    if context is None or input_ids.shape[1] <= context:
        return
    audio, rate = int((input_ids == config.audio_token_id).sum(1).max()), config.audio_tokens_per_second
    seconds = f"about {audio / rate:.0f} s" if config.readout == "frames" else "after the collapse"
    raise ValueError(
        f"the prompt has {input_ids.shape[1]} tokens, {audio} of them audio ({seconds}), but the language model's "
        f"context is {context}: shorten the audio, or use an adapter with fewer tokens per second (now {rate:.1f})"
    )


@dataclass
class CompactPrompt:
    """A batch without its unused placeholders (and without padding that no row needs any more).

    `input_ids` (B, L'), `attention_mask` (B, L'); `source` (B, L') is the original column of every position (0 for
    padding), `latest` (B, L) the compact column of every original position, for a removed one that of the last
    position before it.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    source: torch.Tensor
    latest: torch.Tensor


def drop_unused_placeholders(input_ids, attention_mask, audio_token_id, keep, padding_side):
    """Remove the placeholders for which `keep` is False and pad again.

    `input_ids` (B, L), `attention_mask` (B, L) or None, `keep` (N,) bool with one entry per placeholder in row-major
    order, `padding_side` "left" or "right". Returns a `CompactPrompt`. Padding ids are 0 and never attended to.
    """
    if attention_mask is None:
        attention_mask = torch.ones_like(input_ids)
    real = attention_mask.bool().clone()
    real[input_ids == audio_token_id] &= keep
    lengths = real.sum(1)
    size = max(1, int(lengths.max()))
    shift = (size - lengths)[:, None] if padding_side == "left" else torch.zeros_like(lengths)[:, None]
    latest = (real.cumsum(1) - 1).clamp(min=0) + shift
    latest = latest.clamp(max=size - 1)
    rows = torch.arange(len(input_ids), device=input_ids.device)[:, None].expand_as(input_ids)
    columns = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
    compact = input_ids.new_zeros(len(input_ids), size)
    mask, source = torch.zeros_like(compact), torch.zeros_like(compact)
    place = (rows[real], latest[real])
    compact[place], mask[place], source[place] = input_ids[real], 1, columns[real]
    return CompactPrompt(compact, mask, source, latest)


def padding_side_of(attention_mask):
    """ "left" if a row starts with padding, else "right"."""
    return "left" if attention_mask is not None and bool((attention_mask[:, 0] == 0).any()) else "right"


def repeat_audio(audio_embeds, input_ids, audio_token_id, times):
    """Audio tokens (N, D) of a batch whose rows are each repeated `times` times (beams, several return sequences)."""
    counts = (input_ids == audio_token_id).sum(1).tolist()
    return torch.cat([row.repeat(times, 1) for row in audio_embeds.split(counts)])


def ends_with(input_ids, endings):
    """Whether each row of `input_ids` (B, L), padded on the left, ends with one of `endings` (lists of ids) -> (B,)."""
    found = torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
    for ending in endings:
        if 0 < len(ending) <= input_ids.shape[1]:
            tail = torch.tensor(ending, device=input_ids.device)
            found |= (input_ids[:, -len(ending) :] == tail).all(1)
    return found
