"""Encodes a recipe's training clips before it is trained: the cache of encoder outputs that train.py would fill.

    python tools/build_cache.py RECIPE [--shard 1/4] [--num_proc 8] [--key value ...]

--shard 1/4 is the first of four equal parts: run each on a machine of its own (cache_dir on a shared disk, or copy the
folders of all into one), in any order. --num_proc: processes, on CPUs; with GPUs start one shard per GPU. The same
command again encodes only what is missing. Further `--key value` pairs override the recipe, as for train.py. Clips that
cannot be read are listed in output_dir.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from audiophi.training.cache_filling import build_cache  # noqa: E402
from audiophi.training.recipe import RecipeError, load_recipe  # noqa: E402


def take(arguments: list[str], name: str, default: str) -> str:
    """Removes `--name value` or `--name=value` from the arguments; the value."""
    for place, argument in enumerate(arguments):
        flag, equals, value = argument.partition("=")
        if flag == f"--{name}":
            if not equals and place + 1 == len(arguments):
                raise RecipeError(f"--{name} needs a value")
            del arguments[place]
            return value if equals else arguments.pop(place)
    return default


def parse_shard(text: str) -> tuple[int, int]:
    """ "2/4" -> (1, 4): numbers start at 1 on the command line."""
    number, slash, total = text.partition("/")
    if not (slash and number.isdigit() and total.isdigit() and 1 <= int(number) <= int(total)):
        raise RecipeError(f"--shard {text}: give which part of how many, from 1/4 to 4/4")
    return int(number) - 1, int(total)


def main(arguments: list[str]) -> int:
    """Returns the exit code, as train.py does: 2 for a wrong command line or recipe, 1 for data that cannot be used."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(__doc__)
        return 0 if arguments else 2
    rest = list(arguments[1:])
    try:
        shard, shards = parse_shard(take(rest, "shard", "1/1"))
        num_proc = take(rest, "num_proc", "1")
        if not num_proc.isdigit() or int(num_proc) < 1:
            raise RecipeError(f"--num_proc {num_proc}: give a number of processes, at least 1")
        done = build_cache(load_recipe(arguments[0], rest), shard, shards, int(num_proc))
    except RecipeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(
        f"shard {shard + 1}/{shards}: {done['rows']:,} rows, {done['clips']:,} clips encoded now, "
        f"{done['bad']:,} bad rows; {done['folder']}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
