"""``python -m gsto_benchmarks`` is the `gsto` command."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
