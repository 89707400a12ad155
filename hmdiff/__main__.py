"""`python -m hmdiff`: the same as the command `hmdiff`."""

import sys

from hmdiff.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
