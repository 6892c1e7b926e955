"""Measure an AudioPhi model; the same as `audiophi eval`.

    python eval.py --model DIR_OR_ID --data SPEC --output_dir OUT [--task TASK] [--baseline openai/whisper-tiny.en]

Options: python eval.py --help.
"""

import sys

from audiophi.cli.eval import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
