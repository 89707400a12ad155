"""`hmdiff prepare`."""

import sys

from hmdiff.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["prepare", *sys.argv[1:]]))
