"""Processes that tests start."""

import contextlib
import subprocess


@contextlib.contextmanager
def started(command, **options):
    """Start a command, and kill it if the test fails meanwhile: leaving a ``Popen`` waits, for ever if need be."""
    with subprocess.Popen(command, **options) as child:
        try:
            yield child
        except BaseException:
            child.kill()
            raise
