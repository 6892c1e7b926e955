"""The full-size proof and the plan for GPUs, at tiny size: the same code, in seconds."""

import json

import pytest
import torch

import full_size
import plan_gpus
from audiophi.training.recipe import RecipeError


@pytest.mark.parametrize("encoder", ["xeus", "languagebind"])
def test_it_builds_trains_generates_and_is_as_large_as_computed(encoder):
    found = full_size.prove(encoder, "tiny", seconds=1.5, new_tokens=3)
    assert set(found["phases"]) == set(full_size.PHASES)
    for phase in found["phases"].values():
        assert phase["seconds"] > 0 and phase["peak"] > 0 and phase["predicted"] > found["before"]
    assert found["phases"]["align"]["loss"] > 0 and found["phases"]["lm"]["loss"] > 0
    assert found["generated_tokens"] == 3
    weights = found["phases"]["generate"]["predicted_parts"]["weights"]
    assert weights == round(found["stored_bytes"] / 2**30, 3)
    rows = full_size.table([found]).splitlines()
    assert len(rows) == 2 + len(full_size.PHASES) and rows[2].startswith(f"| {encoder} | build | ")


def test_weights_are_bfloat16_and_what_is_trained_is_not(tmp_path):
    recipe = full_size.make_recipe("xeus")
    config, ids = full_size.make_config("xeus", recipe, "tiny")
    full_size.make_processor(config, recipe, tmp_path)
    model = full_size.build_model(config, recipe, ids, tmp_path)
    dtypes = {
        name: {parameter.dtype for parameter in part.parameters()}
        for name, part in {"frozen": model.model.audio_tower, "llm": model.model.language_model}.items()
    }
    assert dtypes == {"frozen": {torch.bfloat16}, "llm": {torch.bfloat16}}
    assert {p.dtype for p in model.model.multi_modal_projector.parameters()} == {torch.float32}
    # What from_pretrained cannot know is not left as it was found in memory.
    rotary = model.model.language_model.rotary_emb.inv_freq
    assert rotary[0] == 1 and torch.isfinite(rotary).all() and (rotary.diff() < 0).all()
    full = full_size.recipe_config(recipe, 300)
    assert full.text_config.hidden_size == 2560 and full.lm_head_bias and full.encoder_layer == -1


def test_a_step_that_changes_nothing_is_no_proof(tmp_path, monkeypatch):
    recipe = full_size.make_recipe("languagebind")
    config, ids = full_size.make_config("languagebind", recipe, "tiny")
    processor = full_size.make_processor(config, recipe, tmp_path)
    model = full_size.build_model(config, recipe, ids, tmp_path)
    items = full_size.training_items([(torch.randn(16_000).numpy(), "a dog")], processor)
    batch = full_size.AudioPhiCollator(processor)(items)
    stage = full_size.Stage(name="lm", loss="lm", steps=1, batch_size=1)
    assert full_size.train_step(model, stage, batch) > 0
    readout = model.model.readout
    monkeypatch.setattr(readout, "forward", lambda tokens, *rest: (readout.norm(tokens.detach()), None))
    with pytest.raises(RuntimeError, match="lm: .*the adapter did not change"):
        full_size.train_step(model, stage, batch)


def test_children_that_fail_are_said(tmp_path, monkeypatch, capfd):
    written = tmp_path / "results.json"

    class Done:
        returncode = -9

    monkeypatch.setattr(full_size.subprocess, "run", lambda command: Done)
    assert full_size.main(["--scale", "tiny", "--output", str(written)]) == 1
    assert "xeus: the process ended with -9" in capfd.readouterr().err and not written.exists()

    def child(command):
        arguments = command[command.index("--encoder") :]
        assert full_size.main(arguments) == 0
        return type("Done", (), {"returncode": 0})

    monkeypatch.setattr(full_size.subprocess, "run", child)
    arguments = ["--encoder", "languagebind", "--scale", "tiny", "--seconds", "1", "--new_tokens", "2"]
    assert full_size.main([*arguments, "--output", str(written)]) == 0
    assert "| languagebind | lm | " in capfd.readouterr().out
    assert json.loads(written.read_text())[0]["encoder"] == "languagebind"


# ---- the plan


def test_largest_batch_is_the_last_that_fits():
    assert [plan_gpus.largest_batch(lambda clips: 10 + 3 * clips, limit) for limit in (12, 13, 16, 100)] == [
        0,
        1,
        2,
        30,
    ]


def test_recommended_batches_keep_the_effective_one():
    stage = full_size.Stage(name="a", loss="align", steps=1, batch_seconds=200, grad_accum=4)
    for largest, devices, expected in [(44, 1, (440, 400, 2)), (300, 1, (3000, 800, 1)), (300, 8, (3000, 100, 1))]:
        limit, batch, accumulated = expected
        found = plan_gpus.recommended(stage, largest, 10.0, devices)
        assert found == (f"batch_seconds {limit}", f"batch_seconds {batch}, grad_accum {accumulated}")
    assert plan_gpus.recommended(stage, 0, 10.0, 1) == ("does not fit", "-")


def test_the_clotho_recipe_has_a_plan(monkeypatch, capsys):
    recipe = "recipes/phi2_languagebind_clotho.yaml"
    assert plan_gpus.main([str(full_size.ROOT / recipe)]) == 0
    out = capsys.readouterr().out
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in out.splitlines() if line.startswith("| ")]
    assert [row[0] for row in rows[1:]] == ["adapter"] * 3 + ["lora"] * 3
    for row in rows[1:]:
        weights, trained, activations, total = map(float, row[2:6])
        assert abs(weights + trained + activations - total) < 0.2 and 6.2 < weights < 6.5, "Phi-2 in bfloat16"
    one, eight = float(rows[2][8]), float(rows[3][8])
    assert one == pytest.approx(8 * eight, abs=0.5) and float(rows[1][8]) > one
    assert "batch_size 2," in rows[3][7], "sixteen clips on eight devices"
    monkeypatch.setattr(plan_gpus, "skeleton", lambda config: pytest.fail("nothing is built for an unknown set"))
    assert plan_gpus.main([str(full_size.ROOT / recipe), "--data.train", "[{path: mine}]"]) == 1
    assert "sizes of mine are not known" in capsys.readouterr().err


def test_what_does_not_fit_is_said():
    recipe = full_size.load_recipe(full_size.ROOT / "recipes" / "phi2_languagebind_clotho.yaml")
    with pytest.raises(RecipeError):
        plan_gpus.data_of(full_size.load_recipe(full_size.ROOT / "recipes" / "quickstart.yaml"))
    assert plan_gpus.data_of(recipe).clips == 3839
