"""What `bench.hard_threshold` runs, at its small size and at the paper's: problems, benchmarks, and the grid of runs.

The paper's hyper-parameters are those of Tables 2 to 6 of Sahu et al. 2021. A *spec* is one run, in JSON's types.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

Part = Literal["logistic", "networks"]
Spec = dict[str, Any]

#: f(x_T) - f* <= ε, from which λ follows: d·γ²·λ² = ε (C.3).
COARSE_PRECISION, FINE_PRECISION = 1.25e-4, 5e-12
#: The paper's λ = 4.2 on gisette is this ε: 5,000·(1.186e-3·4.2)².
GISETTE_PRECISION = 0.124
WORKERS = 8
MOMENTUM = 0.9


@dataclass(frozen=True)
class LogisticBenchmark:
    """A data set of the logistic regression and what the paper runs on it.

    Attributes:
        name: also the `--data` kind; "generated" needs none.
        figures: the paper's figures of EF-SGD with so many workers.
        count: k of top-k.
        precision: ε of λ.
        start: s, where the runs begin.
        gdstar: (workers, k, epochs) of each comparison by EF-GDstar.
        gdstar_seeds: seeds of the runs of EF-GDstar; nothing but the rows' division among the workers depends on it.
    """

    name: str
    count: int
    precision: float
    start: float
    workers: int = 20
    epochs: int = 10
    gdstar: tuple[tuple[int, int, int], ...] = ()
    gdstar_seeds: int = 2


#: Fig. 7, 8 and 9.
MADELON = LogisticBenchmark("madelon", 1, COARSE_PRECISION, 1e-4, gdstar=((20, 1, 70_000), (100, 5, 70_000)))
#: Fig. 1 and 4: k = 0.17 % of "6,000 parameters" is 10 of gisette's 5,000 (6,000 is its number of rows).
GISETTE = LogisticBenchmark("gisette", 10, GISETTE_PRECISION, 5e-3)


@dataclass(frozen=True)
class Benchmark:
    """One line of Table 2, with its hyper-parameters.

    Attributes:
        kind: what is trained, also the `--data` kind: "images", "text", "ratings".
        network: which of that kind.
        batch_size: examples of each of the 8 workers.
        lr, lr_start, warmup_epochs: the rate rises linearly from lr_start to lr.
        milestones: epochs at which it is divided by 10.
        ratios, thresholds: of top-k and of hard-threshold, in pairs that send about as much.
        introspected: which pair Fig. 3, 5 and 6 show.
        metric: a column of the evaluations; `higher` is better.
        no_feedback: k and λ of Fig. 12, without error feedback.
        update: k of Fig. 13, gradient against update compression.
        accordion: (network, k_max, k_min) of Tables 1 and 7.
        options: the options of the network or the data at this size.
    """

    kind: Literal["images", "text", "ratings"]
    network: str
    batch_size: int
    epochs: float
    optimiser: Literal["nesterov", "sgd", "adam"]
    lr: float
    lr_start: float
    warmup_epochs: float
    milestones: tuple[float, ...]
    weight_decay: float
    ratios: tuple[float, ...]
    thresholds: tuple[float, ...]
    introspected: int
    metric: str
    higher: bool
    no_feedback: tuple[float, float] | None = None
    update: float | None = None
    accordion: tuple[tuple[str, float, float], ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)


#: Tables 2 to 5. The printed global batch size "220" of NCF is 2^20, as in the repository that Table 5 names.
RESNET18 = Benchmark(
    "images",
    "resnet18",
    256,
    300,
    "nesterov",
    1.6,
    0.1,
    5,
    (150, 250),
    1e-4,
    (3e-4, 6e-4, 1.2e-3, 3e-3, 7.5e-3),
    (1.2e-2, 7.2e-3, 5e-3, 3e-3, 1.8e-3),
    1,
    "accuracy",
    True,
    no_feedback=(5e-2, 1e-4),
    update=6e-4,
    accordion=(("resnet18", 1e-2, 1e-3), ("googlenet", 1e-2, 1e-3), ("senet18", 1e-2, 1e-3)),
)
LSTM = Benchmark(
    "text",
    "lstm",
    128,
    90,
    "sgd",
    20.0,
    1.25,
    5,
    (60, 80),
    0.0,
    (2.5e-4, 5e-4, 1e-3, 2e-3),
    (4.5e-3, 2.75e-3, 1.6e-3, 1.12e-3),
    1,
    "perplexity",
    False,
)
NCF = Benchmark(
    "ratings",
    "ncf",
    2**20 // WORKERS,
    30,
    "adam",
    4.5e-3,
    4.5e-3,
    0,
    (),
    0.0,
    (7.7e-2, 9.5e-2, 1.13e-1, 1.37e-1),
    (2e-6, 1.3e-6, 1e-6, 4e-7),
    0,
    "hit_rate",
    True,
)
#: ACCORDION's k_max on CIFAR-100 (Table 6); all else is as on CIFAR-10.
CIFAR100_MOST = 2e-2

#: What stands in for them. λ were tuned once, to send about what top-k sends; the density is measured in every run.
SMALL_IMAGES = Benchmark(
    "images",
    "alexnet",
    16,
    4,
    "nesterov",
    0.2,
    0.05,
    1,
    (2, 3.2),
    1e-4,
    (1e-3, 1e-2),
    (0.12, 0.04),
    1,
    "accuracy",
    True,
    no_feedback=(5e-2, 1e-2),
    update=1e-2,
    accordion=(("alexnet", 1e-2, 1e-3),),
    options={"width": 0.25},
)
SMALL_TEXT = Benchmark(
    "text",
    "lstm",
    4,
    1.6,
    "sgd",
    5.0,
    0.5,
    0.1,
    (0.96, 1.28),
    0.0,
    (1e-3, 1e-2),
    (0.03, 0.008),
    0,
    "perplexity",
    False,
    options={"units": 64, "num_layers": 1, "dropout": 0.2, "max_vocabulary": 2000, "length": 20},
)
SMALL_RATINGS = Benchmark(
    "ratings",
    "ncf",
    256,
    5,
    "adam",
    4.5e-3,
    4.5e-3,
    0,
    (),
    0.0,
    (3.5e-2, 1.3e-1, 2.2e-1),
    (1e-3, 1e-4, 1e-5),
    1,
    "hit_rate",
    True,
    options={"factors": 8, "layers": (32, 32, 16, 8)},
)


@dataclass(frozen=True)
class HardThresholdSize:
    """All that is run.

    Attributes:
        problems: problems of the logistic regression; those without data are left out, madelon is then "generated".
        benchmarks: networks.
        seeds, accordion_seeds: runs of each setting; ACCORDION's tables have more in the paper.
        evaluations: evaluations of a network's run.
    """

    problems: tuple[LogisticBenchmark, ...]
    benchmarks: tuple[Benchmark, ...]
    seeds: int
    accordion_seeds: int
    evaluations: int


SMALL = HardThresholdSize((GISETTE, MADELON), (SMALL_IMAGES, SMALL_TEXT, SMALL_RATINGS), 3, 3, 6)
PAPER = HardThresholdSize((GISETTE, MADELON), (RESNET18, LSTM, NCF), 3, 6, 100)


class Given(NamedTuple):
    """Data that the user has: where, and what they are, so that no run is resumed on others."""

    path: str
    digest: str | None


# --- unlike the paper ------------------------------------------------------------------------------------------------

_OF_LOGISTIC = (
    "All runs begin at x* + s·(1, …, 1) with the s of the authors' code; the paper doesn't say where.",
    "Gradients, the point and the optimum are float64, what is compressed is float32.",
)
_OF_GISETTE = (
    'gisette: k = 0.17 % of "6,000 parameters" is taken as 10 of its 5,000 (6,000 are its rows), and λ = 4.2 as the '
    f"precision {GISETTE_PRECISION:g} that it stands for."
)
_OF_NETWORKS = (
    "The 8 workers are in one process: batch norm normalises by each worker's own batch, its running statistics are "
    "the mean over the workers.",
    "With update compression (Algorithm 3) momentum is the workers', and the weight decay, which doesn't pass through "
    "it, is 1/(1 - momentum) times as large, so that weights decay as with gradient compression.",
    "ACCORDION detects 30 times in a run, on the gradients' sum over a tenth of the time since, as 10 epochs of 300 "
    "and their last one are; with other epochs than the paper's that is another number of iterations.",
)
_OF_RATINGS = (
    'ratings: the global batch that is printed as "220" is taken as 2^20.',
    "ratings: a global batch is drawn from all examples and divided among the workers, so that their expected "
    "gradients are the same. In the authors' code each worker keeps to a stretch of the list, which has liked items "
    "first: of 8 workers the first sees nothing but liked ones, the second three of five, the other six none.",
)


def differences(size: HardThresholdSize, given: Mapping[str, Given], parts: Sequence[Part]) -> list[str]:
    """How a run differs from the paper's experiments; a sentence each."""
    lines: list[str] = []
    if "logistic" in parts:
        if "madelon" not in given:
            lines.append("madelon: points by its generator, not its own.")
        if "gisette" in given:
            lines.append(_OF_GISETTE)
        lines += _OF_LOGISTIC
    if "networks" in parts:
        papers = {benchmark.kind: benchmark for benchmark in PAPER.benchmarks}
        for benchmark in size.benchmarks:
            unlike = _unlike(benchmark, papers[benchmark.kind])
            lines += [f"{benchmark.kind}: {unlike}."] if unlike else []
        if any(benchmark.kind == "ratings" for benchmark in size.benchmarks):
            lines += _OF_RATINGS
        lines += _OF_NETWORKS
    return lines


def _unlike(benchmark: Benchmark, paper: Benchmark) -> str:
    """Which hyper-parameters are others."""
    found = []
    if (benchmark.network, benchmark.options) != (paper.network, paper.options):
        options = ", ".join(f"{key} {_text(value)}" for key, value in benchmark.options.items())
        found.append(f"{benchmark.network}{f' ({options})' if options else ''} instead of {paper.network}")
    words = {
        "epochs": "epochs",
        "batch_size": "examples a worker",
        "lr": "the learning rate",
        "warmup_epochs": "epochs of warm-up",
        "milestones": "learning rate divided after epochs",
        "ratios": "k/d",
        "thresholds": "λ",
    }
    for name, what in words.items():
        ours, theirs = getattr(benchmark, name), getattr(paper, name)
        if ours != theirs:
            found.append(f"{what} {_text(ours)} instead of {_text(theirs)}")
    networks = [network for network, _, _ in benchmark.accordion]
    if networks != [network for network, _, _ in paper.accordion]:
        found.append(f"ACCORDION on {', '.join(networks) or 'nothing'} only")
    return "; ".join(found)


def _text(value: Any) -> str:
    if isinstance(value, tuple | list):
        return ", ".join(_text(one) for one in value) or "none"
    return f"{value:,}" if isinstance(value, int) else f"{value:g}"


# --- specs -----------------------------------------------------------------------------------------------------------


def specs(size: HardThresholdSize, data: Mapping[str, Given], parts: Sequence[Part], device: str) -> dict[str, Spec]:
    """All runs by name.

    Args:
        data: the data that were given, by kind.
    """
    found: dict[str, Spec] = {}
    if "logistic" in parts:
        for problem in size.problems:
            if problem.name == "madelon" or problem.name in data:
                found |= {_logistic_name(spec): spec for spec in _logistic(problem, data.get(problem.name), size.seeds)}
    if "networks" in parts:
        for benchmark in size.benchmarks:
            for spec in _networks(benchmark, size, data.get(benchmark.kind), device):
                found[_network_name(spec)] = spec
    return found


def _logistic(problem: LogisticBenchmark, given: Given | None, seeds: int) -> Iterator[Spec]:
    base: Spec = {
        "part": "logistic",
        "problem": problem.name if given else "generated",
        **_data(given),
        "start": problem.start,
    }
    for seed in range(seeds):
        sgd = base | {"algorithm": "ef-sgd", "workers": problem.workers, "epochs": problem.epochs, "seed": seed}
        yield sgd | {"compressor": "identity", "fields": {}}
        yield sgd | {"compressor": "topk", "fields": {"count": problem.count}}
        yield sgd | {"compressor": "threshold", "fields": {"precision": problem.precision}}
    for workers, count, epochs in problem.gdstar:
        # Gradient descent is the same however the rows are shared out.
        for seed in range(min(seeds, problem.gdstar_seeds)):
            star = base | {"algorithm": "ef-gdstar", "workers": workers, "epochs": epochs, "seed": seed}
            if seed == 0:
                yield star | {"compressor": "identity", "fields": {}}
            yield star | {"compressor": "topk", "fields": {"count": count}}
            yield star | {"compressor": "threshold", "fields": {"precision": FINE_PRECISION}}


def _networks(benchmark: Benchmark, size: HardThresholdSize, given: Given | None, device: str) -> Iterator[Spec]:
    base: Spec = {
        "part": "networks",
        "kind": benchmark.kind,
        "network": benchmark.network,
        **_data(given),
        "device": device,
        "workers": WORKERS,
        "batch_size": benchmark.batch_size,
        "epochs": benchmark.epochs,
        "optimiser": benchmark.optimiser,
        "momentum": MOMENTUM,
        "lr": benchmark.lr,
        "lr_start": benchmark.lr_start,
        "warmup_epochs": benchmark.warmup_epochs,
        "milestones": list(benchmark.milestones),
        "weight_decay": benchmark.weight_decay,
        "options": _plain(benchmark.options),
        "evaluations": size.evaluations,
        "granularity": "layer",
        "feedback": "gradient",
    }
    for seed in range(size.seeds):
        here = base | {"seed": seed}
        yield here | {"compressor": "identity", "fields": {}}
        for ratio, threshold in zip(benchmark.ratios, benchmark.thresholds, strict=True):
            yield here | {"compressor": "topk", "fields": {"ratio": ratio}}
            yield here | {"compressor": "threshold", "fields": {"value": threshold}}
            if benchmark.kind == "images":
                yield here | {"compressor": "topk", "fields": {"ratio": ratio}, "granularity": "model"}
        if benchmark.no_feedback:
            ratio, threshold = benchmark.no_feedback
            yield here | {"compressor": "topk", "fields": {"ratio": ratio}, "feedback": None}
            yield here | {"compressor": "threshold", "fields": {"value": threshold}, "feedback": None}
        if benchmark.update:
            for feedback in ("gradient", "update"):
                yield here | {"compressor": "topk", "fields": {"ratio": benchmark.update}, "feedback": feedback}
    for network, most, least in benchmark.accordion:
        for seed in range(size.accordion_seeds):
            here = base | {"seed": seed, "network": network}
            for ratio in (most, least):
                yield here | {"compressor": "topk", "fields": {"ratio": ratio}}
            yield here | {"compressor": "accordion", "fields": {"most": most, "least": least}}
            yield here | {"compressor": "threshold", "fields": {"least": least}}


def _data(given: Given | None) -> Spec:
    return {"data": given.path, "digest": given.digest} if given else {"data": None, "digest": None}


def _plain(options: Mapping[str, Any]) -> dict[str, Any]:
    return {key: list(value) if isinstance(value, tuple) else value for key, value in options.items()}


def _fields(spec: Spec) -> str:
    return "".join(f"-{key}{value:g}" for key, value in spec["fields"].items())


def _logistic_name(spec: Spec) -> str:
    what = f"{spec['problem']}-{spec['algorithm']}-{spec['workers']}-{spec['compressor']}"
    return f"{what}{_fields(spec)}-seed{spec['seed']}"


def _network_name(spec: Spec) -> str:
    """A spec that is asked for twice, for two figures, has the same name and is run once."""
    kept = {"gradient": "", "update": "-update", None: "-no-feedback"}[spec["feedback"]]
    granularity = "-model" if spec["granularity"] == "model" else ""
    return f"{spec['kind']}-{spec['network']}-{spec['compressor']}{_fields(spec)}{granularity}{kept}-seed{spec['seed']}"
