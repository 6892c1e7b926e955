"""Speculative decoding with what the alignment heard: it drafts, the language model checks several words at once.

Decoding one sequence reads all the LLM's weights per token; several tokens at once cost far less than as many passes.
The alignment's transcript is there before the LLM has begun, so nothing has to be run for the draft. What the LLM would
not have written itself is thrown away: the words are those of greedy decoding, up to the rounding of larger matrices.
Leviathan et al. 2023, "Fast inference from transformers via speculative decoding" (https://arxiv.org/abs/2211.17192);
the loop is transformers' own (`_assisted_decoding`).
"""

import copy
import os

import numpy as np
import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer
from transformers.generation import CandidateGenerator, GenerationMode

from .kv_cache_audiophi import CACHE_NAME
from .lm_prior_audiophi import LanguageModelPrior

# Of `generate`: whatever may look beyond a prefix, remember earlier calls or stop in the middle of a draft.
NOT_WITH_A_DRAFT = ("assistant_model", "custom_generate", "logits_processor", "stopping_criteria", "inputs_embeds")
CONFIG_NOT_WITH_A_DRAFT = ("stop_strings", "guidance_scale", "max_time", "cache_implementation")


class HeardDraft(CandidateGenerator):
    """Proposes the next words of the alignment's transcript.

    Where in it the LLM is, is the end of the part that resembles most what it has written (edit distance), so that a
    word that it writes otherwise, or leaves out, costs one rejected draft and not all the rest.

    Args:
        heard: LLM token ids of the transcript, with the token that ends a text behind them.
        prompt_length: columns of the prompt, after which the transcript begins.
        size: tokens proposed at once, at most: fewer where the last were rejected.
    `max_length`, of prompt and transcript, is known only when transformers' loop begins.
    """

    def __init__(self, heard, prompt_length, size):
        self.heard = np.asarray(heard, dtype=np.int64)
        self.size = self.most = size
        self.prompt_length, self.max_length = prompt_length, None
        self.written, self.proposed = 0, []
        self.distance = np.arange(len(self.heard) + 1)  # of what is written from the transcript's first j tokens

    def get_candidates(self, input_ids, **kwargs):
        """`input_ids` (1, L) -> the same and up to `size` more (1, L + n), and no probabilities."""
        new = input_ids[0, self.prompt_length + self.written :].tolist()
        for token in new:
            self._write(token)
        # Of equally good places the last: a word written otherwise is likelier than one put in.
        place = len(self.heard) - int(self.distance[::-1].argmin())
        size = min(self.size, self.max_length - input_ids.shape[1] - 1)
        self.proposed = self.heard[place : place + max(size, 0)].tolist()
        draft = torch.tensor([self.proposed], dtype=input_ids.dtype, device=input_ids.device)
        return torch.cat([input_ids, draft], 1), None

    def _write(self, token):
        """Distances after one more token: a row of the table of edit distances (Wagner and Fischer 1974)."""
        self.written += 1
        places = np.arange(len(self.distance))
        row = self.distance + 1
        row[1:] = np.minimum(row[1:], self.distance[:-1] + (self.heard != token))
        self.distance = np.minimum.accumulate(row - places) + places

    def update_candidate_strategy(self, input_ids, scores, num_matches):
        """Twice as many tokens as were right at last: where the LLM often disagrees, checking many is in vain."""
        self.size = min(self.most, 2 * (int(num_matches) + 1))


class DraftedPrior(LanguageModelPrior):
    """The prior of one row, in one pass of its own over a whole draft (`HeardDraft`, its first argument)."""

    def __init__(self, draft, *args):
        super().__init__(*args)
        self.draft, self.cache = draft, DynamicCache(config=self.config)
        self.read, self.found = [], {}  # tokens in the cache; logits by what has been written

    def _logits(self, written):
        words = written[0].tolist()
        if tuple(words) not in self.found:
            tokens = [self.start_id, *words, *self.draft.proposed]
            # Of what was read before, as much as still holds; the last word is read in any case, for what follows it.
            same = min(len(os.path.commonprefix([self.read, tokens])), len(words))
            if same < len(self.read):
                self.cache.crop(same - len(self.read))
            logits = self.predict(torch.tensor([tokens[same:]], device=written.device), self.cache)[0]
            self.found = {tuple(tokens[1 : same + i + 1]): row for i, row in enumerate(logits)}
            self.read = tokens
        return self.found[tuple(words)][None]


def is_plain(model, generation_config, kwargs):
    """Whether `generate` with these settings writes one sequence per prompt, greedily, and returns nothing else."""
    config = copy.deepcopy(model.generation_config if generation_config is None else generation_config)
    config.update(**{name: value for name, value in kwargs.items() if value is not None})
    return (
        config.get_generation_mode() == GenerationMode.GREEDY_SEARCH
        and (config.num_return_sequences or 1) == 1
        and not config.return_dict_in_generate
        and not any(kwargs.get(name) for name in NOT_WITH_A_DRAFT)
        and not any(getattr(config, name, None) for name in CONFIG_NOT_WITH_A_DRAFT)
    )


def may_draft(model, generation_config, kwargs, batch_size):
    """Whether `generate` with these settings writes the same words with a draft as without: one sequence, greedily,
    with a cache that forgets rejected words, and nothing beside the LLM's scores that depends on earlier calls."""
    config, cache = model.generation_config if generation_config is None else generation_config, kwargs.get(CACHE_NAME)
    return (
        batch_size == 1
        and is_plain(model, generation_config, {**kwargs, "return_dict_in_generate": False})
        and kwargs.get("use_cache", config.use_cache) is not False
        # transformers' loop reads the whole prompt first: not what a cache of earlier turns holds already.
        and (cache is None or (type(cache) is DynamicCache and not cache.get_seq_length()))
        and can_forget(model.model.language_model)
    )


def can_forget(language_model):
    """Whether its cache can drop the last positions again: sliding windows and recurrent states cannot."""
    layers = DynamicCache(config=language_model.config).layers
    return not language_model._is_stateful and all(type(layer) is DynamicLayer for layer in layers)
