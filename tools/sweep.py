"""`hmdiff sweep`."""

import sys

from hmdiff.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["sweep", *sys.argv[1:]]))
