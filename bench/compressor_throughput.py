"""The command `python -m bench.compressor_throughput`: `bench.kernels.compressor_throughput`."""

from bench.kernels.compressor_throughput import main

if __name__ == "__main__":
    main()
