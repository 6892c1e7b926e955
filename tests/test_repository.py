"""What the repository promises about itself."""

import os
import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_every_dependency_is_explained_in_the_readme():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [
        *project["dependencies"],
        *(name for extra in project["optional-dependencies"].values() for name in extra),
    ]
    table = (ROOT / "README.md").read_text().split("## Why each dependency is there")[1]
    for requirement in wanted:
        assert re.match(r"[\w-]+", requirement)[0] in table, requirement


def test_source_files_that_the_readme_names_exist():
    named = set(re.findall(r"[\w/]+\.(?:py|svg|yaml)\b", (ROOT / "README.md").read_text()))
    missing = {
        name for name in named if not (ROOT / name).exists() and not list((ROOT / "modeling_audiophi").glob(name))
    }
    assert len(named) > 10 and not missing


def test_continuous_integration_runs_the_tests():
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK) and "make test" in script.read_text()


def test_modules_stay_readable():
    """Under 400 lines each."""
    modules = [path for path in ROOT.glob("**/*.py") if not {".venv", "tests"} & set(path.relative_to(ROOT).parts)]
    long = {path.name: lines for path in modules if (lines := len(path.read_text().splitlines())) >= 400}
    assert len(modules) > 30 and not long
