"""What transformers' testers ask of `get_audio_features`, and of audio and its placeholders in the prompt."""

import pytest
import torch

from modeling_audiophi.hearing_audiophi import AudioPhiAudioOutput
from tests.conformance.cases import ENCODERS, audio_of, batch_of, close, every_case, text_of
from tests.conftest import prompts


@every_case
def test_features_and_placeholders_must_agree(build, waveform, name):
    """ValueError when audio is missing, too much, or the text is there twice; twice of both passes."""
    model, processor = build(name)
    inputs = prompts(processor, [[waveform(1.0)], [waveform(1.0, 1)]])
    audio, text = audio_of(inputs), text_of(inputs)
    again = {key: torch.cat([value, value], 1) for key, value in text.items()}
    # Per prompt the same clip twice: rows in the order of the prompts.
    twice = {key: value.repeat_interleave(2, 0) for key, value in audio.items()}
    wrong = {
        "dropped": {**text, **{key: value[-1:] for key, value in audio.items()}},
        "added": {**text, **{key: torch.cat([value, value[:1]]) for key, value in audio.items()}},
        "doubled": {**again, **audio},
    }
    with torch.no_grad():
        for part in (model, model.model):
            part(**inputs)
            for kind, wrongly in wrong.items():
                with pytest.raises(ValueError, match="audio placeholders?, but . clips? (is|are) given"):
                    part(**wrongly)
                    pytest.fail(kind)
        output = model(**again, **twice)
    assert output.logits.shape[:2] == again["input_ids"].shape
    if name.split("-")[2] != "frames":  # or tests on this case prove nothing
        assert 0 < output.audio_counts.sum() < model.model.adapter_lengths(twice).sum()


@pytest.mark.parametrize("encoder", ENCODERS)
def test_audio_features_as_tuple_and_by_position(build, waveform, encoder):
    model, processor = build(f"{encoder}-llama-frames")
    audio = audio_of(batch_of(processor, waveform))
    key = model.model.audio_tower.feature_key
    with torch.no_grad():
        output = model.get_audio_features(**audio)
        as_tuple = model.get_audio_features(**audio, return_dict=False)
        features = audio.pop(key)
        positional = model.get_audio_features(features, **audio)
        audio[f"{key}_mask"] = list(audio[f"{key}_mask"])
        listed = model.get_audio_features(features, **audio)
    assert isinstance(output, AudioPhiAudioOutput) and isinstance(as_tuple, tuple)
    assert torch.equal(as_tuple[0], output.last_hidden_state) and torch.equal(as_tuple[1], output.pooler_output)
    assert torch.equal(positional.pooler_output, output.pooler_output)
    assert torch.equal(listed.pooler_output, output.pooler_output)
    assert output.pooler_output.shape == (int(output.tokens_mask.sum()), model.config.text_config.hidden_size)


@pytest.mark.parametrize("encoder", ENCODERS)
def test_hidden_states_and_attentions_of_audio_features(build, waveform, encoder):
    model, processor = build(f"{encoder}-llama-frames", fresh=True)
    audio = audio_of(batch_of(processor, waveform))
    layers = 2
    norm = model.model.audio_tower.get_submodule("encoder" if encoder == "whisper" else "model.encoder").layer_norm
    model.set_attn_implementation("eager")
    with torch.no_grad():
        plain = model.get_audio_features(**audio)
        output = model.get_audio_features(**audio, output_hidden_states=True, output_attentions=True)
        model.config.output_hidden_states = model.config.text_config.output_hidden_states = True
        by_config = model.get_audio_features(**audio)
        forward = model(**batch_of(processor, waveform))
    assert plain.hidden_states is None and plain.attentions is None and by_config.attentions is None
    assert len(output.hidden_states) == len(by_config.hidden_states) == layers + 1 and len(output.attentions) == layers
    assert [s.shape for s in output.hidden_states] == [plain.last_hidden_state.shape] * (layers + 1)
    assert close(output.pooler_output, plain.pooler_output) and len(forward.hidden_states) == layers + 1
    lengths = [model.config.num_audio_tokens(processor.frame_counts(int(n * 16_000))) for n in (1.3, 0.5, 0.31)]
    assert plain.tokens_mask.sum(1).tolist() == lengths
    windows, frames = plain.last_hidden_state.shape[:2]
    for weights in output.attentions:
        assert weights.shape == (windows, 4, frames, frames)
        sums = weights.sum(-1)
        assert torch.isclose(sums, sums.round(), atol=1e-5).all() and sums[0].min() > 0.99 and sums[2, :, -1].max() == 0
    one = {key: value[2:3] for key, value in audio.items()}
    with torch.no_grad():
        alone = model.get_audio_features(**one, output_hidden_states=True).hidden_states
        frames = alone[0].shape[1]
        for state, padded in zip(alone, output.hidden_states, strict=True):
            assert close(state[0], padded[2, :frames], 1e-5) and padded[2, frames:].abs().max() == 0
        assert close(norm(output.hidden_states[-1][0]), plain.last_hidden_state[0], 1e-5)
    with pytest.raises(ValueError, match="cached encoder states"):
        model.get_audio_features(audio_hidden_states=plain.last_hidden_state, output_hidden_states=True)


@pytest.mark.parametrize("folder", ["tiny_w2v_bert_dir", "tiny_wav2vec2_dir", "tiny_languagebind_dir", "tiny_ast_dir",
                                    "tiny_clap_dir"])  # fmt: skip
def test_every_family_tells_its_hidden_states(make_tiny_model, waveform, request, folder):
    model, processor = make_tiny_model("mlp", audio=request.getfixturevalue(folder))
    audio = audio_of(prompts(processor, [[waveform(0.8)], [waveform(0.5, 1)]]))
    with torch.no_grad():
        output = model.get_audio_features(**audio, output_hidden_states=True)
        assert close(output.pooler_output, model.get_audio_features(**audio).pooler_output)
    assert len(output.hidden_states) == (5 if folder == "tiny_clap_dir" else 3) and all(
        len(state) == 2 for state in output.hidden_states
    )


def test_attention_weights_that_are_not_computed_are_not_invented(build, waveform):
    model, processor = build("whisper-llama-frames")
    assert model.config.audio_config._attn_implementation == "sdpa"
    with pytest.raises(ValueError, match="set_attn_implementation"):
        model.get_audio_features(**audio_of(batch_of(processor, waveform)), output_attentions=True)
