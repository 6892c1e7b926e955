"""Every family of causal LMs that the README names, tiny and at random: build, train, generate, save, load."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from tests.conftest import prompts, random_like_trained

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES |= {"num_key_value_heads": 2, "max_position_embeddings": 512}
SLIDING = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8, "head_dim": 8}
LINEAR = {"layer_types": ["linear_attention", "full_attention"], "head_dim": 8, "linear_num_key_heads": 2}
LINEAR |= {"linear_num_value_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
MAMBA = {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_d_state": 8}
LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}

# Name -> `model_type` and what its config says beside SIZES; scales that are not 1 wherever a family has them.
FAMILIES = {
    "llama": ("llama", {}),
    "phi": ("phi", {"num_key_value_heads": 4}),
    "phi3": ("phi3", {"pad_token_id": 2}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {"head_dim": 8}),
    "qwen3_5": ("qwen3_5_text", LINEAR),
    "gemma": ("gemma", {"head_dim": 8}),
    "gemma2": ("gemma2", {**SLIDING, "final_logit_softcapping": 2.0}),
    "gemma3": ("gemma3_text", SLIDING),
    "smollm3": ("smollm3", {"pad_token_id": 2, "no_rope_layers": [1, 0]}),
    "lfm2": ("lfm2", {"layer_types": ["conv", "full_attention"]}),
    "granite": ("granite", {"logits_scaling": 3.0, "embedding_multiplier": 5.0, "residual_multiplier": 0.5}),
    "hyperclovax": ("hyperclovax", {"logits_scaling": 0.2, "embedding_multiplier": 5.0}),
    "minicpm3": ("minicpm3", {**LATENT, "scale_emb": 7.0, "num_key_value_heads": 4}),
    "mistral": ("mistral", {"sliding_window": 8}),
    "olmo2": ("olmo2", {}),
    "falcon_h1": ("falcon_h1", {**MAMBA, "head_dim": 8, "lm_head_multiplier": 0.3, "embedding_multiplier": 5.0}),
    "cohere": ("cohere", {"logit_scale": 0.25}),
    "gemma4": ("gemma4_text", {**SLIDING, "global_head_dim": 8, "hidden_size_per_layer_input": 0}),
    "gpt2": ("gpt2", {}),
}


def text_config(model_type, settings, tokenizer):
    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id")}
    return AutoConfig.for_model(model_type, **{**SIZES, "vocab_size": len(tokenizer), **special, **settings})


def save_llm(path, model, tokenizer):
    random_like_trained(model).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def family(tmp_path_factory, make_tiny_model, tiny_llm_dir):
    """Factory: family(name) -> (model, processor, the plain LLM)."""

    def make(name, **kwargs):
        tokenizer = AutoTokenizer.from_pretrained(tiny_llm_dir)
        llm = AutoModelForCausalLM.from_config(text_config(*FAMILIES[name], tokenizer))
        path = save_llm(tmp_path_factory.mktemp(name), llm, tokenizer)
        return *make_tiny_model(text=path, **kwargs), llm.eval()

    return make


@pytest.mark.parametrize("name", ["llama", "gemma", "gemma2", "gemma3", "minicpm3"])
@torch.no_grad()
def test_audio_words_are_as_large_as_words(family, waveform, name):
    """Gemma and MiniCPM3 scale embeddings in the module, so what replaces embeddings has to be scaled, too."""
    model, processor, _ = family(name, readout="mixed", clip_tokens=2)
    model.model.alignment.scale.fill_(1e6)  # sure of one word for each frame
    model.model.alignment.bias[0] -= 1e6
    inputs = {key: value for key, value in prompts(processor, [[waveform(1.0)]]).items() if "input_f" in key}
    audio = model.get_audio_features(**inputs, with_alignment=True)
    embed = model.get_input_embeddings()
    words = embed(torch.tensor(model.read_alignment(**inputs)[0]))
    torch.testing.assert_close(audio.embeds[0][audio.keep[0]], words, rtol=1e-3, atol=1e-3)
    size = embed(torch.arange(400)).square().mean().sqrt()
    clip_tokens = audio.pooler_output[:2].square().mean().sqrt()
    torch.testing.assert_close(clip_tokens, size, rtol=0.1, atol=0)
    frames = family(name, readout="frames")[0].get_audio_features(**inputs).pooler_output
    torch.testing.assert_close(frames.square().mean().sqrt(), size, rtol=0.1, atol=0)
    # A new head is as unsure with them as with any other.
    tokens = torch.randn(1, 50, 32)
    scores = family(name)[0].model.align(tokens, model.model.word_table())[..., 1:]
    torch.testing.assert_close(scores.std(), (tokens @ embed.weight[10:310].T).std(), rtol=0.05, atol=0)
