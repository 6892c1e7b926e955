"""Whisper's own decoder, as an ear beside the alignment: it writes the words of each window, with how sure it is."""

import torch
from transformers import AutoTokenizer, GenerationMixin, WhisperForConditionalGeneration
from transformers.modeling_outputs import BaseModelOutput

# OpenAI's rule for windows in which nobody speaks: the token that says so is likely, and the words are not.
NO_SPEECH_ABOVE, LOG_PROB_BELOW = 0.6, -1.0


class WhisperDecoder:
    """The whole recogniser of the component in `folder`. No module of AudioPhi's: its weights belong to the component
    and are never saved with a checkpoint.

    It reads windows padded to their full length, as it was trained: on states of short windows it repeats itself.
    """

    def __init__(self, folder, device, dtype):
        self.model = WhisperForConditionalGeneration.from_pretrained(folder, dtype=dtype).to(device).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(folder)

    @torch.no_grad()
    def __call__(self, features, mask, beams=1):
        """`features` (W, mel bins, T), `mask` (W, T) bool -> per window its texts, the likeliest first, each with the
        mean log probability of its tokens: (text, score) pairs, `beams` at most, none where nobody speaks."""
        model, settings = self.model, self.model.generation_config
        padded, sound = self._padded(features.to(model.device), mask.to(model.device))
        states = model.get_encoder()(padded.to(model.dtype)).last_hidden_state
        prompt = self._prompt(states)
        sequences = GenerationMixin.generate(
            model, encoder_outputs=BaseModelOutput(states), decoder_input_ids=prompt, do_sample=False, num_beams=beams,
            num_return_sequences=beams, forced_decoder_ids=None, max_length=model.config.max_target_positions,
        )  # fmt: skip
        begin, ends = prompt.shape[1], sequences == settings.eos_token_id
        ends[:, :begin] = False
        written = (ends.long().cumsum(1) - ends.long() == 0)[:, begin:]  # with the token that ends them
        many = BaseModelOutput(states.repeat_interleave(beams, 0))
        logits = model(encoder_outputs=many, decoder_input_ids=sequences[:, :-1], use_cache=False).logits.float()
        chosen = logits[:, begin - 1 :].log_softmax(-1).gather(-1, sequences[:, begin:, None])[..., 0]
        scores = (chosen * written).sum(1) / written.sum(1)
        nobody = getattr(settings, "no_timestamps_token_id", None)
        if nobody is not None:  # the token before it says that nobody speaks
            silent = logits[::beams, 0].softmax(-1)[:, nobody - 1] > NO_SPEECH_ABOVE
            sound &= ~(silent & (scores[::beams] < LOG_PROB_BELOW))
        texts = self.tokenizer.batch_decode(sequences[:, begin:], skip_special_tokens=True)
        pairs = [(text.strip(), score) for text, score in zip(texts, scores.tolist(), strict=True)]
        windows = [pairs[start : start + beams] for start in range(0, len(pairs), beams)]
        # Of equal texts the likeliest; `dict` keeps the first place.
        windows = [list({text: (text, score) for text, score in reversed(window)}.values())[::-1] for window in windows]
        return [
            [pair for pair in window if pair[0]] if heard else []
            for window, heard in zip(windows, sound.tolist(), strict=True)
        ]

    def _padded(self, features, mask):
        """Windows at their full length (W, mel bins, frames) and which of them hold any sound (W,). What the feature
        extractor makes of silence is 2 (80 dB) below the loudest of the clip, or -1.5."""
        size = 2 * self.model.config.max_source_positions
        peak = features.float().masked_fill(~mask[:, None], -torch.inf).amax((1, 2))
        low = features.float().masked_fill(~mask[:, None], torch.inf).amin((1, 2))
        features = features.masked_fill(~mask[:, None], 0) + (peak - 2).clamp(min=-1.5)[:, None, None] * ~mask[:, None]
        padding = size - features.shape[2]
        quiet = (peak - 2).clamp(min=-1.5)[:, None, None].expand(-1, features.shape[1], max(0, padding))
        return torch.cat([features[:, :, :size], quiet.to(features)], 2), peak > low

    def _prompt(self, states):
        """Token ids (W, L) that ask for a transcript, without times, in the language that is heard."""
        settings = self.model.generation_config
        prompt = [torch.full((len(states), 1), settings.decoder_start_token_id, device=states.device)]
        if getattr(settings, "is_multilingual", False):
            prompt.append(self.model.detect_language(encoder_outputs=BaseModelOutput(states))[:, None])
            prompt.append(torch.full_like(prompt[0], settings.task_to_id["transcribe"]))
        if getattr(settings, "no_timestamps_token_id", None) is not None:
            prompt.append(torch.full_like(prompt[0], settings.no_timestamps_token_id))
        return torch.cat(prompt, 1)
