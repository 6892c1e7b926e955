"""Distillation: the LLM that hears learns what the same LLM, reading the transcript, would answer.

The teacher is the student's own LLM without its LoRA layers, so no second one lies in memory. It knows more of an
answer than its one right wording: what else it might have said, and how surely. As Ultravox trains
(https://github.com/fixie-ai/ultravox); DeSTA2.5 (https://arxiv.org/abs/2507.02768) learns what such a teacher writes.
"""

import contextlib

import torch
from torch import nn

from .lora_audiophi import without_lora


@contextlib.contextmanager
def as_teacher(language_model):
    """Inside the `with` block `language_model` is as it was loaded: without LoRA, dropout and gradients."""
    training = [module for module in language_model.modules() if module.training]
    try:
        with torch.no_grad(), without_lora(language_model):
            language_model.eval()
            yield
    finally:
        for module in training:  # one by one: some parts may have been in eval mode
            module.training = True


def kl_divergence(heard, read, temperature=1.0):
    """KL(read || heard) of the next token, times temperature squared, which keeps gradients as large as those of labels
    (Hinton et al. 2015, https://arxiv.org/abs/1503.02531), summed over tokens.

    `heard`, `read`: logits (tokens, vocabulary) of student and teacher; computed in float32.
    """
    heard = (heard.float() / temperature).log_softmax(-1)
    read = (read.float() / temperature).log_softmax(-1)
    return nn.functional.kl_div(heard, read, reduction="sum", log_target=True) * temperature**2
