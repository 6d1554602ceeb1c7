"""The main job on any system, without torch: a small checkpoint goes to MM format and back.

``python examples/there_and_back.py [FOLDER]``; exit code 0 means that every byte came back.
"""

from __future__ import annotations

import filecmp
import sys
import tempfile
from pathlib import Path

import mmconvert
from mmconvert.playground.checkpoints import make_hf

LAYOUT = {"llm_pp_layers": [[0, 8], [10, 10]], "vit_pp_layers": [[16, 16], [0, 0]], "tp_size": 2}


def there_and_back(folder: Path) -> int:
    """Converts in `folder`; the number of files that differ."""
    hf, mm, back = folder / "hf", folder / "mm", folder / "back"
    make_hf("qwen2vl-2b", hf)
    mmconvert.hf_to_mm(hf, mm, LAYOUT)
    assert mmconvert.verify(hf, mm).equal
    mmconvert.mm_to_hf(mm, hf, back)
    names = [p.relative_to(hf).as_posix() for p in hf.rglob("*") if p.is_file()]
    _, different, missing = filecmp.cmpfiles(hf, back, names, shallow=False)
    print(f"{len(names)} files, {len(different) + len(missing)} differ")
    return len(different) + len(missing)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        sys.exit(min(1, there_and_back(Path(sys.argv[1]))))
    with tempfile.TemporaryDirectory() as place:
        sys.exit(min(1, there_and_back(Path(place))))
