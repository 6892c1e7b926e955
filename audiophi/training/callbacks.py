"""What is watched while a stage trains: progress with ETA, the tasks' scores on a small development set, the history
file."""

import contextlib
import copy
import itertools
import json
import random
import time
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from transformers import TrainerCallback

from audiophi.data.example import posed, with_clips
from audiophi.tasks import TASKS, wordings
from modeling_audiophi.engine_audiophi import Engine
from processing.audio_io import AudioError

from .checkpoints import write_atomically
from .corpus import Corpus
from .reports import report_transcripts
from .uploads import HubUpload

LOSSES = ("loss", "lm_loss", "align_loss", "sound_loss", "clip_loss", "distill_loss")


class History:
    """`history.jsonl`: one JSON object per log and per evaluation, over all stages; curves.py draws it."""

    def __init__(self, path: Path):
        self.path = Path(path)

    def read(self) -> list[dict]:
        if not self.path.exists():
            return []
        entries = []
        for line in self.path.read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(json.JSONDecodeError):  # a line cut short by a killed process
                entries.append(json.loads(line))
        return entries

    def append(self, **entry) -> None:
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")

    def forget(self, stage: str, after_step: int) -> None:
        """Drops what a killed process wrote after the checkpoint that the run resumes from."""
        kept = [e for e in self.read() if e["stage"] != stage or e["step"] <= after_step]
        write_atomically(self.path, "".join(json.dumps(entry) + "\n" for entry in kept))


class Development:
    """A few development rows, read once, and the model's scores on them. Each process answers its part of them.

    Args:
        corpus: rows of any tasks that have scores. clips: how many of them, spread evenly over the corpus.
        batch_size, max_new_tokens: for generation.
        instructions: by task, as the recipe has them; the first is asked where a row does not ask itself.
    """

    def __init__(
        self,
        corpus: Corpus,
        processor,
        clips: int,
        batch_size: int,
        max_new_tokens: int,
        instructions: dict[str, list[str]] | None = None,
    ):
        self.processor, self.batch_size = processor, batch_size
        self.max_new_tokens, self.instructions = max_new_tokens, instructions
        picked = np.linspace(0, len(corpus) - 1, min(clips, len(corpus))).round().astype(int)
        self.rows = []
        for number in sorted(set(picked.tolist())):
            row = corpus.rows[number]
            try:
                waveforms = [corpus.waveform(row, n, 1.0, processor.sampling_rate) for n in range(len(row.lengths))]
                features = [processor.encode_audio((waveform, processor.sampling_rate)) for waveform in waveforms]
            except (AudioError, OSError) as error:
                corpus.drop(row, str(error))
                continue
            self.rows.append((posed(corpus.example(row)), row.seconds, features, corpus.sources[row.table]))
        self.rows.sort(key=lambda item: -item[1])
        self._hidden: dict[int, list[dict]] | None = None
        state = PartialState()
        self.mine = range(state.process_index, len(self.rows), state.num_processes)
        self.shared = state.num_processes > 1

    def of_task(self, name: str) -> "Development":
        """The rows of one task, all of them for this process alone."""
        one = copy.copy(self)
        one.rows = [row for row in self.rows if row[0].task == name]
        one.mine, one.shared, one._hidden = range(len(one.rows)), False, None
        return one

    @torch.inference_mode()
    def prepare(self, model, frozen_encoder: bool) -> None:
        """Runs the encoder once if it is frozen, else before every evaluation."""
        self._hidden = None
        if not frozen_encoder:
            return
        was_training = model.training
        model.eval()
        encoded = {}
        for number in self.mine:
            encoded[number] = []
            for clip in self.rows[number][2]:
                batch = self.processor.pad_audio([clip])
                batch.pop("audio_num_windows")
                values = batch.pop(self.processor.feature_key).to(model.device)
                hidden, mask = model.model.encode(values, next(iter(batch.values())).to(model.device))
                encoded[number].append({"audio_hidden_states": hidden, "audio_hidden_mask": mask})
        model.train(was_training)
        self._hidden = encoded

    def evaluate(self, model, with_lm: bool) -> tuple[dict, list[dict]]:
        """Scores (each task's `development`; where two tasks call one the same, the later task's has its name behind
        it) and the predictions, in every process those of all of them. Without the LLM, only of tasks whose words the
        alignment head reads.

        The random state is left as it was, so that evaluating does not change training.
        """
        clips = self._hidden or {number: self.rows[number][2] for number in self.mine}
        groups: dict[str, list[int]] = {}
        for number, (example, *_) in enumerate(self.rows):
            if with_lm or TASKS[example.task].reads_alignment:
                groups.setdefault(example.task, []).append(number)
        order = {number: place for place, number in enumerate(itertools.chain(*groups.values()))}
        engine, predictions = Engine(model, self.processor), []
        with preserved_random_state():
            for name, numbers in groups.items():
                mine = [number for number in numbers if number in self.mine]
                for start in range(0, len(mine), self.batch_size):
                    predictions += self._answered(engine, name, mine[start : start + self.batch_size], clips, with_lm)
        if self.shared:
            predictions = gather_object(predictions)
        predictions.sort(key=lambda prediction: order[prediction["row"]])
        scores = {}
        for name in sorted(groups, key=lambda name: TASKS[name].order):
            found = TASKS[name].development([p for p in predictions if p["task"] == name])
            scores |= {f"{key}_{name}" if key in scores else key: value for key, value in found.items()}
        return scores, predictions

    def _answered(self, engine: Engine, name: str, batch: list[int], clips: dict, with_lm: bool) -> list[dict]:
        """Predictions of a batch of rows of one task."""
        task, before = TASKS[name], time.perf_counter()
        asked = wordings(name, self.instructions)
        prompts = [
            with_clips(task.messages(self.rows[number][0], asked), [{"encoded": clip} for clip in clips[number]])
            for number in batch
        ]
        aligned = task.reads_alignment and engine.model.model.alignment is not None
        # What is trained; cached states have no decoder either.
        settings = {"max_new_tokens": self.max_new_tokens, "do_sample": False, "hear_with": "alignment"}
        decoded_as = task.asked_as or name
        if decoded_as not in {*(getattr(engine.model.generation_config, "tasks", None) or {}), *self.processor.tasks}:
            decoded_as = None  # evaluated, but not trained
        answers = engine(prompts, decoded_as, with_alignment=aligned, with_lm=with_lm, **settings)
        spent = (time.perf_counter() - before) / len(batch)
        found = []
        for number, answer in zip(batch, answers, strict=True):
            text, heard = answer.texts[0] if answer.texts else None, " ".join(answer.heard) if answer.heard else None
            found.append(self.prediction(name, number, text, heard, answer.stopped, spent))
        return found

    def prediction(
        self, name: str, number: int, text: str | None, heard: str | None = None, stopped: bool = True, spent: float = 0
    ) -> dict:
        """What the task `name` scores of row `number`: its answer, what the alignment heard, whether the answer came to
        its end, seconds of computing."""
        example, seconds, *_ = self.rows[number]
        return {
            "row": number, "id": example.id, "task": name, "speaker": example.speaker, "seconds": seconds,
            "reference": example.reference, "hypothesis": text, "stopped": stopped, "hypothesis_align": heard,
            "compute_seconds": spent, **TASKS[name].fields(example, text),
        }  # fmt: skip


@contextlib.contextmanager
def preserved_random_state():
    """Python, NumPy and torch (CPU and current accelerator) random states are the same after the block."""
    python, numpy = random.getstate(), np.random.get_state()
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        yield
    random.setstate(python)
    np.random.set_state(numpy)


class StageCallback(TrainerCallback):
    """Prints progress, keeps the clock and the history, and evaluates every `eval_steps` and at the end.

    Args:
        trainer: whose `log` reaches `report_to`. history: gets every log and evaluation.
        development: None for no evaluation. offset: seconds that earlier stages took.
        upload: to the Hub, looked after between steps.
    """

    def __init__(
        self,
        trainer,
        history: History,
        development: Development | None,
        offset: float = 0.0,
        upload: HubUpload | None = None,
    ):
        self.trainer, self.history, self.development, self.offset = trainer, history, development, offset
        self.upload = upload
        self.stage = trainer.stage
        self.with_lm = self.stage.loss != "align"
        self._first_step, self._first_seconds = 0, 0.0

    def on_train_begin(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            self.history.forget(self.stage.name, state.global_step)
        self._first_step, self._first_seconds = state.global_step, self.trainer.clock.seconds
        if self.development is not None:
            with self.trainer.model_to_evaluate() as model:
                self.development.prepare(model, self.stage.tune.encoder == "frozen")

    def on_step_begin(self, args, state, control, **kwargs):
        self.trainer.clock.start()

    def on_step_end(self, args, state, control, **kwargs):
        self.trainer.clock.stop()
        if self.upload is not None:
            self.upload.poll()
        if self.trainer.stop_requested and state.global_step < state.max_steps:
            control.should_save = control.should_training_stop = True
            return  # a scheduler does not wait for an evaluation
        control.should_save = control.should_save or self.trainer.save_is_due
        every = self.stage.eval_steps
        if self.development is not None and (
            state.global_step == state.max_steps or (every and state.global_step % every == 0)
        ):
            # `log` clears the flag, and the step's own log would be lost.
            should_log = control.should_log
            self._evaluate(state)
            control.should_log = should_log

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not state.is_world_process_zero or "loss" not in logs:
            return
        self.history.append(stage=self.stage.name, step=state.global_step, seconds=self._seconds(), **logs)
        rate = (self.trainer.clock.seconds - self._first_seconds) / max(1, state.global_step - self._first_step)
        left = duration(rate * (state.max_steps - state.global_step))
        losses = "  ".join(f"{name} {logs[name]:.3f}" for name in LOSSES if name in logs)
        norms = " ".join(
            f"{k.removeprefix('grad_norm_')} {v:.2g}" for k, v in logs.items() if k.startswith("grad_norm_")
        )
        print(
            f"{self.stage.name} {state.global_step}/{state.max_steps}  {losses}  gradient {norms}  "
            f"lr {logs['learning_rate']:.2g}  {rate:.2f} s/step  ETA {left}",
            flush=True,
        )

    def _seconds(self) -> float:
        return round(self.offset + self.trainer.clock.seconds, 3)

    def _evaluate(self, state) -> None:
        """Every process takes part (under DDP the others would wait in vain), the first one reports."""
        before = time.perf_counter()
        with self.trainer.model_to_evaluate() as model:
            scores, predictions = self.development.evaluate(model, self.with_lm)
        tasks = sorted({p["task"] for p in predictions}, key=lambda name: TASKS[name].order)
        names = dict.fromkeys(
            key for task in tasks for name in TASKS[task].scored_as(scores).shown for key in (name, f"{name}_{task}")
        )
        shown = {name: scores[name] for name in names if scores.get(name) is not None}
        if not state.is_world_process_zero:
            return
        self.history.append(stage=self.stage.name, step=state.global_step, seconds=self._seconds(), **shown)
        self.trainer.log({f"eval_{name}": value for name, value in shown.items()})
        report_transcripts(self.trainer, predictions)
        if not predictions:  # no task that the alignment head reads, and a stage without the LLM
            return
        sample = predictions[len(predictions) // 2]
        heard = (sample["hypothesis"] if self.with_lm else sample["hypothesis_align"]) or ""
        numbers = "  ".join(f"{name} {value:.3g}" for name, value in shown.items())
        print(
            f"  dev at step {state.global_step}: {numbers}  ({time.perf_counter() - before:.0f} s)\n"
            f"    said:  {sample['reference'][:110]}\n    heard: {heard[:110]}",
            flush=True,
        )


def duration(seconds: float) -> str:
    """65 -> "1:05", 3725 -> "1:02:05"."""
    minutes, seconds = divmod(round(max(0.0, seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
