"""TinyLLaVA's connector `identity`: for encoders that already write in the LLM's space. Nothing to train."""

from torch import nn


class IdentityAdapter(nn.Module):
    """Every encoder frame is a token, unchanged; the readout brings it to the scale of the LLM's table."""

    def __init__(self, config, input_size, output_size):
        super().__init__()
        if input_size != output_size:
            raise ValueError(
                f"adapter identity needs an encoder as wide as the LLM, got {input_size} and {output_size}: use linear "
                "or mlp2x_gelu"
            )

    @staticmethod
    def length_rule(config):
        return []

    def forward(self, hidden, mask):
        """`hidden` (B, T, size), `mask` (B, T) bool -> the same."""
        return hidden, mask
