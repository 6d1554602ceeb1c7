# make demo   converts a small real model there and back, and shows it
# make tutorial  a small model is converted, checked, fine-tuned and asked about pictures
# make test   style, types and every test but the longest; the same everywhere, seeds included
# make quick  the tests that take a moment
# make nightly  the longest proofs, and all properties with seeds that are new each time
# make mindspore-env  a CPU MindSpore for the tests that compare with it; prints its interpreter
# make npu-wheel  torch_npu in a folder of its own, for tests that run beside it; prints the folder
# make transformers4  transformers 4.57 in a folder of its own, for tests beside it; prints the folder
# make megatron12  the optimizers of Megatron-Core 0.12.1 go on from checkpoints that were resplit
# make docs   the site, below site/; a broken link is an error
# make release-check  wheel and source package: built, checked, installed, tried
# make bench  conversions against `cp -r`, side by side (writes 18 GB below benchmarks/data)

PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python

# The tests start hundreds of processes: none of them should compile what another has compiled.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo tutorial test quick nightly lint style types suite docs release-check mindspore-env npu-wheel transformers4 megatron12 bench clean

$(VENV)/ready: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 10), "Python 3.10 or later is needed"'
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

demo: $(VENV)/ready
	$(PY) examples/demo.py

tutorial: $(VENV)/ready
	$(PY) examples/tutorial.py tutorial-output

lint: style types

style: $(VENV)/ready
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

types: $(VENV)/ready
	$(VENV)/bin/pyright --pythonpath $(PY)

suite: $(VENV)/ready
	$(PY) -m pytest -n auto --dist worksteal

# Types are looked at beside the tests: pyright alone would leave all cores but one idle.
test: style
	@$(MAKE) --no-print-directory -j 2 types suite

quick: $(VENV)/ready
	$(PY) -m pytest -n auto --dist worksteal -m 'not slow and not nightly'

nightly: $(VENV)/ready
	$(PY) -m pytest -n auto --dist worksteal -m 'nightly or hypothesis' --hypothesis-profile=nightly

docs: $(VENV)/ready
	$(PY) docs/generate.py
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --quiet

release-check:
	$(PYTHON) packaging/release.py

mindspore-env:
	@tests/with_mindspore/setup.sh .venv-mindspore

npu-wheel: $(VENV)/ready
	@tests/with_torch_npu/setup.sh $(PY) .npu-wheel

transformers4: $(VENV)/ready
	@tests/with_transformers4/setup.sh $(PY) .transformers4

megatron12: $(VENV)/ready
	$(PY) -m pip install --quiet --disable-pip-version-check --no-deps --target .megatron12 megatron-core==0.12.1
	PYTHONPATH=.megatron12 $(PY) -m pytest -n 0 -m "" tests/integration/test_megatron_optimizer.py

bench: $(VENV)/ready
	$(PY) benchmarks/convert.py

clean:
	rm -rf $(VENV) .venv-mindspore .npu-wheel .transformers4 .megatron12 benchmarks/data tutorial-output
