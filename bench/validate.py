"""The command `python -m bench.validate`: `bench.shaped.validation`."""

import sys

from bench.shaped.validation import main

if __name__ == "__main__":
    sys.exit(main())
