"""Shallow fusion: what the language model would write if it heard nothing.

The LLM that reads the alignment's tokens mostly copies them, mistakes included. The same LLM without audio and without
its LoRA layers has not learned to copy: it knows only which words follow one another, and that is what tells "lay now
and then an egg" from "laid now and then and egg". Gulcehre et al. 2015 (https://arxiv.org/abs/1503.03535).
"""

import torch
from transformers import DynamicCache, LogitsProcessor


class LanguageModelPrior(LogitsProcessor):
    """Adds weight * log p(token | what has been written) to the scores of the alignment's tokens.

    Args:
        predict: (token ids (N, L), cache) -> logits (N, L, V) of the token after each, without audio.
        config: of the LLM, which says what its cache holds.
        vocab_ids: (V',) LLM token ids that are scored; the probabilities are normalised over them, so that ending the
            transcript, which only hearing can tell, is neither favoured nor disfavoured by the prior's other words.
        with_audio: (B,) bool, the prompts that have audio; the others are left as they are.
        start_id: token that begins a text.
        prompt_length: columns of the prompt, after which the transcript begins.
        weight: of the prior.
    """

    def __init__(self, predict, config, vocab_ids, with_audio, start_id, prompt_length, weight):
        self.predict, self.config = predict, config
        self.vocab_ids, self.start_id = vocab_ids, start_id
        self.with_audio = with_audio
        self.prompt_length, self.weight = prompt_length, weight
        self.cache, self.rows = None, {}

    def __call__(self, input_ids, scores):
        """`input_ids` (N, L), `scores` (N, V), a prompt's rows together -> (N, V)."""
        prior = self._logits(input_ids[:, self.prompt_length :]).to(scores.device)
        prior = prior[:, self.vocab_ids].float().log_softmax(-1)
        fused = scores.clone()
        rows = self.with_audio.repeat_interleave(len(scores) // len(self.with_audio))
        fused[:, self.vocab_ids] += (self.weight * prior * rows[:, None]).to(scores.dtype)
        return fused

    def _logits(self, written):
        """`written` (N, L), one token more than at the last call -> logits (N, V) of the next one."""
        if not written.shape[1]:
            self.cache = DynamicCache(config=self.config)
            tokens = torch.full((len(written), 1), self.start_id, device=written.device)
        else:
            # Rows of one prompt were reordered since the last step. Two prompts may have written the same, and then
            # share what follows from it.
            parents = [self.rows[tuple(prefix)] for prefix in written[:, :-1].tolist()]
            self.cache.reorder_cache(torch.tensor(parents, device=written.device))
            tokens = written[:, -1:]
        self.rows = {tuple(prefix): row for row, prefix in enumerate(written.tolist())}
        return self.predict(tokens, self.cache)[:, -1]
