"""Slim and full checkpoints as users save and load them: merged, in shards, on devices, in other precisions."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel, BitsAndBytesConfig, PreTrainedModel
from transformers.quantizers.quantizers_utils import should_convert_module

from audiophi.publishing.architecture import stored
from modeling_audiophi import AudioPhiForConditionalGeneration, checkpoints_audiophi, packed_weights_audiophi
from modeling_audiophi.components_audiophi import component_revision
from tests.conftest import prompts
from tests.test_components import LORA, features, same_weights, shake

LOADING = [
    {"device_map": {"": "cpu"}},
    {"device_map": "auto"},
    {"low_cpu_mem_usage": True},
    {"dtype": torch.bfloat16, "device_map": "cpu"},
    {"torch_dtype": "bfloat16", "low_cpu_mem_usage": True},
]


def config_of(folder):
    return json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize("slim", [True, False])
def test_loading_arguments(make_tiny_model, tmp_path, slim):
    """Device map, precision and memory as in transformers, for both kinds of checkpoint."""
    model, _ = make_tiny_model(lora={"text": LORA})
    shake(model).save_pretrained(tmp_path, slim=slim)
    for arguments in LOADING:
        loaded = AutoModel.from_pretrained(tmp_path, **arguments)
        half = "bfloat16" in str(arguments)
        expected = model.to(torch.bfloat16) if half else model
        assert {value.dtype for value in loaded.parameters()} == {torch.bfloat16 if half else torch.float32}
        assert same_weights(expected, loaded), arguments
        assert not [name for name, value in loaded.named_parameters() if value.is_meta], arguments


@torch.no_grad()
def test_a_language_model_that_is_not_in_memory_is_heard(make_tiny_model, waveform, tmp_path):
    """Spread over devices: words are scored with, and made of, embeddings that are elsewhere until they are used."""
    model, processor = make_tiny_model(readout="mixed")
    model.save_pretrained(tmp_path / "full", slim=False)
    parts = [f"model.{part}" for part in ("audio_tower", "multi_modal_projector", "alignment", "readout")]
    places = {**dict.fromkeys(parts, "cpu"), "model.language_model": "disk", "lm_head": "disk"}
    loaded = AutoModel.from_pretrained(tmp_path / "full", device_map=places, offload_folder=tmp_path / "offloaded")
    assert loaded.get_input_embeddings().weight.is_meta
    inputs = prompts(processor, [[waveform(0.6)], [waveform(1.4, 1)]])
    decoding = {"max_new_tokens": 3, "do_sample": False, "ctc_weight": 0.5, "lm_prior_weight": 0.2}
    assert torch.equal(loaded.generate(**inputs, **decoding), model.generate(**inputs, **decoding))


@pytest.mark.parametrize("slim", [True, False])
def test_shards_are_safetensors(make_tiny_model, tmp_path, slim):
    model, _ = make_tiny_model(lora={"text": LORA})
    shake(model).save_pretrained(tmp_path, slim=slim, max_shard_size="10KB")
    shards = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert len(shards) > 1 and set(index["weight_map"].values()) == set(shards)
    assert not [path for path in tmp_path.iterdir() if path.suffix in (".bin", ".pt", ".pth")]
    assert same_weights(model, AutoModel.from_pretrained(tmp_path))
    (tmp_path / shards[-1]).unlink()
    with pytest.raises(OSError, match=shards[-1]):
        AutoModel.from_pretrained(tmp_path)


def test_merged_lora(make_tiny_model, tmp_path):
    """The same outputs without LoRA layers; the model itself keeps them, and goes on saving slim ones."""
    model, _ = make_tiny_model(readout="collapse", lora={"text": LORA, "audio": LORA})
    shake(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.save_pretrained(tmp_path / "merged", slim=False, merge_lora=True)
    tensors, config = load_file(tmp_path / "merged" / "model.safetensors"), config_of(tmp_path / "merged")
    assert not [name for name in tensors if ".lora_" in name or ".base_layer." in name]
    assert config["lora"] == {"audio": None, "text": None} and not config["slim"]
    assert model.config.lora["text"] and model.config.slim
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    loaded = AutoModel.from_pretrained(tmp_path / "merged").eval()
    ids = torch.tensor([[20, 21, 22, 23]])
    base, _ = make_tiny_model(readout="collapse")
    with torch.no_grad():
        for call in (lambda m: m(input_ids=ids).logits, lambda m: m.get_audio_features(**features(m)).pooler_output):
            assert torch.allclose(call(loaded), call(model), atol=1e-4)
        assert not torch.allclose(base(input_ids=ids).logits, model(input_ids=ids).logits, atol=1e-2)
    loaded.save_pretrained(tmp_path / "slim", slim=True)  # what was merged is not what the base components hold
    assert same_weights(loaded, AutoModel.from_pretrained(tmp_path / "slim"))


def test_a_slim_checkpoint_in_eight_bits(make_tiny_model, waveform, tmp_path, monkeypatch):
    monkeypatch.setattr(packed_weights_audiophi, "SMALLEST", 64)
    model, processor = make_tiny_model(readout="collapse", lora={"text": LORA})
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05)
    for name in ("whole", "eight"):
        model.save_pretrained(tmp_path / name, slim=True, int8=name == "eight")
    sizes = [(tmp_path / name / "model.safetensors").stat().st_size for name in ("whole", "eight")]
    assert sizes[1] < 0.6 * sizes[0]
    assert stored(tmp_path / "whole").numbers == stored(tmp_path / "eight").numbers
    loaded, given = AudioPhiForConditionalGeneration.from_pretrained(tmp_path / "eight").eval(), model.state_dict()
    assert loaded.state_dict().keys() == given.keys()
    changed = 0
    for name, value in loaded.state_dict().items():
        assert value.dtype == given[name].dtype
        if value.is_floating_point() and value.dim() > 1:
            step = given[name].flatten(1).abs().amax(1) / 127
            error = (value - given[name]).flatten(1).abs()
            assert (error <= step[:, None] * 0.501 + 1e-12).all(), name
            changed += bool(error.any())
        else:
            assert torch.equal(value, given[name]), name
    assert changed > 4
    inputs = prompts(processor, [[waveform(0.7)]])
    assert torch.allclose(loaded(**inputs).logits, model(**inputs).logits, atol=0.05)
    with pytest.raises(ValueError, match="int8 is for slim"):
        model.save_pretrained(tmp_path / "full", slim=False, int8=True)


def test_merging_is_for_full_checkpoints(make_tiny_model, tmp_path):
    model, _ = make_tiny_model(lora={"text": LORA})
    for wrong in ({}, {"slim": False, "state_dict": model.state_dict()}):
        with pytest.raises(ValueError, match="merge_lora.*full checkpoint"):
            model.save_pretrained(tmp_path, merge_lora=True, **wrong)


def test_kind_of_checkpoint_stays(make_tiny_model, tmp_path):
    model, _ = make_tiny_model()
    for slim in (True, False):
        model.save_pretrained(tmp_path / "first", slim=slim)
        AudioPhiForConditionalGeneration.from_pretrained(tmp_path / "first").save_pretrained(tmp_path / "second")
        assert config_of(tmp_path / "second")["slim"] is slim


def test_push_takes_the_arguments_of_saving(make_tiny_model, tmp_path, monkeypatch):
    model, _ = make_tiny_model(lora={"text": LORA})
    monkeypatch.setattr(PreTrainedModel, "push_to_hub", lambda self, repo_id: self.save_pretrained(tmp_path / repo_id))
    with pytest.raises(ValueError, match="nobody else has .*tiny-llm"):
        model.push_to_hub("slim")
    model.push_to_hub("merged", slim=False, merge_lora=True)
    assert config_of(tmp_path / "merged")["lora"]["text"] is None
    model.save_pretrained(tmp_path / "after")
    assert config_of(tmp_path / "after")["slim"]


def test_commit_of_a_component(tmp_path):
    snapshot = tmp_path / "models--a--b" / "snapshots" / ("5" * 40)
    snapshot.mkdir(parents=True)
    assert component_revision(snapshot) == "5" * 40 and component_revision(tmp_path) is None
    (tmp_path / "component.json").write_text('{"id": "a/b", "revision": "abc"}')
    assert component_revision(str(tmp_path)) == "abc"


# ---- quantization


@pytest.mark.parametrize("settings", [BitsAndBytesConfig(load_in_4bit=True), {"load_in_8bit": True}])
@pytest.mark.parametrize("slim", [True, False])
def test_missing_bitsandbytes_is_named_before_anything_is_loaded(
    make_tiny_model, tmp_path, monkeypatch, slim, settings
):
    model, _ = make_tiny_model()
    model.save_pretrained(tmp_path, slim=slim)
    (tmp_path / "model.safetensors").unlink()
    monkeypatch.setattr(checkpoints_audiophi, "is_bitsandbytes_available", lambda: False)
    with pytest.raises(ImportError, match="pip install bitsandbytes"):
        AudioPhiForConditionalGeneration.from_pretrained(tmp_path, quantization_config=settings)


def test_only_the_language_model_is_quantized(make_tiny_model, monkeypatch):
    monkeypatch.setattr(checkpoints_audiophi, "is_bitsandbytes_available", lambda: True)
    model, _ = make_tiny_model(lora={"text": LORA})
    given = BitsAndBytesConfig(load_in_4bit=True)
    skipped = checkpoints_audiophi.of_language_model(given).llm_int8_skip_modules
    assert given.llm_int8_skip_modules is None
    linear = [name for name, module in model.named_modules() if type(module) is torch.nn.Linear]
    converted = {name for name in linear if should_convert_module(name, skipped)}
    prefix = "model.language_model.layers."
    assert converted == {name for name in linear if name.startswith(prefix) and ".lora_" not in name}
    own = BitsAndBytesConfig(load_in_4bit=True, llm_int8_skip_modules=["lm_head"])
    assert checkpoints_audiophi.of_language_model(own).llm_int8_skip_modules == ["lm_head"]
