"""Write down what is said in audio files; long recordings in pieces with their times."""

from .hear import add_hearing_arguments, hear


def add_arguments(parser) -> None:
    parser.add_argument("files", nargs="+", metavar="FILE", help="audio files, URLs, or folders of audio files")
    add_hearing_arguments(parser)
    parser.add_argument(
        "--format", choices=("txt", "json", "srt"), default="txt",
        help="of what is printed: text, JSON lines with times, or subtitles (one file only)",
    )  # fmt: skip


def run(args) -> int:
    return hear(args, "transcribe", args.format)
