# Every target runs in the active virtual environment: pip install -c constraints.txt -e '.[test]'
PYTHON ?= python
BUILT = build/installed build/lib build/bdist.*

.PHONY: test lint installed types docs bench wheel

test:
	pytest

lint:
	$(PYTHON) -m ruff check .

# cli/, stores/ and recipes/ are nsp.* only once installed, and mypy and the documentation read sources: so they read an
# installed copy. build/artifacts, where tests leave pictures, stays.
installed:
	rm -rf $(BUILT)
	$(PYTHON) -m pip install --quiet --no-deps --no-build-isolation --target build/installed .

types: installed
	cd build/installed && $(PYTHON) -m mypy --config-file ../../pyproject.toml --cache-dir ../../.mypy_cache -p nsp

# The site, in site/. -P keeps the clone's nsp/ from standing before the installed copy.
docs: installed
	NO_MKDOCS_2_WARNING=1 PYTHONPATH=build/installed $(PYTHON) -P -m mkdocs build --strict

bench:
	$(PYTHON) benchmarks/sweeps.py

wheel:
	rm -rf $(BUILT) dist
	$(PYTHON) -m build --no-isolation --wheel
