# Two commands do everything: `make train` and `make test`. Each makes .venv, installs the exact versions of constraints.txt and reuses
# what is there. RUN=folder and ARGS="--method rl --slow.lr=1e-3" go on to `fst train`; PYTEST_ARGS to pytest, whose tests run in WORKERS
# processes (0: in one, as -x --pdb want it); PYTHON picks the interpreter.

PYTHON ?= python3
VENV ?= .venv
RUN ?= runs/mini
CONFIG ?= configs/mini/star_graph.yaml
ARGS ?=
PYTEST_ARGS ?=
WORKERS ?= 2
VLLM ?= .venv-vllm

PY := $(VENV)/bin/python
STAMP := $(VENV)/.installed
PIP := $(PY) -m pip --disable-pip-version-check -qq install --constraint constraints.txt

.PHONY: train laptop test runs emulated aot chaos parity soak paper fuzz trl vllm docs install wheel lint format types clean

train: $(STAMP)
	@$(PY) train.py $(CONFIG) --run-dir $(RUN) $$(test ! -e $(RUN)/fst-run.json || echo --resume) $(ARGS)
	@$(PY) -m fst_fast.cli report $(RUN)

# A real language model on a CPU: fetched and checked where the configuration's is one of ours, trained, its four cells and its contexts shown.
laptop: CONFIG = configs/laptop/short_answers.yaml
laptop: RUN = runs/laptop
laptop: $(STAMP)
	@$(PY) scripts/fetch_model.py --config $(CONFIG) $(ARGS)
	@$(PY) train.py $(CONFIG) --run-dir $(RUN) $$(test ! -e $(RUN)/fst-run.json || echo --resume) $(ARGS)
	@$(PY) scripts/show_contexts.py $(RUN)

test: $(STAMP)
	@$(PY) -m pytest -n $(WORKERS) --dist worksteal $(PYTEST_ARGS)

# Whole runs in processes of their own: resumed, killed (a sample), under DeepSpeed, from the examples and the documentation.
runs: $(STAMP)
	@$(PY) -m pytest -n $(WORKERS) --dist worksteal tests/integration $(PYTEST_ARGS)

# The GPU kernels without a GPU: Triton's in its interpreter, CUDA's on host threads.
emulated: $(STAMP)
	@$(PY) -m pytest -n $(WORKERS) --dist worksteal -m emulated tests/kernels $(addprefix tests/fst_fast/test_,kv_pool.py gpu_forward.py) $(PYTEST_ARGS)

# Every Triton kernel compiled for every GPU generation, head size and type, and what the compiler made of it: of which .ci/run does a sample.
aot: $(STAMP)
	@$(PY) scripts/aot_report.py
	@$(PY) scripts/aot_tree_attention.py
	@$(PY) scripts/aot_cascade_decode.py

# Every crash and fault, every layout of a checkpoint, two nodes: of which `make runs` runs a sample.
chaos: $(STAMP)
	@$(PY) -m pytest -m "not long" $(addprefix tests/integration/test_,crashes.py guard.py layouts.py nodes.py disk.py secrets.py stages.py vllm.py ahead.py recipe_resume.py agents.py) tests/fst_fast/test_optimiser.py tests/fst_fast/test_managed_server.py $(PYTEST_ARGS)

# The loss curves of every engine setting against the committed one, as a table.
parity: $(STAMP)
	@$(PY) -m pytest -m "" -s tests/integration/test_parity.py $(PYTEST_ARGS)

# 2,000 steps of a tiny run: memory, open files and child processes must not grow.
soak: $(STAMP)
	@$(PY) -m pytest -m long -s tests/integration/test_soak.py $(PYTEST_ARGS)

# The paper's five configurations, two cycles each on a random model and rows in the data sets' columns.
paper: $(STAMP)
	@$(PY) -m pytest -m "" tests/integration/test_paper.py $(PYTEST_ARGS)

# Random configurations, command lines and whatever else tests/fuzz draws: 20,000 of each, of which `make test` runs 200.
fuzz: $(STAMP)
	@FST_FUZZ_EXAMPLES=20000 $(PY) -m pytest -n $(WORKERS) tests/fuzz $(PYTEST_ARGS)

# TRL's own GRPO tests with our trainer in place of TRL's; TRL=folder, a checkout of it.
trl: $(STAMP)
	@$(PY) scripts/trl_tests.py $(TRL)

# The tests of rollout.backend=vllm against a real vLLM (its CPU build, in an environment of its own), of which `make test` asks a fake one, and with two
# real models.
vllm: MODELS = smollm2-135m qwen2.5-coder-0.5b
vllm: $(STAMP)
	@PYTHON=$(PYTHON) scripts/vllm_env.sh $(VLLM)
	@set -e; for model in $(MODELS); do $(PY) scripts/fetch_model.py $$model; done
	@FST_VLLM=$(abspath $(VLLM))/bin/vllm FST_MODELS="$(addprefix $(abspath models)/,$(MODELS))" $(PY) -m pytest -m "" tests/fst_fast/test_vllm_recorded.py $(addprefix tests/integration/test_vllm,.py _models.py) $(PYTEST_ARGS)

# The documentation as a site, in build/site; a broken link is an error. (--quiet would hide warnings from --strict as well.)
docs: $(STAMP)
	@NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict

install: $(STAMP)

# One wheel with both packages, in dist/.
wheel: $(STAMP)
	@$(PY) -m build --wheel --no-isolation --outdir dist .

lint: $(STAMP)
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .

format: $(STAMP)
	@$(PY) -m ruff check --fix .
	@$(PY) -m ruff format .

types: $(STAMP)
	@$(PY) -m mypy

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	find fst_fast kernels tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

# deepspeed is compiled against nothing but asks for torch while it is being built: hence torch first, then deepspeed without isolation.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "fst-fast needs Python 3.11 or newer; name one with PYTHON=..."; exit 1; }
	@test -x $(PY) || { echo "[1/4] virtual environment $(VENV)"; $(PYTHON) -m venv $(VENV); }
	@echo "[2/4] torch, setuptools, wheel"
	@$(PIP) torch setuptools wheel numpy
	@echo "[3/4] deepspeed"
	@$(PIP) --no-build-isolation deepspeed
	@echo "[4/4] fst-fast"
	@$(PIP) --editable '.[dev]'
	@$(PY) -c 'import fst_kernels.cpu as cpu; why = cpu.why_not(); why and print("C++ kernels for the CPU:", why, "- the slower PyTorch ones are taken")'
	@touch $@
