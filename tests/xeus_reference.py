"""The frozen ESPnet reference that the XEUS tests share; made by tools/make_xeus_reference.py."""

import json
from pathlib import Path

import torch
from safetensors import safe_open

from audiophi.components.convert_xeus import xeus_state_dict
from modeling_audiophi import XeusConfig, XeusModel
from modeling_audiophi.lengths_audiophi import length_mask

REFERENCE = Path(__file__).parent / "reference"


class Reference:
    """A file of make_xeus_reference.py, and a XeusModel with its weights."""

    def __init__(self, path, **changes):
        with safe_open(path, "pt") as file:
            self.tensors = {key: file.get_tensor(key) for key in file.keys()}
            self.config = XeusConfig(**json.loads(file.metadata()["sizes"]), **changes)
        self.weights = {key[8:]: value for key, value in self.tensors.items() if key.startswith("weights.")}
        self.speech, self.lengths = self.tensors["speech"], self.tensors["lengths"]
        self.mask = length_mask(self.lengths, self.speech.shape[1])

    def model(self):
        model = XeusModel(self.config)
        model.load_state_dict(xeus_state_dict(self.weights, self.config), strict=True)
        return model.eval()

    def difference(self, model):
        """Largest difference from ESPnet over the output and every block, padded frames included."""
        with torch.no_grad():
            output = model(self.speech, self.mask, output_hidden_states=True)
        pairs = [(output.last_hidden_state, self.tensors["output"])]
        pairs += [(state, self.tensors[f"hidden.{i}"]) for i, state in enumerate(output.hidden_states[1:])]
        assert len(pairs) == self.config.num_hidden_layers + 1
        return max(float((ours - theirs).abs().max()) for ours, theirs in pairs)


def tiny(**changes):
    return Reference(REFERENCE / "xeus_tiny.safetensors", **changes)
