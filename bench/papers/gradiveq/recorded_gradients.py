"""Gradients of some layers recorded while training, and what Fig. 4 and 5 of Yu et al. 2018 show of them.

    recorder = GradientRecorder(model, ["conv1", "layer1.0.conv1"], count=150)
    ...                                   # in each iteration, after the aggregation
    recorder.add()                        # copies `.grad`; does nothing once there are 150
    ...
    recorder.save(path, {"data": ..., "seed": ..., "ranks": ..., "batch_size": ..., "first_iteration": ..., ...})

A file is a compressed .npz: "about", JSON text with what `save` was given and each layer's (H, W, D, F), and for each
layer an array float32 of shape (count, H·W·D·F) in the order of Fig. 3a (`gradiveq.flatten`).
`python -m bench.figures FOLDER` draws it.
"""

from __future__ import annotations

import io
import json
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import nn

from bench.common.files import plain, write_atomically
from gradiveq.flatten import Layout
from gradiveq.pca import GroupSamples, PCAConfig, groups

Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]

ABOUT = "about"
SUFFIX = ".weight"
#: What `save` has to be told.
REQUIRED = ("data", "seed", "ranks", "batch_size", "first_iteration", "command")
#: Lt and λ of the paper, with which Fig. 5's compressors are fitted.
SAMPLES = 100
LOSS_THRESHOLD = 0.01
#: Fig. 5's slice sizes: from the first in these steps, and every one this near to a multiple of F*D.
FIRST_SIZE, SIZE_STEP, NEAR = 16, 4, 3
#: Slice sizes further from a multiple of F*D than NEAR and at most this far are its neighbours.
NEIGHBOURHOOD = 64


class GradientRecorder:
    """Copies the gradients of some convolutions in the order of Fig. 3a, over `count` iterations.

    Args:
        model: whose parameters' `.grad` is copied.
        layers: convolutions by module name, such as "conv1" or "layer1.0.conv1".
        count: iterations to record.
    Raises:
        ValueError: for a name that is no convolution of the model, none or a repeated one, or a count below 1.
    """

    def __init__(self, model: nn.Module, layers: Sequence[str], count: int) -> None:
        self._layout = Layout(model)
        blocks = {block.name.removesuffix(SUFFIX): block for block in self._layout.blocks if block.compressed}
        unknown = [name for name in layers if name not in blocks]
        if unknown:
            raise ValueError(f"`layers` names {unknown[0]!r}, which is none of the convolutions: {', '.join(blocks)}")
        if not layers or len(set(layers)) != len(layers):
            raise ValueError(f"`layers` must name at least one convolution, each once, got {list(layers)}")
        if count < 1:
            raise ValueError(f"`count` must be at least 1, got {count}")
        self.count, self.recorded = count, 0
        self._blocks = {name: blocks[name] for name in layers}
        self._vector = np.empty(self._layout.length, np.float32)
        self._values = {name: np.empty((count, blocks[name].length), np.float32) for name in layers}

    @property
    def complete(self) -> bool:
        return self.recorded == self.count

    def add(self) -> bool:
        """Record this iteration, unless there are `count` already. Returns whether it did.

        Cost: one strided copy of the whole gradient, and one of the recorded layers.
        """
        if self.complete:
            return False
        self._layout.pack(self._vector)
        for name, block in self._blocks.items():
            self._values[name][self.recorded] = self._vector[block.start : block.stop]
        self.recorded += 1
        return True

    def save(self, path: Path, about: Mapping[str, Any]) -> None:
        """Write what was recorded so far, atomically.

        Args:
            path: ends in .npz.
            about: at least `REQUIRED`; anything else that JSON can hold.
        """
        missing = [name for name in REQUIRED if name not in about]
        if missing:
            raise ValueError(f"`about` lacks {', '.join(missing)}")
        if path.suffix != ".npz":
            raise ValueError(f"`path` must end in .npz, got {path}")
        shapes = {name: [*b.shape[2:], b.depth, b.filters] for name, b in self._blocks.items()}
        text = json.dumps(plain({**about, "layers": shapes}), allow_nan=False)
        arrays: dict[str, Any] = {name: values[: self.recorded] for name, values in self._values.items()}
        data = io.BytesIO()
        np.savez_compressed(data, **{ABOUT: np.array(text), **arrays})
        write_atomically(path, data.getvalue())

    def state_dict(self) -> dict[str, Any]:
        """What an interrupted run has to keep to go on recording."""
        return {"values": {name: values[: self.recorded].copy() for name, values in self._values.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for name, values in self._values.items():
            self.recorded = len(state["values"][name])
            values[: self.recorded] = state["values"][name]


@dataclass(frozen=True)
class Recording:
    """A file of `GradientRecorder.save`.

    Attributes:
        about: as given to `save`.
        shapes: (H, W, D, F) of each layer.
        gradients: float32 of shape (count, H·W·D·F) of each layer.
    """

    about: dict[str, Any]
    shapes: dict[str, tuple[int, ...]]
    gradients: dict[str, Float32]


#: What NumPy raises on archives that aren't whole.
_DAMAGE = (ValueError, OSError, EOFError, NotImplementedError, RuntimeError, zipfile.BadZipFile, zlib.error)


def load(path: Path) -> Recording:
    """Read a recording.

    Raises:
        ValueError: if the file is damaged or is none; one line that names it.
        OSError: if it can't be read.
    """
    data = path.read_bytes()
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as file:
            about: dict[str, Any] = json.loads(str(file[ABOUT]))
            shapes = {name: tuple(int(n) for n in shape) for name, shape in about.pop("layers").items()}
            gradients = {name: np.asarray(file[name], np.float32) for name in shapes}
    except (*_DAMAGE, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not a recording of gradients, or is damaged ({error})") from error
    if not gradients or any(name not in about for name in REQUIRED):
        raise ValueError(f"{path} is damaged: it has no layers, or does not say where they are from")
    counts = {len(values) for values in gradients.values()}
    for name, values in gradients.items():
        if values.ndim != 2 or values.shape[1] != prod(shapes[name]) or len(counts) != 1:
            raise ValueError(f"{path} is damaged: {name} of shape (H, W, D, F) = {shapes[name]} has {values.shape}")
        if not np.isfinite(values).all():
            raise ValueError(f"{path} has gradients of {name} that are not finite")
    return Recording(about, shapes, gradients)


# --- Fig. 4 ----------------------------------------------------------------------------------------------------------


def _rotation(samples: Float64) -> tuple[Float64, Float64, Float64]:
    """Mean, principal axes as rows (the largest entry positive), and the variance along each, descending."""
    mean = samples.mean(axis=0)
    centred = samples - mean
    _, values, axes = np.linalg.svd(centred, full_matrices=False)
    largest = np.abs(axes).argmax(axis=1)
    axes *= np.where(axes[np.arange(len(axes)), largest] < 0, -1.0, 1.0)[:, None]
    return mean, axes, values**2 / max(1, len(samples) - 1)


def _last_share(samples: Float64) -> float:
    variances = _rotation(samples)[2]
    total = float(variances.sum())
    return float(variances[-1]) / total if total > 0 else 0.0


def adjacent(recording: Recording, layer: str, samples: int = SAMPLES, first: int = 0) -> dict[str, Any]:
    """The numbers of Fig. 4: 3 adjacent gradients of a layer over the iterations, and their principal axes.

    Args:
        layer: name of the layer.
        samples: the iterations on which the held-out loss's axes are fitted; the others are what they are tried on.
        first: the first of the 3 gradients.
    Returns:
        "variance_shares": of the three axes, fitted on all iterations;
        "loss_in_sample": ‖ĝ-g‖²/‖g‖² over all iterations with two of the three axes kept, which is ratio 1.5;
        "loss_held_out": the same for the later iterations with the axes of the first `samples`, None if there are none;
        "standardised": the third axis's share of variance once every gradient is scaled to unit variance, so that
            correlation counts and not which one varies most: of these 3, of all 3 adjacent ones at
            one coordinate (quartiles), of 3 drawn at random from the layer (quartiles), of 3 independent ones;
        and "mean", "axes", "values" to draw them.
    Raises:
        ValueError: with fewer than 4 iterations, or fewer than 3 gradients in the layer.
    """
    gradients = recording.gradients[layer].astype(np.float64)
    count, length = gradients.shape
    if count < 4 or length < 3:
        raise ValueError(f"Fig. 4 needs 4 iterations of 3 gradients, {layer} has {count} of {length}")
    values = gradients[:, first : first + 3]
    mean, axes, variances = _rotation(values)
    total = float(variances.sum())
    power = float((values**2).sum())
    generator = np.random.default_rng(0)
    filters = recording.shapes[layer][-1]
    starts = [i for i in range(length - 2) if i % filters <= filters - 3] if filters >= 3 else list(range(length - 2))
    if len(starts) > 2000:
        starts = sorted(generator.choice(starts, 2000, replace=False).tolist())
    centred = gradients - gradients.mean(axis=0)
    scaled = _ratio(centred, np.broadcast_to(centred.std(axis=0), centred.shape))
    near = [_last_share(scaled[:, i : i + 3]) for i in starts]
    anywhere = [_last_share(scaled[:, generator.choice(length, 3, replace=False)]) for _ in starts]
    independent = [_last_share(generator.standard_normal((count, 3))) for _ in range(500)]
    held_out = None
    if samples < count:
        fit_mean, fit_axes, _ = _rotation(values[:samples])
        later = values[samples:]
        lost = (later - fit_mean) @ fit_axes[2]
        later_power = float((later**2).sum())
        held_out = float((lost**2).sum()) / later_power if later_power > 0 else None
    return {
        "figure": "4",
        "layer": layer,
        "shape_hwdf": list(recording.shapes[layer]),
        "first_gradient": first,
        "iterations": count,
        "variance_shares": (variances / total if total > 0 else np.zeros(3)).tolist(),
        "loss_in_sample": float(variances[2]) * (count - 1) / power if power > 0 else 0.0,
        "loss_held_out": held_out,
        "fitted_on": min(samples, count),
        "standardised": {
            "these": _last_share(scaled[:, first : first + 3]),
            "adjacent": np.percentile(near, (25, 50, 75)).tolist(),
            "random": np.percentile(anywhere, (25, 50, 75)).tolist(),
            "independent": float(np.median(independent)),
            "triples": len(starts),
        },
        "mean": mean.tolist(),
        "axes": axes.tolist(),
        "values": values.tolist(),
        "about": recording.about,
    }


# --- Fig. 5 ----------------------------------------------------------------------------------------------------------


def sweep_sizes(length: int, collocated: int) -> list[int]:
    """Fig. 5's slice sizes for a layer: from 16 to half of it, most of them no multiples of F or F·D.

    Args:
        length: length of the layer, H·W·D·F.
        collocated: F·D.
    """
    half = length // 2
    sizes = set(range(min(FIRST_SIZE, half), half + 1, SIZE_STEP))
    for multiple in range(collocated, half + 1, collocated):
        sizes.update(size for size in range(multiple - NEAR, multiple + NEAR + 1) if size <= half)
    return sorted(sizes)


def slice_sweep(
    recording: Recording,
    layer: str,
    *,
    sizes: Sequence[int] | None = None,
    samples: int = SAMPLES,
    loss_threshold: float = LOSS_THRESHOLD,
) -> dict[str, Any]:
    """The numbers of Fig. 5: the first slice's compressor on the other slices, for many slice sizes K.

    The compressor is fitted on the first `samples` iterations of the first slice; µ is every slice's own mean over
    them, which is known as all slices are aggregated while sampling. The losses are ‖ĝ-g‖²/‖g‖² of an iteration,
    averaged over iterations:

        "first_slice"        the sampled slice in the sampled iterations: what λ bounds
        "first_slice_later"  the sampled slice in the iterations after them: held out in time
        "other_slices"       the remaining slices in the sampled iterations, as in the paper: held out in space
        "other_slices_later" the remaining slices in the iterations after them: held out in both, what training sees
        "random_basis"       "other_slices" as expected of d directions drawn at random: what is due to d alone

    Returns:
        "rows": a dict per K with "slice_size", "n_components" (d <= samples - 1), "ratio" (K/d) and the losses;
        "dips": per multiple of F·D its loss and that of its neighbours, see `find_dips`; the same for "…_later".
    Raises:
        ValueError: with fewer than 3 iterations, or a size above half of the layer.
    """
    gradients = recording.gradients[layer]
    count, length = gradients.shape
    *_, depth, filters = recording.shapes[layer]
    if count < 3:
        raise ValueError(f"Fig. 5 needs at least 3 iterations, {layer} has {count}")
    samples = min(samples, max(2, 2 * count // 3))
    chosen = sweep_sizes(length, depth * filters) if sizes is None else sorted(set(sizes))
    if not chosen or chosen[0] < 1 or chosen[-1] > length // 2:
        raise ValueError(f"slice sizes must be 1 to {length // 2} (half of {layer}), got {chosen}")
    mean = gradients[:samples].mean(axis=0, dtype=np.float64)
    centred = gradients - mean
    powers = np.square(gradients, dtype=np.float64)
    rows = []
    for size in chosen:
        config = PCAConfig(slice_size=size, loss_threshold=loss_threshold)
        (group,) = groups(layer, length, size)
        sampler = GroupSamples(group, config)
        for gradient in gradients[:samples]:
            sampler.add(gradient)
        basis = sampler.rebuild(sampler.fit()).components_.astype(np.float64)
        padded = np.zeros((count, group.num_slices * size))
        padded[:, :length] = centred
        slices = padded.reshape(count, group.num_slices, size)
        missed = slices - (slices @ basis.T) @ basis
        squares = np.square(missed).reshape(count, -1)[:, :length]
        spread = np.square(slices[:, 1:]).sum(axis=(1, 2))
        first = _ratio(squares[:, :size].sum(axis=1), powers[:, :size].sum(axis=1))
        others = _ratio(squares[:, size:].sum(axis=1), powers[:, size:].sum(axis=1))
        by_chance = _ratio(spread * (1 - len(basis) / size), powers[:, size:].sum(axis=1))
        rows.append(
            {
                "slice_size": size,
                "n_components": len(basis),
                "ratio": size / len(basis),
                "first_slice": float(first[:samples].mean()),
                "first_slice_later": float(first[samples:].mean()),
                "other_slices": float(others[:samples].mean()),
                "other_slices_later": float(others[samples:].mean()),
                "random_basis": float(by_chance[:samples].mean()),
            }
        )
    return {
        "figure": "5",
        "layer": layer,
        "shape_hwdf": list(recording.shapes[layer]),
        "loss_threshold": loss_threshold,
        "samples": samples,
        "later_iterations": count - samples,
        "collocated": depth * filters,
        "dips": find_dips(rows, "other_slices", depth * filters),
        "dips_later": find_dips(rows, "other_slices_later", depth * filters),
        "rows": rows,
        "about": recording.about,
    }


def find_dips(rows: Sequence[Mapping[str, Any]], loss: str, collocated: int) -> dict[str, Any]:
    """Whether the loss is lower at multiples of F·D than around them.

    A multiple's neighbours are the slice sizes more than NEAR and at most NEIGHBOURHOOD away from it.

    Returns:
        "multiples": of each "slice_size", "loss", "neighbours" (their median) and "left" (loss / that; 1 is no dip);
        "median_left": over the multiples, None without any.
    """
    multiples = []
    for row in rows:
        size = row["slice_size"]
        near = [r[loss] for r in rows if NEAR < abs(r["slice_size"] - size) <= NEIGHBOURHOOD]
        if size % collocated == 0 and near:
            around = float(np.median(near))
            left = row[loss] / around if around > 0 else None
            multiples.append({"slice_size": size, "loss": row[loss], "neighbours": around, "left": left})
    left_over = [m["left"] for m in multiples if m["left"] is not None]
    return {"multiples": multiples, "median_left": float(np.median(left_over)) if left_over else None}


def _ratio(part: Float64, whole: Float64) -> Float64:
    """Element by element; 0 where both are 0."""
    return np.divide(part, whole, out=np.zeros_like(part), where=whole > 0)
