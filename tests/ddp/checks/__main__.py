"""Run by torchrun in `test_hook`: every check, on all ranks."""

from tests.support.ddp_harness import main

if __name__ == "__main__":
    main()
