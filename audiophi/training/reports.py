"""What experiment trackers get beside the Trainer's numbers: what was said and heard in an evaluation, as a table."""

import importlib
from collections.abc import Iterator
from contextlib import contextmanager

import pandas
from transformers import Trainer
from transformers.integrations import TensorBoardCallback
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK, get_available_reporting_integrations

from .recipe_values import RecipeError

COLUMNS = ["id", "task", "reference", "hypothesis", "hypothesis_align"]
NAME = "transcripts"

# (the package, a table, the step) of those that have tables; the Trainer has started the run.
TABLES = {
    "wandb": lambda wandb, table, step: wandb.log({NAME: wandb.Table(dataframe=table), "train/global_step": step}),
    "mlflow": lambda mlflow, table, step: mlflow.log_table(table, f"{NAME}/{step:07}.json"),
    "trackio": lambda trackio, table, step: trackio.log({NAME: trackio.Table(dataframe=table)}),
}


def check_trackers(names: list[str]) -> None:
    """RecipeError for a name that the Trainer does not know, or whose package is not installed. `all` are those that
    are; flyte is a platform, which has no package to look for."""
    for name in names:
        if name not in {*INTEGRATION_TO_CALLBACK, "all", "none"}:
            raise RecipeError(f"report_to: {name!r} is not one of {', '.join(INTEGRATION_TO_CALLBACK)}, all, none")
        if name not in {*get_available_reporting_integrations(), "flyte", "all", "none"}:
            raise RecipeError(
                f"report_to: {name} is not installed or switched off: pip install {name}, or leave it out"
            )


@contextmanager
def own_wandb_run(names: list[str]) -> Iterator[None]:
    """Ends the run that the Trainer starts at W&B and, unlike other trackers' runs, leaves open: the next stage would
    go on in it from step 0. One that was open before is its owner's."""
    wandb = importlib.import_module("wandb") if "wandb" in names else None
    started = wandb is not None and wandb.run is None
    yield
    if started:
        wandb.finish()


def report_transcripts(trainer: Trainer, predictions: list[dict]) -> None:
    """Predictions of `Development.evaluate` as a table in each of `report_to` that has any, in TensorBoard as text."""
    step = trainer.state.global_step
    table = pandas.DataFrame([[row[column] or "" for column in COLUMNS] for row in predictions], columns=COLUMNS)
    for name in trainer.args.report_to:
        if name in TABLES:
            TABLES[name](importlib.import_module(name), table, step)
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, TensorBoardCallback) and callback.tb_writer is not None:
            callback.tb_writer.add_text(NAME, markdown(table), step)


def markdown(table: pandas.DataFrame) -> str:
    """A table as TensorBoard shows text."""
    rows = [list(table.columns), ["---"] * len(table.columns), *table.values.tolist()]
    return "\n".join(f"| {' | '.join(cell.replace('|', '/').replace(chr(10), ' ') for cell in row)} |" for row in rows)
