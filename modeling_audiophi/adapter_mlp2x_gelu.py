"""TinyLLaVA's and LLaVA-1.5's connector `mlp2x_gelu`, as wide as the LLM."""

from torch import nn

from .adapter_stack import FrameStack


class MLP2xGELUAdapter(nn.Module):
    """LayerNorm -> stack `stack` frames -> Linear -> GELU -> Linear; ceil(T / stack) tokens.

    The inner width is the LLM's, and there is no dropout (`mlp` has both as settings). TinyLLaVA stacks nothing:
    `stack: 1`.
    """

    def __init__(self, config, input_size, output_size):
        super().__init__()
        self.stack = FrameStack(input_size, config.stack)
        self.mlp = nn.Sequential(
            nn.Linear(input_size * config.stack, output_size), nn.GELU(), nn.Linear(output_size, output_size)
        )

    @staticmethod
    def length_rule(config):
        return FrameStack.length_rule(config)

    def forward(self, hidden, mask):
        """`hidden` (B, T, input_size), `mask` (B, T) bool -> tokens (B, T', output_size), mask (B, T')."""
        hidden, mask = self.stack(hidden, mask)
        return self.mlp(hidden), mask
