"""Runs of recipes on tiny random components: 16 short clips, seconds on one thread."""

import json
import os
from pathlib import Path

import pytest
import soundfile
import torch
from safetensors.torch import load_file

from audiophi.training.recipe import recipe_from_dict
from audiophi.training.stages import run_recipe

ROOT = Path(__file__).resolve().parents[1]
TEXTS = [
    "the quick brown fox",
    "she sells sea shells",
    "runs away from the bear",
    "it was the best of times",
    "a lazy dog",
]
ALIGN = {"name": "align", "loss": "align", "steps": 6, "batch_size": 4, "learning_rate": 1e-3, "warmup": 0.0}
LM = {"name": "lm", "loss": "lm", "steps": 4, "batch_size": 4, "tune": {"llm": "lora"}, "lora": {"r": 2, "alpha": 4}}
# Of train.py in processes of its own.
ENVIRONMENT = {
    **os.environ,
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "PYTHONPATH": str(ROOT),
    "CUDA_VISIBLE_DEVICES": "",
    "ACCELERATE_USE_CPU": "true",
}


@pytest.fixture(scope="session")
def speech(tmp_path_factory, waveform):
    """A manifest of 16 short clips."""
    folder = tmp_path_factory.mktemp("speech")
    with open(folder / "metadata.jsonl", "w") as manifest:
        for i in range(16):
            soundfile.write(folder / f"{i}.wav", waveform(0.8 + 0.15 * (i % 9), i), 16000)
            row = {"audio": f"{i}.wav", "text": TEXTS[i % len(TEXTS)], "id": f"clip{i}", "speaker": str(i % 4)}
            manifest.write(json.dumps(row) + "\n")
    return folder


@pytest.fixture
def settings(tmp_path, speech, tiny_whisper_dir, tiny_llm_dir):
    """make(*stages, **keys) -> a recipe's plain data."""

    def make(*stages, **keys):
        return {
            "name": "tiny",
            "components": {"audio": tiny_whisper_dir, "text": tiny_llm_dir},
            "adapter": {"type": "conv_mlp", "stack": 2, "hidden_size": 32, "kernel_size": 3, "num_layers": 1},
            "readout": "collapse",
            "alignment": {"merges": 20},
            "data": {"train": [{"path": str(speech)}]},
            "stages": list(stages),
            "cache_dir": str(tmp_path / "cache"),
            "cache_dtype": "float32",
            "output_dir": str(tmp_path / "out"),
            "evaluation": {"clips": 4, "max_new_tokens": 5},
            "logging_steps": 2,
            "report_to": [],
            **keys,
        }

    return make


def train(settings) -> dict[str, torch.Tensor]:
    """Runs a recipe; the final weights."""
    return load_file(run_recipe(recipe_from_dict(settings)) / "model.safetensors")


def largest_difference(first, second):
    assert first.keys() == second.keys()
    return max(float((first[key].float() - second[key].float()).abs().max()) for key in first)
