"""Two ears: the words of the encoder's own decoder beside, or in the place of, what the alignment hears.

The decoder's texts and the alignment's are candidates. Of the best one, if it is the decoder's, the language model
reads the tokens where it would read the readout's words, and a transcript is that text itself: no word is written by
the language model then.
"""

import dataclasses
import math
import unicodedata

import torch
from torch import nn
from transformers import AutoTokenizer

from .components_audiophi import resolve_component
from .encoders import encoder_class
from .lora_audiophi import without_lora
from .outputs_audiophi import AudioPhiAudioOutput

BEAMS = 4  # of the decoder where its texts are chosen from


class EarsMixin:
    """For AudioPhiForConditionalGeneration."""

    def words_decoder(self):
        """The decoder of the audio component and the language model's tokenizer, loaded when they are first used."""
        if "_decoder" not in self.__dict__:
            base = {name: (part["id"], part["revision"]) for name, part in self.config.base_components.items()}
            if not base:
                raise ValueError("hear_with: this model names no base components, so its decoder's weights are unknown")
            folder, tower = resolve_component(*base["audio"]), next(self.model.audio_tower.parameters())
            decoder = encoder_class(self.config.audio_config).decoder(folder, tower.device, tower.dtype)
            # Not an attribute of a module: not saved, not moved, not trained.
            self.__dict__["_decoder"] = decoder, AutoTokenizer.from_pretrained(resolve_component(*base["text"]))
        return self.__dict__["_decoder"]

    def hear(self, audio_inputs, hear_with="alignment", hear_beams=None, **kwargs):
        """`get_audio_features` of `audio_inputs`, with the decoder's texts per clip as `words`: (text, score) pairs,
        none where nobody speaks. With both ears what the alignment spells is one of them, scored by the decoder, and
        where the alignment hears nothing, nothing is said: recognisers write words for a dog that barks. ValueError
        for cached encoder states, which no decoder reads."""
        if hear_with == "alignment":
            return self.get_audio_features(**audio_inputs, return_dict=True, **kwargs)
        key = self.model.audio_tower.feature_key
        features = audio_inputs.get(key)
        if features is None:
            raise ValueError(f"hear_with={hear_with!r} needs the audio itself ({key}); cached states have no decoder")
        both = hear_with == "both"
        kwargs["with_alignment"] = both or kwargs.get("with_alignment", False)
        if kwargs["with_alignment"] or self.model.clip_tokens is not None or self.model.readout.learns_sounds:
            audio = self.get_audio_features(**audio_inputs, return_dict=True, **kwargs)
        else:  # the decoder's words are all that is read
            audio = AudioPhiAudioOutput()
        mask = self.model._as_mask(features, audio_inputs.get(f"{key}_mask"))
        counts = audio_inputs.get("audio_num_windows")
        counts = [1] * len(features) if counts is None else counts.tolist()
        decoder, tokenizer = self.words_decoder()
        if both:
            heard = self.model.alignment.greedy(audio.align_logits, audio.tokens_mask)
            audio.spelled = [tokenizer.decode(ids).strip() for ids in heard]
        clips = [clip for clip, count in enumerate(counts) for _ in range(count)]  # of each window
        rows = [row for row, clip in enumerate(clips) if not both or audio.spelled[clip]]
        # Of clips of several windows the alignment's text belongs to none of them.
        others = [audio.spelled[clips[row]] if both and counts[clips[row]] == 1 else None for row in rows]
        windows = [[] for _ in clips]
        if rows:
            found = decoder(features[rows], mask[rows], hear_beams or (BEAMS if both else 1), others)
            for row, pairs in zip(rows, found, strict=True):
                windows[row] = pairs
        words, start = [], 0
        for count in counts:
            words.append(of_clip(windows[start : start + count]))
            start += count
        audio.words = words
        return audio

    def choose_words(self, audio, fusion):
        """`audio` of `hear` with each clip's candidates in the order of `together`, the best first."""
        if fusion["hear_with"] != "both":
            return audio
        weights, chosen = (fusion["hear_ctc_weight"], fusion["hear_lm_weight"]), []
        for number, pairs in enumerate(audio.words):
            if len(pairs) > 1:
                ctc = self._align_scores(audio, number) if weights[0] else torch.zeros(len(pairs))
                lm = self._prior_scores(pairs, fusion) if weights[1] else torch.zeros(len(pairs))
                order = together(torch.tensor([score for _, score in pairs]), ctc, lm, weights)
                pairs = [pairs[place] for place in order.argsort(descending=True, stable=True)]
            chosen.append(pairs)
        audio.words = chosen
        return audio

    def score_words(self, audio, fusion):
        """Per clip of `hear`'s, with both ears: its candidates, (text, the scores of `together`) each."""
        scored = []
        for number, pairs in enumerate(audio.words):
            others = self._align_scores(audio, number).tolist(), self._prior_scores(pairs, fusion).tolist()
            scored.append([(*pair, *scores) for pair, *scores in zip(pairs, *others, strict=True)])
        return scored

    def _align_scores(self, audio, number):
        """log p_CTC per token (n,) of the candidates of one clip."""
        logits = audio.align_logits[number][audio.tokens_mask[number]]
        ids = [self.words_as_tokens(text) for text, _ in audio.words[number]]
        return ctc_scores(logits, ids, self.model.alignment.vocab_ids)

    def _prior_scores(self, pairs, fusion):
        """Mean log probability per token (n,) of the texts of one clip for the language model as it was before any
        training, which hears nothing."""
        ids = [[self.prior_start(fusion), *self.words_as_tokens(text, verbatim=True)] for text, _ in pairs]
        rows = [torch.tensor(text, device=self.device) for text in ids]
        if not rows:
            return torch.zeros(0)
        texts = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-100)
        with without_lora(self.model.language_model):
            hidden = self.model.language_model(
                input_ids=texts.clamp(min=0), attention_mask=(texts >= 0).long(), use_cache=False
            ).last_hidden_state[:, :-1]
        logits = self.compute_logits(hidden).float().transpose(1, 2)
        losses = nn.functional.cross_entropy(logits, texts[:, 1:], reduction="none")
        return -(losses.sum(1) / (texts[:, 1:] >= 0).sum(1).clamp(min=1)).cpu()

    def read_words(self, audio):
        """`audio` of which the language model reads the best candidate's tokens instead of the readout's words; clip
        tokens and sounds stay, and all of it where the alignment's text is the best."""
        texts, whole = [], []
        for number, pairs in enumerate(audio.words):
            text = pairs[0][0] if pairs else ""
            spelled = audio.spelled is not None and bool(text) and text == audio.spelled[number]
            whole.append(spelled)
            texts.append([] if spelled else self.words_as_tokens(text))
        return read_instead(audio, texts, whole, self.model.embed, self.device)

    def words_as_tokens(self, text, verbatim=False):
        """Token ids of a text: as written, or in the spelling of the alignment's vocabulary, which is what the language
        model was trained to read: without capitals and punctuation where that has none."""
        tokenizer = self.words_decoder()[1]
        if not verbatim and self.model.alignment is not None:
            if "_letters" not in self.__dict__:
                self.__dict__["_letters"] = set(tokenizer.decode(self.model.alignment.vocab_ids.tolist()))
            known = self._letters
            text = text if any(letter.isupper() for letter in known) else text.lower()
            text = "".join(c if c in known or unicodedata.category(c)[0] != "P" else " " for c in text)
        text = " ".join(text.split())
        return tokenizer.encode(" " * (not verbatim) + text, add_special_tokens=False) if text else []

    def written_words(self, clips, audio, count=1):
        """Token ids of the words of each prompt's `clips`, a list per text: of each prompt the `count` best."""
        texts = []
        for numbers in clips:
            for place in range(count):
                known = [audio.words[number] for number in numbers if audio.words[number]]
                best = " ".join(pairs[min(place, len(pairs) - 1)][0] for pairs in known)
                texts.append(self.words_as_tokens(best, verbatim=True))
        return texts


def together(decoder, alignment, prior, weights):
    """What orders the candidates (n,) of a clip: mean log probabilities per token of the decoder, of CTC and of the
    language model that hears nothing, decoder - weights[0] * alignment² + weights[1] * prior.

    Squared, since the alignment itself is wrong in a word of four: a text that it finds a little less likely is hardly
    worse for that, one that it does not hear at all is out (dev/LOG.md, 2026-11-27).
    """
    return decoder - weights[0] * alignment**2 + weights[1] * prior


def read_instead(audio, texts, whole, embed, device):
    """`audio` of which the language model reads, per clip, all that it has where `whole` says so, else all but its
    words, and behind that `texts`, lists of token ids."""
    rows, begin = [], 0
    for number, (text, all_of_it) in enumerate(zip(texts, whole, strict=True)):
        end = begin + (0 if audio.counts is None else int(audio.counts[number]))
        words = embed(torch.tensor(text, dtype=torch.long, device=device))
        if end:
            own = audio.pooler_output[begin:end]
            words = torch.cat([(own if all_of_it else own[~audio.is_word[begin:end]]).to(words), words])
        rows.append(words)
        begin = end
    counts = torch.tensor([len(row) for row in rows], device=device)
    return dataclasses.replace(audio, pooler_output=torch.cat(rows), counts=counts)


def of_clip(windows):
    """Candidates of a clip: those of its window; of several windows the best of each, together."""
    if len(windows) == 1:
        return windows[0]
    best = [window[0] for window in windows if window]
    return [(" ".join(text for text, _ in best), sum(score for _, score in best) / len(best))] if best else []


def ctc_scores(logits, texts, vocab_ids):
    """log p_CTC per token (n,) of texts (lists of LLM token ids), `logits` (T, V' + 1) of one clip's frames. A token
    that is no class is heard as one of average probability, as in `CTCPrefixScorer`."""
    frames = logits.float().log_softmax(-1).cpu()
    other = frames[:, 1:].logsumexp(-1, keepdim=True) - math.log(len(vocab_ids))
    frames, vocab_ids, scores = torch.cat([frames, other], 1), vocab_ids.cpu(), []
    for text in texts:
        ids = torch.tensor(text, dtype=torch.long)
        places = torch.searchsorted(vocab_ids, ids).clamp(max=len(vocab_ids) - 1)
        classes = torch.where(vocab_ids[places] == ids, places + 1, len(vocab_ids) + 1)
        known, targets = classes.unique(return_inverse=True)
        picked = torch.cat([frames[:, :1], frames[:, known]], 1)[:, None]
        sizes = torch.tensor([len(picked)]), torch.tensor([len(ids)])
        loss = nn.functional.ctc_loss(picked, targets[None] + 1, *sizes, reduction="sum")
        scores.append(-loss.clamp(max=1e4) / max(1, len(ids)))
    return torch.stack(scores)
