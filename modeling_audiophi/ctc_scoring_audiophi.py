"""Joint decoding: the language model's beams are also scored by the alignment head.

The alignment's classes are the LLM's own tokens, so both give probabilities to the same sequences: the LLM to what
reads well, CTC to what was heard, in order and to its end. Their weighted sum keeps the LLM from skipping, looping and
replacing unlikely words. Watanabe et al. 2017, "Hybrid CTC/attention architecture for end-to-end speech recognition"
(https://www.merl.com/publications/docs/TR2017-190.pdf), section IV-B.
"""

from collections import deque

import torch
from transformers import LogitsProcessor

NEVER = -1e3  # log probability of a token that a frame certainly is not
# Probability of the blank from which a frame is silent. Of such frames in a row the first is enough to part a word from
# its repetition; the rest would, each with the little that a temperature leaves to words, add up to some.
SILENT = 0.98


class CTCPrefixScorer(LogitsProcessor):
    """Adds the CTC probability of each continuation to the LLM's.

    Scores become (1 - weight) log p_LLM(c | prefix) + weight log p_CTC(prefix c ...) / p_CTC(prefix ...). A token that
    the alignment does not know is heard as a class of average probability: the LLM can write it where it is sure of it
    against what the alignment heard. Rows without audio are left as they are.

    Args:
        log_probs: (B, T, V' + 1) log-softmax of the alignment logits per prompt, class 0 the blank.
        lengths: (B,) frames of each prompt's audio, 0 for none.
        vocab_ids: (V',) ascending LLM token ids of the classes 1...
        end_ids: token ids that end a sequence.
        prompt_length: columns of the prompt, after which the transcript begins.
        weight: of CTC, between 0 and 1.
        remember: calls of which a row may be the continuation: 1 for beams, which continue the last, more where
            drafted words are taken back.
    """

    def __init__(self, log_probs, lengths, vocab_ids, end_ids, prompt_length, weight, remember=1):
        real = torch.arange(log_probs.shape[1], device=log_probs.device) < lengths[:, None]
        # Beyond its end a clip is certainly blank: the last frame then holds the score of the whole clip.
        self.blank = log_probs[..., 0].masked_fill(~real, 0.0)
        self.probs = log_probs.exp().mul_(real[..., None])
        self.probs[..., 0] = self.probs[..., 1:].mean(-1)  # of a token that is no class, in the place of the blank's
        self.lengths, self.vocab_ids, self.end_ids = lengths, vocab_ids, list(end_ids)
        self.prompt_length, self.weight = prompt_length, weight
        # Of the last calls: number of the prompt and what it has written (N, 1 + L), and the rows' gamma and heard.
        self.steps = deque(maxlen=remember)

    def __call__(self, input_ids, scores):
        """`input_ids` (N, L), `scores` (N, V), N a multiple of B with the rows of a prompt together -> (N, V)."""
        if not self.blank.shape[1]:
            return scores
        batch = torch.arange(len(input_ids), device=input_ids.device) // (len(input_ids) // len(self.blank))
        written = input_ids[:, self.prompt_length :]
        gamma, heard = self._advance(written, batch)
        continued, ended = self._continuations(gamma, written, batch)
        continued = continued.float() - heard[:, None]
        ctc = continued[:, :1].repeat(1, scores.shape[1])
        ctc[:, self.vocab_ids] = continued[:, 1:]
        ctc[:, self.end_ids] = (ended - heard)[:, None]
        joint = (1 - self.weight) * scores.float().log_softmax(-1) + self.weight * ctc
        joint = joint.masked_fill(torch.isneginf(scores), -torch.inf)  # also at weight 1, where 0 * -inf is no number
        # A row that has ended is only padded; one that CTC finds impossible has nothing left to be told.
        usable = (self.lengths[batch] > 0) & torch.isfinite(joint).any(-1)
        return torch.where(usable[:, None], joint.to(scores.dtype), scores)

    def _advance(self, written, batch):
        """Forward variables of every row's prefix and the log probability of all transcripts that begin with it.

        Returns gamma (N, T, 2), log probability that frames 0..t read the prefix and end in its last token or in a
        blank, and heard (N,).
        """
        rows = torch.cat([batch[:, None], written], 1)
        if not written.shape[1]:
            gamma = self.blank.new_full((*self.blank.shape, 2), -torch.inf)
            gamma[..., 1] = self.blank.cumsum(1)
            gamma, heard = gamma[batch], self.blank.new_zeros(len(batch))
        else:
            found = ((parent_rows(rows, known), *state) for known, *state in reversed(self.steps))
            parents, gamma, heard = next(step for step in found if step[0] is not None)
            classes = self._classes(written[:, -1])
            repeated = (written[:, -2:-1] == written[:, -1:]).any(1) & (classes > 0)
            gamma, heard = self._extend(gamma[parents], classes, repeated, batch)
        self.steps.append((rows, gamma, heard))
        return gamma, heard

    def _classes(self, tokens):
        """Classes of LLM token ids (N,), 0 for one that has none."""
        places = torch.searchsorted(self.vocab_ids, tokens.contiguous()).clamp(max=len(self.vocab_ids) - 1)
        return torch.where(self.vocab_ids[places] == tokens, places + 1, 0)

    def _extend(self, gamma, classes, repeated, batch):
        """Forward variables (N, T, 2) after one more token, and its prefix score (N,)."""
        emit = self.probs[batch, :, classes].log()
        before = self._before(torch.where(repeated[:, None], gamma[..., 1], gamma.logsumexp(-1)), gamma)
        token = recurrence(before, emit)
        later = torch.cat([torch.full_like(token[:, :1], -torch.inf), token[:, :-1]], 1)
        pause = recurrence(later, self.blank[batch])
        return torch.stack([token, pause], -1), (before + emit).logsumexp(1)

    def _before(self, total, gamma):
        """`total` (N, T) one frame earlier. Before the first frame only the empty prefix has been read."""
        empty = torch.isneginf(gamma[..., 0]).all(1)
        first = torch.zeros_like(total[:, :1]).masked_fill(~empty[:, None], -torch.inf)
        return torch.cat([first, total[:, :-1]], 1)

    def _continuations(self, gamma, written, batch):
        """log p_CTC of every row's prefix and one more token (N, 1 + V'), and of the prefix as a whole text (N,)."""
        total = gamma.logsumexp(-1)
        continued = self._emit(self._before(total, gamma), batch)
        if written.shape[1]:
            # The token just written needs a blank before it can come again.
            last = self._classes(written[:, -1])
            again = (self._before(gamma[..., 1], gamma) + self.probs[batch, :, last].log()).logsumexp(1)
            rows = last.nonzero()[:, 0]
            continued[rows, last[rows]] = again[rows]
        return continued, total[:, -1]

    def _emit(self, before, batch):
        """logsumexp over frames of `before` (N, T) + log p(class) -> (N, 1 + V'), a scaled matrix product a prompt."""
        peak = before.amax(1, keepdim=True).clamp(min=torch.finfo(before.dtype).min)
        weights = (before - peak).exp()
        per_prompt = len(batch) // len(self.probs)
        sums = torch.bmm(weights.view(len(self.probs), per_prompt, -1), self.probs)
        return sums.flatten(0, 1).log() + peak


def parent_rows(written, known):
    """Which row of `known` (M, L - 1) each row of `written` (N, L) continues, (N,): beams are reordered between steps,
    and told by what they have written. None where any continues none."""
    if known.shape[1] != written.shape[1] - 1:
        return None
    same = (written[:, None, :-1] == known).all(-1)
    return same.int().argmax(1) if bool(same.any(1).all()) else None


def recurrence(into, stay):
    """x[t] = logaddexp(x[t - 1], into[t]) + stay[t] over the frames of `into` and `stay` (N, T), from x[-1] = -inf.

    Without a loop over frames: x[t] = S[t] + logsumexp over s <= t of (into[s] - S[s - 1]), S the cumulated sum of
    `stay`. In float64, where S may be large against what it is subtracted from.
    """
    stay = stay.double().clamp(min=NEVER)
    total = stay.cumsum(1)
    return (total + torch.logcumsumexp(into.double() - (total - stay), 1)).to(into.dtype)


def last_clips(input_ids, audio_token_id, asked=None):
    """Which clips the last user turn of each prompt is about: a range of clip numbers per row.

    `input_ids` (B, L) with a placeholder per clip, `asked` (B, 2) as `generate` takes it; None: the last clip.
    """
    counts = (input_ids == audio_token_id).sum(1).tolist()
    wanted = [1] * len(counts) if asked is None else asked[:, 1].tolist()
    clips, end = [], 0
    for count, size in zip(counts, wanted, strict=True):
        end += count
        clips.append(range(end - min(count, size), end))
    return clips


def alignment_per_prompt(align_logits, tokens_mask, clips, temperature=1.0):
    """Alignment of what each prompt is about, clip after clip.

    `align_logits` (C, T, V' + 1), `tokens_mask` (C, T), `clips` per prompt the numbers of its clips, in order. Returns
    log_probs (B, T', V' + 1) float32 and lengths (B,), of a silence (`SILENT`) one frame. Where no word is the best
    class of any frame, what is left is a certain blank: nobody speaks, and no LLM shall say otherwise.
    """
    rows = []
    for numbers in clips:
        numbers = torch.tensor(list(numbers), dtype=torch.long, device=align_logits.device)
        frames = align_logits[numbers][tokens_mask[numbers]].float()
        silent = frames.softmax(-1)[:, 0] > SILENT
        frames = frames[~(silent & torch.nn.functional.pad(silent[:-1], (1, 0)))]
        if not bool(frames.argmax(-1).any()):
            frames = torch.full_like(frames[:1], NEVER)
            frames[:, 0] = 0
        rows.append((frames / temperature).log_softmax(-1))
    lengths = torch.tensor([len(row) for row in rows], device=align_logits.device)
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True), lengths
