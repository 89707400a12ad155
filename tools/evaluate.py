"""`hmdiff evaluate`."""

import sys

from hmdiff.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["evaluate", *sys.argv[1:]]))
