"""Align, then lm, against lm alone at equal wall-clock: WER over seconds of training.

    python benchmarks/align_vs_lm.py --seconds 900 --output_dir outputs/align_vs_lm [--key value ...]

Both runs use the same components, data and machine, and get the same seconds of training (encoding the features once,
and the evaluations, are not counted). A few steps of each stage are timed first; steps = seconds / time per step.
Further `--key value` pairs override both recipes (their stages: `--align_then_lm.stages.0.batch_size 8`,
`--lm.stages.0.learning_rate 1e-4`). Writes plan.json (the steps; a repeated call resumes with them), results.json and
curves.png.
"""

import argparse
import json
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from audiophi.training.callbacks import History  # noqa: E402  (the repository's root is not on a script's path)
from audiophi.training.curves import WER_LIMIT  # noqa: E402
from audiophi.training.recipe import load_recipe, recipe_from_dict, recipe_to_dict  # noqa: E402
from audiophi.training.stages import DONE_NAME, run_recipe  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
RUNS = {"align_then_lm": ROOT / "recipes" / "quickstart.yaml", "lm": ROOT / "recipes" / "lm_only.yaml"}
COLORS = {"align_then_lm": "tab:blue", "lm": "tab:red"}


def run_settings(run: str, overrides: list[str], output_dir: Path) -> dict:
    """A run's recipe as plain data: the overrides for both runs, and those that name this one."""
    chosen, keep = [], True
    for argument in overrides:
        if argument.startswith("--"):
            name, dot, rest = argument[2:].partition(".")
            keep = name == run or name not in RUNS
            argument = f"--{rest}" if dot and name == run else argument
        if keep:
            chosen.append(argument)
    settings = recipe_to_dict(load_recipe(RUNS[run], chosen))
    return {**settings, "output_dir": str(output_dir / run)}


def with_steps(settings: dict, steps: list[int], evaluations: int, output_dir: Path | None = None) -> dict:
    """The settings with a number of steps per stage, and about that many evaluations in each."""
    stages = []
    for stage, count in zip(settings["stages"], steps, strict=True):
        every = max(1, count // evaluations) if evaluations else None
        stages.append({**stage, "steps": count, "epochs": None, "eval_steps": every, "save_steps": every})
    data = settings["data"] if evaluations else {**settings["data"], "eval": []}
    output_dir = settings["output_dir"] if output_dir is None else str(output_dir)
    return {**settings, "stages": stages, "data": data, "output_dir": output_dir}


def seconds_per_step(settings: dict, folder: Path, steps: int) -> list[float]:
    """Times `steps` steps of every stage (this also fills the feature cache)."""
    shutil.rmtree(folder, ignore_errors=True)
    settings = with_steps(settings, [steps] * len(settings["stages"]), 0, folder)
    run_recipe(recipe_from_dict(settings))
    times = [json.loads((folder / s["name"] / DONE_NAME).read_text())["seconds"] / steps for s in settings["stages"]]
    shutil.rmtree(folder)
    return times


def make_plan(settings: dict[str, dict], seconds: float, align_share: float, output_dir: Path, steps: int) -> dict:
    """{run: steps per stage} such that each run trains for `seconds`."""
    plan = {}
    for run, own in settings.items():
        times = seconds_per_step(own, output_dir / f"{run}.timing", steps)
        shares = [align_share, 1 - align_share] if len(times) == 2 else [1 / len(times)] * len(times)
        plan[run] = [max(1, round(seconds * share / time)) for share, time in zip(shares, times, strict=True)]
        print(f"{run}: {', '.join(f'{t:.2f} s/step' for t in times)} -> steps {plan[run]}", flush=True)
    return plan


def curve(folder: Path) -> list[dict]:
    """The evaluations of a run. `best` is the WER of the reading that the stage trains (CTC in align, the LLM in
    lm)."""
    points = [entry for entry in History(folder / "history.jsonl").read() if "loss" not in entry]
    return [{**point, "best": point.get("wer", point.get("wer_align"))} for point in points]


def draw(curves: dict[str, list[dict]], path: Path, seconds: float) -> None:
    """WER over seconds, one line per run; the marker shows whose reading it is. Off the scale, at its edge."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(8, 4.5), layout="constrained")
    for run, points in curves.items():
        shown = [(p["seconds"], min(p["best"], WER_LIMIT)) for p in points]
        axis.plot(*zip(*shown, strict=True), color=COLORS[run], alpha=0.4, clip_on=False)
        for with_lm, marker, reading in ((False, "^", "CTC"), (True, "o", "LLM")):
            chosen = [place for place, p in zip(shown, points, strict=True) if ("wer" in p) == with_lm]
            if chosen:
                label = f"{run}, {reading}"
                axis.plot(*zip(*chosen, strict=True), marker, color=COLORS[run], label=label, clip_on=False)
        for (second, height), point in zip(shown, points, strict=True):
            if point["best"] > WER_LIMIT:
                axis.annotate(f"{point['best']:.0f}", (second, height), (0, 6), textcoords="offset points", ha="center")
    axis.axhline(100, color="0.6", lw=0.8, ls="--")
    axis.set(ylim=(0, WER_LIMIT), xlabel="seconds of training", ylabel="WER % (development clips)")
    axis.set_title(f"align then lm against lm alone, {seconds:.0f} s each", pad=20)
    axis.grid(alpha=0.3)
    axis.legend(loc="lower left")
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=900, help="of training for each run")
    parser.add_argument("--align_share", type=float, default=0.7, help="of those seconds for the align stage")
    parser.add_argument("--evaluations", type=int, default=8, help="per stage")
    parser.add_argument("--timing_steps", type=int, default=8)
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/align_vs_lm"))
    options, overrides = parser.parse_known_args(arguments)
    options.output_dir.mkdir(parents=True, exist_ok=True)
    settings = {run: run_settings(run, overrides, options.output_dir) for run in RUNS}
    plan_file = options.output_dir / "plan.json"
    if not plan_file.exists():
        plan = make_plan(settings, options.seconds, options.align_share, options.output_dir, options.timing_steps)
        plan_file.write_text(json.dumps(plan, indent=1))
    plan = json.loads(plan_file.read_text())
    for run, own in settings.items():
        run_recipe(recipe_from_dict(with_steps(own, plan[run], options.evaluations)))
    curves = {run: curve(options.output_dir / run) for run in settings}
    results = {"seconds": options.seconds, "steps": plan, "recipes": settings, "curves": curves}
    (options.output_dir / "results.json").write_text(json.dumps(results, indent=1))
    draw(curves, options.output_dir / "curves.png", options.seconds)
    for run, points in curves.items():
        print(f"{run}: WER {points[-1]['best']:.1f} % after {points[-1]['seconds']:.0f} s of training")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
