"""What training needs where models are large and GPUs many: one GPU of several, precision, memory."""

import torch

from audiophi.training import stages
from audiophi.training.recipe import recipe_from_dict
from tests.tiny_runs import ALIGN


def test_one_gpu_of_several_is_used_without_a_launcher(settings, tmp_path, monkeypatch, capsys):
    recipe = recipe_from_dict(settings(ALIGN))
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    arguments = stages.training_arguments(recipe, recipe.stages[0], 0, tmp_path)
    assert arguments.n_gpu == 1 and arguments.train_batch_size == 4
    assert "`accelerate launch train.py RECIPE` uses all 2" in capsys.readouterr().out
