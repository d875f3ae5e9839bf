# make train · make test · make lab · make docs   (each makes the environment first) · make test-gpu · make campaign · make test-versions   (makes its own)
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: train test test-gpu test-versions faults campaign browser lab docs outputs readme export floors lint screenshots site-pictures pictures clean

train: $(READY)
	$(BIN)/papermill nbs/train_tinyclip.ipynb out.ipynb -p stages 3

# compiled modules are kept, also where the environment says otherwise: many processes import the same ones
test: browser
	PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests -n 2 --no-loadscope-reorder

# what is promised of GPUs, in at most ten minutes: a table, which results/benchmark_gpu shows; without a GPU the same checks, small
test-gpu: $(READY)
	$(BIN)/python tools/gpu.py nbs/results/benchmark_gpu.json

# the tests in throw-away environments: the oldest and the newest torch that settings.ini admits, on two Pythons; hours, and 6 GB at a time
# VERSIONS="3.12:2.11.0 3.10:newest" chooses some, TESTS="tests/test_losses.py" which tests
test-versions:
	$(PYTHON) tools/versions.py --tests "$(or $(TESTS),tests)" $(VERSIONS)

# who notices a fault: a page, a test or nothing (about an hour; NAMES=losses,gates chooses some of tests/faults/)
faults: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python tests/faults.py $(NAMES)

# hostile parameters, shards and run folders, and crashes at every write (about 20 minutes; what is done is not done again)
# SEED=7 for others, TRIES="shards --tries 5000" for one kind
campaign: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python tests/campaign --seed $(or $(SEED),0) $(TRIES)

# what the browser tests need: Chromium (Debian's package) and, to try both generations, ipykernel 6 in a folder of its own
browser: $(READY)
	@if ! command -v chromium chromium-browser google-chrome >/dev/null; then \
	  if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	    apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends chromium >/dev/null \
	      || echo "Chromium could not be installed: the browser tests will be skipped"; \
	  else echo "No Chromium here, and no right to install it (apt-get install chromium): the browser tests will be skipped"; fi; fi
	@[ -d .cache/ipykernel6/ipykernel ] || $(BIN)/python -m pip install --quiet --no-deps --target .cache/ipykernel6 "ipykernel<7" \
	  || echo "ipykernel 6 could not be installed: the browser tests run under the newest alone"

lab: $(READY)
	$(BIN)/jupyter lab nbs/getting_started.ipynb

# the website, in _docs/; where Quarto is installed, nbdev_docs makes it with Quarto from the same pages and the same _quarto.yml
docs: $(READY)
	$(BIN)/python tools/build_site.py

# the outputs of job pages on the website: runs the job notebooks whose code has changed (minutes each; NAMES="train_dlip" chooses some)
outputs: $(READY)
	$(BIN)/python tools/job_outputs.py $(NAMES)

# the pictures with which tests/test_figures.py compares static figures, drawn anew; look at what has changed (NAMES="plan gates" draws some)
pictures: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python tests/figures.py $(NAMES)

# the pictures of README and docs, taken from a real page (a few minutes)
screenshots: browser
	PYTHONPATH=tests $(BIN)/python tools/screenshots.py

# pictures of the website to be looked at, in _docs_pictures/: three widths, light and dark (make docs first)
site-pictures: browser
	PYTHONPATH=tests $(BIN)/python tools/look_at_site.py _docs_pictures

readme: $(READY)
	$(BIN)/python tools/readme.py > README.md

export: $(READY)
	$(BIN)/python tools/pages.py export

# the library's notebooks, numbered in the order in which _quarto.yml lists them
floors: $(READY)
	$(BIN)/python tools/floors.py
	$(BIN)/python tools/pages.py export
	$(BIN)/python tools/readme.py > README.md

lint: $(READY)
	$(BIN)/ruff check vlkd_lab tests tools

clean:
	rm -rf $(VENV) .cache runs _docs _docs_pictures _proc nbs/nbdev.yml out.ipynb

$(READY): settings.ini setup.py
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	-git rev-parse --git-dir >/dev/null 2>&1 && $(BIN)/nbdev_install_hooks
	touch $(READY)
