"""The command `python -m bench.qsgd_throughput`: `bench.kernels.qsgd_throughput`."""

from bench.kernels.qsgd_throughput import main

if __name__ == "__main__":
    main()
