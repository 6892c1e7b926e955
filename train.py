"""Train AudioPhi from a recipe.

    python train.py recipes/quickstart.yaml
    python train.py recipes/quickstart.yaml --stages.0.steps 10 --adapter.type mlp
    accelerate launch train.py recipes/audiophi_tiny.yaml

The same command again resumes a run that was interrupted. Keys: training/recipe.py.
"""

import sys

from training.corpus import TooManyBadRows
from training.recipe import RecipeError, load_recipe
from training.stages import run_recipe


def main(arguments: list[str]) -> int:
    """Exit code 0 when the run finished, 1 for data that cannot be used, 2 for a wrong command line or recipe."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(__doc__)
        return 0 if arguments else 2
    try:
        run_recipe(load_recipe(arguments[0], arguments[1:]))
    except RecipeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (TooManyBadRows, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
