"""Whisper's own decoder, as an ear beside the alignment: it writes the words of each window, with how sure it is."""

import torch
from torch import nn
from transformers import AutoTokenizer, GenerationMixin, WhisperForConditionalGeneration
from transformers.modeling_outputs import BaseModelOutput

# OpenAI's rule for windows in which nobody speaks: the token that says so is likely, and the words are not.
NO_SPEECH_ABOVE, LOG_PROB_BELOW = 0.6, -1.0
FRAMES_PER_SECOND = 100
# Nobody speaks faster, in tokens; what is not at its end by then repeats itself, and is no text.
TOKENS, TOKENS_PER_SECOND = 10, 10
AT_A_TIME = 8  # texts that are scored: their logits span the whole vocabulary


class WhisperDecoder:
    """The whole recogniser of the component in `folder`. No module of AudioPhi's: its weights belong to the component
    and are never saved with a checkpoint.

    It reads windows padded to their full length, as it was trained: on states of short windows it repeats itself.
    """

    def __init__(self, folder, device, dtype):
        self.model = WhisperForConditionalGeneration.from_pretrained(folder, dtype=dtype).to(device).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(folder)

    @torch.no_grad()
    def __call__(self, features, mask, beams=1, others=None):
        """`features` (W, mel bins, T), `mask` (W, T) bool -> per window its texts, the likeliest first, each with the
        mean log probability of its tokens: (text, score) pairs, `beams` at most, none where nobody speaks.

        `others`: a text per window that somebody else heard, or None; it is scored too, and is the last pair, unless it
        is longer than this decoder can read.
        """
        model, settings = self.model, self.model.generation_config
        padded, sound = self._padded(features.to(model.device), mask.to(model.device))
        # Read whole: states cut a second behind the sound make more errors (dev/LOG.md).
        states = model.get_encoder()(padded.to(model.dtype)).last_hidden_state
        seconds, sound, prompt = mask.sum(1).to(states.device) / FRAMES_PER_SECOND, sound.tolist(), self._prompt(states)
        begin, longest = prompt.shape[1], model.config.max_target_positions
        most = (begin + TOKENS + TOKENS_PER_SECOND * seconds).long().clamp(max=longest)
        sequences = GenerationMixin.generate(
            model, encoder_outputs=BaseModelOutput(states), decoder_input_ids=prompt, do_sample=False, num_beams=beams,
            num_return_sequences=beams, forced_decoder_ids=None, max_length=int(most.max()),
        )  # fmt: skip
        ends = sequences == settings.eos_token_id
        ends[:, :begin] = False
        most = most.repeat_interleave(beams)
        ended = (ends.any(1) & (ends.long().argmax(1) < most)) | (most == longest)
        states = states.repeat_interleave(beams, 0)
        scores, first = self._scores(states, prompt.repeat_interleave(beams, 0), sequences[:, begin:])
        nobody = getattr(settings, "no_timestamps_token_id", None)
        if nobody is not None:  # the token before it says that nobody speaks
            silent = first[::beams].softmax(-1)[:, nobody - 1] > NO_SPEECH_ABOVE
            nobody = (silent & (scores[::beams] < LOG_PROB_BELOW)).tolist()
            sound = [heard and not silence for heard, silence in zip(sound, nobody, strict=True)]
        texts = self.tokenizer.batch_decode(sequences[:, begin:], skip_special_tokens=True)
        pairs = list(zip((text.strip() for text in texts), scores.tolist(), ended.tolist(), strict=True))
        windows = [pairs[start : start + beams] for start in range(0, len(pairs), beams)]
        # Of equal texts the likeliest; `dict` keeps the first place.
        windows = [{text: score for text, score, end in reversed(window) if text and end} for window in windows]
        windows = [
            list(window.items())[::-1] if heard else [] for window, heard in zip(windows, sound, strict=True)
        ]
        ids = {
            number: torch.tensor([*self.tokenizer.encode(" " + text, add_special_tokens=False), settings.eos_token_id])
            for number, text in enumerate(others or ())
            if text
        }
        ids = {number: text for number, text in ids.items() if len(text) <= longest - begin}
        if ids:
            rows = list(ids)
            told = nn.utils.rnn.pad_sequence(list(ids.values()), True, settings.eos_token_id).to(states.device)
            for number, score in zip(rows, self._scores(states[::beams][rows], prompt[rows], told)[0], strict=True):
                windows[number].append((others[number], score.item()))
        return windows

    def _scores(self, states, prompt, texts):
        """Mean log probability (N,) of `texts` (N, L), each up to the token that ends it, and the logits (N, V) of
        what follows the first token of `prompt` (N, P)."""
        if len(texts) > AT_A_TIME:
            parts = zip(*(values.split(AT_A_TIME) for values in (states, prompt, texts)), strict=True)
            return tuple(map(torch.cat, zip(*(self._scores(*part) for part in parts), strict=True)))
        read = torch.cat([prompt, texts[:, :-1]], 1)
        logits = self.model(encoder_outputs=BaseModelOutput(states), decoder_input_ids=read, use_cache=False).logits
        ends = (texts == self.model.generation_config.eos_token_id).long()
        written = ends.cumsum(1) - ends == 0
        chosen = logits[:, prompt.shape[1] - 1 :].float().log_softmax(-1).gather(-1, texts[..., None])[..., 0]
        return (chosen * written).sum(1) / written.sum(1), logits[:, 0].float()

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
