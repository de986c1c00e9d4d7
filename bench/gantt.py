"""The command `python -m bench.gantt`: `bench.papers.gradiveq.gantt`."""

import sys

from bench.papers.gradiveq.gantt import main

if __name__ == "__main__":
    sys.exit(main())
