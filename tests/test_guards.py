"""A loss that is not a number, or has risen for good, stops a stage and leaves its batch behind; a healthy one does
not."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from audiophi.training.checkpoints import checkpoint_damage, complete_checkpoints
from audiophi.training.guards import FP16_SKIPPED_STEPS, LossGuard, UnhealthyLoss
from audiophi.training.recipe import Stage
from tests.tiny_runs import ALIGN, LM, train


def guard(tmp_path, precision="fp32", **stage):
    stage = Stage(name="lm", loss="lm", steps=1, batch_size=1, **stage)
    return LossGuard(tmp_path, stage, precision, 0, lambda epoch, number: {"row": number})


@pytest.mark.parametrize("stage", [ALIGN, LM])
def test_a_loss_that_is_not_finite_stops_the_stage_and_keeps_its_batch(settings, tmp_path, stage):
    rate = {"learning_rate": 1e30, "llm_learning_rate": 1e30, "warmup": 0.0, "schedule": "constant_with_warmup"}
    with pytest.raises(UnhealthyLoss) as failure:
        train(settings({**stage, **rate, "steps": 20, "save_steps": 1, "grad_accum": 2, "batch_size": 2}))
    folder = tmp_path / "out" / stage["name"]
    (kept,) = folder.glob("stopped-at-step-*")
    step = int(kept.name.rpartition("-")[2])
    message = str(failure.value)
    assert str(kept) in message and "learning rate that is too high" in message and "1e+30" in message
    last = complete_checkpoints(folder)[0]
    assert last.name == f"checkpoint-{step - 1}" and checkpoint_damage(last) is None and str(last) in message
    report = json.loads((kept / "rank0.json").read_text())
    assert report["step"] == step and report["micro_batches"] and report["learning_rates"]["adapter"] == 1e30
    for micro_batch in report["micro_batches"]:
        tensors = load_file(kept / micro_batch["file"])
        rows = micro_batch["rows"]
        assert len(rows) == 2 == len(tensors["audio_num_windows"])
        for row in rows:
            assert row["id"].startswith("clip") and Path(row["audio"]).exists() and row["text"]


def test_rows_with_inputs_that_are_not_finite_are_named(tmp_path):
    watch = guard(tmp_path)
    model = torch.nn.Linear(2, 2)
    watch.batches = [
        {"input_features": torch.ones(1, 2), "drawn": [(0, 5)]},
        {"input_features": torch.tensor([[1.0, math.nan]]), "drawn": [(0, 7)]},
    ]
    reason = watch.judge(math.nan, math.nan)
    failure = watch.failure(reason, 12, [0.5, math.nan], model, {"adapter": 1e-3})
    assert "the loss is nan" in str(failure) and "inputs are not finite" in str(failure)
    (micro_batch,) = json.loads((tmp_path / "stopped-at-step-12" / "rank0.json").read_text())["micro_batches"]
    assert micro_batch["rows"] == [{"row": 7}] and micro_batch["inputs_not_finite"] == ["input_features"]
    assert math.isnan(load_file(tmp_path / "stopped-at-step-12" / micro_batch["file"])["input_features"][0, 1])


def test_gradients_that_overflow_in_fp16_are_its_loss_scalings_business(tmp_path):
    assert "gradient's norm is inf" in guard(tmp_path).judge(1.0, math.inf)
    watch = guard(tmp_path, "fp16")
    for _ in range(3):
        assert not any(watch.judge(1.0, math.inf) for _ in range(FP16_SKIPPED_STEPS - 1))
        assert watch.judge(1.0, 1.0) is None
    reasons = [watch.judge(1.0, math.inf) for _ in range(FP16_SKIPPED_STEPS)]
    assert not any(reasons[:-1]) and "20 steps in a row" in reasons[-1]
    assert "the loss is nan" in watch.judge(math.nan, 1.0)


def test_a_loss_that_rises_for_good_stops_the_stage(tmp_path):
    falling = [5 * 0.99**step for step in range(300)]
    watch, off = guard(tmp_path), guard(tmp_path, max_loss_rise=None)
    assert not any(watch.judge(loss, 1.0) or off.judge(loss, 1.0) for loss in falling)
    reasons = [watch.judge(9.0, 1.0) for _ in range(20)]
    assert not any(reasons[:-1]) and "max_loss_rise: 10" in reasons[-1]
    assert not any(off.judge(9.0, 1.0) for _ in range(1000))


def test_healthy_runs_are_not_stopped(tmp_path):
    """Heavy-tailed losses, a fifth of the batches 30 times as costly, spikes of 15 steps, a restart at a higher level,
    a loss near zero."""
    random = np.random.default_rng(0)
    trend = np.linspace(4, 0.3, 20_000)
    mixture = trend * random.lognormal(0, 0.8, 20_000) * np.where(random.random(20_000) < 0.2, 30, 1)
    spikes = np.where(np.arange(20_000) % 400 < 15, 50 * trend, trend)
    memorised = np.where(np.arange(2_000) > 1_000, 0.05, 1e-4)
    restarted = np.concatenate([trend, np.full(2_000, 8 * trend[-1])])
    for losses in (mixture, spikes, memorised, restarted):
        watch = guard(tmp_path)
        assert not any(watch.judge(loss, 1.0) for loss in losses.tolist())
