"""Write the sentences of `data/sentences.txt`: plain everyday English, from templates and word lists.

    python tools/make_everyday_sentences.py data/sentences.txt [--sentences 4000] [--seed 0]

Statements, questions, requests, numbers, times, dates, prices, names, spelt as they are spoken and without marks, so
that a small model can learn to write what it hears. Every sentence is there once; same arguments, same output. A
slot's words are drawn without return until the list is used up, so that none is rare.
"""

import argparse
import random
import re
import sys
from pathlib import Path

import yaml

ONES = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
    "seventeen eighteen nineteen"
).split()
ORDINALS = (
    "first second third fourth fifth sixth seventh eighth ninth tenth eleventh twelfth thirteenth fifteenth twentieth "
    "thirtieth"
).split()
TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()


def words_of(number: int) -> str:
    """A number from 0 to 999 as it is spoken."""
    if number < 20:
        return ONES[number]
    if number < 100:
        return TENS[number // 10 - 2] + (f" {ONES[number % 10]}" if number % 10 else "")
    return f"{ONES[number // 100]} hundred" + (f" and {words_of(number % 100)}" if number % 100 else "")


ENGLISH = yaml.safe_load(Path(__file__).with_name("everyday_english.yaml").read_text(encoding="utf-8"))
LISTS = {slot: items.split(", ") for slot, items in ENGLISH["lists"].items()}
TEMPLATES = ENGLISH["sentences"].splitlines()


class Slots:
    """Fills a template's slots. Every list is used up, in a new order each time, before an item comes again."""

    def __init__(self, rng: random.Random):
        self.rng = rng
        self.left: dict[str, list[str]] = {}

    def draw(self, slot: str) -> str:
        rng = self.rng
        if slot == "number":
            return words_of(rng.randint(2, 60))
        if slot == "count":
            return words_of(rng.choice([rng.randint(11, 99), rng.randint(101, 999)]))
        if slot == "digits":
            return " ".join(ONES[rng.randrange(10)] for _ in range(rng.randint(4, 7)))
        if slot == "price":
            return f"{words_of(rng.randint(2, 60))} {rng.choice(['dollars', 'pounds', 'euros'])}"
        if slot == "time":
            hour = ONES[rng.randint(1, 12)]
            return rng.choice([f"{hour} o'clock", f"half past {hour}", f"a quarter past {hour}", f"a quarter to {hour}",
                               f"{hour} {words_of(rng.choice([10, 15, 20, 25, 35, 40, 45, 50, 55]))}"])  # fmt: skip
        if slot == "ordinal":
            return rng.choice(ORDINALS)
        if not self.left.get(slot):
            self.left[slot] = rng.sample(LISTS[slot], len(LISTS[slot]))
        return self.left[slot].pop()

    def fill(self, template: str) -> str | None:
        """A sentence; None where two slots of one kind got the same words."""
        drawn: list[tuple[str, str]] = []

        def draw(match: re.Match) -> str:
            if match[1] == "sum":
                return words_of(sum(numbers_of(word) for slot, word in drawn if slot == "number"))
            drawn.append((match[1], self.draw(match[1])))
            return drawn[-1][1]

        sentence = re.sub(r"\{(\w+)\}", draw, template)
        twice = len(set(drawn)) < len(drawn) or re.search(r"\b(\w{4,})\b.* \1\b", sentence)
        return None if twice else re.sub(r"\ba (?=[aeio])", "an ", sentence)


def numbers_of(words: str) -> int:
    """The number below 100 that `words_of` makes these words of."""
    return next(number for number in range(100) if words_of(number) == words)


def make_sentences(number: int, seed: int = 0) -> list[str]:
    """`number` different sentences, templates in turn."""
    slots, sentences = Slots(random.Random(seed)), {}
    while len(sentences) < number:
        for template in slots.rng.sample(TEMPLATES, len(TEMPLATES)):
            sentence = slots.fill(template)
            if sentence:
                sentences[sentence] = None
    return list(sentences)[:number]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--sentences", type=int, default=4000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    if not 1 <= args.sentences <= 20_000:
        parser.error("--sentences must be 1 to 20,000: there are not many more different ones")
    args.output.write_text("\n".join(make_sentences(args.sentences, args.seed)) + "\n", encoding="utf-8")
    print(f"{args.sentences} sentences: {args.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
