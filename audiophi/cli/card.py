"""Write the model card of a checkpoint from its config, recipe and metrics.json, or check one against them."""

from pathlib import Path


def add_arguments(parser) -> None:
    parser.add_argument("folder", metavar="DIR", type=Path, help="checkpoint, say outputs/quickstart/final")
    parser.add_argument("--metrics", nargs="+", default=[], metavar="FILE", help="metrics.json files of eval.py")
    parser.add_argument("--recipe", nargs="+", default=[], metavar="FILE",
                        help="recipes, in the order of training; default: the run's own")  # fmt: skip
    parser.add_argument("--about", metavar="FILE", help="YAML: name, licence, language, limits, sources ... "
                        "(audiophi/publishing/data_sources.py), for what the others do not know")  # fmt: skip
    parser.add_argument("--curves", metavar="PNG", help="default: the run's own curves.png")
    parser.add_argument("--output", type=Path, metavar="README.md", help="default: README.md in DIR")
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 where the card that is there "
                        "says something else than what it was made of")  # fmt: skip


def run(args) -> int:
    from audiophi.publishing.card_files import CARD_NAME, collect, write_card
    from audiophi.publishing.model_card import check_card, make_card

    path = args.output or args.folder / CARD_NAME
    inputs = collect(args.folder, args.metrics, args.recipe, args.about, args.curves, path.parent)
    if args.check:
        different = check_card(args.folder, path, inputs)
        print("\n".join(different) or f"{path} says what it was made of")
        return 1 if different else 0
    card = make_card(args.folder, inputs)
    write_card(card, inputs, path)
    measured = f"{len(inputs.metrics)} evaluations" if inputs.metrics else "no results: --metrics gives them"
    print(f"{path}: licence {card.data.license_name or card.data.license}, {measured}")
    return 0
