"""What transformers' testers (tests/alm_tester.py, tests/test_modeling_common.py) ask of every audio language model."""

import copy

import pytest
import torch
from torch import nn
from transformers import AutoModel, WavLMModel

from modeling_audiophi import AudioPhiForConditionalGeneration, AudioPhiModel
from tests.conformance.cases import (
    audio_of,
    batch_of,
    close,
    every_case,
    every_pair,
    expanded,
    labelled,
)
from tests.conftest import prompts

# ---- outputs


@every_case
def test_padding_on_either_side_and_being_alone(build, waveform, name):
    model, processor = build(name)
    with torch.no_grad():
        alone = model(**prompts(processor, [[waveform(1.3)]])).logits[0]
        for side in ("left", "right"):
            inputs = batch_of(processor, waveform, side)
            real = inputs["attention_mask"][0].bool()
            assert not real.all() and close(model(**inputs).logits[0][real], alone)


@every_pair
def test_tuples_and_logits_to_keep(build, waveform, name):
    model, processor = build(name)
    inputs = batch_of(processor, waveform)
    with torch.no_grad():
        output = model(**inputs, output_hidden_states=True)
        as_tuple = model(**inputs, output_hidden_states=True, return_dict=False)
        base = model.model(**inputs, return_dict=False)
        last = model(**inputs, logits_to_keep=1).logits
        some = model(**inputs, logits_to_keep=torch.tensor([3, 5])).logits
    assert isinstance(as_tuple, tuple) and torch.equal(as_tuple[0], output.logits)
    assert len(as_tuple) == len(output.to_tuple()) and torch.equal(base[0], output.hidden_states[-1])
    assert close(last, output.logits[:, -1:], 1e-6) and close(some, output.logits[:, [3, 5]], 1e-6)
    assert [state.shape[:2] for state in output.hidden_states] == [inputs["input_ids"].shape] * 3


@every_case
def test_embeddings_instead_of_ids(build, waveform, name):
    """Of text alone, and of an expanded prompt with the audio in it."""
    model, processor = build(name)
    inputs = batch_of(processor, waveform)
    text = torch.arange(20, 30)[None]
    with torch.no_grad():
        prompt, audio = expanded(model, inputs)
        embeds = model.get_input_embeddings()(prompt.input_ids)
        embeds[prompt.input_ids == processor.audio_token_id] = audio
        by_embeds = model(inputs_embeds=embeds, attention_mask=prompt.attention_mask)
        assert close(prompt.gather(by_embeds.logits), model(**inputs).logits, 1e-5)
        by_embeds = model(inputs_embeds=model.get_input_embeddings()(text)).logits
        assert torch.equal(by_embeds, model(input_ids=text).logits)
        for more in (audio_of(inputs), {"input_ids": prompt.input_ids, "audio_embeds": audio}):
            with pytest.raises(ValueError, match="inputs_embeds, not both"):
                model(inputs_embeds=embeds, **more)
        with pytest.raises(ValueError, match="need input_ids"):
            model(**audio_of(inputs))


@every_pair
def test_positions_given_and_found(build, waveform, name):
    model, processor = build(name)
    inputs = batch_of(processor, waveform)
    with torch.no_grad():
        prompt, audio = expanded(model, inputs)
        given = {"input_ids": prompt.input_ids, "attention_mask": prompt.attention_mask, "audio_embeds": audio}
        positions = (prompt.attention_mask.cumsum(1) - 1).clamp(min=0)
        expected = model(**given).logits
        assert close(prompt.gather(expected), model(**inputs).logits, 1e-6)
        assert torch.equal(model(**given, position_ids=positions).logits, expected)
        assert not close(model(**given, position_ids=2 * positions).logits, expected)  # they are not ignored


@every_pair
def test_half_precision(build, waveform, name):
    model, processor = build(name, fresh=True)
    inputs = prompts(processor, [[waveform(0.8)]])
    with torch.no_grad():
        expected = model(**inputs).logits
        logits = model.to(torch.bfloat16)(**inputs).logits
    assert logits.dtype == torch.bfloat16 and torch.isfinite(logits).all()
    if name.endswith("frames"):  # elsewhere rounding may change which frames are kept
        assert nn.functional.cosine_similarity(logits.float().flatten(), expected.flatten(), dim=0) > 0.98


# ---- attention implementations


@every_pair
def test_eager_equals_sdpa(build, waveform, name):
    model, processor = build(name, fresh=True)
    inputs = batch_of(processor, waveform)
    results = {}
    for implementation in ("sdpa", "eager"):
        model.set_attn_implementation(implementation)
        model.zero_grad()
        assert_dispatched(model, implementation if name.startswith("whisper") else "eager", implementation)
        logits = model(**inputs).logits[inputs["attention_mask"].bool()]
        logits.square().mean().backward()
        results[implementation] = logits.detach(), model.model.multi_modal_projector.proj_in.weight.grad.clone()
    (logits, gradient), (other_logits, other_gradient) = results.values()
    assert close(logits, other_logits) and gradient.abs().max() > 0
    assert close(gradient, other_gradient, 1e-3 * gradient.abs().max().item())


def assert_dispatched(model, audio, text):
    """What the attention layers read. WavLM computes attention in one way only, whatever its config says."""
    for part, expected in ((model.model.audio_tower, audio), (model.model.language_model, text)):
        configs = [m.config for m in part.modules() if type(m).__name__.endswith("Attention") and hasattr(m, "config")]
        assert all(config._attn_implementation == expected for config in configs)
        assert part.config._attn_implementation == expected
        assert configs or part.config.model_type == "wavlm"


@every_pair
@pytest.mark.parametrize("slim", [True, False])
def test_attention_reaches_the_parts_when_loading(build, tmp_path, name, slim):
    model, _ = build(name)
    model.save_pretrained(tmp_path, slim=slim)
    loaded = AutoModel.from_pretrained(tmp_path, attn_implementation="eager")
    assert_dispatched(loaded, "eager", "eager")
    audio, text = ("sdpa", "eager") if name.startswith("whisper") else ("eager", "sdpa")
    parts = {"": "sdpa", "text_config": text, "audio_config": audio}
    assert_dispatched(AutoModel.from_pretrained(tmp_path, attn_implementation=parts), audio, text)


# ---- training


@every_pair
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_no_gradient(build, waveform, name, reentrant):
    model, processor = build(name, fresh=True)
    inputs = batch_of(processor, waveform, "right")
    labels = labelled(processor, inputs)
    model.train()
    for module in model.modules():  # two passes must be the same
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    model.model.audio_tower.eval()
    gradients, recomputed = [], []
    count_calls = model.model.language_model.layers[0].mlp.register_forward_pre_hook(lambda *_: recomputed.append(1))
    for checkpointing in (False, True):
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        assert model.is_activation_checkpointing == checkpointing
        model.zero_grad()
        model(**inputs, labels=labels).loss.backward()
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    count_calls.remove()
    assert len(recomputed) == 3  # once, then once more for its backward pass
    plain, checkpointed = gradients
    assert plain.keys() == checkpointed.keys() and any(".language_model." in key for key in plain)
    for key, gradient in plain.items():
        assert close(gradient, checkpointed[key], 1e-5), key
    model.activation_checkpointing_disable()
    assert not model.is_activation_checkpointing


@every_pair
def test_every_weight_and_buffer_is_initialised(build, name):
    """Nothing of a model that is built from the config alone is left as allocated."""
    model, _ = build(name)
    config = copy.deepcopy(model.config)
    config.encoder_layer, config.align_spelling = "mix", {"entries": 20, "buckets": 8, "size": 4}
    broken = left_as_allocated(AudioPhiForConditionalGeneration, config)
    if name.startswith("wavlm"):  # transformers' own class does not reach its weight-normalised convolution
        prefix = "model.audio_tower.model."
        assert broken == [prefix + key for key in left_as_allocated(WavLMModel, copy.deepcopy(config.audio_config))]
        broken = [key for key in broken if ".pos_conv_embed.conv.parametrizations." not in key]
    assert not broken


def left_as_allocated(model_class, config):
    """Names of weights and buffers that `init_weights` does not reach."""
    with torch.device("meta"):
        empty = model_class(config)
    empty.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in (*empty.parameters(), *empty.buffers()):
            tensor.fill_(float("nan") if tensor.is_floating_point() else -7)
    for module in empty.modules():
        module._is_hf_initialized = False
    empty.init_weights()
    tensors = {**dict(empty.named_parameters()), **dict(empty.named_buffers())}
    return [key for key, value in tensors.items() if not torch.isfinite(value).all() or (value == -7).any()]


# ---- embeddings


@every_pair
def test_resized_embeddings(build, waveform, name):
    model, processor = build(name, fresh=True)
    inputs = prompts(processor, [[waveform(0.8)]])
    rows = model.config.text_config.vocab_size
    audio_id, vocab_ids = model.config.audio_token_id, model.model.alignment.vocab_ids.clone()
    with torch.no_grad():
        expected, heard = model(**inputs).logits, model.read_alignment(**audio_of(inputs))
    bias = None if model.lm_head.bias is None else model.lm_head.bias.clone()
    table = model.resize_token_embeddings(rows + 7, pad_to_multiple_of=8)
    size = table.num_embeddings
    assert size >= rows + 7 and size % 8 == 0 and table is model.get_input_embeddings()
    text = model.config.text_config
    assert text.vocab_size == model.model.config.text_config.vocab_size == size
    assert model.model.language_model.config.vocab_size == size
    assert model.lm_head.weight.shape[0] == model.lm_head.out_features == size
    assert (model.lm_head.weight is table.weight) == text.tie_word_embeddings
    if bias is not None:
        assert torch.equal(model.lm_head.bias[:rows], bias)
    with torch.no_grad():
        logits = model(**inputs).logits
        assert logits.shape[-1] == size and close(logits[..., :rows], expected, 1e-5)
        model(input_ids=torch.tensor([[size - 1, 1]]))
    assert model.config.audio_token_id == audio_id and torch.equal(model.model.alignment.vocab_ids, vocab_ids)
    assert model.read_alignment(**audio_of(inputs)) == heard
    loss = model(**inputs, labels=labelled(processor, inputs)).loss
    assert torch.isfinite(loss) and model.generate(**inputs, max_new_tokens=2).shape[1] > inputs["input_ids"].shape[1]
    model.resize_token_embeddings(rows)  # and back
    with torch.no_grad():
        assert close(model(**inputs).logits, expected, 1e-5)
    with pytest.raises(ValueError, match="audio placeholder"):
        model.resize_token_embeddings(audio_id)
    assert model.get_input_embeddings().num_embeddings == rows


@every_pair
def test_embeddings_are_got_set_and_tied(build, name):
    model, _ = build(name, fresh=True)
    assert model.get_input_embeddings() is model.model.get_input_embeddings()
    assert model.get_output_embeddings() is model.lm_head
    tied = model.config.tie_word_embeddings
    assert tied == (name.split("-")[1] == "llama") == (model.lm_head.weight is model.get_input_embeddings().weight)
    new = nn.Embedding(*model.get_input_embeddings().weight.shape)
    model.set_input_embeddings(new)
    assert model.model.language_model.get_input_embeddings() is new
    model.tie_weights()
    assert (model.lm_head.weight is new.weight) == tied


# ---- configs, saving and loading


@every_pair
def test_parts_share_the_configs(build, name):
    model, _ = build(name)
    assert model.model.config is model.config
    assert model.model.language_model.config is model.config.text_config
    assert model.model.audio_tower.config is model.config.audio_config
    assert model.get_decoder() is model.model.language_model and model.get_encoder("audio") is model.model.audio_tower
    assert model.base_model is model.model and model.is_backend_compatible()
    assert model.can_generate() and not model.model.can_generate()


@every_pair
@pytest.mark.parametrize("slim", [True, False])
def test_save_and_load(build, waveform, tmp_path, name, slim):
    model, processor = build(name)
    model.save_pretrained(tmp_path, slim=slim)
    inputs = batch_of(processor, waveform)
    with torch.no_grad():
        expected = model(**inputs).logits
        for arguments in ({"device_map": "cpu"}, {"low_cpu_mem_usage": True}):
            loaded, info = AutoModel.from_pretrained(tmp_path, output_loading_info=True, **arguments)
            assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
            assert torch.equal(loaded(**inputs).logits, expected) and not loaded.training
            assert loaded.state_dict().keys() == model.state_dict().keys()
    for _, tensor in model.named_parameters():
        assert tensor.is_contiguous()


@every_pair
def test_base_model_of_a_full_checkpoint(build, waveform, tmp_path, name):
    """`AudioPhiModel` is what a server loads that has its own output layer."""
    model, processor = build(name)
    model.save_pretrained(tmp_path, slim=False)
    base, info = AudioPhiModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and {key.partition(".")[0] for key in info["unexpected_keys"]} <= {"lm_head"}
    inputs = batch_of(processor, waveform)
    with torch.no_grad():
        hidden = base(**inputs).last_hidden_state
        assert close(model.compute_logits(hidden), model(**inputs).logits, 1e-5)


@every_pair
def test_built_on_the_meta_device_and_under_another_dtype(build, name):
    model, _ = build(name)
    with torch.device("meta"):
        empty = AutoModel.from_config(copy.deepcopy(model.config))
    # WavLM allocates its mask embedding by hand.
    assert all(value.is_meta for key, value in empty.named_parameters() if not key.endswith("masked_spec_embed"))
    half = AutoModel.from_config(copy.deepcopy(model.config), dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
    assert torch.get_default_dtype() == torch.float32
