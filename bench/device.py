"""The command `python -m bench.device`: `bench.kernels.device`."""

from bench.kernels.device import main

if __name__ == "__main__":
    main()
