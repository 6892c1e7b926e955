"""Shallow fusion: what the language model would write if it heard nothing.

The LLM that reads the alignment's tokens mostly copies them, mistakes included. The same LLM without audio and without
its LoRA layers has not learned to copy: it knows only which words follow one another, and that is what tells "lay now
and then an egg" from "laid now and then and egg". Gulcehre et al. 2015 (https://arxiv.org/abs/1503.03535).
"""

import torch
from transformers import DynamicCache, LogitsProcessor

from .ctc_scoring_audiophi import parent_rows


class LanguageModelPrior(LogitsProcessor):
    """Adds weight * log p(token | what has been written) to the scores of all tokens but those that end a transcript.

    Args:
        predict: (token ids (N, L), cache) -> logits (N, L, V) of the token after each, without audio.
        config: of the LLM, which says what its cache holds.
        vocab_ids: (V',) LLM token ids of the alignment; the probabilities are normalised over them, so that ending the
            transcript, which only hearing can tell, is neither favoured nor disfavoured by the prior's other words.
        end_ids: token ids that end a sequence.
        with_audio: (B,) bool, the prompts that have audio; the others are left as they are.
        start_id: token that begins a text.
        prompt_length: columns of the prompt, after which the transcript begins.
        weight: of the prior.
    """

    def __init__(self, predict, config, vocab_ids, end_ids, with_audio, start_id, prompt_length, weight):
        self.predict, self.config = predict, config
        self.vocab_ids, self.end_ids, self.start_id = vocab_ids, end_ids, start_id
        self.with_audio = with_audio
        self.prompt_length, self.weight = prompt_length, weight
        self.cache, self.written = None, None

    def __call__(self, input_ids, scores):
        """`input_ids` (N, L), `scores` (N, V), a prompt's rows together -> (N, V)."""
        logits = self._logits(input_ids[:, self.prompt_length :]).to(scores.device).float()
        prior = logits - logits[:, self.vocab_ids].logsumexp(-1, keepdim=True)
        prior[:, self.end_ids] = 0.0
        rows = self.with_audio.repeat_interleave(len(scores) // len(self.with_audio))
        return scores + (self.weight * prior * rows[:, None]).to(scores.dtype)

    def _logits(self, written):
        """`written` (N, L), one token more than at the last call -> logits (N, V) of the next one."""
        if not written.shape[1]:
            self.cache = DynamicCache(config=self.config)
            tokens = torch.full((len(written), 1), self.start_id, device=written.device)
        else:
            # Two prompts may have written the same, and then share what follows from it.
            self.cache.reorder_cache(parent_rows(written, self.written))
            tokens = written[:, -1:]
        self.written = written
        return self.predict(tokens, self.cache)[:, -1]
