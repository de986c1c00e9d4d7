"""The command `python -m bench.calibrate`: `bench.virtual.calibrate`."""

import sys

from bench.virtual.calibrate import main

if __name__ == "__main__":
    sys.exit(main())
