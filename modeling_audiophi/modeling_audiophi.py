"""AudioPhi: a frozen audio encoder, an adapter and a small causal language model.

    waveform -> features -> audio_tower -> multi_modal_projector -> readout -> language_model -> words
                                       `-> clip_tokens ------------------------^

The processor writes one placeholder per clip; the model puts as many embeddings there as the readout keeps.
"""

import torch
from torch import nn
from transformers import AutoModel, PreTrainedModel
from transformers import initialization as init
from transformers.utils import can_return_tuple

from .adapters import adapter_class
from .alignment_audiophi import AlignmentHead
from .checkpoints_audiophi import CheckpointsMixin
from .clip_tokens import ClipTokens
from .components_audiophi import ComponentsMixin
from .configuration_audiophi import AudioPhiConfig
from .distillation_audiophi import as_teacher, kl_divergence
from .ears_audiophi import EarsMixin, read_instead
from .encoders import encoder_class
from .family_audiophi import FamilyHead, look_up
from .generation_audiophi import AudioPhiGenerationMixin
from .heard_audiophi import hear_simulated
from .hearing_audiophi import HearingMixin
from .kv_cache_audiophi import CACHE_NAME
from .lora_audiophi import inject_lora
from .outputs_audiophi import AudioPhiModelOutput, AudioPhiOutput
from .packing_audiophi import pack_rows
from .placeholders_audiophi import check_context, check_placeholders, expand_placeholders, padding_side_of
from .readout_mixed import SoundWords
from .readouts import build_readout
from .spelling_audiophi import Spelling
from .token_losses_audiophi import sum_of_tokens
from .tuning_audiophi import TuningMixin


class AudioPhiPreTrainedModel(PreTrainedModel):
    config_class = AudioPhiConfig
    base_model_prefix = "model"
    input_modalities = ("audio", "text")
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True
    _no_split_modules = None

    @classmethod
    def is_custom_code(cls):
        """False for transformers' loading: what `_init_weights` writes, here as in transformers, knows what is loaded.
        Parts without weights of their own, Falcon-H1's model, would be left with buffers that nobody has filled."""
        return False

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        if getattr(module, "starts_at_zero", False):
            for parameter in module.parameters():
                init.zeros_(parameter)
        elif isinstance(module, AlignmentHead):
            init.copy_(module.vocab_ids, torch.arange(len(module.vocab_ids)))
            init.ones_(module.scale)
            init.zeros_(module.bias)
            init.normal_(module.blank, mean=0.0, std=0.1)
        elif isinstance(module, Spelling):
            init.zeros_(module.ngrams)
            init.zeros_(module.starts)
            init.normal_(module.table, mean=0.0, std=module.table.shape[1] ** -0.5)
        elif isinstance(module, SoundWords):
            init.zeros_(module.common)
            init.ones_(module.scale)
        elif isinstance(module, ClipTokens):
            init.normal_(module.queries)
        elif hasattr(module, "layer_weights"):
            init.zeros_(module.layer_weights)


class AudioPhiModel(HearingMixin, AudioPhiPreTrainedModel):
    """Encoder, adapter, readout and the language model without its head."""

    def __init__(self, config):
        super().__init__(config)
        encoder = encoder_class(config.audio_config)
        size = config.text_config.hidden_size
        self.audio_tower = encoder(config.audio_config, config.encoder_layer)
        self.multi_modal_projector = adapter_class(config.adapter_config)(
            config.adapter_config, encoder.hidden_size(config.audio_config), size
        )
        head = (config.align_vocab_size, size, config.align_spelling)
        self.alignment = AlignmentHead(*head) if config.align_vocab_size else None
        self.readout = build_readout(config)
        whole = (size, encoder.hidden_size(config.audio_config), config.clip_tokens)
        self.clip_tokens = ClipTokens(*whole) if config.clip_tokens else None
        self.language_model = AutoModel.from_config(config.text_config)
        for part, arguments in config.lora.items():
            inject_lora(self, part, arguments)
        self.post_init()

    def get_input_embeddings(self):
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value):
        self.language_model.set_input_embeddings(value)

    def embed(self, ids):
        """Token ids -> embeddings as the LLM's layers read them, see `look_up`."""
        return look_up(self.get_input_embeddings(), ids, self.config.text_config)

    def train(self, mode=True):
        """A frozen encoder stays in eval mode: its dropout and masking would make cached features differ from live
        ones."""
        super().train(mode)
        if mode and not any(parameter.requires_grad for parameter in self.audio_tower.parameters()):
            self.audio_tower.eval()
        return self

    @torch.no_grad()
    def match_embeddings(self, align_vocab_ids=None, spellings=None):
        """Fit new parts to the loaded LLM: the alignment's vocabulary and spelling, readout and clip tokens to the RMS
        of its embeddings."""
        if align_vocab_ids is not None:
            self.alignment.vocab_ids.copy_(torch.as_tensor(align_vocab_ids))
        if spellings is not None:
            self.alignment.spelling.match(spellings)
        for part in (self.readout, self.clip_tokens):
            if part is not None:
                self.start_at_embeddings(part)

    @torch.no_grad()
    def start_at_embeddings(self, part):
        """Fit a new readout, or clip tokens, to the root mean square of the LLM's embeddings."""
        ids = torch.arange(self.config.text_config.vocab_size, device=self.device)
        # Some at a time: the table of a small LLM with many words takes a gigabyte in float32.
        part.start_at(torch.cat([self.embed(some).float().square().mean(1) for some in ids.split(8192)]).mean().sqrt())

    @can_return_tuple
    def forward(
        self,
        input_ids=None,
        input_features=None,
        input_features_mask=None,
        input_values=None,
        input_values_mask=None,
        audio_hidden_states=None,
        audio_hidden_mask=None,
        audio_num_windows=None,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        cache=None,
        inputs_embeds=None,
        audio_embeds=None,
        asked=None,
        heard_ids=None,
        heard_weights=None,
        heard_lengths=None,
        heard_clips=None,
        written=None,
        with_alignment=False,
        augment=None,
        use_cache=None,
        **kwargs,
    ):
        """Language model over text and audio: `input_ids` (B, L) with a placeholder for each clip of the audio inputs,
        or, already expanded, with one for each row of `audio_embeds` (N, D). Clips may also be simulated, see
        `hear_simulated`: `heard_ids`, `heard_weights` (S, T, K) and `heard_lengths` (S,) of these, and `heard_clips`
        (C,) bool, which they are; without any other neither encoder nor adapter runs. `written`: of each real clip
        the token ids that are read instead of the readout's words, or None. `inputs_embeds` (B, L, D) are taken as
        they are. `cache`, also by its older name `past_key_values`: earlier positions. `asked`, from the
        processor, is for `generate` only. Attentions are those of the expanded prompt.

        Raises ValueError when placeholders and audio differ in number, or the prompt exceeds the context.
        """
        cache = past_key_values if cache is None else cache
        past_length = cache.get_seq_length() if cache is not None else 0
        audio_inputs = {
            "input_features": input_features,
            "input_features_mask": input_features_mask,
            "input_values": input_values,
            "input_values_mask": input_values_mask,
            "audio_hidden_states": audio_hidden_states,
            "audio_hidden_mask": audio_hidden_mask,
            "audio_num_windows": audio_num_windows,
        }
        is_real = any(value is not None for value in (input_features, input_values, audio_hidden_states))
        has_audio = is_real or heard_ids is not None
        if has_audio or audio_embeds is not None:
            if inputs_embeds is not None:
                raise ValueError("give audio or inputs_embeds, not both: pooler_output may be put into the latter")
            if input_ids is None:
                raise ValueError("audio inputs need input_ids with the audio placeholders; the processor makes them")
        audio, prompt = None, None
        if has_audio:
            if position_ids is not None:
                raise ValueError("position_ids are those of the expanded prompt: leave them out where audio is given")
            # What is too long is known before the expensive work.
            if self.config.readout == "frames" and heard_ids is None:
                self.expand_prompt(input_ids, attention_mask, self.most_counts(audio_inputs), past_length)
            if is_real:
                audio = self.get_audio_features(
                    **audio_inputs,
                    with_alignment=with_alignment,
                    augment=augment,
                    output_hidden_states=False,  # those that forward returns are the language model's
                    output_attentions=False,
                    return_dict=True,
                )
                if written is not None:
                    texts, whole = [text or [] for text in written], [text is None for text in written]
                    audio = read_instead(audio, texts, whole, self.embed, self.device)
            if heard_ids is not None:
                heard = (heard_ids, heard_weights, heard_lengths, heard_clips)
                audio = hear_simulated(*heard, self.embed, audio)
            audio_embeds = audio.pooler_output
            prompt = self.expand_prompt(input_ids, attention_mask, audio.counts, past_length)
            input_ids, attention_mask = prompt.input_ids, prompt.attention_mask
        if inputs_embeds is None:
            inputs_embeds = self.fill_in(input_ids, audio_embeds, past_length)
            if has_audio and not is_real:
                inputs_embeds = self.reach_audio_parts(inputs_embeds)
        length, packed = inputs_embeds.shape[1], None
        if position_ids is None and attention_mask is not None and attention_mask.shape[1:] == (past_length + length,):
            position_ids = (attention_mask.long().cumsum(1) - 1).clamp(min=0)[:, past_length:]
            if self.training and cache is None and not kwargs.get("output_attentions"):
                packed = pack_rows(attention_mask, self.language_model)
        if packed is not None:
            inputs_embeds, position_ids = packed.pack(inputs_embeds), packed.position_ids
            attention_mask, use_cache = None, False
        outputs = self.language_model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            use_cache=use_cache,
            return_dict=True,
            **{CACHE_NAME: cache},
            **kwargs,
        )
        hidden, states = outputs.last_hidden_state, outputs.hidden_states
        if packed is not None:
            hidden, states = packed.unpack(hidden), states and tuple(packed.unpack(state) for state in states)
        if prompt is not None:
            hidden = prompt.gather(hidden)
            states = states and tuple(prompt.gather(state) for state in states)
        return AudioPhiModelOutput(
            last_hidden_state=hidden,
            hidden_states=states,
            attentions=outputs.attentions,
            audio=audio,
            **{CACHE_NAME: outputs[CACHE_NAME] if CACHE_NAME in outputs else None},
        )

    def expand_prompt(self, input_ids, attention_mask, counts, past_length=0, padding_side=None):
        """The `ExpandedPrompt` of (B, L) ids and a mask that also covers `past_length` earlier positions, padded as
        the mask says by default. ValueError for clips without a placeholder, placeholders without a clip, and more than
        the context holds."""
        past = None
        if attention_mask is not None:
            expected = (len(input_ids), past_length + input_ids.shape[1])
            if attention_mask.shape != expected:
                raise ValueError(f"a prompt with audio needs an attention mask of shape {expected}")
            past, attention_mask = attention_mask[:, :past_length], attention_mask[:, past_length:]
        side = padding_side or padding_side_of(attention_mask)
        prompt = expand_placeholders(input_ids, attention_mask, counts, self.config.audio_token_id, side)
        check_context(prompt, self.config)
        if past is not None:
            prompt.attention_mask = torch.cat([past, prompt.attention_mask], 1)
        return prompt

    def fill_in(self, input_ids, audio_embeds=None, past_length=0):
        """Embeddings (B, L, D) of ids, with `audio_embeds` (N, D) in the place of placeholders. ValueError when these
        differ in number."""
        embeds = self.embed(input_ids)
        if audio_embeds is None and past_length:
            return embeds
        places = (input_ids == self.config.audio_token_id)[..., None].to(embeds.device)
        wanted = int(places.sum())
        if audio_embeds is None:
            check_placeholders(wanted, 0)
            return self.reach_audio_parts(embeds)
        if wanted != len(audio_embeds):
            raise ValueError(f"the prompt has {wanted} audio placeholders, but {len(audio_embeds)} audio_embeds")
        return embeds.masked_scatter(places.expand_as(embeds), audio_embeds.to(embeds.device, embeds.dtype))

    def reach_audio_parts(self, embeds):
        """The same `embeds` of a prompt without audio, or with simulated clips alone. In training, the parts that read
        audio get gradients of zero then, not none: there is a loss to go back from where only they are trained, and
        processes exchange the same."""
        if not (self.training and torch.is_grad_enabled()):
            return embeds
        parts = (self.audio_tower, self.multi_modal_projector, self.alignment, self.readout, self.clip_tokens)
        trained = [p for part in parts if part is not None for p in part.parameters() if p.requires_grad]
        return embeds + sum(p.sum() for p in trained) * 0.0 if trained else embeds


class AudioPhiForConditionalGeneration(
    CheckpointsMixin, ComponentsMixin, TuningMixin, EarsMixin, AudioPhiPreTrainedModel, AudioPhiGenerationMixin
):
    """The whole model: audio and text in, words out. Build with `from_components`, load with `from_pretrained`."""

    _auto_class = "AutoModel"  # its files are saved with it; further auto classes: AUTO_MAP

    def __init__(self, config):
        super().__init__(config)
        self.model = AudioPhiModel(config)
        text = config.text_config
        self.lm_head = nn.Linear(text.hidden_size, text.vocab_size, bias=config.lm_head_bias)
        self.family_head = FamilyHead(text)
        embeddings = self.model.get_input_embeddings()
        name = next(name for name, module in self.named_modules() if module is embeddings)
        self._tied_weights_keys = {"lm_head.weight": f"{name}.weight"}
        self.post_init()

    def get_input_embeddings(self):
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value):
        self.model.set_input_embeddings(value)

    def get_output_embeddings(self):
        return self.lm_head

    def set_output_embeddings(self, value):
        self.lm_head = value

    def get_audio_features(self, *args, **kwargs):
        """See `AudioPhiModel.get_audio_features`."""
        return self.model.get_audio_features(*args, **kwargs)

    @torch.no_grad()
    def read_alignment(self, **audio_inputs):
        """What the alignment head hears, without the language model: a list of LLM token ids per clip.

        Takes the audio inputs of `forward`. Raises ValueError on a model without an alignment head.
        """
        audio = self.get_audio_features(**audio_inputs, with_alignment=True, with_readout=False, return_dict=True)
        return self.model.alignment.greedy(audio.align_logits, audio.tokens_mask)

    def compute_logits(self, hidden):
        """Hidden states (L, D) or (B, L, D) -> vocabulary logits (..., L, V), see `FamilyHead`."""
        return self.family_head(self.lm_head, hidden)

    @can_return_tuple
    def forward(
        self,
        input_ids=None,
        input_features=None,
        input_features_mask=None,
        input_values=None,
        input_values_mask=None,
        audio_hidden_states=None,
        audio_hidden_mask=None,
        audio_num_windows=None,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        cache=None,
        inputs_embeds=None,
        labels=None,
        label_weights=None,
        align_labels=None,
        sound_labels=None,
        clip_labels=None,
        audio_embeds=None,
        asked=None,
        heard_ids=None,
        heard_weights=None,
        heard_lengths=None,
        heard_clips=None,
        written=None,
        align_loss_weight=1.0,
        align_items_in_batch=None,
        clip_items_in_batch=None,
        teacher_input_ids=None,
        teacher_attention_mask=None,
        teacher_labels=None,
        distill_weight=1.0,
        distill_temperature=2.0,
        distill_only=False,
        distill_items_in_batch=None,
        augment=None,
        return_logits=None,
        logits_to_keep=0,
        use_cache=None,
        **kwargs,
    ):
        """Losses and logits, an `AudioPhiOutput`.

        `labels` (B, L) with -100 where nothing is to be predicted: in training the head runs at labelled positions only
        and logits are not returned, unless `return_logits=True`; else they are, unless it is False. `label_weights`
        (B, L): what each counts in `lm_loss`.
        `align_labels` (C, S): LLM token ids of each clip's
        transcript, -100 padded, NO_TARGET first where there is none, simulated clips left out; without input_ids the
        language model is not run at all, and align_logits are returned only with `return_logits=True`. `sound_labels`
        (C, S): likewise the words that describe each clip, in any order, for a readout that `learns_sounds`; all -100
        where there are none. `clip_labels` (C, S): the words that describe each clip as a whole, for a model with clip
        tokens.
        `teacher_input_ids`, `teacher_attention_mask`, `teacher_labels` (B, L'), beside `labels`: the same chats with
        transcripts in the place of clips, and the same tokens labelled, or none in a row without a teacher; their loss
        is `kl_divergence` at `distill_temperature`, with `distill_only` the only one of the labels.
        `num_items_in_batch` (labelled tokens, or their weights), `align_items_in_batch`, `clip_items_in_batch` (clips)
        and `distill_items_in_batch` (tokens that the teacher has labelled) divide the summed losses under gradient
        accumulation. `augment`: (hidden, mask) -> hidden, changes the encoder's output.

        Raises ValueError for a teacher without labels, or with other labelled tokens than they have, and for
        `distill_only` without a teacher.
        """
        if teacher_input_ids is not None and (labels is None or teacher_labels is None):
            raise ValueError("teacher_input_ids need labels and teacher_labels: the tokens to distill")
        if distill_only and teacher_input_ids is None:
            raise ValueError("distill_only needs teacher_input_ids: there is no other loss of the labels then")
        audio_inputs = {
            "input_features": input_features,
            "input_features_mask": input_features_mask,
            "input_values": input_values,
            "input_values_mask": input_values_mask,
            "audio_hidden_states": audio_hidden_states,
            "audio_hidden_mask": audio_hidden_mask,
            "audio_num_windows": audio_num_windows,
        }
        num_items_in_batch = kwargs.pop("num_items_in_batch", None)
        output = AudioPhiOutput()
        if input_ids is None and inputs_embeds is None and align_labels is not None:
            with_readout = sound_labels is not None or clip_labels is not None
            how = {"with_alignment": True, "with_readout": with_readout, "augment": augment, "return_dict": True}
            audio = self.get_audio_features(**audio_inputs, **how)
        else:
            outputs = self.model(
                input_ids=input_ids,
                **audio_inputs,
                heard_ids=heard_ids,
                heard_weights=heard_weights,
                heard_lengths=heard_lengths,
                heard_clips=heard_clips,
                written=written,
                attention_mask=attention_mask,
                position_ids=position_ids,
                cache=past_key_values if cache is None else cache,
                inputs_embeds=inputs_embeds,
                audio_embeds=audio_embeds,
                with_alignment=align_labels is not None,
                augment=augment,
                use_cache=use_cache,
                return_dict=True,
                **kwargs,
            )
            audio, hidden = outputs.audio, outputs.last_hidden_state
            output[CACHE_NAME] = getattr(outputs, CACHE_NAME)
            output.hidden_states, output.attentions = outputs.hidden_states, outputs.attentions
            if labels is not None:
                targets = next_tokens(labels).to(hidden.device)
                labelled = targets != -100
                if not distill_only:
                    weights = label_weights
                    if weights is not None:
                        weights = nn.functional.pad(weights, (0, 1))[:, 1:].to(hidden.device)[labelled]
                    answers = (hidden[labelled], targets[labelled])
                    output.lm_loss = self._lm_loss(*answers, num_items_in_batch, weights)
                    output.loss = output.lm_loss
                if teacher_input_ids is not None:
                    read = next_tokens(teacher_labels).to(targets.device)
                    teacher = (teacher_input_ids, teacher_attention_mask, read)
                    found = self._distill_loss(hidden, targets, *teacher, distill_temperature, distill_items_in_batch)
                    output.distill_loss, weighted = found, distill_weight * found
                    output.loss = weighted if output.loss is None else output.loss + weighted
            if labels is None or return_logits or (return_logits is None and not self.training):
                kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
                output.logits = self.compute_logits(hidden[:, kept])
        if audio is not None:
            output.audio_counts = audio.counts
            output.align_logits = audio.align_logits if align_labels is None or return_logits else None
        if align_labels is not None:
            if audio is None or audio.align_logits is None:
                raise ValueError("align_labels need audio inputs")
            output.align_loss, output.align_skipped = self.model.alignment.ctc_loss(
                audio.align_logits, audio.tokens_mask.sum(1), align_labels, align_items_in_batch
            )
            weighted = align_loss_weight * output.align_loss
            if sound_labels is not None:
                output.sound_loss = self._sound_loss(audio, sound_labels, align_items_in_batch)
                weighted = weighted + align_loss_weight * output.sound_loss
            output.loss = weighted if output.loss is None else output.loss + weighted
        if clip_labels is not None and audio is not None:
            output.clip_loss = self._clip_loss(audio, clip_labels, clip_items_in_batch)
            output.loss = output.clip_loss if output.loss is None else output.loss + output.clip_loss
        return AudioPhiOutput(**output)  # anew, in the order of its fields: as a tuple it begins with loss and logits

    def _sound_loss(self, audio, sound_labels, num_items=None):
        """The readout's loss, a mean over the batch's clips (the sum divided by `num_items` when given)."""
        alignment = self.model.alignment
        labels = alignment.targets(sound_labels)[0] - 1
        sounds = audio.keep & (audio.align_logits.argmax(-1) == 0)
        loss = self.model.readout.sound_loss(audio.embeds, sounds, labels, self.model.word_table())
        return loss / (len(labels) if num_items is None else num_items)

    def _clip_loss(self, audio, clip_labels, num_items=None):
        """The clip tokens' loss, a mean over described clips (the sum divided by `num_items` when given)."""
        table = self.get_input_embeddings().weight
        loss = self.model.clip_tokens.description_loss(audio.clips, clip_labels, table)
        return loss / ((clip_labels >= 0).any(1).sum().clamp(min=1) if num_items is None else num_items)

    def _lm_loss(self, hidden, targets, num_items=None, weights=None):
        """Cross-entropy of the labelled tokens, a mean by their weights, or the sum divided by `num_items`: `hidden`
        (tokens, D), `targets`, `weights` (tokens,), each 1 by default."""
        weights = torch.ones_like(targets, dtype=torch.float32) if weights is None else weights

        def cross_entropy(hidden, targets, weights):
            logits = self.compute_logits(hidden).float()
            return (nn.functional.cross_entropy(logits, targets, reduction="none") * weights).sum()

        total = sum_of_tokens(cross_entropy, self.config.text_config.vocab_size, hidden, targets, weights)
        return total / (weights.sum().clamp(min=1e-6) if num_items is None else num_items)

    def _distill_loss(self, hidden, targets, input_ids, attention_mask, read, temperature, num_items=None):
        """`kl_divergence` of the labelled tokens of rows that have a teacher, a mean over them or the sum divided by
        `num_items`. `hidden` (B, L, D) of the student, labelled where `targets` (B, L) are not -100; `read` (B, L'):
        the teacher's `targets`."""
        rows = (read != -100).any(1)
        counted = (targets != -100) & rows[:, None]
        if not torch.equal(targets[counted], read[read != -100]):
            raise ValueError("teacher_labels have other tokens than the labels of the same rows")
        if not bool(rows.any()):  # the first row, for nothing: with FSDP2 other processes wait for this one's layers
            rows = torch.arange(len(rows), device=rows.device) == 0
            attention_mask = None
        with as_teacher(self.model.language_model):
            there = rows.to(input_ids.device)
            mask = None if attention_mask is None else attention_mask[there]
            prompts = {"input_ids": input_ids[there], "attention_mask": mask}
            known = self.model(**prompts, use_cache=False, return_dict=True).last_hidden_state[read[rows] != -100]

        def divergence(heard, known):
            with torch.no_grad():
                teacher = self.compute_logits(known)
            return kl_divergence(self.compute_logits(heard), teacher, temperature)

        total = sum_of_tokens(divergence, self.config.text_config.vocab_size, hidden[counted], known)
        return total / (max(1, len(known)) if num_items is None else num_items)


def next_tokens(labels):
    """Labels (B, L) -> (B, L), each where it is predicted: -100 where nothing is."""
    return nn.functional.pad(labels, (0, 1), value=-100)[:, 1:]
