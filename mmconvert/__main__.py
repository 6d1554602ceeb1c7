"""``python -m mmconvert`` is the command ``mm-convert``."""

from mmconvert.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
