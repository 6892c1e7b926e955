"""Simulated clips: words that were never audio, as the readouts `collapse` and `mixed` would give them to the LLM.

Both put one blurred word embedding per heard token, the mean of the LLM's embeddings under a posterior. Where the
posterior is made of text, as training does with the confusions of real clips, neither encoder nor adapter is needed
(TASU, https://arxiv.org/abs/2511.03310).
"""

from .lengths_audiophi import length_mask
from .outputs_audiophi import AudioPhiAudioOutput


def hear_simulated(ids, weights, lengths, clips, embed, audio=None):
    """What the LLM reads of a batch's clips, some of which are simulated: an `AudioPhiAudioOutput` whose
    `pooler_output` and `counts` are of all clips in prompt order, everything else of the real ones, as in `audio`.

    `ids` (S, T, K) LLM token ids and their `weights` (S, T, K), `lengths` (S,), of simulated clips; `clips` (C,) bool
    which of all they are; `embed` the LLM's embedding module; `audio` of the real clips, None without any.
    Raises ValueError when the numbers of clips do not fit.
    """
    real = [0] if audio is None else [len(audio.counts)]
    found = [int(clips.sum()), int((~clips).sum())]
    if found != [len(ids), *real]:
        raise ValueError(
            f"heard_clips names {found[0]} simulated and {found[1]} real clips, but {len(ids)} and {real[0]} are given"
        )
    heard = simulated_embeddings(ids, weights, lengths, embed)
    counts = lengths.new_zeros(len(clips)).masked_scatter(clips, lengths)
    if audio is None:
        return AudioPhiAudioOutput(pooler_output=heard, counts=counts)
    counts = counts.masked_scatter(~clips, audio.counts.to(counts))
    simulated = clips.repeat_interleave(counts)[:, None].expand(-1, heard.shape[-1])
    embeds = audio.pooler_output.new_zeros(simulated.shape)
    embeds = embeds.masked_scatter(simulated, heard.to(embeds.dtype))
    audio.pooler_output, audio.counts = embeds.masked_scatter(~simulated, audio.pooler_output), counts
    return audio


def simulated_embeddings(ids, weights, lengths, embed):
    """Weighted means of embeddings (N, D), clip after clip: `ids`, `weights` (S, T, K), `lengths` (S,)."""
    real = length_mask(lengths, ids.shape[1])
    rows = embed(ids[real])
    return (weights[real].to(rows)[:, None] @ rows)[:, 0]
