# make demo   install into .venv, then distil digits-LT and show what the result is worth
# make test   install into .venv, then every check
# make campaign   600 seeded cases of bad input, into runs/campaign; repeat it to go on after a stop
# make campaign-faults   more than 200 kills, full disks, lost nodes and the like, into runs/faults; repeat it to go on
# make dist   wheel and sdist, into dist/, the same bytes each time; TAG=vX.Y.Z checks the version
# make try-dist   the wheel in an environment of its own: the demo
# make docs   the documentation site, into site/: open site/index.html
# PYTHON names the interpreter that .venv is made with (3.11 or newer).

PYTHON ?= $(firstword $(foreach p,python3.11 python3.12 python3.13 python3,$(shell command -v $(p))))
VENV := .venv
BIN := $(VENV)/bin
DEMO := runs/demo

.PHONY: demo test lint types unit campaign campaign-faults dist try-dist docs install develop clean

demo: install
	@$(BIN)/lad-dist demo --out $(DEMO)

test: lint types unit

lint: develop
	$(BIN)/ruff check lad_dist tests benchmarks
	$(BIN)/ruff format --check lad_dist tests benchmarks docs

types: develop
	$(BIN)/mypy

unit: develop
	$(BIN)/python tests/side_by_side.py

campaign: develop
	$(BIN)/python -m tests.campaign.campaign --seed 0 --cases 350 --out runs/campaign
	$(BIN)/python -m tests.campaign.campaign --seed 0 --cases 300 --kind "run file" --out runs/campaign

campaign-faults: develop
	$(BIN)/python -m tests.campaign.faults --seed 0 --out runs/faults

dist: develop
	@test -z "$(TAG)" || $(BIN)/python -c 'import lad_dist, sys; v = "v" + lad_dist.__version__; \
		sys.exit(0 if "$(TAG)" == v else "the tag is $(TAG), the version " + v)'
	rm -rf dist
	SOURCE_DATE_EPOCH=$${SOURCE_DATE_EPOCH:-$$(git log -1 --format=%ct)} $(BIN)/python -m hatchling build -d dist

try-dist:
	rm -rf dist/venv && $(PYTHON) -m venv dist/venv
	dist/venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt "$$(echo dist/*.whl)[all]"
	cd dist && venv/bin/lad-dist demo --out demo

docs: $(VENV)/installed-for-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

install: $(VENV)/installed

develop: $(VENV)/installed-for-tests

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "lad-dist needs Python 3.11 or newer; try: make PYTHON=/path/to/python3.12"; exit 1; }
	@$(PYTHON) -m venv $(VENV)

$(VENV)/installed: pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing into $(VENV) (torch and ray are large: a few minutes the first time)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[all]'
	@touch $@

$(VENV)/installed-for-tests: $(VENV)/installed
	@echo "installing what the tests need (Triton is large)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

# The site is built from the sources: the extra alone, without the package and torch.
$(VENV)/installed-for-docs: pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing what the site needs"
	@$(BIN)/python -c 'import tomllib; \
		print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["docs"], sep="\n")' \
		> $(VENV)/docs.txt
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -r $(VENV)/docs.txt
	@touch $@

clean:
	rm -rf $(VENV) runs site dist .pytest_cache .mypy_cache .ruff_cache
