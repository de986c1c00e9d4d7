"""The command `python -m bench.ddp`: `bench.hooks.command`."""

import sys

from bench.hooks.command import main

if __name__ == "__main__":
    sys.exit(main())
