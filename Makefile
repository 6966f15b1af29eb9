# make demo          the whole street on built-in pictures, a few minutes on a CPU
# make demo-video    the same on letters that move
# make test          the tests
# All first make a virtual environment in .venv and install there requirements.txt and what reads videos.

PYTHON ?= python3
RUN = .venv/bin/python

.venv/installed: requirements.txt requirements-video.txt
	$(PYTHON) -m venv .venv
	$(RUN) -m pip install --quiet --disable-pip-version-check $(addprefix -r ,$^)
	touch $@

demo: .venv/installed
	$(RUN) demo.py

demo-video: .venv/installed
	$(RUN) demo.py --video

# A process for three files (they share what takes seconds to import), as many at once as there are cores.
# One file: .venv/bin/python -m pytest tests/test_lfq.py
test: .venv/installed
	ls -S tests/test_*.py | xargs -n 3 -P $$(getconf _NPROCESSORS_ONLN) $(RUN) -m pytest -q -p no:cacheprovider

.PHONY: demo demo-video test
