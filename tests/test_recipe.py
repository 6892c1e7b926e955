"""Recipes: unknown keys, overrides, types and contradictions."""

import textwrap
from pathlib import Path

import pytest

from audiophi.training.recipe import RecipeError, load_recipe, parse_overrides, recipe_from_dict, recipe_to_dict

MINIMAL = """
name: tiny
components: {audio: some/encoder, text: some/llm}
alignment: {merges: 100}
data: {train: [{path: a.jsonl}, {path: b.jsonl, weight: 2}]}
stages:
  - {name: align, loss: align, steps: 10, batch_size: 4, learning_rate: 1e-3}
"""


@pytest.fixture
def recipe_file(tmp_path):
    path = tmp_path / "tiny.yaml"
    path.write_text(textwrap.dedent(MINIMAL))
    return path


def test_defaults_and_types(recipe_file):
    recipe = load_recipe(recipe_file)
    assert recipe.output_dir == "outputs/tiny"
    assert recipe.stages[0].learning_rate == pytest.approx(1e-3)  # YAML 1.1 reads 1e-3 as text
    assert recipe.stages[0].tune.llm == "frozen"
    assert recipe.data.train[1].weight == 2.0
    assert recipe_from_dict(recipe_to_dict(recipe)) == recipe


def test_every_kind_of_key_can_be_overridden(recipe_file):
    recipe = load_recipe(
        recipe_file,
        ["--seed", "7", "--stages.0.steps=3", "--data.train.1.path", "c.jsonl", "--adapter.type", "conv_mlp"]
        + [
            "--stages.0.spec_augment.time_masks",
            "2",
            "--components.audio",
            "/x",
            "--cache",
            "false",
            "--data.streaming",
        ],
    )
    assert (recipe.seed, recipe.stages[0].steps, recipe.data.train[1].path) == (7, 3, "c.jsonl")
    assert recipe.adapter == {"type": "conv_mlp"}
    assert recipe.stages[0].spec_augment.time_masks == 2.0
    assert recipe.components.audio == "/x" and recipe.cache is False and recipe.data.streaming is True


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (["--sed", "1"], "unknown key 'sed': did you mean 'seed'"),
        (["--stages.0.learning_rte", "1"], "stages.0.learning_rte.*learning_rate"),
        (["--data.train.0.spilt", "x"], "data.train.0.spilt.*split"),
        (["--stages.3.steps", "1"], "not an item"),
        (["--seed.x", "1"], "unknown key 'seed.x'|expected int"),
        (["--seed", "many"], "seed: expected int"),
        (["--stages.0.loss", "ctc"], "not one of 'align', 'lm', 'both', 'distill'"),
        (["--stages.0.epochs", "1"], "either steps or epochs"),
        (["--stages.0.batch_seconds", "9"], "either batch_size or batch_seconds"),
        (["--stages.0.tune.adapter", "frozen"], "everything is frozen"),
        (["--stages.0.tune.adapter", "frozen", "--stages.0.tune.readout", "full"], "reaches encoder, adapter"),
        (["--stages.0.tune.llm", "full"], "does not run the LLM"),
        (["--alignment", "null"], "alignment"),
        (["--stages.0.name", "a/b"], "cannot name a folder"),
        (["--data.max_bad_rows", "5"], "share between 0 and 1"),
        (["--stages.0.steps", "0"], "above 0"),
        (["--data.speeds", "[]"], "factors"),
        (["seed", "1"], "expected --key value"),
    ],
)
def test_mistakes_are_named(recipe_file, override, message):
    with pytest.raises(RecipeError, match=message):
        load_recipe(recipe_file, override)


def test_missing_parts_are_named(tmp_path, recipe_file):
    with pytest.raises(RecipeError, match="components, data, stages"):
        recipe_from_dict({"name": "x"})
    with pytest.raises(RecipeError, match="did you mean .*tiny.yaml"):
        load_recipe(tmp_path / "tinny.yaml")
    (tmp_path / "broken.yaml").write_text('name: "a" b: c')
    with pytest.raises(RecipeError, match="broken.yaml is not YAML"):
        load_recipe(tmp_path / "broken.yaml")


def test_override_forms():
    assert parse_overrides(["--a", "1", "--b=[1, 2]", "--c", "--d.e", "x y"]) == [
        ("a", 1),
        ("b", [1, 2]),
        ("c", True),
        ("d.e", "x y"),
    ]


@pytest.mark.parametrize(
    "path", sorted((Path(__file__).parent.parent / "recipes").glob("*.yaml")), ids=lambda p: p.stem
)
def test_shipped_recipes_are_valid(path):
    recipe = load_recipe(path)
    assert recipe.name == path.stem
    assert len(path.read_text().splitlines()) <= 70, "a recipe should be short enough to print in a paper"
