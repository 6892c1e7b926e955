"""The arithmetic of a stage: bf16 only where the machine multiplies it."""

import pytest
import torch

from audiophi.training import precision


@pytest.mark.parametrize("wanted", ["fp32", "fp16"])
def test_other_precisions_are_left_alone(wanted, monkeypatch):
    monkeypatch.setattr(precision, "cpu_multiplies_bf16", lambda: False)
    assert precision.fast_precision(wanted, "cpu") == (wanted, None)


def test_bf16_becomes_fp32_on_a_cpu_that_does_not_multiply_it(monkeypatch):
    monkeypatch.setattr(precision, "cpu_multiplies_bf16", lambda: False)
    used, why = precision.fast_precision("bf16", "cpu")
    assert used == "fp32" and "CPU" in why
    monkeypatch.setattr(precision, "cpu_multiplies_bf16", lambda: True)
    assert precision.fast_precision("bf16", "cpu") == ("bf16", None)


def test_bf16_becomes_fp32_on_a_gpu_that_emulates_it(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla T4")
    used, why = precision.fast_precision("bf16", "cuda")
    assert used == "fp32" and "Tesla T4" in why
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    assert precision.fast_precision("bf16", "cuda") == ("bf16", None)


def test_the_cpu_answers_for_itself():
    assert isinstance(precision.cpu_multiplies_bf16(), bool)
