"""Licences of components, as far as they are known, and which one binds a model that was made of all of them.

Known ones are looked up here first, so that a card comes out the same with and without a network; others are asked of
the Hub (`HubAnswers`), and the answers kept beside the card.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path

# What a licence asks for, from little to much. "own terms": to be read by whoever uses it (Llama's, Gemma's, ...).
KINDS = ("permissive", "share-alike", "own terms", "non-commercial", "unknown")
# The Hub's identifiers, from little to much.
PERMISSIVE = (
    *("cc0-1.0", "unlicense", "wtfpl", "isc", "zlib", "mit", "bsd", "bsd-2-clause", "bsd-3-clause", "apache-2.0"),
    *("odc-by", "cc-by-2.0", "cc-by-2.5", "cc-by-3.0", "cc-by-4.0"),
)
SHARE_ALIKE = ("cc-by-sa-3.0", "cc-by-sa-4.0", "odbl", "gpl-2.0", "gpl-3.0", "agpl-3.0", "lgpl-3.0")


@dataclass(frozen=True)
class Licence:
    """`id`: as the Hub writes it, None for terms that it has no identifier for. `note`: what else there is to know."""

    id: str | None
    kind: str
    note: str = ""
    url: str | None = None

    def __str__(self):
        if self.kind == "unknown":
            return f"not known: {self.note}"
        text = self.id or self.note
        text = f"[{text}]({self.url})" if self.url else text
        return f"{text} ({self.note})" if self.id and self.note else text


def unknown(where: str) -> Licence:
    """A licence that nobody stated. `where`: what to look at."""
    return Licence(None, "unknown", f"look at {where}")


def parse_licence(text: str, note: str = "", url: str | None = None) -> Licence:
    """`cc-by-4.0`, or for terms without an identifier on the Hub `KIND: what they say`.

    Raises ValueError for a kind that is none of KINDS and for an empty text.
    """
    kind, colon, words = text.partition(":")
    if colon:
        if kind.strip() not in KINDS or not words.strip():
            raise ValueError(f"licence {text!r}: write an identifier of the Hub, or one of {', '.join(KINDS)}: TEXT")
        return Licence(None, kind.strip(), words.strip(), url)
    name = text.strip().lower()
    if not name or " " in name:
        raise ValueError(f"licence {text!r}: write an identifier of the Hub (cc-by-4.0), or `permissive: TEXT`, ...")
    return Licence(name, kind_of(name), note, url)


def kind_of(identifier: str) -> str:
    """KINDS of one of the Hub's identifiers."""
    if identifier in PERMISSIVE:
        return "permissive"
    if identifier in SHARE_ALIKE:
        return "share-alike"
    if identifier in ("other", "unknown"):
        return "unknown"
    return "non-commercial" if re.search("-nc|non-?commercial", identifier) else "own terms"


UNISPEECH = "https://github.com/microsoft/UniSpeech/blob/main/LICENSE"
# Patterns of ids in lower case, and the licence of the weights.
COMPONENTS = (
    ("openai/whisper-*", parse_licence("apache-2.0", "OpenAI's own repository: MIT")),
    ("huggingfacetb/smollm2-*", parse_licence("apache-2.0")),
    ("tinyllama/tinyllama-1.1b-*", parse_licence("apache-2.0")),
    ("microsoft/phi-2", parse_licence("mit")),
    ("espnet/xeus", parse_licence("cc-by-nc-sa-4.0")),
    ("languagebind/languagebind_audio*", parse_licence("mit")),
    ("microsoft/wavlm-*", parse_licence("cc-by-sa-3.0", url=UNISPEECH)),
    ("microsoft/unispeech-*", parse_licence("cc-by-sa-3.0", url=UNISPEECH)),
    ("facebook/wav2vec2-*", parse_licence("apache-2.0")),
    ("facebook/hubert-*", parse_licence("apache-2.0")),
    ("facebook/data2vec-audio-*", parse_licence("apache-2.0")),
    ("facebook/w2v-bert-2.0", parse_licence("mit")),
    ("facebook/mms-*", parse_licence("cc-by-nc-4.0")),
    ("mit/ast-finetuned-*", parse_licence("bsd-3-clause")),
    ("laion/clap-htsat-*", parse_licence("apache-2.0")),
)


@dataclass
class HubAnswers:
    """Licences that were asked for: of components from their folder's card or the Hub's model info, of data sets from
    the Hub. Answers are kept (`models`, `datasets`: name -> identifier); questions without an answer are not."""

    models: dict[str, str] = field(default_factory=dict)
    datasets: dict[str, str] = field(default_factory=dict)

    def model(self, component: str, revision: str | None = None) -> str | None:
        name = short_name(component)
        if name not in self.models:
            self._keep(self.models, name, model_card_licence(component, revision))
        return self.models.get(name)

    def dataset(self, name: str) -> str | None:
        if name not in self.datasets:
            self._keep(self.datasets, name, _ask("dataset_info", name))
        return self.datasets.get(name)

    @staticmethod
    def _keep(answers: dict, name: str, answer: str | None) -> None:
        if answer:
            answers[name] = answer


def short_name(component: str) -> str:
    """A component's id; of a folder on some machine its last part."""
    return Path(component).name if Path(component).is_absolute() else component


def component_licence(component: str, revision: str | None = None, answers: HubAnswers | None = None) -> Licence:
    """Licence of a base component or of a checkpoint that training started from."""
    for pattern, licence in COMPONENTS:
        if fnmatchcase(component.lower(), pattern):
            return licence
    found = (answers or HubAnswers()).model(component, revision)
    if found:
        return parse_licence(found)
    return unknown(f"https://huggingface.co/{component}" if is_hub_id(component) else "where its folder came from")


def is_hub_id(name: str) -> bool:
    """Whether a name is a repository's on the Hub, as far as its form tells; the usual folders here are none."""
    return re.fullmatch(r"[\w.-]+/[\w.-]+", name) is not None and name.partition("/")[0] not in LOCAL_FOLDERS


LOCAL_FOLDERS = (".", "..", "checkpoints", "data", "outputs")


def model_card_licence(component: str, revision: str | None = None) -> str | None:
    """The licence on the card in a folder, or on the Hub's where that answers; None where there is none."""
    if Path(component).is_dir():
        return folder_licence(Path(component))
    return _ask("model_info", component, revision=revision) if is_hub_id(component) else None


def folder_licence(folder: Path) -> str | None:
    """The licence on the model card in a folder."""
    from huggingface_hub import ModelCard

    card = folder / "README.md"
    return card_licence(ModelCard.load(card).data) if card.is_file() else None


def card_licence(data) -> str | None:
    """What a card's header says of its licence, as `parse_licence` reads it."""
    if data is None or not data.license:
        return None
    names = data.license if isinstance(data.license, list) else [data.license]
    if names == ["other"]:
        name = getattr(data, "license_name", None) or "other"
        kind = "unknown" if name.startswith(("unknown", "other")) else kind_of(name)
        return f"{kind}: {name}"
    return names[0] if len(names) == 1 else f"own terms: {', '.join(names)}"


def _ask(method: str, name: str, **options) -> str | None:
    from huggingface_hub import HfApi

    try:
        return card_licence(getattr(HfApi(), method)(name, timeout=5, **options).card_data)
    except Exception:  # the Hub client's errors come from several libraries and share no base class
        return None


def binding_licence(parts: Mapping[str, Licence], stated: str | None = None) -> dict[str, str]:
    """`license` and, where that is "other", `license_name` of a model made of `parts` (name -> Licence).

    The most demanding known one; "other" where one is unknown or several ask for different things. `stated`: the
    licence that its author chose. Raises ValueError for one that allows more than a part does, or while a part's is
    unknown.
    """
    by_kind = {kind: [name for name, licence in parts.items() if licence.kind == kind] for kind in KINDS}
    found = _combined(parts, by_kind)
    if stated is None:
        return found
    wanted = parse_licence(stated)
    if by_kind["unknown"]:
        raise ValueError(
            f"licence {stated}: cannot be chosen while that of {', '.join(by_kind['unknown'])} is unknown; state it in "
            "the file of --about"
        )
    strictest = max((licence.kind for licence in parts.values()), key=KINDS.index, default="permissive")
    allows_more = KINDS.index(wanted.kind) < KINDS.index(strictest)
    if allows_more or (strictest in ("share-alike", "own terms") and wanted.id != found["license"]):
        names = ", ".join(f"{name} ({parts[name]})" for name in by_kind[strictest])
        raise ValueError(f"licence {stated}: allows what the {strictest} licence of {names} does not")
    return {"license": wanted.id} if wanted.id else {"license": "other", "license_name": slug(wanted.note)}


def _combined(parts: Mapping[str, Licence], by_kind: dict[str, list[str]]) -> dict[str, str]:
    if by_kind["unknown"] or not parts:
        name = "non-commercial-and-unknown-parts" if by_kind["non-commercial"] else "unknown-parts"
        return {"license": "other", "license_name": name}
    demanding = {licence.id for licence in parts.values() if licence.kind != "permissive"}
    if not demanding:
        named = [licence.id for licence in parts.values() if licence.id]
        if named:
            return {"license": max(named, key=PERMISSIVE.index)}
        return {"license": "other", "license_name": "permissive-see-licences"}
    if len(demanding) == 1 and None not in demanding:
        return {"license": demanding.pop()}
    plain = sorted(name for name in demanding if name and re.fullmatch(r"cc-by-nc-\d\.\d", name))
    rest = demanding - set(plain)
    if not rest:
        return {"license": plain[-1]}
    if rest == {"cc-by-nc-sa-4.0"}:  # under which what is plainly non-commercial may be passed on
        return {"license": "cc-by-nc-sa-4.0"}
    name = "non-commercial-see-licences" if by_kind["non-commercial"] else "several-see-licences"
    return {"license": "other", "license_name": name}


def slug(text: str) -> str:
    """Lower-case words joined by hyphens, as the Hub wants names."""
    words = "".join(letter if letter.isalnum() else " " for letter in text.lower()).split()
    return "-".join(words)[:60] or "unnamed"
