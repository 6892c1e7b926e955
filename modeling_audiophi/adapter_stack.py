"""Frame stacking: the common first step of most adapters."""

from torch import nn

from .lengths_audiophi import length_mask


class FrameStack(nn.Module):
    """LayerNorm, then `stack` neighbouring frames side by side in one vector.

    The LayerNorm comes first because encoder outputs differ in scale by an order of magnitude (XEUS: up to 34). The
    last group is filled with zeros; padding frames are zeroed after the norm, so a token never depends on padding.
    """

    def __init__(self, input_size, stack):
        super().__init__()
        self.size = stack
        self.norm = nn.LayerNorm(input_size)

    @staticmethod
    def length_rule(config):
        return [[config.stack, config.stack, config.stack - 1, 1]]

    def forward(self, hidden, mask):
        """`hidden` (B, T, D), `mask` (B, T) bool, valid frames first -> (B, ceil(T / stack), stack * D), mask."""
        hidden = self.norm(hidden).masked_fill(~mask[..., None], 0)
        hidden = nn.functional.pad(hidden, (0, 0, 0, -hidden.shape[1] % self.size))
        hidden = hidden.reshape(len(hidden), -1, self.size * hidden.shape[2])
        return hidden, length_mask((mask.sum(1) + self.size - 1) // self.size, hidden.shape[1])
