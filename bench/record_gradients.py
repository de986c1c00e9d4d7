"""The command `python -m bench.record_gradients`: `bench.papers.gradiveq.record_gradients`."""

import sys

from bench.papers.gradiveq.record_gradients import main

if __name__ == "__main__":
    sys.exit(main())
