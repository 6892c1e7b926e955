"""Before the first step: what will be trained, how many tokens audio makes, and what it will cost in time and
memory."""

import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils.memory import should_reduce_batch_size

from .batches import BatchSchedule
from .build import PARTS, part_of
from .callbacks import duration, preserved_random_state
from .checkpoints import write_atomically
from .corpus import Corpus
from .memory import STATE_BYTES
from .prompt_room import PromptRoom
from .recipe import RecipeError, Stage

SAMPLED = 8  # micro-batches that are timed
MEASURING = 0.05  # of a stage's minutes, unless two of them take longer


def parameter_table(model: torch.nn.Module) -> list[tuple[str, int, int]]:
    """(part, parameters, of them trained) per part."""
    counts = {part: [0, 0] for part in PARTS}
    for name, parameter in model.named_parameters():
        counts[part_of(name)][0] += parameter.numel()
        counts[part_of(name)][1] += parameter.numel() * parameter.requires_grad
    return [(part, *counts[part]) for part in PARTS]


def token_rate(room: PromptRoom, corpus: Corpus, sampled: int = 200) -> dict[str, float] | None:
    """Audio tokens per second that the adapter makes, clip tokens included, and the longest prompt against the LLM's
    context; None for text alone.

    Long prompts are found among the `sampled` longest rows; with a readout that collapses them, audio counts only in
    what the adapter makes.
    """
    rate = room.processor.sampling_rate

    def made(row) -> int:
        return sum(room.adapter_tokens(int(seconds * rate)) + room.config.clip_tokens for seconds in row.lengths)

    heard = [row for row in corpus.rows if row.lengths and not corpus.simulated(row)]
    if not heard:
        return None
    tokens = [made(row) for row in heard]
    longest = sorted(range(len(heard)), key=lambda number: -tokens[number])[:sampled]
    prompts = [tokens[number] + room.tokens(corpus.example(heard[number]), []) for number in longest]
    return {
        "tokens_per_second": sum(tokens) / sum(row.seconds for row in heard),
        "longest_audio": tokens[longest[0]],
        "longest_prompt": max(prompts),
        "context": room.context or 0,
    }


def measure_step(model, schedule: BatchSchedule, batch_of: Callable[[list], dict], trainer) -> tuple[float, float]:
    """Runs the largest micro-batches (do they fit?) and times some from all over the schedule, fewer where the stage
    has few minutes -> (seconds per optimiser step, peak memory, bytes).

    `batch_of`: Draws -> a collated batch. Nothing is learned: gradients are dropped and random states restored. Raises
    RecipeError where memory is too small.
    """
    on_gpu = model.device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    was_training = model.training
    model.train()

    def seconds_each(batches: list) -> float:
        start = time.perf_counter()
        for draws in batches:
            try:
                trainer.measure_loss(batch_of(draws)).backward()
            except RuntimeError as error:
                if not should_reduce_batch_size(error):
                    raise
                raise RecipeError(does_not_fit(trainer.stage, len(draws), *schedule.padded(draws))) from error
            if on_gpu:
                torch.cuda.synchronize()
        return (time.perf_counter() - start) / len(batches)

    with preserved_random_state():
        longest, minutes = seconds_each(schedule.largest()), trainer.stage.minutes
        count = SAMPLED if minutes is None else int(60 * minutes * MEASURING / longest)
        spent = seconds_each(schedule.sample(min(max(2, count), SAMPLED)))
    model.zero_grad(set_to_none=True)
    model.train(was_training)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    if on_gpu:
        peak = torch.cuda.max_memory_allocated()
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return spent * schedule.grad_accum, peak + trained * STATE_BYTES[trainer.stage.optimizer]


def does_not_fit(stage: Stage, clips: int, seconds: float, tokens: int) -> str:
    keys = {key: getattr(stage, key) for key in ("batch_seconds", "batch_tokens", "batch_size")}
    given = " or ".join(f"{key} ({value:g})" for key, value in keys.items() if value is not None)
    return (
        f"stage {stage.name}: memory is too small for a batch of {clips} rows, padded {seconds:.0f} s of audio and "
        f"{tokens:,} tokens of text; lower {given} and raise grad_accum ({stage.grad_accum}) as much"
        + ("" if stage.gradient_checkpointing else ", or set gradient_checkpointing: true")
    )


def steps_in_time(minutes: float, steps: int, seconds_per_step: float | None, path: Path) -> int:
    """At most `steps`, at most what takes `minutes`, at least 1; as first decided (and kept in `path`) when a run is
    resumed, and the same in all processes."""
    state = PartialState()
    if state.is_main_process and not path.exists() and seconds_per_step is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, str(max(1, min(steps, int(60 * minutes / seconds_per_step)))))
    state.wait_for_everyone()
    return int(path.read_text()) if path.exists() else steps


def describe_stage(
    stage_name: str, loss: str, model, steps: int, rate: dict | None, cost: tuple[float, float] | None
) -> str:
    """The plan as text."""
    table = parameter_table(model)
    total = sum(count for _, count, _ in table)
    trained = sum(count for _, _, count in table)
    lines = [f"stage {stage_name}: loss {loss}, {steps} steps", "  part        parameters      trained   share"]
    lines += [
        f"  {part:8} {count:13,} {tuned:12,} {100 * tuned / max(1, count):6.1f} %" for part, count, tuned in table
    ]
    lines.append(f"  {'all':8} {total:13,} {trained:12,} {100 * trained / total:6.1f} %")
    if rate is not None:
        lines.append(
            f"  audio: {rate['tokens_per_second']:.1f} tokens/s; longest clip {rate['longest_audio']} tokens, "
            f"longest prompt {rate['longest_prompt']} of a context of {rate['context']}"
        )
    if cost is not None:
        lines.append(
            f"  estimate: {cost[0]:.2f} s/step, {duration(cost[0] * steps)} in all, {cost[1] / 2**30:.1f} GB of memory"
        )
    return "\n".join(lines)
