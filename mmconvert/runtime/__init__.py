"""The runtime: runs, checks and fine-tunes MM checkpoints with torch and transformers.

Its modules import torch when they are imported, so nothing outside this room imports them before
a command needs them; :mod:`mmconvert.runtime.needs` comes first and is free of torch.
"""

import os

from mmconvert.runtime import needs

needs.shield(os.environ.get(needs.DEVICE, "auto"))  # for Python programs, and processes of a run
