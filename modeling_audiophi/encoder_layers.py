"""Which of an encoder's layers the adapter hears."""

import copy

import torch
from torch import nn


class LayerChoice(nn.Module):
    """Last layer, one layer by index, or a learned softmax mix of all of them.

    `layer`: "last" (the encoder's own output, after its final norm), an int (index into the hidden states: 0 is what
    enters the first block, -1 the last), or "mix" (parameter `layer_weights`, one logit per hidden state, starting
    uniform). Of a layer by index the encoder's blocks above it are not even built: see `cut_config`.
    """

    def __init__(self, num_states, layer="last"):
        super().__init__()
        if layer not in ("last", "mix") and (isinstance(layer, (str, bool)) or not -num_states <= layer < num_states):
            raise ValueError(
                f"encoder_layer {layer!r}: expected 'last', 'mix' or an index from {-num_states} to {num_states - 1} "
                f"(this encoder has {num_states} hidden states)"
            )
        self.layer = layer
        self.index = None if layer in ("last", "mix") else layer % num_states
        if layer == "mix":
            self.layer_weights = nn.Parameter(torch.zeros(num_states))

    @property
    def needs_all(self):
        return self.layer == "mix" or self.index == 0

    def cut_config(self, config, name="num_hidden_layers"):
        """An encoder's config; of a layer by index a copy with as many blocks (value `name`) as it needs, one at
        least."""
        if self.index is None:
            return config
        config = copy.deepcopy(config)
        setattr(config, name, max(1, self.index))
        return config

    def forward(self, last, hidden_states):
        """`last` (B, T, D): what leaves the blocks that there are; `hidden_states` tuple of (B, T, D), read where it
        `needs_all`."""
        if self.layer == "mix":
            weights = self.layer_weights.softmax(0).to(last.dtype)
            return sum(weight * state for weight, state in zip(weights, hidden_states, strict=True))
        return hidden_states[0] if self.index == 0 else last
