"""Run by torchrun in `test_ddp`: every check of the modules that are imported here, on all ranks."""

import ddp_errors  # noqa: F401
import ddp_methods  # noqa: F401
import ddp_probe  # noqa: F401
import ddp_training  # noqa: F401
from ddp_harness import main

if __name__ == "__main__":
    main()
