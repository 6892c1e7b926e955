"""The simplest adapter: stack frames, one linear map."""

from torch import nn

from .adapter_stack import FrameStack


class LinearAdapter(nn.Module):
    """LayerNorm -> stack `stack` frames -> Linear; ceil(T / stack) tokens."""

    def __init__(self, config, input_size, output_size):
        super().__init__()
        self.stack = FrameStack(input_size, config.stack)
        self.proj = nn.Linear(input_size * config.stack, output_size)

    @staticmethod
    def length_rule(config):
        return FrameStack.length_rule(config)

    def forward(self, hidden, mask):
        """`hidden` (B, T, input_size), `mask` (B, T) bool -> tokens (B, T', output_size), mask (B, T')."""
        hidden, mask = self.stack(hidden, mask)
        return self.proj(hidden), mask
