"""Stops a stage whose loss is no longer a number, or has risen for good, and keeps the batch for inspection.

Checked once per optimiser step, before the weights change. A loss that is not finite, or gradients that are not, always
stop the stage (in fp16 only after 20 steps in a row: its loss scaling skips steps by design). A finite loss stops it
when 20 steps in a row are above `max_loss_rise` (10 by default, null turns it off) times the median of the 100 steps
before them. Single batches that are hard, much longer than others, or out of another source of a mixture do not: were a
fifth of all batches 10 times as costly as the rest, 20 in a row would come once in 10^14 steps.
"""

import json
import math
import statistics
from collections import deque
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file

from .checkpoints import complete_checkpoints
from .recipe import Stage

RISEN_STEPS, REFERENCE_STEPS = 20, 100
SMALL_LOSS = 0.1  # below it, ten times nearly nothing is still nearly nothing
FP16_SKIPPED_STEPS = 20  # loss scaling halves its scale each time, from 2^16: by then it is below 1


class UnhealthyLoss(RuntimeError):
    """Training cannot go on from here; the message says why, where the batch is, and what may help."""


class LossGuard:
    """Watches one stage in one process.

    Args:
        folder: of the stage. stage: of the recipe. precision: that it runs in. rank: of this process.
        describe: (epoch, number of a row) -> what is known of the row.
    """

    def __init__(self, folder: Path, stage: Stage, precision: str, rank: int, describe: Callable[[int, int], dict]):
        self.folder, self.stage, self.precision, self.rank, self.describe = folder, stage, precision, rank, describe
        self.batches: list[dict] = []  # micro-batches of the current step, as they came from the loader
        self._recent: deque[float] = deque(maxlen=REFERENCE_STEPS + RISEN_STEPS)
        self._skipped = 0

    def judge(self, loss: float, gradient_norm: float | None) -> str | None:
        """Why to stop after a step with this loss and gradient norm (over all processes); None: all is well."""
        if not math.isfinite(loss):
            return f"the loss is {loss}"
        if gradient_norm is not None and not math.isfinite(gradient_norm):
            self._skipped += 1
            if self.precision != "fp16" or self._skipped >= FP16_SKIPPED_STEPS:
                in_a_row = f" for {self._skipped} steps in a row" if self._skipped > 1 else ""
                return f"the loss is {loss:.4g}, but its gradient's norm is {gradient_norm}{in_a_row}"
        else:
            self._skipped = 0
        self._recent.append(loss)
        if self.stage.max_loss_rise is None or len(self._recent) < self._recent.maxlen:
            return None
        before = statistics.median(list(self._recent)[:REFERENCE_STEPS])
        lowest = min(list(self._recent)[REFERENCE_STEPS:])
        if lowest > max(SMALL_LOSS, self.stage.max_loss_rise * before):
            return (
                f"the loss was at least {lowest:.4g} for {RISEN_STEPS} steps, after a median of {before:.4g} in the "
                f"{REFERENCE_STEPS} steps before, a rise by more than max_loss_rise: {self.stage.max_loss_rise:g}"
            )
        return None

    def failure(self, reason: str, step: int, losses: list[float], model, rates: dict[str, float]) -> UnhealthyLoss:
        """Saves this process's part of the step; what to raise.

        Args:
            losses: of the micro-batches, here. model: with its gradients. rates: learning rates by part.
        """
        suspects = [i for i, loss in enumerate(losses) if not math.isfinite(loss)] or range(len(losses))
        broken = {
            "weights": [name for name, p in model.named_parameters() if not p.detach().isfinite().all()],
            "gradients": [n for n, p in model.named_parameters() if p.grad is not None and not p.grad.isfinite().all()],
        }
        folder = self.folder / f"stopped-at-step-{step}"
        micro_batches, bad_inputs = [], []
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for i in suspects:
                batch = self.batches[i]
                tensors = {name: v.detach().cpu().clone() for name, v in batch.items() if isinstance(v, torch.Tensor)}
                name = f"rank{self.rank}-batch{i}.safetensors"
                save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / name)
                unusable = [k for k, v in tensors.items() if v.is_floating_point() and not v.isfinite().all()]
                bad_inputs += unusable
                rows = [self.describe(*drawn) for drawn in batch.get("drawn", [])]
                micro_batches.append({"file": name, "loss": losses[i], "inputs_not_finite": unusable, "rows": rows})
            report = {
                "stage": self.stage.name,
                "step": step,
                "reason": reason,
                "precision": self.precision,
                "learning_rates": rates,
                "micro_batches": micro_batches,
                "weights_not_finite": broken["weights"],
                "gradients_not_finite": broken["gradients"],
                "losses_before": list(self._recent),
            }
            (folder / f"rank{self.rank}.json").write_text(json.dumps(report, indent=1), encoding="utf-8")
            kept = f"The step's rows are listed in {folder / f'rank{self.rank}.json'}, their tensors lie beside it."
        except OSError as error:
            kept = f"The batch could not be saved in {folder}: {error}."
        advice = likely_causes(self.stage, self.precision, rates, bool(bad_inputs), bool(broken["weights"]))
        checkpoint = next(iter(complete_checkpoints(self.folder)), None)
        good = f"The last checkpoint, {checkpoint}, is from before" if checkpoint else "There is no checkpoint yet"
        return UnhealthyLoss(
            f"stage {self.stage.name} stopped in step {step}, before its weights were changed: {reason}. {kept} "
            f"{advice} {good}; the same command without changes would come to the same step."
        )


def likely_causes(stage: Stage, precision: str, rates: dict[str, float], bad_inputs: bool, bad_weights: bool) -> str:
    """What to change, most likely first, by what was found."""
    if bad_inputs:
        return (
            "Its inputs are not finite: look at these rows' audio and leave them out with the source's `exclude`, and "
            "delete the cache if they were encoded wrongly."
        )
    causes = []
    if bad_weights:
        causes.append("weights that are not finite already (the components or the checkpoint that training began from)")
    if precision == "fp16":
        causes.append("numbers too large for fp16 (precision: bf16 or fp32)")
    shown = ", ".join(f"{part} {rate:.2g}" for part, rate in rates.items())
    causes.append(f"a learning rate that is too high (now {shown}) or rises too fast (warmup: {stage.warmup:g})")
    causes.append("a row whose text does not belong to its audio")
    return f"Likely causes: {'; '.join(causes)}."
