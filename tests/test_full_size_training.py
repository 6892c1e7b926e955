"""What training needs where models are large and GPUs many: one GPU of several, precision, memory."""

import json
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from transformers.models.llama.modeling_llama import LlamaMLP

from audiophi.training import precision, stages
from audiophi.training.recipe import RecipeError, recipe_from_dict
from audiophi.training.trainer import AudioPhiTrainer
from modeling_audiophi.adapter_conv_mlp import ConvMLPAdapter
from tests.conftest import save_llama
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


def test_precision_and_checkpointing_end_with_their_stage(settings, tmp_path, computed):
    """The second stage computes as it would in a run that is taken up there."""
    first = {**LM, "steps": 2, "precision": "bf16", "gradient_checkpointing": True, "noise": 0.1}
    second = {**LM, "name": "more", "steps": 2}
    in_one_go = train(settings(first, second, cache=False, output_dir=str(tmp_path / "one")))
    assert computed[-1] == torch.float32 and computed.count(torch.float32) >= 2
    train(settings(first, cache=False, output_dir=str(tmp_path / "two")))
    in_two = train(settings(first, second, cache=False, output_dir=str(tmp_path / "two")))
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
