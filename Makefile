# make demo   pictures from words and words from pictures, with the model inside the package
# make test   the whole test suite
# make lint   style and types
# make retrieval-study   with and without retrieved documents, three seeds each
# make emoji-retrieval-study DATA=PATH   the same of emoji drawings, after configs/emoji
# make clean  remove what these made, the environment included
#
# Each sets up the virtual environment .venv by itself, once, from the versions in constraints.txt, and is safe
# to run again or to interrupt. PYTHON=... chooses another interpreter (3.10 to 3.13). Where pip would fetch
# torch with CUDA and the machine has no GPU, this saves gigabytes:
#   PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu make demo

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RUN := $(VENV)/.installed
DEV := $(VENV)/.installed-dev
PIP := $(BIN)/python -m pip --disable-pip-version-check

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test lint typecheck wheel retrieval-study emoji-retrieval-study clean

help:
	@sed -n '1,6s/^# //p' Makefile

demo: $(RUN)
	@echo "==> Drawing and captioning; the contact sheet goes to demo-output/"
	$(BIN)/python -m cm3.eval.demo --out demo-output

test: $(DEV)
	@echo "==> Tests"
	$(BIN)/python -m pytest

lint: $(DEV) typecheck
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# mypy sees the package as it is installed: all of it under the one name cm3
typecheck: wheel
	@echo "==> Types"
	rm -rf .typecheck
	$(PIP) install --quiet --no-deps --target .typecheck dist/*.whl
	cd .typecheck && ../$(BIN)/mypy --config-file ../pyproject.toml -p cm3

wheel: $(DEV)
	@echo "==> Wheel"
	rm -rf build dist
	$(PIP) wheel --quiet --no-deps --no-build-isolation --wheel-dir dist .

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' || \
		{ echo "$(PYTHON) is not Python 3.10 to 3.13; name one that is: make PYTHON=python3.11 ..." >&2; exit 1; }
	@echo "==> Virtual environment $(VENV)"
	$(PYTHON) -m venv $(VENV)

# torch comes first: packages that build against it then find it, and nothing moves its version
$(RUN): setup.py constraints.txt | $(BIN)/python
	@echo "==> Installing torch"
	$(PIP) install -c constraints.txt torch
	@echo "==> Installing cm3 and what it needs"
	$(PIP) install -c constraints.txt -e .
	@touch $@

$(DEV): $(RUN)
	@echo "==> Installing the development tools"
	$(PIP) install -c constraints.txt -e ".[dev]"
	@touch $@

STUDY := runs/retrieval
retrieval-study: $(RUN)
	$(BIN)/cm3 index build scenes --limit 20000 --out $(STUDY)/memory
	$(BIN)/cm3 index build scenes --split novel --limit 2000 --out $(STUDY)/novel_memory
	$(BIN)/cm3 prepare configs/retrieval/prepare_plain.yaml
	$(BIN)/cm3 prepare configs/retrieval/prepare_retrieved.yaml
	set -e; for kind in plain retrieved; do for seed in 0 1 2; do run=$(STUDY)/$${kind}_$$seed; \
	$(BIN)/cm3 train configs/retrieval/model.yaml --data.train $(STUDY)/$$kind/train --seed $$seed --output $$run; \
	$(BIN)/cm3 eval configs/retrieval/eval.yaml --model $$run/model --output $$run/eval; done; done
	$(BIN)/cm3 compare --group plain $(STUDY)/plain_*/eval --group retrieved $(STUDY)/retrieved_*/eval

# needs the tokenizers, the shards of train and the encoder that the runs of configs/emoji leave in runs/emoji
DATA ?= data/emoji
EMOJI := runs/emoji_retrieval
emoji-retrieval-study: $(RUN)
	set -e; for seed in 0 1 2; do \
	$(BIN)/cm3 train configs/emoji_retrieval/model.yaml --seed $$seed --output $(EMOJI)/plain_$$seed; done
	test -e $(EMOJI)/memory/memory.json || $(BIN)/cm3 index build $(DATA) --text-columns caption \
	--encoder runs/emoji/retriever/encoder --model $(EMOJI)/plain_0/model --out $(EMOJI)/memory
	test -e $(EMOJI)/concept_memory || { rm -rf $(EMOJI)/unfinished && cp -r $(EMOJI)/memory $(EMOJI)/unfinished && \
	$(BIN)/cm3 index append $(EMOJI)/unfinished $(DATA) --split test --text-columns caption \
	--where split_kind=concept --where style=twemoji,openmoji --model $(EMOJI)/plain_0/model && \
	mv $(EMOJI)/unfinished $(EMOJI)/concept_memory; }
	$(BIN)/cm3 prepare configs/emoji_retrieval/prepare_retrieved.yaml --data.path $(DATA)
	set -e; for seed in 0 1 2; do \
	$(BIN)/cm3 train configs/emoji_retrieval/model.yaml --seed $$seed --output $(EMOJI)/retrieved_$$seed \
	--data.train $(EMOJI)/retrieved/train; done
	set -e; for kind in plain retrieved; do for seed in 0 1 2; do run=$(EMOJI)/$${kind}_$$seed; \
	$(BIN)/cm3 eval configs/emoji_retrieval/eval.yaml --model $$run/model --output $$run/eval \
	--retrieved_likelihood.pairs.source.path $(DATA) --retrieved_picture_matching.pairs.source.path $(DATA); done; done
	$(BIN)/cm3 compare --group plain $(EMOJI)/plain_*/eval --group retrieved $(EMOJI)/retrieved_*/eval

clean:
	rm -rf $(VENV) build dist .typecheck demo-output *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find cm3 tokenizers training eval tests -name __pycache__ -type d -prune -exec rm -rf {} +
