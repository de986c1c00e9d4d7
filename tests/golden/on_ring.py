"""`gradiveq.Aggregator` on a ring of either kind."""

from __future__ import annotations

from typing import Any

from gradiveq import Aggregator, Report
from ring import lockstep
from ring.handle import Ring

from .cases import Case
from .inputs import FLAWED, Model, gradients
from .traces import Trace, digest, flat, key_names, measured, plain

FIELDS = ("phase", "bytes_sent", "dense_bytes", "fit_bytes", "measure_bytes", "ratio", "skipped", "losses")


def learning_rate(iteration: int) -> float:
    """What `aggregate` is told; it falls once."""
    return 0.1 if iteration < 6 else 0.05


def row_of(report: Report) -> dict[str, Any]:
    measures = measured(report.measures)
    payload = None if report.measures is None else report.measures.payload_bytes
    return {**{name: getattr(report, name) for name in FIELDS}, "payload_bytes": payload, "measures": measures}


def advance(aggregator: Aggregator, model: Model, ring: Ring, iteration: int, trace: Trace) -> None:
    given = gradients(model, ring.rank, ring.size, iteration, unused=True, flawed=FLAWED)
    for name, parameter in model.named_parameters():
        parameter.grad = given[name].clone() if name in given else None
    report = aggregator.aggregate(learning_rate(iteration))
    trace.add(flat([parameter.grad for parameter in model.parameters()], model), row_of(report))


def work(ring: Ring, case: Case) -> dict[str, Any]:
    """One worker's part of a case, and of the runs that are resumed."""

    def fresh() -> tuple[Model, Aggregator]:
        model = Model(odd_shapes=True)
        options = {"seed": 5, "nonfinite": "skip", **case.options}
        return model, Aggregator(model, ring, case.make(), **options)

    model, aggregator = fresh()
    trace = Trace(sum(parameter.numel() for parameter in model.parameters()))
    kept, names = {}, set()
    for iteration in range(case.iterations):
        if iteration in case.resume:
            kept[iteration] = aggregator.state_dict(), trace.copy()
            names |= key_names(kept[iteration][0])
        advance(aggregator, model, ring, iteration, trace)
    for start, (state, resumed) in kept.items():
        model, other = fresh()
        other.load_state_dict(state)
        for iteration in range(start, case.iterations):
            advance(other, model, ring, iteration, resumed)
        if resumed.fingerprint != trace.fingerprint or plain(other.window_log) != plain(aggregator.window_log):
            raise AssertionError(f"{case.method}: resumed after {start} iterations, the run isn't the same")
    return {
        **trace.result(),
        "log": digest(repr(plain(aggregator.window_log)).encode()),
        "log_length": len(aggregator.window_log),
        "state": sorted(names),
    }


def joined(results: list[dict[str, Any]], title: str) -> dict[str, Any]:
    """Rank 0's results, and a digest of everybody's reports and logs."""
    for field in ("weights", "means"):
        found = {one[field] for one in results}
        assert len(found) == 1, f"{title}: the ranks differ in {field}"
    states = sorted(set().union(*(one["state"] for one in results)))
    everybody = digest(*(repr((one["reports"], one["log"])).encode() for one in results))
    return {**results[0], "state": states, "all_ranks": everybody}


def lockstep_case(title: str, case: Case) -> dict[str, Any]:
    return joined(lockstep.run(case.size, lambda ring: work(ring, case), timeout_s=60), title)
