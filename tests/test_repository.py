"""What the repository promises about itself."""

import argparse
import json
import os
import re
import shlex
import tomllib
from pathlib import Path

from audiophi.cli.main import COMMANDS, PROGRAMS

ROOT = Path(__file__).resolve().parents[1]
PATHS = re.compile(
    r"(?<![\w/.$<>-])(?:audiophi|modeling_audiophi|processing|training|evaluation|publishing|cli|tools|benchmarks|recipes)"
    r"/[\w/*]*\w\.(?:py|yaml)\b"
)

NOTEBOOK = json.loads((ROOT / "docs" / "audiophi.ipynb").read_text(encoding="utf-8"))
# Path -> text of every page that people read, with the notebook's words.
DOCUMENTS = {
    str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
    for pattern in ("*.md", "docs/*.md", "data/*.md", "tests/*.md", "dev/*.md")
    for path in ROOT.glob(pattern)
    if path.name != "model_card.md"  # a template
} | {
    "docs/audiophi.ipynb": "\n".join(
        "".join(cell["source"]) for cell in NOTEBOOK["cells"] if cell["cell_type"] == "markdown"
    )
}


def test_every_dependency_is_explained_in_the_readme():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [
        *project["dependencies"],
        *(name for extra in project["optional-dependencies"].values() for name in extra),
    ]
    table = (ROOT / "README.md").read_text().split("## Why each dependency is there")[1]
    for requirement in wanted:
        assert re.match(r"[\w-]+", requirement)[0] in table, requirement


def test_files_that_are_named_exist():
    """In the documentation, configurations and the code's own comments; names without a folder are the model's."""
    named = {}
    for path in (path for kind in ("md", "py", "yaml", "sbatch", "toml") for path in ROOT.glob(f"**/*.{kind}")):
        parts = path.relative_to(ROOT).parts
        if not {".venv", "dev", "fixtures", "outputs", "cache", "checkpoints"} & {*parts}:
            for name in PATHS.findall(path.read_text(encoding="utf-8")):
                named.setdefault(name, "/".join(parts))
    assert len(named) > 30
    missing = {name: where for name, where in named.items() if not list(ROOT.glob(name))}
    assert not missing
    alone = {*re.findall(r"(?<![\w/*])\w+\.py\b", " ".join(DOCUMENTS.values()))}
    assert len(alone) > 5 and not {
        name for name in alone
        if not any((ROOT / folder / name).exists() for folder in (".", "modeling_audiophi", "benchmarks", "tests"))
    }  # fmt: skip


def test_links_lead_somewhere():
    """To files beside the document, and to headings that are there."""
    broken, seen = [], 0
    for name, text in DOCUMENTS.items():
        for target in re.findall(r"(?:\]\(|src=\")([^)\"\s]+)", text):
            path, _, heading = target.partition("#")
            if ":" in path:
                continue  # elsewhere
            seen += 1
            there = (ROOT / name).parent / path if path else ROOT / name
            if not there.exists() or (heading and heading not in headings(there.read_text(encoding="utf-8"))):
                broken.append((name, target))
    assert seen > 30 and not broken


def headings(text: str) -> set[str]:
    """The anchors of a Markdown page's headings."""
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in re.findall(r"(?m)^#+ (.+)$", text)}


def test_every_page_of_the_documentation_is_reached_from_the_readme():
    pages = {f"docs/{path.name}" for kind in ("md", "ipynb") for path in (ROOT / "docs").glob(f"*.{kind}")}
    assert len(pages) > 6 and pages <= {*re.findall(r"\]\(([^)#]+)", DOCUMENTS["README.md"])}


def test_commands_in_the_documentation_exist():
    """Programs, subcommands with their options, make's targets and this package's extras."""
    targets = {*re.findall(r"(?m)^([\w./-]+):", (ROOT / "Makefile").read_text())}
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    wrong, seen = [], set()
    for name, text in DOCUMENTS.items():
        blocks = "\n".join(re.findall(r"```sh\n(.*?)```", text, re.S)).replace("\\\n", " ").splitlines()
        for line in [*blocks, *re.findall(r"`([^`\n]+)`", text)]:
            command = [Path(line.split()[0]).name, *line.split()[1:]] if line.split() else [""]
            if command[0] in ("python", "accelerate") and (
                scripts := [word for word in command[1:] if word.endswith((".py", ".sbatch"))]
            ):
                fits = all((ROOT / script).exists() for script in scripts)
            elif command[0] == "make" and len(command) > 1:
                fits = command[1] in targets
            elif command[0] == "pip" and (asked := re.search(r"\[([\w,]+)\]", line)):
                fits = {*asked[1].split(",")} <= extras.keys()
            elif command[0] == "audiophi" and command[1:]:
                fits = command[1] in PROGRAMS or command[1] in COMMANDS and fits_parser(line)
            else:
                continue
            seen.add(command[0])
            if not fits:
                wrong.append((name, line))
    assert seen == {"python", "accelerate", "make", "pip", "audiophi"} and not wrong


def fits_parser(line: str) -> bool:
    """Whether a call of `audiophi` has no option that its command does not know."""
    words = shlex.split(line, comments=True)
    parser = argparse.ArgumentParser()
    COMMANDS[words[1]].add_arguments(parser)
    return {word for word in words[2:] if word.startswith("--")} <= parser._option_string_actions.keys()


def test_continuous_integration_runs_the_tests():
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK) and "make test" in script.read_text()


def test_modules_stay_readable():
    """Under 600 lines each: a long one had better be one idea."""
    modules = [path for path in ROOT.glob("**/*.py") if not {".venv", "tests"} & set(path.relative_to(ROOT).parts)]
    long = {path.name: lines for path in modules if (lines := len(path.read_text().splitlines())) >= 600}
    assert len(modules) > 30 and not long
