"""What the model's methods return."""

from dataclasses import dataclass

import torch
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast, ModelOutput


@dataclass
class AudioPhiAudioOutput(ModelOutput):
    """Audio as the language model gets it.

    last_hidden_state: encoder states (windows, T, encoder size). pooler_output: what the LLM reads of all clips (N, LLM
        size), clip after clip, of each its clip tokens first, if there are any. hidden_states, attentions: of the
        encoder's blocks, see `run_recorded`; None when nothing asked for them. counts: (C,) how many of pooler_output
        each clip has. embeds (C, T', LLM size), keep (C, T') bool: the readout of every adapter token, and which of
        them the LLM reads. tokens, tokens_mask: adapter outputs per clip (C, T', LLM size), (C, T'). align_logits:
        (C, T', align_vocab_size + 1), None when nothing asked for them. clips: clip tokens (C, count, LLM size), None
        for a model without. is_word (N,) bool: which of pooler_output are no clip tokens and no readout of sounds.
        words: the decoder's texts per clip as `hear` gives them, None where it was not asked. spelled: the alignment's
        text per clip where both are heard with.
    """

    last_hidden_state: torch.Tensor | None = None
    pooler_output: torch.Tensor | None = None
    hidden_states: tuple | None = None
    attentions: tuple | None = None
    counts: torch.Tensor | None = None
    embeds: torch.Tensor | None = None
    keep: torch.Tensor | None = None
    tokens: torch.Tensor | None = None
    tokens_mask: torch.Tensor | None = None
    align_logits: torch.Tensor | None = None
    clips: torch.Tensor | None = None
    is_word: torch.Tensor | None = None
    words: list | None = None
    spelled: list | None = None


@dataclass
class AudioPhiModelOutput(BaseModelOutputWithPast):
    """Language model output; hidden states have the caller's (B, L) shape. `audio` is an `AudioPhiAudioOutput` or
    None."""

    audio: AudioPhiAudioOutput | None = None


@dataclass
class AudioPhiOutput(CausalLMOutputWithPast):
    """Losses (scalars) and predictions of `AudioPhiForConditionalGeneration`.

    loss = lm_loss + clip_loss + align_loss_weight * (align_loss + sound_loss) + distill_weight * distill_loss,
    whichever were asked for; align_skipped counts clips whose transcript is longer than their audio tokens.
    audio_counts (C,): embeddings that the LLM read of each clip. logits (B, L, vocabulary) is None with labels in
    training unless `return_logits=True`.
    """

    lm_loss: torch.Tensor | None = None
    align_loss: torch.Tensor | None = None
    sound_loss: torch.Tensor | None = None
    clip_loss: torch.Tensor | None = None
    distill_loss: torch.Tensor | None = None
    align_skipped: torch.Tensor | None = None
    align_logits: torch.Tensor | None = None
    audio_counts: torch.Tensor | None = None
