"""`hmdiff demo`."""

import sys

from hmdiff.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["demo", *sys.argv[1:]]))
