"""Builds wheel and source package below dist/, and tries them as a stranger would.

``python packaging/release.py``: builds from the files that git knows, with the README's links made
absolute, since an index page shows it outside of the repository; checks both packages; installs the
wheel into empty environments of every Python from 3.10 to 3.14 that is on this machine, with the
newest dependencies and with the lowest; and converts something in each.
"""

from __future__ import annotations

import contextlib
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

import tomllib

ROOT = Path(__file__).parents[1]
LOWEST = ROOT / "packaging" / "lowest.txt"
PYTHONS = ("3.10", "3.11", "3.12", "3.13", "3.14")
LINK = re.compile(r"\]\((?!https?://|#)([^)]+)\)")
# The newest Python for which the lowest versions have been built.
NEWEST_FOR_LOWEST = "3.11"


def run(*words: object, cwd: Path | None = None) -> str:
    """Runs a command; stops with what it printed if it fails."""
    command = [str(word) for word in words]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"failed: {' '.join(command)}\n{done.stdout}{done.stderr}")
    return done.stdout


def staged(folder: Path, home: str) -> Path:
    """What git knows, with a README whose links work on an index page."""
    tree = folder / "tree"
    tree.mkdir()
    for name in run("git", "ls-files", "-z", cwd=ROOT).split("\0"):
        if name and (ROOT / name).is_file():
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, tree / name)
    for name in ("README.md", "README.zh-CN.md"):
        path = tree / name
        path.write_text(LINK.sub(rf"]({home}/blob/main/\1)", path.read_text("utf-8")), "utf-8")
    return tree


def built(folder: Path, home: str) -> tuple[Path, Path]:
    """The wheel and the source package, checked by twine."""
    tools, out = folder / "tools", ROOT / "dist"
    run(sys.executable, "-m", "venv", tools)
    run(tools / "bin/pip", "install", "--quiet", "build", "twine")
    shutil.rmtree(out, ignore_errors=True)
    run(tools / "bin/python", "-m", "build", "--outdir", out, staged(folder, home))
    (wheel,), (source,) = out.glob("*.whl"), out.glob("*.tar.gz")
    print(run(tools / "bin/twine", "check", "--strict", wheel, source).strip())
    return wheel, source


def examined(wheel: Path, source: Path) -> None:
    """What must be in the packages, and what must not."""
    names = zipfile.ZipFile(wheel).namelist()
    text = zipfile.ZipFile(wheel).read(next(n for n in names if n.endswith("/METADATA"))).decode()
    assert not LINK.search(text), f"a link that an index page cannot follow: {LINK.search(text)}"
    assert "License-Expression: Apache-2.0" in text
    assert "Project-URL: " in text
    assert "mmconvert/py.typed" in names
    assert not [n for n in names if n.startswith(("tests/", "benchmarks/", "docs/"))]
    with tarfile.open(source) as archive:
        held = {n.partition("/")[2] for n in archive.getnames()}
    assert {"README.md", "LICENSE", "pyproject.toml"} <= held
    print(f"{wheel.name}: {len(names)} files; {source.name}: {len(held)} files")


def interpreter(version: str) -> str:
    """A Python of a version on this machine, pyenv's included; "" if there is none."""
    found = [f"python{version}"]
    if shutil.which("pyenv"):
        versions = Path(run("pyenv", "root").strip()) / "versions"
        found += [str(path) for path in sorted(versions.glob(f"{version}.*/bin/python"))]
    for command in found:
        with contextlib.suppress(OSError):
            asked = [command, "-c", "import venv"]
            if subprocess.run(asked, capture_output=True, check=False).returncode == 0:
                return command
    return ""


def tried(python: str, wheel: Path, folder: Path, *, lowest: bool) -> str:
    """Installs the wheel into an empty environment, and converts there and back."""
    env = folder / f"env-{python}-{'lowest' if lowest else 'newest'}"
    run(interpreter(python), "-m", "venv", env)
    run(env / "bin/pip", "install", "--quiet", *(("-r", LOWEST) if lowest else ()), wheel)
    call, play = env / "bin/mm-convert", folder / f"{env.name}-play"
    version = run(call, "--version").strip()
    run(call, "playground", play)
    hf = ("--cfg.hf_config.hf_dir", "hf")
    run(call, "AutoConverter", "hf_to_mm", *hf, "--cfg.mm_dir", "mm", cwd=play)
    back = ("--cfg.mm_dir", "mm", "--cfg.save_hf_dir", "back")
    run(call, "AutoConverter", "mm_to_hf", *hf, *back, cwd=play)
    run("diff", "-r", "-x", "mmconvert.json", "hf", "back", cwd=play)
    shutil.rmtree(play)
    return version


def main() -> None:
    """Builds, checks, tries; says what could not be tried here."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    names = {re.split(r"[<>=]", d)[0] for d in project["dependencies"]}
    pinned = dict(re.findall(r"^([\w-]+)==(\S+)$", LOWEST.read_text(), re.MULTILINE))
    floors = dict(d.split(">=") for d in project["dependencies"])
    for name in names:  # 13.0 and 13.0.0 are the same version
        assert pinned[name].startswith(floors[name]), f"{LOWEST}: {name} is not {floors[name]}"
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        wheel, source = built(folder, project["urls"]["Homepage"])
        examined(wheel, source)
        for python in PYTHONS:
            if not interpreter(python):
                print(f"Python {python}: not on this machine; the workflow has it")
                continue
            print(f"Python {python}, newest: {tried(python, wheel, folder, lowest=False)}")
            if PYTHONS.index(python) <= PYTHONS.index(NEWEST_FOR_LOWEST):
                print(f"Python {python}, lowest: {tried(python, wheel, folder, lowest=True)}")
            else:
                print(f"Python {python}, lowest: numpy 1.24 has no build for it")


if __name__ == "__main__":
    main()
