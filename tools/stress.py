"""`hmdiff stress`."""

import sys

from hmdiff.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["stress", *sys.argv[1:]]))
