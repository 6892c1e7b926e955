"""Ask a question about audio files, each on its own."""

from .hear import add_hearing_arguments, hear


def add_arguments(parser) -> None:
    parser.add_argument("question", help="in words, or any other instruction")
    parser.add_argument(
        "files", nargs="+", metavar="FILE", help="audio files, URLs, folders of audio files, or -: standard input"
    )
    add_hearing_arguments(parser)
    parser.add_argument("--format", choices=("txt", "json"), default="txt", help="of what is printed")


def run(args) -> int:
    if not args.question.strip():
        args.error("the question is empty")
    return hear(args, {"instruction": args.question}, args.format)
