"""What must be there before torch is imported: the libraries, and an NPU plugin that can load."""

from __future__ import annotations

import ctypes
import os
import re
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

from mmconvert.errors import RequestError

# torch 2.7 has torch.accelerator and pipelining's static shapes; transformers 4.57 the module
# tree (model.visual, model.language_model) that the towers are cut from.
NEEDED = {"torch": (2, 7), "transformers": (4, 57), "safetensors": (0, 4), "pillow": (10, 0)}
INSTALL = "pip install 'mmconvert[runtime]'"
AUTOLOAD = "TORCH_DEVICE_BACKEND_AUTOLOAD"


def require() -> None:
    """Checks that the runtime's libraries are there, and keeps a dead NPU plugin out of the way.

    Raises:
        RequestError: one is missing or too old.
    """
    for name, least in NEEDED.items():
        wanted = f"{name} {'.'.join(map(str, least))} or later"
        try:
            found = version(name)
        except PackageNotFoundError:
            raise RequestError(f"{name} is not installed", wanted, INSTALL) from None
        if _numbers(found) < least:
            raise RequestError(f"{name} {found} is too old", wanted, f"{INSTALL} --upgrade")
    guard_npu()


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(n) for n in re.findall(r"\d+", text)[:2])


def guard_npu() -> None:
    """Stops torch from loading torch_npu where the NPU's own libraries are missing.

    torch loads installed backends when it is imported, and dies if one fails, as torch_npu does
    on a machine without CANN, such as a login node. Must run before torch is first imported.
    """
    if find_spec("torch_npu") is None:
        return
    try:
        ctypes.CDLL("libascendcl.so")
    except OSError:
        os.environ.setdefault(AUTOLOAD, "0")
