"""A program for torchrun: process 1 is given other words than the others.

``python differing.py N WORD ... `` runs ``mm-convert WORD ...``; on process 1 the last N words are
put in the place of the N before them, and everywhere else they are left out. With N negative they
are added on process 1 alone.
"""

from __future__ import annotations

import os
import sys

from mmconvert import cli


def main() -> int:
    """The program."""
    number, words = int(sys.argv[1]), sys.argv[2:]
    count = abs(number)
    common, own = words[:-count], words[-count:]
    if os.environ["RANK"] == "1":
        common = [*(common[:-count] if number > 0 else common), *own]
    return cli.main(common, launched=True)


if __name__ == "__main__":
    sys.exit(main())
