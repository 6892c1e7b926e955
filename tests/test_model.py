"""The model as a whole: counts, invariance, losses."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import Trainer, TrainingArguments

from modeling_audiophi import ADAPTERS, AudioPhiForConditionalGeneration
from modeling_audiophi.alignment_audiophi import NO_TARGET
from modeling_audiophi.placeholders_audiophi import expand_placeholders
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
    # Of two classes that are equally likely but for rounding, which is heard depends on the batch.
    torch.nn.init.normal_(model.model.alignment.bias, std=0.5, generator=torch.Generator().manual_seed(0))
    clips = [[waveform(1.3)], [waveform(0.5, 1)], [waveform(0.9, 2), waveform(0.31, 3)], []]
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


def test_collapse_keeps_some_of_the_adapters_tokens(make_tiny_model, waveform):
    """Else the tests of invariance above would prove nothing for it."""
    model, processor = make_tiny_model(readout="collapse")
    inputs = prompts(processor, [[waveform(1.3)], [waveform(0.5, 1)]])
    with torch.no_grad():
        kept, made = model(**inputs).audio_counts, model.model.adapter_lengths(inputs)
    assert kept.shape == made.shape == (2,) and 0 < kept.sum() < made.sum()


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
    text = {key: inputs[key] for key in ("input_ids", "attention_mask")}
    doubled = {key: torch.cat([value, value], dim=1) for key, value in text.items()}
    fewer = {key: value[:1] for key, value in audio_only(inputs).items()}
    one = {key: value[:1] for key, value in text.items()}
    for wrong, message_ in [
        ({**inputs, **doubled}, "has 4 audio placeholders, but 2 clips are given"),
        ({**text, **fewer}, "has 2 audio placeholders, but 1 clip is given"),
        ({**audio_only(inputs), **one}, "has 1 audio placeholder, but 2 clips are given"),
        (text, "has 2 audio placeholders, but no clips are given"),
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
    assert (
        audio.counts.tolist() == audio.tokens_mask.sum(1).tolist()
        and audio.align_logits.shape[:2] == audio.tokens.shape[:2]
    )
    assert torch.equal(audio.pooler_output, expected.pooler_output)
    windows = expected.tokens_mask.sum(1).tolist()
    assert len(windows) == 4 and audio.tokens_mask.sum(1).tolist() == [sum(windows[:3]), windows[3]]
    assert len(model.read_alignment(**audio_only(inputs))) == 2
    with pytest.raises(ValueError, match="adds up to 3 windows, but the audio input has 4 rows"):
        model.get_audio_features(**{**audio_only(inputs), "audio_num_windows": torch.tensor([3])})


def test_more_audio_than_context_gives_tokens_and_seconds(make_tiny_model, waveform):
    """And before the encoder has run: what is too long need not be heard."""
    model, processor = make_tiny_model()
    inputs = prompts(processor, [[waveform(42.0)]])
    hook = model.model.audio_tower.register_forward_pre_hook(lambda *_: pytest.fail("encoded"))
    for call in (model, lambda **kwargs: model.generate(**kwargs, max_new_tokens=2)):
        with pytest.raises(ValueError, match=r"525 of them audio \(about 42 s\).*context is 512"):
            call(**inputs)
    hook.remove()


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
        without = model(**inputs, labels=labels, return_logits=False)
    assert torch.equal(output.logits, logits) and torch.equal(output.loss, output.lm_loss)
    assert output.loss.item() == pytest.approx(expected.item(), rel=1e-4)
    assert summed.item() == pytest.approx(expected.item() * 12 / 24, rel=1e-4)
    assert left_loss.item() == pytest.approx(expected.item(), rel=1e-3)
    assert without.logits is None and torch.equal(without.loss, output.loss)


def test_head_runs_at_labelled_positions_only(make_tiny_model, waveform):
    model, processor = make_tiny_model()
    inputs = prompts(processor, [[waveform(1.0)]])
    rows = []
    model.lm_head.register_forward_hook(lambda module, args, output: rows.append(args[0].shape[:-1].numel()))
    assert model.train()(**inputs, labels=labelled(processor, inputs)).logits is None
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
        model.read_alignment(**inputs)


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
        if readout == "frames" or not name.startswith(
            ("norm.", "state_norm.", "clip_norm.", "sounds.", "sound_words.")
        ):
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
    assert model.read_alignment(**inputs) == targets


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


@pytest.mark.parametrize("adapter", ["qformer", "conv_mlp"])
def test_lengths_are_known_without_hearing(make_tiny_model, waveform, adapter):
    model, processor = make_tiny_model(adapter=adapter)
    clips = [waveform(5.0), waveform(0.3, 1)]
    inputs = prompts(processor, [[clip] for clip in clips])
    expected = model.get_audio_features(**audio_only(inputs)).counts.tolist()
    assert model.model.adapter_lengths(inputs).tolist() == expected
    frames = [processor.frame_counts(len(clip)) for clip in clips]
    assert [model.config.num_audio_tokens(counts) for counts in frames] == expected
    assert model.config.num_audio_tokens([model.config.shortest_frames]) >= 1
    assert model.config.num_audio_tokens([model.config.shortest_frames - 1]) == 0
    hidden, mask = model.model.encode(inputs["input_features"], inputs["input_features_mask"])
    cached = {"audio_hidden_states": hidden, "audio_hidden_mask": mask}
    assert model.model.adapter_lengths({**cached, "audio_num_windows": torch.tensor([3, 1])}).tolist() == expected


# ---- placeholders


def test_expanded_placeholders_keep_order_and_map_back():
    pad, audio = 9, 5
    ids = torch.tensor([[pad, 1, audio, 2, audio], [pad, pad, 3, audio, 4]])
    mask = (ids != pad).long()
    left = expand_placeholders(ids, mask, torch.tensor([3, 0, 1]), audio, "left")
    assert left.input_ids.tolist() == [[1, audio, audio, audio, 2], [0, 0, 3, audio, 4]]
    assert left.attention_mask.tolist() == [[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]]
    assert left.latest.tolist() == [[0, 0, 3, 4, 4], [1, 1, 2, 3, 4]]
    right = expand_placeholders(ids, mask, torch.tensor([3, 0, 1]), audio, "right")
    assert right.input_ids.tolist()[1] == [3, audio, 4, 0, 0]
    assert right.latest.tolist()[1] == [0, 0, 0, 1, 2]


@settings(max_examples=150, deadline=None)
@given(data=st.data(), sides=st.tuples(*[st.sampled_from(["left", "right"])] * 2))
def test_any_expansion_can_be_taken_back(data, sides):
    """Rows of text and clips of any size, also of none, padded on either side."""
    audio = 5
    rows = data.draw(st.lists(st.lists(st.integers(3, 6), max_size=7), min_size=1, max_size=4))
    counts = data.draw(st.lists(st.integers(0, 5), min_size=(n := sum(row.count(audio) for row in rows)), max_size=n))
    size = max(1, *map(len, rows))

    def pad(row, value, width, side):
        padding = [value] * (width - len(row))
        return [*padding, *row] if side == "left" else [*row, *padding]

    ids = torch.tensor([pad(row, 0, size, sides[0]) for row in rows])
    mask = torch.tensor([pad([1] * len(row), 0, size, sides[0]) for row in rows])
    left = iter(counts)
    expected = [[token for t in row for token in ([audio] * next(left) if t == audio else [t])] for row in rows]
    prompt = expand_placeholders(ids, mask, torch.tensor(counts, dtype=torch.long), audio, sides[1])
    width = max(1, *map(len, expected))
    assert prompt.input_ids.tolist() == [pad(row, 0, width, sides[1]) for row in expected]
    assert prompt.attention_mask.tolist() == [pad([1] * len(row), 0, width, sides[1]) for row in expected]
    # A state that says how much has been read: every position gets that of what was read up to it.
    gathered = prompt.gather(prompt.attention_mask.cumsum(1)[..., None].float())[..., 0].long()
    left = iter(counts)
    for row, read, real in zip(rows, gathered.tolist(), mask.bool().tolist(), strict=True):
        sizes = torch.tensor([next(left) if token == audio else 1 for token in row], dtype=torch.long)
        ends = sizes.cumsum(0).tolist()
        for end, value in zip(ends, [value for value, is_real in zip(read, real, strict=True) if is_real], strict=True):
            assert value == end or (end == 0 and value <= 1)  # nothing was read before it
    with pytest.raises(ValueError, match=f"but {n + 1} clip"):
        expand_placeholders(ids, mask, torch.ones(n + 1, dtype=torch.long), audio, sides[1])


@pytest.mark.parametrize("readout", READOUTS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_new_turn_on_a_cache_equals_the_whole_chat(make_tiny_model, waveform, readout, side):
    """`forward` with the new turn's ids and clips alone; its mask also covers the cache."""
    model, processor = make_tiny_model(readout=readout)
    first = prompts(processor, [[waveform(0.7)], [waveform(0.4, 1)]], "left")
    second = prompts(processor, [[waveform(0.5, 2)], []], side)
    with torch.no_grad():
        begun = model.model.expand_prompt(first["input_ids"], first["attention_mask"],
                                          model.get_audio_features(**audio_only(first)).counts)  # fmt: skip
        cache = model(**first, use_cache=True)
        past = {name: value for name, value in cache.items() if name in ("cache", "past_key_values")}
        mask = torch.cat([begun.attention_mask, second["attention_mask"]], 1)
        logits = model(**{**second, "attention_mask": mask}, **past).logits
        for row, clips in enumerate([[waveform(0.7), waveform(0.5, 2)], [waveform(0.4, 1)]]):
            parts = [turn["input_ids"][row][turn["attention_mask"][row].bool()] for turn in (first, second)]
            whole = {**audio_only(prompts(processor, [clips])), "input_ids": torch.cat(parts)[None]}
            expected = model(**whole).logits[0, -len(parts[1]) :]
            assert torch.allclose(real(second, logits, row), expected, atol=TOLERANCE)


def test_audio_and_embeddings_or_positions_exclude_each_other(make_tiny_model, waveform):
    model, processor = make_tiny_model()
    inputs = prompts(processor, [[waveform(0.5)]])
    embeds = torch.zeros(1, 4, 32)
    for more in (inputs, {"input_ids": inputs["input_ids"], "audio_embeds": embeds[0]}):
        with pytest.raises(ValueError, match="not both"):
            model(**more, inputs_embeds=embeds)
    with pytest.raises(ValueError, match="position_ids"):
        model(**inputs, position_ids=torch.arange(inputs["input_ids"].shape[1])[None])
    with pytest.raises(ValueError, match="1 audio placeholders, but 4 audio_embeds"):
        model(input_ids=inputs["input_ids"], audio_embeds=embeds[0])


# ---- batches of any kind of rows


@pytest.mark.parametrize("readout", READOUTS)
def test_rows_without_audio_learn_like_alone(make_tiny_model, waveform, readout):
    """Text alone, or beside clips; a batch without any audio has a gradient of zero for the parts that read audio."""
    model, processor = make_tiny_model(adapter={"type": "conv_mlp", "dropout": 0.0}, readout=readout)
    model.tune("audio", "frozen")
    model.tune("text", "frozen")
    model.train()
    text = prompts(processor, [[], []], "right")
    loss = model(**text, labels=labelled(processor, text)).loss
    loss.backward()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert trained and all(parameter.grad is not None and not parameter.grad.any() for parameter in trained)
    mixed = prompts(processor, [[], [waveform(0.6)]], "right")
    labels = labelled(processor, mixed)
    labels[1] = -100
    model.eval()
    assert model(**mixed, labels=labels).loss.item() == pytest.approx(loss.item(), rel=1e-4)


def test_clips_without_a_target_change_no_loss(make_tiny_model, waveform):
    model, processor = make_tiny_model()
    clips = [waveform(1.0), waveform(1.2, 1), waveform(0.8, 2)]
    labels = torch.tensor([[20, 21], [NO_TARGET, -100], [-100, -100]])
    both = audio_only(prompts(processor, [[clip] for clip in clips]))
    without = audio_only(prompts(processor, [[clips[0]], [clips[2]]]))
    expected = model(**without, align_labels=labels[[0, 2]])
    output = model(**both, align_labels=labels)
    assert output.align_loss.item() == pytest.approx(expected.align_loss.item(), rel=1e-5)
    assert output.align_skipped == 0
    nothing = model(**both, align_labels=torch.full((3, 1), NO_TARGET))
    assert nothing.align_loss == 0


@pytest.mark.parametrize("readout", READOUTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("prior", [0.0, 0.3])
def test_half_precision(make_tiny_model, waveform, readout, dtype, prior):
    """With an alignment that knows spelling, and every scorer."""
    _, processor = make_tiny_model()
    texts = [processor.tokenizer.decode([index]) for index in range(10, 310)]
    model, processor = make_tiny_model(readout=readout, align_spelling={"texts": texts, "buckets": 50, "size": 8})
    model.to(dtype)
    inputs = prompts(processor, [[waveform(0.9)], [waveform(0.5, 1)]]).to(dtype=dtype)
    labels = torch.tensor([[20, 21], [30, -100]])
    with torch.no_grad():
        output = model(**inputs, align_labels=labels, return_logits=True)
    assert output.logits.dtype == output.align_logits.dtype == dtype and torch.isfinite(output.logits).all()
    assert torch.isfinite(output.align_loss)
    scores = {"ctc_weight": 0.5, "lm_prior_weight": prior, "draft_tokens": 8, "max_new_tokens": 4}
    for rows in (inputs, prompts(processor, [[waveform(0.9)]]).to(dtype=dtype)):
        for beams in (1, 2):
            out = model.generate(**rows, **scores, num_beams=beams, do_sample=False)
            assert out.shape[1] > rows["input_ids"].shape[1]


def test_trainers_predict_collects_the_logits_alone(make_tiny_model, waveform, tmp_path):
    model, processor = make_tiny_model(readout="collapse")
    inputs = prompts(processor, [[waveform(1.0)]], "right")
    batch = {**inputs, "labels": labelled(processor, inputs)}
    arguments = TrainingArguments(
        str(tmp_path), per_device_eval_batch_size=1, report_to=[], use_cpu=True, remove_unused_columns=False,
        label_names=["labels"], disable_tqdm=True,
    )  # fmt: skip
    found = Trainer(model, arguments, data_collator=lambda rows: rows[0]).predict([batch])
    assert found.predictions.shape == (*inputs["input_ids"].shape, model.config.get_text_config().vocab_size)
    with torch.no_grad():
        assert torch.allclose(torch.from_numpy(found.predictions), model(**inputs).logits, atol=1e-4)
