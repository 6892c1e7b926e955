"""AudioPhi: a frozen audio encoder, an adapter and a small causal language model.

    waveform -> features -> audio_tower -> multi_modal_projector -> readout -> language_model -> words

Follows transformers' own audio language models: the processor expands the placeholder, the model checks the count and
fills in the audio with `masked_scatter`.
"""

import torch
from torch import nn
from transformers import AutoModel, PreTrainedModel
from transformers import initialization as init

from .adapters import adapter_class
from .alignment_audiophi import AlignmentHead
from .checkpoints_audiophi import CheckpointsMixin
from .components_audiophi import ComponentsMixin
from .configuration_audiophi import AudioPhiConfig
from .encoders import encoder_class
from .generation_audiophi import AudioPhiGenerationMixin
from .lengths_audiophi import join_windows
from .lora_audiophi import inject_lora
from .outputs_audiophi import AudioPhiAudioOutput, AudioPhiModelOutput, AudioPhiOutput
from .placeholders_audiophi import check_context, check_placeholders, drop_unused_placeholders, padding_side_of
from .readouts_audiophi import READOUTS
from .spelling_audiophi import Spelling
from .tuning_audiophi import TuningMixin

# Windows that go through the encoder at a time, in units of the longest window (30 s): bounds the memory of an hour
# of audio.
WINDOWS_AT_A_TIME = 16


class AudioPhiPreTrainedModel(PreTrainedModel):
    config_class = AudioPhiConfig
    base_model_prefix = "model"
    input_modalities = ("audio", "text")
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True
    _no_split_modules = None

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
        elif hasattr(module, "layer_weights"):
            init.zeros_(module.layer_weights)


class AudioPhiModel(AudioPhiPreTrainedModel):
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
        self.readout = READOUTS[config.readout](size)
        self.language_model = AutoModel.from_config(config.text_config)
        for part, arguments in config.lora.items():
            inject_lora(self, part, arguments)
        self.post_init()

    def get_input_embeddings(self):
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value):
        self.language_model.set_input_embeddings(value)

    def train(self, mode=True):
        """A frozen encoder stays in eval mode: its dropout and masking would make cached features differ from live
        ones."""
        super().train(mode)
        if mode and not any(parameter.requires_grad for parameter in self.audio_tower.parameters()):
            self.audio_tower.eval()
        return self

    @torch.no_grad()
    def match_embeddings(self, align_vocab_ids=None, spellings=None):
        """Fit new parts to the loaded LLM: the alignment's vocabulary and spelling, the readout to the table's RMS."""
        if align_vocab_ids is not None:
            self.alignment.vocab_ids.copy_(torch.as_tensor(align_vocab_ids))
        if spellings is not None:
            self.alignment.spelling.match(spellings)
        self.readout.start_at(self.get_input_embeddings().weight.float().square().mean().sqrt())

    def encode(self, features, mask=None):
        """Encoder states of feature rows: `features` as the encoder takes them, `mask` (W, T) (None: all real).

        Returns hidden (W, T', encoder size) and mask (W, T') bool.
        """
        time_axis = self.audio_tower.time_axis
        if mask is None:
            mask = features.new_ones(len(features), features.shape[time_axis])
        rows = max(1, WINDOWS_AT_A_TIME * self.config.window_frames // max(1, features.shape[time_axis]))
        parts = [self.audio_tower(f, m) for f, m in zip(features.split(rows), mask.bool().split(rows), strict=True)]
        if len(parts) == 1:
            return parts[0]
        size = max(hidden.shape[1] for hidden, _ in parts)
        hidden = [nn.functional.pad(part, (0, 0, 0, size - part.shape[1])) for part, _ in parts]
        masks = [nn.functional.pad(part, (0, size - part.shape[1])) for _, part in parts]
        return torch.cat(hidden), torch.cat(masks)

    def get_audio_features(
        self,
        input_features=None,
        input_features_mask=None,
        input_values=None,
        input_values_mask=None,
        audio_hidden_states=None,
        audio_hidden_mask=None,
        audio_num_windows=None,
        with_alignment=False,
        with_readout=True,
        **kwargs,
    ):
        """Audio to tokens. One row per encoder window, in prompt order.

        Takes features of the encoder's kind, or `audio_hidden_states` (W, T, encoder size) with `audio_hidden_mask`
        (W, T): cached outputs of the (frozen) encoder. `audio_num_windows` (C,): windows per clip. Returns
        `AudioPhiAudioOutput`; raises ValueError for features of the wrong kind.
        """
        if audio_hidden_states is not None:
            hidden, mask = audio_hidden_states, audio_hidden_mask
            mask = hidden.new_ones(hidden.shape[:2]).bool() if mask is None else mask.bool()
        else:
            key = self.audio_tower.feature_key
            features = input_features if key == "input_features" else input_values
            mask = input_features_mask if key == "input_features" else input_values_mask
            if features is None:
                raise ValueError(f"the {self.config.audio_config.model_type} encoder takes {key!r}, which is missing")
            hidden, mask = self.encode(features, mask)
        adapter_dtype = next(self.multi_modal_projector.parameters(), hidden).dtype
        tokens, tokens_mask = self.multi_modal_projector(hidden.to(adapter_dtype), mask)
        tokens, tokens_mask = join_windows(tokens, tokens_mask, audio_num_windows)
        output = AudioPhiAudioOutput(last_hidden_state=hidden, tokens=tokens, tokens_mask=tokens_mask)
        embedding_weight = self.get_input_embeddings().weight
        if with_alignment or (self.readout.needs_alignment and with_readout):
            if self.alignment is None:
                raise ValueError("this model has no alignment head: build it with align_vocab_ids")
            output.align_logits = self.alignment.logits(tokens, embedding_weight)
        if with_readout:
            embeds, keep = self.readout(tokens, tokens_mask, self.alignment, output.align_logits, embedding_weight)
            output.pooler_output = embeds[tokens_mask]
            output.audio_keep = None if keep is None else keep[tokens_mask]
        return output

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
        inputs_embeds=None,
        audio_embeds=None,
        audio_keep=None,
        with_alignment=False,
        use_cache=None,
        **kwargs,
    ):
        """Language model over text and audio. `audio_embeds` (N, D) and `audio_keep` (N,) replace the audio inputs.

        Raises ValueError when placeholders and audio tokens differ in number, or the prompt exceeds the context.
        """
        audio = None
        if any(value is not None for value in (input_features, input_values, audio_hidden_states)):
            if input_ids is None:
                raise ValueError("audio inputs need input_ids with the audio placeholders")
            if self.config.readout == "frames":
                check_context(input_ids, self.config)
            audio = self.get_audio_features(
                input_features,
                input_features_mask,
                input_values,
                input_values_mask,
                audio_hidden_states,
                audio_hidden_mask,
                audio_num_windows,
                with_alignment=with_alignment,
            )
            audio_embeds, audio_keep = audio.pooler_output, audio.audio_keep
        latest = None
        past_length = past_key_values.get_seq_length() if past_key_values is not None else 0
        if input_ids is not None and (audio_embeds is not None or not past_length):
            check_placeholders(input_ids, audio_embeds, self.config)
        if audio_keep is not None:
            side = padding_side_of(attention_mask)
            compact = drop_unused_placeholders(
                input_ids, attention_mask, self.config.audio_token_id, audio_keep.to(input_ids.device), side
            )
            input_ids, attention_mask, latest = compact.input_ids, compact.attention_mask, compact.latest
            audio_embeds, position_ids = audio_embeds[audio_keep], None
            check_context(input_ids, self.config)
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        if audio_embeds is not None:
            placeholders = (input_ids == self.config.audio_token_id).unsqueeze(-1).to(inputs_embeds.device)
            inputs_embeds = inputs_embeds.masked_scatter(
                placeholders.expand_as(inputs_embeds), audio_embeds.to(inputs_embeds.device, inputs_embeds.dtype)
            )
        if position_ids is None and attention_mask is not None and attention_mask.dim() == 2 and not past_length:
            position_ids = (attention_mask.long().cumsum(1) - 1).clamp(min=0)
        outputs = self.language_model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
            **kwargs,
        )
        hidden, states = outputs.last_hidden_state, outputs.hidden_states
        if latest is not None:
            hidden = restore_length(hidden, latest)
            states = states and tuple(restore_length(state, latest) for state in states)
        return AudioPhiModelOutput(
            last_hidden_state=hidden,
            past_key_values=outputs.past_key_values,
            hidden_states=states,
            attentions=outputs.attentions,
            audio=audio,
        )


def restore_length(hidden, latest):
    """(B, L', D) -> (B, L, D): a removed placeholder gets the state of the last position before it."""
    return hidden.gather(1, latest[..., None].expand(-1, -1, hidden.shape[-1]))


class AudioPhiForConditionalGeneration(
    CheckpointsMixin, ComponentsMixin, TuningMixin, AudioPhiPreTrainedModel, AudioPhiGenerationMixin
):
    """The whole model: audio and text in, words out. Build with `from_components`, load with `from_pretrained`."""

    _auto_class = "AutoModel"  # its files are saved with it; further auto classes: AUTO_MAP

    def __init__(self, config):
        super().__init__(config)
        self.model = AudioPhiModel(config)
        text = config.text_config
        self.lm_head = nn.Linear(text.hidden_size, text.vocab_size, bias=config.lm_head_bias)
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
    def transcribe_alignment(self, **audio_inputs):
        """What the alignment head hears, without the language model: a list of LLM token ids per clip.

        Takes the audio inputs of `forward`. Raises ValueError on a model without an alignment head.
        """
        audio = self.get_audio_features(**audio_inputs, with_alignment=True, with_readout=False)
        return self.model.alignment.greedy(audio.align_logits, audio.tokens_mask)

    def compute_logits(self, hidden):
        """Hidden states -> vocabulary logits, with the scalings that some families' configs ask for."""
        text = self.config.text_config
        logits = self.lm_head(hidden) * (getattr(text, "logit_scale", None) or 1)
        logits = logits / (getattr(text, "logits_scaling", None) or 1)
        cap = getattr(text, "final_logit_softcapping", None)
        return logits if cap is None else cap * torch.tanh(logits / cap)

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
        inputs_embeds=None,
        labels=None,
        align_labels=None,
        audio_embeds=None,
        audio_keep=None,
        align_loss_weight=1.0,
        align_items_in_batch=None,
        return_logits=None,
        logits_to_keep=0,
        use_cache=None,
        **kwargs,
    ):
        """Losses and logits.

        `labels` (B, L) with -100 where nothing is to be predicted: the head runs at labelled positions only, and
        logits are not returned unless `return_logits=True`. `align_labels` (C, S): LLM token ids of each clip's
        transcript, -100 padded; without input_ids the language model is not run at all, and align_logits are returned
        only with `return_logits=True`. `num_items_in_batch`
        (labelled tokens) and `align_items_in_batch` (clips) divide the summed losses under gradient accumulation.
        Returns `AudioPhiOutput`.
        """
        audio_inputs = {
            "input_features": input_features,
            "input_features_mask": input_features_mask,
            "input_values": input_values,
            "input_values_mask": input_values_mask,
            "audio_hidden_states": audio_hidden_states,
            "audio_hidden_mask": audio_hidden_mask,
            "audio_num_windows": audio_num_windows,
        }
        kwargs.pop("return_dict", None)
        num_items_in_batch = kwargs.pop("num_items_in_batch", None)
        output = AudioPhiOutput()
        if input_ids is None and inputs_embeds is None and align_labels is not None:
            audio = self.get_audio_features(**audio_inputs, with_alignment=True, with_readout=False)
        else:
            outputs = self.model(
                input_ids=input_ids,
                **audio_inputs,
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=past_key_values,
                inputs_embeds=inputs_embeds,
                audio_embeds=audio_embeds,
                audio_keep=audio_keep,
                with_alignment=align_labels is not None,
                use_cache=use_cache,
                **kwargs,
            )
            audio, hidden = outputs.audio, outputs.last_hidden_state
            output.past_key_values = outputs.past_key_values
            output.hidden_states, output.attentions = outputs.hidden_states, outputs.attentions
            if labels is not None:
                output.lm_loss = output.loss = self._lm_loss(hidden, labels, num_items_in_batch)
            if labels is None or return_logits:
                kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
                output.logits = self.compute_logits(hidden[:, kept])
        if audio is not None:
            output.audio_keep = audio.audio_keep
            output.align_logits = audio.align_logits if align_labels is None or return_logits else None
        if align_labels is not None:
            if audio is None:
                raise ValueError("align_labels need audio inputs")
            output.align_loss, output.align_skipped = self.model.alignment.ctc_loss(
                audio.align_logits, audio.tokens_mask.sum(1), align_labels, align_items_in_batch
            )
            weighted = align_loss_weight * output.align_loss
            output.loss = weighted if output.loss is None else output.loss + weighted
        return output

    def _lm_loss(self, hidden, labels, num_items_in_batch):
        """Next-token cross-entropy, computing logits only where the next token has a label."""
        targets = nn.functional.pad(labels, (0, 1), value=-100)[:, 1:].to(hidden.device)
        labelled = targets != -100
        if not bool(labelled.any()):
            return hidden.sum() * 0.0
        return self.loss_function(
            logits=self.compute_logits(hidden[labelled]),
            labels=None,
            shift_labels=targets[labelled],
            vocab_size=self.config.text_config.vocab_size,
            num_items_in_batch=num_items_in_batch,
        )
