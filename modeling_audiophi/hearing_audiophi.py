"""Hearing: from audio to what the language model reads, through encoder, adapter, alignment and readout."""

import torch
from torch import nn
from transformers.utils import can_return_tuple

from .adapters import adapter_class
from .encoder_recorder import run_recorded
from .lengths_audiophi import join_windows, output_length, sum_windows
from .outputs_audiophi import AudioPhiAudioOutput

# Windows that go through the encoder at a time, in units of the longest window (30 s): bounds the memory of an hour
# of audio.
WINDOWS_AT_A_TIME = 16


class HearingMixin:
    """For a model with `audio_tower`, `multi_modal_projector`, `alignment`, `readout` and `clip_tokens` as
    AudioPhiModel has them."""

    def encode(self, features, mask=None):
        """Encoder states of feature rows: `features` as the encoder takes them, `mask` (W, T) (None: all real).

        Returns hidden (W, T', encoder size) and mask (W, T') bool.
        """
        time_axis = self.audio_tower.time_axis
        mask, features = self._as_mask(features, mask), self._as_weights(features)
        rows = max(1, WINDOWS_AT_A_TIME * self.config.window_frames // max(1, features.shape[time_axis]))
        parts = [self.audio_tower(f, m) for f, m in zip(features.split(rows), mask.split(rows), strict=True)]
        if len(parts) == 1:
            return parts[0]
        size = max(hidden.shape[1] for hidden, _ in parts)
        hidden = [nn.functional.pad(part, (0, 0, 0, size - part.shape[1])) for part, _ in parts]
        masks = [nn.functional.pad(part, (0, size - part.shape[1])) for _, part in parts]
        return torch.cat(hidden), torch.cat(masks)

    def _as_weights(self, features):
        """`features` in the precision of the encoder's weights, unless it wants them in float32."""
        if getattr(self.audio_tower, "takes_float32", False):
            return features.float()
        weight = next((p for p in self.audio_tower.parameters() if p.is_floating_point()), features)
        return features.to(weight.dtype)

    def _as_mask(self, features, mask, time_axis=None):
        """`mask` (W, T), a list of W rows, or None for all real -> (W, T) bool."""
        if mask is None:
            time_axis = self.audio_tower.time_axis if time_axis is None else time_axis
            return features.new_ones(len(features), features.shape[time_axis]).bool()
        return (mask if isinstance(mask, torch.Tensor) else torch.stack(list(mask))).bool()

    def adapter_lengths(self, audio_inputs):
        """Adapter tokens of each clip (C,), by the masks of what `get_audio_features` takes: no encoder is run."""
        hidden = audio_inputs.get("audio_hidden_states")
        if hidden is not None:
            features, mask, axis = hidden, audio_inputs.get("audio_hidden_mask"), 1
            rule = adapter_class(self.config.adapter_config).length_rule(self.config.adapter_config)
        else:
            key, axis = self.audio_tower.feature_key, self.audio_tower.time_axis
            features, mask, rule = audio_inputs.get(key), audio_inputs.get(f"{key}_mask"), self.config.audio_length_rule
        if features is None:
            raise ValueError(f"the {self.config.audio_config.model_type} encoder takes {key!r}, which is missing")
        lengths = output_length(self._as_mask(features, mask, axis).sum(1), rule)
        windows = audio_inputs.get("audio_num_windows")
        return sum_windows(lengths, torch.ones_like(lengths) if windows is None else windows.to(lengths.device))

    def word_table(self):
        """The LLM's embeddings (V', D) of the alignment's vocabulary, as the LLM reads them: scaled (Gemma), and maybe
        from another device."""
        return self.embed(self.alignment.vocab_ids).to(self.alignment.blank.device)

    def align(self, tokens, table):
        """Adapter tokens (C, T, D) and the `word_table` -> the alignment's logits (C, T, V' + 1)."""
        return self.alignment.logits(tokens, table, self.config.embedding_scale)

    def most_counts(self, audio_inputs):
        """`counts` of a readout that keeps all (C,), the most that there can be: no encoder is run."""
        return self.adapter_lengths(audio_inputs) + self.config.clip_tokens

    @can_return_tuple
    def get_audio_features(
        self,
        features=None,
        *,
        input_features=None,
        input_features_mask=None,
        input_values=None,
        input_values_mask=None,
        audio_hidden_states=None,
        audio_hidden_mask=None,
        audio_num_windows=None,
        with_alignment=False,
        with_readout=True,
        output_hidden_states=None,
        output_attentions=None,
        augment=None,
        **kwargs,
    ):
        """Audio to tokens. One row per encoder window, in prompt order.

        Takes features of the encoder's kind, by their name or, whatever they are called, as first argument; or
        `audio_hidden_states` (W, T, encoder size) with `audio_hidden_mask` (W, T): cached outputs of the (frozen)
        encoder. A mask may be a list of rows. `audio_num_windows` (C,): windows per clip. `output_hidden_states`,
        `output_attentions` (default: the config's): also return what the encoder's blocks saw, see `run_recorded`,
        which runs them window by window. `augment`: (hidden, mask) -> hidden, for training. Returns
        `AudioPhiAudioOutput`; raises ValueError for features of the wrong kind, and for attention weights that there
        are not.
        """
        states, attentions = None, None
        watched = [self.config.output_hidden_states if output_hidden_states is None else output_hidden_states]
        watched += [self.config.output_attentions if output_attentions is None else output_attentions]
        if audio_hidden_states is not None:
            if output_hidden_states or output_attentions:
                raise ValueError("cached encoder states have no inner ones: give the audio itself")
            hidden, mask = audio_hidden_states, audio_hidden_mask
            mask = self._as_mask(hidden, mask, 1)
        else:
            key = self.audio_tower.feature_key
            if features is None:
                features = input_features if key == "input_features" else input_values
            mask = input_features_mask if key == "input_features" else input_values_mask
            if features is None:
                raise ValueError(f"the {self.config.audio_config.model_type} encoder takes {key!r}, which is missing")
            if any(watched):
                mask, features = self._as_mask(features, mask), self._as_weights(features)
                (hidden, mask), states, attentions = run_recorded(self.audio_tower, features, mask)
            else:
                hidden, mask = self.encode(features, mask)
            if watched[1] and attentions is None:
                raise ValueError(
                    f"the {self.config.audio_config.model_type} encoder returns no attention weights: "
                    "model.set_attn_implementation('eager') makes most encoders do so, output_attentions=False does "
                    "without"
                )
        if augment is not None:
            hidden = augment(hidden, mask)
        adapter_dtype = next(self.multi_modal_projector.parameters(), hidden).dtype
        tokens, tokens_mask = self.multi_modal_projector(hidden.to(adapter_dtype), mask)
        tokens, tokens_mask = join_windows(tokens, tokens_mask, audio_num_windows)
        logits, table, embeds, keep, counts, read, clips, is_word = [None] * 8
        if with_alignment or (self.readout.needs_alignment and with_readout):
            if self.alignment is None:
                raise ValueError("this model has no alignment head: build it with align_vocab_ids")
            table = self.word_table()
            logits = self.align(tokens, table)
        if with_readout:
            needed = self.readout.needs_encoder or self.clip_tokens is not None
            encoded = join_windows(hidden, mask, audio_num_windows) if needed else None
            embeds, keep = self.readout(tokens, tokens_mask, logits, table, encoded)
            keep = tokens_mask.to(embeds.device) if keep is None else keep
            words = keep & (logits.argmax(-1) > 0).to(keep.device) if self.readout.learns_sounds else keep
            read, kept = embeds, keep
            if self.clip_tokens is not None:
                clips = self.clip_tokens(*encoded).to(embeds)
                read = torch.cat([clips, embeds], 1)
                kept = torch.cat([keep.new_ones(clips.shape[:2]), keep], 1)
                words = torch.cat([keep.new_zeros(clips.shape[:2]), words], 1)
            read, counts, is_word = read[kept], kept.sum(1), words[kept]
        return AudioPhiAudioOutput(
            last_hidden_state=hidden,
            pooler_output=read,
            hidden_states=states if watched[0] else None,
            attentions=attentions if watched[1] else None,
            counts=counts,
            embeds=embeds,
            keep=keep,
            tokens=tokens,
            tokens_mask=tokens_mask,
            align_logits=logits,
            clips=clips,
            is_word=is_word,
        )
