"""Encoders: batch and padding invariance, lengths, layers, and Whisper against transformers' own class."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, Data2VecAudioConfig, UniSpeechSatConfig, Wav2Vec2Config, WhisperModel

from modeling_audiophi.encoders import ENCODERS, encoder_class
from modeling_audiophi.lengths_audiophi import length_mask, output_length, shortest_input
from tests.conftest import WAVEFORM_SIZES, random_like_trained

TOLERANCE = 1e-4  # of the largest output, float32


def build(config, layer="last"):
    torch.manual_seed(0)
    whole = random_like_trained(encoder_class(config)(config))
    if layer == "last":
        return whole.eval()
    encoder = encoder_class(config)(config, layer)
    encoder.load_state_dict(whole.state_dict(), strict=False)
    return encoder.eval()


def random_batch(encoder, lengths, seed=0):
    """Features of the encoder's kind with garbage where the mask is False."""
    generator = torch.Generator().manual_seed(seed)
    config, size = encoder.config, max(lengths)
    if encoder.feature_key == "input_values":
        shape = (len(lengths), size)
    elif encoder.time_axis == 2:
        shape = (len(lengths), config.num_mel_bins, size)
    else:
        shape = (len(lengths), size, config.feature_projection_input_dim)
    mask = length_mask(torch.tensor(lengths), size)
    return torch.randn(shape, generator=generator), mask


CONFIGS = {
    "wav2vec2_group_norm": Wav2Vec2Config(feat_extract_norm="group", **WAVEFORM_SIZES),
    "wav2vec2_layer_norm": Wav2Vec2Config(feat_extract_norm="layer", do_stable_layer_norm=True, **WAVEFORM_SIZES),
    "wav2vec2_adapter": Wav2Vec2Config(
        feat_extract_norm="layer", add_adapter=True, num_adapter_layers=2, output_hidden_size=24, **WAVEFORM_SIZES
    ),
    "unispeech_sat": UniSpeechSatConfig(feat_extract_norm="layer", **WAVEFORM_SIZES),
    "data2vec": Data2VecAudioConfig(conv_pos_kernel_size=5, **WAVEFORM_SIZES),
}
FOLDERS = ["tiny_whisper_dir", "tiny_hubert_dir", "tiny_wavlm_dir", "tiny_w2v_bert_dir"]


@pytest.fixture(params=[*CONFIGS, *FOLDERS])
def audio_config(request):
    if request.param in CONFIGS:
        return CONFIGS[request.param]
    return AutoConfig.from_pretrained(request.getfixturevalue(request.param))


def clip_lengths(encoder):
    """Three lengths in feature frames, odd ones too, about 0.4 to 1.3 s."""
    rate = encoder.feature_rate(encoder.config)
    return [int(rate * 1.3) + 1, int(rate * 0.4), int(rate * 0.87)]


def test_a_clip_does_not_depend_on_its_batch(audio_config):
    encoder = build(audio_config)
    lengths = clip_lengths(encoder)
    features, mask = random_batch(encoder, lengths)
    with torch.no_grad():
        hidden, hidden_mask = encoder(features, mask)
        for row, length in enumerate(lengths):
            alone = features[row : row + 1].narrow(encoder.time_axis, 0, length)
            expected, expected_mask = encoder(alone, torch.ones(1, length, dtype=torch.bool))
            count = int(expected_mask.sum())
            assert count == int(hidden_mask[row].sum()) == output_length(length, encoder.length_rule(audio_config))
            difference = (hidden[row, :count] - expected[0, :count]).abs().max()
            assert difference < TOLERANCE * expected.abs().max()
            assert hidden.shape[-1] == encoder.hidden_size(audio_config)


def test_layers(audio_config):
    """By index a layer is what transformers reports as that hidden state; "last" is the encoder's own output."""
    if getattr(audio_config, "add_adapter", False):
        with pytest.raises(ValueError, match="must be 'last'"):
            build(audio_config, "mix")
        return
    features, mask = random_batch(build(audio_config), clip_lengths(build(audio_config))[1:2])
    with torch.no_grad():
        outputs = {layer: build(audio_config, layer)(features, mask)[0] for layer in ("last", 0, 1, -1)}
        encoder = build(audio_config)
        if audio_config.model_type == "whisper":
            expected = (outputs[0], outputs[1], outputs["last"])
        else:
            expected = encoder.model(**{encoder.feature_key: features}, output_hidden_states=True).hidden_states
    for layer in (0, 1, -1):
        assert torch.allclose(outputs[layer], expected[layer], atol=1e-5)
    assert not torch.allclose(outputs[0], outputs[1], atol=1e-2)
    blocks = build(audio_config, 1).state_dict()
    assert any("encoder.layers.0." in name for name in blocks)
    assert not any("encoder.layers.1." in name for name in blocks)
    with pytest.raises(ValueError, match="encoder_layer 7"):
        build(audio_config, 7)


def test_mix_is_the_mean_of_all_states_at_first_and_learns(tiny_whisper_dir):
    config = AutoConfig.from_pretrained(tiny_whisper_dir)
    encoder = build(config, "mix")
    encoder.layer_choice.layer_weights.data.zero_()
    features, mask = random_batch(encoder, [60])
    mixed = encoder(features, mask)[0]
    states = [build(config, layer)(features, mask)[0] for layer in range(3)]
    assert torch.allclose(mixed, sum(states) / 3, atol=1e-5)
    mixed.square().sum().backward()
    assert encoder.layer_choice.layer_weights.grad.abs().max() > 0


def test_whisper_equals_transformers_on_a_full_window(tiny_whisper_dir):
    model = WhisperModel.from_pretrained(tiny_whisper_dir).eval()
    config = model.config
    encoder = encoder_class(config)(config).eval()
    state, missing = encoder.read_base(tiny_whisper_dir)
    encoder.load_state_dict(state)
    features = torch.randn(2, config.num_mel_bins, 200)
    with torch.no_grad():
        hidden, mask = encoder(features, torch.ones(2, 200, dtype=torch.bool))
        expected = model.encoder(features).last_hidden_state
    assert mask.all() and not missing
    assert torch.allclose(hidden, expected, atol=1e-4)


def test_whisper_refuses_more_than_its_window(tiny_whisper_dir):
    encoder = build(AutoConfig.from_pretrained(tiny_whisper_dir))
    with pytest.raises(ValueError, match="200 mel frames, got 202"):
        encoder(torch.zeros(1, 16, 202), torch.ones(1, 202, dtype=torch.bool))


def test_too_short_audio_makes_no_token(audio_config):
    encoder = build(audio_config)
    rule = encoder.length_rule(audio_config)
    if shortest_input(rule) == 1:
        pytest.skip("one frame is enough for this encoder")
    features, mask = random_batch(encoder, [shortest_input(rule) - 1])
    assert encoder(features, mask)[1].sum() == 0


def test_unknown_encoder_is_named():
    with pytest.raises(ValueError, match="unknown audio encoder 'clip'; known: .*whisper"):
        encoder_class(AutoConfig.for_model("clip"))


@given(length=st.integers(0, 4000), name=st.sampled_from(sorted(CONFIGS)))
@settings(max_examples=200, deadline=None)
def test_shortest_input_is_the_first_length_with_a_token(length, name):
    rule = ENCODERS[CONFIGS[name].model_type].length_rule(CONFIGS[name])
    assert (output_length(length, rule) > 0) == (length >= shortest_input(rule))
    assert output_length(torch.tensor([length]), rule).item() == output_length(length, rule)
