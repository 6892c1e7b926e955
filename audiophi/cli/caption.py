"""Describe the sounds in audio files."""

from .hear import add_hearing_arguments, hear


def add_arguments(parser) -> None:
    parser.add_argument("files", nargs="+", metavar="FILE", help="audio files, URLs, or folders of audio files")
    add_hearing_arguments(parser)
    parser.add_argument("--format", choices=("txt", "json"), default="txt", help="of what is printed")


def run(args) -> int:
    return hear(args, "caption", args.format)
