"""The test suite without a network: `python -m tools.campaign.offline [PYTEST ARGUMENTS]`.

It runs in a network namespace without interfaces, where every connection fails at once. Needs `unshare` (util-linux)
and the right to create user namespaces; exits with 3 without it.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Sequence

UNSHARE = ("unshare", "--user", "--map-root-user", "--net")


def available() -> bool:
    """Whether this machine allows creating a network namespace."""
    if shutil.which("unshare") is None:
        return False
    return subprocess.run([*UNSHARE, "true"], capture_output=True).returncode == 0


def main(arguments: Sequence[str] | None = None) -> int:
    if not available():
        print("no namespace without a network can be made here", file=sys.stderr)
        return 3
    chosen = sys.argv[1:] if arguments is None else arguments
    return subprocess.run([*UNSHARE, sys.executable, "-m", "pytest", *chosen]).returncode


if __name__ == "__main__":
    sys.exit(main())
