"""Whether a run can be continued with a recipe, and with as many processes as there are now."""

from pathlib import Path

import yaml

from .checkpoints import write_atomically
from .recipe import Recipe, RecipeError, recipe_from_dict, recipe_to_dict

RECIPE_NAME, PROCESSES_NAME = "recipe.yaml", "processes"  # what the last run was started with
DONE_NAME = "stage.json"  # in the folder of a finished stage
# Settings that may change between a run and its continuation: they do not change what is learned.
FREE_KEYS = {
    "output_dir",
    "cache",
    "cache_dir",
    "evaluation",
    "generation",
    "logging_steps",
    "num_workers",
    "push_stages",
    "push_to_hub",
    "report_to",
    "save_dtype",
    "stages",
}
FREE_STAGE_KEYS = {"eval_steps", "save_steps", "save_minutes", "max_loss_rise"}
# Times the processes: what an optimiser step has.
SPLIT_KEYS = {"batch_size", "batch_seconds", "batch_tokens", "grad_accum"}


def check_same_recipe(recipe: Recipe, folder: Path, processes: int) -> None:
    """RecipeError naming what differs when `folder` holds a run that cannot be continued with this recipe.

    A step's clips may be split otherwise over processes and accumulation: the steps stay the same.
    """
    path, record = folder / RECIPE_NAME, folder / PROCESSES_NAME
    if not path.exists():
        return
    processes_before = int(record.read_text()) if record.exists() else processes
    # Read as a recipe: keys that did not exist when it was written have their defaults.
    before = recipe_to_dict(recipe_from_dict(yaml.safe_load(path.read_text(encoding="utf-8"))))
    now = recipe_to_dict(recipe)
    different = [key for key in now if key not in FREE_KEYS and before.get(key) != now[key]]
    # Each worker batches its own share of a stream; one worker's is all, as without workers.
    if recipe.data.streaming and max(1, before["num_workers"]) != max(1, now["num_workers"]):
        different.append("num_workers")
    for index, (old, new) in enumerate(zip(before["stages"], now["stages"], strict=False)):
        started = (folder / old["name"]).exists()
        if not started:
            continue
        different += [
            f"stages.{index}.{k}" for k in new if k not in FREE_STAGE_KEYS | SPLIT_KEYS and old.get(k) != new[k]
        ]
        finished = (folder / old["name"] / DONE_NAME).exists()
        sizes = [clips_per_step(old, processes_before), clips_per_step(new, processes)]
        if sizes[0] != sizes[1]:
            changed = [f"stages.{index}.{k}" for k in sorted(SPLIT_KEYS) if old.get(k) != new[k]]
            if changed:
                different += changed
            elif not finished:
                raise RecipeError(
                    f"{folder} holds a run with {processes_before} processes, {sizes[0]} in an optimiser step of stage "
                    f"{old['name']}; with {processes} processes it would be {sizes[1]}. Start as many processes, or "
                    f"change stages.{index}.batch_size, batch_seconds, batch_tokens or grad_accum so that the product "
                    "is the same, or choose another output_dir"
                )
    if different:
        raise RecipeError(
            f"{folder} holds a run with other settings of {', '.join(different)}; "
            "choose another output_dir, or delete that folder"
        )


def remember_recipe(recipe: Recipe, folder: Path, processes: int) -> None:
    write_atomically(folder / RECIPE_NAME, yaml.safe_dump(recipe_to_dict(recipe), sort_keys=False))
    write_atomically(folder / PROCESSES_NAME, str(processes))


def clips_per_step(stage: dict, processes: int) -> str:
    """What all micro-batches of an optimiser step hold together."""
    split = (stage.get("grad_accum") or 1) * processes
    tokens = f" and {stage['batch_tokens'] * split} tokens of text" if stage.get("batch_tokens") else ""
    if stage.get("batch_size"):
        return f"{stage['batch_size'] * split} clips{tokens}"
    return f"{round((stage.get('batch_seconds') or 0) * split, 3):g} seconds{tokens}"
