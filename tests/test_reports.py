"""What the Trainer's trackers get of an evaluation. Those that are not installed here are left out: each test makes a
real run, without a network."""

import importlib
import json
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK, get_available_reporting_integrations

from audiophi.training.recipe import RecipeError, recipe_from_dict
from audiophi.training.reports import COLUMNS, NAME, check_trackers
from audiophi.training.stages import run_recipe
from tests.tiny_runs import ALIGN


@pytest.fixture
def trained(settings, speech, tmp_path, monkeypatch):
    """(tool) -> the references of the rows that two stages of a run with it evaluated."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "mlruns").as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))

    def run(tool):
        data = {"train": [{"path": str(speech)}], "eval": [{"path": str(speech), "limit": 3}]}
        stages = [{**ALIGN, "name": name, "steps": 2, "eval_steps": 1} for name in ("one", "two")]
        run_recipe(recipe_from_dict(settings(*stages, data=data, report_to=[tool])))
        rows = [json.loads(line)["text"] for line in (Path(speech) / "metadata.jsonl").read_text().splitlines()]
        return rows[:3]

    return run


def test_tensorboard_gets_the_transcripts_as_text(trained, settings):
    said = trained("tensorboard")
    for stage in ("one", "two"):
        (file,) = (Path(settings()["output_dir"]) / stage / "runs").rglob("events*")
        events = EventAccumulator(str(file)).Reload()
        tables = events.Tensors(f"{NAME}/text_summary")
        assert [table.step for table in tables] == [1, 2] and "eval/wer_align" in events.Tags()["scalars"]
        text = tables[-1].tensor_proto.string_val[0].decode()
        assert text.startswith("| id | task | reference |") and len(text.splitlines()) == 2 + len(said)
        assert all(words in text for words in said)


def test_wandb_gets_a_table_and_a_run_per_stage(trained, tmp_path):
    wandb = pytest.importorskip("wandb")
    said = trained("wandb")
    assert wandb.run is None, "left open, the next stage goes on in it"
    runs = list((tmp_path / "wandb").glob("offline-run-*"))
    assert len(runs) == 2
    for run in runs:
        tables = [json.loads(path.read_text()) for path in run.rglob(f"{NAME}*.table.json")]
        assert len(tables) == 2 and all(table["columns"] == COLUMNS for table in tables)
        assert {row[2] for table in tables for row in table["data"]} == {*said}


def test_mlflow_gets_a_table(trained, tmp_path):
    pytest.importorskip("mlflow")
    said = trained("mlflow")
    tables = [json.loads(path.read_text()) for path in sorted((tmp_path / "mlruns").rglob(f"artifacts/{NAME}/*.json"))]
    assert len(tables) == 4 and all(table["columns"] == COLUMNS for table in tables)
    assert {row[2] for table in tables for row in table["data"]} == {*said}


def test_trackio_gets_a_table(trained, tmp_path):
    pytest.importorskip("trackio")
    said = trained("trackio")
    kept = b"".join(path.read_bytes() for path in (tmp_path / "trackio").rglob("*") if path.is_file())
    assert NAME.encode() in kept
    assert said


def test_a_tracker_that_is_not_there_is_refused_before_anything_is_read(settings):
    with pytest.raises(RecipeError, match="report_to: 'wandbb' is not one of .*wandb"):
        check_trackers(["tensorboard", "wandbb"])
    missing = next(name for name in INTEGRATION_TO_CALLBACK if name not in get_available_reporting_integrations())
    assert importlib.util.find_spec(missing) is None
    recipe = recipe_from_dict(settings(ALIGN, data={"train": [{"path": "nowhere"}]}, report_to=[missing]))
    with pytest.raises(RecipeError, match=f"report_to: {missing} is not installed .*pip install {missing}"):
        run_recipe(recipe)
