"""AudioPhi on the command line.

    audiophi TASK FILE… [--format txt|json] [--output results.jsonl]      one of the tasks below
    audiophi ask "question" FILE…
    audiophi demo [--model DIR_OR_ID]
    audiophi serve DIR_OR_ID [--port 8000]
    audiophi info DIR_OR_ID
    audiophi train RECIPE [--key value…]
    audiophi eval --model DIR_OR_ID --data SPEC --output_dir OUT [--task TASK]
    audiophi card DIR [--metrics metrics.json…] [--check]
    audiophi push DIR org/name [--private] [--space [org/space]]

Exit code 0: everything was done; 1: something was not, and stderr says what; 2: wrong arguments.
"""

import argparse
import sys
from importlib import import_module

from audiophi.tasks import TASKS

from . import ask, card, info, push
from .perform import Perform

COMMANDS = {
    **{name: Perform(task) for name, task in TASKS.items() if task.command},
    "ask": ask,
    "info": info,
    "card": card,
    "push": push,
}
# These read their own arguments, and import so much that it is done only when they are asked for.
PROGRAMS = {
    "train": "Train from a recipe; the same as train.py.",
    "eval": "Measure a checkpoint on a data set; the same as eval.py.",
    "demo": "Show a checkpoint in the browser.",
    "serve": "Answer OpenAI's HTTP requests with a checkpoint.",
}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="audiophi", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, module in COMMANDS.items():
        first_line = module.__doc__.splitlines()[0]
        command = commands.add_parser(name, help=first_line, description=first_line)
        module.add_arguments(command)
        command.set_defaults(error=command.error)
    for name, about in PROGRAMS.items():
        commands.add_parser(name, help=about, add_help=False)
    arguments = sys.argv[1:] if argv is None else argv
    if arguments and arguments[0] in PROGRAMS:
        return import_module(f"{__package__}.{arguments[0]}").main(arguments[1:])
    args = parser.parse_args(arguments)
    sys.stdout.reconfigure(errors="backslashreplace")  # a file's name need not be UTF-8
    try:
        return COMMANDS[args.command].run(args)
    except (ValueError, OSError) as error:
        print(f"audiophi {args.command}: {error}", file=sys.stderr)
        return 1
