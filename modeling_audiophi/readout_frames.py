"""Readout "frames": every audio token."""

from torch import nn


class FramesReadout(nn.Module):
    """Every audio token, normalised to the size of the LLM's own embeddings."""

    needs_alignment = needs_encoder = learns_sounds = False

    def __init__(self, hidden_size, encoder_size):
        super().__init__()
        self.norm = nn.LayerNorm(hidden_size)

    def start_at(self, rms):
        self.norm.weight.fill_(rms)

    def forward(self, tokens, mask, logits, table, encoded=None):
        """See `readouts.py`."""
        return self.norm(tokens), None
