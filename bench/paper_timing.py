"""The command `python -m bench.paper_timing`: `bench.papers.gradiveq.timing`."""

import sys

from bench.papers.gradiveq.timing import main

if __name__ == "__main__":
    sys.exit(main())
