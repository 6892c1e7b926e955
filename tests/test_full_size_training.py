"""What training needs where models are large and GPUs many: one GPU of several, precision, memory."""

import json
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from transformers.models.llama.modeling_llama import LlamaMLP

from audiophi.training import precision, stages
from audiophi.training.build import apply_tuning, part_of, set_frozen_dtype
from audiophi.training.recipe import RecipeError, recipe_from_dict
from audiophi.training.trainer import AudioPhiTrainer
from modeling_audiophi import AudioPhiForConditionalGeneration
from modeling_audiophi.adapter_conv_mlp import ConvMLPAdapter
from tests.conftest import prompts, save_llama
from tests.tiny_runs import ALIGN, LM, largest_difference, train


def test_one_gpu_of_several_is_used_without_a_launcher(settings, tmp_path, monkeypatch, capsys):
    recipe = recipe_from_dict(settings(ALIGN))
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    arguments = stages.training_arguments(recipe, recipe.stages[0], 0, tmp_path)
    assert arguments.n_gpu == 1 and arguments.train_batch_size == 4
    assert "`accelerate launch train.py RECIPE` uses all 2" in capsys.readouterr().out


@pytest.fixture
def computed(monkeypatch):
    """What the adapter computes in, call after call; a CPU without bf16 emulates it."""
    monkeypatch.setattr(precision, "cpu_multiplies_bf16", lambda: True)
    dtypes, forward = [], ConvMLPAdapter.forward

    def recorded(self, *arguments):
        tokens, mask = forward(self, *arguments)
        dtypes.append(tokens.dtype)
        return tokens, mask

    monkeypatch.setattr(ConvMLPAdapter, "forward", recorded)
    return dtypes


def test_a_stage_is_measured_in_its_precision(settings, computed):
    train(settings({**ALIGN, "steps": 1, "precision": "bf16"}))
    assert len(computed) > 2 and set(computed) == {torch.bfloat16}


@pytest.mark.parametrize("keys", ["batch_size 4", "batch_seconds 9 batch_tokens 50"])
def test_too_little_memory_names_the_keys_that_bound_a_batch(settings, monkeypatch, keys):
    def no_memory(self, batch):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")

    monkeypatch.setattr(AudioPhiTrainer, "measure_loss", no_memory)
    names = keys.split()
    bounds = dict(zip(names[::2], map(int, names[1::2]), strict=True))
    stage = {key: value for key, value in ALIGN.items() if key != "batch_size"} | bounds
    with pytest.raises(RecipeError, match="stage align: memory.*gradient_checkpointing: true") as raised:
        train(settings(stage))
    assert all(f"{name} ({value})" in str(raised.value) for name, value in bounds.items())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_precision_and_checkpointing_end_with_their_stage(settings, tmp_path, computed, precision):
    """The second stage computes as it would in a run that is taken up there."""
    first = {**LM, "steps": 2, "precision": "bf16", "gradient_checkpointing": True, "noise": 0.1}
    second = {**LM, "name": "more", "steps": 2, "precision": precision}
    keys = {"cache": False, "frozen_dtype": "float32"}  # auto depends on all stages, of which the run at first has one
    in_one_go = train(settings(first, second, output_dir=str(tmp_path / "one"), **keys))
    assert computed[-2:] == [torch.float32 if precision == "fp32" else torch.bfloat16] * 2
    train(settings(first, output_dir=str(tmp_path / "two"), **keys))
    in_two = train(settings(first, second, output_dir=str(tmp_path / "two"), **keys))
    assert largest_difference(in_one_go, in_two) == 0


def history(folder, key):
    return [entry[key] for entry in map(json.loads, Path(folder, "history.jsonl").open()) if key in entry]


def test_checkpointing_leaves_frozen_parts_without_dropout(settings, tiny_whisper_dir, tmp_path, monkeypatch):
    text = save_llama(tmp_path / "llm", attention_dropout=0.5)
    ran, forward = [], LlamaMLP.forward
    monkeypatch.setattr(LlamaMLP, "forward", lambda self, hidden: ran.append(1) or forward(self, hidden))
    stage = {**LM, "tune": {"llm": "frozen"}, "steps": 2}
    components = {"audio": tiny_whisper_dir, "text": text}
    plain = train(settings(stage, components=components, output_dir=str(tmp_path / "plain")))
    once = len(ran)
    stage["gradient_checkpointing"] = True
    checkpointed = train(settings(stage, components=components, output_dir=str(tmp_path / "checkpointed")))
    assert largest_difference(plain, checkpointed) < 1e-6 and len(ran) - once == 2 * once


def test_logged_norms_are_of_unscaled_gradients(settings, tmp_path, monkeypatch):
    """As with fp16, whose losses are scaled (there is no fp16 without a GPU)."""
    train(settings({**ALIGN, "steps": 2}, output_dir=str(tmp_path / "plain")))
    backward = Accelerator.backward

    def unscale(self, optimizer=None):
        for parameter in self._models[0].parameters():
            if parameter.grad is not None:
                parameter.grad /= 1024

    monkeypatch.setattr(Accelerator, "backward", lambda self, loss, **keys: backward(self, 1024 * loss, **keys))
    monkeypatch.setattr(Accelerator, "unscale_gradients", unscale)
    train(settings({**ALIGN, "steps": 2}, output_dir=str(tmp_path / "scaled")))
    for key in ("grad_norm_adapter", "grad_norm"):
        norms = [history(tmp_path / name, key) for name in ("plain", "scaled")]
        assert norms[0] and norms[0] == pytest.approx(norms[1], rel=1e-4)


@pytest.fixture
def finished(monkeypatch):
    """The models of the stages that finish from now on."""
    models, finish_stage = [], stages.finish_stage
    monkeypatch.setattr(stages, "finish_stage", lambda run, *rest: models.append(run.model) or finish_stage(run, *rest))
    return models


HALF = {"frozen_dtype": "bfloat16", "cache": False}


def dtypes_are_right(model):
    for name, parameter in model.named_parameters():
        frozen = part_of(name) != "adapter" and ".lora_" not in name
        assert parameter.dtype == (torch.bfloat16 if frozen else torch.float32), name
    return True


@pytest.mark.parametrize("readout", ["frames", "collapse", "mixed"])
def test_frozen_weights_in_bfloat16_give_the_same_losses(settings, make_tiny_model, waveform, readout):
    """LoRA and all that is new are in float32, get gradients, and hear and read nearly the same."""
    stage = {**LM, "loss": "both"}
    recipe = recipe_from_dict(settings(stage, **HALF))
    model, processor = make_tiny_model(readout=readout, clip_tokens=2)
    waves = [waveform(1.0, 1), waveform(1.5, 2)]
    inputs = prompts(processor, [[wave] for wave in waves], side="right")
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] == model.config.audio_token_id, -100)
    inputs |= {"labels": labels, "align_labels": torch.tensor([[20, 30], [40, 50]])}
    if readout == "mixed":
        inputs["sound_labels"] = torch.tensor([[20, -100], [40, 60]])
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        set_frozen_dtype(model, recipe, dtype)
        apply_tuning(model, recipe.stages[0])
        found[dtype] = model(**inputs)
        with torch.autocast("cpu", torch.bfloat16):
            under_autocast = model(**inputs).loss
        assert under_autocast.item() == pytest.approx(found[dtype].loss.item(), rel=0.02)
    assert dtypes_are_right(model)
    for key in ("lm_loss", "align_loss"):
        whole, half = (outputs[key].item() for outputs in found.values())
        assert half == pytest.approx(whole, rel=0.02) and half != whole
    found[torch.bfloat16].loss.backward()
    gradients = {
        n: p.grad for n, p in model.named_parameters() if "lora_B" in n or n.endswith("projector.proj_in.weight")
    }
    assert len(gradients) > 2 and all(grad.abs().max() > 0 for grad in gradients.values())


def test_frozen_weights_in_bfloat16_where_a_run_is_taken_up(settings, speech, tmp_path, computed, finished):
    stage = {**LM, "loss": "both", "steps": 2, "precision": "bf16"}
    more = {**stage, "name": "more", "tune": {"adapter": "full"}}
    data = {"train": [{"path": str(speech)}], "eval": [{"path": str(speech), "limit": 1}]}
    in_one_go = train(settings(stage, more, output_dir=str(tmp_path / "one"), data=data, **HALF))
    train(settings(stage, output_dir=str(tmp_path / "two"), data=data, **HALF))
    in_two = train(settings(stage, more, output_dir=str(tmp_path / "two"), data=data, **HALF))
    assert largest_difference(in_one_go, in_two) == 0
    assert len(finished) == 4 and all(dtypes_are_right(model) for model in finished)
    assert {value.dtype for value in in_two.values() if value.is_floating_point()} == {torch.float32}
    model = AudioPhiForConditionalGeneration.from_pretrained(tmp_path / "two" / "final")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_what_is_or_will_be_tuned_in_full_is_not_rounded(settings, finished):
    full = {**ALIGN, "name": "full", "loss": "both", "steps": 1, "tune": {"llm": "full"}}
    train(settings({**ALIGN, "steps": 1}, full, **HALF))
    for model in finished:
        for name, parameter in model.named_parameters():
            assert parameter.dtype == (torch.bfloat16 if part_of(name) == "encoder" else torch.float32), name


def test_where_frozen_weights_are_rounded_unasked(settings, monkeypatch):
    def chosen(*precisions, **keys):
        made = [{**ALIGN, "name": f"stage{i}", "precision": value} for i, value in enumerate(precisions)]
        return precision.frozen_dtype(recipe_from_dict(settings(*made, **keys)))

    for instructions, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(precision, "cpu_multiplies_bf16", lambda found=instructions: found)
        assert chosen("bf16") == dtype and chosen("fp32") == torch.float32
    assert chosen("fp32", frozen_dtype="bfloat16") == torch.bfloat16
    monkeypatch.setattr(precision, "training_device", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    assert chosen("bf16", "bf16") == torch.bfloat16
    assert chosen("bf16", "fp32") == chosen("bf16", frozen_dtype="float32") == torch.float32
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla T4")
    assert chosen("bf16") == torch.float32
    with pytest.raises(RecipeError, match="stages.0.precision: fp16.*frozen_dtype"):
        chosen("fp16", frozen_dtype="bfloat16")
