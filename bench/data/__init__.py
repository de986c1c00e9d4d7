"""The data sets: CIFAR-10, CIFAR-100 and Fashion-MNIST here; in modules of their own what needs more.

    bench.data.images    CIFAR-10, CIFAR-100, Fashion-MNIST and its sample: what `load` reads
    bench.data.folder    ImageNet: a folder of JPEG files for each class, decoded when they are needed
    bench.data.text      WikiText-2, or any text of words; a sample is shipped
    bench.data.ratings   MovieLens; made-up ratings without it
    bench.data.libsvm    madelon, gisette; what is like madelon without it

Nothing is downloaded unless it is asked for, nothing is unpickled, and what can't be used is a `DataError` of one line.
Each data set says in `source` what exactly was used.
"""

from bench.data.images import (
    CIFAR10,
    CIFAR100,
    IDX_CLASSES,
    IDX_FILES,
    LAYOUTS,
    SAMPLE,
    Batches,
    Bytes,
    CifarLayout,
    Dataset,
    Normalise,
    crop_and_flip,
    evaluation_batches,
    load,
    read_idx,
)
from bench.data.share import DataError

__all__ = [
    "CIFAR10",
    "CIFAR100",
    "IDX_CLASSES",
    "IDX_FILES",
    "LAYOUTS",
    "SAMPLE",
    "Batches",
    "Bytes",
    "CifarLayout",
    "DataError",
    "Dataset",
    "Normalise",
    "crop_and_flip",
    "evaluation_batches",
    "load",
    "read_idx",
]
