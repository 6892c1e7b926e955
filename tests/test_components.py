"""from_components, slim and full checkpoints, LoRA, resizing, Auto classes."""

import copy
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForMultimodalLM,
    BertConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    T5Config,
    WhisperConfig,
)

from modeling_audiophi import AudioPhiConfig, AudioPhiForConditionalGeneration, components_audiophi, resolve_component
from modeling_audiophi.components_audiophi import component_id
from modeling_audiophi.lora_audiophi import merged_state_dict

LORA = {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj"]}


def same_weights(first, second):
    first, second = first.state_dict(), second.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def shake(model, seed=1):
    """Trained-looking values in everything that is tunable or new."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        own = model.slim_state_dict()
        for name, parameter in model.named_parameters():
            if name in own:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def features(model):
    bins = model.config.audio_config.num_mel_bins
    return {"input_features": torch.randn(2, bins, 80, generator=torch.Generator().manual_seed(5))}


def checkpoint(path):
    return load_file(Path(path) / "model.safetensors"), json.loads((Path(path) / "config.json").read_text())


@pytest.fixture
def text_folder(tmp_path, tiny_llm_dir):
    """Factory: a copy of the tiny LLM's tokenizer with another model."""

    def make(model):
        path = tmp_path / "other-llm"
        shutil.copytree(tiny_llm_dir, path)
        (path / "model.safetensors").unlink()
        (path / "generation_config.json").unlink()
        model.save_pretrained(path)
        return str(path)

    return make


# ---- checkpoints


@pytest.mark.parametrize("parts", [{}, {"text": LORA}, {"text": LORA, "audio": LORA}])
def test_slim_save_load_save_is_stable(make_tiny_model, tmp_path, parts):
    model, _ = make_tiny_model(readout="collapse", encoder_layer="mix", lora=parts)
    shake(model).save_pretrained(tmp_path / "first")
    loaded = AudioPhiForConditionalGeneration.from_pretrained(tmp_path / "first")
    assert same_weights(model, loaded) and not loaded.training
    loaded.save_pretrained(tmp_path / "second")
    first, second = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("first", "second"))
    assert first == second
    assert checkpoint(tmp_path / "first")[1] == checkpoint(tmp_path / "second")[1]
    with torch.no_grad():
        expected = model.get_audio_features(**features(model)).pooler_output
        assert torch.equal(loaded.get_audio_features(**features(model)).pooler_output, expected)


def test_slim_checkpoint_holds_no_base_weight_and_names_the_components(make_tiny_model, tmp_path, tiny_llm_dir):
    model, _ = make_tiny_model(readout="collapse", lora={"text": LORA})
    model.save_pretrained(tmp_path)
    tensors, config = checkpoint(tmp_path)
    own = ("model.multi_modal_projector.", "model.alignment.", "model.readout.")
    assert all(key.startswith(own) or ".lora_" in key for key in tensors)
    assert any(".lora_B." in key for key in tensors)
    assert config["slim"] and config["base_components"]["text"]["id"] == tiny_llm_dir
    model.save_pretrained(tmp_path, slim=False)
    assert not checkpoint(tmp_path)[1]["slim"] and model.config.slim


def test_parts_tuned_in_full_are_kept(make_tiny_model, tmp_path):
    model, _ = make_tiny_model()
    model.tune("text", "full")
    model.tune("text", "frozen")
    shake(model).save_pretrained(tmp_path)
    tensors, config = checkpoint(tmp_path)
    assert config["tuned"] == {"audio": "frozen", "text": "full"}
    assert any(key.startswith("model.language_model.layers") for key in tensors)
    assert not any(key.startswith("model.audio_tower") for key in tensors)
    assert same_weights(model, AutoModel.from_pretrained(tmp_path))


def test_incomplete_slim_checkpoint_names_the_keys(make_tiny_model, tmp_path):
    model, _ = make_tiny_model()
    model.save_pretrained(tmp_path)
    tensors, _ = checkpoint(tmp_path)
    tensors["model.stranger"] = tensors.pop("model.multi_modal_projector.proj_in.weight")
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        ValueError, match=r"missing: \['model.multi_modal_projector.proj_in.weight'\].*'model.stranger'"
    ):
        AutoModel.from_pretrained(tmp_path)


def test_changed_base_component_is_noticed(make_tiny_model, tmp_path, text_folder, tiny_llm_dir):
    """A base with other layers than the checkpoint was trained on does not load silently."""
    config = LlamaConfig.from_pretrained(tiny_llm_dir)
    config.num_hidden_layers = 1
    model, _ = make_tiny_model()
    model.config.base_components["text"]["id"] = text_folder(LlamaForCausalLM(config))
    model.save_pretrained(tmp_path / "checkpoint")
    with pytest.raises(ValueError, match="missing: .*language_model.layers.1"):
        AutoModel.from_pretrained(tmp_path / "checkpoint")


@pytest.mark.parametrize("lora", [{}, {"text": LORA}])
@pytest.mark.parametrize("auto", [AutoModel, AutoModelForMultimodalLM])
def test_full_checkpoint_through_auto_classes(make_tiny_model, tmp_path, auto, lora):
    model, _ = make_tiny_model(readout="collapse", lora=lora)
    shake(model).save_pretrained(tmp_path, slim=False)
    loaded, info = auto.from_pretrained(tmp_path, output_loading_info=True)
    assert type(loaded) is AudioPhiForConditionalGeneration and not loaded.config.slim
    assert same_weights(model, loaded)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert loaded.generation_config.to_dict() == model.generation_config.to_dict()
    assert loaded.lm_head.weight is loaded.get_input_embeddings().weight


def test_slim_checkpoint_loads_in_another_dtype_and_from_a_state_dict(make_tiny_model, tmp_path):
    model, _ = make_tiny_model()
    model.save_pretrained(tmp_path, state_dict=model.state_dict())  # as the Trainer calls it
    assert not any("language_model" in key for key in checkpoint(tmp_path)[0])
    loaded = AutoModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}
    ids = torch.tensor([[20, 21, 22]])
    assert torch.isfinite(loaded(input_ids=ids, labels=ids).loss)


def test_generation_settings_come_with_the_checkpoint(make_tiny_model, tmp_path):
    model, processor = make_tiny_model()
    model.save_pretrained(tmp_path)
    config = AutoModel.from_pretrained(tmp_path).generation_config
    assert config.eos_token_id == processor.tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert config.suppress_tokens == [processor.audio_token_id]


# ---- embedding table


def test_placeholder_beyond_the_table_adds_rows(make_tiny_model, tiny_whisper_dir, tiny_llm_dir, tmp_path):
    torch.manual_seed(0)
    model = AudioPhiForConditionalGeneration.from_components(tiny_whisper_dir, tiny_llm_dir, "mlp")
    rows = AutoConfig.from_pretrained(tiny_llm_dir).vocab_size
    table = model.get_input_embeddings().weight
    assert model.config.audio_token_id == rows and len(table) == rows + 1 == model.config.text_config.vocab_size
    assert torch.allclose(table[-1], table[:-1].mean(0), atol=1e-6)
    with torch.no_grad():
        table[-1] = 0.5
    model.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path)
    assert same_weights(model, loaded) and loaded.get_input_embeddings().weight[-1, 0] == 0.5


@pytest.mark.parametrize("slim", [True, False])
def test_resized_embeddings_survive_a_checkpoint(make_tiny_model, tmp_path, slim):
    model, _ = make_tiny_model()
    rows = model.config.text_config.vocab_size
    model.resize_token_embeddings(rows + 5)
    assert model.lm_head.out_features == rows + 5 and model.lm_head.weight is model.get_input_embeddings().weight
    model.save_pretrained(tmp_path, slim=slim)
    assert same_weights(model, AutoModel.from_pretrained(tmp_path))
    ids = torch.tensor([[rows + 4, 1]])
    assert model(input_ids=ids).logits.shape[-1] == rows + 5


def test_untied_language_model_with_a_biased_head(
    make_tiny_model, tiny_whisper_dir, tiny_llm_dir, text_folder, tmp_path
):
    """Phi-2 has both."""
    vocab = AutoConfig.from_pretrained(tiny_llm_dir).vocab_size
    phi = PhiForCausalLM(
        PhiConfig(vocab_size=vocab, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
    ).eval()
    torch.nn.init.normal_(phi.lm_head.bias)
    model = AudioPhiForConditionalGeneration.from_components(tiny_whisper_dir, text_folder(phi), "linear")
    ids = torch.tensor([[20, 21, 22]])
    with torch.no_grad():
        assert torch.allclose(model(input_ids=ids).logits[..., :vocab], phi(ids).logits, atol=1e-5)
    assert model.lm_head.weight is not model.get_input_embeddings().weight
    model.save_pretrained(tmp_path / "slim")
    assert same_weights(model, AutoModel.from_pretrained(tmp_path / "slim"))


def test_language_model_with_absolute_positions(tiny_whisper_dir, tiny_llm_dir, text_folder, tmp_path):
    """GPT-2: other names for the table and the sizes, and positions that must not count padding."""
    vocab = AutoConfig.from_pretrained(tiny_llm_dir).vocab_size
    gpt = GPT2LMHeadModel(GPT2Config(vocab_size=vocab, n_embd=32, n_layer=2, n_head=4, n_positions=64)).eval()
    model = AudioPhiForConditionalGeneration.from_components(tiny_whisper_dir, text_folder(gpt), "linear").eval()
    audio, text = model.config.audio_token_id, [20, 21, 22]
    row = [*text[:1], audio, *text[1:]]
    inputs = {"input_features": features(model)["input_features"][:1]}
    with torch.no_grad():
        alone = model(input_ids=torch.tensor([row]), **inputs).logits[0]
        for ids, mask, place in [
            ([0, 0, 0, *row], [0, 0, 0, *[1] * len(row)], slice(3, None)),
            ([*row, 0, 0, 0], [*[1] * len(row), 0, 0, 0], slice(0, len(row))),
        ]:
            padded = model(input_ids=torch.tensor([ids]), attention_mask=torch.tensor([mask]), **inputs).logits[0]
            assert torch.allclose(padded[place], alone, atol=1e-4)
    model.save_pretrained(tmp_path / "slim")
    loaded = AutoModel.from_pretrained(tmp_path / "slim")
    assert same_weights(model, loaded) and loaded.lm_head.weight is loaded.get_input_embeddings().weight


# ---- what does not fit is said before weights load


@pytest.fixture
def no_weights(monkeypatch):
    def loaded(*args, **kwargs):
        raise AssertionError("weights were loaded before the check")

    monkeypatch.setattr(components_audiophi, "read_text_weights", loaded)
    monkeypatch.setattr("transformers.PreTrainedModel.from_pretrained", loaded)


def with_file(source, target, name, **changes):
    shutil.copytree(source, target)
    path = Path(target, name)
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return str(target)


def test_what_does_not_fit_is_named(no_weights, tiny_whisper_dir, tiny_llm_dir, tmp_path):
    build = AudioPhiForConditionalGeneration.from_components
    BertConfig().save_pretrained(tmp_path / "bert")
    T5Config().save_pretrained(tmp_path / "t5")
    WhisperConfig().save_pretrained(tmp_path / "bare-whisper")
    slow = with_file(tiny_whisper_dir, tmp_path / "rate", "preprocessor_config.json", sampling_rate=48_000)
    bins = with_file(tiny_whisper_dir, tmp_path / "bins", "preprocessor_config.json", feature_size=80)
    short = with_file(tiny_llm_dir, tmp_path / "short", "config.json", max_position_embeddings=24)
    for arguments, message in [
        ({"audio": str(tmp_path / "bert")}, "unknown audio encoder 'bert'; known: .*whisper"),
        ({"audio": slow}, "wants audio at 48000 Hz"),
        ({"audio": bins}, "makes 80 mel bins, the encoder takes 16"),
        ({"audio": str(tmp_path / "bare-whisper")}, "no preprocessor_config.json"),
        ({"text": str(tmp_path / "t5")}, "t5.*not a causal language model"),
        ({"text": tiny_whisper_dir}, "whisper.*not a causal language model"),
        ({"text": short}, "2.0 s makes 25 audio tokens, but the language model's context is 24"),
        ({"adapter": "mof_mlp"}, "unknown adapter 'mof_mlp'"),
        ({"encoder_layer": 9}, "encoder_layer 9: .* 3 hidden states"),
        ({"readout": "collapse"}, "needs an alignment head"),
        ({"readout": "pooled"}, "readout 'pooled'"),
        ({"align_vocab_ids": [3, 10_000]}, "align_vocab_ids must be token ids below"),
        ({"window_frames": 3000}, "window_frames 3000 is more than the encoder's limit of 200"),
    ]:
        with pytest.raises(ValueError, match=message):
            build(**{"audio": tiny_whisper_dir, "text": tiny_llm_dir, **arguments})


# ---- finding components


def test_components_are_found_by_id_in_the_components_folder(tiny_llm_dir, tmp_path, monkeypatch):
    folder = tmp_path / "some-org--some-llm"
    shutil.copytree(tiny_llm_dir, folder)
    monkeypatch.setenv("AUDIOPHI_COMPONENTS", str(tmp_path))
    assert resolve_component("some-org/some-llm") == str(folder)
    assert component_id(str(folder)) == "some-org/some-llm" and component_id("some-org/some-llm") == "some-org/some-llm"


def test_component_that_is_nowhere_lists_what_was_tried(tmp_path, monkeypatch):
    def hub(*args, **kwargs):
        raise OSError("no connection")

    monkeypatch.setattr(components_audiophi, "snapshot_download", hub)
    monkeypatch.setattr(components_audiophi, "FALLBACKS", [lambda component: None])
    monkeypatch.setenv("AUDIOPHI_COMPONENTS", str(tmp_path))
    with pytest.raises(OSError, match="some-org--nothing.*the Hub .OSError: no connection"):
        resolve_component("some-org/nothing")
    monkeypatch.setattr(components_audiophi, "FALLBACKS", [lambda component: tmp_path])
    assert resolve_component("some-org/nothing") == str(tmp_path)


# ---- LoRA and tuning


def test_lora_starts_without_effect_and_trains_alone(make_tiny_model):
    model, _ = make_tiny_model()
    ids = torch.tensor([[20, 21, 22, 23]])
    with torch.no_grad():
        before = model(input_ids=ids).logits
    model.add_lora("text", LORA)
    model.tune("text", "lora")
    assert torch.allclose(model(input_ids=ids).logits, before, atol=1e-6)
    model(input_ids=ids, labels=ids).loss.backward()
    trained = {name for name, p in model.model.language_model.named_parameters() if p.grad is not None}
    assert trained and all(".lora_" in name for name in trained)
    assert model.config.tuned["text"] == "lora"
    untrained = AudioPhiForConditionalGeneration(copy.deepcopy(model.config)).state_dict()
    assert all(value.abs().max() == 0 for name, value in untrained.items() if ".lora_B." in name)
    assert all(value.abs().max() > 0 for name, value in untrained.items() if ".lora_A." in name)
    with pytest.raises(ValueError, match="already has LoRA"):
        model.add_lora("text", LORA)
    with pytest.raises(ValueError, match="no LoRA layers"):
        model.tune("audio", "lora")
    with pytest.raises(ValueError, match="lora part 'adapter'"):
        model.add_lora("adapter", LORA)
    with pytest.raises(ValueError, match="tune"):
        model.tune("text", "partially")


def test_wider_lora_computes_the_same_and_learns_more(make_tiny_model, tmp_path):
    model, _ = make_tiny_model()
    ids = torch.tensor([[20, 21, 22, 23]])
    model.add_lora("text", LORA)
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model.eval()
    before, plain = model(input_ids=ids).logits, merged_state_dict(model)
    model.widen_lora("text", {"r": 5, "lora_alpha": 20, "lora_dropout": 0.5, "target_modules": LORA["target_modules"]})
    assert torch.allclose(model(input_ids=ids).logits, before, atol=1e-5)
    assert model.config.lora["text"]["r"] == 5
    assert {p.shape[0] for n, p in model.named_parameters() if ".lora_A." in n} == {5}
    assert all(torch.allclose(value, plain[name], atol=1e-5) for name, value in merged_state_dict(model).items())
    model.tune("text", "lora")
    model.train()
    assert not torch.allclose(model(input_ids=ids).logits, model(input_ids=ids).logits)  # its dropout is another now
    model(input_ids=ids, labels=ids).loss.backward()
    grown = [p.grad[:, 2:] for n, p in model.named_parameters() if ".lora_B." in n]
    assert all(gradient.abs().max() > 0 for gradient in grown)
    model.eval()
    model.save_pretrained(tmp_path)
    loaded = AudioPhiForConditionalGeneration.from_pretrained(tmp_path)
    assert torch.allclose(loaded(input_ids=ids).logits, before, atol=1e-5)
    for wrong, says in (({"r": 4}, "rank 5 cannot become"), ({"target_modules": ["k_proj"]}, "another target_modules")):
        with pytest.raises(ValueError, match=says):
            model.widen_lora("text", wrong)
    with pytest.raises(ValueError, match="no LoRA layers"):
        model.widen_lora("audio", {"r": 9})


# ---- config


def test_config_round_trip_and_rule(make_tiny_model, tmp_path):
    model, _ = make_tiny_model(adapter={"type": "mlp", "stack": 3})
    model.config.save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    assert type(config) is AudioPhiConfig and config.to_diff_dict() == model.config.to_diff_dict()
    assert config.audio_length_rule == [[3, 1, 2, 1], [3, 2, 2, 1], [3, 3, 2, 1]]
    assert config.audio_tokens_per_second == pytest.approx(50 / 3, rel=1e-3)
    data = {**config.to_dict(), "audio_length_rule": [[1, 1, 0, 1]]}
    assert AudioPhiConfig(**data).audio_length_rule == config.audio_length_rule
    AudioPhiConfig()
