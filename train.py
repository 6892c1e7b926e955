"""Train AudioPhi from a recipe; the same as `audiophi train`.

    python train.py recipes/quickstart.yaml
    python train.py recipes/quickstart.yaml --stages.0.steps 10 --adapter.type mlp
    accelerate launch --config_file configs/accelerate/ddp.yaml train.py recipes/audiophi_tiny.yaml

The same command again resumes a run that was interrupted. Keys: audiophi/training/recipe.py; exit codes:
audiophi/cli/train.py.
"""

import sys

from audiophi.cli.train import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
