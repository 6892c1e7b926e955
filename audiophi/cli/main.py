"""AudioPhi on the command line.

    audiophi transcribe FILE… [--format txt|json|srt] [--output results.jsonl]
    audiophi caption FILE…
    audiophi ask "question" FILE…
    audiophi info DIR_OR_ID
    audiophi card DIR [--metrics metrics.json…] [--check]
    audiophi push DIR org/name [--private] [--space [org/space]]
    audiophi export --vllm DIR [--output OUT]

Exit code 0: everything was done; 1: something was not, and stderr says what; 2: wrong arguments.
"""

import argparse
import sys

from . import ask, caption, card, export, info, push, transcribe

COMMANDS = {
    "transcribe": transcribe,
    "caption": caption,
    "ask": ask,
    "info": info,
    "card": card,
    "push": push,
    "export": export,
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
    args = parser.parse_args(argv)
    sys.stdout.reconfigure(errors="backslashreplace")  # a file's name need not be UTF-8
    try:
        return COMMANDS[args.command].run(args)
    except (ValueError, OSError) as error:
        print(f"audiophi {args.command}: {error}", file=sys.stderr)
        return 1
