"""Write the questions that a recipe's test data can be asked as one JSONL for `eval.py --task answer`.

    python tools/make_questions.py recipes/audiophi_tiny.yaml questions.jsonl [--per_kind 40] [--seed 0]
    python eval.py --model MODEL --data questions.jsonl --task answer --output_dir OUT

Every source of `data.test` (of `data.eval` where a recipe has none) whose task makes questions is asked, in the
wordings that are kept for tests: as many questions of each kind as there are rows for, at most --per_kind, no row twice
for the same kind. A line has audio (one path, or a list; clips that a data set holds itself are written into a folder
beside the questions), instruction, answer, choices, metric, kind, transcript, speaker and id. Same arguments, same
output.
"""

import argparse
import hashlib
import json
import random
import sys
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


def questions_of(recipe, seed: int) -> dict[str, list[dict]]:
    """kind -> lines, one for each row that can be asked it."""
    from audiophi.data.datasets import load_examples
    from audiophi.data.example import RowError, drawing, posed
    from audiophi.training.corpus import source_spec

    found: dict[str, list[dict]] = {}
    for place, source in enumerate(recipe.data.test or recipe.data.eval):
        examples = load_examples(source_spec(source))
        for number in range(len(examples)):
            with suppress(RowError):
                example = replace(examples[number], turns=1)
                for kind in dict.fromkeys(question.kind for question in example.questions):
                    own = [question for question in example.questions if question.kind == kind]
                    draw = drawing(seed, place, number, kind)
                    question = draw("question", own)
                    # Worded as in tests, also what training never asks.
                    question = replace(question, templates=question.test_templates)
                    one = posed(replace(example, questions=(question,)), draw)
                    found.setdefault(kind, []).append(line_of(one, question))
    return found


def file_of(clip, folder: Path) -> str:
    """The path of a clip's audio, which is written into `folder` where it is no file yet."""
    if clip.audio.get("bytes") is None:
        return str(Path(clip.audio["path"]).resolve())
    suffix = Path(clip.audio.get("path") or "").suffix
    file = folder.resolve() / (hashlib.sha256(clip.audio["bytes"]).hexdigest()[:16] + suffix)
    if not file.exists():
        folder.mkdir(parents=True, exist_ok=True)
        file.write_bytes(clip.audio["bytes"])
    return str(file)


def files_of(clips, folder: Path) -> str | list[str]:
    files = [file_of(clip, folder) for clip in clips]
    return files[0] if len(files) == 1 else files


def line_of(example, question) -> dict:
    return {
        "audio": example.clips,
        "instruction": example.messages[0]["content"][-1]["text"],
        "answer": list(question.answers),
        "choices": list(question.choices),
        "metric": question.metric,
        "kind": question.kind,
        "transcript": example.transcript,
        "speaker": example.speaker,
        "id": f"{example.id} {question.kind}",
    }


def main(arguments=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("recipe", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--per_kind", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(arguments)

    from audiophi.training.recipe import load_recipe

    try:
        found = questions_of(load_recipe(args.recipe), args.seed)
    except (ValueError, FileNotFoundError) as error:
        parser.error(str(error))
    if not found:
        parser.error(f"{args.recipe}: no source of data.test or data.eval has a task that makes questions")
    lines, folder = [], args.output.with_suffix("")
    for kind, rows in sorted(found.items()):
        chosen = balanced(rows, args.per_kind, random.Random(f"{args.seed} {kind}"))
        lines += [{**line, "audio": files_of(line["audio"], folder)} for line in chosen]
        print(f"{kind}: {len(chosen)} of {len(rows)}")
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
    print(f"{args.output}: {len(lines)} questions of {len(found)} kinds")
    return 0


def balanced(rows: list[dict], most: int, rng: random.Random) -> list[dict]:
    """At most `most` rows, the answers in turn, so that no answer is a better guess than it must be."""
    by_answer: dict[str, list[dict]] = {}
    for row in rng.sample(rows, len(rows)):
        by_answer.setdefault(row["answer"][0], []).append(row)
    chosen = []
    while len(chosen) < min(most, len(rows)):
        for answer in list(by_answer):
            if by_answer[answer] and len(chosen) < most:
                chosen.append(by_answer[answer].pop())
    return chosen


if __name__ == "__main__":
    sys.exit(main())
