# make demo    the whole street on built-in pictures, a few minutes on a CPU
# make test    the tests
# Both first make a virtual environment in .venv and install requirements.txt there.

PYTHON ?= python3
RUN = .venv/bin/python

.venv/installed: requirements.txt
	$(PYTHON) -m venv .venv
	$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

demo: .venv/installed
	$(RUN) demo.py

test: .venv/installed
	$(RUN) -m pytest -q

.PHONY: demo test
