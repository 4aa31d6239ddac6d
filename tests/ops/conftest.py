"""Kernels are tested where Triton is installed, ``pip install -e '.[triton]'``: without it there are none."""

from importlib.util import find_spec

collect_ignore_glob = [] if find_spec("triton") else ["*/test_*triton*.py"]
