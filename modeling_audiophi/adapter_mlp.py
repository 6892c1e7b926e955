"""A two-layer MLP on stacked frames: TinyLLaVA's `mlp2x_gelu` with a width and dropout of its own."""

from torch import nn

from .adapter_stack import FrameStack


class MLPAdapter(nn.Module):
    """LayerNorm -> stack `stack` frames -> Linear -> GELU -> Dropout -> Linear; ceil(T / stack) tokens."""

    def __init__(self, config, input_size, output_size):
        super().__init__()
        self.stack = FrameStack(input_size, config.stack)
        self.mlp = nn.Sequential(
            nn.Linear(input_size * config.stack, config.hidden_size),
            nn.GELU(),
            nn.Dropout(config.dropout),
            nn.Linear(config.hidden_size, output_size),
        )

    @staticmethod
    def length_rule(config):
        return FrameStack.length_rule(config)

    def forward(self, hidden, mask):
        """`hidden` (B, T, input_size), `mask` (B, T) bool -> tokens (B, T', output_size), mask (B, T')."""
        hidden, mask = self.stack(hidden, mask)
        return self.mlp(hidden), mask
