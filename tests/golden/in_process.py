"""All workers in one process without a ring; compressors by themselves."""

from __future__ import annotations

from typing import Any

import numpy as np

from gradiveq.flatten import Layout
from gradiveq.methods import Compressed

from .adapters import aggregation_here, compressed, probed
from .cases import PROBED, Case
from .inputs import FLAWED, Model, bell, gradients
from .on_ring import learning_rate
from .traces import Trace, digest, key_names, measured, plain, sampled

LENGTHS = (0, 1, 5, 1000, 70_000)


def here_case(title: str, case: Case) -> dict[str, Any]:
    """One aggregation after another, and from a kept state again."""
    method = case.make()
    model = Model(odd_shapes=True)
    layout = Layout(model, method.groups if isinstance(method, Compressed) else ())

    def packed(rank: int, iteration: int) -> Any:
        vector = np.zeros(layout.length, np.float32)
        given = gradients(model, rank, case.size, iteration, unused=True, flawed=None)
        for name, parameter in model.named_parameters():
            parameter.grad = given.get(name)
        layout.pack(vector)
        return vector

    def advance(aggregation: Any, iteration: int, trace: Trace) -> None:
        vectors, out = [packed(rank, iteration) for rank in range(case.size)], np.zeros(layout.length, np.float32)
        measures = aggregation.aggregate(vectors, out, iteration, learning_rate(iteration))
        rows = [measured(one) for one in measures]
        trace.add(out, {"payload_bytes": [one.payload_bytes for one in measures], "measures": rows[0], "all": rows})

    aggregation, trace = aggregation_here(method, layout, case.size), Trace(layout.length)
    kept: dict[int, Any] = {}
    for iteration in range(case.iterations):
        if iteration in case.resume:
            kept[iteration] = aggregation.states(), trace.copy()
        advance(aggregation, iteration, trace)
    for start, (states, resumed) in kept.items():
        other = aggregation_here(method, layout, case.size)
        other.load(states)
        for iteration in range(start, case.iterations):
            advance(other, iteration, resumed)
        assert resumed.fingerprint == trace.fingerprint, f"{title}: resumed after {start} calls, it isn't the same"
    result = trace.result()
    everybody = digest(repr(result["reports"].pop("all")).encode())
    return {**result, "all_ranks": everybody, "state": sorted(key_names(aggregation.states()))}


def probe_rows(found: Any) -> dict[str, Any]:
    """Of a probe's report all but seconds, by method and layer, with digits that any processor agrees on apart."""
    rows = [plain(row.__dict__) for row in found.report()]
    values = {
        f"{row['method']} {row['layer']}": [row["elements"], row["ratio"], row["held_out_loss"], row["in_sample_loss"]]
        for row in rows
    }
    rounded = {
        key: [None if one is None else float(f"{one:.6g}") for one in row]
        for key, row in values.items()
        if key.endswith((" all", "conv2.weight"))
    }
    return {"rows": digest(repr(values).encode()), "values": rounded}


def probe_case() -> dict[str, Any]:
    """A model that isn't wrapped."""
    model = Model()
    found = probed(model, PROBED)
    for iteration in range(9):
        given = gradients(model, 0, 1, iteration, unused=True, flawed=FLAWED)
        for name, parameter in model.named_parameters():
            parameter.grad = given.get(name)
        found.observe()
    return probe_rows(found)


def payload_case(spec: str) -> dict[str, Any]:
    """The payloads and estimates of a compressor, of vectors of several lengths, dense and sparse ones."""
    found = {}
    for length in LENGTHS:
        for kind in ("dense", "sparse"):
            values = bell((kind, 0, length), (length,)).astype(np.float32)
            if kind == "sparse":
                values[np.abs(values) < 1] = 0
            payload, estimate = compressed(spec, values, length)
            found[f"{kind} {length}"] = [
                digest(payload.dtype.name.encode(), payload.tobytes()),
                payload.nbytes,
                digest(estimate.tobytes()),
                sampled(estimate)["norm"],
            ]
    return found
