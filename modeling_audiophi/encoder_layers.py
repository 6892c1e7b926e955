"""Which of an encoder's layers the adapter hears."""

import torch
from torch import nn


class LayerChoice(nn.Module):
    """Last layer, one layer by index, or a learned softmax mix of all of them.

    `layer`: "last" (the encoder's own output, after its final norm), an int (index into the hidden states: 0 is what
    enters the first block, -1 the last), or "mix" (parameter `layer_weights`, one logit per hidden state, starting
    uniform).
    """

    def __init__(self, num_states, layer="last"):
        super().__init__()
        if layer not in ("last", "mix") and (isinstance(layer, (str, bool)) or not -num_states <= layer < num_states):
            raise ValueError(
                f"encoder_layer {layer!r}: expected 'last', 'mix' or an index from {-num_states} to {num_states - 1} "
                f"(this encoder has {num_states} hidden states)"
            )
        self.layer = layer
        if layer == "mix":
            self.layer_weights = nn.Parameter(torch.zeros(num_states))

    @property
    def needs_all(self):
        return self.layer != "last"

    def forward(self, last, hidden_states):
        """`last` (B, T, D), `hidden_states` tuple of (B, T, D), read unless the layer is "last"."""
        if self.layer == "last":
            return last
        if self.layer == "mix":
            weights = self.layer_weights.softmax(0).to(last.dtype)
            return sum(weight * state for weight, state in zip(weights, hidden_states, strict=True))
        return hidden_states[self.layer]
