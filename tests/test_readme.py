"""What the README shows works as it stands there."""

from __future__ import annotations

import re
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from gradiveq.compressors import COMPRESSORS, Compressor, Draw
from gradiveq.exchange import ErrorFeedback, Part, Worker, exchange_here
from gradiveq.specs import parse

README = (Path(__file__).parent.parent / "README.md").read_text()


@pytest.fixture(scope="module")
def added() -> Compressor:
    """The compressor of "Adding a method"."""
    (listing,) = re.findall(r"```python\n(.*?)```", README.split("### Adding a method")[1].split("\n## ")[0], re.DOTALL)
    module = ModuleType("largest_sign")
    exec(compile(listing, "README.md", "exec"), module.__dict__)
    compressor: Compressor = module.__dict__["LargestSign"]()
    return compressor


@pytest.mark.parametrize("length", [0, 1, 2, 47, 700])
def test_the_added_method(added: Compressor, length: int) -> None:
    values = np.random.default_rng(0).standard_normal(length).astype(np.float32)
    draw = Draw(0, 0, 0, 0)
    payload = added.compress(values, draw)
    assert payload.dtype == np.uint8
    assert len(payload) == added.payload_bytes(length)
    out = np.full(length, np.nan, np.float32)
    added.decompress(payload, out, draw)
    expected = np.sign(values) * (np.abs(values).max() if length else 0)
    np.testing.assert_array_equal(out, expected.astype(np.float32))
    omega = added.constants(length).omega
    assert omega is not None
    assert float(out @ out) <= (1 + omega) * float(values @ values) * (1 + 1e-6)


def test_the_added_method_among_workers(added: Compressor) -> None:
    parts = [Part("a", 0, 10, added), Part("b", 10, 33, added)]
    workers = [Worker(parts, 33, rank=rank, size=2, feedback=ErrorFeedback()) for rank in range(2)]
    gradients = list(np.random.default_rng(1).standard_normal((2, 33)).astype(np.float32))
    mean = np.empty(33, np.float32)
    exchange_here(workers, gradients, mean, 0)
    estimates = [
        np.concatenate([np.sign(part) * np.abs(part).max() for part in (gradient[:10], gradient[10:])])
        for gradient in gradients
    ]
    np.testing.assert_allclose(mean, np.mean(estimates, 0), rtol=1e-6)


def test_the_table_of_methods_has_every_compressor() -> None:
    table = README.split("## Other methods")[1].split("### Adding a method")[0]
    named = set(re.findall(r"(?m)^\| `([\w-]+)`", table))
    assert COMPRESSORS.keys() - {"identity"} <= named
    assert {"powersgd", "accordion"} <= named


@pytest.mark.parametrize("spec", re.search(r"--methods (\S+half)", README)[1].split(","))  # type: ignore[index]
def test_the_specs_of_the_example(spec: str) -> None:
    parse(spec)
