"""What a recipe must not say: contradictions that types cannot express."""

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

from audiophi.tasks import TASKS, task_named
from modeling_audiophi.components_audiophi import component_id
from modeling_audiophi.lora_audiophi import widened

from .recipe_values import RecipeError

if TYPE_CHECKING:
    from modeling_audiophi import AudioPhiConfig

    from .recipe import Recipe, Source

POSITIVE_STAGE_KEYS = (
    *("steps", "epochs", "minutes", "batch_size", "batch_seconds", "batch_tokens", "grad_accum"),
    *("eval_steps", "save_steps", "save_minutes", "max_grad_norm", "max_loss_rise"),
    "distill_temperature",
)


def sources_of(recipe: "Recipe") -> Iterator[tuple[str, list["Source"]]]:
    """(dotted key, sources) of all the data that a recipe names."""
    yield "data.train", recipe.data.train
    yield "data.eval", recipe.data.eval
    yield "data.test", recipe.data.test
    yield "data.heard_from", recipe.data.heard_from
    for number, stage in enumerate(recipe.stages):
        if stage.data:
            yield f"stages.{number}.data", stage.data


def check_task(name: str, where: str) -> None:
    try:
        task_named(name)
    except ValueError as error:
        raise RecipeError(f"{where}: {error}") from None


def check(recipe: "Recipe") -> None:
    """Contradictions that types cannot express."""

    def refuse(condition: bool, message: str) -> None:
        if condition:
            raise RecipeError(message)

    refuse(not recipe.stages, "stages: a recipe needs at least one stage")
    for name, asked in recipe.instructions.items():
        check_task(name, f"instructions.{name}")
        refuse(not asked, f"instructions.{name}: give at least one instruction, it is the user's turn in every prompt")
    refuse(not 0 <= recipe.data.max_bad_rows <= 1, "data.max_bad_rows is a share between 0 and 1")
    refuse(not recipe.data.speeds or min(recipe.data.speeds) <= 0, "data.speeds: give one or more factors above 0")
    refuse(recipe.logging_steps < 1, "logging_steps must be 1 or more")
    refuse(
        recipe.push_to_hub is not None and not re.fullmatch(r"[\w.-]+/[\w.-]+", recipe.push_to_hub),
        f"push_to_hub: {recipe.push_to_hub!r} is not a repository's name, org/name",
    )
    refuse(recipe.push_stages and not recipe.push_to_hub, "push_stages: name the repository with push_to_hub")
    refuse(
        recipe.readout in ("collapse", "mixed") and recipe.alignment is None and recipe.init_from is None,
        f"readout: {recipe.readout} needs the alignment head; add `alignment: {{merges: null}}`",
    )
    refuse(recipe.clip_tokens is not None and recipe.clip_tokens < 0, "clip_tokens must be 0 or more")
    for where, sources in sources_of(recipe):
        for number, source in enumerate(sources):
            if source.task is not None:
                check_task(source.task, f"{where}.{number}.task")
            refuse(
                source.turns is not None and source.turns < 1,
                f"{where}.{number}.turns must be 1 or more, got {source.turns}",
            )
    for key in ("eval", "test"):
        for source in getattr(recipe.data, key):
            refuse(
                source.task is not None and TASKS[source.task].report is None,
                f"data.{key}: task {source.task} is for training only, it has no score",
            )
    for key in ("eval", "test", "heard_from"):
        refuse(
            any(source.heard == "simulated" for source in getattr(recipe.data, key)),
            f"data.{key}: heard: simulated is for training; real clips are needed here",
        )
    # Readout mixed learns from more than words; which readout a checkpoint has is not known yet.
    given = [recipe.init_from is not None and value is None for value in (recipe.readout, recipe.clip_tokens)]
    described = recipe.readout == "mixed" or bool(recipe.clip_tokens) or any(given)
    names = [stage.name for stage in recipe.stages]
    refuse(len(set(names)) < len(names), f"stages: names must differ, got {', '.join(names)}")
    for i, stage in enumerate(recipe.stages):
        at = f"stages.{i}"
        refuse(not re.fullmatch(r"[A-Za-z0-9][\w.-]*", stage.name), f"{at}.name: {stage.name!r} cannot name a folder")
        refuse(
            stage.name in ("final", "logs"), f"{at}.name: {stage.name!r} is taken by the run's own folder of that name"
        )
        refuse((stage.steps is None) == (stage.epochs is None), f"{at}: give either steps or epochs")
        refuse(
            stage.minutes is not None and recipe.data.streaming,
            f"{at}.minutes: a stream's steps cannot be timed beforehand; give steps",
        )
        refuse(
            (stage.batch_size is None) == (stage.batch_seconds is None),
            f"{at}: give either batch_size or batch_seconds",
        )
        for key in POSITIVE_STAGE_KEYS:
            value = getattr(stage, key)
            refuse(value is not None and value <= 0, f"{at}.{key} must be above 0, got {value}")
        refuse(
            {stage.tune.encoder, stage.tune.adapter, stage.tune.llm, stage.tune.readout or "frozen"} == {"frozen"},
            f"{at}.tune: everything is frozen, there is nothing to train",
        )
        refuse(
            stage.aligns and recipe.alignment is None and recipe.init_from is None,
            f"{at}.loss: {stage.loss} needs the alignment head; add `alignment: {{merges: null}}`",
        )
        refuse(
            stage.loss == "align" and stage.tune.llm != "frozen",
            f"{at}.tune.llm: the align loss does not run the LLM, so it cannot tune it; use frozen, or loss: both",
        )
        refuse(
            stage.loss == "align"
            and {stage.tune.encoder, stage.tune.adapter, (stage.tune.readout if described else None) or "frozen"}
            == {"frozen"},
            f"{at}.tune: the align loss reaches encoder, adapter, readout mixed and clip tokens, and they are frozen",
        )
        refuse(
            not 0 <= stage.length_normalization <= 1,
            f"{at}.length_normalization must be from 0 to 1, got {stage.length_normalization:g}",
        )
        refuse(not 0 <= stage.written <= 1, f"{at}.written must be from 0 to 1, got {stage.written:g}")
        refuse(stage.written and stage.loss == "align", f"{at}.written: the loss align reads no words; remove it")
        refuse(stage.distill_weight < 0, f"{at}.distill_weight must be 0 or more, got {stage.distill_weight:g}")
        refuse(
            stage.loss == "align" and stage.distills,
            f"{at}.distill_weight: the align loss does not run the LLM, so there is nothing to distill; use loss: both",
        )
        refuse(
            stage.loss == "distill" and stage.distill_weight != 0,
            f"{at}.distill_weight is for distill beside another loss; with loss: distill it is the only one",
        )
        refuse(
            stage.distills and stage.tune.llm == "full",
            f"{at}.tune.llm: distill's teacher is the LLM itself, whose weights must not move; use lora or frozen",
        )
        refuse(
            stage.tune.llm == "full" and recipe.components.quantize_text != "none",
            f"{at}.tune.llm: quantised weights cannot be trained in full; use lora",
        )
        refuse(
            stage.precision == "fp16" and recipe.frozen_dtype == "bfloat16",
            f"{at}.precision: fp16 does not go with frozen_dtype: bfloat16; use bf16, or frozen_dtype: float32",
        )
        refuse(
            not 0 <= stage.time_stretch < 0.5,
            f"{at}.time_stretch must be 0 or more and below 0.5, got {stage.time_stretch:g}",
        )
        refuse(
            stage.time_stretch > 0
            and (
                not recipe.cache
                or recipe.data.streaming
                or stage.tune.encoder != "frozen"
                or recipe.encoder_layer == "mix"
            ),
            f"{at}.time_stretch works on cached encoder outputs; use data.speeds where the encoder runs in every step",
        )
        refuse(
            recipe.data.streaming and stage.steps is None, f"{at}: a stream has no known length; give steps, not epochs"
        )
        if any(source.heard == "simulated" for source in stage.data or recipe.data.train):
            _check_simulated(recipe, i)
        for source in stage.data or recipe.data.train:
            refuse(
                source.weight is not None and source.weight <= 0, f"{at}: the weight of {source.path} must be above 0"
            )
    if recipe.init_from is None:
        check_lora(recipe, {})


def check_start(recipe: "Recipe", config: "AudioPhiConfig") -> None:
    """RecipeError where a recipe says something of the model that `init_from`, whose config this is, has otherwise."""
    bases, adapter, spelling = config.base_components, config.adapter_config, config.align_spelling or {}
    said = {f"components.{part}": (component_id(getattr(recipe.components, part)), base["id"])
            for part, base in bases.items()}  # fmt: skip
    for name, value in (recipe.components.audio_settings or {}).items():
        said[f"components.audio_settings.{name}"] = (value, getattr(config.audio_config, name, None))
    for name, value in (recipe.adapter or {}).items():
        said[f"adapter.{name}"] = (value, getattr(adapter, name, None))
    said["encoder_layer"] = (recipe.encoder_layer, config.encoder_layer)
    if recipe.alignment is not None:
        said["alignment.spelling"] = (recipe.alignment.spelling, spelling.get("size", 0))
        said["alignment.ngrams"] = (recipe.alignment.ngrams, spelling.get("buckets"))
    for key, (value, has) in said.items():
        if value is not None and value != has:
            raise RecipeError(
                f"{key}: the recipe says {value}, but the model of init_from, {recipe.init_from}, has {has}, which cannot "  # noqa: E501
                "be changed; say the same, or start without init_from"
            )
    check_lora(recipe, config.lora)
    stretched = [number for number, stage in enumerate(recipe.stages) if stage.time_stretch]
    if stretched and config.encoder_layer == "mix":
        raise RecipeError(
            f"stages.{stretched[0]}.time_stretch works on cached encoder outputs, but the model of init_from, "
            f"{recipe.init_from}, learns a mix of its layers; use data.speeds"
        )


def check_lora(recipe: "Recipe", present: dict[str, dict | None]) -> None:
    """RecipeError where a stage's LoRA layers cannot be made of those that an earlier stage or `init_from` has:
    `present`, as `AudioPhiConfig.lora`."""
    present = dict(present)
    for number, stage in enumerate(recipe.stages):
        for part, how in (("audio", stage.tune.encoder), ("text", stage.tune.llm)):
            if how != "lora" or (stage.lora is None and present.get(part)):
                continue
            asked = stage.lora_arguments
            try:
                present[part] = widened(present[part], asked) if present.get(part) else asked
            except ValueError as error:
                raise RecipeError(
                    f"stages.{number}.lora: {error}; leave lora out there to train them as they are"
                ) from None


def _check_simulated(recipe: "Recipe", number: int) -> None:
    """RecipeError where a stage cannot train on simulated clips."""
    stage, at = recipe.stages[number], f"stages.{number}"
    data = recipe.data
    reasons = {
        "the align loss needs audio; give this stage data of its own without such sources, or loss: lm": (
            stage.loss == "align"
        ),
        "only readout collapse and mixed give the LLM words": (
            recipe.readout == "frames" or (recipe.readout is None and recipe.init_from is None)
        ),
        "add `alignment` with the merges that the alignment was trained with": recipe.alignment is None,
        "the alignment is not trained yet, so it has no errors to measure; begin with init_from, or a stage with loss "
        "align": recipe.init_from is None and all(before.loss == "lm" for before in recipe.stages[:number]),
        "there are no real clips to measure what the alignment confuses, in its data or data.train; name some in "
        "data.heard_from": all(
            source.heard == "simulated" for source in [*(stage.data or []), *data.train, *data.heard_from]
        ),
    }
    for reason, holds in reasons.items():
        if holds:
            raise RecipeError(f"{at}: heard: simulated: {reason}")
