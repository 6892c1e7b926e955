"""Runs a recipe: data, components, cache, then stage after stage, each resumable, and the finished model.

In `output_dir`: `recipe.yaml` (resolved), `bad_rows.jsonl`, `history.jsonl`, `curves.png`, one folder per stage
(checkpoints while it trains, then a slim model and `stage.json`), and `final/` with model and processor. Running the
same command again skips finished stages and resumes the one that was cut short.
"""

import copy
import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import yaml
from accelerate import PartialState
from transformers import PrinterCallback, ProgressCallback, TrainingArguments, set_seed

from processing.augment import Augment
from processing.collator import AudioPhiCollator

from .batches import BatchSchedule
from .build import apply_tuning, build_align_tokenizer, build_model, build_processor, full_align_vocab
from .callbacks import Development, History, StageCallback
from .corpus import BadRows, Corpus, StreamingSet, TrainingSet, fill_cache
from .curves import draw_curves
from .feature_cache import FeatureCache, fingerprint_of, hash_weights
from .plan import describe_stage, measure_step, token_rate
from .recipe import Recipe, RecipeError, Stage, recipe_to_dict
from .trainer import AudioPhiTrainer, last_complete_checkpoint

DONE_NAME = "stage.json"
# Settings that may change between a run and its continuation: they do not change what is learned.
FREE_KEYS = {
    "output_dir",
    "cache",
    "cache_dir",
    "evaluation",
    "logging_steps",
    "num_workers",
    "report_to",
    "save_dtype",
    "stages",
}
FREE_STAGE_KEYS = {"eval_steps", "save_steps"}


@dataclass
class Run:
    """What all stages share."""

    recipe: Recipe
    folder: Path
    model: torch.nn.Module
    processor: object
    align_tokenizer: object | None
    corpora: dict[str, Corpus]
    development: Development | None
    bad: BadRows
    history: History

    def say(self, text: str) -> None:
        if PartialState().is_main_process:
            print(text, flush=True)


def run_recipe(recipe: Recipe) -> Path:
    """Trains all stages; returns the folder of the finished model.

    Raises RecipeError when output_dir holds another recipe's run, TooManyBadRows, ValueError for parts or data that
    do not fit.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not torch.accelerator.is_available():
        PartialState(cpu=True)  # several processes on CPUs only become a group when asked to
    main = PartialState().is_main_process
    folder = Path(recipe.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    check_same_recipe(recipe, folder / "recipe.yaml")
    if main:
        write_atomically(folder / "recipe.yaml", yaml.safe_dump(recipe_to_dict(recipe), sort_keys=False))
    run = prepare(recipe, folder)
    for number, stage in enumerate(recipe.stages):
        if (folder / stage.name / DONE_NAME).exists():
            run.say(f"stage {stage.name}: finished before")
            later = [s for s in recipe.stages[number + 1 :] if (folder / s.name / DONE_NAME).exists()]
            if not later:
                load_stage(run, stage)
        else:
            train_stage(run, number)
    if main:
        save_model(run, folder / "final", getattr(torch, recipe.save_dtype))
        draw_curves(run.history.read(), folder / "curves.png", recipe.name)
        size = sum(file.stat().st_size for file in (folder / "final").glob("*.safetensors"))
        run.say(f"finished: {folder / 'final'} ({size / 2**20:.1f} MB of weights), curves in {folder / 'curves.png'}")
    PartialState().wait_for_everyone()
    return folder / "final"


def check_same_recipe(recipe: Recipe, path: Path) -> None:
    """RecipeError naming what differs when `path` holds the recipe of a run that cannot be continued with this one."""
    if not path.exists():
        return
    before, now = yaml.safe_load(path.read_text(encoding="utf-8")), recipe_to_dict(recipe)
    different = [key for key in now if key not in FREE_KEYS and before.get(key) != now[key]]
    folder = path.parent
    for index, (old, new) in enumerate(zip(before["stages"], now["stages"], strict=False)):
        started = (folder / old["name"]).exists()
        if started:
            different += [f"stages.{index}.{k}" for k in new if k not in FREE_STAGE_KEYS and old.get(k) != new[k]]
    if different:
        raise RecipeError(
            f"{folder} holds a run with other settings of {', '.join(different)}; "
            "choose another output_dir, or delete that folder"
        )


def prepare(recipe: Recipe, folder: Path) -> Run:
    """Reads the data, builds processor and model, encodes what the cache lacks."""
    bad = BadRows(folder / "bad_rows.jsonl", recipe.data.max_bad_rows)
    processor = build_processor(recipe)
    align_tokenizer = build_align_tokenizer(recipe, processor)
    corpora, development = {}, None
    if not recipe.data.streaming:
        for stage in recipe.stages:
            if data_key(recipe, stage) not in corpora:
                corpora[data_key(recipe, stage)] = Corpus(stage.data or recipe.data.train, bad, recipe.text_case)
        for corpus in corpora.values():
            say(f"data: {len(corpus):,} clips, {corpus.hours:.2f} h")
    vocab = None
    if align_tokenizer is not None and recipe.data.streaming:
        vocab = full_align_vocab(processor.tokenizer, recipe.alignment.merges)
    elif align_tokenizer is not None:
        vocab = align_tokenizer.vocab(text for corpus in corpora.values() for text in corpus.texts(recipe.text_case))
    model = build_model(recipe, processor, vocab)
    if recipe.data.eval:
        eval_bad = BadRows(folder / "bad_rows_eval.jsonl", 1.0)
        development = Development(
            Corpus(recipe.data.eval, eval_bad, recipe.text_case),
            processor,
            recipe.evaluation.clips,
            recipe.evaluation.batch_size,
            recipe.evaluation.max_new_tokens,
            recipe.instructions[0],
        )
    return Run(
        recipe, folder, model, processor, align_tokenizer, corpora, development, bad, History(folder / "history.jsonl")
    )


def say(text: str) -> None:
    if PartialState().is_main_process:
        print(text, flush=True)


def data_key(recipe: Recipe, stage: Stage) -> str:
    """Equal for stages that train on the same sources."""
    return json.dumps([asdict(source) for source in stage.data or recipe.data.train])


def stage_cache(run: Run, stage: Stage, corpus: Corpus) -> FeatureCache | None:
    """The filled cache of a stage with a frozen encoder; None where the encoder must run: tuned, a learned layer mix,
    or no cache."""
    recipe, model = run.recipe, run.model.model
    if not recipe.cache or stage.tune.encoder != "frozen":
        return None
    if recipe.encoder_layer == "mix":
        run.say("cache: off, a learned layer mix needs all layers of the encoder")
        return None
    cache = FeatureCache(
        recipe.cache_dir,
        fingerprint_of(
            weights=hash_weights(model.audio_tower),
            encoder=run.model.config.audio_config.model_type,
            layer=recipe.encoder_layer,
            window_frames=run.processor.window_frames,
            features=json.loads(run.processor.feature_extractor.to_json_string()),
        ),
        recipe.cache_dtype,
    )
    model.audio_tower.eval()
    device = next(model.audio_tower.parameters()).device

    def encode(features, mask):
        return model.encode(features.to(device), mask.to(device))

    def report(done, total):
        if done == total or done // 1000 != (done - 16) // 1000:
            run.say(f"cache: {done:,} of {total:,} clips encoded")

    # One process fills it, the others find it full.
    with PartialState().main_process_first():
        cache.refresh()
        fill_cache(corpus, cache, run.processor, encode, recipe.data.speeds, report=report)
    run.say(f"cache: {len(cache):,} clips, {cache.nbytes / 2**20:.0f} MB in {cache.folder}")
    return cache


def train_stage(run: Run, number: int) -> None:
    """Trains one stage from where its last checkpoint, or the stage before it, left the model."""
    recipe, stage, folder = run.recipe, run.recipe.stages[number], run.folder / run.recipe.stages[number].name
    set_seed(recipe.seed + number)  # LoRA's initial values must not depend on how many stages ran in this process
    apply_tuning(run.model, stage)
    training_args = training_arguments(recipe, stage, number, folder)
    run.model.to(training_args.device)
    dataset, schedule, cache, rate = stage_data(run, stage, number, training_args)
    steps = schedule.steps if schedule else stage.steps
    training_args.max_steps = steps
    augment = stage_augment(recipe, stage)
    live = augment is not None and cache is None and stage.tune.encoder == "frozen"
    collator = StageCollator(run, stage, None if live else augment, live)
    trainer = AudioPhiTrainer(
        model=run.model,
        args=training_args,
        train_dataset=dataset,
        data_collator=collator,
        stage=stage,
        schedule=schedule,
        augment=augment if live else None,
    )
    offset = sum(json.loads((run.folder / s.name / DONE_NAME).read_text())["seconds"] for s in recipe.stages[:number])
    trainer.remove_callback(ProgressCallback)
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(StageCallback(trainer, run.history, run.development, offset))
    checkpoint = last_complete_checkpoint(folder)
    cost = None
    if schedule is not None and checkpoint is None:
        cost = measure_step(run.model, schedule, lambda draws: collator([dataset[draw] for draw in draws]), trainer)
    run.say(describe_stage(stage.name, stage.loss, run.model, steps, rate, cost))
    if checkpoint is not None:
        run.say(f"  resuming at step {checkpoint.name.rpartition('-')[2]}")
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    finish_stage(run, stage, trainer)


def stage_data(run: Run, stage: Stage, number: int, arguments: TrainingArguments):
    """(dataset, schedule or None for streams, cache or None, token rate or None)."""
    recipe = run.recipe
    rank, world_size = arguments.process_index, arguments.world_size
    sources = stage.data or recipe.data.train
    if recipe.data.streaming:
        return StreamingSet(sources, run.bad, run.processor, stage, recipe, rank, world_size), None, None, None
    corpus = run.corpora[data_key(recipe, stage)]
    cache = stage_cache(run, stage, corpus)
    rate = token_rate(run.model, run.processor, corpus, recipe.instructions)
    if stage.loss != "align" and run.model.config.readout == "frames":
        corpus = without_long_prompts(run, corpus, rate)
    schedule = BatchSchedule(
        [row.seconds for row in corpus.rows],
        steps=stage.steps,
        epochs=stage.epochs,
        batch_size=stage.batch_size,
        batch_seconds=stage.batch_seconds,
        grad_accum=stage.grad_accum,
        sources=[row.table for row in corpus.rows],
        weights=[source.weight for source in sources],
        speeds=recipe.data.speeds,
        seed=recipe.seed + number,
        rank=rank,
        world_size=world_size,
    )
    dataset = TrainingSet(corpus, run.processor, cache, recipe.instructions, recipe.seed, stage.time_stretch)
    return dataset, schedule, cache, rate


def without_long_prompts(run: Run, corpus: Corpus, rate: dict) -> Corpus:
    """The corpus without clips whose prompt exceeds the LLM's context; they are listed among the bad rows."""
    if not rate["context"] or rate["longest_prompt"] <= rate["context"]:
        return corpus
    slowest = min(run.recipe.data.speeds)
    room = rate["context"] - (rate["longest_prompt"] - rate["longest_audio"])
    kept = []
    for row in corpus.rows:
        tokens = run.processor.num_audio_tokens(int(row.seconds / slowest * run.processor.sampling_rate))
        if tokens <= room:
            kept.append(row)
        else:
            corpus.drop(row, f"{tokens} audio tokens ({row.seconds:.0f} s) exceed the context of {rate['context']}")
    shorter = copy.copy(corpus)
    shorter.rows = kept
    return shorter


def stage_augment(recipe: Recipe, stage: Stage) -> Augment | None:
    """Feature noise and SpecAugment of a stage; None for neither."""
    if not stage.noise and stage.spec_augment is None:
        return None
    masks = stage.spec_augment
    return Augment(
        time_masks=masks.time_masks if masks else 0.0,
        time_width=masks.time_width if masks else 0,
        feature_dropout=masks.feature_prob if masks else 0.0,
        noise=stage.noise,
        seed=recipe.seed,
    )


class StageCollator:
    """AudioPhiCollator for a stage; `live`: names every window for the augmentation of live encoder outputs."""

    def __init__(self, run: Run, stage: Stage, augment: Augment | None, live: bool):
        from modeling_audiophi.adapters import adapter_class

        adapter = run.model.config.adapter_config
        self.live = live
        self.collate = AudioPhiCollator(
            run.processor,
            mode=stage.loss,
            align_tokenizer=run.align_tokenizer,
            augment=augment,
            text_case=run.recipe.text_case,
            adapter_length_rule=adapter_class(adapter).length_rule(adapter),
        )

    def __call__(self, examples: list[dict]) -> dict:
        batch = dict(self.collate(examples))
        if self.live:
            windows = batch["audio_num_windows"].tolist()
            batch["augment_keys"] = [
                (example["epoch"], example["id"], window)
                for example, count in zip(examples, windows, strict=True)
                for window in range(count)
            ]
        return batch


def training_arguments(recipe: Recipe, stage: Stage, number: int, folder: Path) -> TrainingArguments:
    """The stage as Trainer's arguments; the number of steps is filled in when the data is known."""
    checkpointing = {}
    if stage.gradient_checkpointing:  # transformers renamed it in 5.x
        new, old = "activation_checkpointing", "gradient_checkpointing"
        checkpointing = {new if new in TrainingArguments.__dataclass_fields__ else old: True}
    return TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=stage.batch_size or 1,
        gradient_accumulation_steps=stage.grad_accum,
        max_steps=stage.steps or 1,
        learning_rate=stage.learning_rate,
        lr_scheduler_type=stage.schedule,
        warmup_steps=stage.warmup,
        weight_decay=stage.weight_decay,
        adam_beta2=stage.beta2,
        max_grad_norm=stage.max_grad_norm,
        use_cpu=not torch.accelerator.is_available(),  # unsaid, Trainer refuses bf16 on a CPU (a step is 3 times faster)
        bf16=stage.precision == "bf16",
        fp16=stage.precision == "fp16",
        **checkpointing,
        logging_steps=recipe.logging_steps,
        logging_first_step=True,
        save_strategy="steps",
        save_steps=stage.save_steps or 10**9,
        save_total_limit=2,
        eval_strategy="no",  # StageCallback evaluates
        dataloader_num_workers=recipe.num_workers,
        dataloader_pin_memory=torch.cuda.is_available(),
        remove_unused_columns=False,
        disable_tqdm=True,
        report_to=recipe.report_to,
        seed=recipe.seed + number,
        logging_nan_inf_filter=False,  # a NaN must be seen
    )


def finish_stage(run: Run, stage: Stage, trainer: AudioPhiTrainer) -> None:
    """Saves the stage's slim model, marks it finished and removes its checkpoints."""
    folder = run.folder / stage.name
    if PartialState().is_main_process:
        save_model(run, folder / "model")
        scores = [entry for entry in run.history.read() if entry["stage"] == stage.name and "loss" not in entry]
        done = {"name": stage.name, "steps": trainer.state.global_step, "seconds": trainer.clock.seconds}
        write_atomically(folder / DONE_NAME, json.dumps({**done, "scores": scores[-1] if scores else None}, indent=1))
        for checkpoint in folder.glob("checkpoint-*"):
            shutil.rmtree(checkpoint)
        draw_curves(run.history.read(), run.folder / "curves.png", run.recipe.name)
    PartialState().wait_for_everyone()


def save_model(run: Run, folder: Path, dtype: torch.dtype = torch.float32) -> None:
    """Slim model, its floating-point weights stored as `dtype`, and processor; complete or not there at all."""
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    state = run.model.state_dict()
    if dtype != torch.float32:
        state = {name: value.to(dtype) if value.is_floating_point() else value for name, value in state.items()}
    run.model.save_pretrained(partial, state_dict=state)
    run.processor.save_pretrained(partial)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(partial, folder)


def load_stage(run: Run, stage: Stage) -> None:
    """The model as the finished stage left it."""
    device = run.model.device
    run.model = type(run.model).from_pretrained(run.folder / stage.name / "model", dtype=torch.float32).to(device)


def write_atomically(path: Path, text: str) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)
