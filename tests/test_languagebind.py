"""LanguageBind-Audio: parity with upstream's own modules (frozen tensors), the converter, the spectrograms."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoFeatureExtractor, AutoModel

import make_languagebind_reference as reference_maker
from audiophi.components import convert_languagebind_audio as converter
from modeling_audiophi import LanguageBindAudioConfig, LanguageBindAudioModel, components_audiophi, resolve_component
from processing.feature_extraction_languagebind_audio import LanguageBindAudioFeatureExtractor

REFERENCE = reference_maker.REFERENCE


@pytest.fixture(scope="module")
def reference():
    return load_file(REFERENCE)


@pytest.fixture(scope="module")
def released_weights(reference):
    """A checkpoint's tensors as upstream names them, text tower and all."""
    return {key.removeprefix("weights."): value for key, value in reference.items() if key.startswith("weights.")}


@pytest.fixture
def released(tmp_path, released_weights, monkeypatch):
    """Factory: a folder like the Hub's, from settings of vision_config and tensors to change (None: left out)."""
    monkeypatch.setenv("AUDIOPHI_COMPONENTS", str(tmp_path / "components"))

    def make(vision=None, tensors=None, name="LanguageBind_Audio_FT"):
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        settings = {**reference_maker.SIZES, **reference_maker.NORMALISATION, "image_size": 224, **(vision or {})}
        config = {"model_type": "LanguageBindAudio", "vision_config": settings, "projection_dim": 768}
        (folder / "config.json").write_text(json.dumps(config))
        weights = {key: value for key, value in {**released_weights, **(tensors or {})}.items() if value is not None}
        torch.save(weights, folder / "pytorch_model.bin")
        return str(folder)

    return make


def leftovers(folder):
    return [path.name for path in Path(folder).glob("*") if path.name.startswith(".partial")]


# ---- parity


def test_hidden_states_equal_upstreams(reference, released):
    folder = resolve_component(released())
    model = AutoModel.from_pretrained(folder).eval()
    assert type(model) is LanguageBindAudioModel
    with torch.no_grad():
        output = model(reference["features"], output_hidden_states=True)
        alone = model(reference["features"]).last_hidden_state
    assert len(output.hidden_states) == 4
    for index, state in enumerate(output.hidden_states):
        assert (state - reference[f"states.{index}"]).abs().max() < 1e-5 * reference[f"states.{index}"].abs().max()
    patches = reference["states.2"][:, 1:].reshape(2, 2, 6, 32)
    assert torch.allclose(alone, patches.mean(1), atol=1e-5)
    assert torch.equal(alone, output.last_hidden_state)
    model.config.frequency_pooling = "concat"
    with torch.no_grad():
        concat = model(reference["features"]).last_hidden_state
    assert torch.allclose(concat, torch.cat([patches[:, 0], patches[:, 1]], -1), atol=1e-5)


@pytest.mark.parametrize("name, samples", [("short", reference_maker.SHORT), ("whole", reference_maker.WHOLE)])
def test_spectrograms_equal_upstreams(reference, name, samples):
    waveform = (reference["waveform"].float() / 128).numpy()[:samples]
    output = LanguageBindAudioFeatureExtractor()(waveform, sampling_rate=16_000)
    assert output["input_features"].shape == (1, 1036, 112)
    found = output["input_features"].flatten()[:: reference_maker.SAMPLED]
    assert (found - reference[f"spectrogram.{name}"]).abs().max() < 3e-4  # CPUs' transforms differ by up to 1e-4
    assert output["attention_mask"].sum() == {"short": 1 + (samples - 400) // 160, "whole": 1036}[name]


@pytest.mark.slow
def test_reference_can_be_made_again(reference, tmp_path):
    """Installs upstream's wheel in a folder of its own; skipped where PyPI does not give it."""
    try:
        reference_maker.install(tmp_path / "environment")
    except RuntimeError as error:
        pytest.skip(str(error))
    arguments = ["--environment", str(tmp_path / "environment"), "--output", str(tmp_path / "again.safetensors")]
    assert reference_maker.main(arguments) == 0
    again = load_file(tmp_path / "again.safetensors")
    assert again.keys() == reference.keys()
    for key, value in reference.items():
        assert torch.allclose(again[key].float(), value.float(), atol=1e-5), key


# ---- the released size, on the meta device


def test_parameters_and_names_of_the_released_encoder():
    with torch.device("meta"):
        state = LanguageBindAudioModel(LanguageBindAudioConfig()).state_dict()
    assert len(state) == 391 and sum(value.numel() for value in state.values()) == 303_523_840
    assert state["embeddings.position_embedding.weight"].shape == (593, 1024)
    assert state["embeddings.patch_embedding.weight"].shape == (1024, 3, 14, 14)
    blocks = [
        *(f"self_attn.{name}_proj" for name in ("k", "v", "q", "out")),
        *("layer_norm1", "layer_norm2", "mlp.fc1", "mlp.fc2"),
    ]
    modules = [f"encoder.layers.{layer}.{block}" for layer in range(24) for block in blocks]
    expected = {
        f"{name}.{kind}" for name in [*modules, "pre_layrnorm", "post_layernorm"] for kind in ("weight", "bias")
    }
    embeddings = ("class_embedding", "patch_embedding.weight", "position_embedding.weight")
    assert state.keys() == expected | {f"embeddings.{name}" for name in embeddings}


def test_every_name_of_the_released_checkpoint_is_mapped():
    """Meta tensors under upstream's names, with what it holds beside the encoder."""
    config = LanguageBindAudioConfig()
    with torch.device("meta"):
        state = LanguageBindAudioModel(config).state_dict()
        others = ("text_model.final_layer_norm.weight", "text_projection.weight", "visual_projection.weight")
        extra = {key: torch.zeros(1) for key in [*others, "logit_scale", "vision_model.embeddings.position_ids"]}
    released = {f"vision_model.{key}": value for key, value in state.items()} | extra
    assert converter.vision_weights(released, config, "x").keys() == state.keys()


def test_a_window_is_74_tokens(reference):
    config = LanguageBindAudioConfig()
    assert config.grid == (8, 74)
    assert AutoConfig.for_model("languagebind_audio").to_dict() == config.to_dict()
    with pytest.raises(ValueError, match="frequency_pooling 'max': expected one of mean, concat"):
        LanguageBindAudioConfig(frequency_pooling="max")
    with pytest.raises(ValueError, match="num_mel_bins 13 is less than one patch"):
        LanguageBindAudioConfig(num_mel_bins=13)


def test_model_refuses_what_is_not_a_window(tiny_languagebind_dir):
    model = AutoModel.from_pretrained(tiny_languagebind_dir)
    with pytest.raises(ValueError, match=r"windows of 84 frames x 28 mel bins, got \(83, 28\)"):
        model(torch.zeros(1, 83, 28))


def test_gradient_checkpointing_and_bfloat16(tiny_languagebind_dir):
    model = AutoModel.from_pretrained(tiny_languagebind_dir).train()
    features = torch.randn(1, 84, 28)
    model(features).last_hidden_state.square().sum().backward()
    expected = model.embeddings.class_embedding.grad.clone()
    model.zero_grad()
    model.gradient_checkpointing_enable()
    model(features).last_hidden_state.square().sum().backward()
    assert expected.abs().max() > 0 and torch.allclose(model.embeddings.class_embedding.grad, expected, atol=1e-4)
    half = AutoModel.from_pretrained(tiny_languagebind_dir, dtype=torch.bfloat16)
    with torch.no_grad():
        output = half(features).last_hidden_state
    assert output.dtype == torch.bfloat16 and torch.isfinite(output).all()


# ---- converter


def test_conversion_happens_once_and_leaves_the_source_alone(released, tmp_path, released_weights):
    source = released()
    before = sorted(path.name for path in Path(source).iterdir())
    folder = resolve_component(source)
    assert Path(folder).parent == tmp_path / "components" and not leftovers(tmp_path / "components")
    assert sorted(path.name for path in Path(source).iterdir()) == before
    stamp = Path(folder, "model.safetensors").stat().st_mtime_ns
    assert resolve_component(source) == folder and resolve_component(folder) == folder
    assert Path(folder, "model.safetensors").stat().st_mtime_ns == stamp
    tensors = load_file(Path(folder, "model.safetensors"))
    assert all(torch.equal(value, released_weights[f"vision_model.{key}"]) for key, value in tensors.items())
    config, extractor = AutoConfig.from_pretrained(folder), AutoFeatureExtractor.from_pretrained(folder)
    assert (config.num_mel_bins, config.target_length, config.num_hidden_layers) == (28, 84, 3)
    assert type(extractor) is LanguageBindAudioFeatureExtractor
    assert (extractor.feature_size, extractor.target_length, extractor.mean) == (28, 84, -4.2677393)


def test_a_changed_checkpoint_is_converted_again(released):
    first = resolve_component(released())
    second = resolve_component(released(tensors={"vision_model.pre_layrnorm.bias": torch.full((32,), 3.0)}))
    assert second != first
    assert (load_file(Path(second, "model.safetensors"))["pre_layrnorm.bias"] == 3).all()


def test_safetensors_and_shards_are_read_too(released, released_weights):
    source = Path(released())
    expected = load_file(Path(resolve_component(str(source)), "model.safetensors"))
    (source / "pytorch_model.bin").unlink()
    keys = sorted(released_weights)
    for part, names in enumerate((keys[:40], keys[40:])):
        torch.save({key: released_weights[key] for key in names}, source / f"pytorch_model-{part}.bin")
    sharded = load_file(Path(resolve_component(str(source)), "model.safetensors"))
    save_file(released_weights, source / "model.safetensors")
    safe = load_file(Path(resolve_component(str(source)), "model.safetensors"))
    for found in (sharded, safe):
        assert found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in expected)


@pytest.mark.parametrize("with_bin", [True, False])
def test_hub_id_downloads_the_weights_that_there_are(released, tmp_path, monkeypatch, with_bin):
    source, asked = released(), []

    def download(component, revision=None, allow_patterns=None):
        asked.append(allow_patterns)
        folder = tmp_path / "snapshot"
        folder.mkdir(exist_ok=True)
        shutil.copy(Path(source, "config.json"), folder)
        if with_bin and any("bin" in pattern for pattern in allow_patterns):
            shutil.copy(Path(source, "pytorch_model.bin"), folder)
        return str(folder)

    monkeypatch.setattr(components_audiophi, "snapshot_download", download)
    monkeypatch.setattr(converter, "snapshot_download", download)
    if not with_bin:
        with pytest.raises(OSError, match="LanguageBind/LanguageBind_Audio_FT: the Hub has no model"):
            resolve_component("LanguageBind/LanguageBind_Audio_FT")
        return
    folder = resolve_component("LanguageBind/LanguageBind_Audio_FT", weights=False)
    assert Path(folder) == tmp_path / "components" / "LanguageBind--LanguageBind_Audio_FT"
    count = len(asked)
    assert resolve_component("LanguageBind/LanguageBind_Audio_FT") == folder and len(asked) == count
    pinned = converter.converted_component(str(tmp_path / "snapshot"), "LanguageBind/LanguageBind_Audio_FT", "abc")
    assert Path(pinned).name == "LanguageBind--LanguageBind_Audio_FT--abc"


def test_a_copy_of_the_hub_folder_among_the_components_is_converted(released, tmp_path):
    place = tmp_path / "components" / "LanguageBind--LanguageBind_Audio_FT"
    shutil.copytree(released(), place)
    folder = resolve_component("LanguageBind/LanguageBind_Audio_FT")
    assert folder != str(place) and AutoConfig.from_pretrained(folder).model_type == "languagebind_audio"
    assert resolve_component("LanguageBind/LanguageBind_Audio_FT") == folder


def test_bad_checkpoints_are_named_and_leave_nothing_behind(released, released_weights, tmp_path):
    norm, key = "vision_model.pre_layrnorm.weight", "vision_model.encoder.layers.1.mlp.fc1.weight"
    lora = {"vision_model.encoder.layers.0.self_attn.q_proj.lora_A.default.weight": torch.zeros(2, 32)}
    for vision, tensors, message in [
        (
            {"lora_r": 16, "num_mel_bins": 126},
            {},
            r"with LoRA layers \(lora_r 16, 126 mel bins\).*LanguageBind_Audio_FT",
        ),
        ({"num_mel_bins": 126}, {}, "with LoRA layers"),
        ({}, lora, "with LoRA layers"),
        ({}, {norm: None}, f"missing: {norm}; unexpected: none; other shapes: none"),
        ({}, {"vision_model.stranger": torch.zeros(1)}, "missing: none; unexpected: vision_model.stranger;"),
        ({}, {"stranger": torch.zeros(1)}, "unexpected: stranger"),
        ({}, {key: torch.zeros(3, 3)}, rf"other shapes: {key} \(3, 3\) instead of \(64, 32\)"),
        ({"num_hidden_layers": 4}, {}, "missing: vision_model.encoder.layers.3.layer_norm1.bias, "),
    ]:
        with pytest.raises(ValueError, match=message):
            resolve_component(released(vision, tensors))
    source = Path(released())
    data = (source / "pytorch_model.bin").read_bytes()
    (source / "pytorch_model.bin").write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match=r"pytorch_model.bin: damaged or truncated checkpoint \(.*download it again"):
        resolve_component(str(source))
    (source / "pytorch_model.bin").unlink()
    save_file(released_weights, source / "model.safetensors")
    data = (source / "model.safetensors").read_bytes()
    (source / "model.safetensors").write_bytes(data[:-1000])
    with pytest.raises(ValueError, match="model.safetensors: damaged or truncated"):
        resolve_component(str(source))
    (source / "model.safetensors").unlink()
    with pytest.raises(OSError, match="no weights there"):
        resolve_component(str(source))
    assert not (tmp_path / "components").exists() or not list((tmp_path / "components").iterdir())


def test_pickled_code_in_a_checkpoint_is_not_run(released, tmp_path):
    class Evil:
        def __reduce__(self):
            return Path.touch, (tmp_path / "ran",)

    source = released()
    torch.save({"vision_model.x": Evil()}, Path(source, "pytorch_model.bin"))
    with pytest.raises(ValueError, match="damaged or truncated checkpoint"):
        resolve_component(source)
    assert not (tmp_path / "ran").exists()


# ---- spectrograms


@given(samples=st.integers(400, 60_000))
@settings(max_examples=30, deadline=None)
def test_windows_of_a_clip_are_its_frames_in_order(samples):
    """Never a random crop: the real frames of all windows, joined, are the clip's own spectrogram, the rest repeats."""
    extractor = LanguageBindAudioFeatureExtractor(feature_size=28, target_length=84)
    clip = 0.1 * np.random.default_rng(samples).normal(size=samples).astype(np.float32)
    output = extractor(clip, sampling_rate=16_000)
    features, mask = output["input_features"], output["attention_mask"].bool()
    whole = (extractor.filterbanks(clip) - extractor.mean) / (2 * extractor.std)
    assert torch.equal(features[mask], whole)
    assert output["num_windows"].tolist() == [len(features)] == [-(-len(whole) // 84)]
    assert mask.sum(1).max() - mask.sum(1).min() < len(features)  # windows of equal length, not full ones and a rest
    for window, real in zip(features, mask.sum(1).tolist(), strict=True):
        assert torch.equal(window, window[:real].repeat(84 // real + 1, 1)[:84])


def test_extractor_refuses_what_it_cannot_use(tiny_languagebind_dir):
    extractor = AutoFeatureExtractor.from_pretrained(tiny_languagebind_dir)
    with pytest.raises(ValueError, match="takes audio at 16000 Hz, got 48000 Hz: resample"):
        extractor(np.zeros(1000, np.float32), sampling_rate=48_000)
    with pytest.raises(ValueError, match=r"at least 400 samples \(25 ms\), got an array of shape \(399,\)"):
        extractor(np.zeros(399, np.float32), sampling_rate=16_000)
    with pytest.raises(ValueError, match="mono"):
        extractor(np.zeros((2, 1000), np.float32)[None], sampling_rate=16_000)
    batch = extractor([np.zeros(1000, np.float32), np.ones(40_000, np.float32)], sampling_rate=16_000)
    assert batch["num_windows"].tolist() == [1, 3] and batch["input_features"].shape == (4, 84, 28)
