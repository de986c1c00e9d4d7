"""The command `python -m bench.hard_threshold`: `bench.papers.hard_threshold.command`."""

import sys

from bench.papers.hard_threshold.command import main

if __name__ == "__main__":
    sys.exit(main())
