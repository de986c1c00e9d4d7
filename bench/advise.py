"""The command `python -m bench.advise`: `bench.advice.command`."""

import sys

from bench.advice.command import main

if __name__ == "__main__":
    sys.exit(main())
