"""What must be there before torch is imported: the libraries, and an NPU plugin that can load."""

from __future__ import annotations

import ctypes
import os
import re
import sys
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType
from typing import cast

from mmconvert.errors import RequestError

# torch 2.7 has torch.accelerator and pipelining's static shapes; transformers 4.57 the module
# tree (model.visual, model.language_model) that the modules are cut from.
NEEDED = {"torch": (2, 7), "transformers": (4, 57), "safetensors": (0, 4), "pillow": (10, 0)}
INSTALL = "pip install 'mmconvert[runtime]'"
AUTOLOAD = "TORCH_DEVICE_BACKEND_AUTOLOAD"
# What was asked for, for the processes of the run.
DEVICE, TIMEOUT = "MMCONVERT_DEVICE", "MMCONVERT_TIMEOUT_MINUTES"
PLUGIN, CANN = "torch_npu", "libascendcl.so"


def require(device: str = "auto", minutes: int = 30) -> None:
    """Checks that the runtime's libraries are there, and keeps a dead NPU plugin out of the way.

    Must run before torch is first imported.

    Args:
        device: ``auto``, ``cpu``, ``cuda`` or ``npu``.
        minutes: that a process may wait for the others.

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
    os.environ[DEVICE], os.environ[TIMEOUT] = device, str(minutes)
    if device == "npu":
        _require_npu()
    shield(device)
    if _has(PLUGIN) and os.environ.get(AUTOLOAD) != "0":
        _load_npu()


def shield(device: str) -> None:
    """Hides torch_npu where it is not to be used, or where the NPU's own libraries are missing.

    torch loads installed backends when it is imported, and transformers imports torch_npu where
    it finds it; both die of it on a machine without CANN, such as a login node. To Python a module
    that is None in ``sys.modules`` is not there.
    """
    if device == "npu" or not _has(PLUGIN):
        return
    if device == "auto" and os.environ.get(AUTOLOAD) != "0" and _has_cann():
        return
    os.environ[AUTOLOAD] = "0"
    sys.modules.setdefault(PLUGIN, cast("ModuleType", None))


def _require_npu() -> None:
    if not _has(PLUGIN):
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
    if not sys.modules.get(PLUGIN, True):  # hidden before it was asked for
        del sys.modules[PLUGIN]


def _load_npu() -> None:
    """Imports torch with its plugin.

    Raises:
        RequestError: the plugin cannot be loaded: a library of CANN is missing or too old, or it
            is made for another torch.
    """
    try:
        import torch as _  # noqa: F401 - what counts is that it can be
    except (ImportError, OSError, RuntimeError) as error:
        cause = error.__cause__ or error
        raise RequestError(
            f"torch_npu {version(PLUGIN)} is installed and cannot be loaded beside torch "
            f"{version('torch')}: {cause}",
            "torch_npu of torch's own version, and the CANN that it is made for",
            "source the set_env.sh of CANN, or --device cpu",
        ) from None


def _has(package: str) -> bool:
    """Whether a package is installed; hidden or not."""
    try:
        version(package)
    except PackageNotFoundError:
        return False
    return True


def _has_cann() -> bool:
    try:
        ctypes.CDLL(CANN)
    except OSError:
        return False
    return True


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(n) for n in re.findall(r"\d+", text)[:2])
