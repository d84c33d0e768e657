# make demo    set up, then train the main job on two workers
# make test    set up, then run every test
# make test-faults  every fault of the list in docs/fault-tests.md; make test-kill: the long kill trial; make test-laws: whole jobs
# make test-fuzz    5,000 jobs drawn at random, each beside a plain loop; 600 more over MPI and Horovod
# make test-peers   LARS and LAMB step by step beside other projects' (installs them into .peers); make bench: the engine's speed here
# make test-cluster  runs on several hosts: namespaces of this machine with addresses and ssh servers (root; openssh-server, iproute2)
# make test-gpu  what one GPU can show, on this machine's; skipped where there is none
# make test-ecosystem  models and data sets of transformers, datasets, timm and torchvision (installs them into .ecosystem)
# make test-slurm  the batch files of docker/slurm under a real Slurm, which the tests start (Debian: slurm-wlm munge, as root)
# make test-jobs  every job through two growths and an evaluation, those of jobs/papers on small files of their official formats
# make test-sinks  TensorBoard, MLflow, W&B offline and MLPerf's checker (installs them into .sinks)
# make test-study  studies end to end: whole, shared, stopped, killed ten times, on two workers
# make test-docker  the image of docker/Dockerfile, built by buildah and run; needs root, buildah and debootstrap
# make lint    style, types, the documentation's links; make docs: the site, in build/site
# make install set up only: a virtual environment in .venv with torch, Horovod, mpi4py and this package

PYTHON ?= python3
VENV ?= .venv
# The release that the figures of the README were measured with; any torch >= 2.11 works. On Linux the package index gives
# the CUDA build; for a CPU build point pip at the index that has it and say TORCH=torch==2.13.0+cpu.
TORCH ?= torch==2.13.0
NP ?= 2

bin := $(VENV)/bin
stamp := $(VENV)/.installed
# Two processes share the tests of a suite: many tests wait, for a launcher, a limit or a killed process.
pytest2 := $(bin)/python -m pytest -n 2 --dist worksteal
pip := $(bin)/python -m pip --disable-pip-version-check
# Open MPI refuses root unless told twice; containers and CI machines often have no other user.
export OMPI_ALLOW_RUN_AS_ROOT = 1
export OMPI_ALLOW_RUN_AS_ROOT_CONFIRM = 1
# mpirun of the tests: more ranks than cores is meant, and they need not be reachable from other hosts.
mpirun := mpirun --oversubscribe --mca oob_tcp_if_include lo --mca btl_tcp_if_include lo

.PHONY: help install demo test test-single test-parallel test-runs test-faults test-kill test-laws test-fuzz test-peers test-ecosystem test-jobs test-slurm test-cluster test-docker test-sinks test-study test-gpu bench coverage docs lint clean

help:
	@sed -n 's/^# \(make .*\)/\1/p' Makefile

install: $(stamp)

$(stamp): setup.cfg setup.py docker/install-system.sh docker/install-horovod.sh
	docker/install-system.sh $(PYTHON)
	[ -x $(bin)/python ] || $(PYTHON) -m venv $(VENV)
	$(pip) install --quiet '$(TORCH)' 'setuptools>=77' wheel
	$(pip) install --quiet --no-build-isolation -e '.[test,lint,docs]'
	docker/install-horovod.sh $(bin)/python
	touch $@

demo: $(stamp)
	PATH="$(CURDIR)/$(bin):$$PATH" horovodrun -np $(NP) python -m hvdlarge.train jobs/digits.yaml --fresh

# The tests of one process and the whole runs at once: both wait at times, for launchers and for limits.
test: $(stamp)
	$(MAKE) --jobs 2 test-single test-runs
	$(MAKE) test-parallel

# Threads that wait do so without a core, which the other processes need: those of torch by their policy; those of numpy ask again
# and again for some time after their start, so there are none.
test-single test-parallel test-runs: export OMP_WAIT_POLICY = passive
test-single test-parallel test-runs: export OPENBLAS_NUM_THREADS = 1

test-single: $(stamp)
	$(pytest2) tests/single --doctest-modules hvdlarge

# Every model, data set, loss and form of samples in tests/parallel on 2 and 3 workers, against one; on 4 what powers of two promise.
test-parallel: $(stamp)
	$(mpirun) -np 2 $(bin)/python -m pytest --color=no tests/parallel
	$(mpirun) -np 3 $(bin)/python -m pytest --color=no tests/parallel
	$(mpirun) -np 4 $(bin)/python -m pytest --color=no tests/parallel -k "not test_own_parts or exact"

# Whole runs, and the short ones of those in which something goes wrong on purpose. A run keeps less than a core busy.
test-runs: $(stamp)
	PATH="$(CURDIR)/$(bin):$$PATH" $(bin)/python -m pytest -n 4 --dist worksteal tests/faults tests/integration tests/slurm tests/cluster -m "not long"

# What goes wrong on purpose, all of it (the suites after tests/faults are part of the default suite too).
test-faults: $(stamp)
	$(bin)/python -m pytest tests/faults
	$(bin)/python -m pytest tests/single/config/test_job_file.py tests/single/config/test_job_mutations.py tests/single/checkpoint/test_folder.py tests/single/optim
	$(mpirun) -np 2 $(bin)/python -m pytest --color=no tests/parallel/test_consistency.py
	PATH="$(CURDIR)/$(bin):$$PATH" $(bin)/python -m pytest tests/integration/test_bad_input.py tests/integration/test_main_job.py

# 51 runs killed at random and restarted, then 20 with another number of workers at each restart: 10 to 14 minutes.
test-kill: $(stamp)
	$(bin)/python trials/kill_trial.py --runs 51
	$(bin)/python trials/kill_trial.py --runs 20 --change-workers --seed 1

# The three laws on whole jobs at 1, 2, 3 and 4 workers: 9 to 11 minutes.
test-laws: $(stamp)
	$(bin)/python trials/law_trial.py

# The laws on jobs drawn at random, ranks as threads; then on 600 more over MPI and Horovod: about 20 minutes. A violation is
# written to violations.jsonl; `python trials/laws.py --replay FILE` judges it again.
test-fuzz: $(stamp)
	$(bin)/python trials/laws.py --jobs 5000 --processes 2
	$(mpirun) -np 2 $(bin)/python trials/laws.py --jobs 300 --seed 1
	$(mpirun) -np 3 $(bin)/python trials/laws.py --jobs 300 --seed 2

# Other projects' LARS and LAMB, in a folder of their own. timm's package wants torchvision, pytorch_optimizer a torch that is there:
# both without what they depend on.
test-peers: $(stamp)
	[ -d .peers ] || $(pip) install --quiet --target .peers optax paddlepaddle
	[ -d .peers/timm ] || $(pip) install --quiet --target .peers --no-deps pytorch_optimizer timm
	PYTHONPATH=.peers $(bin)/python -m pytest tests/peers

# By mpirun, horovodrun and hvdlarge launch on two and three hosts, with hosts that are lost, out of reach, slow or not alike: about six
# minutes. Skipped, with the reason, where a machine permits no namespaces. The default suite has the short ones.
test-cluster: export OMP_WAIT_POLICY = passive
test-cluster: export OPENBLAS_NUM_THREADS = 1
test-cluster: $(stamp)
	PATH="$(CURDIR)/$(bin):$$PATH" $(bin)/python -m pytest --durations=0 tests/cluster

# The sinks of other packages, in a folder of its own.
test-sinks: $(stamp)
	[ -d .sinks ] || $(pip) install --quiet --target .sinks tensorboard mlflow-skinny wandb mlperf-logging || { rm -rf .sinks; exit 1; }
	PYTHONPATH="$(CURDIR)/.sinks" $(bin)/python -m pytest tests/single/telemetry
	PYTHONPATH="$(CURDIR)/.sinks" $(bin)/python -m pytest tests/integration/test_sinks.py

# All that concerns studies, and two processes on one of them killed ten times: about 12 minutes. The default suite has the short ones.
test-study: $(stamp)
	$(pytest2) tests/single/study
	PATH="$(CURDIR)/$(bin):$$PATH" $(pytest2) tests/integration/test_studies.py
	$(bin)/python trials/study_kill_trial.py --kills 10

# Workers that share the GPU need a Horovod without NCCL: HOROVOD_GPU_OPERATIONS=none make install, in another VENV.
test-gpu: $(stamp)
	$(pytest2) tests/gpu

# Models and data sets of other libraries, unchanged, and complete jobs of them: 6 minutes, with 480 MB in a folder of their own (install.py
# says what is special about it).
test-ecosystem: export OMP_WAIT_POLICY = passive
test-ecosystem: $(stamp)
	$(bin)/python tests/ecosystem/install.py .ecosystem
	PYTHONPATH=.ecosystem/site-packages $(mpirun) -np 1 $(bin)/python -m pytest --color=no tests/ecosystem
	PYTHONPATH=.ecosystem/site-packages $(mpirun) -np 2 $(bin)/python -m pytest --color=no tests/ecosystem

# Each job of jobs, jobs/papers and jobs/small on little data, through two growths and an evaluation: about nine minutes.
test-jobs: $(stamp)
	$(mpirun) -np $(NP) $(bin)/python -m pytest --color=no tests/jobs

# Runs on two nodes, time limits, a lost node, requeues: about eight minutes, most of it spent waiting for Slurm.
test-slurm: $(stamp)
	$(bin)/python -m pytest tests/slurm

# The image, built without a Docker engine and run: eight minutes the first time, two when buildah has its layers. tests/support/images.py says what
# can be set. The same torch as that of the tests is installed, from where pip finds it here.
test-docker: $(stamp)
	$(bin)/python -m pytest -s tests/docker

# How much of the package the tests of one process reach; the other suites run it in processes of its own.
coverage: $(stamp)
	$(bin)/python -m pytest tests/single --doctest-modules hvdlarge --cov hvdlarge --cov-report term

# Figures, not tests: the engine against the memory's limit, a bare loop, a stock Horovod loop and DDP: about 12 minutes.
bench: $(stamp)
	$(bin)/python -m hvdlarge.bench lars
	mpirun -np 2 $(bin)/python -m hvdlarge.bench step
	mpirun -np 2 $(bin)/python -m hvdlarge.bench step jobs/digits.yaml batch.base=128 batch.micro=64 --steps 100
	mpirun -np 2 $(bin)/python -m hvdlarge.bench allreduce
	PATH="$(CURDIR)/$(bin):$$PATH" $(bin)/python benchmarks/against_peers.py

lint: $(stamp) docs
	$(bin)/ruff check .
	$(bin)/ruff format --check .
	$(bin)/mypy

# The site, in build/site; a dead link or an undocumented name of the API fails.
docs: $(stamp)
	NO_MKDOCS_2_WARNING=1 $(bin)/mkdocs build --strict --quiet

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .ruff_cache .mypy_cache
