"""Two ranks, of which the second dies or falls silent; the first prints what it is told."""

import os
import sys
import time
from datetime import timedelta

import torch
import torch.distributed as dist

from gradiveq.powersgd import PowerSGD
from tests.ddp.checks.methods import windows
from tests.ddp.checks.training import REMEMBERING
from tests.support.ddp_harness import Net, hooked, sgd, step

#: GradiVeQ's bases are exchanged before iteration 4.
METHODS = {"topk": REMEMBERING, "powersgd": PowerSGD(2), "gradiveq": windows(sample=2, ratio=8)}
AT = 4

torch.set_num_threads(1)
dist.init_process_group("gloo", timeout=timedelta(seconds=6))
model, _ = hooked(Net(), METHODS[sys.argv[1]])
optimizer = sgd(model)
for iteration in range(AT + 2):
    if iteration == AT and dist.get_rank() == 1:
        if sys.argv[2] == "dies":
            os._exit(0)
        time.sleep(60)
    try:
        step(model, optimizer, iteration)
    except RuntimeError as error:
        print(f"iteration {iteration}: {error}", flush=True)
        os._exit(3)
