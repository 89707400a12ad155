"""Recover everybody in a photo and write what `hmdiff sample` writes.

python examples/photo.py photo.jpg outputs
"""

from __future__ import annotations

import sys

from hmdiff import HMDiffPipeline


def main(photo: str, folder: str) -> None:
    pipe = HMDiffPipeline.from_pretrained("hmdiff_small")
    output = pipe(photo, num_hypotheses=5)
    for number, person in enumerate(output.people):
        print(f"person {number}: hypothesis {person.selected}, spread {person.spread.mean():.0f} mm")
    for path in output.save(folder):
        print(path)


if __name__ == "__main__":
    main(*sys.argv[1:])
