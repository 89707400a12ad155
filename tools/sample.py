"""`hmdiff sample`."""

import sys

from hmdiff.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["sample", *sys.argv[1:]]))
