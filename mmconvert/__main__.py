"""Runs ``python -m mmconvert``, also as one of the processes of torchrun."""

import sys

from mmconvert.cli import main

if __name__ == "__main__":
    sys.exit(main(launched=True))
