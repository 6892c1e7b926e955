"""A checkpoint behind OpenAI's HTTP interface."""

import sys


def main(arguments: list[str]) -> int:
    """Returns the exit code. Everything else: audiophi/serving.py."""
    try:
        from audiophi import serving
    except ModuleNotFoundError as error:
        if error.name not in ("fastapi", "uvicorn", "openai", "multipart"):
            raise
        print('audiophi serve: needs a web server: pip install "audiophi[serve]"', file=sys.stderr)
        return 1
    return serving.main(arguments)
