"""Choose sentences for synthetic speech so that every common English word is heard a few times.

    python tools/make_sentences.py OUT.txt [--known OTHER_TEXTS ...] [--words 28000]

A recogniser whose units are a language model's own tokens, which are mostly whole words, can only write words that it
has heard: of the held-out words that occur at most twice in ten hours of training texts it got nine in ten wrong, of
those with more than twenty occurrences one in eight (dev/LOG.md). So a number of occurrences by rank is asked for
(WANTED), what the texts in --known already have is taken off, and the rest is filled from WordNet's definitions and
examples, those with the largest share of wanted words first, and then from lists of the words that are still missing.

Needs `apt-get install wordnet-base` (WordNet's licence allows any use) and `pip install wordfreq` (word ranks).
Same arguments, same output. --known: .txt (a sentence per line), .jsonl (column `text`), or a recipe (.yaml): the texts
of those of its training sources that exist already.
"""

import argparse
import json
import random
import re
import sys
from collections import Counter
from contextlib import suppress
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

# Occurrences wanted for words up to this rank of frequency.
WANTED = ((5_000, 10), (10_000, 8), (20_000, 5), (1_000_000, 2))
WORD = re.compile(r"[a-z]+(?:'[a-z]+)?")
MIN_NEED = 0.4  # share of a sentence's words that must still be wanted for it to be taken
LIST_WORDS = (6, 13)  # shortest and longest list of single words


def read_texts(path: Path) -> list[str]:
    """The texts of one --known. ValueError where it has none."""
    if path.suffix == ".yaml":
        from audiophi.data.datasets import load_examples
        from audiophi.data.example import RowError
        from audiophi.training.corpus import source_spec
        from audiophi.training.recipe import load_recipe

        sources = [source for source in load_recipe(path).data.train if Path(source.path).exists()]
        texts = []
        for examples in (load_examples(source_spec(source)) for source in sources):
            for number in range(len(examples)):
                with suppress(RowError):
                    texts.append(examples[number].reference)
        texts = [text for text in texts if text]
    else:
        lines = path.read_text(encoding="utf-8").splitlines()
        texts = [json.loads(line)["text"] for line in lines] if path.suffix == ".jsonl" else lines
    if not texts:
        raise ValueError(f"{path} has no texts")
    return texts


def read_wordnet(folder: Path) -> tuple[set[str], list[str]]:
    """WordNet's single-word lemmas, and its definitions and examples as sentences of 4 to 18 words."""
    lemmas, sentences = set(), []
    for part in ("noun", "verb", "adj", "adv"):
        for line in (folder / f"index.{part}").read_text(encoding="utf-8").splitlines():
            if not line.startswith(" "):
                lemmas.add(line.split(" ", 1)[0])
        for line in (folder / f"data.{part}").read_text(encoding="utf-8").splitlines():
            if line.startswith(" ") or "|" not in line:
                continue
            gloss = re.sub(r"\([^)]*\)", "", line.split("|", 1)[1])
            for sentence in re.split(r'[;"]', gloss):
                sentence = " ".join(sentence.split())
                if re.fullmatch(r"[A-Za-z ,.'?!-]+", sentence) and 4 <= len(sentence.split()) <= 18:
                    sentences.append(sentence)
    return lemmas, list(dict.fromkeys(sentences))


def missing_words(ranks: dict[str, int], known: list[str]) -> Counter:
    """How many more occurrences each word needs."""
    have = Counter(word for text in known for word in WORD.findall(text.lower()))
    need = Counter()
    for word, rank in ranks.items():
        wanted = next(count for limit, count in WANTED if rank < limit)
        if have[word] < wanted:
            need[word] = wanted - have[word]
    return need


def choose(sentences: list[str], need: Counter, min_need: float) -> list[str]:
    """The sentences of which at least `min_need` of the words are still wanted; takes them off `need`."""
    chosen = []
    # The strictest share first, so that the sentences that bring most are there before the middling ones.
    for share in (0.65, 0.5, min_need):
        rest = []
        for sentence in sentences:
            words = WORD.findall(sentence.lower())
            if sum(need[word] > 0 for word in set(words)) >= share * len(words):
                chosen.append(sentence)
                need.subtract({word: 1 for word in words if need[word] > 0})
            else:
                rest.append(sentence)
        sentences = rest
    return chosen


def list_words(need: Counter, rng: random.Random) -> list[str]:
    """Lists of single words that give every word what `need` still asks for."""
    words = [word for word, count in sorted(need.items()) for _ in range(max(count, 0))]
    rng.shuffle(words)
    lists = []
    while words:
        size = rng.randint(*LIST_WORDS)
        lists.append(" ".join(words[:size]))
        words = words[size:]
    return lists


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="text file to write, one sentence per line")
    parser.add_argument("--known", type=Path, nargs="*", default=[], help="texts that are already in the training data")
    parser.add_argument("--words", type=int, default=28_000, help="how many of the most frequent words are wanted")
    parser.add_argument("--wordnet", type=Path, default=Path("/usr/share/wordnet"), help="folder with data.noun, ...")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)

    try:
        from wordfreq import top_n_list

        lemmas, sentences = read_wordnet(args.wordnet)
        known = [text for path in args.known for text in read_texts(path)]
    except ImportError:
        parser.error("word ranks are missing: pip install wordfreq")
    except FileNotFoundError as error:
        parser.error(f"{error.filename} does not exist (WordNet: apt-get install wordnet-base)")
    except (OSError, ValueError, KeyError) as error:
        parser.error(f"{error}")

    # Ranks also hold acronyms, misspellings and foreign words: kept is what WordNet or an English text here knows, or
    # what is an inflection of it.
    english = lemmas | {word for text in [*sentences, *known] for word in WORD.findall(text.lower())}
    candidates = [word for word in top_n_list("en", 2 * args.words) if WORD.fullmatch(word) and word in english]
    ranks = {word: rank for rank, word in enumerate(candidates[: args.words]) if len(word) > 1}
    need = missing_words(ranks, known)
    rng = random.Random(args.seed)
    rng.shuffle(sentences)
    chosen = choose(sentences, need, MIN_NEED)
    lists = list_words(need, rng)
    lines = [*chosen, *lists]
    rng.shuffle(lines)
    args.output.write_text("\n".join(lines) + "\n", encoding="utf-8")
    count = sum(len(WORD.findall(line.lower())) for line in lines)
    print(f"{len(lines)} lines, {count} words: {len(chosen)} sentences, {len(lists)} lists; {len(ranks)} words covered")
    return 0


if __name__ == "__main__":
    sys.exit(main())
