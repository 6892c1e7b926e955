"""Have audio files worked on by one of the tasks that are commands of their own: `audiophi NAME FILE…`."""

from audiophi.tasks.base import Task

from .hear import add_hearing_arguments, hear


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
            parser.add_argument("--timestamps", choices=("piece", "word"), default="piece", help="what has times")
        parser.add_argument("--format", choices=formats, default="txt", help=about)

    def run(self, args) -> int:
        return hear(args, {"task": self.task.name}, args.format, getattr(args, "timestamps", "piece"))
