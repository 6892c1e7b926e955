"""python -m audiophi"""

import sys

from .cli.main import main

sys.exit(main())
