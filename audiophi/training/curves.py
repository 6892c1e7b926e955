"""curves.png: loss, WER and listening gap over the seconds of training, from a run's history.jsonl.

python -m audiophi.training.curves outputs/quickstart
"""

import sys
from pathlib import Path

from .callbacks import History

COLORS = ("tab:blue", "tab:orange", "tab:green", "tab:red", "tab:purple", "tab:brown", "tab:pink")
WER_LIMIT = 160  # a model that runs away scores several hundred percent; the axis ends here


def draw_curves(entries: list[dict], path: str | Path, title: str = "") -> None:
    """Draws history entries (see callbacks.History) to a PNG; stages are told apart by shading."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (losses, rates) = plt.subplots(2, 1, figsize=(8, 7), sharex=True, layout="constrained")
    stages = list(dict.fromkeys(entry["stage"] for entry in entries))
    for number, stage in enumerate(stages):
        seconds = [entry["seconds"] for entry in entries if entry["stage"] == stage]
        for axis in (losses, rates):
            axis.axvspan(min(seconds), max(seconds), color="0.95" if number % 2 else "0.88", lw=0)
        losses.text(min(seconds), 1.0, f" {stage}", transform=losses.get_xaxis_transform(), va="top")
    curves = {
        losses: ("lm_loss", "align_loss", "sound_loss", "clip_loss", "distill_loss"),
        rates: ("wer", "wer_align", "listening_gap", "label_accuracy", "accuracy", "cer", "cer_align"),
    }
    for axis, names in curves.items():
        for color, name in zip(COLORS, names, strict=False):
            label = name
            for stage in stages:
                points = [(e["seconds"], e[name]) for e in entries if e["stage"] == stage and name in e]
                if points:
                    axis.plot(*zip(*points, strict=True), ".-", color=color, label=label)
                    label = None
    losses.set_ylabel("loss")
    if losses.lines:
        losses.set_yscale("log")
    rates.set_ylabel("%, development clips")
    rates.set_ylim(0, WER_LIMIT)
    rates.set_xlabel("seconds of training (evaluation not counted)")
    for axis in (losses, rates):
        axis.grid(alpha=0.3)
        if axis.lines:
            axis.legend(loc="upper right")
    figure.suptitle(title)
    figure.savefig(path, dpi=130)
    plt.close(figure)


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    draw_curves(History(folder / "history.jsonl").read(), folder / "curves.png", folder.name)
    print(folder / "curves.png")
