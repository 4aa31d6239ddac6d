"""``python -m dsv4``: the same as the ``dsv4`` command."""

import sys

from dsv4.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
