"""Recorded results of the exchange layer: every method on every driver, to the last bit.

    python -m tests.golden.record                    runs everything and writes `golden.json`
    python -m tests.golden.record --compare          runs everything, prints what differs from it, and exits with 1
    ... --driver hook --only 'topk.*ef'              a part of it

Gradients come from a counter-based generator and from no network, so that they are the same on every processor.
`test_golden.py` and `test_golden_hook.py` compare every third case of the long drivers, `make golden` all.
"""
