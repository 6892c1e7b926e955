"""What training needs where models are large and GPUs many: one GPU of several, precision, memory."""

import pytest
import torch

from audiophi.training import precision, stages
from audiophi.training.recipe import RecipeError, recipe_from_dict
from audiophi.training.trainer import AudioPhiTrainer
from modeling_audiophi.adapter_conv_mlp import ConvMLPAdapter
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
