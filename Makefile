# Two commands matter: `make demo` and `make test`. Both make .venv first, and only when requirements changed.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP_INSTALL := $(BIN)/pip install --quiet --disable-pip-version-check --constraint $(VENV)/constraints.txt
DATA := data/demo
RUN := runs/chest_xray_fedavg

.PHONY: help install demo compare poc test every-job check format clean

help:
	@echo 'make demo    three synthetic hospitals train one chest X-ray model; ends in a report'
	@echo 'make compare training alone, pooled and federated on small synthetic hospitals; ends in a report'
	@echo 'make poc     the real federation as separate processes on this machine'
	@echo 'make test    the whole test suite'
	@echo 'make every-job  every job of jobs/ in the simulator and in POC, compared; not part of the suite'
	@echo 'make check   lint, format and types'
	@echo 'make format  format the code'
	@echo 'make clean   delete .venv, data/demo, data/compare and runs/'

install: $(VENV)/installed

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo 'error: Python 3.11 or newer is needed; name one with make PYTHON=python3.11' >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)

# What the kits run on, without the hashes and PyTorch's build, which differ from one platform to another.
$(VENV)/constraints.txt: provisioning/requirements.lock | $(VENV)/bin/python
	sed -n 's/^\([^ #]*==[^ +]*\).*/\1/p' $< > $@

$(VENV)/installed: requirements.txt pyproject.toml $(VENV)/constraints.txt
	$(PIP_INSTALL) --requirement requirements.txt --editable .
	@touch $@

$(VENV)/installed-test: $(VENV)/installed
	$(PIP_INSTALL) --editable '.[test]'
	@touch $@

demo: $(VENV)/installed
	$(BIN)/python -m fedimaging data synth --out $(DATA)
	$(BIN)/python -m fedimaging simulate jobs/chest_xray_fedavg --data $(DATA) --workspace $(RUN)

compare: $(VENV)/installed
	$(BIN)/python -m fedimaging data synth --out data/compare --cases 240,200,160 --matrix 96
	$(BIN)/python -m fedimaging compare jobs/chest_xray_fedavg jobs/chest_xray_fedbn --data data/compare \
		--set rounds=10 --set network.name=ResNet18 --set task.image_size=48 --set training.batch_size=8

poc: $(VENV)/installed
	$(BIN)/python -m poc up

test: $(VENV)/installed-test
	$(BIN)/python -m pytest

every-job: $(VENV)/installed-test
	$(BIN)/python -m pytest -m slow -v

check: $(VENV)/installed-test
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(VENV)/installed-test
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) $(DATA) data/compare runs
