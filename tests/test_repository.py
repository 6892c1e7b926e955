"""What the repository promises about itself."""

import os
import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PATHS = re.compile(
    r"(?<![\w/.$<>-])(?:audiophi|modeling_audiophi|processing|training|evaluation|publishing|cli|tools|benchmarks|recipes)"
    r"/[\w/*]*\w\.(?:py|yaml)\b"
)


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
    alone = {*re.findall(r"(?<![\w/*])\w+\.py\b", (ROOT / "README.md").read_text())}
    assert len(alone) > 5 and not {
        name for name in alone if not any((ROOT / folder / name).exists() for folder in (".", "modeling_audiophi"))
    }


def test_continuous_integration_runs_the_tests():
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK) and "make test" in script.read_text()


def test_modules_stay_readable():
    """Under 600 lines each: a long one had better be one idea."""
    modules = [path for path in ROOT.glob("**/*.py") if not {".venv", "tests"} & set(path.relative_to(ROOT).parts)]
    long = {path.name: lines for path in modules if (lines := len(path.read_text().splitlines())) >= 600}
    assert len(modules) > 30 and not long
