"""All benchmarks, one after the other, within half an hour: results.json and the tables of BENCHMARKS.md.

    make bench                                    all of it
    python benchmarks/run_all.py [--only NAME ...] [--quick] [--minutes 27] [--weights random]
    python benchmarks/run_all.py --tables         only BENCHMARKS.md again, from what results.json holds

Each script runs in a process of its own and gets its share of the minutes; what it has found is in the file at once,
and what it had no time for is named there. Nothing else should run on the machine. A trial (--quick) leaves both files
alone and writes its own into outputs/bench.
"""

import argparse
import importlib
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from measuring import ROOT, WEIGHTS, markdown, read_results

# Share of the time of each, in the order in which they run.
SHARES = {
    "against_peer": 0.48,
    "transcribe_folder": 0.14,
    "profile_step": 0.12,
    "packing": 0.05,
    "cost_vs_work": 0.21,
}
RESULTS = ROOT / "benchmarks" / "results.json"
PAGE = ROOT / "BENCHMARKS.md"
TRIAL = ROOT / "outputs" / "bench"
NOT_MEASURED = "not measured yet"


def tables(results: dict) -> dict[str, str]:
    """What stands between the markers of BENCHMARKS.md: {name: Markdown}."""
    found = {"headline": headline(results)}
    for name in SHARES:
        section = results.get(name)
        found[name] = described(section, importlib.import_module(name).table(section)) if section else NOT_MEASURED
    return found


def headline(results: dict) -> str:
    ratios = {name: value for name, value in sorted(results.items()) if not isinstance(value, dict)}
    return (
        markdown(["ratio", "ours over the peer"], [[f"`{k}`", v] for k, v in ratios.items()])
        if ratios
        else NOT_MEASURED
    )


def described(section: dict, table: str) -> str:
    """A table and how it was made."""
    machine = section["machine"]
    text = (
        f"{machine['cpu']}, {machine['threads']} threads of {machine['cores']} cores, load {machine['load']} at the "
        f"start, torch {machine['torch']}, transformers {machine['transformers']}; weights: {section['weights']}; "
        f"{section['seconds']:.0f} s."
    )
    if section["quick"]:
        text += " A trial (`--quick`): these figures say nothing."
    if not section["complete"]:
        text += " Stopped before its end."
    return f"{text}\n\n{table}"


def filled(page: str, contents: dict[str, str]) -> str:
    """`page` with new text between `<!-- name -->` and `<!-- /name -->`. ValueError for a name without markers."""
    for name, text in contents.items():
        start, end = f"<!-- {name} -->", f"<!-- /{name} -->"
        before, opened, rest = page.partition(start)
        _, closed, after = rest.partition(end)
        if not (opened and closed):
            raise ValueError(f"the page has no markers {start} ... {end}")
        page = f"{before}{start}\n{text}\n{end}{after}"
    return page


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=SHARES, default=list(SHARES), metavar="NAME")
    parser.add_argument("--quick", action="store_true", help="fewer cases and repetitions: does everything run?")
    parser.add_argument("--minutes", type=float, default=27, help="for all of them; with --only, their share of it")
    parser.add_argument("--weights", choices=WEIGHTS, default="auto")
    parser.add_argument("--tables", action="store_true", help="measure nothing")
    options = parser.parse_args(arguments)
    results, page = RESULTS, PAGE
    if options.quick:
        TRIAL.mkdir(parents=True, exist_ok=True)
        results, page = TRIAL / RESULTS.name, TRIAL / PAGE.name
        shutil.copy(PAGE, page)
    failed = []
    for name in [] if options.tables else options.only:
        minutes = options.minutes * SHARES[name]
        print(f"== {name}: at most about {minutes:.0f} minutes", flush=True)
        command = [sys.executable, str(ROOT / "benchmarks" / f"{name}.py"), "--minutes", str(minutes)]
        command += ["--weights", options.weights, "--output", str(results), *["--quick"] * options.quick]
        start = time.perf_counter()
        # A round that has begun is ended; one that hangs is not waited for.
        code = run(command, seconds=120 * minutes + 120)
        print(f"== {name}: {time.perf_counter() - start:.0f} s", flush=True)
        if code:
            failed.append(name)
            print(f"{name} ended with {code}", file=sys.stderr)
        write_page(page, results)
    if options.tables:
        write_page(page, results)
    return 1 if failed else 0


def run(command: list[str], seconds: float) -> int | str:
    """Its exit status. After `seconds` it is ended, with the processes that it has begun: they would slow down all that
    is measured after it."""
    process = subprocess.Popen(command, cwd=ROOT, start_new_session=True)
    try:
        return process.wait(seconds)
    except BaseException as error:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        if isinstance(error, subprocess.TimeoutExpired):
            return "a time-out"
        raise


def write_page(page: Path, results: Path) -> None:
    page.write_text(filled(page.read_text(encoding="utf-8"), tables(read_results(results))), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
