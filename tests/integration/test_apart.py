"""Outputs that would destroy what is read, or what others own: mounts, links, foreign folders."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

import inprocess
from commands import copied, layout, litter, none, refused, snapshot
from filesystems import bind, disk, file_system
from mmconvert.errors import Interrupted, OutputError
from mmconvert.executor.output import Output
from mmconvert.executor.outputfile import FileOutput
from mmread import compare_mm

MODEL = "qwen2vl-2b"
NOBODY = 65534
PARTIAL, OLD = ".out.mmconvert-partial", ".out.mmconvert-old"
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="asks for root")


# --------------------------------------------------------------- the input under another name
def the_target_is_the_input(mm: Path, out: Path) -> Path:
    del out
    return mm


def the_target_is_above_the_input(mm: Path, out: Path) -> Path:
    del out
    return mm.parent


def the_target_is_in_the_input(mm: Path, out: Path) -> Path:
    del out
    return mm / "release"


@pytest.mark.parametrize(
    "shown",
    [the_target_is_the_input, the_target_is_above_the_input, the_target_is_in_the_input],
    ids=lambda f: f.__name__,
)
def test_a_bind_mount_above_the_target(
    shown: Callable[[Path, Path], Path], tied_mm22: Path, tmp_path: Path, out: Path
) -> None:
    """No path tells that the target and the input are one: their inodes do."""
    mm = copied(tied_mm22, tmp_path / "deep" / "er" / "mm")
    before = snapshot(tmp_path / "deep")
    with bind(tmp_path / "deep", tmp_path / "shown") as there:
        final = there / shown(mm, out).relative_to(tmp_path / "deep")
        done = inprocess.to_other(MODEL, mm, final, "--overwrite", check=None)
    refused(done, 2, "input")
    assert snapshot(tmp_path / "deep") == before


def test_an_input_that_is_mounted_in_the_target(tied_mm22: Path, tmp_path: Path, out: Path) -> None:
    """To empty the former checkpoint would be to empty the input."""
    mm = copied(tied_mm22, tmp_path / "mm")
    copied(tied_mm22, out)
    before = snapshot(mm)
    with bind(mm / "release", out / "release"):
        done = inprocess.to_other(MODEL, mm, out, "--overwrite", check=None)
        refused(done, 2, "is the same as its input", str(out / "release"))
    assert snapshot(mm) == before
    assert litter(out) == []


def test_a_part_of_the_target_that_is_shown_as_the_input(
    tied_hf: Path, tied_mm22: Path, tmp_path: Path, out: Path
) -> None:
    del tied_hf
    copied(tied_mm22, out)
    before = snapshot(out)
    with bind(out / "release", tmp_path / "shown") as mm:
        done = inprocess.to_other(MODEL, mm, out, "--overwrite", check=None)
    refused(done, 2, "is the same as its input")
    assert snapshot(out) == before


@pytest.mark.parametrize("link", [os.symlink, os.link], ids=["links", "hard links"])
def test_an_input_whose_files_are_in_the_target(
    link: Callable[[Path, Path], None], tied_hf: Path, tied_mm22: Path, tmp_path: Path, out: Path
) -> None:
    """The weights, or only a side file; the folders are apart."""
    copied(tied_hf, out)
    before = snapshot(out)
    for names in (sorted(p.name for p in out.glob("*.safetensors")), ["config.json"]):
        hf = tmp_path / f"hf{len(names)}"
        hf.mkdir()
        for path in filter(Path.is_file, out.iterdir()):
            if path.name in names:
                link(path, hf / path.name)
            else:
                shutil.copyfile(path, hf / path.name)
        done = inprocess.to_hf(MODEL, tied_mm22, hf, out, "--overwrite", check=None)
        refused(done, 2, "is the same as its input", "another output folder")
    assert {n: s[2] for n, s in snapshot(out).items()} == {n: s[2] for n, s in before.items()}


@pytest.mark.parametrize("name", [PARTIAL, OLD])
@pytest.mark.parametrize("there", [False, True])
def test_the_input_is_what_a_killed_run_left(
    there: bool, name: str, tied_mm22: Path, out: Path
) -> None:
    """A run into the same folder would empty the one, and remove or rename the other."""
    mm = copied(tied_mm22, out.with_name(name))
    if there:
        copied(tied_mm22, out)
    before = snapshot(mm)
    done = inprocess.to_other(MODEL, mm, out, "--overwrite", check=None)
    refused(done, 2, "is the same as its input")
    assert snapshot(mm) == before


# ------------------------------------------------------------------------------- mount points
def test_a_target_that_is_a_mount_point(tied_hf: Path, tied_mm: Path, out: Path) -> None:
    """Refused at once, empty or not: at the end it could not be replaced."""
    with file_system(out, "200m"):
        refused(inprocess.to_mm(MODEL, tied_hf, out, check=None), 2, "mount point", f"{out}/NAME")
        refused(inprocess.to_mm(MODEL, tied_hf, out, "--dry-run", check=None), 2, "mount point")
        assert list(out.iterdir()) == []
        assert litter(out) == []
        inprocess.to_mm(MODEL, tied_hf, out / "NAME")
        none(compare_mm(tied_mm, out / "NAME"))
        refused(inprocess.to_mm(MODEL, tied_hf, out, "--overwrite", check=None), 2, "mount point")


def test_a_target_where_a_folder_of_the_same_disk_is_mounted(
    tied_hf: Path, tmp_path: Path, out: Path
) -> None:
    """The kernel's list tells; the device is that of the folder above."""
    (tmp_path / "real dir").mkdir()
    with bind(tmp_path / "real dir", out.with_name("out put")) as there:
        refused(inprocess.to_mm(MODEL, tied_hf, there, check=None), 2, "mount point")


def test_a_new_disk_is_no_empty_folder(tied_hf: Path, tmp_path: Path) -> None:
    """lost+found is in it: the message must still be of the mount point."""
    with disk(tmp_path / "img", tmp_path / "disk") as there:
        refused(inprocess.to_mm(MODEL, tied_hf, there, check=None), 2, "mount point")


def test_side_files_count_in_the_room(tied_hf: Path, tied_mm22: Path, tmp_path: Path) -> None:
    """300 MB of them do not fit on a disk of 200: said before a byte is written."""
    hf = copied(tied_hf, tmp_path / "hf")
    with (hf / "assets.txt").open("wb") as file:
        file.truncate(300 << 20)
    with file_system(tmp_path / "disk", "200m") as there:
        out = there / "out"
        done = inprocess.to_hf(MODEL, tied_mm22, hf, out, check=None)
        refused(done, 2, "382.6 MB needed at most", out=out)
        assert list(there.iterdir()) == []


# ----------------------------------------------------------------------- foreign staging folders
def owned_by_another(path: Path, elsewhere: Path) -> None:
    del elsewhere
    path.mkdir(mode=0o700)
    os.chown(path, NOBODY, NOBODY)


def writable_by_all(path: Path, elsewhere: Path) -> None:
    del elsewhere
    path.mkdir()
    path.chmod(0o777)


def writable_by_the_group(path: Path, elsewhere: Path) -> None:
    del elsewhere
    path.mkdir()
    path.chmod(0o770)


def a_link(path: Path, elsewhere: Path) -> None:
    path.symlink_to(elsewhere)


def a_file(path: Path, elsewhere: Path) -> None:
    del elsewhere
    path.write_text("mine")


FOREIGN = [owned_by_another, writable_by_all, writable_by_the_group, a_link, a_file]


@as_root
@pytest.mark.parametrize("planted", FOREIGN, ids=lambda f: f.__name__)
def test_a_staging_folder_that_is_not_ours(
    planted: Callable[[Path, Path], None], tied_hf: Path, tmp_path: Path, out: Path
) -> None:
    """Refused, and neither it nor what it leads to is touched."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir(mode=0o711)
    (elsewhere / "precious").write_text("mine")
    out.parent.chmod(0o1777)
    planted(out.with_name(PARTIAL), elsewhere)
    before = snapshot(tmp_path)
    refused(inprocess.to_mm(MODEL, tied_hf, out, check=None), 2, PARTIAL)
    after = snapshot(tmp_path)
    assert {n: (s[0], s[2]) for n, s in before.items()} == {
        n: (s[0], s[2]) for n, s in after.items()
    }
    assert not out.exists()


@as_root
@pytest.mark.parametrize("planted", [owned_by_another, a_link, a_file], ids=lambda f: f.__name__)
def test_a_former_checkpoint_that_is_not_ours(
    planted: Callable[[Path, Path], None], tied_hf: Path, tmp_path: Path, out: Path
) -> None:
    """It would be given the final name."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    planted(out.with_name(OLD), elsewhere)
    refused(inprocess.to_mm(MODEL, tied_hf, out, check=None), 2, OLD)
    assert not out.exists()
    assert elsewhere.is_dir()


@as_root
@pytest.mark.parametrize("planted", FOREIGN, ids=lambda f: f.__name__)
def test_a_file_as_output(planted: Callable[[Path, Path], None], tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    planted(tmp_path / ".out.mmconvert-partial", elsewhere)
    output = FileOutput(tmp_path / "out", [], overwrite=False)
    with pytest.raises(OutputError, match=PARTIAL), output:
        pass
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "name", ["latest_checkpointed_iteration.txt", "mmconvert.json", "release", "release/mp_rank_00"]
)
def test_links_in_our_own_staging_folder(
    name: str, tied_hf: Path, tied_mm: Path, tmp_path: Path, out: Path
) -> None:
    """Nothing is written through them, and no mode changed: whoever made them."""
    elsewhere = tmp_path / "elsewhere"
    (elsewhere / "release").mkdir(parents=True, mode=0o711)
    (elsewhere / "file").write_text("mine")
    staging = out.with_name(PARTIAL)
    (staging / name).parent.mkdir(parents=True)
    staging.chmod(0o700)
    (staging / name).symlink_to(elsewhere / "release" if "release" in name else elsewhere / "file")
    before = snapshot(elsewhere)
    inprocess.to_mm(MODEL, tied_hf, out)
    assert snapshot(elsewhere) == before
    none(compare_mm(tied_mm, out))


# ------------------------------------------------------------------- what is said when stopped
def test_stopped_before_the_end(out: Path) -> None:
    out.mkdir()
    with pytest.raises(Interrupted) as stop, Output(out, [], overwrite=False):
        raise KeyboardInterrupt
    assert stop.value.what == f"interrupted: {out} is as it was before"
    assert stop.value.fix == ""


@pytest.mark.parametrize("form", [Output, FileOutput])
def test_stopped_after_the_end(form: type[Output], out: Path) -> None:
    """The output has its name: nobody says that nothing was left."""

    def late() -> None:
        with form(out, [], overwrite=False) as output:
            (output.folder / out.name).write_text("complete")
            output.commit()
            raise KeyboardInterrupt

    with pytest.raises(Interrupted) as stop:
        late()
    assert stop.value.what == f"interrupted, but {out} is complete"
    assert out.exists()
    assert litter(out) == []


def test_stopped_while_the_former_one_is_removed(
    tied_hf: Path, tied_mm: Path, tied_mm22: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command says where it is; and the next run removes it."""
    copied(tied_mm22, out)

    def stop(path: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", stop)
        done = inprocess.to_mm(MODEL, tied_hf, out, "--overwrite", check=None)
    refused(done, 130, f"interrupted, but {out} is complete", OLD)
    none(compare_mm(tied_mm, out))
    inprocess.to_mm(MODEL, tied_hf, out, *layout("[4]", "[2]"), "--overwrite")
    assert litter(out) == []


def test_a_former_checkpoint_that_cannot_be_removed(
    tied_hf: Path, tied_mm: Path, tied_mm22: Path, out: Path
) -> None:
    """The output is done, and a warning tells what is left."""
    copied(tied_mm22, out)
    with file_system(out / "release" / "busy", "1m"):
        done = inprocess.to_mm(MODEL, tied_hf, out, "--overwrite")
        assert f"warning: {out.with_name(OLD)} could not be removed" in done.stderr
        none(compare_mm(tied_mm, out))
        where = out.with_name(OLD) / "release" / "busy"
        assert os.path.ismount(where)
        os.system(f"umount {where}")


@pytest.mark.parametrize("link", [os.symlink, os.link], ids=["link", "hard link"])
def test_annotations_that_are_their_own_output(
    link: Callable[[Path, Path], None], tmp_path: Path
) -> None:
    turns = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "That."}]
    (tmp_path / "a.json").write_text(json.dumps([{"id": "1", "conversations": turns}]))
    before = (tmp_path / "a.json").read_bytes()
    link(tmp_path / "a.json", tmp_path / "b.json")
    flags = ("--llava_json_path", tmp_path / "a.json", "--output_json_path", tmp_path / "b.json")
    done = inprocess.call("data", "llava-to-mllm", *flags, "--overwrite", check=None)
    refused(done, 2, "is the input")
    assert (tmp_path / "a.json").read_bytes() == before
