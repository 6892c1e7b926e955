"""A checkpoint in the browser: record or upload audio, ask, and watch the answer come."""

import sys


def main(arguments: list[str]) -> int:
    """Returns the exit code. Everything else: audiophi/app.py, which also runs alone."""
    try:
        from audiophi import app
    except ModuleNotFoundError as error:
        if error.name != "gradio":
            raise
        print('audiophi demo: needs gradio: pip install "audiophi[demo]"', file=sys.stderr)
        return 1
    app.main(arguments, "audiophi demo")
    return 0
