"""The experiments: data, models, training loops, figures, and the commands that people run.

A module beside this one is a command, `python -m bench.NAME`; what it does is in a package:

    bench.job          the training job over MPI (`resnet32_cifar100`), its record, tables and figures
    bench.simulated    training with many workers in one process
    bench.papers       the experiments of three papers: `gradiveq`, `layerwise`, `hard_threshold`
    bench.hooks        PyTorch's communication hooks beside ours (`ddp`)
    bench.advice       should I compress? Costs, predictions, known risks, and how far off they are (`advise`)
    bench.virtual      predictions on described clusters, and the description of this machine (`scaling`, `calibrate`)
    bench.shaped       hosts behind shaped links on one machine, and what is measured there (`validate`, `shaped_busbw`)
    bench.kernels      how fast compressors are (`compressor_throughput`, `qsgd_throughput`, `device`, `pca_refit`)

    bench.common       launching, workers, command lines, files of results, statistics
    bench.drawing      the page and the looks of all figures
    bench.experiments  the grid of runs of an experiment, and what comes of them
    bench.data, bench.models, bench.clusters, bench.sample

Everything that was recorded is drawn again by `bench.figures`.

There are four training loops, as there are four kinds of workers. An experiment takes the first that has what it asks:

    bench.simulated.logistic   a convex problem to a known optimum, with 20 to 100 workers and 10⁵ iterations
    bench.simulated.training   accuracy of a network, in which only the mean gradient depends on the number of workers:
                               one replica in one process, no ring and no clock. `layerwise`, `hard_threshold`.
                               Workers of any method are a `gradiveq.here.Here` of families (`make_family`)
    bench.job.train            times and bytes on the ring, by this machine's clock and an emulated cluster's; each
                               worker is a process of MPI or a thread. `resnet32_cifar100`, `record_gradients`, `gantt`
    bench.hooks.runs           DistributedDataParallel with a communication hook, by its own clock, under torchrun.
                               `ddp`; `bench.advice.validation_ranks` times the same on hosts, without a data set
"""

from bench.common.optional_packages import say_what_is_missing

say_what_is_missing()
