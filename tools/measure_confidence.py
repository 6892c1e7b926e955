"""Are the words of which a model is sure right as often as it says? Its reliability on clips whose words are known.

    python tools/measure_confidence.py HELD_OUT [--model checkpoints/audiophi-tiny] [--limit 60]

Prints, per range of confidence, how many words there are, the mean of what was said of them and how many of them are
right, and over all words the expected calibration error (Guo et al. 2017, https://arxiv.org/abs/1706.04599).
"""

import argparse
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

BOUNDS = (0.0, 0.2, 0.4, 0.6, 0.8, 0.9, 0.95, 0.98, 1.0)


def words_of(pipe, data: str, split: str | None, limit: int | None) -> tuple[list[float], list[bool]]:
    """Confidence of every written word of a data set's transcripts, and whether it is in what was said."""
    from audiophi.data.datasets import load_examples
    from audiophi.tasks import default_task
    from modeling_audiophi.confidence_audiophi import found_in

    rows, sure, right = load_examples(data, split=split), [], []
    rows = rows if limit is None else rows.take(limit)
    for number, row in enumerate(rows, 1):
        clip = {"raw": row.clips[0].read(row.id, pipe.processor.sampling_rate)}
        clip["sampling_rate"] = pipe.processor.sampling_rate
        words = pipe(clip, task=default_task().name, return_confidence=True)["words"]
        sure += [word["confidence"] for word in words]
        right += found_in(" ".join(word["text"] for word in words), row.reference)
        if number % 20 == 0:
            print(f"{number} of {len(rows)} clips, {len(sure) - sum(right)} of {len(sure)} words wrong", flush=True)
    return sure, right


def reliability(sure: list[float], right: list[bool]) -> tuple[list[tuple[float, float, int, float, float]], float]:
    """Per range with words (from, to, words, mean confidence, share that is right), and the expected calibration
    error, the mean difference of the last two over all words."""
    sure, right = np.array(sure), np.array(right, float)
    rows, error = [], 0.0
    for low, high in zip(BOUNDS, BOUNDS[1:], strict=False):
        inside = (sure >= low) & ((sure < high) | (high == BOUNDS[-1]))
        if inside.any():
            rows.append((low, high, int(inside.sum()), sure[inside].mean().item(), right[inside].mean().item()))
            error += inside.sum() / len(sure) * abs(rows[-1][3] - rows[-1][4])
    return rows, float(error)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", help="speech with its words, as for eval.py --data")
    parser.add_argument("--model", default=str(ROOT / "checkpoints" / "audiophi-tiny"))
    parser.add_argument("--split")
    parser.add_argument("--limit", type=int, help="only the first N rows")
    args = parser.parse_args()
    from audiophi.cli.hear import load_pipeline

    args.dtype, args.hear_with, args.device = "float32", None, None
    rows, error = reliability(*words_of(load_pipeline(args), args.data, args.split, args.limit))
    print("| confidence | words | mean | right |\n|---|---|---|---|")
    for low, high, words, mean, share in rows:
        print(f"| {low:g} to {high:g} | {words:,} | {100 * mean:.1f} % | {100 * share:.1f} % |")
    print(f"expected calibration error {100 * error:.1f} points")


if __name__ == "__main__":
    main()
