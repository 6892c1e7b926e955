"""A checkpoint in the browser (Gradio): record or upload audio, ask, and watch the answer come.

    audiophi demo --model checkpoints/audiophi-tiny

`audiophi push DIR org/name --space` publishes this very file and samples/ as a Space. Nothing else of this repository
is there: the model's code comes from the Hub with the model, whose id is in $AUDIOPHI_MODEL.
"""

import argparse
import difflib
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # read when gradio is imported

import gradio as gr
import numpy as np
import soundfile
import torch
from matplotlib.figure import Figure
from transformers import StoppingCriteriaList, TextIteratorStreamer, pipeline

try:  # a clone of AudioPhi, or its package: this tells transformers about it
    import modeling_audiophi  # noqa: F401
except ImportError:  # a Space
    pass

IN_CLONE = Path(__file__).resolve().parents[1] / "checkpoints" / "audiophi-tiny"
SAMPLES = sorted(map(str, Path(__file__).resolve().parent.glob("samples/*.ogg")))  # tools/make_samples.py
MAX_SECONDS = 600
MAX_FILE_SIZE = "100mb"
KEEP_SECONDS = 3600  # recordings on the server
DECIBELS = 80  # below the loudest, of what the spectrogram shows
GREY, BLUE = "#7a818c", "#2f6fb3"  # readable on light and dark pages
CSS = "footer {display: none !important} #heading h1 {margin-bottom: 0} #status {min-height: 1.5em; opacity: 0.8}"
# Gradio brings them along. Weight 600, which it takes by default, has few letters in 6.31.
FONTS = (gr.themes.LocalFont("Source Sans Pro", weights=(400, 700)), "system-ui", "sans-serif")


def load(model, device=None):
    """The pipeline of a checkpoint: folder or Hub id. OSError, ValueError where it cannot be loaded."""
    settings = {"dtype": torch.float32, "trust_remote_code": True}
    return pipeline("audio-text-to-text", model=model, device=device, **settings)


def read(pipe, path, longest=MAX_SECONDS):
    """An uploaded file → waveform (samples,) at the processor's rate. ValueError for what cannot be heard or lasts
    longer than `longest` seconds, naming the file as the user does."""
    if not path:
        raise ValueError("There is nothing to hear yet: record something or upload a file.")
    name = Path(path).name

    def refuse_longer(seconds):
        if seconds > longest:
            raise ValueError(
                f"{name}: {seconds:.0f} s is too long, this demo takes {longest:.0f} s. Cut it, or use the command "
                "line on a machine of your own."
            )

    try:
        refuse_longer(soundfile.info(path).duration)  # hours of it need not be decoded for that
    except soundfile.SoundFileError:
        pass  # another container, or no audio: reading it tells
    try:
        waveform = pipe.processor.load_audio(path)
    except ValueError as error:
        raise ValueError(str(error).replace(str(path), name)) from None
    refuse_longer(len(waveform) / pipe.processor.sampling_rate)
    return waveform


def picture(waveform, rate, columns=1200):
    """Waveform (samples,) → figure: its envelope, and below it its spectrogram in dB."""
    seconds = len(waveform) / rate
    figure = Figure(figsize=(9, 4.2), dpi=110, layout="constrained", facecolor="none")
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(2, 3))
    parts = np.array_split(waveform, min(columns, len(waveform)))
    times = np.linspace(0, seconds, len(parts))
    top.fill_between(times, [part.min() for part in parts], [part.max() for part in parts], color=BLUE, linewidth=0.6)
    top.set_ylim(*(np.array([-1, 1]) * max(1e-3, 1.05 * np.abs(waveform).max())))
    top.set_yticks([])
    size = 512 if rate <= 24_000 else 1024
    padded = np.pad(waveform, size // 2)
    starts = np.linspace(0, len(padded) - size, min(columns, 1 + len(waveform) // 64)).astype(int)
    frames = np.stack([padded[start : start + size] for start in starts]) * np.hanning(size)
    power = np.abs(np.fft.rfft(frames)) ** 2
    level = 10 * np.log10(np.maximum(power, 1e-10)).T
    bottom.imshow(
        level, origin="lower", aspect="auto", cmap="magma", vmin=level.max() - DECIBELS, vmax=level.max(),
        extent=(0, seconds, 0, rate / 2000), interpolation="nearest",
    )  # fmt: skip
    bottom.set(xlabel="seconds", ylabel="kHz", xlim=(0, seconds))
    for axes in (top, bottom):
        axes.set_facecolor("none")
        axes.tick_params(colors=GREY, which="both")
        axes.xaxis.label.set_color(GREY)
        axes.yaxis.label.set_color(GREY)
        axes.spines[:].set_visible(False)
    top.tick_params(bottom=False)
    return figure


def decoding(pipe, instruction):
    """How the checkpoint decodes what it answers to an instruction: a generation config."""
    chat = [{"role": "user", "content": [{"type": "audio"}, {"type": "text", "text": instruction}]}]
    task = instruction if instruction in pipe.processor.tasks else pipe.processor.task_of(chat)
    return pipe.engine.arguments(task)["generation_config"]


def beams(pipe, instruction):
    """With how many beams the checkpoint decodes what it answers to an instruction."""
    return decoding(pipe, instruction).num_beams or 1


def wordings(pipe):
    """Every instruction that the checkpoint was trained on, of free questions one of each kind. Checkpoints that do not
    say so were trained on most of those that they recognise."""
    asked = (task.get("trained", task["instructions"]) for task in pipe.processor.tasks.values())
    return list(dict.fromkeys(words for instructions in asked for words in instructions))


def answer(pipe, waveform, instruction, search=True):
    """Yields (words so far, status, times) while they are written. times: None until the end, then of a transcript
    [(word, start, end in seconds, how sure in percent; None with one ear), …], and [] for what is no transcript, or
    without an alignment head.

    First a draft, one token after the other, because beams cannot be streamed; then, with `search` and where the
    checkpoint decodes with beams, what these find. Ends early, also in between, when the generator is closed.
    ValueError, OSError for what the model cannot take.
    """
    if not instruction or not instruction.strip():
        raise ValueError("The instruction is empty: write one, or choose one of the examples.")
    stopped, began, words = threading.Event(), time.monotonic(), ""
    clip, seconds = (waveform, pipe.processor.sampling_rate), len(waveform) / pipe.processor.sampling_rate

    def is_stopped(ids, scores, **_):
        return torch.full((len(ids),), stopped.is_set(), dtype=torch.bool, device=ids.device)

    settings = {"instruction": instruction.strip(), "stopping_criteria": StoppingCriteriaList([is_stopped])}
    settings |= {"return_timestamps": "word"} if aligns(pipe) else {}
    settings |= {"return_confidence": True} if pipe.model.config.hear_with == "both" else {}
    streamer = TextIteratorStreamer(pipe.tokenizer, skip_prompt=True, skip_special_tokens=True)
    yield words, "Listening …", None
    with ThreadPoolExecutor(1) as thread:
        try:
            search = search and beams(pipe, settings["instruction"]) > 1
            draft = thread.submit(pipe, clip, streamer=streamer, **settings)
            for piece in streamer:
                words += piece
                yield words, "Draft: word by word …" if search else "Word by word …", None
            result, how = draft.result(), "greedy"
            if search:
                how = f"{beams(pipe, settings['instruction'])} beams"
                final = thread.submit(pipe, clip, **settings)
                while not final.done():
                    status = f"Draft complete. Searching with {how} … {time.monotonic() - began:.0f} s"
                    yield result["generated_text"], status, None
                    wait([final], timeout=1)
                result = final.result()
        finally:
            stopped.set()  # leaving `with` waits for the thread
    status = f"Done ({how}): {seconds:.1f} s of audio in {time.monotonic() - began:.1f} s."
    text, chunks = result["generated_text"], result.get("chunks", [])
    sure = [chunk.get("confidence") for chunk in chunks]
    sure = [None if value is None else round(100 * value) for value in sure]
    times = [(chunk["text"], *chunk["timestamp"], value) for chunk, value in zip(chunks, sure, strict=True)]
    yield text, status if text else f"{status} The model wrote nothing: it heard no words.", times


def aligns(pipe):
    """Whether the model has an alignment head, which knows when words are said."""
    return pipe.model.model.alignment is not None


def reading(pipe, waveform, instruction):
    """What the alignment head hears by itself, cut as for the answer. None for a model without one."""
    if not aligns(pipe):
        return None
    row = pipe.preprocess((waveform, pipe.processor.sampling_rate), instruction=instruction.strip())
    heard = (pipe.engine([prompt], with_alignment=True, with_lm=False)[0].heard for prompt in row["prompts"])
    return " ".join(filter(None, (text for clips in heard for text in clips)))


def compared(heard, answered):
    """The alignment's reading and an answer → words of both in order, as `gr.HighlightedText` takes them: (words, whose
    alone they are; None: both have them)."""
    words = (heard.split(), answered.split())
    parts = []
    for how, start, end, other_start, other_end in difflib.SequenceMatcher(None, *words, autojunk=False).get_opcodes():
        mine, its = " ".join(words[0][start:end]), " ".join(words[1][other_start:other_end])
        parts += [(mine, None)] if how == "equal" else [(mine, "alignment alone"), (its, "answer alone")]
    return [part for part in parts if part[0]]


def doubtful(times):
    """The words of `answer`'s times as `gr.HighlightedText` takes them: marked where they are rather wrong than right;
    None where nobody knows."""
    if not times or times[0][3] is None:
        return None
    return [(word, "doubtful" if sure < 50 else None) for word, _, _, sure in times]


@contextmanager
def readable():
    """What the input is to blame for becomes a message on the page. Anything else is the server's fault: its log has
    the trace, the page says no more than that there was an error."""
    try:
        yield
    except (ValueError, OSError) as error:
        raise gr.Error(str(error), duration=None, title="That did not work", print_exception=False) from error


def explanation(pipe, longest):
    """Markdown: what happens to a recording."""
    lines = []
    asked = wordings(pipe)
    most = max((beams(pipe, words) for words in asked), default=1)
    if most > 1:
        lines.append(
            "The words that appear at once are a **draft**: each is chosen for good as it comes (greedy). This "
            f"checkpoint decodes with **{most} beams**, which change their mind until the end and so cannot be "
            "streamed. They run after the draft and their answer replaces it; unticking the box keeps the draft."
        )
    else:
        lines.append("The words appear as they are chosen (greedy): this checkpoint decodes without beams.")
    voted = [words for words in asked if getattr(decoding(pipe, words), "ctc_weight", 0)]
    if voted:
        lines.append(
            f"Asked “{voted[0]}”, the alignment head, which spells what it hears, votes on every word of both."
        )
    cut = [task["instructions"][0] for task in pipe.processor.tasks.values() if task.get("in_pieces")]
    if pipe.window_seconds and cut:
        lines.append(
            f"Asked “{'” or “'.join(cut)}”, it works on recordings longer than {pipe.window_seconds:.0f} s piece by "
            "piece, cut at pauses; for any other instruction it hears them as a whole, as far as they fit."
        )
    lines.append(
        f"At most {longest:.0f} s, {MAX_FILE_SIZE.upper()}. Recordings are not kept: they leave the server after "
        f"{KEEP_SECONDS // 3600} to {2 * KEEP_SECONDS // 3600} hours."
    )
    return "\n\n".join(lines)


def build(pipe, name, longest=MAX_SECONDS):
    """The page, `gr.Blocks`, for a loaded pipeline that users know by `name`."""
    known = wordings(pipe)
    most = max((beams(pipe, words) for words in known), default=1)
    rate = pipe.processor.sampling_rate

    def show(path):
        with readable():
            return None if path is None else picture(read(pipe, path, longest), rate)

    def ask(path, instruction, search):
        with readable():
            waveform, text = read(pipe, path, longest), ""
            for text, said, times in answer(pipe, waveform, instruction, search):
                yield text, said, None, times, doubtful(times)
            heard = reading(pipe, waveform, instruction)
            yield text, said, None if heard is None else compared(heard, text), times, doubtful(times)

    with gr.Blocks(title=f"AudioPhi: {name}", delete_cache=(KEEP_SECONDS, KEEP_SECONDS)) as page:
        gr.Markdown(f"# AudioPhi\nA small language model that listens. Checkpoint: `{name}`", elem_id="heading")
        with gr.Row():
            with gr.Column():
                audio = gr.Audio(sources=["upload", "microphone"], type="filepath", label="Audio", elem_id="audio",
                                 buttons=["download"])  # fmt: skip
                if SAMPLES:
                    gr.Examples([[path] for path in SAMPLES], audio, label="Sample clips: synthetic",
                                example_labels=[Path(path).stem for path in SAMPLES])  # fmt: skip
                instruction = gr.Textbox(
                    known[0] if known else "", label="Instruction", lines=1, max_lines=4, elem_id="instruction",
                )  # fmt: skip
                if known:
                    label = "Instructions it was trained on, of questions one of each kind (others can be tried)"
                    gr.Examples([[words] for words in known], instruction, label=label, examples_per_page=50)
                search = gr.Checkbox(True, label=f"After the draft, search with {most} beams", visible=most > 1)
                with gr.Row():
                    stop = gr.Button("Stop", elem_id="stop")
                    go = gr.Button("Answer", variant="primary", elem_id="go")
            with gr.Column():
                words = gr.Textbox(label="Answer", lines=4, interactive=False, buttons=["copy"], elem_id="answer")
                status = gr.Markdown(elem_id="status")
                plot = gr.Plot(label="Waveform and spectrogram", show_label=False, elem_id="plot")
        with gr.Accordion("When the words of a transcript are said", open=False, elem_id="when", visible=aligns(pipe)):
            doubt = gr.HighlightedText(
                label="Doubtful words are grey", color_map={"doubtful": "gray"}, elem_id="doubt",
                visible=pipe.model.config.hear_with == "both",
            )  # fmt: skip
            times = gr.Dataframe(headers=["word", "from, s", "to, s", "sure, %"], datatype=["str", *["number"] * 3],
                                 interactive=False, max_height=300, show_label=False, elem_id="times")  # fmt: skip
        with gr.Accordion("How it answers", open=False, elem_id="how"):
            heard = gr.HighlightedText(
                label="What the alignment head reads by itself, before the language model, against the answer",
                color_map={"alignment alone": "orange", "answer alone": "blue"}, show_legend=True, elem_id="heard",
                visible=aligns(pipe),
            )  # fmt: skip
            gr.Markdown(explanation(pipe, longest))
        audio.change(show, audio, plot, show_progress="hidden")
        asked = gr.on([go.click, instruction.submit], ask, [audio, instruction, search],
                      [words, status, heard, times, doubt], api_name="ask", show_progress="hidden")  # fmt: skip
        stop.click(lambda: "Stopped.", None, status, cancels=[asked], queue=False)
    return page


def main(argv=None, program="app.py"):
    parser = argparse.ArgumentParser(prog=program, description=__doc__.splitlines()[0])
    model = os.environ.get("AUDIOPHI_MODEL") or (str(IN_CLONE) if IN_CLONE.is_dir() else None)
    parser.add_argument("--model", default=model, required=not model, help="checkpoint: folder or Hub id; default: "
                        "$AUDIOPHI_MODEL, else in a clone of AudioPhi checkpoints/audiophi-tiny")  # fmt: skip
    parser.add_argument("--device", help="default: a GPU where there is one")
    parser.add_argument("--port", type=int, help="default: $GRADIO_SERVER_PORT, else the first free one from 7860")
    args = parser.parse_args(argv)
    try:
        pipe = load(args.model, args.device)
    except (OSError, ValueError) as error:
        parser.exit(1, f"{parser.prog}: {args.model}: {error}\n")
    name = Path(args.model).resolve().name if Path(args.model).is_dir() else args.model
    page = build(pipe, name)
    page.queue(default_concurrency_limit=1).launch(
        server_port=args.port, share=False, ssr_mode=False, max_file_size=MAX_FILE_SIZE, css=CSS,
        theme=gr.themes.Default(primary_hue="blue", font=FONTS),
    )  # fmt: skip


if __name__ == "__main__":
    main()
