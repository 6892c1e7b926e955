"""Recipes: a short YAML file becomes typed dataclasses; every key can be overridden on the command line.

    load_recipe("recipes/quickstart.yaml", ["--stages.0.steps", "10", "--adapter.type=mlp"])

Every key is declared once, as a field below, with its type and default. A key that is not declared, a value of the
wrong type and settings that contradict each other are `RecipeError`s which name the key (and the nearest valid one).
"""

import dataclasses
import difflib
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import yaml

from .recipe_checks import check
from .recipe_values import RecipeError, build, parse_yaml


@dataclass
class Components:
    """The two pretrained parts: Hub ids or local folders, with optional Hub revisions."""

    audio: str
    text: str
    audio_revision: str | None = None
    text_revision: str | None = None
    audio_settings: dict[str, Any] | None = None  # changes to the encoder's config: {frequency_pooling: concat}
    chat_template: str | None = None  # chatml, llama3, plain, phi, or Jinja; null: by the LLM's chat format
    quantize_text: Literal["none", "4bit"] = "none"  # "4bit": NF4 weights in the frozen LLM (QLoRA), needs bitsandbytes


@dataclass
class Alignment:
    """CTC head over the LLM's embedding table. `merges`: how many of the LLM's BPE merges are kept; null: all.

    `spelling`: size of the classes' spelling vectors, of `ngrams` character n-grams; 0: their embeddings only. null: 0
    and 6144, or what `init_from` has.
    """

    merges: int | None = None
    spelling: int | None = None
    ngrams: int | None = None


@dataclass
class Source:
    """One data set of a mixture. `path`: Hub id, folder, LibriSpeech tree, or a jsonl/csv/parquet manifest.

    `weight`: the source's share of an epoch's draws is its weight over the sum of weights (no weights: every row once).
    `filter` keeps and `exclude` drops rows by the values of a column, e.g. `{speaker: ["1272"]}`. `limit` keeps the
    first rows. Rows longer than `max_seconds` are left out (not counted as bad). `task`: a name of audiophi/tasks; not
    given, the source's kind and its columns decide. A list of names, or {name: weight}, makes a source of each
    (`one_task_each`). The task decides what the user asks, unless the source has its own `instruction` or a column of
    questions (`instruction_column`, `answer_column`, chats). `speech: false`: nobody speaks in the clips, so CTC may
    learn silence from them. `audio_folder`: where the audio of Clotho, AudioCaps, ... is, if not beside its CSVs.
    `allow_urls`: fetch what its rows name by URL. `heard: simulated`: of the clips only the words are used, which the
    rows give as `transcript` (or as `text`, for tasks about words), and the LLM reads what the alignment would have
    heard, with the errors that it makes on real clips (simulated.py); no audio is needed. `turns`: how many of the
    questions that a task makes of a row are asked in one chat, of each kind before any comes again: the clip is heard
    once for all. `language`: that is spoken, by which transcripts are scored, where no column `language` says so;
    not given: English.
    """

    path: str
    split: str | None = None
    weight: float | None = None
    audio_column: str | None = None
    text_column: str | None = None
    label_column: str | None = None
    instruction_column: str | None = None
    answer_column: str | None = None
    transcript_column: str | None = None
    audio_folder: str | None = None
    task: str | list[str] | dict[str, float] | None = None
    speech: bool | None = None
    instruction: str | None = None
    filter: dict[str, list] | None = None
    exclude: dict[str, list] | None = None
    limit: int | None = None
    max_seconds: float | None = None
    allow_urls: bool | None = None
    heard: Literal["real", "simulated"] | None = None
    turns: int | None = None
    language: str | None = None


@dataclass
class Data:
    """Training mixture, development set, and what to do with rows that cannot be used."""

    train: list[Source]
    eval: list[Source] = field(default_factory=list)  # development: watched while training, decoding is fitted on it
    test: list[Source] = field(default_factory=list)  # what nothing is chosen on: for tools/make_questions.py alone
    # Real clips with known words that simulated ones are measured on; none: those of the stage, or of train.
    heard_from: list[Source] = field(default_factory=list)
    # Speed perturbation: one factor is drawn per clip and epoch.
    speeds: list[float] = field(default_factory=lambda: [1.0])
    max_bad_rows: float = 0.05  # share of rows without text or with unreadable audio above which the run stops
    streaming: bool = False  # read rows as they come (no feature cache, no length grouping over the whole set)


@dataclass
class Evaluation:
    """The small development evaluation during training (WER, listening gap)."""

    clips: int = 64
    batch_size: int = 16
    max_new_tokens: int = 96
    # At the end the weights of decoding that `generation` does not give are chosen on these clips (decoding_fit.py).
    fit_decoding: bool = True
    ears_clips: int = 300  # on which two ears are weighed then, each heard once (ears_fit.py)


@dataclass
class Tune:
    """What a stage trains. `adapter` covers the adapter, the alignment head, the readout, clip tokens and a learned
    layer mix; `readout` says otherwise of readout and clip tokens alone."""

    encoder: Literal["frozen", "full", "lora"] = "frozen"
    adapter: Literal["frozen", "full"] = "full"
    readout: Literal["frozen", "full"] | None = None
    llm: Literal["frozen", "full", "lora"] = "frozen"


@dataclass
class Lora:
    """Low-rank updates (Hu et al. 2021) for every part that a stage tunes with "lora". Those of an earlier stage, or of
    `init_from`, are widened to a higher rank without losing what they have learned."""

    r: int = 16
    alpha: int = 32
    dropout: float = 0.05
    target_modules: str | list[str] = "all-linear"

    @property
    def arguments(self) -> dict:
        """Those of `peft.LoraConfig`."""
        return {"r": self.r, "lora_alpha": self.alpha, "lora_dropout": self.dropout,
                "target_modules": self.target_modules}  # fmt: skip


@dataclass
class SpecAugment:
    """Masks on encoder outputs: `time_masks` per 100 frames, up to `time_width` long; channels by `feature_prob`."""

    time_masks: float = 1.0
    time_width: int = 15
    feature_prob: float = 0.05


@dataclass
class Stage:
    """One stage of training: a loss, what it tunes, and how long.

    `loss`: "align" (CTC, and what sounds and voices are like; without the LLM), "lm" (the answer's tokens), "both", or
    "distill": the LLM that hears shall answer as the LLM that reads the transcript would (KL divergence on the answer's
    tokens). Rows that have no such teacher (`Task.read`) are left out of distill.
    """

    name: str
    loss: Literal["align", "lm", "both", "distill"]
    tune: Tune = field(default_factory=Tune)
    lora: Lora | None = None  # null: as the model has them already, else Lora's defaults
    steps: int | None = None  # optimiser steps; or
    epochs: float | None = None  # passes over the mixture
    minutes: float | None = None  # at most: fewer steps on a machine that, timed at the start, is too slow for all
    batch_size: int | None = None  # clips per device and micro-batch; or
    batch_seconds: float | None = None  # padded seconds of audio per device and micro-batch
    batch_tokens: int | None = None  # beside either: padded tokens of text per device and micro-batch
    # False: a step has clips of all lengths, so of all sources; more is padded, but not for the LLM (packing_audiophi).
    group_by_length: bool = True
    grad_accum: int = 1
    learning_rate: float = 1e-3  # adapter, alignment head, readout, clip tokens, layer mix
    llm_learning_rate: float = 2e-4
    encoder_learning_rate: float = 1e-5
    schedule: Literal["cosine", "linear", "constant_with_warmup"] = "cosine"
    warmup: float = 0.05  # share of the steps, or a number of steps from 1 up
    weight_decay: float = 0.02
    beta2: float = 0.98
    # AdamW's states in 8 bits need bitsandbytes; paged ones give way to the CPU's memory where the GPU's is full.
    optimizer: Literal["adamw", "adamw_8bit", "paged_adamw_8bit"] = "adamw"
    max_grad_norm: float = 1.0
    align_weight: float = 1.0  # weight of the alignment loss beside the LM loss when loss is "both"
    length_normalization: float = 0.0  # 0: each token of an answer counts 1; 1: each answer does; 0.5: in between
    written: float = 0.0  # share of clips of which the LLM reads the words as the encoder's decoder writes them
    distill_weight: float = 0.0  # weight of the loss distill beside lm or both
    distill_temperature: float = 2.0  # of the answers that distill compares
    noise: float = 0.0  # Gaussian noise on the encoder's output, in standard deviations of each frame
    spec_augment: SpecAugment | None = None
    time_stretch: float = 0.0  # tempo drawn from 1 - x to 1 + x per clip and epoch, on cached encoder outputs
    eval_steps: int | None = None
    save_steps: int | None = None  # checkpoints to resume from; and
    save_minutes: float | None = 30.0  # when the last one is this old
    max_loss_rise: float | None = 10.0  # stops a stage whose loss has risen to this multiple (guards.py)
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"  # bf16 becomes fp32 where the machine has none
    gradient_checkpointing: bool = False
    data: list[Source] | None = None  # replaces data.train for this stage

    @property
    def lora_arguments(self) -> dict:
        """Those of `peft.LoraConfig` for layers that are not there yet."""
        return (self.lora or Lora()).arguments

    @property
    def distills(self) -> bool:
        return self.loss == "distill" or self.distill_weight > 0

    @property
    def aligns(self) -> bool:
        return self.loss in ("align", "both")

    @property
    def losses(self) -> str:
        """For people: what is minimised."""
        return f"{self.loss} + {self.distill_weight:g} distill" if self.distill_weight else self.loss


@dataclass
class Recipe:
    """A whole training run. `output_dir` gets one folder per stage, `final/`, logs, curves and the list of bad rows."""

    name: str
    components: Components
    data: Data
    stages: list[Stage]
    init_from: str | None = None  # an AudioPhi checkpoint to start from instead of an untrained adapter
    adapter: dict[str, Any] | None = None  # null: {type: mlp}, or what `init_from` has
    encoder_layer: str | int | None = None  # null: last, or what `init_from` has
    readout: Literal["frames", "collapse", "mixed"] | None = None  # null: frames, or what `init_from` has
    hear_with: Literal["alignment", "decoder", "both"] | None = None  # null: alignment, or what `init_from` has
    clip_tokens: int | None = None  # tokens of a clip as a whole beside the readout's; null: 0, or what `init_from` has
    alignment: Alignment | None = None
    text_case: Literal["lower", "keep"] = "lower"
    instructions: dict[str, list[str]] = field(default_factory=dict)  # task: what is asked; not given, its own wordings
    loss_on: Literal["all", "last"] = "all"  # which of the assistant's turns are learned
    cache: bool = True  # keep the frozen encoder's outputs on disk
    cache_dir: str = "cache"
    cache_dtype: Literal["float16", "float32"] = "float16"
    # Of the frozen LLM, and of an encoder that is not cached; auto: bfloat16 where all stages run in bf16.
    frozen_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    output_dir: str = "outputs/{name}"
    save_dtype: Literal["float32", "bfloat16", "float16", "int8"] = "float32"  # of the weights in final/
    push_to_hub: str | None = None  # org/name: final/ is uploaded there (made private if it is new), later if need be
    push_stages: bool = False  # upload each finished stage's model, too
    # Defaults of generate(), saved with the model: {num_beams: 2, TASK: {ctc_weight: 0.5}}, a task's by its name.
    generation: dict[str, Any] = field(default_factory=dict)
    evaluation: Evaluation = field(default_factory=Evaluation)
    seed: int = 0
    logging_steps: int = 10
    num_workers: int = 0
    # Of the Trainer's trackers: tensorboard, wandb, mlflow, trackio, …; evaluations' transcripts go there as a table.
    report_to: list[str] = field(default_factory=lambda: ["tensorboard"])

    def __post_init__(self):
        self.output_dir = self.output_dir.replace("{name}", self.name)
        if self.init_from is not None:
            return  # what is not said is the checkpoint's
        self.adapter = {"type": "mlp"} if self.adapter is None else self.adapter
        self.encoder_layer = "last" if self.encoder_layer is None else self.encoder_layer
        if self.alignment is not None:
            self.alignment.spelling = self.alignment.spelling or 0
            self.alignment.ngrams = 6144 if self.alignment.ngrams is None else self.alignment.ngrams


def load_recipe(path: str | Path, overrides: list[str] = ()) -> Recipe:
    """Reads a recipe and applies command line overrides (`--a.b value`, `--a.b=value`, list items by index).

    Raises RecipeError for a missing file, unknown keys, wrong types and contradictions.
    """
    path = Path(path)
    if not path.is_file():
        near = difflib.get_close_matches(path.stem, [p.stem for p in path.parent.glob("*.yaml")], n=1)
        raise RecipeError(
            f"no recipe at {path}" + (f"; did you mean {path.with_name(near[0] + '.yaml')}?" if near else "")
        )
    data = parse_yaml(path.read_text(encoding="utf-8"), str(path))
    if not isinstance(data, dict):
        raise RecipeError(f"{path} is not a recipe: it must be a YAML mapping, got {type(data).__name__}")
    for dotted, value in parse_overrides(overrides):
        _apply(data, dotted, value)
    return recipe_from_dict(data)


def recipe_from_dict(data: dict) -> Recipe:
    """Builds and checks a Recipe from plain data (as YAML gives it)."""
    recipe = build(Recipe, data, "")
    named = [(recipe.data, key) for key in ("train", "eval", "test")]
    for owner, key in (*named, *((stage, "data") for stage in recipe.stages)):
        setattr(owner, key, getattr(owner, key) and one_task_each(getattr(owner, key)))
    check(recipe)
    return recipe


def one_task_each(sources: list[Source]) -> list[Source]:
    """`sources`, one with several tasks as several, which share its weight (1 where it has none) by theirs. RecipeError
    for weights that are none."""
    single = []
    for source in sources:
        if source.task is None or isinstance(source.task, str):
            single.append(source)
            continue
        shares = source.task if isinstance(source.task, dict) else dict.fromkeys(source.task, 1.0)
        if not shares or min(shares.values()) <= 0:
            raise RecipeError(f"{source.path}: task needs names with weights above 0, got {source.task}")
        total, weight = sum(shares.values()), 1.0 if source.weight is None else source.weight
        single += [replace(source, task=name, weight=weight * share / total) for name, share in shares.items()]
    return single


def recipe_to_dict(recipe: Recipe) -> dict:
    """The resolved recipe as plain data, every default filled in; recipe_from_dict() reads it back."""
    return dataclasses.asdict(recipe)


def parse_overrides(arguments: list[str]) -> list[tuple[str, Any]]:
    """["--a.b", "1", "--c=x"] -> [("a.b", 1), ("c", "x")]; values are read as YAML, a flag without one means true."""
    pairs, rest = [], list(arguments)
    while rest:
        flag = rest.pop(0)
        if not flag.startswith("--") or flag == "--":
            raise RecipeError(f"expected --key value, got {flag!r}")
        key, equals, text = flag[2:].partition("=")
        if not equals:
            text = rest.pop(0) if rest and not rest[0].startswith("--") else "true"
        try:
            pairs.append((key, yaml.safe_load(text)))
        except yaml.YAMLError:
            pairs.append((key, text))
    return pairs


def _apply(data: dict, dotted: str, value: Any) -> None:
    """Sets data["a"]["b"] for "a.b"; existing lists are indexed by number. Which keys exist is checked by `build`."""
    keys = dotted.split(".")
    node: Any = data
    for depth, key in enumerate(keys):
        last, where = depth == len(keys) - 1, ".".join(keys[: depth + 1])
        if isinstance(node, list):
            if not key.isdigit() or int(key) >= len(node):
                raise RecipeError(f"--{dotted}: {where} is not an item of a list of {len(node)} (0 to {len(node) - 1})")
            key = int(key)
        elif not isinstance(node, dict):
            raise RecipeError(f"--{dotted}: {'.'.join(keys[:depth])} is a plain value, it has no key {key!r}")
        if last:
            node[key] = value
        elif isinstance(node, dict):
            if node.get(key) is None:
                node[key] = {}
            node = node[key]
        else:
            node = node[key]
