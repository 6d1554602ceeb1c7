"""The tests of the runtime: one thread for each process, as the runtime itself wants it."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
