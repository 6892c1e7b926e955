"""Cut books into sentences for synthetic speech: connected prose, as audiobooks have it.

    python tools/make_prose.py OUT.txt BOOK ... [--lines 9000] [--without metadata.jsonl ...]

BOOK: a plain text (Project Gutenberg's .txt, say) or the `Rdata.rdb` of R's janeaustenr, which holds Jane Austen's six
novels and comes with Debian (`apt-get download r-cran-janeaustenr && dpkg -x r-cran-janeaustenr_*.deb DIR`). A sentence
that shares six words in a row with a text of --without (held-out clips) is left out. Same arguments, same output.
"""

import argparse
import bz2
import json
import lzma
import random
import re
import struct
import sys
import zlib
from pathlib import Path

WORDS = (5, 32)  # shortest and longest sentence
SHARED = 6  # words in a row that make a sentence a held-out one
# A character string in R's serialisation: flags, then its length.
R_STRING = re.compile(rb"\x00[\x00-\xff]\x00\x09(....)", re.DOTALL)
ABBREVIATIONS = re.compile(r"\b(mr|mrs|dr|st|messrs|esq|hon)\.", re.IGNORECASE)


def read_rdb(data: bytes) -> str:
    """The text of an R lazy-load database: its character vectors, one element per line."""
    decoders = {b"2": bz2.BZ2Decompressor, b"Z": lzma.LZMADecompressor}
    lines, place = [], 0
    while place + 5 < len(data):
        kind = data[place + 4 : place + 5]
        start = place + (5 if kind in decoders else 4)  # zlib's chunks have no letter
        decoder = decoders.get(kind, zlib.decompressobj)()
        try:
            chunk = decoder.decompress(data[start:])
        except (OSError, lzma.LZMAError, zlib.error) as error:
            raise ValueError(f"not an R lazy-load database (at byte {place}: {error})") from None
        place = len(data) - len(decoder.unused_data)
        for match in R_STRING.finditer(chunk):
            size = struct.unpack(">i", match[1])[0]
            if 0 <= size < 1000:
                lines.append(chunk[match.end() : match.end() + size].decode("utf-8", "replace"))
    return "\n".join(lines)


def sentences(text: str) -> list[str]:
    """Sentences of WORDS words from running text, paragraph by paragraph, without quotation marks and underscores."""
    found = []
    for paragraph in re.split(r"\n\s*\n", text):
        flat = ABBREVIATIONS.sub(r"\1", " ".join(paragraph.split()))
        flat = re.sub(r"[_*\"“”\[\]()]", "", flat).replace("’", "'")
        flat = re.sub(r"(?<=[.!?;:,])\s*--\s*", " ", flat).replace("--", ", ")
        for sentence in re.split(r"(?<=[.!?;])\s+", flat):
            words = sentence.split()
            readable = re.fullmatch(r"[A-Za-z' ,.;:!?-]+", sentence) and not sentence.isupper()
            if readable and WORDS[0] <= len(words) <= WORDS[1]:
                found.append(sentence.strip(" -"))
    return found


def word_runs(text: str) -> set[tuple[str, ...]]:
    """All runs of SHARED words of a text."""
    words = re.findall(r"[a-z']+", text.lower())
    return {tuple(words[i : i + SHARED]) for i in range(len(words) - SHARED + 1)}


def choose(texts: list[str], held_out: list[str], lines: int, seed: int = 0) -> list[str]:
    """`lines` different sentences of `texts`, drawn at random, none with a run of words of `held_out`."""
    forbidden = set().union(*(word_runs(text) for text in held_out))
    found = list(dict.fromkeys(sentence for text in texts for sentence in sentences(text)))
    found = [sentence for sentence in found if not word_runs(sentence) & forbidden]
    random.Random(seed).shuffle(found)
    return found[:lines]


def main(argv: list[str] | None = None) -> int:
    """Exit code 1, with the reason, for a book that cannot be read or has no sentences."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("books", type=Path, nargs="+")
    parser.add_argument("--lines", type=int, default=9000)
    parser.add_argument("--without", type=Path, nargs="*", default=[], help="metadata.jsonl of held-out clips")
    args = parser.parse_args(argv)
    try:
        texts = [
            read_rdb(book.read_bytes()) if book.suffix == ".rdb" else book.read_text(encoding="utf-8")
            for book in args.books
        ]
        held_out = [json.loads(line)["text"] for path in args.without for line in path.read_text().splitlines()]
        chosen = choose(texts, held_out, args.lines)
        if not chosen:
            raise ValueError(f"no sentences of {WORDS[0]} to {WORDS[1]} words in {', '.join(map(str, args.books))}")
    except (OSError, UnicodeDecodeError, ValueError, KeyError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    args.output.write_text("\n".join(chosen) + "\n", encoding="utf-8")
    print(f"{len(chosen):,} sentences, {sum(len(line.split()) for line in chosen):,} words: {args.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
