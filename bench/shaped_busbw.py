"""The command `python -m bench.shaped_busbw`: `bench.shaped.busbw`."""

import sys

from bench.shaped.busbw import main

if __name__ == "__main__":
    sys.exit(main())
