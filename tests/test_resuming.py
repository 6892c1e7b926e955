"""A run that is stopped, damaged or out of disk space goes on where it was, to the same weights. In this process; with
processes that are really killed: test_faults.py."""

import os
import resource
import shutil
import signal

import pytest
import torch

from audiophi.training.callbacks import StageCallback
from audiophi.training.checkpoints import (
    DamagedModel,
    SaveError,
    checkpoint_damage,
    complete_checkpoints,
    read_marker,
    seal,
)
from audiophi.training.signals import Interrupted
from tests.tiny_runs import ALIGN, LM, largest_difference, train

STAGES = (
    {**ALIGN, "steps": 6, "save_steps": 2, "noise": 0.2},
    {**LM, "steps": 5, "save_steps": 2, "lora": {"r": 2, "dropout": 0.1}},
)


@pytest.fixture
def at_step(monkeypatch):
    """at_step(stage, step, do): calls `do()` when that step begins, once."""
    begin, waiting = StageCallback.on_step_begin, {}

    def on_step_begin(self, args, state, control, **kwargs):
        begin(self, args, state, control, **kwargs)
        if do := waiting.pop((self.stage.name, state.global_step + 1), None):
            do()

    monkeypatch.setattr(StageCallback, "on_step_begin", on_step_begin)
    return lambda stage, step, do: waiting.update({(stage, step): do})


def send(number):
    return lambda: os.kill(os.getpid(), number)


def flip_a_byte(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut_short(path):
    path.write_bytes(path.read_bytes()[:-100])


def test_a_schedulers_signal_saves_and_the_run_continues_bit_for_bit(settings, tmp_path, at_step, capfd):
    straight = train(settings(*STAGES, output_dir=str(tmp_path / "straight")))
    stopped = settings(*STAGES)
    before = signal.getsignal(signal.SIGTERM)
    at_step("align", 3, send(signal.SIGTERM))
    with pytest.raises(Interrupted, match="SIGTERM") as stop:
        train(stopped)
    assert stop.value.code == 85 and signal.getsignal(signal.SIGTERM) is before
    out = tmp_path / "out"
    assert [path.name for path in complete_checkpoints(out / "align")] == ["checkpoint-3", "checkpoint-2"]
    assert "SIGTERM: saving a checkpoint after this step" in capfd.readouterr().err
    at_step("lm", 2, send(signal.SIGUSR1))
    with pytest.raises(Interrupted, match="SIGUSR1"):
        train(stopped)
    assert "resuming at step 3" in capfd.readouterr().out
    at_step("lm", 5, send(signal.SIGTERM))  # the last step: the stage is finished first
    with pytest.raises(Interrupted):
        train(stopped)
    assert (out / "lm" / "stage.json").exists() and not complete_checkpoints(out / "lm")
    assert largest_difference(straight, train(stopped)) == 0


def test_a_signal_before_the_training_stops_at_once(settings, monkeypatch):
    from audiophi.training import stages

    def prepare(*arguments):
        os.kill(os.getpid(), signal.SIGTERM)
        raise AssertionError("the run went on")

    monkeypatch.setattr(stages, "prepare", prepare)
    with pytest.raises(Interrupted):
        train(settings(ALIGN))


def test_damaged_checkpoints_are_noticed_and_the_one_before_is_used(settings, tmp_path, at_step, capsys):
    stage = {**STAGES[0], "steps": 8}
    straight = train(settings(stage, output_dir=str(tmp_path / "straight")))
    stopped = settings(stage)
    at_step("align", 5, send(signal.SIGTERM))
    with pytest.raises(Interrupted):
        train(stopped)
    out, saved = tmp_path / "out", tmp_path / "saved"
    shutil.copytree(out, saved)
    newest, older = (out / "align" / f"checkpoint-{step}" for step in (5, 4))
    damages = {
        "trainable.safetensors is not what was written": lambda: flip_a_byte(newest / "trainable.safetensors"),
        "optimizer.pt has": lambda: cut_short(newest / "optimizer.pt"),
    }
    for wrong, do in damages.items():
        shutil.rmtree(out)
        shutil.copytree(saved, out)
        do()
        resumed = train(stopped)
        said = capsys.readouterr().out
        assert f"checkpoint-5 is damaged: {wrong}" in said and "trying the one before it, checkpoint-4" in said
        assert "resuming at step 4" in said and largest_difference(straight, resumed) == 0
        assert not list((out / "align").glob("*checkpoint*")), "a finished stage keeps no checkpoints"
    shutil.rmtree(out)
    shutil.copytree(saved, out)
    for checkpoint in (newest, older):
        flip_a_byte(checkpoint / "trainable.safetensors")
    assert largest_difference(straight, train(stopped)) == 0
    assert "there is no other, so the stage starts again" in capsys.readouterr().out


def test_a_damaged_finished_stage_is_not_built_upon(settings, tmp_path):
    train(settings(ALIGN))
    flip_a_byte(tmp_path / "out" / "align" / "model" / "model.safetensors")
    with pytest.raises(DamagedModel, match=r"align/model is damaged: model.safetensors is not what was written"):
        train(settings(ALIGN, LM))


def test_every_kind_of_damage_is_told(tmp_path):
    checkpoint = tmp_path / "checkpoint-1"
    checkpoint.mkdir()
    for name in ("a", "b", "c"):
        (checkpoint / name).write_bytes(bytes(200))
    (checkpoint / "complete").write_text("12.5")  # as they were written before there were checksums
    assert checkpoint_damage(checkpoint) is None
    seal(checkpoint, 12.5)
    assert checkpoint_damage(checkpoint) is None and read_marker(checkpoint)["seconds"] == 12.5
    flip_a_byte(checkpoint / "c")
    assert checkpoint_damage(checkpoint).startswith("c is not what was written")
    cut_short(checkpoint / "b")
    assert checkpoint_damage(checkpoint).startswith("b has 100 bytes, 200 were written")
    (checkpoint / "a").unlink()
    assert checkpoint_damage(checkpoint) == "a is missing"
    cut_short(checkpoint / "complete")
    assert checkpoint_damage(checkpoint) == "complete cannot be read"


def test_a_full_disk_costs_no_more_than_the_steps_since_the_last_checkpoint(settings, tmp_path, at_step):
    """A limit on the size of files stands in for the full disk: the system refuses to write in the same way."""
    stage = STAGES[0]
    straight = train(settings(stage, output_dir=str(tmp_path / "straight")))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    out = tmp_path / "out"
    try:
        at_step("align", 3, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1])))
        with pytest.raises(SaveError) as failure:
            train(settings(stage))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    message = str(failure.value)
    assert f"cannot save {out / 'align' / 'checkpoint-4'}: " in message
    assert (
        f"last complete checkpoint, {out / 'align' / 'checkpoint-2'}" in message and "run the same command" in message
    )
    assert not (out / "align" / "checkpoint-4").exists()
    assert checkpoint_damage(out / "align" / "checkpoint-2") is None
    assert largest_difference(straight, train(settings(stage))) == 0


def test_checkpoints_are_also_saved_by_the_clock(settings, tmp_path, at_step):
    at_step("align", 4, send(signal.SIGTERM))
    with pytest.raises(Interrupted):
        train(settings({**ALIGN, "save_minutes": 1e-9}))
    steps = [path.name for path in complete_checkpoints(tmp_path / "out" / "align")]
    assert steps == ["checkpoint-4", "checkpoint-3"], "not one at every step, of which two are kept"


@pytest.mark.faults
def test_the_same_seed_gives_the_same_weights(settings, tmp_path):
    augmented = {"noise": 0.3, "spec_augment": {"time_masks": 4.0, "time_width": 5}}
    stages = ({**ALIGN, **augmented}, {**LM, **augmented, "lora": {"r": 2, "dropout": 0.1}})
    data = {**settings()["data"], "speeds": [0.9, 1.0, 1.1]}
    first, again, other = (
        train(settings(*stages, data=data, seed=seed, output_dir=str(tmp_path / name)))
        for name, seed in (("first", 3), ("again", 3), ("other", 4))
    )
    assert largest_difference(first, again) == 0 and largest_difference(first, other) > 1e-4


@pytest.mark.parametrize("loss", [pytest.param("align", marks=pytest.mark.faults), "both"])
def test_gradients_do_not_depend_on_how_a_step_is_split(settings, tmp_path, monkeypatch, loss):
    """Batch size x accumulation of 8: the first step's gradients differ by float32 rounding, 1e-5 of their norm."""
    from audiophi.training.trainer import AudioPhiTrainer

    gradients = {}
    judge = AudioPhiTrainer._agree

    def keep(self, norm):  # clipped already, so give no limit that clips
        gradients[split] = {n: p.grad.clone() for n, p in self.model.named_parameters() if p.grad is not None}
        return judge(self, norm)

    monkeypatch.setattr(AudioPhiTrainer, "_agree", keep)
    tune = {"llm": "frozen" if loss == "align" else "full"}
    stage = {**LM, "loss": loss, "tune": tune, "steps": 1, "max_grad_norm": 1e9}
    adapter = {**settings()["adapter"], "dropout": 0.0}
    for split in (8, 4, 2, 1):
        sizes = {"batch_size": split, "grad_accum": 8 // split}
        train(settings({**stage, **sizes}, adapter=adapter, output_dir=str(tmp_path / str(split))))
    norm = torch.stack([g.square().sum() for g in gradients[8].values()]).sum().sqrt()
    assert norm > 0
    for split in (4, 2, 1):
        assert gradients[split].keys() == gradients[8].keys()
        squares = [(gradients[split][n] - g).square().sum() for n, g in gradients[8].items()]
        assert torch.stack(squares).sum().sqrt() < 1e-5 * norm
