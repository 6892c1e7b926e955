"""Train from a recipe.

    audiophi train recipes/quickstart.yaml
    audiophi train recipes/quickstart.yaml --stages.0.steps 10 --adapter.type mlp
    accelerate launch --config_file configs/accelerate/ddp.yaml train.py recipes/audiophi_tiny.yaml

The same command again resumes a run that was interrupted. Keys: audiophi/training/recipe.py.

Exit codes: 0 finished; 85 stopped by SIGTERM or SIGUSR1 with a checkpoint, to be run again
(audiophi/training/signals.py); 1 stopped by what somebody must look at first: the data, the disk, the loss; 2 a wrong
command line or recipe.
"""

import errno
import sys

from audiophi.training.checkpoints import DamagedModel, SaveError
from audiophi.training.guards import UnhealthyLoss
from audiophi.training.recipe import RecipeError, load_recipe
from audiophi.training.signals import EXIT_RESUME, Interrupted
from audiophi.training.stages import run_recipe

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def main(arguments: list[str]) -> int:
    """Returns the exit code."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(__doc__)
        return 0 if arguments else 2
    try:
        run_recipe(load_recipe(arguments[0], arguments[1:]))
    except RecipeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except Interrupted as stop:
        print(f"{stop}; the same command resumes (exit code {EXIT_RESUME})", file=sys.stderr)
        return EXIT_RESUME
    except (ValueError, UnhealthyLoss, SaveError, DamagedModel, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        hint = "; make room, and the same command resumes from the last checkpoint" if error.errno in DISK_FULL else ""
        print(f"error: {error}{hint}", file=sys.stderr)
        return 1
    return 0
