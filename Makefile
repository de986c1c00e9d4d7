# Two commands need nothing but Python 3.11 or newer and make:
#   make run     set up, train ResNet-32 with each of the three systems, draw the figures (within 10 minutes on 2 cores)
#   make test    set up, then run every check (within 10 minutes on 2 cores)
# While working, `make check` runs ruff, mypy and the tests that are quick (within 2 minutes).
# PYTHON, VENV, NP (ranks), ARGS (more options for the job) and WORKERS (processes of pytest) can be given:
#   make run NP=4 ARGS="--batch-size 8"

PYTHON ?= python3
VENV ?= .venv
NP ?= 6
ARGS ?=
WORKERS ?= 2

BIN := $(VENV)/bin
MPIRUN := $(BIN)/mpirun
JOB := $(MPIRUN) -n $(NP) $(BIN)/python -m bench.resnet32_cifar100

DATA ?=

.PHONY: run methods timing scaling advise advise-validation layerwise hard-threshold ddp throughput figures calibrate validate busbw shaped-busbw cifar100 test check golden lint docs setup clean

run: setup
	$(JOB) $(ARGS)

# The time breakdown (Fig. 7b): the paper's clusters in virtual time beside what it states; then, on this machine, few
# iterations of each system without evaluation.
timing: setup
	$(BIN)/python -m bench.paper_timing
	$(JOB) --timing $(ARGS)

# Time per iteration against nodes and bandwidth: where compression pays. Options: make scaling ARGS="--cluster v100-8gpu"
scaling: setup
	$(BIN)/python -m bench.scaling $(ARGS)

# Draw every figure again from what was recorded, and the tables made of the same; trains and measures nothing.
figures: setup
	$(BIN)/python -m bench.figures results

# All kinds of methods on one cluster, in one table: trained for real, by the clocks of this machine and of the K80 nodes.
METHODS := rar,qsgd,gradiveq,powersgd:4,topk:0.01+ef,threshold:auto:0.01:warmup=20+ef,sign:scaled+ef,terngrad,natural,half,randomk:0.1,adacomp+ef
methods: setup
	$(JOB) --methods '$(METHODS)' --cluster gradiveq-k80 --iterations 72 --eval-every 24 --out results/all-methods $(ARGS)

# Should I compress? Three models on two clusters, about 2 minutes; and how far such advice is off, by real training
# between shaped hosts (Linux, as root; about 8 minutes). Own questions: python -m bench.advise --help
advise: setup
	$(BIN)/python -m bench.advise --examples $(ARGS)

advise-validation: setup
	$(BIN)/python -m bench.advise --validate $(ARGS)

# The experiments of two other papers, each within 10 minutes on 2 cores; ARGS="--paper" for their real size.
layerwise: setup
	$(BIN)/python -m bench.layerwise $(ARGS)

hard-threshold: setup
	$(BIN)/python -m bench.hard_threshold $(ARGS)

# PyTorch's communication hooks beside ours, under torchrun: times, bytes, accuracy (within 10 minutes on 2 cores).
ddp: setup
	$(BIN)/python -m bench.ddp $(ARGS)

# Elements per second on one core, of every compressor.
throughput: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m bench.compressor_throughput --out results/compressors $(ARGS)

# Describe this machine for the emulator in results/this-machine.toml, and print what the fits miss.
calibrate: setup
	$(MPIRUN) -n 2 $(BIN)/python -m ring.calibrate
	$(MPIRUN) -n 2 $(BIN)/python -m bench.calibrate

# The emulator's predictions beside the real ring between hosts with shaped links (Linux, as root; about 15 minutes).
validate: setup
	$(BIN)/python -m bench.validate $(ARGS)

# On such hosts: our ring beside MPI_Allreduce, Gloo and a plain TCP stream; GradiVeQ beside plain ring all-reduce.
shaped-busbw: setup
	$(BIN)/python -m bench.shaped_busbw $(ARGS)

# Our ring beside MPI_Allreduce, in nccl-tests' columns.
busbw: setup
	mkdir -p results/busbw
	$(MPIRUN) -n 2 $(BIN)/python -m ring.bench --json results/busbw/2-ranks.json
	$(MPIRUN) -n 6 $(BIN)/python -m ring.bench --json results/busbw/6-ranks.json

# The comparison on CIFAR-100 and Fig. 4 and 5 that are recorded in results/: make cifar100 DATA=folder-or-archive
CIFAR100 := --data $(DATA) --iterations 1100 --warmup 100 --sample 100 --compress 400 --eval-every 220
cifar100: setup
	$(if $(DATA),,$(error give the data: make cifar100 DATA=cifar-100-binary.tar.gz))
	$(JOB) $(CIFAR100) --out results/cifar100-6x16
	$(JOB) $(CIFAR100) --methods gradiveq --fit-slices all --ratio 8 --out results/cifar100-6x16-all-slices-ratio-8
	$(MPIRUN) -n 6 $(BIN)/python -m bench.record_gradients --data $(DATA) --out results/cifar100-gradients
	$(BIN)/python -m bench.figures results

# Fixtures of a file are made once, so a file stays in one process; those with slow tests come first. Hosts with shaped
# links are timed, so nothing else runs beside them.
PYTEST := $(BIN)/python -m pytest
IN_WORKERS := -n $(WORKERS) --dist loadfile --no-loadscope-reorder
test: setup
	$(MAKE) --jobs 2 --output-sync lint docs
	$(PYTEST) $(IN_WORKERS) --ignore tests/bench/shaped
	$(PYTEST) tests/bench/shaped

# The tests of pure functions and of workers that are threads: none that starts processes or trains for long.
check: lint
	$(PYTEST) $(IN_WORKERS) -m "not slow"

# What every method gives on every driver, against the record in tests/golden/.
golden: setup
	$(BIN)/python -m tests.golden.record --compare

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# What the docstrings say, as pages: build/docs/index.html. What pdoc can't resolve is an error, but for the fields of
# named tuples, whose annotations are texts without a module to it. All modules are named, as packages have an __all__.
DOCUMENTED := $(sort $(shell find ring gradiveq bench -name '*.py'))
docs: setup
	rm -rf build/docs
	PDOC_ALLOW_EXEC=1 $(BIN)/python -W error::UserWarning -W "ignore:Error parsing type annotation ForwardRef:UserWarning" \
		-W "ignore:The module specification:UserWarning" -m pdoc --docformat google --no-show-source --output-directory build/docs \
		$(subst /,.,$(patsubst %/__init__,%,$(basename $(DOCUMENTED))))

setup: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else f"Python 3.11 or newer is needed, {sys.executable} is {sys.version.split()[0]}; give another: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[mpich,figures,experiments,docs,dev]'
	touch $@

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis build *.egg-info
