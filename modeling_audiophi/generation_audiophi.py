"""What GenerationMixin's own `generate` needs to know about audio: it is encoded once, before the loop."""

import copy
import zlib

import torch
from transformers import GenerationMixin
from transformers.generation import GenerateDecoderOnlyOutput

from .configuration_audiophi import check_ears
from .ctc_scoring_audiophi import CTCPrefixScorer, alignment_per_prompt, last_clips
from .drafting_audiophi import DraftedPrior, HeardDraft, is_plain, may_draft
from .kv_cache_audiophi import CACHE_NAME
from .lm_prior_audiophi import LanguageModelPrior
from .lora_audiophi import without_lora
from .placeholders_audiophi import repeat_audio

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
    "draft_tokens": 0,
    "hear_with": None,
    "hear_beams": None,
    "hear_ctc_weight": 0.02,
    "hear_lm_weight": 0.1,
    "hear_confidence": None,
    "verbatim": False,
}
LENGTHS = (("max_length", "max_new_tokens"), ("min_length", "min_new_tokens"))


class AudioPhiGenerationMixin(GenerationMixin):
    """Audio in, audio embeddings to the loop, the caller's own prompt back in front of the result."""

    @torch.no_grad()
    def generate(self, inputs=None, generation_config=None, *, task=None, asked=None, audio_features=None, **kwargs):
        """`GenerationMixin.generate` with audio.

        Takes the processor's outputs and everything `generate` takes. The audio is encoded once, or not at all where
        `audio_features` (an `AudioPhiAudioOutput`) has it encoded already. The returned sequences start with the prompt
        as given, with a placeholder per clip, and `max_length` / `min_length` count it so.

        `task`: name of one of `generation_config.tasks`, {name: settings of this method}; None: what all prompts ask
        for by `asked` (B, 2), the processor's: code of the task of the last user turn (`task_code`) and the number of
        clips in it. Without a task decoding is plain. Arguments, and what is set in a `generation_config` of the
        caller's, win over the task's settings.

        Where a transcript is wanted, the alignment head can have a share in the scores. It expects the words of the
        clips of the last user turn (without `asked`: of the last clip), and nothing where that turn has none. These are
        arguments, or attributes of the generation config:
            ctc_weight (0): its share, between 0 and 1, see `CTCPrefixScorer`. At 1, without prior and
                sampling, its own reading is the transcript: the LLM is not run, and of other settings only a length
                counts.
            ctc_temperature (1): of its posteriors; CTC is surer of itself than it should be, more makes it less so.
            lm_prior_weight (0): see `LanguageModelPrior`; without effect where ctc_weight is 0.
            lm_prior_start_id (the LLM's bos): token that begins a text for that prior, and for hear_lm_weight.
            draft_tokens (0): tokens of the alignment's transcript that the LLM checks at once where one sequence is
                decoded greedily (`HeardDraft`): the same words, sooner. 0: one by one.
            hear_with (the config's): "alignment", "decoder" or "both", see `AudioPhiConfig`.
            hear_beams (1; both: 4): texts that the decoder proposes.
            hear_ctc_weight (0.02), hear_lm_weight (0.1): shares of the alignment, and of the LLM without audio, in
                choosing from them with "both", see `together` in ears_audiophi.py.
            hear_confidence: three numbers, see `word_confidence`; the engine's alone.
            verbatim (False): with a decoder, the answer is its text itself, without the LLM.
        Raises ValueError for an unknown task, values outside these ranges, and where there is no alignment head.
        """
        generation_config, kwargs, fusion = self.decoding_settings(generation_config, kwargs, task, asked)
        audio_inputs = {name: kwargs.pop(name) for name in AUDIO_INPUTS if name in kwargs}
        audio_inputs = {name: value for name, value in audio_inputs.items() if value is not None}
        if not audio_inputs and audio_features is None:
            return super().generate(inputs, generation_config, **kwargs)
        prompt = inputs if inputs is not None else kwargs.pop("input_ids", None)
        if prompt is None:
            raise ValueError(
                "generate with audio needs input_ids with the audio placeholders; the processor makes them"
            )
        if kwargs.get("inputs_embeds") is not None:
            raise ValueError(
                "generate takes audio inputs or inputs_embeds, not both: leave out inputs_embeds, or put the audio's "
                "embeddings (get_audio_features(...).pooler_output) into them"
            )
        if audio_inputs and audio_features is not None:
            raise ValueError("generate takes audio inputs or audio_features, not both")
        mask, audio = kwargs.pop("attention_mask", None), audio_features
        if audio is None:
            # What is too long is known before the expensive work.
            if self.config.readout == "frames" and fusion["hear_with"] == "alignment":
                self.model.expand_prompt(prompt, mask, self.model.most_counts(audio_inputs), padding_side="left")
            audio = self.hear(audio_inputs, fusion["hear_with"], fusion["hear_beams"])
        if audio.words is not None:
            audio = self.choose_words(audio, fusion)
            clips = last_clips(prompt, self.config.audio_token_id, asked)
            if fusion["verbatim"] and all(clips):
                config = self.generation_config if generation_config is None else generation_config
                count = kwargs.get("num_return_sequences") or config.num_return_sequences or 1
                texts = self.written_words(clips, audio, count)
                sequences = self.behind(prompt, texts, generation_config, kwargs)
                named = kwargs.get("return_dict_in_generate", config.return_dict_in_generate)
                return GenerateDecoderOnlyOutput(sequences=sequences) if named else sequences
            audio = self.read_words(audio)
        expanded = self.model.expand_prompt(prompt, mask, audio.counts, padding_side="left")
        length = expanded.input_ids.shape[1]
        generation_config, kwargs = self._count_from(length - prompt.shape[1], generation_config, kwargs)
        drafting = fusion["draft_tokens"] and self.model.alignment is not None
        if drafting or fusion["ctc_weight"]:
            clips = last_clips(prompt, self.config.audio_token_id, asked)
            logits = audio.align_logits
            if logits is None:
                logits = self.model.align(audio.tokens, self.model.word_table())
            # Scores come to where the prompt is, wherever the parts of the model lie.
            heard = logits.to(prompt.device), audio.tokens_mask.to(prompt.device)
            log_probs, lengths = alignment_per_prompt(*heard, clips, fusion["ctc_temperature"])
            alone = fusion["ctc_weight"] == 1 and not fusion["lm_prior_weight"] and bool((lengths > 0).all())
            if alone and is_plain(self, generation_config, {**kwargs, "num_beams": 1}):
                return self.behind(prompt, self._greedy(log_probs, lengths), generation_config, kwargs)
            draft = None
            if drafting and may_draft(self, generation_config, kwargs, len(prompt)):
                draft = self._draft(log_probs, lengths, length, fusion, generation_config, kwargs)
            if fusion["ctc_weight"]:
                scorers = self._scorers(log_probs, lengths, length, fusion, generation_config, kwargs, draft)
                kwargs["logits_processor"] = [*(kwargs.get("logits_processor") or []), *scorers]
            if draft is not None:
                kwargs["audio_draft"] = draft
                # By its lookup in the prompt transformers knows that there are drafts without another model.
                lookup = {"prompt_lookup_num_tokens": draft.most}
                generation_config, kwargs = with_settings(generation_config, kwargs, lookup)
        output = super().generate(
            expanded.input_ids,
            generation_config,
            attention_mask=expanded.attention_mask,
            audio_embeds=audio.pooler_output,
            **kwargs,
        )
        sequences = output if isinstance(output, torch.Tensor) else output.sequences
        prompts = prompt.to(sequences.device).repeat_interleave(len(sequences) // len(prompt), dim=0)
        sequences = torch.cat([prompts, sequences[:, length:]], dim=1)
        if isinstance(output, torch.Tensor):
            return sequences
        output.sequences = sequences
        return output

    def decoding_settings(self, generation_config=None, kwargs=None, task=None, asked=None):
        """Arguments of `generate` -> (generation_config, kwargs, GENERATION_SETTINGS): with what the task sets and the
        caller does not. ValueError for an unknown task, and values that cannot be."""
        kwargs = dict(kwargs or {})
        own = {} if generation_config is None else vars(generation_config)
        given = {*kwargs, *(name for name, value in own.items() if value is not None)}
        for total, new in LENGTHS:
            given |= {total, new} if given & {total, new} else set()
        of_task = self._task_settings(task, asked, own)
        settings = {name: value for name, value in of_task.items() if name not in given}
        fusion = {}
        for name, default in GENERATION_SETTINGS.items():
            places = (kwargs.pop(name, None), own.get(name), settings.pop(name, None))
            places = (*places, getattr(self.generation_config, name, None), default)
            fusion[name] = next((value for value in places if value is not None), None)
        fusion["hear_with"] = fusion["hear_with"] or self.config.hear_with
        check_ears(self.config, fusion["hear_with"])
        weight = fusion["ctc_weight"]
        if not 0 <= weight <= 1:
            raise ValueError(f"ctc_weight={weight} is not between 0 and 1")
        for name, allowed in (("lm_prior_weight", fusion["lm_prior_weight"] >= 0),
                              ("draft_tokens", fusion["draft_tokens"] >= 0),
                              ("hear_beams", (fusion["hear_beams"] or 1) >= 1),
                              ("ctc_temperature", fusion["ctc_temperature"] > 0)):  # fmt: skip
            if not allowed:
                raise ValueError(f"{name}={fusion[name]} is too small")
        if weight and self.model.alignment is None:
            raise ValueError(f"ctc_weight={weight} needs an alignment head, which this model does not have")
        return *with_settings(generation_config, kwargs, settings), fusion

    def _task_settings(self, task, asked, own):
        """What `generation_config.tasks` (in `own`, attributes of the caller's config, or the model's) says of `task`,
        or of the one that all rows of `asked` name."""
        tasks = own.get("tasks") or getattr(self.generation_config, "tasks", None) or {}
        if task is None:
            codes = set() if asked is None else set(asked[:, 0].tolist())
            task = next((name for name in tasks if codes == {task_code(name)}), None)
        elif task not in tasks:
            raise ValueError(f"unknown task {task!r}; this model knows: {', '.join(tasks) or 'none'}")
        return tasks.get(task) or {}

    def behind(self, prompt, texts, generation_config, kwargs):
        """What `generate` returns where no token is left to choose: prompts (B, L), behind each its `texts` (B * n
        lists of token ids), ended, none longer than allowed, (B * n, L + new); told to a streamer, too."""
        config = self.generation_config if generation_config is None else generation_config
        ends, most = self._end_ids(generation_config, kwargs)[:1], kwargs.get("max_new_tokens", config.max_new_tokens)
        if most is None and (total := kwargs.get("max_length", config.max_length)):
            most = max(0, total - prompt.shape[1])
        pad = kwargs.get("pad_token_id", config.pad_token_id)
        pad = pad if pad is not None else (ends or [0])[0]
        rows = [torch.tensor([*text, *ends][:most], dtype=torch.long) for text in texts]
        written = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad).to(prompt)
        if (streamer := kwargs.get("streamer")) is not None:
            streamer.put(prompt.cpu())
            for token in written[0].cpu():
                streamer.put(token[None])
            streamer.end()
        return torch.cat([prompt.repeat_interleave(len(rows) // len(prompt), 0), written], 1)

    def _greedy(self, log_probs, lengths):
        """LLM token ids of what the alignment hears, a list per row."""
        mask = torch.arange(log_probs.shape[1], device=lengths.device) < lengths[:, None]
        return self.model.alignment.greedy(log_probs, mask) if mask.any() else [[] for _ in lengths]

    def _draft(self, log_probs, lengths, prompt_length, fusion, generation_config, kwargs):
        """The alignment's transcript as a draft; None where it heard nothing."""
        heard = self._greedy(log_probs, lengths)[0]
        ends = self._end_ids(generation_config, kwargs)
        return HeardDraft([*heard, *ends[:1]], prompt_length, fusion["draft_tokens"]) if heard else None

    def _get_candidate_generator(self, generation_config, input_ids, *args, model_kwargs, **kwargs):
        draft = model_kwargs.get("audio_draft")
        if draft is not None:
            draft.max_length = generation_config.max_length
            return draft
        return super()._get_candidate_generator(
            generation_config, input_ids, *args, model_kwargs=model_kwargs, **kwargs
        )

    def _end_ids(self, generation_config, kwargs):
        """Token ids that end a text, as a list."""
        given = generation_config if generation_config is not None else self.generation_config
        ends = kwargs.get("eos_token_id", given.eos_token_id)
        return list(ends) if isinstance(ends, (list, tuple)) else [] if ends is None else [ends]

    def _scorers(self, log_probs, lengths, prompt_length, fusion, generation_config, kwargs, draft):
        """What judges a continuation beside the LLM that hears: the alignment, and the LLM that does not."""
        ends = self._end_ids(generation_config, kwargs)
        vocab_ids = self.model.alignment.vocab_ids.to(log_probs.device)
        remember = 1 if draft is None else draft.most + 1
        weight = fusion["ctc_weight"]
        scorers = [CTCPrefixScorer(log_probs, lengths, vocab_ids, ends, prompt_length, weight, remember)]
        if not fusion["lm_prior_weight"]:
            return scorers
        start = self.prior_start(fusion)
        language_model = self.model.language_model

        def predict(tokens, cache):
            with without_lora(language_model):
                hidden = language_model(input_ids=tokens, use_cache=True, **{CACHE_NAME: cache})
                return self.compute_logits(hidden.last_hidden_state)

        config = language_model.config
        prior = (predict, config, vocab_ids, ends, lengths > 0, start, prompt_length, fusion["lm_prior_weight"])
        return [*scorers, LanguageModelPrior(*prior) if draft is None else DraftedPrior(draft, *prior)]

    def prior_start(self, fusion):
        """Token id that begins a text for the language model without audio."""
        own, ends = self.config.text_config.bos_token_id, self._end_ids(None, {})
        return next(token for token in (fusion["lm_prior_start_id"], own, *ends, 0) if token is not None)

    def _count_from(self, added, generation_config, kwargs):
        """Total lengths that count the prompt, with the `added` columns (fewer than none are possible); new-token
        limits stay as they are."""
        kwargs, given = dict(kwargs), self.generation_config
        if generation_config is not None:
            given = generation_config = copy.deepcopy(generation_config)
        for name, instead in LENGTHS:
            total = kwargs.get(name, getattr(given, name))
            if not total or kwargs.get(instead, getattr(given, instead)) is not None:
                continue
            # A config and arguments together make `generate` warn: what the caller gave stays where it was.
            target = kwargs if name in kwargs or generation_config is None else generation_config.__dict__
            target[name] = max(0, total + added)
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


def task_code(name):
    """A number for a task's name, by which the processor tells what a prompt asks for (`asked`)."""
    return zlib.crc32(name.encode()) & 0x7FFFFFFF


def with_settings(generation_config, kwargs, settings):
    """Arguments of `generate` with `settings`: in the config if there is one, since both together make `generate`
    warn."""
    if generation_config is None:
        return None, {**kwargs, **settings}
    generation_config = copy.deepcopy(generation_config)
    vars(generation_config).update(settings)
    return generation_config, kwargs
