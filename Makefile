# make demo: the whole pipeline on the embedded model.  make test: the default tests.  Both set up .venv first.

PYTHON ?= python3
RUFF = .venv/bin/ruff

.PHONY: help demo test test-thorough test-slow test-llama-cpp test-gpu test-flower test-flower-faults test-tasks test-trackers test-chat-page crashtest bench bench-gpu bench-quality fuzz docs docs-serve method-bytes lint format compare-commits clean-venv

help:
	@echo "make demo        run the whole pipeline on the embedded model and data"
	@echo "make test        run the default tests: 4 minutes on 2 cores"
	@echo "make test-thorough  run what CI runs besides: every method, every kind of damage"
	@echo "make test-slow   run the tests on the embedded model and Dolly: minutes (FEDLORA_DOLLY names the file)"
	@echo "make test-llama-cpp  build llama.cpp once (cmake and a compiler, minutes), and compare its answers from exports with ours"
	@echo "make test-gpu    run the tests that need a CUDA device: a minute; the CPU's side of each is in make test"
	@echo "make test-flower  run SuperLink and SuperNodes on the loopback: minutes; make test-flower-faults kills some"
	@echo "make test-tasks  run the tests of standard tasks, on the embedded model too, with lm-eval in build/tasks: 3 minutes"
	@echo "make test-trackers  install TensorBoard, W&B, MLflow and trackio, each for itself, and read back what they get: minutes"
	@echo "make test-chat-page  install gradio and playwright, and open the page of fedlora chat --web in Chromium: a minute"
	@echo "make crashtest   200 kills, a full disk, damaged files, signals, parallel starts, each compared: 10 to 30 minutes"
	@echo "make bench       measure everything on the CPU and write docs/benchmarks.md: 20 minutes (FEDLORA_DOLLY as above)"
	@echo "make bench-gpu   the same on a CUDA device"
	@echo "make bench-quality  held-out loss against the usual way, 3 seeds: 20 minutes (FEDLORA_DOLLY as above)"
	@echo "make fuzz        damage 75,000 adapter files and see that each is refused or read right: a few minutes"
	@echo "make compare-commits OLD=0a2484f  train every method with an old commit and this tree, and compare: 20 minutes"
	@echo "make docs        write docs/reference/methods.md and the README's list of methods from the method table: a second"
	@echo "make docs-serve  show the site of docs/ at http://127.0.0.1:8000"
	@echo "make method-bytes  measure what each method sends and write it to docs/methods.md: 5 minutes"
	@echo "make lint        check style and types"
	@echo "make format      rewrite the code in the project's style"
	@echo "make clean-venv  delete .venv"
	@echo "Another Python:  make demo PYTHON=python3.12"

demo: .venv/installed
	.venv/bin/fedlora demo

# two processes, each with the tests of whole files: a file's model and its finished runs are made once
PYTEST = .venv/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test: .venv/installed-dev
	$(PYTEST)

test-thorough: .venv/installed-dev
	$(PYTEST) -m thorough

# -rs shows why a test was skipped: what it needs is not in the repository
test-slow: .venv/installed-dev
	.venv/bin/python -m pytest -m slow -rs

# beside .venv, which its wheel need not fit; without its tools, server and image code
build/llama-cpp/installed: .venv/installed-dev
	CMAKE_ARGS="-DLLAVA_BUILD=OFF -DMTMD_BUILD=OFF -DLLAMA_BUILD_TOOLS=OFF -DLLAMA_BUILD_SERVER=OFF" \
		.venv/bin/pip install --no-deps --target build/llama-cpp llama-cpp-python==0.3.36 diskcache==5.6.3
	touch $@

test-llama-cpp: build/llama-cpp/installed
	PYTHONPATH=build/llama-cpp .venv/bin/python -m pytest -m slow -rs tests/stages/test_export_elsewhere.py

test-gpu: .venv/installed-dev
	.venv/bin/python -m pytest -m gpu -rs tests/gpu

test-flower: .venv/installed-dev
	.venv/bin/python -m pytest -m flower --durations=20 tests/flower/test_deployment.py

test-flower-faults: .venv/installed-dev
	.venv/bin/python -m pytest -m flower --durations=10 tests/flower/test_deployment_faults.py

# lm-eval brings 300 MB and an older python-dateutil: it has an environment of its own, which sees the packages of .venv
test-tasks: build/tasks/installed
	PYTHONPATH=src build/tasks/bin/python -m pytest -m "not slow" \
	  tests/evaluation/test_asked_model.py tests/stages/test_tasks.py tests/api/test_docstrings.py
	PYTHONPATH=src build/tasks/bin/python -m pytest -m slow -rs tests/stages/test_tasks.py

test-trackers: .venv/installed-dev
	tools/test_trackers.sh

test-chat-page: .venv/installed-dev
	tools/test_chat_page.sh

# the part on small disks mounts them, which needs root; without it that part is skipped and says so
crashtest: .venv/installed
	.venv/bin/python tools/crashtest.py

# without a file of Dolly rows only short rows are timed
bench: .venv/installed-dev
	.venv/bin/python benchmarks/bench.py $(if $(FEDLORA_DOLLY),--data "$(FEDLORA_DOLLY)")

bench-gpu: .venv/installed-dev
	.venv/bin/python benchmarks/bench.py --device cuda $(if $(FEDLORA_DOLLY),--data "$(FEDLORA_DOLLY)")

bench-quality: .venv/installed-dev
	.venv/bin/python benchmarks/quality.py $(if $(FEDLORA_DOLLY),--data "$(FEDLORA_DOLLY)")

# MUTATIONS files of each of three kinds; another SEED damages them in other places
fuzz: .venv/installed
	.venv/bin/python tools/fuzz_adapters.py --mutations $(or $(MUTATIONS),25000) --seed $(or $(SEED),0)

# both halves say what differs; EXCEPT names what is meant to, as scaffold,multi_krum/plain
compare-commits: .venv/installed
	@bad=0; for part in "" --resume; do \
	  .venv/bin/python tools/compare_commits.py --old "$(OLD)" --except "$(EXCEPT)" $$part || bad=1; \
	done; exit $$bad

docs: .venv/installed
	.venv/bin/python tools/make_docs.py

docs-serve: .venv/installed-dev
	NO_MKDOCS_2_WARNING=1 .venv/bin/python -m mkdocs serve --strict

# a trained model: the residuals of fedex have fewer ranks on one that has learned nothing
method-bytes: .venv/installed build/small_model/model.safetensors
	.venv/bin/python tools/method_bytes.py build/small_model

build/small_model/model.safetensors: | .venv/installed
	.venv/bin/python studies/small_model.py --folder build/small_model

lint: .venv/installed-dev
	$(RUFF) check .
	$(RUFF) format --check .
	.venv/bin/pyright

format: .venv/installed-dev
	$(RUFF) check --fix .
	$(RUFF) format .

clean-venv:
	rm -rf .venv

# torch comes first and alone: asked for together with the rest, pip may choose a build with gigabytes of CUDA libraries
.venv/installed: export PIP_QUIET = 1
.venv/installed: export PIP_DISABLE_PIP_VERSION_CHECK = 1
.venv/installed: requirements.txt pyproject.toml $(wildcard src/fedlora/llm/fast/_kernels.c)
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || { \
	  echo "error: fedlora needs Python 3.11, 3.12 or 3.13, and $(PYTHON) is $$($(PYTHON) --version 2>&1)" >&2; \
	  echo "  hint: make $(or $(MAKECMDGOALS),demo) PYTHON=python3.12" >&2; exit 1; }
	@echo "Installing the pinned packages into .venv: this takes some minutes."
	@$(PYTHON) -m venv .venv
	.venv/bin/pip install torch==2.13.0
	.venv/bin/pip install -r requirements.txt
	.venv/bin/pip install -e . --no-deps
	@touch $@

.venv/installed-dev: export PIP_QUIET = 1
.venv/installed-dev: export PIP_DISABLE_PIP_VERSION_CHECK = 1
.venv/installed-dev: .venv/installed requirements-dev.txt
	.venv/bin/pip install -r requirements-dev.txt
	@touch $@

build/tasks/installed: export PIP_QUIET = 1
build/tasks/installed: export PIP_DISABLE_PIP_VERSION_CHECK = 1
build/tasks/installed: .venv/installed-dev pyproject.toml
	.venv/bin/python -m venv build/tasks
	.venv/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))" > \
	  "$$(build/tasks/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/project.pth"
	build/tasks/bin/pip install lm-eval==0.4.13
	@touch $@
