"""Weighs two ears of a trained checkpoint anew on a recipe's development clips, as training does at its end.

    python tools/fit_ears.py CHECKPOINT RECIPE

Writes `generation_config.json` and `card/decoding.json` there; `audiophi card` tells them. On two CPU cores a clip
takes about four seconds.
"""

import argparse
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint")
    parser.add_argument("recipe")
    args = parser.parse_args()
    from audiophi.training.decoding_fit import given_decoding
    from audiophi.training.ears_fit import fit_ears
    from audiophi.training.recipe import load_recipe
    from audiophi.training.stages import development_of
    from modeling_audiophi import AudioPhiForConditionalGeneration
    from processing import AudioPhiProcessor

    recipe = load_recipe(args.recipe)
    model = AudioPhiForConditionalGeneration.from_pretrained(args.checkpoint)
    processor = AudioPhiProcessor.from_pretrained(args.checkpoint)
    with tempfile.TemporaryDirectory() as folder:  # for the list of rows that cannot be read
        development = development_of(recipe, Path(folder), processor, recipe.evaluation.ears_clips, together=False)
    fit_ears(model, development, given_decoding(recipe.generation), Path(args.checkpoint) / "card", print)
    model.generation_config.save_pretrained(args.checkpoint)


if __name__ == "__main__":
    main()
