"""HF Trainer for AudioPhi: the batch order of a BatchSchedule, losses that add up under accumulation, small
checkpoints."""

import contextlib
import json
import os
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
import yaml
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader
from transformers import Trainer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from audiophi.data.augment import Augment
from modeling_audiophi.alignment_audiophi import NO_TARGET

from .build import PARTS, part_of
from .checkpoints import keep_newest, read_marker, saving, seal
from .gradients import clip_gradients, gradient_norms
from .guards import LossGuard
from .recipe import Stage
from .sharding import average_gradients, collect, like, shard_optimizer_state, whole_optimizer_state
from .signals import StopSignals, ignore_in_worker

WEIGHTS_NAME, OPTIMIZER_NAME, SCHEDULER_NAME = "trainable.safetensors", "optimizer.pt", "scheduler.pt"


def trainable_state(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """What training changes: parameters with gradients, and the persistent buffers of the parts that hold them."""
    parameters = dict(model.named_parameters())
    parts = {part_of(name) for name, parameter in parameters.items() if parameter.requires_grad}
    buffers = {name for name, _ in model.named_buffers() if part_of(name) in parts}
    return {
        name: tensor
        for name, tensor in model.state_dict().items()
        if name in buffers or (name in parameters and parameters[name].requires_grad)
    }


# What is logged of a model's output, summed over the micro-batches of all processes.
LOGGED = ("lm_loss", "align_loss", "sound_loss", "clip_loss", "distill_loss", "align_skipped")


class Clock:
    """Seconds spent on optimiser steps of a stage: evaluations, checkpoints and earlier processes' losses not
    counted."""

    def __init__(self):
        self.seconds, self._since = 0.0, None

    def start(self) -> None:
        self._since = time.perf_counter()

    def stop(self) -> None:
        if self._since is not None:
            self.seconds, self._since = self.seconds + time.perf_counter() - self._since, None


class AudioPhiTrainer(Trainer):
    """Trains one stage.

    Args:
        stage: of the recipe. schedule: a BatchSchedule (None for streams, whose dataset yields batches).
        augment: applied to the encoder's output, cached or not.
        processor: saved and pushed with the model. Not Trainer's `processing_class`, whose special tokens Trainer
            would put into the generation settings.
        guard: stops an unhealthy stage. signals: ask to stop. Both may be None.
        plain: the model whose `sharded_copy` is trained (FSDP2); None: the model itself is.
        kwargs: Trainer's.

    `stop_requested`: whether any process was asked to stop, as of the current step; all processes know the same.
    `push_to_hub` publishes what `save_model` writes, a slim model with its code and the processor, and a model card.
    """

    def __init__(
        self,
        *args,
        stage: Stage,
        schedule=None,
        augment: Augment | None = None,
        processor=None,
        guard: LossGuard | None = None,
        signals: StopSignals | None = None,
        plain: torch.nn.Module | None = None,
        **kwargs,
    ):
        super().__init__(*args, **kwargs)
        self.plain = plain
        if plain is not None:  # for mixed precision only; accelerate leaves a prepared model as it is
            self.accelerator.prepare_model(self.model, device_placement=False, evaluation_mode=True)
        self.processor = processor
        self.stage, self.schedule, self.augment = stage, schedule, augment
        self.loss_is_scaled_for_ga = True  # compute_loss divides by the items of the whole optimiser step
        self.align_items_in_batch = self.clip_items_in_batch = self.distill_items_in_batch = None
        self.part_norms: dict[str, float] = {}
        self._sums: dict[str, torch.Tensor] = {}
        self._summed_steps = 0
        self.guard, self.signals = guard, signals
        self._micro_losses: list[torch.Tensor] = []
        self._last_saved = time.monotonic()
        self.stop_requested = self.save_is_due = False
        self.clock = Clock()
        if stage.gradient_checkpointing:  # here, not by Trainer, so that a measured step has it, too
            switch_checkpointing(self.model, "enable")

    def release(self) -> None:
        """Takes off the model what this stage put around it, so that the next one finds it as a resumed run would."""
        if self.stage.gradient_checkpointing:
            switch_checkpointing(self.model, "disable")
        # Autocast, and accelerate's note that it is there already. Its unwrap_model leaves the note, and takes off
        # can_return_tuple, too.
        for name in ("forward", "_original_forward", "_is_accelerate_prepared"):
            vars(self.model).pop(name, None)

    # ---- data --------------------------------------------------------------------------------------------------------

    def get_train_dataloader(self) -> DataLoader:
        """The schedule's batches. It knows its rank and its whole order, so accelerate has nothing to shard or
        shuffle."""
        options = {
            "collate_fn": self.data_collator,
            "num_workers": self.args.dataloader_num_workers,
            "pin_memory": self.args.dataloader_pin_memory,
            "persistent_workers": self.args.dataloader_persistent_workers,
            "worker_init_fn": ignore_in_worker if self.args.dataloader_num_workers else None,
            # Its own generator: the loader's seed must not come out of the random state that dropout uses.
            "generator": torch.Generator().manual_seed(self.args.seed),
        }
        if self.schedule is None:
            return DataLoader(self.train_dataset, batch_size=None, **options)
        return DataLoader(self.train_dataset, batch_sampler=self.schedule, **options)

    def _get_num_items_in_batch(self, batch_samples, device):
        for batch in batch_samples:
            if "position" in batch:
                self.train_dataset.trained_on(batch.pop("position"))
        counts = [[taught_clips(batch), described_clips(batch), distilled_tokens(batch)] for batch in batch_samples]
        counts = torch.tensor(counts, device=device).sum(0, keepdim=True)
        if self.args.world_size > 1:
            counts = self.accelerator.gather(counts).sum(0, keepdim=True)
        self.align_items_in_batch, self.clip_items_in_batch, self.distill_items_in_batch = counts[0].clamp(min=1)
        if self.guard is not None:
            self.guard.batches = batch_samples
        self._micro_losses = []
        if "label_weights" not in batch_samples[0]:
            return super()._get_num_items_in_batch(batch_samples, device)
        weights = sum((batch["label_weights"] * (batch["labels"] >= 0))[:, 1:].sum() for batch in batch_samples)
        return self.accelerator.reduce(weights.to(device), "sum")

    # ---- loss --------------------------------------------------------------------------------------------------------

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Sum of losses divided by the labelled tokens (lm), the clips (align, descriptions) and the tokens that a
        teacher has (distill) of the whole optimiser step, over all ranks."""
        self._evaluate_frozen_parts()
        inputs = dict(inputs)
        if (seeds := inputs.pop("augment_seeds", None)) is not None:
            inputs["augment"] = partial(self.augment, seeds=seeds)
        inputs.pop("drawn", None)  # names the rows, for the guard
        outputs = model(
            **inputs,
            num_items_in_batch=num_items_in_batch,
            align_items_in_batch=self.align_items_in_batch,
            clip_items_in_batch=self.clip_items_in_batch,
            align_loss_weight=self.stage.align_weight,
            **self._distilling(),
        )
        for name in LOGGED:
            if (value := getattr(outputs, name)) is not None:
                self._sums[name] = self._sums.get(name, 0) + value.detach().float()
        # Gradients are averaged over ranks, each of which has only its part of the sum.
        loss = outputs.loss * self.accelerator.num_processes
        self._micro_losses.append(loss.detach())
        return (loss, outputs) if return_outputs else loss

    def _distilling(self) -> dict:
        """Arguments of `forward` in a stage that distills."""
        if not self.stage.distills:
            return {}
        only = self.stage.loss == "distill"
        return {
            "distill_weight": 1.0 if only else self.stage.distill_weight,
            "distill_temperature": self.stage.distill_temperature,
            "distill_only": only,
            "distill_items_in_batch": self.distill_items_in_batch,
        }

    def measure_loss(self, batch: dict) -> torch.Tensor:
        """Loss of one micro-batch outside of training, in the stage's precision; nothing is recorded."""
        batch = self._prepare_inputs(batch)
        self.align_items_in_batch = self.clip_items_in_batch = self.distill_items_in_batch = None
        with self.accelerator.autocast():  # what train() will put around the model's forward
            loss = self.compute_loss(self.model, batch)
        self._sums, self._micro_losses = {}, []
        return loss

    def _evaluate_frozen_parts(self) -> None:
        """Frozen parts run without dropout."""
        model = self.accelerator.unwrap_model(self.model)
        if self.stage.tune.encoder == "frozen":
            model.model.audio_tower.eval()
        if self.stage.tune.llm == "frozen":
            model.model.language_model.eval()
            if self.stage.gradient_checkpointing:
                for layer in model.model.language_model.modules():
                    # What is checkpointed must be in training mode itself; what it consists of, with dropout, need not.
                    layer.training = getattr(layer, "gradient_checkpointing", False)

    def floating_point_ops(self, inputs):
        """Not estimated: the Trainer's formula knows text only."""
        return 0

    # ---- optimiser ---------------------------------------------------------------------------------------------------

    def create_optimizer(self, model=None):
        """AdamW with one learning rate per part; biases, norms and single values are not decayed."""
        if self.optimizer is None:
            model = self.model if model is None else model
            rates = {
                "encoder": self.stage.encoder_learning_rate,
                "adapter": self.stage.learning_rate,
                "llm": self.stage.llm_learning_rate,
            }
            decayed = set(self.get_decay_parameter_names(model))
            groups = []
            for part in PARTS:
                trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad and part_of(n) == part]
                for decay in (True, False):
                    group = [p for n, p in trained if (n in decayed and p.dim() > 1) == decay]
                    if group:
                        weight_decay = self.args.weight_decay if decay else 0.0
                        groups.append({"params": group, "lr": rates[part], "weight_decay": weight_decay, "part": part})
            optimizer_class, options = self.get_optimizer_cls_and_kwargs(self.args, model)
            self.optimizer = optimizer_class(groups, **options)
        return self.optimizer

    def _clip_grad_norm(self, model):
        if self.plain is not None:
            average_gradients(self.model)
        self.accelerator.unscale_gradients()  # fp16; it may be done once only, so accelerate cannot clip any more
        self._summed_steps += 1
        step = self.state.global_step + 1
        if step == 1 or step % self.args.logging_steps == 0:
            self.part_norms = gradient_norms(self.accelerator.unwrap_model(model))
        if self.plain is None:
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), self.args.max_grad_norm)
        else:
            norm = clip_gradients(self.model, self.args.max_grad_norm)
        self._agree(norm)
        return norm

    def _agree(self, norm) -> None:
        """Before the weights change, the processes tell each other about their losses, signals and clocks, in one
        exchange: each then does the same. Raises UnhealthyLoss."""
        losses = torch.stack(self._micro_losses).float()
        minutes = self.stage.save_minutes
        overdue = minutes is not None and time.monotonic() - self._last_saved > 60 * minutes
        asked = self.signals is not None and self.signals.received is not None
        told = torch.cat([losses.sum()[None], losses.new_tensor([asked, overdue])])
        if self.args.world_size > 1:
            torch.distributed.all_reduce(told)
        loss, stop, due = told.tolist()
        self.stop_requested, self.save_is_due = stop > 0, due > 0
        if self.guard is None:
            return
        if norm is not None:
            norm = float(norm)
        if reason := self.guard.judge(loss / self.args.world_size, norm):
            rates = {group["part"]: group["lr"] for group in self.optimizer.param_groups}
            model = self.accelerator.unwrap_model(self.model)
            failure = self.guard.failure(reason, self.state.global_step + 1, losses.tolist(), model, rates)
            self.accelerator.wait_for_everyone()  # the first process to fail ends the others
            raise failure

    # ---- logs --------------------------------------------------------------------------------------------------------

    def log(self, logs, start_time=None):
        if "loss" in logs:
            # Each rank has its part of the sums, and none of a loss that its batches had no rows for: all exchange the
            # same in any case, or some would wait for ever.
            found = [[float(self._sums.get(name, 0)), name in self._sums] for name in LOGGED]
            told = self.accelerator.reduce(torch.tensor(found, device=self.args.device), "sum")
            for name, (total, ranks) in zip(LOGGED, told.tolist(), strict=True):
                if ranks:
                    logs[name] = total / max(1, self._summed_steps)
            logs |= {f"grad_norm_{part}": norm for part, norm in self.part_norms.items()}
            self._sums, self._summed_steps = {}, 0
        super().log(logs, start_time)

    def create_model_card(self, language=None, license=None, tags=None, model_name=None):
        """The card that `push_to_hub` publishes, in output_dir: of the model that was saved there, by the run's recipe
        where there is one. The arguments say what these do not; ValueError for a licence that a part's forbids."""
        if self.is_world_process_zero():
            stated = {"name": model_name, "licence": license, "language": as_list(language), "tags": as_list(tags)}
            save_run_card(self.args.output_dir, self.hub_model_id, {k: v for k, v in stated.items() if v})

    # ---- checkpoints -------------------------------------------------------------------------------------------------

    def _save(self, output_dir=None, state_dict=None):
        """Into a checkpoint to resume from, only what training changes: the frozen parts never do. Into any other
        folder, what `from_pretrained` loads."""
        folder = Path(output_dir or self.args.output_dir)
        if not self.args.should_save:
            return
        model = self.accelerator.unwrap_model(self.model) if self.plain is None else self.plain
        if not folder.name.startswith(f"{PREFIX_CHECKPOINT_DIR}-"):
            return save_for_use(model, self.processor, folder)
        folder.mkdir(parents=True, exist_ok=True)
        state = trainable_state(model)
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, folder / WEIGHTS_NAME)

    def whole_model(self) -> torch.nn.Module:
        """The model with all of its parameters, as trained so far; every process must ask."""
        if self.plain is None:
            return self.accelerator.unwrap_model(self.model)
        collect(self.model, self.plain)
        return self.plain

    @contextlib.contextmanager
    def model_to_evaluate(self) -> Iterator[torch.nn.Module]:
        """The whole model, on the device as long as it is needed."""
        model = self.whole_model()
        if self.plain is not None:
            model.to(self.args.device)
        try:
            yield model
        finally:
            if self.plain is not None:
                model.to("cpu")

    def save_model(self, output_dir=None, _internal_call=False):
        self.whole_model()
        super().save_model(output_dir, _internal_call)

    def _save_optimizer_and_scheduler(self, output_dir):
        """A sharded optimiser's state is saved as one process saves it, so that any number of them can resume."""
        if self.plain is None:
            return super()._save_optimizer_and_scheduler(output_dir)
        state = whole_optimizer_state(self.optimizer.state_dict())
        if self.args.should_save:
            torch.save(state, os.path.join(output_dir, OPTIMIZER_NAME))
            torch.save(self.lr_scheduler.state_dict(), os.path.join(output_dir, SCHEDULER_NAME))

    def _load_optimizer_and_scheduler(self, checkpoint):
        if self.plain is None or checkpoint is None:
            return super()._load_optimizer_and_scheduler(checkpoint)
        state = torch.load(os.path.join(checkpoint, OPTIMIZER_NAME), map_location="cpu", weights_only=True)
        self.optimizer.load_state_dict(shard_optimizer_state(state, self.optimizer))
        self.lr_scheduler.load_state_dict(torch.load(os.path.join(checkpoint, SCHEDULER_NAME), weights_only=True))

    def _save_checkpoint(self, model, trial):
        """Raises SaveError; what was saved before stays."""
        folder = Path(self.args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        with saving(folder):
            super()._save_checkpoint(model, trial)
            if self.schedule is None:
                (folder / self._stream_name).write_text(json.dumps(self.train_dataset.state_dict()))
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            with saving(folder):
                seal(folder, self.clock.seconds)
            keep_newest(folder.parent)
        self._last_saved = time.monotonic()

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        model = self.accelerator.unwrap_model(self.model)
        load_trainable(model, load_file(os.path.join(resume_from_checkpoint, WEIGHTS_NAME)))
        self.clock.seconds = read_marker(Path(resume_from_checkpoint))["seconds"]
        if self.schedule is None and (state := Path(resume_from_checkpoint) / self._stream_name).exists():
            # Otherwise Trainer reads again, and drops, all batches before.
            self.args.ignore_data_skip = self.train_dataset.load_state_dict(json.loads(state.read_text()))

    @property
    def _stream_name(self) -> str:
        return f"stream_{self.args.process_index}.json"


def switch_checkpointing(model, to: str) -> None:
    """`to`: "enable" or "disable"; transformers renamed it in 5.x."""
    new, old = f"activation_checkpointing_{to}", f"gradient_checkpointing_{to}"
    getattr(model, new if hasattr(model, new) else old)()


def taught_clips(batch: dict) -> int:
    """How many of a batch's clips have a target of the loss align."""
    if "align_labels" not in batch:
        return 0
    taught = batch["align_labels"][:, 0] != NO_TARGET
    if "sound_labels" in batch:
        taught = taught | (batch["sound_labels"] >= 0).any(1)
    return int(taught.sum())


def described_clips(batch: dict) -> int:
    """How many of a batch's clips have a description for the clip tokens."""
    return int((batch["clip_labels"] >= 0).any(1).sum()) if "clip_labels" in batch else 0


def distilled_tokens(batch: dict) -> int:
    """How many of a batch's labelled tokens have a teacher (the first token of a chat is never predicted)."""
    return int((batch["teacher_labels"][:, 1:] >= 0).sum()) if "teacher_labels" in batch else 0


def save_for_use(model, processor, folder: Path, dtype: torch.dtype = torch.float32) -> None:
    """Slim model, its floating-point weights (with torch.int8 its matrices) stored as `dtype`, and processor (None:
    without), in `folder`."""
    state = model.state_dict()
    if dtype.is_floating_point and dtype != torch.float32:
        state = {name: value.to(dtype) if value.is_floating_point() else value for name, value in state.items()}
    model.save_pretrained(folder, slim=True, state_dict=state, int8=dtype == torch.int8)
    if processor is not None:
        processor.save_pretrained(folder)
        tokenizer = folder / "tokenizer.json"
        # Indented, as the tokenizer writes it, it is more than twice the size.
        compact = json.dumps(json.loads(tokenizer.read_text("utf-8")), ensure_ascii=False, separators=(",", ":"))
        tokenizer.write_text(compact, "utf-8")


def save_run_card(folder: str | Path, repository: str | None = None, stated: dict | None = None) -> None:
    """The model card of a model that was saved in a run's folder, by the run's recipe; without results, which
    `audiophi card` adds once they are measured. `stated`: keys of `publishing.data_sources.About`."""
    from audiophi.publishing.card_files import CARD_NAME, collect, write_card
    from audiophi.publishing.model_card import make_card

    inputs = collect(folder)
    inputs.repository = repository
    if stated:
        inputs.about = yaml.safe_dump({**(yaml.safe_load(inputs.about) or {}), **stated}, sort_keys=False)
    write_card(make_card(folder, inputs), inputs, Path(folder) / CARD_NAME)


def as_list(value: str | list[str] | None) -> list[str] | None:
    return [value] if isinstance(value, str) else value


def load_trainable(model: torch.nn.Module, state: dict[str, torch.Tensor]) -> None:
    """Puts trainable_state() back. Raises ValueError when it belongs to other settings."""
    expected = trainable_state(model)
    if expected.keys() != state.keys():
        missing, unexpected = expected.keys() - state.keys(), state.keys() - expected.keys()
        raise ValueError(
            "the checkpoint was made with other settings of what is tuned; "
            f"missing: {sorted(missing) or 'none'}; unexpected: {sorted(unexpected) or 'none'}"
        )
    with torch.no_grad():
        for name, tensor in expected.items():
            tensor.copy_(like(state[name], tensor))
