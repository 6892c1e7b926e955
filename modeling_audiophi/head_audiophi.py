"""From the language model's hidden states to logits, as its family does it: scaled (Granite divides, HyperCLOVA X
multiplies), capped (Gemma 2) or plain. Only the family's own ForCausalLM knows, so it is asked."""

import torch
from transformers import AutoModelForCausalLM
from transformers.modeling_outputs import MoeModelOutputWithPast


class FamilyHead:
    """The ForCausalLM of a text config without a model of its own: it gets hidden states, and the output layer.

    No module of AudioPhi's, so that none of its weights, which do not exist (meta device), is ever saved or moved.
    """

    def __init__(self, text_config):
        with torch.device("meta"):
            self.causal_lm = AutoModelForCausalLM.from_config(text_config)
        self.causal_lm.base_model._modules.clear()
        self.causal_lm.base_model.forward = pass_on

    def __call__(self, lm_head, hidden):
        """`lm_head` the output layer, `hidden` (..., L, D) -> logits (..., L, V)."""
        self.causal_lm.set_output_embeddings(lm_head)
        rows = hidden if hidden.dim() == 3 else hidden[None]
        return self.causal_lm(inputs_embeds=rows, use_cache=False).logits.view(*hidden.shape[:-1], -1)


def pass_on(*args, inputs_embeds=None, **kwargs):
    return MoeModelOutputWithPast(last_hidden_state=inputs_embeds)
