"""Let the LLM itself answer requests about what is said, from the transcript: rows that teach the LLM that hears to
obey as the LLM that reads does.

    python tools/make_responses.py SPEECH OUT.parquet [--llm HuggingFaceTB/SmolLM2-135M-Instruct] [--rows 2000]
        [--filter split=train] [--exclude speaker=84,2086] [--requests FILE] [--batch_size 16] [--max_new_tokens 96]

The answers are the LLM's own, so learning them costs nothing of what it knew: as BLSP (arXiv 2309.00916) and DeSTA2.5
(arXiv 2507.02768) keep obedience. SPEECH: a data set with texts, as a recipe names it. --requests: a line each, instead
of REQUESTS. Written as it comes to OUT.jsonl, from which an interrupted run goes on, and in the end to OUT.parquet:
audio (path), instruction, answer, transcript, speaker, kind ("respond"), id. Answers that did not come to an end within
--max_new_tokens, or are empty, are left out. Train on it as on any rows with questions. Same arguments, same rows.
"""

import argparse
import json
import sys
from contextlib import suppress
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

REQUESTS = (
    "Reply to the speaker in one sentence.",
    "Say it in other words.",
    "What is this about? Answer in a few words.",
    "Ask the speaker a question about it.",
    "Continue what is said with one more sentence.",
    "Is what is said happy, sad or neither? Give a reason.",
    "Summarise what is said in one short sentence.",
    "Name one thing that is mentioned.",
)
KIND = "respond"


def rows_of(args) -> list[dict]:
    """What is to be answered: {"id", "audio", "instruction", "transcript", "speaker"}, in the data set's order."""
    from audiophi.data.datasets import load_examples
    from audiophi.data.example import RowError, drawing
    from audiophi.tasks import default_task
    from tools.make_mixed import columns_of

    requests = REQUESTS
    if args.requests:
        requests = tuple(filter(None, map(str.strip, args.requests.read_text(encoding="utf-8").splitlines())))
    chosen = {what: columns_of(getattr(args, what)) for what in ("filter", "exclude")}
    examples = load_examples({"path": args.speech, "task": default_task().name, "limit": args.rows, **chosen})
    rows = []
    for number in range(len(examples)):
        with suppress(RowError):
            example = examples[number]
            rows.append({
                "id": f"{example.id} {KIND}",
                "audio": str(Path(example.clips[0].audio["path"]).resolve()),
                "instruction": drawing(args.seed, number)("request", requests),
                "transcript": example.reference,
                "speaker": example.speaker,
            })  # fmt: skip
    return rows


def answers(rows: list[dict], args):
    """Per row the LLM's answer; None for one without an end."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from audiophi.data.alignment_text import normalise_transcript
    from audiophi.data.example import AUDIO, in_words
    from modeling_audiophi.components_audiophi import resolve_component

    folder = resolve_component(args.llm)
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    if tokenizer.chat_template is None:
        raise ValueError(f"{args.llm} has no chat template: it was not taught to answer; give another --llm")
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    for start in range(0, len(rows), args.batch_size):
        batch = rows[start : start + args.batch_size]
        chats = []
        for row in batch:
            content = [AUDIO, {"type": "text", "text": row["instruction"]}]
            (turn,) = in_words([{"role": "user", "content": content}], [normalise_transcript(row["transcript"])])
            chats.append([{**turn, "content": "".join(item["text"] for item in turn["content"])}])
        how = {"add_generation_prompt": True, "return_dict": True, "return_tensors": "pt", "padding": True}
        inputs = tokenizer.apply_chat_template(chats, **how)
        with torch.inference_mode():
            output = model.generate(**inputs, max_new_tokens=args.max_new_tokens, do_sample=False)
        ends = model.generation_config.eos_token_id
        ends = {*(ends if isinstance(ends, list) else [ends]), tokenizer.eos_token_id}
        for row, words in zip(batch, output[:, inputs["input_ids"].shape[1] :].tolist(), strict=True):
            text = tokenizer.decode(words, skip_special_tokens=True).strip()
            yield row, text if ends & {*words} and text else None


def main(arguments=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("speech")
    parser.add_argument("output", type=Path)
    parser.add_argument("--llm", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    parser.add_argument("--rows", type=int)
    parser.add_argument("--requests", type=Path)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--max_new_tokens", type=int, default=96)
    parser.add_argument("--seed", type=int, default=0)
    for what in ("filter", "exclude"):
        parser.add_argument(f"--{what}", nargs="*", default=[], metavar="COLUMN=VALUES")
    args = parser.parse_args(arguments)
    if args.output.suffix != ".parquet":
        parser.error(f"{args.output}: the result is a .parquet file")
    try:
        rows = rows_of(args)
    except (ValueError, OSError) as error:
        parser.error(str(error))

    from datasets import Dataset
    from tqdm import tqdm

    lines = args.output.with_suffix(".jsonl")
    lines.parent.mkdir(parents=True, exist_ok=True)
    known = [json.loads(line) for line in lines.read_text().splitlines(keepends=True) if line.endswith("\n")] \
        if lines.exists() else []  # fmt: skip
    asked = {(row["id"], row["instruction"], row["transcript"]) for row in rows}
    known = [row for row in known if (row["id"], row["instruction"], row["transcript"]) in asked]
    done = {row["id"] for row in known}
    lines.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in known), encoding="utf-8")
    todo = [row for row in rows if row["id"] not in done]
    with open(lines, "a", encoding="utf-8") as stream:
        try:
            for row, answer in tqdm(answers(todo, args), total=len(todo), unit="row"):
                known.append({**row, "answer": answer, "kind": KIND})
                stream.write(json.dumps(known[-1], ensure_ascii=False) + "\n")
                stream.flush()
        except (ValueError, OSError) as error:
            parser.error(str(error))
    finished = [row for row in known if row["answer"]]
    if not finished:
        parser.error("no answer came to an end; raise --max_new_tokens or take another --llm")
    Dataset.from_list(finished).to_parquet(args.output)
    print(f"{args.output}: {len(finished)} answers of {len(known)} rows, the others did not come to an end")
    return 0


if __name__ == "__main__":
    sys.exit(main())
