"""The probe: training is as without it, and what it reports is what the hook would do."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import gradiveq.ddp as ddp
from gradiveq import GradiVeQ, QSGDRing
from gradiveq.compressors.half import Half
from gradiveq.compressors.identity import Identity
from gradiveq.compressors.sign import Sign
from gradiveq.compressors.topk import TopK
from gradiveq.ddp.probing import default_methods
from gradiveq.methods import Compressed
from gradiveq.powersgd import PowerSGD
from tests.ddp.checks.methods import FULL_RANK, here, local_gradients
from tests.support.ddp_harness import (
    Net,
    batch,
    check,
    close,
    gathered,
    gradients,
    plain,
    raises,
    rank,
    same_everywhere,
    sgd,
    size,
    step,
    train,
    wrap,
)


@check
def probe_changes_nothing() -> None:
    """To the last bit, and it ends by itself."""
    model = wrap(Net())
    found = ddp.probe(model, sample=4, holdout=3)
    with raises(RuntimeError, "before 5 iterations", "got 0"):
        found.report()
    assert torch.equal(train(model, range(9)), plain(9))
    assert found.done
    assert found.iteration == 7
    table = found.table(layers=True)
    assert all(word in table for word in ("topk", "conv1.weight", "gradiveq:all", "powersgd:4", "held-out loss"))
    layers = {row.layer for row in found.report()}
    assert layers == {"all", *(name for name, _ in Net().named_parameters())}
    assert len(found.table().splitlines()) == 2 + len({row.method for row in found.report()})


@check
def probe_reports_what_would_be() -> None:
    net, reference = Net(), Net()
    model = wrap(net)
    methods = {
        "identity": Identity(),
        "half": Half(),
        "bfloat": Half("bfloat16"),
        "topk": TopK(0.1),
        "sign": Sign("vote"),
        "some": Compressed(TopK(0.1), overrides=(("*.bias", Identity()),)),
        "full": PowerSGD(999, min_compression_rate=0.0),
        "rank 2": PowerSGD(2),
        "gradiveq": GradiVeQ(n_components=2, fit_slices="all"),
        "remembering": GradiVeQ(n_components=2, fit_slices="all", error_feedback=True),
        "lossless": GradiVeQ(ratio=1, fit_slices="all", slice_size=8),
    }
    found = ddp.probe(model, methods, sample=3, holdout=1, also=("fc.weight",))
    optimizer = sgd(model)
    for iteration in range(4):
        reference.load_state_dict(net.state_dict())
        locals_ = local_gradients(reference, iteration)
        step(model, optimizer, iteration)
    rows = {(row.method, row.layer): row for row in found.report()}
    exact = np.mean(locals_, axis=0, dtype=np.float32)

    def off(estimate, where=slice(None)):
        return float(np.square(estimate[where] - exact[where]).sum() / np.square(exact[where]).sum())

    places, offset = {}, 0
    for name, p in net.named_parameters():
        places[name] = slice(offset, offset + p.numel())
        offset += p.numel()
    for name, compressor in (("topk", TopK(0.1)), ("sign", Sign("vote"))):
        workers = here(compressor, {layer: tuple(p.shape) for layer, p in net.named_parameters()}, seed=0)
        estimate = np.empty(offset, np.float32)
        workers.aggregate(locals_, estimate, 3)
        np.testing.assert_allclose(rows[name, "all"].held_out_loss, off(estimate), rtol=1e-4)
        for layer, place in places.items():
            np.testing.assert_allclose(rows[name, layer].held_out_loss, off(estimate, place), rtol=1e-4)
    assert rows["identity", "all"].held_out_loss < 1e-12
    assert rows["identity", "all"].ratio == 1
    assert rows["half", "all"].ratio == 2
    assert 0 < rows["half", "all"].held_out_loss < 1e-5
    assert rows["bfloat", "all"].ratio == 2
    assert 0 < rows["bfloat", "all"].held_out_loss < 1e-4
    assert rows["remembering", "all"].held_out_loss == rows["gradiveq", "all"].held_out_loss  # it isn't simulated
    assert rows["some", "fc.bias"].held_out_loss < 1e-12 < rows["some", "fc.weight"].held_out_loss
    assert rows["full", "all"].held_out_loss < 1e-9
    assert rows["lossless", "all"].held_out_loss < 1e-9
    assert 0.01 < rows["rank 2", "conv2.weight"].held_out_loss < 1
    assert rows["rank 2", "conv2.weight"].ratio == 8 * 72 / (2 * (8 + 72))
    assert rows["gradiveq", "conv2.weight"].ratio == 32
    assert rows["gradiveq", "fc.weight"].in_sample_loss is not None
    assert rows["gradiveq", "conv2.weight"].held_out_loss > rows["gradiveq", "conv2.weight"].in_sample_loss
    assert rows["gradiveq", "fc.bias"].ratio == 1
    assert rows["gradiveq", "conv2.weight"].fit_s > 0
    assert all(row.compress_s >= 0 and row.decompress_s >= 0 for row in rows.values())
    for row in rows.values():  # losses and bytes are the same on all ranks; seconds are a rank's own
        same_everywhere(torch.tensor([row.held_out_loss, row.ratio], dtype=torch.float64), f"{row}")


@check
def probe_of_a_model_that_is_not_wrapped() -> None:
    net = Net()
    found = ddp.probe(net, {"topk": TopK(0.1), "full": FULL_RANK}, sample=3, holdout=2)
    for iteration in range(7):
        net.zero_grad()
        x, y = batch(iteration)
        loss = F.cross_entropy(net(x), y)
        (loss * torch.inf if iteration == 1 else loss).backward()
        found.observe()
    assert found.done
    rows = {(row.method, row.layer): row for row in found.report()}
    assert rows["full", "all"].held_out_loss < 1e-9
    # The last that was held out: iteration 1 didn't count. What is left of one worker's is what its own top-k leaves.
    assert 0 < rows["topk", "all"].held_out_loss < 1


def observed(found: ddp.Probe, model: nn.Module, images: torch.Tensor) -> dict[tuple[str, str], float]:
    """Held-out losses of a model that isn't wrapped, after a look at one image's gradient after the other."""
    for image in images:
        model.zero_grad()
        F.cross_entropy(model(image[None]), torch.tensor([3])).backward()
        found.observe()
    return {(row.method, row.layer): row.held_out_loss for row in found.report()}


@check
def probe_without_convolutions() -> None:
    """By default what doesn't fit is left out, and the table says so; with `also` all fit."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 10))
    found = ddp.probe(model, sample=2, holdout=1)
    assert {method for method, _ in observed(found, model, batch(0)[0])} == {
        name for name in default_methods() if not name.startswith("gradiveq")
    }
    *_, last_row, said = found.table().splitlines()
    assert last_row.startswith("powersgd:4 ")
    assert said.startswith("left out: gradiveq, gradiveq:all, as GradiVeQ compresses ")
    assert set(found.left_out) == {"gradiveq", "gradiveq:all"}
    with_also = ddp.probe(model, sample=2, holdout=1, also=("1.weight",))
    assert ("gradiveq:all", "1.weight") in observed(with_also, model, batch(0)[0])
    assert "left out" not in with_also.table()


@check
def probe_under_another_default_type() -> None:
    """Of torch's: what is measured doesn't depend on it."""
    methods = {"gradiveq": GradiVeQ(n_components=2, fit_slices="all"), "full": FULL_RANK, "topk": TopK(0.1)}
    (model, images), losses = (Net(), batch(0)[0]), []
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        torch.set_default_dtype(dtype)
        try:
            losses.append(observed(ddp.probe(model, methods, sample=3, holdout=1), model, images))
        finally:
            torch.set_default_dtype(torch.float32)
    assert losses[0] == losses[1] == losses[2]


@check
def probe_of_a_compiled_model() -> None:
    """What is inside has the hook. (`torch.compile` itself takes seconds to import.)"""
    model, compiled = wrap(Net()), nn.Module()
    compiled._orig_mod = model
    found = ddp.probe(compiled, {"topk": TopK(0.1)}, sample=2, holdout=1)
    train(model, range(3))
    assert {row.layer for row in found.report()} == {"all", *(name for name, _ in Net().named_parameters())}


@check
def probe_skips_what_is_not_finite() -> None:
    """On all ranks alike, and gradients still are DDP's."""
    net = Net()
    model = wrap(net)
    found = ddp.probe(model, {"topk": TopK(0.1)}, sample=2, holdout=2)
    for iteration in range(5):
        net.zero_grad()
        x, y = batch(iteration)
        loss = F.cross_entropy(model(x), y)
        (loss * torch.inf if iteration == 1 and rank() == 0 else loss).backward()
        assert bool(gradients(net).isfinite().all()) == (iteration != 1)
    assert found.iteration == 4
    close(*gathered(gradients(net))[:2], 0)


@check
def probes_that_differ() -> None:
    """From each other, and from a State on another rank."""
    last = rank() == size() - 1
    model = wrap(Net())
    ddp.probe(model, {"topk": TopK(0.1), **({"half": Half()} if last else {})})
    with raises(ValueError, "method half is missing on rank 0", "Half(", f"on rank {size() - 1}"):
        step(model, sgd(model), 0)
    model = wrap(Net())
    if last:
        ddp.probe(model, {"topk": TopK(0.1)})
    else:
        model.register_comm_hook(ddp.State(model, TopK(0.1)), ddp.hook)
    with raises(ValueError, "hook is 'State' on rank 0", f"'Probe' on rank {size() - 1}"):
        step(model, sgd(model), 0)


@check
def probes_that_are_refused() -> None:
    with raises(ValueError, "`sample` must be at least 2"):
        ddp.probe(Net(), sample=1)
    with raises(ValueError, "`methods` must name at least one"):
        ddp.probe(Net(), {})
    with raises(TypeError, "QSGDRing", "for ring"):
        ddp.probe(Net(), {"ring": QSGDRing()})  # type: ignore[dict-item]
    with raises(ValueError, "must be 'layer'"):
        ddp.probe(Net(), {"whole": Compressed(TopK(), granularity="model")})
    with raises(ValueError, "`n_components` must be at most", "sample=2"):
        ddp.probe(Net(), {"much": GradiVeQ(n_components=9)}, sample=2)
    with raises(ValueError, "convolutions"):
        ddp.probe(nn.Linear(4, 4), {"none": GradiVeQ()})
