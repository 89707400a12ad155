"""`hmdiff ablate`."""

import sys

from hmdiff.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["ablate", *sys.argv[1:]]))
