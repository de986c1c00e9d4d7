"""Described clusters that come with the package, each with its source and the derivation of its numbers in the file.

    gradiveq-cpu     the GradiVeQ paper's 6 nodes of 2 Xeons each, fitted on its RAR and QSGD cells
    gradiveq-k80     its 6 nodes with a K80 each, likewise
    v100-10gbe       the layer-wise paper's 2 nodes with a V100 each, 10 Gbit/s (CIFAR-10)
    v100-10gbe-4     its 4 nodes (ImageNet)
    v100-8gpu        the hard-threshold paper's 8 GPUs

`python -m bench.paper_timing --fit` does the fits again. "this-machine" is the one at hand, once it was calibrated.
"""

from __future__ import annotations

from pathlib import Path

from ring.cluster import Cluster, ClusterError, read

FOLDER = Path(__file__).parent
#: What the codecs of this project can be rated by (`Codec.amounts`).
RATES = (
    "add",
    "copy",
    "scale",
    "qsgd.encode",
    "qsgd.recode",
    "qsgd.decode",
    "pca.encode",
    "pca.decode",
)
#: Where `python -m bench.calibrate` writes the machine at hand.
THIS_MACHINE = Path("results/this-machine.toml")


def names() -> list[str]:
    """The names of the presets, sorted."""
    return sorted(path.stem for path in FOLDER.glob("*.toml"))


def load(name_or_path: str) -> Cluster:
    """A preset by its name, "this-machine", or the cluster that a TOML file describes.

    Args:
        name_or_path: what is no preset's name is a path.
    Raises:
        ClusterError: neither is there, or the file says something impossible.
    """
    if name_or_path in names():
        return _read(FOLDER / f"{name_or_path}.toml")
    if name_or_path == "this-machine":
        if not THIS_MACHINE.is_file():
            raise ClusterError(
                f"{THIS_MACHINE}, which describes this machine, is not there: python -m bench.calibrate writes it"
            )
        return _read(THIS_MACHINE)
    path = Path(name_or_path)
    if not path.is_file():
        raise ClusterError(
            f"there is no cluster {name_or_path!r}: give {', '.join(names())}, this-machine, or a TOML file"
        )
    return _read(path)


def _read(path: Path) -> Cluster:
    """A rate that nothing asks for is a misspelt one: what is missing would be measured here, in silence."""
    cluster = read(path)
    for name, rate in cluster.rates.items():
        if name not in RATES:
            raise ClusterError(f"{path}: unknown key `rates.{name}` (= {rate!r}); known are {', '.join(RATES)}")
    return cluster
