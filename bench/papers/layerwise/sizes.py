"""What `bench.layerwise` runs, at its small size and at the paper's: settings, and the grid of runs.

The paper's numbers are those of section 5.2 of Dutta et al. 2020; where it says nothing (weight decay, momentum, 40
epochs for random k and threshold v) those of the authors' code, github.com/sands-lab/layer-wise-aaai20. A *spec* is one
run, in JSON's types.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

Spec = dict[str, Any]

#: The methods in the order of the paper's figures 2 to 8.
METHODS = ("randomk", "terngrad", "qsgd-gather", "adaptive", "threshold", "topk")
BASELINE = "none"
LAYER, MODEL = "layer", "model"
GRANULARITIES = (LAYER, MODEL)
#: "We set s = 256" (Fig. 4); without clipping; (|2g| >= max|g|).
FIELDS: dict[str, dict[str, Any]] = {
    "terngrad": {"clip": None},
    "qsgd-gather": {"levels": 256, "norm": "l2", "bucket": None},
    "adaptive": {"multiple": 2.0},
}
PAPER_RATIOS = (0.001, 0.01, 0.1, 0.3, 0.5)
#: Three orders of magnitude; which ones its Fig. 6 has, the paper's text doesn't say.
THRESHOLDS = (1e-4, 1e-3, 1e-2, 1e-1)


@dataclass(frozen=True)
class Setting:
    """A method with its parameters and an optimiser; run at both granularities.

    Attributes:
        method: one of `gradiveq.compressors.COMPRESSORS`, or `BASELINE`.
        value: what is varied: a ratio or a threshold; None where nothing is.
        optimiser: "sgd", or "nesterov" (Fig. 7c).
    """

    method: str
    value: float | None = None
    optimiser: str = "sgd"

    @property
    def fields(self) -> dict[str, Any]:
        """The compressor's fields."""
        if self.value is None:
            return FIELDS.get(self.method, {})
        return {"value" if self.method == "threshold" else "ratio": self.value}

    @property
    def label(self) -> str:
        """The name in tables and figures."""
        if self.value is None:
            return ""
        return f"{self.value:g}" if self.method == "threshold" else f"{100 * self.value:g} %"


@dataclass(frozen=True)
class Network:
    """A model, the data it is trained on, and which methods it is tried with.

    Attributes:
        name: one of `bench.models.MODELS`.
        width: factor of its channels.
        imagenet: trained on the ImageNet folder, and judged by top-5 accuracy; otherwise on `--data`, by top-1.
        batch_size: images of a worker.
        workers: how many.
        epochs: epochs of most methods; `long_epochs` of random k, threshold v and adaptive.
        methods: those that the paper shows of it.
        nesterov: whether top k is also run with Nesterov momentum.
    """

    name: str
    width: float = 1.0
    imagenet: bool = False
    batch_size: int = 512
    workers: int = 2
    epochs: float = 24
    long_epochs: float = 40
    methods: tuple[str, ...] = METHODS
    nesterov: bool = False

    @property
    def label(self) -> str:
        """The name in tables and figures."""
        return self.name if self.width == 1 else f"{self.name} (width {self.width:g})"


@dataclass(frozen=True)
class LayerwiseSize:
    """A set of runs.

    Attributes:
        networks, ratios, thresholds, seeds: what is combined.
        lr: the learning rate's peak; from 0 to it in `warmup` of the run, then linearly to 0.
        warmup: 5 of 24 epochs.
        weight_decay, momentum: of the optimisers; the momentum is Nesterov's alone.
        augment: whether to crop and flip at random.
    """

    networks: tuple[Network, ...]
    ratios: tuple[float, ...] = PAPER_RATIOS
    thresholds: tuple[float, ...] = THRESHOLDS
    seeds: int = 1
    lr: float = 0.4
    warmup: float = 5 / 24
    weight_decay: float = 5e-4
    momentum: float = 0.9
    augment: bool = True

    def settings(self, network: Network, methods: Sequence[str]) -> Iterator[Setting]:
        """The settings in the order of the paper's figures, after the runs without compression."""
        wanted = [method for method in methods if method in network.methods]
        yield Setting(BASELINE)
        if network.nesterov and "topk" in wanted:
            yield Setting(BASELINE, optimiser="nesterov")
        for method in wanted:
            if method in FIELDS:
                yield Setting(method)
            for value in () if method in FIELDS else self.thresholds if method == "threshold" else self.ratios:
                yield Setting(method, value)
                if method == "topk" and network.nesterov:
                    yield Setting(method, value, "nesterov")


SMALL = LayerwiseSize(
    networks=(Network("alexnet", width=0.125, batch_size=64, epochs=4, long_epochs=4, nesterov=True),),
    ratios=(0.001, 0.01, 0.1, 0.5),
    thresholds=(3e-5, 1e-3, 3e-2),
    seeds=5,
    augment=False,
)
PAPER = LayerwiseSize(
    networks=(
        Network("alexnet"),
        Network("resnet9", nesterov=True),
        Network(
            "resnet50",
            imagenet=True,
            batch_size=256,
            workers=4,
            epochs=34,
            long_epochs=34,
            methods=("terngrad", "qsgd-gather", "topk"),
        ),
    ),
)


#: How operators and data differ from the authors' code, whatever the size.
UNLIKE = (
    "k is rounded, and at least 1 of a layer (theirs keep at least one element, too).",
    "Random k draws the same elements on all workers.",
    "QSGD has the paper's 256 levels, the code 255.",
    "Before images are cropped they are padded with black, in the code with their mirror image; no square is cut out.",
    "The gradient of a worker is the mean over its batch and not the sum, so thresholds are in those units.",
    "Workers are in one process; batch norm's running statistics are the mean over them.",
)


def differences(size: LayerwiseSize) -> str:
    """How a size differs from the paper's, for its tables and figures; empty if it doesn't."""
    parts = []
    for network in size.networks:
        paper = next(one for one in PAPER.networks if one.name == network.name)
        if network.width != paper.width:
            parts.append(f"{network.width:g} of {network.name}'s channels")
        if (network.epochs, network.long_epochs) != (paper.epochs, paper.long_epochs):
            parts.append(
                f"{network.epochs:g} epochs instead of {paper.epochs:g} ({paper.long_epochs:g} of some methods)"
            )
        batch, paper_batch = network.workers * network.batch_size, paper.workers * paper.batch_size
        if batch != paper_batch:
            parts.append(f"a global batch of {batch:,} instead of {paper_batch:,}")
    if not size.augment:
        parts.append("no augmentation")
    if set(size.ratios) != set(PAPER_RATIOS):
        ratios = ", ".join(f"{100 * ratio:g}" for ratio in size.ratios)
        parts.append(f"ratios of {ratios} %")
    return f"Unlike the paper: {'; '.join(parts)}. The learning rate is the paper's" if parts else ""


@dataclass(frozen=True)
class Where:
    """The data of a run, and the device that computes it.

    Attributes:
        data: for `bench.data.load`; None for the shipped sample.
        imagenet: folder for networks that need it.
        device: "cpu" or "cuda".
    """

    data: str | None = None
    imagenet: str | None = None
    device: str = "cpu"


def specs(size: LayerwiseSize, methods: Sequence[str], where: Where) -> dict[str, Spec]:
    """The grid, by name: all seeds of a setting after one another, layer-wise before entire-model."""
    found: dict[str, Spec] = {}
    for network in size.networks:
        for setting in size.settings(network, methods):
            for seed in range(size.seeds):
                for granularity in (None,) if setting.method == BASELINE else GRANULARITIES:
                    words = [network.name, setting.method, setting.optimiser, setting.value, granularity, f"s{seed}"]
                    name = "-".join(f"{word:g}" if isinstance(word, float) else word for word in words if word)
                    found[name] = _spec(size, network, setting, granularity, seed, where)
    return found


def _spec(
    size: LayerwiseSize, network: Network, setting: Setting, granularity: str | None, seed: int, where: Where
) -> Spec:
    long = setting.method in ("randomk", "threshold", "adaptive")
    return {
        "network": network.name,
        "width": network.width,
        "imagenet": network.imagenet,
        "data": where.imagenet if network.imagenet else where.data,
        "device": where.device,
        "method": setting.method,
        "value": setting.value,
        "fields": dict(setting.fields),
        "granularity": granularity,
        "optimiser": setting.optimiser,
        "seed": seed,
        "workers": network.workers,
        "batch_size": network.batch_size,
        "epochs": network.long_epochs if long else network.epochs,
        "lr": size.lr,
        "warmup": size.warmup,
        "weight_decay": size.weight_decay,
        "momentum": size.momentum,
        "augment": size.augment,
    }
