"""Configs without weights: what a recipe's model will be, for computing its cost before anything is downloaded."""

import torch
from transformers import AutoModelForCausalLM, PhiConfig

from modeling_audiophi import (
    AudioPhiAdapterConfig,
    AudioPhiConfig,
    AudioPhiForConditionalGeneration,
    LanguageBindAudioConfig,
    XeusConfig,
)
from modeling_audiophi.components_audiophi import load_config, load_text_config

from .build import check_adapter_keys
from .recipe import Recipe

# Sizes of released models, as their makers' configs give them: nothing needs to be downloaded, or converted, for these.
RELEASED = {
    "espnet/xeus": lambda: XeusConfig(),
    "LanguageBind/LanguageBind_Audio_FT": lambda: LanguageBindAudioConfig(),
    "microsoft/phi-2": lambda: PhiConfig(
        hidden_size=2560,
        intermediate_size=10240,
        num_hidden_layers=32,
        num_attention_heads=32,
        max_position_embeddings=2048,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 0.4},
        bos_token_id=50256,
        eos_token_id=50256,
    ),
}
# Character n-grams of a token's spelling, on average; only the size of a small buffer depends on it.
NGRAMS_PER_TOKEN = 15


def component_config(component: str, revision: str | None, load):
    """Config of a base component: of RELEASED, else as `load` finds it (its errors)."""
    return RELEASED[component]() if component in RELEASED else load(component, revision)


def recipe_config(recipe: Recipe, align_vocab: int, audio_config=None, text_config=None) -> AudioPhiConfig:
    """Config of the model that a recipe builds, with `align_vocab` classes of the alignment head where it has one.

    `audio_config`, `text_config` replace the components' own. Raises ValueError for what does not fit together.
    """
    if recipe.init_from is not None:
        return AudioPhiConfig.from_pretrained(recipe.init_from)
    components = recipe.components
    audio_config = audio_config or component_config(components.audio, components.audio_revision, load_config)
    text_config = text_config or component_config(components.text, components.text_revision, load_text_config)
    for name, value in (components.audio_settings or {}).items():
        setattr(audio_config, name, value)
    check_adapter_keys(recipe.adapter)
    spelling = None
    if recipe.alignment and recipe.alignment.spelling:
        entries = align_vocab * NGRAMS_PER_TOKEN
        spelling = {"entries": entries, "buckets": recipe.alignment.ngrams, "size": recipe.alignment.spelling}
    with torch.device("meta"):
        head = AutoModelForCausalLM.from_config(text_config).get_output_embeddings()
    return AudioPhiConfig(
        audio_config=audio_config,
        text_config=text_config,
        adapter_config=AudioPhiAdapterConfig(**recipe.adapter),
        audio_token_id=text_config.vocab_size - 1,
        readout=recipe.readout or "frames",
        clip_tokens=recipe.clip_tokens or 0,
        encoder_layer=recipe.encoder_layer,
        align_vocab_size=align_vocab if recipe.alignment else 0,
        align_spelling=spelling,
        base_vocab_size=text_config.vocab_size,
        lm_head_bias=head.bias is not None,
    )


def skeleton(config: AudioPhiConfig) -> AudioPhiForConditionalGeneration:
    """The model without memory for its weights: shapes and names only, in float32 whatever the LLM's config says."""
    with torch.device("meta"):
        return AudioPhiForConditionalGeneration(config).float()
