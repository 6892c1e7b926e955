"""Runs a recipe: data, components, cache, then stage after stage, each resumable, and the finished model.

In `output_dir`: `recipe.yaml` (resolved), `bad_rows.jsonl`, `history.jsonl`, `curves.png`, `decoding.json`, a folder
per stage (checkpoints while it trains, then a slim model and `stage.json`), and `final/` with model, processor and
model card.
Running the same command again skips finished stages and resumes the one that was cut short.
"""

import itertools
import json
import os
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import PartialState
from transformers import PrinterCallback, ProgressCallback, TrainingArguments, set_seed

from audiophi.data.dataset_streams import stream_examples
from audiophi.data.example import RowError
from audiophi.tasks import default_task

from .build import (
    apply_tuning,
    build_align_tokenizer,
    build_model,
    build_processor,
    full_align_vocab,
    learns_sounds,
    make_ready,
)
from .callbacks import Development, History, StageCallback
from .checkpoints import DamagedModel, checksums, damage, resumable_checkpoint, saving, write_atomically
from .continuing import DONE_NAME, check_same_recipe, remember_recipe
from .corpus import BadRows, Corpus, source_spec
from .curves import draw_curves
from .decoding_fit import fit_decoding, given_decoding
from .ears_fit import fit_ears
from .guards import LossGuard
from .kept import kept_vocab
from .plan import describe_stage, measure_step, steps_in_time
from .precision import fast_precision, training_device
from .recipe import Recipe, RecipeError, Source, Stage
from .reports import check_trackers, own_wandb_run
from .sharding import check_recipe, describe_sharding, sharded_copy, take_over
from .signals import StopSignals
from .stage_data import StageCollator, data_key, stage_augment, stage_data
from .trainer import AudioPhiTrainer, save_for_use, save_run_card
from .uploads import HubUpload

LIMIT_NAME = "steps_in_time"  # holds what the first process of a stage with `minutes` decided on
# For each other: while one prepares data, saves, or encodes longer clips than the others.
PATIENCE = timedelta(hours=3)


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
    signals: StopSignals
    upload: HubUpload | None  # in the main process, where the recipe names a repository
    sharded: bool  # FSDP2

    def say(self, text: str) -> None:
        say(text)


def run_recipe(recipe: Recipe) -> Path:
    """Trains all stages; returns the folder of the finished model.

    Raises RecipeError when output_dir holds another recipe's run, TooManyBadRows, ValueError for parts or data that
    do not fit, SaveError where the disk is full, DamagedModel, UnhealthyLoss, and Interrupted after SIGTERM or SIGUSR1.
    """
    with StopSignals() as signals:
        return run_stages(recipe, signals)


def run_stages(recipe: Recipe, signals: StopSignals) -> Path:
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        # Several processes on CPUs only become a group when asked to.
        PartialState(cpu=not torch.accelerator.is_available(), timeout=PATIENCE)
    main = PartialState().is_main_process
    check_trackers(recipe.report_to)
    if sharded := take_over():
        check_recipe(recipe)
    folder = Path(recipe.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    processes = PartialState().num_processes
    check_same_recipe(recipe, folder, processes)
    PartialState().wait_for_everyone()  # until all have read what the first one replaces
    if main:
        remember_recipe(recipe, folder, processes)
    run = prepare(recipe, folder, signals, sharded)
    try:
        for number, stage in enumerate(recipe.stages):
            if (folder / stage.name / DONE_NAME).exists():
                run.say(f"stage {stage.name}: finished before")
                later = [s for s in recipe.stages[number + 1 :] if (folder / s.name / DONE_NAME).exists()]
                if not later:
                    load_stage(run, stage)
            else:
                train_stage(run, number)
        if main:
            finish(run)
        PartialState().wait_for_everyone()
    finally:
        if run.upload is not None:
            run.upload.close()
    return folder / "final"


def finish(run: Run) -> None:
    """Chooses how to decode, saves `final/` and the curves, and uploads the model if it is not on the Hub yet."""
    final = run.folder / "final"
    if run.recipe.evaluation.fit_decoding and run.development is not None:
        run.model.to(training_device())
        given = given_decoding(run.recipe.generation)
        learned = run.recipe.init_from is not None or any(stage.loss != "align" for stage in run.recipe.stages)
        fit_decoding(run.model, run.development, given, run.folder, run.say, llm_learned=learned)
        if run.model.config.hear_with == "both":
            clips = run.recipe.evaluation.ears_clips
            heard = development_of(run.recipe, run.folder, run.processor, clips, together=False)
            fit_ears(run.model, heard, given, run.folder, run.say)
    draw_curves(run.history.read(), run.folder / "curves.png", run.recipe.name)
    save_model(run, final, getattr(torch, run.recipe.save_dtype), with_card=True)
    size = sum(file.stat().st_size for file in final.glob("*.safetensors"))
    run.say(f"finished: {final} ({size / 2**20:.1f} MB of weights), curves in {run.folder / 'curves.png'}")
    if run.upload is not None:
        run.upload.offer(final, run.recipe.name)
        run.upload.finish()


def development_of(recipe: Recipe, folder: Path, processor, clips: int, together: bool = True) -> Development:
    """At most so many rows of `data.eval`, read by all processes together or by this one alone."""
    bad, told = BadRows(folder / "bad_rows_eval.jsonl", 1.0), recipe.evaluation
    corpus = Corpus(recipe.data.eval, bad, recipe.text_case, recipe.cache_dir, together)
    return Development(corpus, processor, clips, told.batch_size, told.max_new_tokens, recipe.instructions)


def trained_tasks(recipe: Recipe, corpora: Iterable[Corpus]) -> list[str]:
    """Names of the tasks that a recipe's model learns, each once; of a stream by its sources' first usable rows."""
    names = [name for corpus in corpora for name in corpus.tasks]
    if recipe.data.streaming:
        sources = [source for stage in recipe.stages for source in stage.data or recipe.data.train]
        names = [source.task or streamed_task(source) for source in sources]
    return list(dict.fromkeys(names))


def streamed_task(source: Source, rows: int = 1000) -> str:
    """The task of a source that does not name it; the default one where none of its first `rows` can be used."""
    examples = itertools.islice(stream_examples([source_spec(source)]), rows)
    found = next((example for example in examples if not isinstance(example, RowError)), None)
    return default_task().name if found is None else found.task


def prepare(recipe: Recipe, folder: Path, signals: StopSignals, sharded: bool = False) -> Run:
    """Reads the data, builds processor and model, encodes what the cache lacks."""
    bad = BadRows(folder / "bad_rows.jsonl", recipe.data.max_bad_rows)
    processor = build_processor(recipe)
    align_tokenizer = build_align_tokenizer(recipe, processor)
    corpora, development = {}, None
    if not recipe.data.streaming:
        for stage in recipe.stages:
            if data_key(recipe, stage) not in corpora:
                sources = stage.data or recipe.data.train
                corpora[data_key(recipe, stage)] = Corpus(sources, bad, recipe.text_case, recipe.cache_dir)
        for corpus in corpora.values():
            say(f"data: {len(corpus):,} rows, {corpus.hours:.2f} h")
        if bad.expected:
            say(f"data: {len(bad.expected):,} clips were never downloaded; they are left out, and listed in {bad.path}")
    vocab = None
    if align_tokenizer is not None and recipe.data.streaming:
        vocab = full_align_vocab(processor.tokenizer, recipe.alignment.merges)
    elif align_tokenizer is not None:
        sounds = learns_sounds(recipe)
        texts = list(dict.fromkeys(text for corpus in corpora.values() for text in corpus.texts(sounds)))
        vocab = kept_vocab(align_tokenizer, texts, recipe.cache_dir)
    questions = [question for corpus in corpora.values() for question in corpus.questions.values()]
    model = build_model(recipe, processor, vocab, trained_tasks(recipe, corpora.values()), questions)
    if recipe.data.eval:
        development = development_of(recipe, folder, processor, recipe.evaluation.clips)
    history, upload = History(folder / "history.jsonl"), None
    if recipe.push_to_hub and PartialState().is_main_process:
        refuse_local_components(model)
        upload = HubUpload(recipe.push_to_hub, folder, say)
    told = (corpora, development, bad, history, signals, upload, sharded)
    return Run(recipe, folder, model, processor, align_tokenizer, *told)


def refuse_local_components(model) -> None:
    """RecipeError where a slim checkpoint on the Hub would name folders of this machine."""
    local = [base["id"] for base in model.config.base_components.values() if Path(base["id"]).is_absolute()]
    if local:
        raise RecipeError(
            f"push_to_hub: what is uploaded names its base components, but nobody else has {', '.join(local)}; "
            "give components by their ids on the Hub"
        )


def say(text: str) -> None:
    if PartialState().is_main_process:
        print(text, flush=True)


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
    collator = StageCollator(run, stage)
    precision = "fp16" if training_args.fp16 else "bf16" if training_args.bf16 else "fp32"
    model = run.model
    if run.sharded:
        model = sharded_copy(run.model.to("cpu"))
        run.say(f"stage {stage.name}: {describe_sharding(model)}")
    trainer = AudioPhiTrainer(
        model=model,
        plain=run.model if run.sharded else None,
        args=training_args,
        train_dataset=dataset,
        data_collator=collator,
        stage=stage,
        schedule=schedule,
        augment=stage_augment(stage),
        processor=run.processor,
        guard=LossGuard(folder, stage, precision, training_args.process_index, dataset.describe),
        signals=run.signals,
    )
    offset = sum(json.loads((run.folder / s.name / DONE_NAME).read_text())["seconds"] for s in recipe.stages[:number])
    trainer.remove_callback(ProgressCallback)
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(StageCallback(trainer, run.history, run.development, offset, run.upload))
    checkpoint = resumable_checkpoint(folder, run.say)
    cost = None
    if schedule is not None and checkpoint is None:
        cost = measure_step(trainer.model, schedule, lambda draws: collator([dataset[draw] for draw in draws]), trainer)
    if stage.minutes is not None:
        steps = steps_in_time(stage.minutes, steps, cost and cost[0], folder / LIMIT_NAME)
        schedule.steps = training_args.max_steps = steps
    run.say(describe_stage(stage.name, stage.losses, run.model, steps, rate, cost))
    if checkpoint is not None:
        run.say(f"  resuming at step {checkpoint.name.rpartition('-')[2]}")
    with run.signals.deferred(), own_wandb_run(training_args.report_to):
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        trainer.release()
        if trainer.state.global_step >= trainer.state.max_steps:
            finish_stage(run, stage, trainer)
        else:
            run.say(f"  stopped at step {trainer.state.global_step}, where a checkpoint is saved")


def training_arguments(recipe: Recipe, stage: Stage, number: int, folder: Path) -> TrainingArguments:
    """The stage as Trainer's arguments; the number of steps is filled in when the data is known."""
    precision, why = fast_precision(stage.precision, training_device().type)
    if why:
        say(f"stage {stage.name}: precision {precision} instead of {stage.precision}: {why}")
    optimizer = {} if stage.optimizer == "adamw" else {"optim": stage.optimizer}
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=stage.batch_size or 1,
        gradient_accumulation_steps=stage.grad_accum,
        max_steps=stage.steps or 1,
        learning_rate=stage.learning_rate,
        lr_scheduler_type=stage.schedule,
        warmup_steps=stage.warmup,
        weight_decay=stage.weight_decay,
        adam_beta2=stage.beta2,
        **optimizer,
        max_grad_norm=stage.max_grad_norm,
        use_cpu=not torch.accelerator.is_available(),  # unsaid, Trainer refuses bf16 on a CPU
        bf16=precision == "bf16",
        fp16=precision == "fp16",
        logging_steps=recipe.logging_steps,
        logging_first_step=True,
        save_strategy="steps",
        save_steps=stage.save_steps or 10**9,
        save_total_limit=None,  # AudioPhiTrainer removes old ones, when the new one is complete
        eval_strategy="no",  # StageCallback evaluates
        dataloader_num_workers=recipe.num_workers,
        dataloader_pin_memory=torch.cuda.is_available(),
        remove_unused_columns=False,
        disable_tqdm=True,
        report_to=recipe.report_to,
        run_name=f"{recipe.name} {stage.name}",
        seed=recipe.seed + number,
        logging_nan_inf_filter=False,  # a NaN must be seen
        use_cache=True,  # Trainer writes it into the config, which is saved
    )
    if (gpus := arguments.n_gpu) > 1:
        # Trainer would make it an nn.DataParallel, which cannot cut batches of clips and windows into parts.
        arguments._n_gpu = 1
        say(f"stage {stage.name}: one of {gpus} GPUs is used; `accelerate launch train.py RECIPE` uses all {gpus}")
    return arguments


def finish_stage(run: Run, stage: Stage, trainer: AudioPhiTrainer) -> None:
    """Saves the stage's slim model, marks it finished and removes its checkpoints."""
    folder = run.folder / stage.name
    trainer.whole_model()  # into run.model
    if PartialState().is_main_process:
        save_model(run, folder / "model")
        scores = [entry for entry in run.history.read() if entry["stage"] == stage.name and "loss" not in entry]
        done = {
            "name": stage.name,
            "steps": trainer.state.global_step,
            "seconds": trainer.clock.seconds,
            "scores": scores[-1] if scores else None,
            "model": checksums(folder / "model"),
        }
        write_atomically(folder / DONE_NAME, json.dumps(done, indent=1))
        for checkpoint in [*folder.glob("checkpoint-*"), *folder.glob("damaged-checkpoint-*")]:
            shutil.rmtree(checkpoint)
        if run.upload is not None and run.recipe.push_stages:
            run.upload.offer(folder / "model", f"{run.recipe.name}, stage {stage.name}")
        draw_curves(run.history.read(), run.folder / "curves.png", run.recipe.name)
    PartialState().wait_for_everyone()


def save_model(run: Run, folder: Path, dtype: torch.dtype = torch.float32, with_card: bool = False) -> None:
    """What `save_for_use` writes, and the model card; complete or not there at all. Raises SaveError."""
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    with saving(partial):
        save_for_use(run.model, run.processor, partial, dtype)
    if with_card:
        try:
            save_run_card(partial)
        except (ValueError, OSError) as error:  # not worth losing a trained model for
            run.say(f"no model card: {error}")
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(partial, folder)


def load_stage(run: Run, stage: Stage) -> None:
    """The model as the finished stage left it. Raises DamagedModel."""
    folder = run.folder / stage.name
    done = json.loads((folder / DONE_NAME).read_text(encoding="utf-8"))
    if (wrong := damage(folder / "model", done.get("model", {}))) is not None:
        raise DamagedModel(
            f"the model of stage {stage.name} in {folder / 'model'} is damaged: {wrong}. Put back a copy of it, or "
            f"delete {folder}, and the same command trains this stage again"
        )
    run.model = type(run.model).from_pretrained(run.folder / stage.name / "model", dtype=torch.float32)
    make_ready(run.model, run.recipe, run.model.generation_config.tasks)
