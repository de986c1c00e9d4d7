"""The command `python -m bench.layerwise`: `bench.papers.layerwise.command`."""

import sys

from bench.papers.layerwise.command import main

if __name__ == "__main__":
    sys.exit(main())
