"""What GenerationMixin's own `generate` needs to know about audio: it is encoded once, before the loop."""

import copy

import torch
from transformers import GenerationMixin

from .ctc_scoring_audiophi import CTCPrefixScorer, alignment_per_prompt
from .drafting_audiophi import DraftedPrior, HeardDraft, may_draft
from .kv_cache_audiophi import CACHE_NAME
from .lm_prior_audiophi import LanguageModelPrior
from .lora_audiophi import without_lora
from .placeholders_audiophi import (
    check_context,
    check_placeholders,
    drop_unused_placeholders,
    ends_with,
    repeat_audio,
)

AUDIO_INPUTS = (
    "input_features",
    "input_features_mask",
    "input_values",
    "input_values_mask",
    "audio_hidden_states",
    "audio_hidden_mask",
    "audio_num_windows",
)
# Settings of a generation config that transformers does not know, and what they are where they are not given.
GENERATION_SETTINGS = {
    "ctc_weight": 0.0,
    "ctc_temperature": 1.0,
    "lm_prior_weight": 0.0,
    "lm_prior_start_id": None,
    "draft_tokens": 16,
}


class AudioPhiGenerationMixin(GenerationMixin):
    """Audio in, audio embeddings to the loop, the caller's own prompt back in front of the result."""

    @torch.no_grad()
    def generate(self, inputs=None, generation_config=None, **kwargs):
        """`GenerationMixin.generate` with audio.

        Takes the processor's outputs and everything `generate` takes. The audio is encoded once. With the "collapse"
        readout unused placeholders are removed from the prompt while generating; the returned sequences start with
        the prompt as given, and `max_length` / `min_length` count it so.

        For transcripts, the alignment head can have a share in the scores. It knows nothing of other answers, so a
        model of several tasks uses it where the prompt asks for a transcript (`transcribe_endings` of the config).
        These are arguments, or attributes of the generation config:
            ctc_weight (0): its share, between 0 and 1, see `CTCPrefixScorer`.
            ctc_temperature (1): of its posteriors; CTC is surer of itself than it should be, more makes it less so.
            lm_prior_weight (0): see `LanguageModelPrior`; without effect where ctc_weight is 0.
            lm_prior_start_id (the LLM's bos): token that begins a text for that prior.
            draft_tokens (16): tokens of the alignment's transcript that the LLM checks at once where one transcript is
                decoded greedily (`HeardDraft`): the same words, sooner. 0: one by one.
        Raises ValueError for values outside these ranges, and where there is no alignment head.
        """
        fusion = self._fusion_settings(generation_config, kwargs)
        audio_inputs = {name: kwargs.pop(name) for name in AUDIO_INPUTS if name in kwargs}
        audio_inputs = {name: value for name, value in audio_inputs.items() if value is not None}
        if not audio_inputs:
            return super().generate(inputs, generation_config, **kwargs)
        input_ids = inputs if inputs is not None else kwargs.pop("input_ids", None)
        if input_ids is None:
            raise ValueError(
                "generate with audio needs input_ids with the audio placeholders; the processor makes them"
            )
        if kwargs.get("inputs_embeds") is not None:
            raise ValueError(
                "generate takes audio inputs or inputs_embeds, not both: leave out inputs_embeds, or put the audio's "
                "embeddings (get_audio_features(...).pooler_output) into them"
            )
        if self.config.readout == "frames":
            check_context(input_ids, self.config)
        drafting = self._drafts(input_ids, fusion, generation_config, kwargs)
        with_alignment = drafting or fusion["ctc_weight"] > 0
        audio = self.get_audio_features(**audio_inputs, with_alignment=with_alignment, return_dict=True)
        embeds, keep = audio.pooler_output, audio.audio_keep
        check_placeholders(input_ids, embeds, self.config)
        prompt, attention_mask = input_ids, kwargs.pop("attention_mask", None)
        if keep is not None:
            compact = drop_unused_placeholders(prompt, attention_mask, self.config.audio_token_id, keep, "left")
            input_ids, attention_mask, embeds = compact.input_ids, compact.attention_mask, embeds[keep]
            check_context(input_ids, self.config)
            generation_config, kwargs = self._shorten(generation_config, kwargs, prompt.shape[1] - input_ids.shape[1])
        draft = None
        if drafting:
            draft = self._draft(audio, prompt, input_ids.shape[1], fusion, generation_config, kwargs)
        if fusion["ctc_weight"]:
            scorers = self._scorers(audio, prompt, input_ids.shape[1], fusion, generation_config, kwargs, draft)
            kwargs["logits_processor"] = [*(kwargs.get("logits_processor") or []), *scorers]
        if draft is not None:
            generation_config, kwargs = self._with_draft(draft, generation_config, kwargs)
        output = super().generate(
            input_ids, generation_config, attention_mask=attention_mask, audio_embeds=embeds, **kwargs
        )
        if keep is None:
            return output
        sequences = output if isinstance(output, torch.Tensor) else output.sequences
        prompts = prompt.to(sequences.device).repeat_interleave(len(sequences) // len(prompt), dim=0)
        sequences = torch.cat([prompts, sequences[:, input_ids.shape[1] :]], dim=1)
        if isinstance(output, torch.Tensor):
            return sequences
        output.sequences = sequences
        return output

    def _fusion_settings(self, generation_config, kwargs):
        """Takes GENERATION_SETTINGS out of the arguments of `generate`, else out of the generation config."""
        given = generation_config if generation_config is not None else self.generation_config
        settings = {}
        for name, default in GENERATION_SETTINGS.items():
            value = kwargs.pop(name, None)
            value = getattr(given, name, None) if value is None else value
            settings[name] = default if value is None else value
        weight = settings["ctc_weight"]
        if not 0 <= weight <= 1:
            raise ValueError(f"ctc_weight={weight} is not between 0 and 1")
        for name, allowed in (("lm_prior_weight", settings["lm_prior_weight"] >= 0),
                              ("draft_tokens", settings["draft_tokens"] >= 0),
                              ("ctc_temperature", settings["ctc_temperature"] > 0)):  # fmt: skip
            if not allowed:
                raise ValueError(f"{name}={settings[name]} is too small")
        if weight and self.model.alignment is None:
            raise ValueError(f"ctc_weight={weight} needs an alignment head, which this model does not have")
        return settings

    def _drafts(self, prompt, fusion, generation_config, kwargs):
        """Whether the alignment's transcript may be the draft of what is generated."""
        given = generation_config if generation_config is not None else self.generation_config
        endings = self.config.transcribe_endings
        return (
            fusion["draft_tokens"] > 0
            and self.model.alignment is not None
            and may_draft(self, given, kwargs, len(prompt))
            and (endings is None or bool(ends_with(prompt, endings).all()))
        )

    def _draft(self, audio, prompt, prompt_length, fusion, generation_config, kwargs):
        """The alignment's transcript as a draft; None where it heard nothing."""
        log_probs, lengths = self._posteriors(audio, prompt)
        mask = torch.arange(log_probs.shape[1], device=lengths.device) < lengths[:, None]
        heard = self.model.alignment.greedy(log_probs, mask)[0]
        ends = self._end_ids(generation_config, kwargs)
        return HeardDraft([*heard, *ends[:1]], prompt_length, fusion["draft_tokens"]) if heard else None

    def _with_draft(self, draft, generation_config, kwargs):
        """The same settings, and `draft`."""
        kwargs = {**kwargs, "audio_draft": draft}
        # By its lookup in the prompt transformers knows that there are drafts without another model.
        if generation_config is None:
            return None, {**kwargs, "prompt_lookup_num_tokens": draft.most}
        generation_config = copy.deepcopy(generation_config)
        generation_config.prompt_lookup_num_tokens = draft.most
        return generation_config, kwargs

    def _get_candidate_generator(self, generation_config, input_ids, *args, model_kwargs, **kwargs):
        draft = model_kwargs.get("audio_draft")
        if draft is not None:
            draft.max_length = generation_config.max_length
            return draft
        return super()._get_candidate_generator(
            generation_config, input_ids, *args, model_kwargs=model_kwargs, **kwargs
        )

    def _posteriors(self, audio, prompt, temperature=1.0):
        """The alignment's log probabilities (B, T, V' + 1) per prompt, and lengths (B,): 0 where no transcript is asked
        for."""
        log_probs, lengths = alignment_per_prompt(
            audio.align_logits / temperature, audio.tokens_mask, prompt, self.config.audio_token_id
        )
        if self.config.transcribe_endings is not None:
            lengths = lengths * ends_with(prompt, self.config.transcribe_endings)
        return log_probs, lengths

    def _end_ids(self, generation_config, kwargs):
        """Token ids that end a text, as a list."""
        given = generation_config if generation_config is not None else self.generation_config
        ends = kwargs.get("eos_token_id", given.eos_token_id)
        return list(ends) if isinstance(ends, (list, tuple)) else [] if ends is None else [ends]

    def _scorers(self, audio, prompt, prompt_length, fusion, generation_config, kwargs, draft):
        """What judges a continuation beside the LLM that hears: the alignment, and the LLM that does not."""
        ends = self._end_ids(generation_config, kwargs)
        log_probs, lengths = self._posteriors(audio, prompt, fusion["ctc_temperature"])
        vocab_ids = self.model.alignment.vocab_ids
        remember = 1 if draft is None else draft.most + 1
        weight = fusion["ctc_weight"]
        scorers = [CTCPrefixScorer(log_probs, lengths, vocab_ids, ends, prompt_length, weight, remember)]
        if not fusion["lm_prior_weight"]:
            return scorers
        start = fusion["lm_prior_start_id"]
        if start is None:
            start = self.config.text_config.bos_token_id
        if start is None:
            start = ends[0] if ends else 0

        def predict(tokens, cache):
            with without_lora(self.model.language_model):
                hidden = self.model.language_model(input_ids=tokens, use_cache=True, **{CACHE_NAME: cache})
                return self.compute_logits(hidden.last_hidden_state)

        prior = (predict, vocab_ids, lengths > 0, start, prompt_length, fusion["lm_prior_weight"])
        return [*scorers, LanguageModelPrior(*prior) if draft is None else DraftedPrior(draft, *prior)]

    def _shorten(self, generation_config, kwargs, removed):
        """Total lengths that count the prompt, less the `removed` columns; new-token limits stay as they are."""
        kwargs, given = dict(kwargs), self.generation_config
        if generation_config is not None:
            given = generation_config = copy.deepcopy(generation_config)
        for name, instead in (("max_length", "max_new_tokens"), ("min_length", "min_new_tokens")):
            total = kwargs.get(name, getattr(given, name))
            if not total or kwargs.get(instead, getattr(given, instead)) is not None:
                continue
            # A config and arguments together make `generate` warn: what the caller gave stays where it was.
            target = kwargs if name in kwargs or generation_config is None else generation_config.__dict__
            target[name] = max(0, total - removed)
        return generation_config, kwargs

    def _expand_inputs_for_generation(
        self, expand_size=1, is_encoder_decoder=False, input_ids=None, audio_embeds=None, **model_kwargs
    ):
        # Audio rows belong to prompts, several to one: repeating each row would mix up the order.
        if audio_embeds is not None and expand_size > 1:
            audio_embeds = repeat_audio(audio_embeds, input_ids, self.config.audio_token_id, expand_size)
        input_ids, model_kwargs = super()._expand_inputs_for_generation(
            expand_size, is_encoder_decoder, input_ids, **model_kwargs
        )
        if audio_embeds is not None:
            model_kwargs["audio_embeds"] = audio_embeds
        return input_ids, model_kwargs

    def prepare_inputs_for_generation(
        self, input_ids, audio_embeds=None, inputs_embeds=None, is_first_iteration=False, audio_draft=None, **kwargs
    ):
        inputs = super().prepare_inputs_for_generation(
            input_ids, inputs_embeds=inputs_embeds, is_first_iteration=is_first_iteration, **kwargs
        )
        # An assistant (assisted decoding) reads the prompt without being told that it is the first iteration.
        whole = is_first_iteration or not kwargs.get("use_cache", True)
        if audio_embeds is not None and (whole or inputs["input_ids"].shape[1] > 1):
            # With a cache of earlier turns only the end of the prompt is run, and only its audio is needed.
            placeholders = input_ids == self.config.audio_token_id
            unseen = placeholders.clone()
            unseen[:, : input_ids.shape[1] - inputs["input_ids"].shape[1]] = False
            inputs["audio_embeds"] = audio_embeds[unseen[placeholders].to(audio_embeds.device)]
        return inputs
