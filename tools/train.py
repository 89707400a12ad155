"""`hmdiff train`, also for `accelerate launch tools/train.py`."""

import sys

from hmdiff.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
