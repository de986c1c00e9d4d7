"""The algorithm over MPI: the same bits as lockstep, and an end to every failure."""

from __future__ import annotations

import json
import re
import sys
import time

import pytest

from tests.support.processes import Launch

COMPARE = """
    import hashlib
    import sys
    import time
    import ml_dtypes
    import numpy as np
    from mpi4py import MPI
    from ring import Composite, IdentityCodec
    from ring.lockstep import run
    from ring.abort import end_together
    from ring.mpi import MPIRing
    from gradiveq.over_ring.qsgd import QSGD
    from tests.support.bases import fitted
    from gradiveq.over_ring.pca_codec import PCACodec
    from tests.support.toy_codecs import HalfPerHop, PairSums

    end_together()
    dtypes = (np.float16, np.float32, np.float64, ml_dtypes.bfloat16)
    cases = [
        (length, dtype, codec, chunk_bytes, op)
        for length in (0, 1, 5, 6, 1001, 40_000, 300_000)
        for dtype in dtypes
        for codec in (
            IdentityCodec(), PairSums(), HalfPerHop(), QSGD(seed=3), Composite([(length, QSGD())]),
            *([PCACodec(fitted(length, "first"))] if length in (1001, 40_000) and dtype == np.float32 else []),
        )
        for chunk_bytes in ((16, 1 << 18) if length < 200 else (1 << 14, sys.maxsize))
        for op in ("sum", "mean")
        if (dtype == np.float32 or isinstance(codec, IdentityCodec)) and (op == "sum" or length in (5, 40_000, 300_000))
    ]

    def contribution(rank, length, dtype):
        return np.random.default_rng([rank, length]).standard_normal(length).astype(dtype)

    def digest(vector):
        return hashlib.sha256(vector.tobytes()).digest()

    def in_lockstep(size, length, dtype, codec, chunk_bytes, op):
        def work(worker):
            vector = contribution(worker.rank, length, dtype)
            return worker.all_reduce(vector, codec, chunk_bytes=chunk_bytes, op=op), digest(vector)
        return run(size, work)

    def compare(comm):
        ring = MPIRing(comm, timeout_s=30)
        shared = {dtype: ring.empty(300_000, dtype) for dtype in dtypes}
        # Each rank finds what is expected of its share of the cases, as there may be several cores.
        found = [in_lockstep(ring.size, *case) for case in cases[ring.rank :: ring.size]]
        shares = comm.allgather(found)
        for number, (length, dtype, codec, chunk_bytes, op) in enumerate(cases):
            own = contribution(ring.rank, length, dtype)
            vectors = [own.copy(), shared[dtype][:length]]
            vectors[1][:] = own
            stats = [ring.all_reduce(vector, codec, chunk_bytes=chunk_bytes, op=op) for vector in vectors]
            their_stats, bits = shares[number % ring.size][number // ring.size][ring.rank]
            case = (ring.size, length, dtype.__name__, codec.describe(np.dtype(dtype)), chunk_bytes, op)
            assert digest(vectors[0]) == digest(vectors[1]) == bits, case
            if ring.size != 2:  # between two ranks a small vector is one message
                assert stats[0] == stats[1] == their_stats, case
            assert stats[0].bytes_sent == their_stats.bytes_sent or length % 2, case
        bounds = [40_000 * segment // ring.size for segment in range(ring.size + 1)]
        for vector in (np.zeros(40_000, np.float32), shared[np.float32][:40_000]):
            vector[:] = ring.rank + np.arange(40_000)
            ring.reduce_scatter(vector, bounds=bounds)
            mine = slice(*bounds[(ring.rank + 1) % ring.size:][:2])
            finished = vector[mine].copy()
            vector[:] = 0
            vector[mine] = finished
            ring.all_gather(vector, bounds=bounds)
            assert (vector == ring.size * np.arange(40_000) + sum(range(ring.size))).all()
        ring.barrier()
        if ring.rank == 0:
            print("compared", len(cases), "on", ring.size, flush=True)

    world = MPI.COMM_WORLD
    for sizes in ((6,), (5, 1), (4, 2), (3,)):  # that many ranks at a time are a ring
        group = [number for number, size in enumerate(sizes) for _ in range(size)][world.rank :][:1]
        comm = world.Split(*group or [MPI.UNDEFINED])
        if comm != MPI.COMM_NULL:
            compare(comm)
        all_done = world.Ibarrier()
        while not all_done.Test():  # and leave the cores to the others
            time.sleep(0.005)
"""


def test_bitwise_what_lockstep_gives(mpirun: Launch) -> None:
    """On rings of 1 to 6 ranks, in one launch."""
    done = mpirun(6, COMPARE, timeout_s=240)
    assert done.returncode == 0, done.stdout + done.stderr
    compared = [line.split() for line in done.stdout.splitlines()]
    assert sorted(words[3] for words in compared) == list("123456"), done.stdout
    assert {(words[0], int(words[1]) > 150) for words in compared} == {("compared", True)}, done.stdout
    assert done.stderr == ""


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_integers_and_bytes(mpirun: Launch, ranks: int) -> None:
    """Sums of whole numbers, and bytes of odd and of no length, in messages of any size."""
    done = mpirun(
        ranks,
        """
        import sys
        import numpy as np
        from ring.abort import end_together
        from ring.algorithm import owned_segment
        from ring.mpi import MPIRing
        end_together()
        ring = MPIRing(timeout_s=20)
        for dtype in (np.int8, np.int16, np.int32):
            for length in (0, 1, 7, 70_001, 300_001):
                for chunk_bytes in (1 << 12, sys.maxsize):
                    vectors = [(np.arange(length) * 7 + 3 * rank) % 31 for rank in range(ring.size)]
                    vector = vectors[ring.rank].astype(dtype)
                    ring.all_reduce(vector, chunk_bytes=chunk_bytes)
                    assert (vector == sum(vectors)).all(), (dtype, length)
        for lengths in ((0, 0, 0), (1, 0, 3), (0, 70_001, 5), (65_536, 131_073, 300_001)):
            lengths = lengths[: ring.size]
            bounds = np.cumsum([0, *(lengths[segment - 1] for segment in range(ring.size))]).tolist()
            said = [np.random.default_rng(rank).integers(0, 256, n, np.uint8) for rank, n in enumerate(lengths)]
            vector = np.zeros(sum(lengths), np.uint8)
            own = owned_segment(ring.rank, ring.size)
            vector[bounds[own]:bounds[own + 1]] = said[ring.rank]
            sent = ring.all_gather(vector, bounds=bounds).bytes_sent
            assert (vector == np.concatenate([said[segment - 1] for segment in range(ring.size)])).all(), lengths
            assert sent == sum(lengths) - lengths[(ring.rank + 1) % ring.size], (sent, lengths)
        """,
    )
    assert done.returncode == 0, done.stderr


def test_bytes_do_not_depend_on_who_came_late(mpirun: Launch) -> None:
    done = mpirun(
        3,
        """
        import time, numpy as np
        from ring import Timeline
        from ring.abort import end_together
        from ring.mpi import MPIRing
        end_together()
        ring = MPIRing(timeout_s=30)
        vectors = [np.ones(100_000, np.float32), ring.empty(100_000)]
        vectors[1][:] = 1
        for late in range(3):
            for vector in vectors:
                if ring.rank == late:
                    time.sleep(0.1)
                timeline = Timeline()
                stats = ring.all_reduce(vector, op="mean", timeline=timeline)
                assert stats.bytes_sent <= 4 * 4 / 3 * 100_000 + 8, stats
                assert (vector == 1).all()
                waited = timeline.totals().get("wait", 0.0)
                assert waited > 0.05 or ring.rank == late, (waited, late)
        """,
    )
    assert done.returncode == 0, done.stderr


#: What rank 1 calls while all others add up five numbers, and how that is said.
DISAGREEMENTS = {
    "ring.all_reduce(np.zeros(6, np.float32))": "6 float32, chunks",
    "ring.all_reduce(np.zeros(5, np.float64))": "5 float64, chunks",
    "ring.all_reduce(np.zeros(5, np.float32), HalfPerHop())": "as half per hop",
    "ring.all_reduce(np.zeros(5, np.float32), chunk_bytes=8)": "chunks of 8 bytes",
    "(ring.barrier(), ring.all_reduce(np.zeros(5, np.float32)))": "1 float32, chunks",
    "ring.all_reduce(np.zeros(50_000, np.float32))": "50000 float32, chunks",
}


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_that_disagree_are_told_who_said_what(mpirun: Launch, ranks: int) -> None:
    """In one launch, with a new ring after each disagreement; nobody catches the last one, which ends the job."""
    start = time.monotonic()
    calls = list(DISAGREEMENTS)
    done = mpirun(
        ranks,
        f"""
        import numpy as np
        from mpi4py import MPI
        from ring import RingMismatch
        from ring.abort import end_together
        from ring.mpi import MPIRing
        from tests.support.toy_codecs import HalfPerHop
        end_together()
        for call in {calls!r}:
            ring = MPIRing(timeout_s=20)
            try:
                if ring.rank == 1:
                    eval(call)
                else:
                    ring.all_reduce(np.zeros(5, np.float32))
            except RingMismatch as error:
                if call == {calls[-1]!r}:
                    raise
                said = f"rank {{ring.rank}}: RingMismatch: {{error}}"
            else:
                raise AssertionError(call)
            everybody = MPI.COMM_WORLD.gather(said)
            if ring.rank == 0:
                print("\\t".join(everybody), flush=True)
        """,
    )
    assert done.returncode != 0
    assert time.monotonic() - start < 15
    assert "Traceback" not in done.stderr
    last = [line for line in done.stderr.splitlines() if "RingMismatch" in line]
    told = [*(line.split("\t") for line in done.stdout.splitlines()), last]
    for lines, said in zip(told, DISAGREEMENTS.values(), strict=True):
        assert {line.partition(": RingMismatch: ")[0] for line in lines} == {f"rank {rank}" for rank in range(ranks)}
        for line in lines:
            assert "rank 1 calls" in line
            assert said in line
            assert "5 float32, chunks" in line


def test_a_rank_that_hangs_is_named_by_all_others(mpirun: Launch) -> None:
    start = time.monotonic()
    done = mpirun(
        4,
        """
        import time, numpy as np
        from ring.abort import end_together
        from ring.mpi import MPIRing
        end_together()
        ring = MPIRing(timeout_s=1.5)
        vector = np.zeros(100_000, np.float32)
        ring.all_reduce(vector)
        if ring.rank == 2:
            time.sleep(60)
        ring.all_reduce(vector)
        """,
    )
    assert done.returncode != 0
    assert time.monotonic() - start < 15
    for rank in (0, 1, 3):
        line = next(line for line in done.stderr.splitlines() if line.startswith(f"rank {rank}: RingTimeout"))
        assert re.search(r"for rank \d|send to rank \d", line)
        assert re.search(r"in step \d \(segment \d\) of all_reduce, collective number 2", line)
        assert "gave up after 1.5 s" in line
    assert "rank 3 waited for rank 2" in done.stderr


def test_an_exception_on_one_rank_ends_all(mpirun: Launch) -> None:
    start = time.monotonic()
    done = mpirun(
        3,
        """
        import numpy as np
        from ring.abort import end_together
        from ring.mpi import MPIRing
        end_together()
        ring = MPIRing(timeout_s=50)
        if ring.rank == 1:
            raise LookupError("only here")
        ring.all_reduce(np.zeros(5))
        """,
    )
    assert done.returncode != 0
    assert "LookupError: only here" in done.stderr
    assert time.monotonic() - start < 15


@pytest.mark.parametrize("ranks", [2, 3])
def test_chunks_without_bytes_and_what_comes_after(mpirun: Launch, ranks: int) -> None:
    """Nothing of a payload of no bytes is left in the link; and both ranks have the same bits of a NaN."""
    done = mpirun(
        ranks,
        """
        import numpy as np
        from ring import Region
        from ring.abort import end_together
        from ring.mpi import MPIRing
        from tests.support.toy_codecs import PairSums

        class Nothing(PairSums):
            def regions(self, length, dtype):
                return [Region(length, 1, 0)]
            def encode(self, *args): pass
            def reduce(self, *args): pass
            def decode(self, *args): pass

        end_together()
        ring = MPIRing(timeout_s=20)
        for _ in range(3):
            assert ring.all_reduce(np.zeros(100), Nothing()).bytes_sent == 0
            vector = np.full(5, ring.rank + 1.0)
            ring.all_reduce(vector)
            assert (vector == sum(range(ring.size + 1))).all(), vector
        nan = np.array([np.nan if ring.rank else -np.nan], np.float32)
        ring.all_reduce(nan)
        bits = ring.comm.allgather(nan.tobytes())
        assert len(set(bits)) == 1, bits
        """,
    )
    assert done.returncode == 0, done.stderr


def test_a_ring_that_failed_stays_failed(mpirun: Launch) -> None:
    done = mpirun(
        2,
        """
        import numpy as np
        from ring import RingMismatch
        from ring.mpi import MPIRing
        ring = MPIRing(timeout_s=20)
        for length in (5 + ring.rank, 7, 7):
            try:
                ring.all_reduce(np.zeros(length))
            except RingMismatch as error:
                assert "calls all_reduce" in str(error), error
            else:
                raise AssertionError("a broken ring was used")
        """,
    )
    assert done.returncode == 0, done.stderr


def test_invalid_arguments_on_all_ranks_are_plain_errors(mpirun: Launch) -> None:
    done = mpirun(
        2,
        """
        import numpy as np
        from ring.mpi import MPIRing
        for make, name in ((lambda: MPIRing(timeout_s=0), "timeout_s"),
                           (lambda: MPIRing(timeout_s=float("nan")), "timeout_s"),
                           (lambda: MPIRing().all_reduce(np.zeros(3, int)), "vector")):
            try:
                make()
            except (ValueError, TypeError) as error:
                assert name in str(error), error
            else:
                raise AssertionError(name)
        """,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("variable", ["OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS"])
def test_a_foreign_mpirun_is_recognised(mpirun: Launch, variable: str) -> None:
    """Another MPI's launcher starts processes that each see a world of one, and says how many in the environment."""
    program = f"""
        import os
        from ring.abort import end_together
        from ring.mpi import MPIRing
        for name in ("PMI_SIZE", "MPI_LOCALNRANKS"):
            os.environ.pop(name, None)  # those of the launcher that there really is
        os.environ["{variable}"] = "6"
        end_together()
        MPIRing()
        """
    done = mpirun(1, program)
    assert done.returncode != 0
    assert "RingError" in done.stderr
    assert f"started 6 processes ({variable}=6)" in done.stderr
    assert "belongs to another MPI" in done.stderr


def test_bench_writes_rows_with_right_sums(mpirun: Launch, tmp_path) -> None:
    arguments = ["--min-bytes", "1K", "--max-bytes", "256K", "--factor", "16", "--repeats", "3", "--seconds", "0.001"]
    done = mpirun(3, ["-m", "ring.bench", *arguments, "--json", "rows.json"])
    assert done.returncode == 0, done.stderr
    recorded = json.loads((tmp_path / "rows.json").read_text())
    assert recorded["environment"]["ranks"] == 3
    rows = recorded["rows"]
    assert [(row["implementation"], row["size_bytes"]) for row in rows] == [
        (name, size) for size in (1024, 16384, 262144) for name in ("ring", "MPI_Allreduce", "limit")
    ]
    for row in rows:
        assert row["wrong"] == (None if row["implementation"] == "limit" else 0)
        assert row["algbw_gb_per_s"] == pytest.approx(row["size_bytes"] / row["time_s"] / 1e9)
        assert row["busbw_gb_per_s"] == pytest.approx(row["algbw_gb_per_s"] * 4 / 3)
    assert [word for word in ("size", "count", "time", "algbw", "busbw", "wrong") if word not in done.stdout] == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--factor", "1"], "--factor must be at least 2"),
        (["--min-bytes", "x"], "a size is a positive number"),
        (["--json", "nowhere/rows.json"], "no folder nowhere"),
    ],
)
def test_bench_refuses_bad_options(mpirun: Launch, arguments: list[str], message: str) -> None:
    done = mpirun(2, ["-m", "ring.bench", *arguments])
    assert done.returncode != 0
    assert done.stderr.count(message) == 1


def test_ring_does_not_start_mpi_or_torch() -> None:
    import subprocess

    code = "import ring, ring.lockstep, sys; sys.exit(bool({'mpi4py', 'mpi4py.MPI', 'torch'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], timeout=30).returncode == 0
