"""The command `python -m bench.resnet32_cifar100`: `bench.job.command`."""

import sys

from bench.job.command import main

if __name__ == "__main__":
    sys.exit(main())
