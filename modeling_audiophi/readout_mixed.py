"""Readout "mixed": the words that the alignment hears, and a token for every second in which it hears none."""

import torch
from torch import nn

from .readout_collapse import run_means, run_numbers, word_embeddings

# Frames without words that make one sound token, 1 s of the default adapters'. Pauses between words are shorter.
SOUND_FRAMES = 12
BOTTLENECK = 320
# What a token that equals a word's embedding scores for it at first, whatever the LLM's embeddings measure.
FIRST_SCORE = 10.0


class MixedReadout(nn.Module):
    """Words as in the collapse, and one token per SOUND_FRAMES frames without words: music, rain, a barking dog.

    A sound token is an MLP of its mean adapter state and of mean, deviation and maximum of the encoder's states over
    the whole clip, at the size of the LLM's embeddings. Audio that is too short for either words or a sound token
    gives one sound token, so that no clip is empty.

    What words are to CTC, a description is to `sound_loss`: it puts the sound tokens near the LLM's own embeddings of
    its words, in no order, so that the LLM finds "dog" and "bark" where a dog barks.
    """

    needs_alignment = needs_encoder = learns_sounds = True

    def __init__(self, hidden_size, encoder_size):
        super().__init__()
        self.state_norm = nn.LayerNorm(hidden_size)
        self.clip_norm = nn.LayerNorm(3 * encoder_size)
        self.sounds = nn.Sequential(
            nn.Linear(hidden_size + 3 * encoder_size, BOTTLENECK),
            nn.GELU(),
            nn.Dropout(0.2),
            nn.Linear(BOTTLENECK, hidden_size),
            nn.LayerNorm(hidden_size),
        )
        self.sound_words = SoundWords(hidden_size)

    def start_at(self, rms):
        self.sounds[-1].weight.fill_(rms)
        self.sound_words.start_at(rms)

    def forward(self, tokens, mask, logits, table, encoded):
        """See `readouts.py`."""
        path = logits.argmax(-1).masked_fill(~mask, 0)
        starts, keep = sound_and_word_runs(path, mask)
        run = run_numbers(starts)
        states = run_means(tokens, run)
        words = word_embeddings(path, run, logits, table)
        clips = clip_statistics(*encoded).to(tokens.dtype)
        clips = self.clip_norm(clips)[:, None].expand(-1, tokens.shape[1], -1)
        sounds = keep & (path == 0)
        made = self.sounds(torch.cat([self.state_norm(states), clips], -1)[sounds])
        embeds = (words * keep[..., None]).index_put((sounds,), made.to(words.dtype))
        return embeds, keep

    def sound_loss(self, embeds, sounds, labels, table):
        """Cross-entropy between each sound token's scores of the words and its clip's description, a bag of words.

        `embeds` (B, T, D), `sounds` (B, T) bool which of them are sound tokens, `labels` (B, S) indices into `table`
        (V', D), negative where padded; a word counts once. Returns the sum over clips with labels of the mean over
        their tokens.
        """
        sounds = sounds & (labels >= 0).any(1, keepdim=True)
        clip = torch.arange(len(labels), device=sounds.device)[:, None].expand_as(sounds)[sounds]
        losses = bag_losses(self.sound_words(embeds[sounds], table), labels, clip)
        return (losses / sounds.sum(1)[clip]).sum()


class SoundWords(nn.Module):
    """Scores tokens against the LLM's embeddings, for the losses of descriptions only.

    `common` is what all descriptions share ("the sound of"), so that the tokens need only say what is particular.
    """

    def __init__(self, hidden_size):
        super().__init__()
        self.common = nn.Parameter(torch.zeros(hidden_size))
        self.scale = nn.Parameter(torch.ones(()))

    def start_at(self, rms):
        self.scale.fill_(FIRST_SCORE / (len(self.common) * rms**2))

    def forward(self, tokens, table):
        """`tokens` (N, D), `table` (V', D) -> log probabilities (N, V') float32."""
        queries = self.scale * (tokens.to(self.common.dtype) + self.common)
        return nn.functional.linear(queries, table.to(queries.dtype)).float().log_softmax(-1)


def bag_losses(scores, labels, clip):
    """Cross-entropy (N,) between log probabilities `scores` (N, V) of words and the words of a description, in no
    order, each counting once: of `labels` (C, S), negative where padded, the row that `clip` (N,) says."""
    bags = scores.new_zeros(len(labels), scores.shape[-1] + 1).scatter_(1, labels.clamp(min=-1) + 1, 1.0)[:, 1:]
    bags = bags / bags.sum(1, keepdim=True).clamp(min=1)
    return -(scores * bags[clip]).sum(-1)


def sound_and_word_runs(path, mask):
    """Where runs of equal labels and sound tokens begin, and which of them are kept, (B, T) bool each.

    `path` (B, T) best classes, 0 the blank, `mask` (B, T) which frames are real. Only whole pieces of SOUND_FRAMES
    blanks are kept, and all words.
    """
    starts = torch.ones_like(mask)
    starts[:, 1:] = (path[:, 1:] != path[:, :-1]) | (mask[:, 1:] != mask[:, :-1])
    position = torch.arange(path.shape[1], device=path.device).expand_as(path)
    since = position - torch.where(starts, position, 0).cummax(1).values
    silent = (path == 0) & mask
    pieces = silent & (since % SOUND_FRAMES == 0)
    # A piece is whole when its last frame belongs to the same run.
    whole = torch.zeros_like(pieces)
    last = SOUND_FRAMES - 1
    if path.shape[1] > last:
        whole[:, : path.shape[1] - last] = since[:, last:] == since[:, : path.shape[1] - last] + last
        whole[:, : path.shape[1] - last] &= silent[:, last:]
    keep = (starts & (path > 0)) | (pieces & whole)
    empty = ~keep.any(1) & mask[:, 0]
    keep[:, 0] |= empty
    # In a row without any the whole clip is one piece.
    return starts | (pieces & ~empty[:, None]), keep


def clip_statistics(hidden, mask):
    """Mean, standard deviation and maximum over time: `hidden` (B, T, E), `mask` (B, T) -> (B, 3 E) float32."""
    hidden, real = hidden.float(), mask[..., None]
    count = real.sum(1).clamp(min=1)
    mean = (hidden * real).sum(1) / count
    variance = ((hidden - mean[:, None]).square() * real).sum(1) / count
    maximum = hidden.masked_fill(~real, float("-inf")).amax(1)
    maximum = torch.where(mask.any(1, keepdim=True), maximum, 0.0)
    return torch.cat([mean, (variance + 1e-6).sqrt(), maximum], -1)
