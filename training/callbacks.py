"""What is watched while a stage trains: progress with ETA, WER and listening gap on a small development set, the
history file."""

import contextlib
import json
import random
import time
from pathlib import Path

import numpy as np
import torch
from transformers import TrainerCallback

from evaluation.scoring import AudioPhiTranscriber, shuffled_error_rate, summarize
from processing.audio_io import AudioError

from .corpus import Corpus

SHOWN = ("wer", "wer_align", "listening_gap", "listening_gap_align", "never_stopped")


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
        self.path.write_text("".join(json.dumps(entry) + "\n" for entry in kept), encoding="utf-8")


class Development:
    """A few development clips, read once, and the model's scores on them.

    Args:
        corpus: rows with text. clips: how many of them, spread evenly over the corpus.
        batch_size, max_new_tokens, instruction: for generation.
    """

    def __init__(self, corpus: Corpus, processor, clips: int, batch_size: int, max_new_tokens: int, instruction: str):
        self.processor, self.batch_size = processor, batch_size
        self.max_new_tokens, self.instruction = max_new_tokens, instruction
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
        self._hidden: list[dict] | None = None

    @torch.inference_mode()
    def prepare(self, model, frozen_encoder: bool) -> None:
        """Runs the encoder once if it is frozen, else before every evaluation."""
        self._hidden = None
        if not frozen_encoder:
            return
        encoded = []
        for _, _, features in self.rows:
            batch = self.processor.pad_audio([features])
            batch.pop("audio_num_windows")
            values = batch.pop(self.processor.feature_key).to(model.device)
            was_training = model.training
            model.eval()
            hidden, mask = model.model.encode(values, next(iter(batch.values())).to(model.device))
            model.train(was_training)
            tokens = features["num_audio_tokens"]
            encoded.append({"audio_hidden_states": hidden, "audio_hidden_mask": mask, "num_audio_tokens": tokens})
        self._hidden = encoded

    def evaluate(self, model, with_lm: bool) -> tuple[dict, list[dict]]:
        """Scores (see evaluation.scoring.summarize, plus the gap of the alignment's own reading) and the predictions.

        The random state is left as it was, so that evaluating does not change training.
        """
        transcribe = AudioPhiTranscriber(model, self.processor, self.instruction, self.max_new_tokens, with_lm=with_lm)
        clips = self._hidden or [features for _, _, features in self.rows]
        predictions = []
        with preserved_random_state():
            for start in range(0, len(clips), self.batch_size):
                before = time.perf_counter()
                results = transcribe(clips[start : start + self.batch_size])
                spent = (time.perf_counter() - before) / len(results)
                for (row, speaker, _), result in zip(self.rows[start : start + self.batch_size], results, strict=True):
                    known = {"row": len(predictions), "id": row.id, "speaker": speaker, "seconds": row.seconds}
                    predictions.append({**known, "reference": row.text, "compute_seconds": spent, **result})
        scores = summarize(predictions)
        if scores["wer_align"] is not None:
            shuffled = shuffled_error_rate(predictions, "hypothesis_align")
            scores["listening_gap_align"] = None if shuffled is None else shuffled - scores["wer_align"]
        return scores, predictions


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
    """

    def __init__(self, trainer, history: History, development: Development | None, offset: float = 0.0):
        self.trainer, self.history, self.development, self.offset = trainer, history, development, offset
        self.stage = trainer.stage
        self.with_lm = self.stage.loss != "align"
        self._first_step, self._first_seconds = 0, 0.0

    def on_train_begin(self, args, state, control, **kwargs):
        self.history.forget(self.stage.name, state.global_step)
        self._first_step, self._first_seconds = state.global_step, self.trainer.clock.seconds
        if self.development is not None:
            self.development.prepare(self.trainer.model, self.stage.tune.encoder == "frozen")

    def on_step_begin(self, args, state, control, **kwargs):
        self.trainer.clock.start()

    def on_step_end(self, args, state, control, **kwargs):
        self.trainer.clock.stop()
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
        losses = "  ".join(f"{name} {logs[name]:.3f}" for name in ("loss", "lm_loss", "align_loss") if name in logs)
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
        scores, predictions = self.development.evaluate(self.trainer.model, self.with_lm)
        shown = {name: scores[name] for name in SHOWN if scores.get(name) is not None}
        if not state.is_world_process_zero:
            return
        self.history.append(stage=self.stage.name, step=state.global_step, seconds=self._seconds(), **shown)
        self.trainer.log({f"eval_{name}": value for name, value in shown.items()})
        sample = predictions[len(predictions) // 2]
        heard = sample["hypothesis"] if self.with_lm else sample["hypothesis_align"]
        numbers = "  ".join(f"{name} {value:.1f}" for name, value in shown.items())
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
