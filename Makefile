# Two commands need nothing but python3 and the network: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
DOCS := .venv-docs
EMULATED := mixupe_kernels/_cuda_emulated.so
LOCKS := requirements.lock $(addprefix requirements/,tests.lock training.lock data.lock)
SOURCES := setup.py pyproject.toml CMakeLists.txt $(wildcard csrc/*.* csrc/*/*)

.PHONY: demo test test-matrix bench dist docs lint format clean

demo: $(READY)
	$(BIN)/python -m experiments demo

# Two processes of two threads share the cores: threads that spin while they wait would take them from those that work.
test: export OMP_WAIT_POLICY := PASSIVE
# Interpreted Triton must see TRITON_INTERPRET before triton is imported, so the operators' suite runs on it in processes of its own.
test: $(READY) $(EMULATED)
	$(BIN)/python -m pytest tests -q -n 2
	TRITON_INTERPRET=1 $(BIN)/python -m pytest tests/ops tests/test_triton_interpreter.py tests/test_fuzz.py -q -n 2

# LEG=torch-2.10 runs that one. MIXUPE_ENVIRONMENTS is a folder for their environments that outlives this checkout.
test-matrix: $(READY)
	$(BIN)/python -m tests.matrix $(LEG)

# Operators beside eager PyTorch, torch.compile and the libraries that are installed, under four minutes. BENCH="--benchmark-autosave"
# keeps the figures, BENCH="--benchmark-compare" puts the last ones kept beside them.
bench: $(READY)
	$(BIN)/python -m pytest bench/micro -q --benchmark-columns=median,iqr,ops,rounds --benchmark-sort=name $(BENCH)

# The sdist and the wheels, checked beside nothing but torch; LEG="torch-2.10 torch-2.15" also in those legs' environments.
dist: $(READY) $(VENV)/.dist
	$(BIN)/python -m tests.dist $(LEG)

$(VENV)/.dist: $(VENV)/.installed requirements/dist.lock
	$(BIN)/pip install --quiet -r requirements/dist.lock
	touch $@

# The site, in build/site. Its environment needs no torch: mkdocstrings reads the sources.
docs: $(DOCS)/.installed
	NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/mkdocs build
	@echo "build/site/index.html"

$(DOCS)/.installed: requirements/docs.lock
	$(PYTHON) -m venv $(DOCS)
	$(DOCS)/bin/pip install --quiet -r requirements/docs.lock
	touch $@

# .pre-commit-config.yaml is the list.
lint: $(READY)
	$(BIN)/pre-commit run --all-files

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $$(git ls-files csrc | grep -v CMakeLists)

# torch first and alone: the build needs it, and no build environment should fetch another one.
$(VENV)/.installed: $(LOCKS)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet $$(grep '^torch==' requirements.lock)
	$(BIN)/pip install --quiet -r requirements.lock
	$(BIN)/pip install --quiet --no-deps -r requirements/data.lock
	touch $@

$(READY): $(VENV)/.installed $(SOURCES)
	$(BIN)/pip install --quiet --no-build-isolation --no-deps -e .
	touch $@

# The CUDA kernels for CPU tensors (csrc/emulate): for tests, so no part of the package.
$(EMULATED): $(READY)
	$(BIN)/cmake --build build/package --target _cuda_emulated
	touch $@

clean:
	rm -rf $(VENV) $(DOCS) .matrix build dist mixupe_kernels/*.so *.egg-info
