# Every target runs in the active virtual environment: pip install -c constraints.txt -e '.[test]'
PYTHON ?= python

.PHONY: test lint types bench wheel

test:
	pytest

lint:
	$(PYTHON) -m ruff check .

# cli/ and stores/ are nsp.cli and nsp.stores only once installed, and mypy reads sources: so it reads an installed copy.
types:
	rm -rf build
	$(PYTHON) -m pip install --quiet --no-deps --no-build-isolation --target build/installed .
	cd build/installed && $(PYTHON) -m mypy --config-file ../../pyproject.toml --cache-dir ../../.mypy_cache -p nsp

bench:
	$(PYTHON) benchmarks/sweeps.py

wheel:
	rm -rf build dist
	$(PYTHON) -m build --no-isolation --wheel
