"""The command `python -m bench.pca_refit`: `bench.kernels.pca_refit`."""

from bench.kernels.pca_refit import main

if __name__ == "__main__":
    main()
