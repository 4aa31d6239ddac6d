"""Processes that tests start."""

import contextlib
import subprocess


@contextlib.contextmanager
def started(command, **options):
    """Start a command, and kill it if the test fails meanwhile: a ``Popen`` that is left is waited for, even forever."""
    with subprocess.Popen(command, **options) as child:
        try:
            yield child
        except BaseException:
            child.kill()
            raise
