"""Have audio files worked on by one of the tasks that are commands of their own: `audiophi NAME FILE…`."""

from audiophi.tasks.base import Task

from .hear import STDIN, add_hearing_arguments, hear, load_pipeline
from .stream import SECONDS, stream


class Perform:
    """A command, as the other modules here are one: `add_arguments` and `run`."""

    def __init__(self, task: Task):
        self.task, self.__doc__ = task, task.command

    def add_arguments(self, parser) -> None:
        parser.add_argument(
            "files", nargs="+", metavar="FILE", help="audio files, URLs, folders of audio files, or -: standard input"
        )
        add_hearing_arguments(parser)
        formats, about = ("txt", "json"), "of what is printed"
        if self.task.in_pieces:
            formats = (*formats, "srt", "vtt")
            about = f"{about}: text, JSON lines with times, or subtitles as SubRip or WebVTT (one file only)"
            parser.add_argument("--stream", type=float, nargs="?", const=6.0, metavar="SECONDS",
                                help="of -: write what is said in every 6, or so many, seconds")  # fmt: skip
            parser.add_argument("--timestamps", choices=("piece", "word"), default="piece", help="what has times")
            parser.add_argument("--confidence", action="store_true", help="how sure each word is, in JSON: for models "
                                "that hear with both ears")  # fmt: skip
        parser.add_argument("--format", choices=formats, default="txt", help=about)

    def run(self, args) -> int:
        if getattr(args, "stream", None) is not None:
            return self.stream(args)
        timestamps, confidence = getattr(args, "timestamps", "piece"), getattr(args, "confidence", False)
        if confidence and args.format != "json" and not args.output:
            args.error("--confidence is told in JSON: --format json, or --output")
        return hear(args, {"task": self.task.name}, args.format, timestamps, confidence)

    def stream(self, args) -> int:
        shortest, longest = SECONDS
        other = args.output or args.timestamps != "piece" or args.confidence
        if args.files != [STDIN] or other or args.format not in ("txt", "json"):
            args.error("--stream is for standard input alone (audiophi transcribe - --stream), as txt or json")
        if not shortest <= args.stream <= longest:
            args.error(f"--stream takes {shortest:g} to {longest:g} seconds")
        settings = {"max_new_tokens": args.max_new_tokens, **({"num_beams": args.num_beams} if args.num_beams else {})}
        return stream(load_pipeline(args), {"task": self.task.name}, args.stream, args.format, **settings)
