"""Publish a checkpoint, model and processor, as a repository on the Hub."""


def add_arguments(parser) -> None:
    parser.add_argument("folder", metavar="DIR", help="checkpoint")
    parser.add_argument("repository", metavar="ORG/NAME")
    parser.add_argument("--private", action="store_true")


def run(args) -> int:
    from modeling_audiophi import AudioPhiForConditionalGeneration
    from processing import AudioPhiProcessor

    # Both are read before anything is sent: no half a repository for a folder that is incomplete.
    parts = [kind.from_pretrained(args.folder) for kind in (AudioPhiForConditionalGeneration, AudioPhiProcessor)]
    for part in parts:
        # transformers takes None, not False, for "as the organisation's default says".
        part.push_to_hub(args.repository, private=args.private or None)
    print(f"published: {args.repository}")
    return 0
