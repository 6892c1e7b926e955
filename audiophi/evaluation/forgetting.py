"""The LLM without what training changed in it, to tell what it has forgotten."""

import contextlib

import torch

from modeling_audiophi import resolve_component
from modeling_audiophi.lora_audiophi import is_lora_key, without_lora


def is_changed(model) -> bool:
    """Whether training touched the LLM's weights."""
    return model.config.tuned["text"] != "frozen"


@contextlib.contextmanager
def as_before(model):
    """Inside the `with` block `model`'s LLM is the base component: LoRA layers do nothing, weights that were tuned in
    full are the component's. ValueError where it is not known which that is, or it does not fit."""
    with without_lora(model.model.language_model):
        if model.config.tuned["text"] != "full":
            yield
            return
        from transformers import AutoModelForCausalLM

        base = (model.config.base_components or {}).get("text")
        if base is None:
            raise ValueError("--forgetting: the checkpoint does not say which LLM it was made from")
        folder = resolve_component(base["id"], base["revision"])
        llm = AutoModelForCausalLM.from_pretrained(folder, dtype=model.dtype)
        pairs = [(model.model.language_model, llm.base_model), (model.lm_head, llm.get_output_embeddings())]
        kept = [{name: value.detach().cpu().clone() for name, value in ours.state_dict().items()} for ours, _ in pairs]
        try:
            for ours, theirs in pairs:
                overwrite(ours, theirs.state_dict())
            yield
        finally:
            for (ours, _), state in zip(pairs, kept, strict=True):
                overwrite(ours, state)


@torch.no_grad()
def overwrite(module, state: dict) -> None:
    """Copies weights of the same name; a table of embeddings may have further rows, for added tokens, which stay."""
    for name, value in module.state_dict().items():
        source = state.get(name.replace(".base_layer.", "."), state.get(name))
        if source is None:
            if is_lora_key(name):
                continue
            raise ValueError(f"--forgetting: the base component has no weight {name!r}")
        rows = min(len(value), len(source)) if value.dim() else None
        if value.dim() and value.shape[1:] != source.shape[1:]:
            raise ValueError(f"--forgetting: {name!r} of the base component has another shape")
        target = value[:rows] if rows is not None else value
        target.copy_(source[:rows] if rows is not None else source)
