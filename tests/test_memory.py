"""Memory and operations computed from configs, against what real models have, keep and do."""

import copy
from dataclasses import replace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModel, LlamaConfig, PhiConfig

import full_size
from audiophi.training.build import apply_tuning
from audiophi.training.configs import RELEASED, skeleton
from audiophi.training.flops import encoder_flops, hours, stage_flops
from audiophi.training.memory import Load, Memory, fixed_memory, saved_by_layer, sizes, training_memory
from audiophi.training.plan import parameter_table
from audiophi.training.recipe import Stage
from audiophi.training.recipe_values import build

SECONDS = 0.8  # less than a tiny LanguageBind's window
LORA = {"r": 4, "alpha": 8, "target_modules": ["q_proj", "v_proj"]}


def stage(loss, **keys):
    return build(Stage, {"name": loss, "loss": loss, "steps": 1, "batch_size": 1, **keys}, "")


def tensors(values):
    return sum(value.numel() * value.element_size() for value in values)


@pytest.mark.parametrize(
    "component, count",
    [
        ("microsoft/phi-2", 2_779_683_840 - 51_200 * 2561),  # AutoModel: without the output layer and its bias
        ("espnet/xeus", 574_121_600),
        ("LanguageBind/LanguageBind_Audio_FT", 303_523_840),
    ],
)
def test_released_sizes(component, count):
    with torch.device("meta"):
        model = AutoModel.from_config(RELEASED[component]())
    assert sum(parameter.numel() for parameter in model.parameters()) == count


@pytest.mark.parametrize("tune", [{}, {"llm": "lora"}])
def test_weights_gradients_and_adams_states_are_exact(make_tiny_model, tune):
    """Against a real step, from a model without memory."""
    model, _ = make_tiny_model(readout="collapse", align_spelling=None)
    chosen = stage("both", tune=tune, lora=LORA)
    empty = skeleton(copy.deepcopy(model.config))
    for each in (model, empty):
        apply_tuning(each, chosen)
    predicted = fixed_memory(empty)
    assert predicted.weights == tensors([*model.parameters(), *model.buffers()])
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    sum(parameter.sum() for parameter in trained).backward()
    optimizer = torch.optim.AdamW(trained)
    optimizer.step()
    assert predicted.gradients == tensors(parameter.grad for parameter in trained) > 0
    states = [
        value for state in optimizer.state.values() for value in state.values() if value.dim() or value.numel() > 1
    ]
    scalars = sum(1 for parameter in trained if not parameter.dim())  # their states look like the step counters
    assert predicted.optimizer == tensors(states) + 2 * 4 * scalars


def kept_for_backward(model, inputs):
    """Bytes of what autograd saves in a forward pass, weights not counted, each storage once."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    found = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            found[storage.data_ptr()] = (storage.nbytes(), tensor)  # held, so that its address is not used again
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(inputs_embeds=inputs, use_cache=False).last_hidden_state.sum()
    return sum(size for size, _ in found.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", [PhiConfig, LlamaConfig])
def test_what_a_frozen_decoder_keeps(family, dtype):
    """The difference of two depths is what a layer keeps."""
    shape = {"vocab_size": 50, "hidden_size": 64, "intermediate_size": 256, "num_attention_heads": 4}
    found, positions = [], 48
    for layers in (2, 4):
        config = family(**shape, num_hidden_layers=layers)
        model = AutoModel.from_config(config, dtype=dtype).eval().requires_grad_(False)
        inputs = torch.randn(1, positions, 64, dtype=dtype, requires_grad=True)
        found.append(kept_for_backward(model, inputs))
    per_layer = (found[1] - found[0]) / 2 / positions
    size = dtype.itemsize
    assert saved_by_layer(config, size, size) == pytest.approx(per_layer, rel=0.1)


@pytest.fixture(scope="module", params=["xeus", "languagebind"])
def tiny_system(request, tmp_path_factory):
    """The full-size benchmark's model and processor, tiny; (model, lm batch)."""
    recipe = full_size.make_recipe(request.param)
    config, ids = full_size.make_config(request.param, recipe, "tiny")
    folder = tmp_path_factory.mktemp(request.param)
    processor = full_size.make_processor(config, recipe, folder)
    model = full_size.build_model(config, recipe, ids, folder).float().eval()
    collator = full_size.AudioPhiCollator(processor, mode="lm")
    wave = torch.randn(round(SECONDS * 16_000)).numpy()
    return model, collator(full_size.training_items([(wave, full_size.transcript(SECONDS))], processor))


def load_of(model, batch, seconds):
    words = int((batch["labels"] != -100).sum())
    audio = sizes(model.config, Load(1, seconds)).audio
    assert int((batch["input_ids"] == model.config.audio_token_id).sum()) == 1
    assert int(model.model.adapter_lengths(batch).sum()) == audio
    return Load(1, seconds, prompt=batch["input_ids"].shape[1] - 1 - words, words=words)


def test_operations_are_torchs_own_count(tiny_system):
    model, batch = tiny_system
    load = load_of(model, batch, SECONDS)
    audio = {key: value for key, value in batch.items() if key.startswith("input_") and key != "input_ids"}
    features, mask = (value for _, value in sorted(audio.items()))
    # Fused attention on a CPU is not among what torch counts.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
        model.model.encode(features, mask)
    assert encoder_flops(model, load) == pytest.approx(counter.get_total_flops(), rel=0.1)
    chosen = stage("lm")
    apply_tuning(model, chosen)
    model.zero_grad()
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        output = model(**batch)
        output.loss.backward()
    kept = float(output.audio_counts.sum() / model.model.adapter_lengths(batch).sum())
    assert stage_flops(model, chosen, replace(load, kept=kept)) == pytest.approx(counter.get_total_flops(), rel=0.15)
    # The teacher reads the prompt without its audio.
    read = {f"teacher_{name}": batch[name][:, 1:] for name in ("input_ids", "attention_mask", "labels")}
    read["teacher_input_ids"] = read["teacher_input_ids"].masked_fill(
        read["teacher_input_ids"] == model.config.audio_token_id, 5
    )
    before = counter.get_total_flops()
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(**batch, **read).loss.backward()
    more = stage_flops(model, stage("lm", distill_weight=1.0), load) - stage_flops(model, chosen, load)
    assert more == pytest.approx(counter.get_total_flops() - before, rel=0.25)


def test_what_costs_what(tiny_system):
    """Each decision moves the part of the bill that it should, in the right direction."""
    model, batch = tiny_system
    load = load_of(model, batch, SECONDS)
    empty, small = skeleton(model.config), skeleton(model.config)
    for part in (small.model.audio_tower, small.model.language_model, small.lm_head):
        for parameter in part.parameters():
            parameter.data = parameter.data.bfloat16()

    def bill(loss="lm", load=load, empty=empty, **keys):
        chosen = stage(loss, **keys)
        apply_tuning(empty, chosen)
        return training_memory(empty, chosen, load)

    plain = bill()
    assert plain.total == plain.weights + plain.gradients + plain.optimizer + plain.activations
    assert bill("align").llm == bill("align").logits == 0 < bill("align").alignment
    checkpointed = bill(gradient_checkpointing=True)
    assert 0 < checkpointed.llm < plain.llm and replace(checkpointed, llm=plain.llm) == plain
    half = bill(empty=small)  # no float32 weights, so no copies of them
    counts = {part: count for part, count, _ in parameter_table(empty)}
    assert plain.weights - half.weights == 2 * (counts["encoder"] + counts["llm"]) and half.llm < plain.llm
    twice = bill(load=replace(load, clips=2))
    assert twice.weights == plain.weights and twice.encoder == 2 * plain.encoder and twice.logits == 2 * plain.logits
    with pytest.raises(ValueError, match="stage lm: memory is computed for"):
        training_memory(empty, stage("lm", tune={"llm": "full"}), load)
    distilled = bill(distill_weight=1.0)
    assert distilled.logits > plain.logits and replace(distilled, logits=plain.logits) == plain
    lora = bill(tune={"llm": "lora"}, lora=LORA)
    assert lora.gradients > plain.gradients and lora.llm > plain.llm


def test_units():
    assert Memory(weights=2**30, encoder=2**29).gigabytes()["total"] == 1.5
    assert hours(3600e12, teraflops=10, utilisation=0.5) == pytest.approx(0.2)
    assert hours(3600e12, teraflops=10, utilisation=0.5, devices=2) == pytest.approx(0.1)
