"""Alignment of audio to the language model's own words: CTC over its input-embedding table, and the collapse.

Every audio token is scored against the LLM's embeddings of a restricted vocabulary (the tokens of the training texts)
and a learned blank; CTC (Graves et al. 2006) teaches the adapter where each word is without running the LLM. Related:
SpeechMapper (https://arxiv.org/abs/2601.20417), TASU (https://arxiv.org/abs/2511.03310).
"""

import torch
from torch import nn

from .ctc_loss_audiophi import ctc_negative_log_likelihood
from .spelling_audiophi import Spelling

# In the first column of a clip's labels: it has no transcript that the head could learn from (nothing but -100: nobody
# speaks, and all frames are blank).
NO_TARGET = -101


class AlignmentHead(nn.Module):
    """Scores audio tokens against `vocab_size` of the LLM's input embeddings and a blank (class 0).

    `spelling` (None or the sizes of a `Spelling`): score their spelling too.
    `vocab_ids` (V',) long, ascending LLM token ids, is a buffer; class i + 1 is `vocab_ids[i]`.
    """

    def __init__(self, vocab_size, hidden_size, spelling=None):
        super().__init__()
        self.register_buffer("vocab_ids", torch.arange(vocab_size))
        self.scale = nn.Parameter(torch.ones(()))
        self.bias = nn.Parameter(torch.zeros(vocab_size + 1))
        self.blank = nn.Parameter(torch.randn(hidden_size) * 0.1)
        self.spelling = Spelling(vocab_size, hidden_size, **spelling) if spelling else None

    def logits(self, tokens, table, table_scale=1.0):
        """`tokens` (B, T, D), `table` (V', D) the LLM's embeddings of the vocabulary, `table_scale` what its embedding
        module has multiplied them by -> logits (B, T, V' + 1)."""
        tokens = self.scale * tokens.to(self.blank)
        # The blank apart from the table: a frozen table then costs no gradient. Scores do not grow with the module's
        # factor: Gemma's is 25 and more, and the first posteriors would be those of a head that is sure of nonsense.
        words = nn.functional.linear(tokens / table_scale, table.to(self.blank), self.bias[1:])
        if self.spelling is not None:
            words = self.spelling(tokens, words)
        blank = nn.functional.linear(tokens, self.blank[None], self.bias[:1])
        return torch.cat([blank, words], -1)

    def targets(self, token_ids):
        """LLM token ids (B, S), -100 padded -> classes (B, S) (0 where padded) and lengths (B,).

        Raises ValueError for ids outside the alignment vocabulary.
        """
        valid = token_ids >= 0
        classes = torch.searchsorted(self.vocab_ids, token_ids.clamp(min=0)).clamp(max=len(self.vocab_ids) - 1)
        unknown = valid & (self.vocab_ids[classes] != token_ids)
        if bool(unknown.any()):
            raise ValueError(
                "align_labels has token ids that are not in the alignment vocabulary: "
                f"{token_ids[unknown].unique().tolist()[:10]}; "
                "tokenise the texts as for the vocabulary, or build it from these texts too"
            )
        # Valid ids first, in order, so that -100 may stand anywhere.
        order = (~valid).to(torch.int8).argsort(dim=1, stable=True)
        return (classes + 1).masked_fill(~valid, 0).gather(1, order), valid.sum(1)

    def ctc_loss(self, logits, lengths, token_ids, num_items=None):
        """CTC loss, each clip divided by its number of target tokens (of frames where it has no words).

        `logits` (B, T, V' + 1), `lengths` (B,) frames, `token_ids` (B, S) LLM ids, -100 padded. Returns the mean over
        clips (the sum divided by `num_items` when given, for gradient accumulation) and the number of clips whose
        target does not fit into their frames: those cost nothing and teach nothing. Clips that begin with NO_TARGET
        are left out of both.
        """
        token_ids, lengths = token_ids.to(logits.device), lengths.to(logits.device)
        classes, target_lengths = self.targets(token_ids)
        repeats = ((classes[:, 1:] == classes[:, :-1]) & (classes[:, 1:] > 0)).sum(1)
        learned = ~(token_ids[:, :1] == NO_TARGET).any(1)
        impossible = learned & (lengths < target_lengths + repeats)
        losses = ctc_negative_log_likelihood(logits, classes, lengths, target_lengths)
        # Without words (nobody speaks) every frame is a target: blank.
        items = target_lengths.where(target_lengths > 0, lengths).clamp(min=1)
        losses = losses.masked_fill(impossible | ~learned, 0) / items
        count = (learned & ~impossible).sum().clamp(min=1) if num_items is None else num_items
        return losses.sum() / count, impossible.sum()

    def greedy(self, logits, mask):
        """Best path: `logits` (B, T, V' + 1), `mask` (B, T) -> per clip the LLM token ids, blanks dropped, repeats
        merged."""
        path = logits.argmax(-1)
        transcripts = []
        for row, length in zip(path, mask.sum(1).tolist(), strict=True):
            classes = torch.unique_consecutive(row[:length])
            transcripts.append(self.vocab_ids[classes[classes > 0] - 1].tolist())
        return transcripts
