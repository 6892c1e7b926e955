"""Recipes that start from a checkpoint: what they may say of its parts, and whose features are cached."""

import pytest

from audiophi.training.build import build_processor
from audiophi.training.cache_filling import cached_sources, open_cache
from audiophi.training.recipe import RecipeError, recipe_from_dict, recipe_to_dict
from modeling_audiophi import AudioPhiConfig
from tests.tiny_runs import ALIGN, LM, train


@pytest.fixture
def start(make_tiny_model, tmp_path):
    """make(**from_components' arguments) -> folder of a checkpoint."""

    def make(**keys):
        model, processor = make_tiny_model(readout="collapse", **keys)
        folder = tmp_path / "start"
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        return str(folder)

    return make


def continued(settings, *stages, **keys):
    """A recipe that names components and no more of the model, as those in recipes/ do."""
    return settings(*stages, **{"adapter": None, "readout": None, "alignment": None, **keys})


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"components": {"audio": "openai/whisper-large-v3", "text": "tiny"}}, "components.audio: .*-large-v3, .*tiny"),
        ({"adapter": {"type": "mlp"}}, "adapter.type: the recipe says mlp, .* has conv_mlp"),
        ({"encoder_layer": "last"}, "encoder_layer: the recipe says last, .* has 0"),
        ({"alignment": {"merges": 20, "spelling": 4}}, "alignment.spelling: the recipe says 4, .* has 0"),
    ],
)
def test_what_contradicts_the_checkpoint_is_refused(keys, says, settings, start, tmp_path):
    folder = start(encoder_layer=0)
    with pytest.raises(RecipeError, match=says) as error:
        train(continued(settings, LM, init_from=folder, **keys))
    assert folder in str(error.value)
    assert not (tmp_path / "cache").exists()


def test_what_is_not_said_or_said_alike_contradicts_nothing(settings, start):
    folder = start(encoder_layer=0, align_spelling={"texts": [str(n) for n in range(300)], "buckets": 8, "size": 4})
    for keys in ({}, {"encoder_layer": 0, "adapter": {"type": "conv_mlp"}}, {"alignment": {"merges": 20}}):
        recipe = recipe_from_dict(continued(settings, LM, init_from=folder, **keys))
        build_processor(recipe)
        build_processor(recipe_from_dict(recipe_to_dict(recipe)))
    with pytest.raises(RecipeError, match="alignment.spelling: .*says 0, .* has 4"):
        alignment = {"merges": 20, "spelling": 0}
        build_processor(recipe_from_dict(continued(settings, LM, init_from=folder, alignment=alignment)))


def test_lora_of_the_checkpoint_is_widened_kept_or_refused(settings, start, tmp_path):
    """A recipe's rank was once ignored where there were LoRA layers already."""
    tuned = {key: value for key, value in LM.items() if key != "lora"}
    given = {"r": 3, "lora_alpha": 6, "lora_dropout": 0.0, "target_modules": "all-linear"}
    folder = start(lora={"text": given})
    wider, widened = {"r": 5, "alpha": 10, "dropout": 0.1}, {"r": 5, "lora_alpha": 10, "lora_dropout": 0.1}
    for number, (lora, becomes) in enumerate((({}, given), ({"lora": wider}, {**given, **widened}))):
        out = tmp_path / str(number)
        train(continued(settings, {**tuned, **lora}, init_from=folder, output_dir=str(out)))
        assert AudioPhiConfig.from_pretrained(out / "final").lora["text"] == becomes
    for lora, says in (({"r": 2}, "rank 3 cannot become"), ({"r": 3, "target_modules": ["q_proj"]}, "target_modules")):
        with pytest.raises(RecipeError, match=f"stages.0.lora: .*{says}"):
            train(continued(settings, {**tuned, "lora": lora}, init_from=folder))
    stages = [{**tuned, "lora": {"r": 4}}, {**tuned, "name": "less", "lora": {"r": 2}}]
    with pytest.raises(RecipeError, match="stages.1.lora"):
        recipe_from_dict(settings(*stages))


def test_features_are_of_the_models_layer(settings, make_tiny_model):
    recipe = recipe_from_dict(settings(LM))
    caches = [open_cache(recipe, *make_tiny_model(encoder_layer=layer))[0].folder for layer in ("last", 0, "last")]
    assert caches[0] != caches[1] and caches[0] == caches[2]


def test_a_learned_mix_of_a_checkpoint_is_not_cached(settings, start, tmp_path, capsys):
    folder = start(encoder_layer="mix")
    recipe = continued(settings, {**ALIGN, "steps": 1}, init_from=folder, alignment={"merges": 20})
    with pytest.raises(RecipeError, match="encoder_layer: mix"):
        cached_sources(recipe_from_dict(recipe))
    with pytest.raises(RecipeError, match="stages.0.time_stretch .* learns a mix"):
        build_processor(recipe_from_dict({**recipe, "stages": [{**ALIGN, "time_stretch": 0.1}]}))
    train(recipe)
    assert "cache: off" in capsys.readouterr().out and not list((tmp_path / "cache").glob("*/fingerprint.json"))
