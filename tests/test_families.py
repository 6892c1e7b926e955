"""Every family of causal LMs that the README names, tiny and at random: build, train, generate, save, load."""

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForMultimodalLM, AutoTokenizer

from modeling_audiophi import AudioPhiForConditionalGeneration
from tests.conftest import prompts, random_like_trained

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES |= {"num_key_value_heads": 2, "max_position_embeddings": 512}
SLIDING = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8, "head_dim": 8}
LINEAR = {"layer_types": ["linear_attention", "full_attention"], "head_dim": 8, "linear_num_key_heads": 2}
LINEAR |= {"linear_num_value_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
MAMBA = {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_d_state": 8}
LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}
EYES = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}

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
        return *make_tiny_model(text=path, seed=1, **kwargs), llm.eval()  # another than of the weights

    return make


def step(model, **inputs):
    loss = model(**inputs).loss
    loss.backward()
    gradients = [p.grad for p in model.model.multi_modal_projector.parameters() if p.grad is not None]
    assert torch.isfinite(loss) and any(gradient.abs().max() > 0 for gradient in gradients)
    torch.optim.SGD(model.model.multi_modal_projector.parameters(), 0.1).step()
    model.zero_grad()


@pytest.mark.parametrize("name", FAMILIES)
def test_family(family, waveform, tmp_path, name):
    model, processor, llm = family(name, readout="mixed")
    ids = torch.tensor([[20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30]])
    with torch.no_grad():
        rows = llm.config.vocab_size
        assert torch.allclose(model(input_ids=ids).logits[..., :rows], llm(ids).logits, atol=1e-5)

    model.train()
    model.tune("text", "frozen")
    batch = prompts(processor, [[waveform(0.6)], [waveform(1.4, 1)]])
    words = torch.tensor([[20, 21], [22, -100]])
    audio = {key: batch[key] for key in batch if key.startswith(("input_features", "audio"))}
    step(model, **audio, align_labels=words)
    step(model, **batch, labels=batch["input_ids"])
    model.eval()

    decoding = {"max_new_tokens": 4, "ctc_weight": 0.5, "lm_prior_weight": 0.2, "do_sample": False}
    for more in ({"draft_tokens": 4}, {"num_beams": 2}):
        both = model.generate(**batch, **decoding, **more)
        for row, wave in enumerate([waveform(0.6), waveform(1.4, 1)]):
            alone = prompts(processor, [[wave]])
            written = model.generate(**alone, **decoding, **more)[0, alone["input_ids"].shape[1] :]
            assert both[row, batch["input_ids"].shape[1] :].tolist()[: len(written)] == written.tolist(), more

    model.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.allclose(loaded(**batch).logits, model(**batch).logits, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "gemma", "gemma2", "gemma3", "minicpm3", "falcon_h1"])
@torch.no_grad()
def test_audio_words_are_as_large_as_words(family, waveform, name):
    """Gemma and MiniCPM3 scale embeddings in the module, Falcon-H1 behind it: what replaces them has to be scaled."""
    model, processor, _ = family(name, readout="mixed", clip_tokens=2)
    model.model.alignment.scale.fill_(1e6)  # sure of one word for each frame
    model.model.alignment.bias[0] -= 1e6
    inputs = {key: value for key, value in prompts(processor, [[waveform(1.0)]]).items() if "input_f" in key}
    audio = model.get_audio_features(**inputs, with_alignment=True)
    embed = model.model.embed
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
    torch.testing.assert_close(
        scores.std(), (tokens @ model.get_input_embeddings().weight[10:310].T).std(), rtol=0.05, atol=0
    )


WRAPPED = {
    "gemma3": ("gemma3", "gemma3_text", SLIDING, {"vision_config": {**EYES, "image_size": 28, "patch_size": 14}}),
    "qwen3_5": ("qwen3_5", "qwen3_5_text", LINEAR, {"vision_config": {"depth": 1, "hidden_size": 32, "num_heads": 2}}),
}


@pytest.mark.parametrize("name", WRAPPED)
@torch.no_grad()
def test_language_model_inside_a_model_that_sees(make_tiny_model, tiny_llm_dir, tmp_path, name):
    tokenizer = AutoTokenizer.from_pretrained(tiny_llm_dir)
    whole, text, settings, more = WRAPPED[name]
    inner = text_config(text, settings, tokenizer).to_dict()
    config = AutoConfig.for_model(whole, text_config=inner, tie_word_embeddings=True, **more)
    sees = AutoModelForMultimodalLM.from_config(config).eval()
    path = save_llm(tmp_path / "sees", sees, tokenizer)
    model, _ = make_tiny_model(text=path)
    assert model.config.text_config.model_type == text
    ids = torch.tensor([[20, 21, 22, 23]])
    logits = model(input_ids=ids).logits
    assert torch.allclose(logits[..., : len(tokenizer)], sees(input_ids=ids).logits, atol=1e-5)
    model.save_pretrained(tmp_path / "slim")
    assert torch.equal(AutoModel.from_pretrained(tmp_path / "slim")(input_ids=ids).logits, logits)


@pytest.mark.parametrize("kind", ["gemma3n_text", "gemma3n", "gemma4_text"])
def test_per_layer_embeddings_are_refused_before_loading(tiny_whisper_dir, tmp_path, kind):
    AutoConfig.for_model(kind).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"{kind}.* has per-layer embeddings"):
        AudioPhiForConditionalGeneration.from_components(tiny_whisper_dir, str(tmp_path))
