"""What is recorded: methods as short texts or objects, and the options that they run with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from gradiveq import GradiVeQ, Method, Plain, PowerSGD, QSGDRing, parse

#: Of error feedback of the form "update".
MOMENTUM = 0.9
#: Settings of each compressor; the first is combined with more than the others.
COMPRESSORS: dict[str, tuple[str, ...]] = {
    "identity": ("identity",),
    "topk": ("topk:0.1", "topk:count=3", "topk:0.4"),
    "randomk": ("randomk:0.2", "randomk:0.2:unbiased=true", "randomk:count=4"),
    "threshold": ("threshold:0.5", "threshold:0.0"),
    "adaptive": ("adaptive", "adaptive:8.0"),
    "adacomp": ("adacomp:20", "adacomp:500"),
    "qsgd-gather": (
        "qsgd-gather",
        "qsgd-gather:7:norm=max:bucket=64",
        "qsgd-gather:1:bucket=100",
        "qsgd-gather:65536:norm=max",
    ),
    "terngrad": ("terngrad", "terngrad:2.5"),
    "sign": ("sign:scaled", "sign:mean"),
    "natural": ("natural",),
    "integer": (
        "integer",
        "integer:100:bits=16:workers=5",
        "integer:2:bits=8:workers=3",
        "integer:100:bits=16:rounding=stochastic:workers=5",
    ),
    "half": ("half", "half:bfloat16"),
}
VOTE = "sign:vote"
GROUPS = "conv*|fc*"


@dataclass(frozen=True)
class Case:
    """One method and how it runs.

    Attributes:
        method: as `gradiveq.parse` takes it, or the method.
        by_library: a BLAS takes part, whose last bits depend on the processor.
        iterations: how many.
        resume: iterations after which a second run goes on from the first one's state.
        size: number of workers, on the ring.
        options: for the driver.
        over_mpi: run by mpirun as well.
    """

    method: str | Method
    by_library: bool = False
    iterations: int = 8
    resume: tuple[int, ...] = (5,)
    size: int = 3
    options: Mapping[str, Any] = field(default_factory=dict)
    over_mpi: bool = False

    def make(self) -> Method:
        return parse(self.method, momentum=MOMENTUM) if isinstance(self.method, str) else self.method


def _gradiveq(**settings: Any) -> GradiVeQ:
    return GradiVeQ(**{"warmup": 2, "sample": 4, "compress": 3, "holdout_every": 2, **settings})


GRADIVEQ = {
    "gradiveq threshold first": _gradiveq(loss_threshold=0.2),
    "gradiveq threshold all": _gradiveq(loss_threshold=0.2, fit_slices="all"),
    "gradiveq plain samples": _gradiveq(loss_threshold=0.05, sampling=Plain(), holdout_every=1),
    "gradiveq n_components": _gradiveq(n_components=2),
    "gradiveq n_components all": _gradiveq(n_components=3, fit_slices="all", sampling=Plain()),
    "gradiveq ratio": _gradiveq(ratio=8, fit_slices="all", holdout_every=0),
    "gradiveq slice_size": _gradiveq(n_components=3, fit_slices="all", slice_size=40),
    "gradiveq reuse": _gradiveq(n_components=2, reuse=2),
    "gradiveq reuse all": _gradiveq(ratio=16, fit_slices="all", reuse=3),
    "gradiveq sample auto": _gradiveq(loss_threshold=0.1, sample="auto", max_sample=5),
    "gradiveq compress auto": _gradiveq(loss_threshold=0.3, compress="auto", stop_multiple=1.05),
    "gradiveq both auto": _gradiveq(
        loss_threshold=0.1, sample="auto", max_sample=6, compress="auto", stop_multiple=1.01, fit_slices="all"
    ),
    "gradiveq samples of 8 bits": _gradiveq(n_components=2, sampling=QSGDRing(8, 64, "l2", pipelined=False)),
    "gradiveq no warm-up": _gradiveq(loss_threshold=0.2, warmup=0, holdout_every=1),
}
POWERSGD = {
    "powersgd": PowerSGD(2),
    "powersgd without feedback": PowerSGD(2, error_feedback=False),
    "powersgd cold": PowerSGD(2, warm_start=False),
    "powersgd cold without feedback": PowerSGD(1, error_feedback=False, warm_start=False),
    "powersgd everything": PowerSGD(4, min_compression_rate=0.0),
    "powersgd rate 2": PowerSGD(1, min_compression_rate=2.0),
}
OVERRIDES = (
    "topk:0.1/*.bias=identity/conv1.weight=half+ef",
    "qsgd-gather/conv*=topk:0.2@fc*|line*+ef",
    "randomk:0.2/fc*=sign:scaled/bn*=integer",
    "threshold:0.5/conv2.weight=natural+ef-update",
)
MASTERS = (
    "topk:0.1^topk:0.2",
    "topk:0.1+ef^half",
    "sign:mean^sign",
    "half@model^topk:0.1",
    "topk:0.1/*.bias=identity+ef-update^qsgd-gather",
    "randomk:0.2@conv*|fc*+ef-scaled^terngrad",
)
RINGS = {
    "rar": Plain(),
    "qsgd": QSGDRing(),
    "qsgd 8 bits l2": QSGDRing(8, 64, "l2"),
    "qsgd 2 bits whole segments": QSGDRing(2, 32, "max", pipelined=False),
    "qsgd 4 bits l2 whole segments": QSGDRing(4, 512, "l2", pipelined=False),
}


def lockstep() -> dict[str, Case]:
    """On the ring, by `gradiveq.Aggregator`."""
    found: dict[str, Case] = {name: Case(method, over_mpi=name in ("rar", "qsgd")) for name, method in RINGS.items()}
    specs = [VOTE, f"{VOTE}@model", f"{VOTE}@{GROUPS}", *OVERRIDES, *MASTERS]
    for first, *others in COMPRESSORS.values():
        specs += [first + how for how in ("", "+ef", "+ef-scaled", "+ef-update")]
        specs += [f"{first}@model", f"{first}@model+ef", f"{first}@{GROUPS}+ef"]
        specs += [one + how for one in others for how in ("", "+ef")]
        specs.append(f"identity^{first}")
    over_mpi = ("topk:0.1+ef", "half", "qsgd-gather", "sign:vote", "topk:0.1+ef^half", "integer+ef-update")
    found |= {spec: Case(spec, over_mpi=spec in over_mpi) for spec in specs}
    found |= {name: Case(method, by_library=True, over_mpi=name == "powersgd") for name, method in POWERSGD.items()}
    for name, method in GRADIVEQ.items():
        resume = (4, 9, 13)  # while sampling and compressing
        over_mpi_too = name in ("gradiveq threshold first", "gradiveq ratio")
        found[name] = Case(method, by_library=True, iterations=18, resume=resume, over_mpi=over_mpi_too)
    switching = {
        "accordion:interval=3:window=1:topk:0.3|topk:0.05+ef": False,
        "accordion:interval=2:window=2:eta=0.2:qsgd-gather|qsgd-gather:3@model": False,
        "accordion:interval=2:eta=0.3:randomk:0.3|topk:0.1@conv*|fc*+ef-scaled^half": False,
        "accordion:interval=3:window=2:eta=0.4:powersgd:4|powersgd:1": True,
        "accordion:interval=2:eta=0.4:powersgd:3:error_feedback=false|powersgd:1:error_feedback=false": True,
    }
    found |= {
        spec: Case(spec, by_library, iterations=12, resume=(5, 9), over_mpi="topk:0.3|" in spec)
        for spec, by_library in switching.items()
    }
    found |= {
        "threshold:auto:0.05:warmup=20+ef": Case(
            "threshold:auto:0.05:warmup=20+ef", True, iterations=25, resume=(10, 23), over_mpi=True
        ),
        "threshold:auto:count=100:warmup=30@model": Case(
            "threshold:auto:count=100:warmup=30@model", True, iterations=34, resume=(17,)
        ),
        "threshold:simple:0.05+ef": Case("threshold:simple:0.05+ef"),
        "threshold:simple:count=100@model^half": Case("threshold:simple:count=100@model^half"),
    }
    small = {"chunk_bytes": 1024}
    for name in ("rar", "qsgd", "topk:0.1+ef", "half", "integer", "powersgd", "gradiveq threshold first"):
        one = found[name]
        found[f"{name}, chunks of 1 KiB"] = Case(one.method, one.by_library, one.iterations, one.resume, 3, small)
    for name in ("qsgd", "topk:0.1+ef", "randomk:0.2", "powersgd", "gradiveq threshold all"):
        one = found[name]
        found[f"{name}, 5 workers"] = Case(one.method, one.by_library, one.iterations, one.resume, 5)
    for name in ("qsgd", "topk:0.1+ef", "gradiveq threshold first"):
        one = found[name]
        found[f"{name}, alone"] = Case(one.method, one.by_library, one.iterations, one.resume, 1)
    return found


def hook() -> dict[str, Case]:
    """In DistributedDataParallel; options are `bucket_cap_mb`, `dtype`, `channels_last`, `unused`, `wrapper` and those
    of `gradiveq.ddp.State`."""
    found: dict[str, Case] = {"rar": Case(Plain())}
    specs = [VOTE, f"{VOTE}@model", *(one for one in OVERRIDES if "update" not in one and "@" not in one), *MASTERS[:4]]
    for first, *others in COMPRESSORS.values():
        specs += [first, f"{first}+ef", f"{first}@model+ef", *(f"{one}+ef" for one in others)]
    found |= {spec: Case(spec) for spec in specs}
    found |= {name: Case(method, by_library=True) for name, method in POWERSGD.items()}
    found = {name: replace(case, iterations=7) for name, case in found.items()}
    for name, method in GRADIVEQ.items():
        if "8 bits" not in name:
            found[name] = Case(method, by_library=True, iterations=18, resume=(4, 12))

    def more(title: str, names: tuple[str, ...], **options: Any) -> None:
        for name in names:
            one = found[name]
            found[f"{name}, {title}"] = Case(one.method, one.by_library, one.iterations, one.resume[:1], 3, options)

    families = ("rar", "topk:0.1+ef", "half", "powersgd", "gradiveq threshold all")
    more("one bucket", (*families, "qsgd-gather@model+ef", "threshold:0.5"), bucket_cap_mb=25)
    more("bfloat16", (*families, "sign:scaled+ef", "randomk:0.2+ef", "integer"), dtype="bfloat16")
    more("float16", (*families, "qsgd-gather", "threshold:0.5+ef"), dtype="float16")
    more("channels last", (*families, "randomk:0.2+ef", "topk:0.1@model+ef"), channels_last=True)
    more("unused", families, unused=True)
    more("loss scale", ("topk:0.1+ef", "threshold:0.5", "powersgd", "gradiveq ratio"), loss_scale=True)
    more("min_ratio 3", ("topk:0.1+ef", "half", "gradiveq threshold first"), min_ratio=3.0)
    more("min_ratio 9", ("topk:0.1+ef", "gradiveq threshold first", "gradiveq ratio"), min_ratio=9.0)
    more("also", ("gradiveq threshold all", "gradiveq n_components"), also=["fc.weight", "grouped.*"])
    more("fp16 wrapper", ("rar", "topk:0.1+ef", "powersgd", "gradiveq ratio"), wrapper="fp16")
    return found


#: Cases of the hook that run on 3 ranks as well as on 2.
ON_THREE_RANKS = (
    *(
        "rar",
        "topk:0.1+ef",
        "half+ef",
        "qsgd-gather",
        "qsgd-gather@model+ef",
        VOTE,
        "threshold:0.5+ef",
        "adacomp:20+ef",
    ),
    *("integer", "randomk:0.2+ef", OVERRIDES[0], *MASTERS[:2], "powersgd", "powersgd cold"),
    *("gradiveq threshold first", "gradiveq ratio", "gradiveq both auto", "topk:0.1+ef, bfloat16", "half, float16"),
    *("powersgd, one bucket", "gradiveq threshold all, channels last", "topk:0.1+ef, unused", "powersgd, loss scale"),
)


def here() -> dict[str, Case]:
    """All workers in one process, without a ring."""
    specs = [VOTE, *OVERRIDES, *MASTERS]
    for first, *others in COMPRESSORS.values():
        specs += [first, f"{first}+ef", f"{first}+ef-scaled", f"{first}+ef-update", f"{first}@model+ef", *others]
    found = {spec: Case(spec) for spec in specs}
    found |= {name: Case(method, by_library=True) for name, method in POWERSGD.items()}
    found |= {f"{name}, 5 workers": Case(found[name].method, size=5) for name in ("half", "topk:0.1+ef")}
    found["powersgd, 5 workers"] = Case(POWERSGD["powersgd"], True, size=5)
    return found


PROBED: dict[str, Any] = {
    "topk": "topk:0.1",
    "half": "half",
    "sign": VOTE,
    "threshold": "threshold:0.5",
    "random": "randomk:0.2",
    "some": "topk:0.1/*.bias=identity",
    "powersgd": PowerSGD(2),
    "gradiveq": GradiVeQ(n_components=2),
    "gradiveq all": GradiVeQ(loss_threshold=0.2, fit_slices="all"),
}


def payloads() -> dict[str, str]:
    """Compressors by the name of the case."""
    return {one: one for settings in (*COMPRESSORS.values(), (VOTE,)) for one in settings} | {
        "threshold:1e-3": "threshold:1e-3",
        "topk:0.01": "topk:0.01",
    }
