# make train · make test · make lab · make docs   (each makes the environment first)
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
NOTEBOOKS := $(wildcard nbs/*.ipynb)

.PHONY: train test lab docs readme export lint clean

train: $(READY)
	$(BIN)/papermill nbs/train_tinyclip.ipynb out.ipynb -p stages 3

test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests -n 2 --dist worksteal

lab: $(READY)
	$(BIN)/jupyter lab nbs

# every notebook as a page that needs no kernel, in _docs/
docs: $(READY)
	$(BIN)/jupyter nbconvert --to html --output-dir _docs $(NOTEBOOKS)
	cp -r nbs/images _docs/

readme: $(READY)
	$(BIN)/python tests/readme.py > README.md

export: $(READY)
	$(BIN)/nbdev_export

lint: $(READY)
	$(BIN)/ruff check vlkd_lab tests

clean:
	rm -rf $(VENV) .cache runs _docs out.ipynb

$(READY): settings.ini setup.py
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	-git rev-parse --git-dir >/dev/null 2>&1 && $(BIN)/nbdev_install_hooks
	touch $(READY)
