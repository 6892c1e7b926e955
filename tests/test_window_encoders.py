"""Encoders of a fixed window (LanguageBind, AST, CLAP): tokens follow the real duration, whatever the batch; windows,
rates, layers, and the way from a file to words."""

from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import (
    ASTConfig,
    ASTModel,
    AutoConfig,
    AutoFeatureExtractor,
    ClapAudioModelWithProjection,
    ClapConfig,
)

from audiophi.training.build import build_model, build_processor
from audiophi.training.cache_filling import encoder_name
from audiophi.training.recipe import RecipeError, recipe_from_dict
from modeling_audiophi import ADAPTERS, AudioPhiForConditionalGeneration
from modeling_audiophi.encoders import encoder_class
from modeling_audiophi.lengths_audiophi import output_length
from processing import AudioPhiProcessor
from processing.window_features import window_features, window_lengths
from tests.conftest import prompts, random_like_trained

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ["tiny_languagebind_dir", "tiny_ast_dir", "tiny_clap_dir"]
FUSED = "tiny_fused_clap_dir"
# CLAP is slow even when tiny, and an adapter does not know which encoder it reads.
PAIRS = [(folder, name) for folder in FOLDERS for name in sorted(ADAPTERS)]
PAIRS = [pair for pair in PAIRS if pair[0] != "tiny_clap_dir" or pair[1] in ("linear", "resampler")]
# sampling rate, samples of a window, tokens of it, at the tiny encoders' sizes
WINDOWS = {
    "tiny_languagebind_dir": (16_000, 83 * 160 + 400, 6),
    "tiny_ast_dir": (16_000, 103 * 160 + 400, 9),
    "tiny_clap_dir": (48_000, 480_000, 32),
    "tiny_fused_clap_dir": (48_000, 480_000, 32),
}


@pytest.fixture(params=[*FOLDERS, FUSED])
def family(request):
    """(name of the fixture, its folder)"""
    return request.param, request.getfixturevalue(request.param)


def load(folder, layer="last", **changes):
    config = AutoConfig.from_pretrained(folder)
    for name, value in changes.items():
        setattr(config, name, value)
    encoder = encoder_class(config)(config, layer)
    state, missing = encoder_class(config).read_base(folder)
    assert not missing
    encoder.load_state_dict(state, strict=layer == "last")
    return encoder.eval()


def windows_of(folder, clips):
    """Features (N, window, bins) and mask of clips of at most one window."""
    features = window_features(AutoFeatureExtractor.from_pretrained(folder))
    rows = [features.extract(clip) for clip in clips]
    return torch.stack([row for row, _ in rows]), torch.stack([mask for _, mask in rows])


def noise(samples, seed=0):
    return (0.1 * np.random.default_rng(seed).normal(size=samples)).astype(np.float32)


# ---- encoders


def test_a_clip_does_not_depend_on_its_batch_and_filling_makes_no_token(family):
    name, folder = family
    _, whole, tokens = WINDOWS[name]
    encoder = load(folder)
    features, mask = windows_of(folder, [noise(whole, 1), noise(whole // 3, 2), noise(whole // 2, 3)])
    with torch.no_grad():
        hidden, hidden_mask = encoder(features, mask)
        assert hidden.shape == (3, tokens, encoder.hidden_size(encoder.config))
        counts = hidden_mask.sum(1).tolist()
        assert counts[0] == tokens and 0 < counts[1] < counts[2] < tokens
        for row, count in enumerate(counts):
            alone, alone_mask = encoder(features[row : row + 1], mask[row : row + 1])
            assert alone.shape[1] == count and alone_mask.all()
            assert torch.allclose(alone[0], hidden[row, :count], atol=1e-4)
    assert (hidden[0] - hidden[1, :1]).abs().max() > 1e-2


def test_tokens_are_in_time(family):
    """What happens late in a window changes late tokens most."""
    name, folder = family
    _, whole, tokens = WINDOWS[name]
    clip = noise(whole)
    late = clip.copy()
    late[-whole // 4 :] *= -3
    encoder = load(folder)
    with torch.no_grad():
        hidden, _ = encoder(*windows_of(folder, [clip, late]))
    change = (hidden[0] - hidden[1]).abs().mean(-1)
    assert change[-tokens // 4 :].mean() > 1.5 * change[: tokens // 2].mean()


@pytest.mark.parametrize("pooling, times", [("mean", 1), ("concat", 2)])
def test_frequency_pooling(family, pooling, times):
    """All three tiny encoders have two bands; the mean of the halves of "concat" is "mean"."""
    name, folder = family
    encoder = load(folder, frequency_pooling=pooling)
    features, mask = windows_of(folder, [noise(WINDOWS[name][1])])
    with torch.no_grad():
        hidden, _ = encoder(features, mask)
        mean, _ = load(folder)(features, mask)
    assert hidden.shape[-1] == encoder.hidden_size(encoder.config) == 32 * times
    assert torch.allclose(hidden.unflatten(-1, (times, 32)).mean(2), mean, atol=1e-5)
    with pytest.raises(ValueError, match="frequency_pooling 'max'"):
        load(folder, frequency_pooling="max")


def test_layers(family):
    name, folder = family
    features, mask = windows_of(folder, [noise(WINDOWS[name][1])])
    if "clap" in name:
        with pytest.raises(ValueError, match="encoder_layer 'mix': the stages of CLAP differ"):
            load(folder, "mix")
        return
    layers = load(folder).config.num_hidden_layers
    with torch.no_grad():
        outputs = [load(folder, index)(features, mask)[0] for index in range(layers + 1)]
        last, mix = load(folder)(features, mask)[0], load(folder, "mix")(features, mask)[0]
        if name == "tiny_languagebind_dir":
            assert torch.allclose(last, outputs[-2], atol=1e-6)  # the encoder's own output is the penultimate state
    assert torch.allclose(mix, sum(outputs) / len(outputs), atol=1e-5)
    assert all((a - b).abs().max() > 1e-2 for a, b in zip(outputs, outputs[1:], strict=False))


def test_features_that_are_no_windows_are_refused(family):
    name, folder = family
    encoder = load(folder)
    size = encoder.window_size(encoder.config)
    features, mask = windows_of(folder, [noise(WINDOWS[name][1])])
    with pytest.raises(ValueError, match=f"takes whole windows of {size} frames, got {size - 1} frames"):
        encoder(features[:, 1:], mask[:, 1:])


def test_ast_equals_transformers(tiny_ast_dir):
    """For a short clip as well: the same filling with silence."""
    clip, model = noise(9_000), ASTModel.from_pretrained(tiny_ast_dir).eval()
    inputs = AutoFeatureExtractor.from_pretrained(tiny_ast_dir)(clip, sampling_rate=16_000, return_tensors="pt")
    features, mask = windows_of(tiny_ast_dir, [clip])
    assert torch.equal(features, inputs["input_values"])
    with torch.no_grad():
        expected = model(**inputs).last_hidden_state[:, 2:].reshape(1, 2, 9, 32).mean(1)
        hidden, hidden_mask = load(tiny_ast_dir)(features, mask)
    assert hidden.shape[1] == hidden_mask.sum() == 4  # 54 frames
    assert torch.allclose(hidden, expected[:, :4], atol=1e-5)


@pytest.mark.parametrize("folder, samples", [("tiny_clap_dir", 480_000), ("tiny_clap_dir", 150_001), (FUSED, 150_001)])
def test_clap_equals_transformers(request, folder, samples):
    tiny_clap_dir = request.getfixturevalue(folder)
    model = ClapAudioModelWithProjection.from_pretrained(tiny_clap_dir).eval()
    extractor = AutoFeatureExtractor.from_pretrained(tiny_clap_dir)
    inputs = extractor(noise(samples), sampling_rate=48_000, return_tensors="pt")
    inputs["is_longer"] = torch.tensor([[False]])  # transformers draws one clip of a batch to be "longer"
    features, mask = windows_of(tiny_clap_dir, [noise(samples)])
    with torch.no_grad():
        expected = model.audio_model(**inputs).last_hidden_state.mean(2).transpose(1, 2)
        hidden, hidden_mask = load(tiny_clap_dir)(features, mask)
    count = int(hidden_mask.sum())
    assert count == {480_000: 32, 150_001: 11}[samples]
    assert torch.allclose(hidden, expected[:, :count], atol=1e-4)


def test_released_sizes():
    """Tokens per window and widths at the sizes on the Hub, from configs alone."""
    for config, frames, tokens, size, bands, rate in [
        (AutoConfig.for_model("languagebind_audio"), 1036, 74, 1024, 8, 16_000),
        (ASTConfig(), 1024, 101, 768, 12, 16_000),
        (ClapConfig(), 1000, 32, 768, 2, 48_000),
    ]:
        encoder = encoder_class(config)
        assert encoder.window_frames(config) == frames and getattr(encoder, "sampling_rate", 16_000) == rate
        assert output_length(frames, encoder.length_rule(config)) == tokens
        assert encoder.hidden_size(config) == size
        config.frequency_pooling = "concat"
        assert encoder.hidden_size(config) == size * bands


# ---- windows


@given(samples=st.integers(1, 700_000), window=st.integers(1, 1036))
@settings(max_examples=200, deadline=None)
def test_overlapping_windows_hold_every_frame_once(samples, window):
    """Kaldi frames: those of the windows together are those of the clip (at least one), none twice, none missing."""
    features = window_features(type("ASTFeatureExtractor", (), {"model_input_names": ["x"], "sampling_rate": 16_000})())
    lengths = window_lengths(features, samples, window, features.shortest_window(1))
    frames = [features.num_frames(length) for length in lengths]
    whole = max(1, 1 + (samples - 400) // 160)
    assert sum(frames) == whole and min(frames) >= 1 and max(frames) <= window
    assert len(lengths) == -(-whole // -(-whole // -(-whole // window)))


@pytest.mark.parametrize("folder", FOLDERS)
def test_long_clips_are_windows_joined_in_time(make_tiny_model, request, folder):
    rate, whole, tokens = WINDOWS[folder]
    model, processor = make_tiny_model("linear", align=False, audio=request.getfixturevalue(folder))
    clip = noise(2 * whole + whole // 3)
    encoded = processor.encode_audio((clip, rate))
    key = processor.feature_key
    again = processor.encode_audio((clip, rate))
    assert len(encoded[key]) == 3 and torch.equal(encoded[key], again[key])  # nothing is drawn
    lengths = encoded[f"{key}_mask"].sum(1).tolist()
    assert lengths[0] == lengths[1] and 0 < lengths[2] <= lengths[0]
    second = processor.encode_audio((clip[lengths[0] * rate // 100 :], rate))
    assert len(second[key]) == 2
    real = encoded[f"{key}_mask"][1]
    assert torch.allclose(encoded[key][1][real][2:-2], second[key][0][real][2:-2], atol=2e-3)


# ---- from a file to words


@pytest.mark.parametrize("folder, adapter", PAIRS)
@settings(max_examples=4, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seconds=st.lists(st.floats(0.001, 2.5), min_size=1, max_size=2))
def test_planned_lengths_are_the_models(make_tiny_model, request, folder, adapter, seconds):
    model, processor = cached_model(make_tiny_model, adapter, request.getfixturevalue(folder))
    rate = processor.sampling_rate
    clips = [(noise(max(1, int(length * rate)), 1), rate) for length in seconds]
    batch = processor(text=[processor.audio_token + "x"] * len(clips), audio=clips)
    frames = [processor.frame_counts(len(clip)) for clip, _ in clips]
    planned = [model.config.num_audio_tokens(counts) for counts in frames]
    audio = {name: value for name, value in batch.items() if name not in ("input_ids", "attention_mask")}
    assert audio[f"{processor.feature_key}_mask"].sum(1).tolist() == sum(frames, []) and min(planned) >= 1
    with torch.inference_mode():
        assert len(model.get_audio_features(**audio).pooler_output) == sum(planned)


models = {}


def cached_model(make, adapter, folder):
    if (adapter, folder) not in models:
        models[adapter, folder] = make(adapter, align=False, audio=folder)
    return models[adapter, folder]


@pytest.mark.parametrize("folder", FOLDERS)
def test_from_waveform_to_words(make_tiny_model, request, folder, tmp_path):
    """A batch gives what single clips give; several windows; the checkpoint loads; the processor too."""
    rate, whole, _ = WINDOWS[folder]
    model, processor = make_tiny_model({"type": "linear", "stack": 1}, audio=request.getfixturevalue(folder))
    clips = [[noise(int(seconds * 16_000), seed)] for seed, seconds in enumerate((1.9, 0.5))]
    inputs = prompts(processor, clips)
    with torch.no_grad():
        logits = model(**inputs).logits
        for row, waves in enumerate(clips):
            single = model(**prompts(processor, [waves])).logits[0]
            assert single.std() > 0.1
            assert torch.allclose(logits[row][inputs["attention_mask"][row].bool()], single, atol=2e-4)
    assert model.generate(**inputs, max_new_tokens=3, do_sample=False).shape[0] == 2
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    loaded = AudioPhiForConditionalGeneration.from_pretrained(tmp_path).eval()
    again = prompts(AudioPhiProcessor.from_pretrained(tmp_path), clips)
    with torch.no_grad():
        assert torch.allclose(loaded(**again).logits, logits, atol=1e-5)
    model.save_pretrained(tmp_path / "full", slim=False)
    full = AudioPhiForConditionalGeneration.from_pretrained(tmp_path / "full").eval()
    with torch.no_grad():
        assert torch.allclose(full(**again).logits, logits, atol=1e-5)


@pytest.mark.parametrize("folder", FOLDERS)
@pytest.mark.parametrize("file_rate", [16_000, 44_100, 48_000])
def test_files_of_any_rate_give_the_right_result(make_tiny_model, request, folder, file_rate, tmp_path):
    """The same sound, read from files of different rates, gives the same tokens within resampling's error."""
    model, processor = cached_model(make_tiny_model, "linear", request.getfixturevalue(folder))
    time = np.arange(int(0.8 * file_rate)) / file_rate
    wave = 0.3 * np.sin(2 * np.pi * 300 * time * (1 + time)) + 0.2 * np.sin(2 * np.pi * 1000 * time)
    soundfile.write(tmp_path / "clip.wav", wave, file_rate, subtype="FLOAT")
    reference_rate = processor.sampling_rate
    time = np.arange(int(0.8 * reference_rate)) / reference_rate
    exact = 0.3 * np.sin(2 * np.pi * 300 * time * (1 + time)) + 0.2 * np.sin(2 * np.pi * 1000 * time)
    read, expected = processor.encode_audio(tmp_path / "clip.wav"), processor.encode_audio((exact, reference_rate))
    key = processor.feature_key
    mask = expected[f"{key}_mask"]
    assert torch.equal(read[f"{key}_mask"], mask)
    loud = expected[key][mask] > expected[key][mask].mean()  # below is the noise of resampling
    difference = (read[key][mask] - expected[key][mask])[loud].abs()
    assert difference.median() < 0.05 * expected[key][mask].std()
    wrong = processor.encode_audio((exact, reference_rate * 2))  # a wrong rate would not look like this
    assert wrong[f"{key}_mask"].sum() < mask.sum()


def test_settings_of_an_encoder(tiny_languagebind_dir, tiny_whisper_dir, tiny_llm_dir, make_tiny_model, tmp_path):
    model, _ = make_tiny_model("linear", audio=tiny_languagebind_dir, audio_settings={"frequency_pooling": "concat"})
    assert model.model.multi_modal_projector.stack.norm.normalized_shape == (64,)
    assert encoder_name(model.config.audio_config) == "languagebind_audio concat"
    model.save_pretrained(tmp_path)
    loaded = AudioPhiForConditionalGeneration.from_pretrained(tmp_path)
    assert loaded.config.audio_config.frequency_pooling == "concat"
    build = AudioPhiForConditionalGeneration.from_components
    with pytest.raises(ValueError, match="the languagebind_audio encoder has no setting 'pooling'; it has freq"):
        build(tiny_languagebind_dir, tiny_llm_dir, audio_settings={"pooling": "mean"})
    with pytest.raises(ValueError, match="the whisper encoder has no setting 'frequency_pooling'; it has none"):
        build(tiny_whisper_dir, tiny_llm_dir, audio_settings={"frequency_pooling": "mean"})
    with pytest.raises(ValueError, match="frequency_pooling 'max'"):
        build(tiny_languagebind_dir, tiny_llm_dir, audio_settings={"frequency_pooling": "max"})
    with pytest.raises(ValueError, match="window_frames 100 is more than the encoder's limit of 84"):
        build(tiny_languagebind_dir, tiny_llm_dir, window_frames=100)


def test_recipe_keys(tiny_languagebind_dir, tiny_llm_dir):
    """`components.audio_settings` and `components.chat_template` reach the model and the processor."""
    components = {"audio": tiny_languagebind_dir, "text": tiny_llm_dir, "chat_template": "phi"}
    recipe = {
        "name": "tiny",
        "components": {**components, "audio_settings": {"frequency_pooling": "concat"}},
        "data": {"train": [{"path": "x"}]},
        "adapter": {"type": "mlp2x_gelu", "stack": 1},
        "stages": [{"name": "lm", "loss": "lm", "steps": 1, "batch_size": 1}],
    }
    recipe = recipe_from_dict(recipe)
    processor = build_processor(recipe)
    assert "Instruct: " in processor.chat_template
    model = build_model(recipe, processor, None)
    assert model.config.audio_config.frequency_pooling == "concat" and processor.window_frames == 84
    with pytest.raises(RecipeError, match="components.audio_setings"):
        recipe_from_dict({**recipe.__dict__, "components": {**components, "audio_setings": {}}})


def test_random_tiny_weights_make_different_outputs(family):
    """Else the comparisons above would prove nothing."""
    name, folder = family
    encoder = load(folder)
    features, mask = windows_of(folder, [noise(WINDOWS[name][1], 1), noise(WINDOWS[name][1], 2)])
    with torch.no_grad():
        before, _ = encoder(features, mask)
        after, _ = random_like_trained(encoder)(features, mask)
    assert (before[0] - before[1]).abs().max() > 1e-2 and after.shape == before.shape
