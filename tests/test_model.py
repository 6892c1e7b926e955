"""The model as a whole: counts, invariance, losses."""

import copy

import pytest
import torch

from modeling_audiophi import ADAPTERS, AudioPhiForConditionalGeneration
from modeling_audiophi.lengths_audiophi import output_length
from modeling_audiophi.placeholders_audiophi import drop_unused_placeholders
from tests.conftest import message, prompts

READOUTS = ["frames", "collapse", "mixed"]
TOLERANCE = 2e-4  # logits, float32; their scale is about 1


def audio_only(inputs):
    return {key: value for key, value in inputs.items() if key not in ("input_ids", "attention_mask")}


def real(inputs, values, row):
    return values[row][inputs["attention_mask"][row].bool()]


@pytest.mark.parametrize("readout", READOUTS)
@pytest.mark.parametrize("adapter", sorted(ADAPTERS))
def test_logits_do_not_depend_on_batch_or_padding_side(make_tiny_model, waveform, adapter, readout):
    model, processor = make_tiny_model(adapter=adapter, readout=readout)
    clips = [[waveform(1.3)], [waveform(0.5, 1)], [waveform(0.9, 2), waveform(0.31, 3)]]
    outputs = {}
    with torch.no_grad():
        for side in ("left", "right"):
            inputs = prompts(processor, clips, side)
            outputs[side] = inputs, model(**inputs).logits
        assert inputs["attention_mask"].min() == 0
        for row, waves in enumerate(clips):
            inputs = prompts(processor, [waves])
            expected = model(**inputs).logits[0]
            assert expected.std() > 0.1
            for batch, logits in outputs.values():
                assert torch.allclose(real(batch, logits, row), expected, atol=TOLERANCE)


@pytest.mark.parametrize(
    "folder", ["tiny_wav2vec2_dir", "tiny_wav2vec2_layer_dir", "tiny_hubert_dir", "tiny_wavlm_dir", "tiny_w2v_bert_dir"]
)
def test_other_encoders_from_waveform_to_words(make_tiny_model, waveform, request, folder):
    """Processor and model agree on the count, and a batch gives what single clips give."""
    model, processor = make_tiny_model(audio=request.getfixturevalue(folder), readout="frames")
    clips = [[waveform(1.1)], [waveform(0.47, 1)]]
    inputs = prompts(processor, clips)
    batch = model.generate(**inputs, max_new_tokens=6, do_sample=False)[:, inputs["input_ids"].shape[1] :]
    with torch.no_grad():
        logits = model(**inputs).logits
        for row, waves in enumerate(clips):
            single = prompts(processor, [waves])
            assert torch.allclose(real(inputs, logits, row), model(**single).logits[0], atol=TOLERANCE)
            alone = model.generate(**single, max_new_tokens=6, do_sample=False)[0, single["input_ids"].shape[1] :]
            assert torch.equal(batch[row][: len(alone)], alone)


def test_collapse_removes_some_placeholders_and_keeps_some(make_tiny_model, waveform):
    """Else the tests of invariance above would prove nothing for it."""
    model, processor = make_tiny_model(readout="collapse")
    with torch.no_grad():
        keep = model(**prompts(processor, [[waveform(1.3)], [waveform(0.5, 1)]])).audio_keep
    assert 0 < keep.sum() < len(keep)


@pytest.mark.parametrize("readout", READOUTS)
def test_output_depends_on_the_audio(make_tiny_model, waveform, readout):
    model, processor = make_tiny_model(readout=readout)
    with torch.no_grad():
        first, second = (model(**prompts(processor, [[waveform(1.0, seed)]])).logits[0, -1] for seed in (0, 1))
    assert (first - second).abs().max() > 1e-3


def test_text_only(make_tiny_model):
    model, processor = make_tiny_model()
    inputs = processor.apply_chat_template(
        [message([])], tokenize=True, return_dict=True, add_generation_prompt=True, return_tensors="pt"
    )
    with torch.no_grad():
        logits = model(input_ids=inputs["input_ids"]).logits
        expected = model.model.language_model(inputs["input_ids"]).last_hidden_state
    assert torch.allclose(logits, model.lm_head(expected), atol=1e-5)
    assert model.generate(**inputs, max_new_tokens=3).shape[1] > inputs["input_ids"].shape[1]


@pytest.mark.parametrize("readout", READOUTS)
def test_count_mismatch_names_both_numbers(make_tiny_model, waveform, readout):
    model, processor = make_tiny_model(readout=readout)
    inputs = prompts(processor, [[waveform(1.0)], [waveform(1.0, 1)]])
    count = int((inputs["input_ids"] == processor.audio_token_id).sum())
    text = {key: inputs[key] for key in ("input_ids", "attention_mask")}
    doubled = {key: torch.cat([value, value], dim=1) for key, value in text.items()}
    fewer = {key: value[:1] for key, value in audio_only(inputs).items()}
    for wrong, message_ in [
        ({**inputs, **doubled}, f"{2 * count} audio placeholders, but the audio makes {count}"),
        ({**text, **fewer}, f"{count} audio placeholders, but the audio makes {count // 2}"),
        (text, f"{count} audio placeholders, but the audio makes 0"),
    ]:
        with pytest.raises(ValueError, match=message_):
            model(**wrong)
        with pytest.raises(ValueError, match=message_):
            model.generate(**wrong, max_new_tokens=2)


def test_wrong_kind_of_features_is_named(make_tiny_model, waveform):
    model, processor = make_tiny_model()
    inputs = prompts(processor, [[waveform(0.5)]])
    with pytest.raises(ValueError, match="takes 'input_features'"):
        model(input_ids=inputs["input_ids"], input_values=torch.zeros(1, 100))


def test_long_audio_is_encoded_in_windows_and_joined(make_tiny_model, waveform):
    """5 s in windows of 2 s: three windows, their tokens one after the other."""
    model, processor = make_tiny_model()
    wave = waveform(5.0)
    inputs = prompts(processor, [[wave], [waveform(0.5, 1)]])
    assert inputs["audio_num_windows"].tolist() == [3, 1]
    with torch.no_grad():
        audio = model.get_audio_features(**audio_only(inputs), with_alignment=True)
        rows = {key: value for key, value in audio_only(inputs).items() if key != "audio_num_windows"}
        expected = model.get_audio_features(**rows)
    assert audio.tokens.shape[0] == 2 and audio.align_logits.shape[:2] == audio.tokens.shape[:2]
    assert torch.equal(audio.pooler_output, expected.pooler_output)
    windows = expected.tokens_mask.sum(1).tolist()
    assert len(windows) == 4 and audio.tokens_mask.sum(1).tolist() == [sum(windows[:3]), windows[3]]
    assert len(model.transcribe_alignment(**audio_only(inputs))) == 2
    with pytest.raises(ValueError, match="adds up to 3 windows, but the audio input has 4 rows"):
        model.get_audio_features(**{**audio_only(inputs), "audio_num_windows": torch.tensor([3])})


def test_more_audio_than_context_gives_tokens_and_seconds(make_tiny_model, waveform):
    model, processor = make_tiny_model()
    inputs = prompts(processor, [[waveform(42.0)]])
    for call in (model, lambda **kwargs: model.generate(**kwargs, max_new_tokens=2)):
        with pytest.raises(ValueError, match=r"525 of them audio \(about 42 s\).*context is 512"):
            call(**inputs)


def test_encoding_many_windows_in_parts_changes_nothing(make_tiny_model, waveform, monkeypatch):
    model, processor = make_tiny_model(audio=None)
    inputs = audio_only(prompts(processor, [[waveform(1.9)], [waveform(0.6, 1)], [waveform(0.8, 2)]]))
    with torch.no_grad():
        expected = model.get_audio_features(**inputs).pooler_output
        monkeypatch.setattr("modeling_audiophi.hearing_audiophi.WINDOWS_AT_A_TIME", 1)
        calls = []
        model.model.audio_tower.register_forward_hook(lambda *_: calls.append(1))
        assert torch.allclose(model.get_audio_features(**inputs).pooler_output, expected, atol=1e-5)
    assert len(calls) == 3


@pytest.mark.parametrize("readout", READOUTS)
def test_cached_encoder_states_equal_live_audio(make_tiny_model, waveform, readout):
    model, processor = make_tiny_model(readout=readout)
    inputs = prompts(processor, [[waveform(1.0)], [waveform(0.6, 1)]])
    text = {key: inputs[key] for key in ("input_ids", "attention_mask")}
    with torch.no_grad():
        hidden, mask = model.model.encode(inputs["input_features"], inputs["input_features_mask"])
        cached = model(**text, audio_hidden_states=hidden, audio_hidden_mask=mask).logits
        assert torch.allclose(cached, model(**inputs).logits, atol=1e-5)


def labelled(processor, inputs):
    """Labels on the last 6 real positions of each row."""
    labels = inputs["input_ids"].clone()
    for row, mask in zip(labels, inputs["attention_mask"].bool(), strict=True):
        row[mask.nonzero()[:-6, 0]] = -100
        row[~mask] = -100
    assert not (labels == processor.audio_token_id).any()
    return labels


@pytest.mark.parametrize("readout", READOUTS)
def test_lm_loss_is_the_shifted_cross_entropy(make_tiny_model, waveform, readout):
    model, processor = make_tiny_model(readout=readout)
    inputs = prompts(processor, [[waveform(1.0)], [waveform(0.6, 1)]], "right")
    labels = labelled(processor, inputs)
    with torch.no_grad():
        output = model(**inputs, labels=labels)
        logits = model(**inputs).logits
        expected = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        summed = model(**inputs, labels=labels, num_items_in_batch=torch.tensor(24)).loss
        left = prompts(processor, [[waveform(1.0)], [waveform(0.6, 1)]], "left")
        left_loss = model(**left, labels=labelled(processor, left)).loss
        full = model(**inputs, labels=labels, return_logits=True)
    assert output.logits is None and torch.equal(output.loss, output.lm_loss)
    assert output.loss.item() == pytest.approx(expected.item(), rel=1e-4)
    assert summed.item() == pytest.approx(expected.item() * 12 / 24, rel=1e-4)
    assert left_loss.item() == pytest.approx(expected.item(), rel=1e-3)
    assert full.logits.shape == logits.shape


def test_head_runs_at_labelled_positions_only(make_tiny_model, waveform):
    model, processor = make_tiny_model()
    inputs = prompts(processor, [[waveform(1.0)]])
    rows = []
    model.lm_head.register_forward_hook(lambda module, args, output: rows.append(args[0].shape[:-1].numel()))
    model(**inputs, labels=labelled(processor, inputs))
    assert rows == [6]


def test_align_loss_does_not_run_the_language_model(make_tiny_model, waveform):
    model, processor = make_tiny_model(readout="collapse")
    inputs = audio_only(prompts(processor, [[waveform(1.0)], [waveform(1.2, 1)]]))
    layers = model.model.language_model.layers
    del model.model.language_model.layers[:]
    align_labels = torch.tensor([[20, 21, -100], [30, -100, -100]])
    output = model(**inputs, align_labels=align_labels)
    assert len(layers) == 0 and output.logits is None and output.loss.item() == output.align_loss.item() > 0
    assert output.align_skipped == 0 and output.align_logits is None
    assert model(**inputs, align_labels=align_labels, return_logits=True).align_logits.shape[0] == 2


def test_both_losses_add_up(make_tiny_model, waveform):
    model, processor = make_tiny_model()
    inputs = prompts(processor, [[waveform(1.0)], [waveform(1.2, 1)]])
    align_labels = torch.tensor([[20, 21, -100], [30, -100, -100]])
    output = model(**inputs, labels=labelled(processor, inputs), align_labels=align_labels, align_loss_weight=0.3)
    assert output.loss.item() == pytest.approx(output.lm_loss.item() + 0.3 * output.align_loss.item(), rel=1e-5)
    alone = model(**audio_only(inputs), align_labels=align_labels).align_loss
    assert output.align_loss.item() == pytest.approx(alone.item(), rel=1e-5)


def test_no_alignment_head_is_said(make_tiny_model, waveform):
    model, processor = make_tiny_model(align=False)
    inputs = audio_only(prompts(processor, [[waveform(1.0)]]))
    with pytest.raises(ValueError, match="no alignment head"):
        model.transcribe_alignment(**inputs)


@pytest.mark.parametrize("readout", READOUTS)
def test_gradient_reaches_the_adapter_and_stops_at_frozen_parts(make_tiny_model, waveform, readout):
    model, processor = make_tiny_model(readout=readout)
    model.tune("audio", "frozen")
    model.tune("text", "frozen")
    model.train()
    assert not model.model.audio_tower.training and model.model.multi_modal_projector.training
    inputs = prompts(processor, [[waveform(1.0)], [waveform(1.2, 1)]])
    labels = torch.tensor([[20, 21], [30, -100]])
    model(**inputs, labels=labelled(processor, inputs), align_labels=labels).loss.backward()
    parts = (model.model.multi_modal_projector, model.model.readout, model.model.alignment)
    for name, parameter in ((n, p) for part in parts for n, p in part.named_parameters()):
        # The residual starts at zero, so its own norm sees no gradient in the first step; this audio has no pauses.
        if readout == "frames" or not name.startswith(("norm.", "state_norm.", "clip_norm.", "sounds.", "captions.")):
            assert parameter.grad is not None and parameter.grad.abs().max() > 0, name
    assert all(parameter.grad is None for parameter in model.model.audio_tower.parameters())
    assert all(parameter.grad is None for parameter in model.model.language_model.parameters())
    model.tune("audio", "full")
    model.tune("text", "full")
    model.train()
    assert model.model.audio_tower.training
    model(**inputs, labels=labelled(processor, inputs)).loss.backward()
    assert model.model.audio_tower.encoder.conv1.weight.grad.abs().max() > 0
    assert model.get_input_embeddings().weight.grad.abs().max() > 0


def test_a_few_steps_of_align_learn_a_clip(make_tiny_model, waveform):
    model, processor = make_tiny_model(readout="collapse")
    model.tune("audio", "frozen")
    model.tune("text", "frozen")
    inputs = audio_only(prompts(processor, [[waveform(1.0)], [waveform(1.0, 1)]]))
    targets = [[20, 21, 22, 20], [40, 30, 30]]
    labels = torch.tensor([targets[0], [*targets[1], -100]])
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 1e-2)
    for _ in range(200):
        optimizer.zero_grad()
        model(**inputs, align_labels=labels).loss.backward()
        optimizer.step()
    assert model.transcribe_alignment(**inputs) == targets


def test_accumulated_gradients_equal_those_of_the_whole_batch(make_tiny_model, waveform):
    clips = [[waveform(1.0)], [waveform(0.6, 1)], [waveform(0.8, 2)]]
    targets = torch.tensor([[20, 21], [30, -100], [40, 41]])
    gradients = []
    for parts in ([clips], [clips[:2], clips[2:]]):
        model, processor = make_tiny_model()
        done = 0
        for part in parts:
            inputs = prompts(processor, part, "right")
            labels = labelled(processor, inputs)
            if not done:
                labels[0, :-4] = -100  # rows with different numbers of labels
            model(
                **inputs,
                labels=labels,
                align_labels=targets[done : done + len(part)],
                num_items_in_batch=16,
                align_items_in_batch=3,
            ).loss.backward()
            done += len(part)
        gradients.append(model.model.multi_modal_projector.proj_in.weight.grad)
    assert torch.allclose(*gradients, rtol=1e-3, atol=1e-4 * gradients[0].abs().max().item())


def test_gradient_checkpointing_changes_nothing(make_tiny_model, waveform):
    model, processor = make_tiny_model(adapter={"type": "conv_mlp", "dropout": 0.0})
    inputs = prompts(processor, [[waveform(1.0)]])
    labels = labelled(processor, inputs)
    gradients = []
    model.train()
    for _ in range(2):
        model.zero_grad()
        model(**inputs, labels=labels).loss.backward()
        gradients.append(model.model.audio_tower.encoder.conv1.weight.grad.clone())
        model.activation_checkpointing_enable()
    assert gradients[0].abs().max() > 0 and torch.allclose(*gradients, atol=1e-6)


def test_frames_start_at_the_size_of_embeddings(make_tiny_model, waveform):
    model, processor = make_tiny_model()
    table = model.get_input_embeddings().weight
    with torch.no_grad():
        tokens = model.get_audio_features(**audio_only(prompts(processor, [[waveform(1.0)]]))).pooler_output
    assert tokens.norm(dim=-1).mean().item() == pytest.approx(
        table.norm(dim=-1).square().mean().sqrt().item(), rel=0.05
    )


def test_hidden_states_and_attention_implementations(make_tiny_model, waveform):
    model, processor = make_tiny_model(readout="collapse")
    inputs = prompts(processor, [[waveform(1.0)], [waveform(0.5, 1)]])
    with torch.no_grad():
        expected = model(**inputs).logits
        model.set_attn_implementation("eager")
        output = model(**inputs, output_hidden_states=True, output_attentions=True)
    assert model.model.audio_tower.encoder.config._attn_implementation == "eager"
    assert torch.allclose(output.logits, expected, atol=1e-4)
    assert [state.shape[:2] for state in output.hidden_states] == [inputs["input_ids"].shape] * 3
    assert len(output.attentions) == 2


def test_every_weight_is_initialised(make_tiny_model):
    """A model built from the config alone has no weight left as allocated."""
    model, _ = make_tiny_model(readout="collapse", encoder_layer="mix")
    with torch.device("meta"):
        empty = AudioPhiForConditionalGeneration(copy.deepcopy(model.config))
    empty.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in empty.parameters():
            parameter.fill_(float("nan"))
    for module in empty.modules():
        module._is_hf_initialized = False
    empty.init_weights()
    broken = [name for name, parameter in empty.named_parameters() if not torch.isfinite(parameter).all()]
    assert not broken
    assert empty.model.readout.proj.weight.abs().max() == 0


def test_rule_equals_real_lengths(make_tiny_model, waveform):
    model, processor = make_tiny_model(adapter="qformer")
    inputs = prompts(processor, [[waveform(1.0)]])
    frames = int(inputs["input_features_mask"].sum())
    count = int((inputs["input_ids"] == processor.audio_token_id).sum())
    assert output_length(frames, model.config.audio_length_rule) == count


def test_dropping_placeholders_keeps_order_and_maps_back():
    pad, audio = 9, 5
    ids = torch.tensor([[pad, 1, audio, audio, 2, audio], [pad, pad, 3, audio, audio, 4]])
    mask = (ids != pad).long()
    keep = torch.tensor([False, True, False, False, False])
    left = drop_unused_placeholders(ids, mask, audio, keep, "left")
    assert left.input_ids.tolist() == [[1, audio, 2], [0, 3, 4]]
    assert left.attention_mask.tolist() == [[1, 1, 1], [0, 1, 1]]
    assert left.latest.tolist() == [[0, 0, 0, 1, 2, 2], [1, 1, 1, 1, 1, 2]]
    right = drop_unused_placeholders(ids, mask, audio, keep, "right")
    assert right.input_ids.tolist() == [[1, audio, 2], [3, 4, 0]]
    assert right.latest.tolist()[1] == [0, 0, 0, 0, 0, 1]
