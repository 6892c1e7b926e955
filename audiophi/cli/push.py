"""Publish a checkpoint, model, processor and model card, as a repository on the Hub, and a Space that shows it."""

import tempfile
from pathlib import Path


def add_arguments(parser) -> None:
    parser.add_argument("folder", metavar="DIR", type=Path, help="checkpoint")
    parser.add_argument("repository", metavar="ORG/NAME")
    parser.add_argument("--private", action="store_true")
    parser.add_argument("--space", nargs="?", const="", metavar="ORG/SPACE",
                        help="also publish app.py as a Gradio Space for it; default id: the repository's")  # fmt: skip


def run(args) -> int:
    from huggingface_hub.utils import validate_repo_id

    from audiophi.publishing.card_files import CARD_NAME, collect, is_generated, write_card
    from audiophi.publishing.model_card import check_card, make_card
    from modeling_audiophi import AudioPhiForConditionalGeneration
    from processing import AudioPhiProcessor

    from .space import publish_space, space_files

    space = None if args.space is None else args.space or args.repository
    # All are read and checked before anything is sent: no half a repository for a folder that is incomplete.
    if space:
        if "/" not in args.repository:
            args.error(f"a Space needs the model's whole id, ORG/NAME, not {args.repository!r}")
        validate_repo_id(space)
        space_files(args.repository)
    model, processor = (k.from_pretrained(args.folder) for k in (AudioPhiForConditionalGeneration, AudioPhiProcessor))
    model.check_components_are_public()
    own = args.folder / CARD_NAME
    if is_generated(own) and (different := check_card(args.folder)):
        raise ValueError(
            "\n".join(
                [f"{own} says something else than what it was made of; `audiophi card` makes it anew", *different]
            )
        )
    with tempfile.TemporaryDirectory() as folder:
        card = Path(folder, CARD_NAME)
        if own.is_file() and not is_generated(own):  # somebody wrote it by hand
            card.write_bytes(own.read_bytes())
        else:
            inputs = collect(args.folder)
            inputs.repository = args.repository
            write_card(make_card(args.folder, inputs), inputs, card)
        # The card comes first: there is no moment at which the weights lie there without their licence.
        publish_folder(args.repository, folder, args.private)
    for part in (model, processor):
        # transformers takes None, not False, for "as the organisation's default says".
        part.push_to_hub(args.repository, private=args.private or None)
    print(f"published: {args.repository}")
    if space:
        print(f"published: {publish_space(args.repository, space, args.private)}")
        if args.private:
            print("The Space cannot read a private model yet: in its settings add a secret HF_TOKEN that may.")
    return 0


def publish_folder(repository: str, folder: str, private: bool) -> None:
    """One commit of the files in `folder`, in a repository that is created where there is none."""
    from huggingface_hub import HfApi

    HfApi().create_repo(repository, private=private or None, exist_ok=True)
    HfApi().upload_folder(repo_id=repository, folder_path=folder, commit_message="Upload model card")
