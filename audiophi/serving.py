"""An OpenAI-compatible server of one checkpoint: `transformers serve`'s application, answered by our pipeline.

    POST /v1/chat/completions         chats with `input_audio` or `audio_url`, streamed or not
    POST /v1/audio/transcriptions     a file; json, text, verbose_json (word times), srt, vtt, streamed or not
    GET  /v1/models, /health

transformers' own handlers call `generate` with what a processor makes of the whole file; the pipeline cuts long
recordings at pauses, decodes as the task's settings say, and knows every form of audio. Requests are answered one after
the other, in one thread.
"""

import argparse
import asyncio
import json
from pathlib import Path

from fastapi import HTTPException
from fastapi.responses import JSONResponse, PlainTextResponse, StreamingResponse
from transformers import TextIteratorStreamer
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.server import build_server
from transformers.cli.serving.transcription import TranscriptionHandler
from transformers.cli.serving.utils import InferenceThread

from audiophi.tasks.transcribe import Transcribe
from modeling_audiophi.pipeline_rows_audiophi import MALFORMED, ROW_ERRORS

from .cli.hear import SUBTITLES, add_model_arguments, as_result, load_pipeline, subtitles

FORMATS = ("json", "text", "verbose_json", *SUBTITLES)
SAMPLING = ("temperature", "top_p")


class Served:
    """One loaded pipeline, and what transformers' application asks of a model manager and of its state.

    name: what requests call it. pipe: of `load_pipeline`.
    """

    def __init__(self, name: str, pipe):
        self.name, self.pipe, self.thread = name, pipe, InferenceThread()

    def check(self, requested: str | None) -> None:
        """HTTPException 404 for another model."""
        if requested not in (None, self.name, Path(self.name).name):
            raise HTTPException(404, f"model {requested!r} is not served here; this is {self.name!r}")

    async def ask(self, inputs, **settings) -> dict:
        """The pipeline's result. HTTPException 400 saying what of the input cannot be used."""
        try:
            return await self.thread.async_submit(self.pipe, inputs, **settings)
        except (*ROW_ERRORS, *MALFORMED) as error:
            raise HTTPException(400, str(error)) from error

    async def stream(self, inputs, **settings):
        """The pieces of text of the pipeline's result as they come. Raises what `ask` raises before the first one."""
        streamer = TextIteratorStreamer(self.pipe.processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
        done = asyncio.ensure_future(self.ask(inputs, streamer=streamer, **settings))
        pieces = iter(streamer)
        first = ""
        while first == "":
            first = await asyncio.to_thread(next, pieces, None)
        if first is None:
            await done  # no word: what went wrong, if anything

        async def rest():
            piece = first
            while piece is not None:
                if piece:
                    yield piece
                piece = await asyncio.to_thread(next, pieces, None)
            await done

        return rest()

    # ---- what transformers' `build_server` asks of a model manager, and of a generation state ----------------------

    def list_models(self) -> list[dict]:
        return [{"id": self.name, "object": "model", "created": 0, "owned_by": "audiophi"}]

    def is_cb_alive(self) -> bool:
        return True

    def shutdown(self) -> None:
        pass


class Chats(ChatCompletionHandler):
    """POST /v1/chat/completions. Answered greedily where the request sets no temperature above 0."""

    async def handle_request(self, body: dict, request_id: str):
        served = self.model_manager
        self._validate_request(body)
        served.check(body.get("model"))
        messages = body.get("messages")
        if not isinstance(messages, list) or not messages:
            raise HTTPException(400, "messages: a list of turns is needed")
        settings = settings_of(body)
        if body.get("stream"):
            pieces = await served.stream(messages, **settings)
            return StreamingResponse(self._chunks(request_id, pieces), media_type="text/event-stream")
        result = await served.ask(messages, **settings)
        answer = self._build_completion(request_id, result["generated_text"], served.name, finish_reason="stop")
        return JSONResponse(answer)

    async def _chunks(self, request_id, pieces):
        yield self._build_chunk_sse(request_id, role="assistant", model=self.model_manager.name)
        async for piece in pieces:
            yield self._build_chunk_sse(request_id, content=piece, model=self.model_manager.name)
        yield self._build_chunk_sse(request_id, finish_reason="stop", model=self.model_manager.name)
        yield "data: [DONE]\n\n"


class Transcriptions(TranscriptionHandler):
    """POST /v1/audio/transcriptions."""

    async def handle_request(self, request):
        served = self.model_manager
        async with request.form() as form:
            self._validate_request({key.removesuffix("[]") for key in form})
            file, form = form.get("file"), dict(form)
            if file is None or isinstance(file, str):
                raise HTTPException(400, "file: upload a file, as multipart/form-data")
            audio, name = await file.read(), file.filename or "the uploaded file"
        served.check(form.get("model"))
        wanted = form.get("response_format") or "json"
        if wanted not in FORMATS:
            raise HTTPException(400, f"response_format {wanted!r}: one of {', '.join(FORMATS)}")
        if Transcribe.name not in served.pipe.processor.tasks:
            raise HTTPException(400, f"{served.name} was not trained to transcribe; ask it by /v1/chat/completions")
        try:
            if str(form.get("stream")).lower() == "true":
                pieces = await served.stream(audio, task=Transcribe.name)
                return StreamingResponse(events(pieces), media_type="text/event-stream")
            of = "word" if wanted == "verbose_json" and served.pipe.model.model.alignment is not None else True
            result = await served.ask(audio, task=Transcribe.name, return_timestamps=of)
        except HTTPException as error:
            raise HTTPException(error.status_code, f"{name}: {error.detail}") from error
        result = as_result(name, result)
        if wanted == "text":
            return PlainTextResponse(result["text"] + "\n")
        if wanted in SUBTITLES:
            return PlainTextResponse(subtitles(result["chunks"], wanted))
        if wanted == "json":
            return JSONResponse({"text": result["text"]})
        words = [{"word": chunk.pop("text"), **chunk} for chunk in result["chunks"]] if of == "word" else []
        processor = served.pipe.processor
        seconds = len(processor.load_audio(audio)) / processor.sampling_rate
        told = {"task": Transcribe.name, "language": form.get("language") or "", "duration": round(seconds, 3)}
        return JSONResponse({**told, "text": result["text"], "words": words})


class Elsewhere:
    """Routes of transformers' application that are not served here."""

    async def handle_request(self, *_):
        raise HTTPException(404, "served here: /v1/chat/completions and /v1/audio/transcriptions")


async def events(pieces):
    """A transcript's pieces as OpenAI's events."""
    text = ""
    async for piece in pieces:
        text += piece
        yield f"data: {json.dumps({'type': 'transcript.text.delta', 'delta': piece})}\n\n"
    yield f"data: {json.dumps({'type': 'transcript.text.done', 'text': text})}\n\n"


def settings_of(body: dict) -> dict:
    """OpenAI's parameters as those of `generate`. HTTPException 400 for values that are none."""
    settings = {}
    most = body.get("max_completion_tokens", body.get("max_tokens"))
    try:
        if most is not None:
            settings["max_new_tokens"] = int(most)
        given = {name: float(body[name]) for name in SAMPLING if body.get(name) is not None}
    except (TypeError, ValueError) as error:
        raise HTTPException(400, f"max_tokens, temperature and top_p are numbers ({error})") from error
    return {**settings, **given, "do_sample": True} if given.get("temperature", 0) > 0 else settings


def application(served: Served):
    """The FastAPI application."""
    handlers = {
        "chat_handler": Chats(served, served), "transcription_handler": Transcriptions(served, served),
        **dict.fromkeys(("completion_handler", "response_handler", "systemone_handler"), Elsewhere()),
    }  # fmt: skip
    app = build_server(served, generation_state=served, **handlers)

    @app.exception_handler(HTTPException)
    async def _(_request, error):  # in the form that OpenAI's clients show
        told = {"message": error.detail, "type": "invalid_request_error", "code": error.status_code}
        return JSONResponse({"error": told}, error.status_code)

    return app


def main(arguments: list[str]) -> int:
    import uvicorn

    parser = argparse.ArgumentParser(prog="audiophi serve", description=__doc__.splitlines()[0])
    parser.add_argument("model", help="checkpoint: folder or Hub id")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    add_model_arguments(parser)
    args = parser.parse_args(arguments)
    try:
        served = Served(args.model, load_pipeline(args))
    except (OSError, ValueError) as error:
        parser.exit(1, f"audiophi serve: {error}\n")
    uvicorn.run(application(served), host=args.host, port=args.port, log_level="info")
    return 0
