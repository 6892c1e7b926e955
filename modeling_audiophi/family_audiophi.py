"""What families of language models do each in their own way, before their layers and behind them."""

import torch
from transformers import AutoModelForCausalLM
from transformers.modeling_outputs import BaseModelOutput


def look_up(embeddings, ids, text_config):
    """Token ids -> embeddings as the LLM's layers read them. Most families that scale them do so in the module (Gemma),
    or scale `inputs_embeds`, too (Granite); Falcon-H1 only what its model has looked up itself."""
    embeds = embeddings(ids)
    return embeds * text_config.embedding_multiplier if text_config.model_type == "falcon_h1" else embeds


class FamilyHead:
    """From hidden states to logits: scaled (Granite divides, HyperCLOVA X multiplies), capped (Gemma 2) or plain, as
    only the family's ForCausalLM knows. Here is one without a model: it gets hidden states, and the output layer.

    No module of AudioPhi's, so that none of its weights, which do not exist (meta device), is ever saved or moved.
    """

    def __init__(self, text_config):
        with torch.device("meta"):
            self.causal_lm = AutoModelForCausalLM.from_config(text_config)
        self.causal_lm.base_model._modules.clear()
        self.causal_lm.base_model.forward = pass_on

    def __call__(self, lm_head, hidden):
        """`lm_head` the output layer, `hidden` (L, D) or (B, L, D) -> logits (L, V) or (B, L, V)."""
        self.causal_lm.set_output_embeddings(lm_head)
        logits = self.causal_lm(inputs_embeds=hidden if hidden.dim() == 3 else hidden[None], use_cache=False).logits
        return logits if hidden.dim() == 3 else logits[0]


class HiddenStates(BaseModelOutput):
    """Output of a model without anything but `last_hidden_state`: whatever else a family passes on is None."""

    def __getattr__(self, name):
        return None


def pass_on(*args, inputs_embeds=None, **kwargs):
    return HiddenStates(last_hidden_state=inputs_embeds)
