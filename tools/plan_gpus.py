"""What a recipe needs: GPU memory, batch sizes and hours, computed from the configs; no weights are read.

    python tools/plan_gpus.py recipes/phi2_xeus_librispeech.yaml [--utilisation 0.3] [--key value ...]

Prints a markdown table: every stage on one 24 GB, one 80 GB and eight 80 GB GPUs. Memory is that of
audiophi/training/memory.py, which benchmarks/full_size.py compares with measurements; hours are operations
(audiophi/training/flops.py) over peak speed times `--utilisation`, an assumption. Evaluations, data loading and the
first epoch's downloads are not in them. Further `--key value` pairs override the recipe.
"""

import argparse
import math
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from audiophi.training.build import apply_tuning, set_frozen_dtype  # noqa: E402
from audiophi.training.configs import recipe_config, skeleton  # noqa: E402
from audiophi.training.flops import hours, stage_flops  # noqa: E402
from audiophi.training.memory import Load, Memory, sizes, training_memory  # noqa: E402
from audiophi.training.precision import frozen_dtype  # noqa: E402
from audiophi.training.recipe import Recipe, RecipeError, Stage, load_recipe  # noqa: E402


@dataclass(frozen=True)
class Machine:
    """`teraflops`: dense bfloat16 peak of one device, by its data sheet."""

    name: str
    devices: int
    gigabytes: int
    teraflops: float


MACHINES = (
    Machine("1 x 24 GB (RTX 4090)", 1, 24, 165),
    Machine("1 x 80 GB (A100)", 1, 80, 312),
    Machine("8 x 80 GB (A100)", 8, 80, 312),
)
# Of a GPU's memory, what the plan fills: the CUDA context and fragmentation take the rest.
USABLE = 0.88


@dataclass(frozen=True)
class Data:
    """A training set: hours, clips, its longest clip in seconds, LLM tokens of text per clip."""

    hours: float
    clips: int
    longest: float
    words: int

    @property
    def seconds(self) -> float:
        return self.hours * 3600 / self.clips


# From memory, not counted here. LibriSpeech: 2.7 words/s, about 1.3 tokens each. Clotho v2.1 development: clips of 15
# to 30 s, captions of 8 to 20 words, one of five drawn per epoch.
DATA = {
    "librispeech": Data(960.9, 281_241, 35.2, 44),
    "clotho": Data(24.0, 3_839, 30.0, 15),
}


def data_of(recipe: Recipe) -> Data:
    """Sizes of the recipe's training data. RecipeError for a set that is not known here."""
    paths = " ".join(source.path for source in recipe.data.train).lower()
    for name, data in DATA.items():
        if name in paths:
            return data
    raise RecipeError(f"data.train: the sizes of {paths} are not known; known: {', '.join(DATA)}")


def load_of(config, data: Data, clips: int, seconds: float) -> Load:
    """`clips` clips of `seconds`; after a collapse about as many audio tokens are left as the text has."""
    words = math.ceil(data.words * seconds / data.seconds)
    load = Load(clips, seconds, words=words)
    return (
        load
        if config.readout == "frames"
        else Load(clips, seconds, words=words, kept=min(1, words / sizes(config, load).audio))
    )


def largest_batch(memory_of, limit: int) -> int:
    """Most clips whose `memory_of(clips)` stays within `limit` bytes; 0 when not even one does."""
    if memory_of(1) > limit:
        return 0
    low, high = 1, 2
    while memory_of(high) <= limit and high < 2**16:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if memory_of(middle) <= limit else (low, middle)
    return low


def audio_clips(recipe: Recipe, stage: Stage, data: Data) -> float:
    """Clips that a stage trains on, all devices and epochs together."""
    if stage.epochs is not None:
        return stage.epochs * data.clips
    return stage.steps * stage.grad_accum * (stage.batch_size or stage.batch_seconds / data.seconds)


def recommended(stage: Stage, largest: int, seconds: float, devices: int) -> tuple[str, str]:
    """The largest batch of one device, and the one that keeps the recipe's effective batch, as keys of a stage.

    `largest`: clips of `seconds` that fit.
    """
    if not largest:
        return "does not fit", "-"
    key = "batch_size" if stage.batch_size else "batch_seconds"
    limit = largest if stage.batch_size else math.floor(largest * seconds / 10) * 10
    wanted = math.ceil(getattr(stage, key) * stage.grad_accum / devices)
    accumulated = math.ceil(wanted / limit)
    return f"{key} {limit}", f"{key} {math.ceil(wanted / accumulated)}, grad_accum {accumulated}"


def plan_stage(model, recipe: Recipe, stage: Stage, data: Data, utilisation: float) -> list[dict]:
    """A row per machine."""
    apply_tuning(model, stage)
    # Batches by seconds hold clips of similar length; of batches by number the longest clips must fit.
    seconds = data.longest if stage.batch_size else data.seconds

    def memory(clips: int) -> Memory:
        return training_memory(model, stage, load_of(model.config, data, clips, seconds))

    flops = stage_flops(model, stage, load_of(model.config, data, 1, data.seconds))
    total = flops * audio_clips(recipe, stage, data)
    usual, rows = memory(stage.batch_size or math.ceil(stage.batch_seconds / seconds)), []
    for machine in MACHINES:
        largest = largest_batch(lambda clips: memory(clips).total, int(USABLE * machine.gigabytes * 2**30))
        limit, choice = recommended(stage, largest, seconds, machine.devices)
        rows.append(
            {
                "stage": stage.name,
                "machine": machine.name,
                "weights": usual.weights,
                "trained": usual.gradients + usual.optimizer,
                "activations": usual.activations,
                "total": usual.total,
                "largest": limit,
                "recommended": choice,
                "hours": hours(total, machine.teraflops, utilisation, machine.devices),
            }
        )
    return rows


def table(rows: list[dict]) -> str:
    """Markdown, memory in GiB."""
    lines = [
        "| stage | machine | weights | gradients, Adam | activations | total, recipe's batch | largest batch per GPU | "
        "recommended per GPU | hours |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        gigabytes = [f"{row[key] / 2**30:.1f}" for key in ("weights", "trained", "activations", "total")]
        cells = [row["stage"], row["machine"], *gigabytes, row["largest"], row["recommended"], f"{row['hours']:.1f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--utilisation", type=float, default=0.3, help="share of the peak speed that training keeps up")
    parser.add_argument("--align_vocab", type=int, default=25_000, help="tokens that the training texts consist of")
    options, overrides = parser.parse_known_args(arguments)
    try:
        recipe = load_recipe(options.recipe, overrides)
        data = data_of(recipe)
        model, dtype = skeleton(recipe_config(recipe, options.align_vocab)), frozen_dtype(recipe, "cuda")
        set_frozen_dtype(model, recipe, dtype)
        rows = [row for stage in recipe.stages for row in plan_stage(model, recipe, stage, data, options.utilisation)]
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    print(
        f"{recipe.name}: {data.hours:g} h, {data.clips:,} clips; {options.utilisation:.0%} of peak speed assumed; "
        f"frozen weights in {str(dtype).removeprefix('torch.')}\n"
    )
    print(table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
