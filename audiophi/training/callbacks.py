"""What is watched while a stage trains: progress with ETA, WER or caption scores and the listening gap on a small
development set, the history file."""

import contextlib
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

from audiophi.evaluation.caption_metrics import has_metrics
from audiophi.evaluation.caption_scoring import summarize_captions
from audiophi.evaluation.scoring import AudioPhiTranscriber, shuffled_error_rate, summarize
from processing.audio_io import AudioError
from processing.prompts import INSTRUCTIONS

from .checkpoints import write_atomically
from .corpus import Corpus
from .uploads import HubUpload

SHOWN = (
    *("wer", "wer_align", "listening_gap", "listening_gap_align", "never_stopped"),
    *("cider_d", "label_accuracy", "label_accuracy_shuffled"),
)


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
    """A few development clips, read once, and the model's scores on them. Each process transcribes its part of them.

    Args:
        corpus: rows with text. clips: how many of them, spread evenly over the corpus.
        batch_size, max_new_tokens: for generation.
        instructions: by task; a source's own comes before.
    """

    def __init__(
        self,
        corpus: Corpus,
        processor,
        clips: int,
        batch_size: int,
        max_new_tokens: int,
        instructions: dict[str, str] = INSTRUCTIONS,
    ):
        self.processor, self.batch_size = processor, batch_size
        self.max_new_tokens, self.instructions = max_new_tokens, instructions
        picked = np.linspace(0, len(corpus) - 1, min(clips, len(corpus))).round().astype(int)
        self.rows = []
        for number in sorted(set(picked.tolist())):
            row = corpus.rows[number]
            try:
                waveform = corpus.waveform(row, 1.0, processor.sampling_rate)
                features = processor.encode_audio((waveform, processor.sampling_rate))
            except (AudioError, OSError) as error:
                corpus.drop(row, str(error))
                continue
            speaker = corpus.audio(row).get("speaker")
            self.rows.append((row, speaker, features))
        self.rows.sort(key=lambda item: -item[0].seconds)
        self._hidden: dict[int, dict] | None = None
        state = PartialState()
        self.mine = range(state.process_index, len(self.rows), state.num_processes)

    @torch.inference_mode()
    def prepare(self, model, frozen_encoder: bool) -> None:
        """Runs the encoder once if it is frozen, else before every evaluation."""
        self._hidden = None
        if not frozen_encoder:
            return
        encoded = {}
        for number in self.mine:
            features = self.rows[number][2]
            batch = self.processor.pad_audio([features])
            batch.pop("audio_num_windows")
            values = batch.pop(self.processor.feature_key).to(model.device)
            was_training = model.training
            model.eval()
            hidden, mask = model.model.encode(values, next(iter(batch.values())).to(model.device))
            model.train(was_training)
            tokens = features["num_audio_tokens"]
            encoded[number] = {
                "audio_hidden_states": hidden,
                "audio_hidden_mask": mask,
                "num_audio_tokens": tokens,
            }
        self._hidden = encoded

    def evaluate(self, model, with_lm: bool) -> tuple[dict, list[dict]]:
        """Scores (see evaluation.scoring.summarize, plus the gap of the alignment's own reading) and the predictions,
        in every process those of all of them.

        The random state is left as it was, so that evaluating does not change training.
        """
        clips = self._hidden or {number: self.rows[number][2] for number in self.mine}
        groups: dict[tuple[str, str], list[int]] = {}
        for number, (row, _, _) in enumerate(self.rows):
            if with_lm or row.task == "transcribe":  # without the LLM there are no captions
                groups.setdefault((row.task, row.instruction or self.instructions[row.task]), []).append(number)
        order = {number: place for place, number in enumerate(itertools.chain(*groups.values()))}
        predictions = []
        with preserved_random_state():
            for (task, instruction), numbers in groups.items():
                aligned = task == "transcribe"  # the alignment head has no part in a caption
                transcribe = AudioPhiTranscriber(
                    model, self.processor, instruction, self.max_new_tokens, None if aligned else 0.0, with_lm, aligned
                )
                mine = [number for number in numbers if number in self.mine]
                for start in range(0, len(mine), self.batch_size):
                    batch = mine[start : start + self.batch_size]
                    before = time.perf_counter()
                    results = transcribe([clips[number] for number in batch])
                    spent = (time.perf_counter() - before) / len(results)
                    for number, result in zip(batch, results, strict=True):
                        predictions.append({**self._known(number), "compute_seconds": spent, **result})
        if PartialState().num_processes > 1:
            predictions = gather_object(predictions)
        predictions.sort(key=lambda prediction: order[prediction["row"]])
        return development_scores(predictions), predictions

    def _known(self, number: int) -> dict:
        row, speaker, _ = self.rows[number]
        known = {"row": number, "id": row.id, "task": row.task, "speaker": speaker, "seconds": row.seconds}
        return {**known, "reference": row.text, "references": row.captions or [row.text], "label": row.label}


def development_scores(predictions: list[dict]) -> dict:
    """Scores of transcripts, if there are any, and of captions, if there are any (without aac-metrics only what needs
    no package)."""
    spoken = [p for p in predictions if p["task"] == "transcribe"]
    captions = [p for p in predictions if p["task"] == "caption"]
    scores = summarize(spoken) if spoken else {}
    if scores.get("wer_align") is not None:
        shuffled = shuffled_error_rate(spoken, "hypothesis_align")
        scores["listening_gap_align"] = None if shuffled is None else shuffled - scores["wer_align"]
    if captions:
        scores = {**summarize_captions(captions, with_package=has_metrics()), **scores}
    return scores


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
        trainer: whose `log` reaches TensorBoard. history: gets every log and evaluation.
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
        names = ("loss", "lm_loss", "align_loss", "caption_loss")
        losses = "  ".join(f"{name} {logs[name]:.3f}" for name in names if name in logs)
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
        shown = {name: scores[name] for name in SHOWN if scores.get(name) is not None}
        if not state.is_world_process_zero:
            return
        self.history.append(stage=self.stage.name, step=state.global_step, seconds=self._seconds(), **shown)
        self.trainer.log({f"eval_{name}": value for name, value in shown.items()})
        if not predictions:  # captions only, and a stage without the LLM
            return
        sample = predictions[len(predictions) // 2]
        heard = sample["hypothesis"] if self.with_lm else sample["hypothesis_align"]
        numbers = "  ".join(f"{name} {value:.3g}" for name, value in shown.items())
        print(
            f"  dev at step {state.global_step}: {numbers}  ({time.perf_counter() - before:.0f} s)\n"
            f"    said:  {sample['reference'].lower()[:110]}\n    heard: {heard[:110]}",
            flush=True,
        )


def duration(seconds: float) -> str:
    """65 -> "1:05", 3725 -> "1:02:05"."""
    minutes, seconds = divmod(round(max(0.0, seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
