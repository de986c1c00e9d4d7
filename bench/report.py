"""The command `python -m bench.report`: `bench.job.report`."""

import sys

from bench.job.report import main

if __name__ == "__main__":
    sys.exit(main())
