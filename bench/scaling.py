"""The command `python -m bench.scaling`: `bench.virtual.scaling`."""

import sys

from bench.virtual.scaling import main

if __name__ == "__main__":
    sys.exit(main())
