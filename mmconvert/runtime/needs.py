"""What must be there before torch is imported: the libraries, and an NPU plugin that can load."""

from __future__ import annotations

import ctypes
import os
import re
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

from mmconvert.errors import RequestError

# torch 2.7 has torch.accelerator and pipelining's static shapes; transformers 4.57 the module
# tree (model.visual, model.language_model) that the modules are cut from.
NEEDED = {"torch": (2, 7), "transformers": (4, 57), "safetensors": (0, 4), "pillow": (10, 0)}
INSTALL = "pip install 'mmconvert[runtime]'"
AUTOLOAD = "TORCH_DEVICE_BACKEND_AUTOLOAD"
DEVICE = "MMCONVERT_DEVICE"  # what was asked for, for the processes of the run
PLUGIN, CANN = "torch_npu", "libascendcl.so"


def require(device: str = "auto") -> None:
    """Checks that the runtime's libraries are there, and keeps a dead NPU plugin out of the way.

    Must run before torch is first imported.

    Args:
        device: ``auto``, ``cpu``, ``cuda`` or ``npu``.

    Raises:
        RequestError: one is missing or too old, or there is no NPU where one is asked for.
    """
    for name, least in NEEDED.items():
        expected = f"{name} {'.'.join(map(str, least))} or later"
        try:
            found = version(name)
        except PackageNotFoundError:
            raise RequestError(f"{name} is not installed", expected, INSTALL) from None
        if _numbers(found) < least:
            raise RequestError(f"{name} {found} is too old", expected, f"{INSTALL} --upgrade")
    os.environ[DEVICE] = device
    if device == "npu":
        _require_npu()
    elif device == "auto":
        guard_npu()
    else:
        os.environ.setdefault(AUTOLOAD, "0")


def _require_npu() -> None:
    if find_spec(PLUGIN) is None:
        raise RequestError(
            "--device npu: torch_npu is not installed",
            "torch's NPU plugin, of torch's own version",
            "pip install 'mmconvert[npu]', or --device cpu",
        )
    if not _has_cann():
        raise RequestError(
            f"--device npu: {CANN} cannot be loaded",
            "an NPU with its driver and CANN, and their environment set",
            "source the set_env.sh of CANN, or --device cpu",
        )
    os.environ[AUTOLOAD] = "1"


def _has_cann() -> bool:
    try:
        ctypes.CDLL(CANN)
    except OSError:
        return False
    return True


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(n) for n in re.findall(r"\d+", text)[:2])


def guard_npu() -> None:
    """Stops torch from loading torch_npu where the NPU's own libraries are missing.

    torch loads installed backends when it is imported, and dies if one fails, as torch_npu does
    on a machine without CANN, such as a login node.
    """
    if find_spec(PLUGIN) is not None and not _has_cann():
        os.environ.setdefault(AUTOLOAD, "0")
