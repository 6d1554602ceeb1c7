"""Which device is taken, and that torch_npu is imported only where an NPU is expected.

No NPU has a part in this. A stand-in for torch_npu is found by torch as the real one is, through
the entry point group ``torch.backends``; without CANN it fails as the real one does. Where it may
load, it registers a device ``npu`` without kernels and a backend ``hccl`` that does nothing, which
shows what the runtime would choose, and nothing else.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from mmconvert.errors import RequestError
from mmconvert.runtime import needs
from mmconvert.runtime.device import backend, device
from nights import night

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow
PLUGIN = """
import os
from pathlib import Path

def load():
    Path(os.environ["LOADED"]).touch()
    if os.environ.get("ASCEND") != "1":
        raise ImportError("libhccl.so: cannot open shared object file: No such file or directory")
    import torch
    import torch.distributed as dist
    from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

    class Npu:
        @staticmethod
        def is_available(): return True
        @staticmethod
        def device_count(): return 8
        @staticmethod
        def current_device(): return 0
        @staticmethod
        def _is_in_bad_fork(): return False
        @staticmethod
        def manual_seed_all(seed): pass

    _setup_privateuseone_for_python_backend("npu", backend_module=Npu())
    dist.Backend.register_backend("hccl", lambda *a: None, devices=["npu"])
"""
CHOICE = (
    "from mmconvert.runtime import needs\n"
    "from mmconvert.errors import MMConvertError\n"
    "import sys\n"
    "try:\n"
    "    needs.require(sys.argv[1])\n"
    "    if 'transformers' in sys.argv:\n"
    "        import transformers\n"
    "    from mmconvert.runtime.device import backend, device\n"
    "    print(device().type, backend(device()))\n"
    "except MMConvertError as error:\n"
    "    print(error.what)\n"
)


@pytest.fixture
def plugin(tmp_path: Path) -> dict[str, str]:
    """A stand-in for torch_npu as an installed package; the environment that has it."""
    site = tmp_path / "site"
    info = site / "torch_npu-2.13.0.dist-info"
    info.mkdir(parents=True)
    (site / "torch_npu").mkdir()
    (site / "torch_npu" / "__init__.py").write_text(PLUGIN)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: torch-npu\nVersion: 2.13.0\n")
    (info / "entry_points.txt").write_text("[torch.backends]\ntorch_npu = torch_npu:load\n")
    return {"PYTHONPATH": f"{site}:{ROOT}", "LOADED": str(tmp_path / "loaded")}


@pytest.fixture
def cann(tmp_path: Path) -> dict[str, str]:
    """A library under the name of CANN's, which loads and has nothing of it."""
    folder = tmp_path / "cann"
    folder.mkdir()
    spec = find_spec("safetensors._safetensors_rust")  # any library that needs no other
    assert spec is not None
    shutil.copy(str(spec.origin), folder / "libascendcl.so")
    return {"LD_LIBRARY_PATH": str(folder), "ASCEND": "1"}


def said(program: str, *words: str, env: dict[str, str]) -> Any:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("TORCH_", "MMCONVERT_"))}
    return subprocess.run(
        [sys.executable, "-c", program, *words],
        env={**kept, "PYTHONPATH": str(ROOT), **env},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


def choice(device: str, env: dict[str, str], *libraries: str) -> str:
    """What is taken; also once `libraries` are imported, which look for an NPU by themselves."""
    done = said(CHOICE, device, *libraries, env=env)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_a_plain_machine_computes_on_its_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(needs.DEVICE, "auto")
    assert (device().type, backend(device())) == ("cpu", "gloo")
    monkeypatch.setenv(needs.DEVICE, "cuda")
    with pytest.raises(RequestError, match="--device cuda: torch finds no such device"):
        device()


def test_an_npu_needs_its_plugin_and_its_libraries(plugin: dict[str, str]) -> None:
    assert choice("npu", {}) == "--device npu: torch_npu is not installed"
    assert choice("npu", plugin) == "--device npu: libascendcl.so cannot be loaded"
    assert not Path(plugin["LOADED"]).exists()


def test_a_plugin_without_cann_does_not_stop_torch(plugin: dict[str, str]) -> None:
    """A login node: there `import torch` itself dies, and the commands run all the same."""
    dead = said("import torch", env=plugin)
    assert dead.returncode != 0
    assert "Failed to load the backend extension: torch_npu" in dead.stderr
    Path(plugin["LOADED"]).unlink()
    assert choice("auto", plugin, "transformers") == "cpu gloo"
    assert not Path(plugin["LOADED"]).exists()


CANNOT = (
    "torch_npu 2.13.0 is installed and cannot be loaded beside torch "
    f"{version('torch')}: libhccl.so: cannot open shared object file: No such file or directory"
)


@pytest.mark.parametrize(
    ("asked", "expected"), [("auto", CANNOT), night("npu", CANNOT), night("cpu", "cpu gloo")]
)
def test_a_plugin_that_cannot_be_loaded_is_named(
    asked: str, expected: str, plugin: dict[str, str], cann: dict[str, str]
) -> None:
    assert choice(asked, {**plugin, **cann, "ASCEND": "too old"}) == expected


OFF = {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}


@pytest.mark.parametrize(
    ("asked", "env", "libraries"),
    [
        ("auto", {}, ["transformers"]),
        night("npu", {}, []),
        night("npu", OFF, []),  # asked for by name
    ],
)
def test_an_npu_is_taken_where_there_is_one(
    asked: str,
    env: dict[str, str],
    libraries: list[str],
    plugin: dict[str, str],
    cann: dict[str, str],
) -> None:
    assert choice(asked, {**plugin, **cann, **env}, *libraries) == "npu hccl"


def test_the_cpu_is_taken_where_it_is_asked_for(
    plugin: dict[str, str], cann: dict[str, str]
) -> None:
    assert choice("cpu", {**plugin, **cann}) == "cpu gloo"
    assert not Path(plugin["LOADED"]).exists()  # torch_npu is not even imported
