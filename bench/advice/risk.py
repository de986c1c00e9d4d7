"""What is known of a method's accuracy: the probe's losses on the model at hand, and what was recorded on others.

Neither says what a long training on the model would end with. Held-out losses are of single gradients, without error
feedback; recorded accuracies are of other models at small size. Where there is nothing, it is called unknown.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional
from tqdm import trange

from bench.advice.model import ModelError, others_code, tensor_of
from bench.common.files import read_json
from bench.data import Batches, Dataset
from gradiveq.ddp import probe
from gradiveq.methods import Compressed, GradiVeQ, Method
from gradiveq.pca import DEFAULT_LOSS_THRESHOLD
from gradiveq.powersgd import PowerSGD

#: The share of the probe's iterations that are measured, after the others were sampled.
HELD_OUT = 0.2
#: Files of recorded results, and what they are called.
RUNS = ("cifar100-6x16", "cifar100-6x16-all-slices-ratio-8")
LAYERWISE, HARD_THRESHOLD, DDP = "layerwise/layerwise.json", "hard-threshold/table.md", "ddp/ddp.json"


class Probed(NamedTuple):
    """‖ĝ - g‖²/‖g‖² on held-out gradients and bytes over bytes, of all layers together; or why there is nothing."""

    loss: float | None
    ratio: float | None
    why_not: str = ""


class Elsewhere(NamedTuple):
    """What a method did to another model.

    Attributes:
        setting: the setting of the method.
        result: for people, beside what plain training had.
        source: the folder in results/.
        model: that was trained.
    """

    setting: str
    result: str
    source: str
    model: str


def family(method: Method) -> str:
    """The name under which settings of one method are compared."""
    return method.compressor.name if isinstance(method, Compressed) else method.name


def held_out_of(iterations: int) -> int:
    """How many of a probe's iterations are measured; the others are sampled."""
    return max(1, round(HELD_OUT * iterations))


def probe_losses(
    model: nn.Module,
    methods: Mapping[str, Method],
    dataset: Dataset,
    iterations: int,
    batch_size: int,
    lr: float,
    also: Sequence[str] = (),
) -> dict[str, Probed]:
    """Train uncompressed for so many iterations, and look at what each method would have made of the last fifth.

    Args:
        model: takes 3x32x32 images; it is trained.
        also: as for `gradiveq.ddp.probe`.
    Raises:
        ModelError: it doesn't return a score for each class of the data (more are fine), or fails.
        ValueError: there are too few iterations.
    """
    held_out = held_out_of(iterations)
    found: dict[str, Probed] = {}
    chosen: dict[str, Any] = {}
    for name, method in methods.items():
        if not isinstance(method, Compressed | PowerSGD | GradiVeQ):
            continue
        try:  # one by one: a method that doesn't fit says why
            probe(model, {name: method}, sample=iterations - held_out, holdout=held_out, also=also)
            chosen[name] = method
        except (TypeError, ValueError) as error:
            found[name] = Probed(None, None, str(error))
    if not chosen:
        return found
    watch = probe(model, chosen, sample=iterations - held_out, holdout=held_out, also=also)
    batches = Batches(dataset, batch_size, augment=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    for iteration in trange(iterations, desc="probe", leave=False, disable=None):
        images, labels = batches.batch(iteration)
        optimizer.zero_grad()
        with others_code(f"the model can't be trained on {dataset.name}"):
            scores = tensor_of(model(images))
            if scores.dim() != 2 or len(scores) != len(labels) or scores.shape[1] < dataset.num_classes:
                raise ModelError(
                    f"the model must return scores for {dataset.num_classes} classes or more ({dataset.name}), got "
                    f"{'x'.join(map(str, scores.shape))} numbers for {len(labels)} images"
                )
            functional.cross_entropy(scores, labels).backward()  # type: ignore[no-untyped-call]
        watch.observe()
        optimizer.step()
    if not watch.done:
        unmeasured = f"after {iterations} iterations with a learning rate of {lr:g} gradients were not finite"
        return found | {name: Probed(None, None, unmeasured) for name in chosen}
    for row in watch.report():
        if row.layer == "all":
            found[row.method] = Probed(row.held_out_loss, row.ratio)
    return found


def recorded(results: Path) -> dict[str, list[Elsewhere]]:
    """What results/ has, by `family`; of files that aren't there, nothing.

    Raises:
        ValueError: a file isn't what it should be.
    """
    found: dict[str, list[Elsewhere]] = defaultdict(list)
    for read in (_hooks, _training_runs, _layerwise, _hard_threshold):
        try:
            for name, one in read(results):
                found[name].append(one)
        except FileNotFoundError:
            continue
        except (KeyError, TypeError, ValueError, OSError) as error:
            raise ValueError(f"{results}: damaged, or not this project's results ({error!r})") from error
    return dict(found)


def closest(method: Method, spec: str, model: str, found: Mapping[str, list[Elsewhere]]) -> list[Elsewhere]:
    """What was recorded of a method with its own setting, or else without error feedback, or else all of it.

    What is of the same model comes first.
    """
    ours = found.get(family(method), [])
    settings = [spec, spec.removesuffix("+ef")]
    if isinstance(method, GradiVeQ):
        settings.insert(0, _gradiveq_setting(method.loss_threshold, method.ratio, method.fit_slices))
    ours = sorted(ours, key=lambda one: one.model != model)
    for setting in settings:
        if same := [one for one in ours if one.setting == setting]:
            return same
    return ours


def _gradiveq_setting(loss_threshold: float | None, ratio: float | None, fit_slices: str) -> str:
    decided = f"λ = {loss_threshold or DEFAULT_LOSS_THRESHOLD:g}" if ratio is None else f"ratio {ratio:g}"
    return f"gradiveq, {decided}, {fit_slices} slices"


def _training_runs(results: Path) -> list[tuple[str, Elsewhere]]:
    plain = read_json(results / RUNS[0] / "summary.json")["methods"]["rar"]["test_accuracy"]
    found = []
    for folder in RUNS:
        summary = read_json(results / folder / "summary.json")
        entry = summary["methods"]["gradiveq"]
        options = read_json(results / folder / "environment.json")["options"]
        setting = _gradiveq_setting(options["loss_threshold"], options["ratio"], options["fit_slices"])
        text = (
            f"{100 * entry['test_accuracy']:.1f} % instead of {100 * plain:.1f} % ({summary['model']}, "
            f"{summary['data_source'].split(' (')[0]}, {summary['iterations']:,} iterations)"
        )
        found.append(("gradiveq", Elsewhere(setting, text, folder, summary["model"])))
    return found


def _layerwise(results: Path) -> list[tuple[str, Elsewhere]]:
    """Accuracies without error feedback."""
    runs = read_json(results / LAYERWISE)["runs"].values()
    accuracies: dict[tuple[str, Any, str], list[float]] = defaultdict(list)
    for run in runs:
        spec = run["spec"]
        if spec["optimiser"] == "sgd" and spec["granularity"] in ("layer", None) and run["evaluations"]:
            accuracy = 100 * run["evaluations"][-1]["accuracy"]
            accuracies[spec["method"], spec["value"], spec["network"]].append(accuracy)
    plain = {network: fmean(values) for (name, _, network), values in accuracies.items() if name == "none"}
    found = []
    for (name, value, network), values in accuracies.items():
        if name != "none":
            setting = name if value is None else f"{name}:{value:g}"
            text = f"{fmean(values):.1f} % instead of {plain[network]:.1f} % (small {network}, {len(values)} seeds)"
            found.append((name, Elsewhere(setting, text, "layerwise", network)))
    return found


def _hard_threshold(results: Path) -> list[tuple[str, Elsewhere]]:
    """Accuracies with error feedback, layer by layer; from the tables "NETWORK, DATA: all settings"."""
    text = (results / HARD_THRESHOLD).read_text(encoding="utf-8")
    found = []
    for section in text.split("\n## ")[1:]:
        title, _, body = section.partition("\n")
        network, _, rest = title.partition(", ")
        if not rest.endswith(": all settings"):
            continue
        rows = [[cell.strip() for cell in line.strip("| ").split("|")] for line in body.splitlines() if "|" in line]
        head, lines = rows[0], [dict(zip(rows[0], row, strict=True)) for row in rows[2:]]
        measure = head[4]
        (plain,) = [line for line in lines if line["compressor"] == "identity"]
        for line in lines:
            settings = re.fullmatch(r"[kλ] ([\d.e-]+)", line["setting"])
            if settings and line["granularity"] == "layer" and line["error feedback"] == "gradient":
                setting = f"{line['compressor']}:{float(settings[1]):g}+ef"
                ours, theirs = (one[measure].split(" ± ")[0] for one in (line, plain))
                what, percent = measure.removesuffix(" (%)"), " %" if measure.endswith(" (%)") else ""
                measured = f"{what} {ours}{percent} instead of {theirs}{percent} (small {network})"
                found.append((line["compressor"], Elsewhere(setting, measured, "hard-threshold", network)))
    return found


def _hooks(results: Path) -> list[tuple[str, Elsewhere]]:
    """Accuracies by the hook itself, as `bench.ddp` compares it with PyTorch's."""
    record = read_json(results / DDP)
    accuracies = {row["method"]: row["accuracies"] for row in record["rows"] if row["accuracies"]}
    theirs, model = 100 * fmean(accuracies["torch:none"]), record["options"]["model"]
    found = []
    for method, ours in accuracies.items():
        if not method.startswith("torch:"):
            text = f"{100 * fmean(ours):.1f} % instead of {theirs:.1f} % ({model}"
            seeds = f"{len(ours)} seed{'s' if len(ours) > 1 else ''}"
            found.append((re.split(r"[:@+^/]", method)[0], Elsewhere(method, f"{text}, {seeds})", "ddp", model)))
    return found
