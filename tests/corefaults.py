"""Faults made by hand in the core, one at a time, and the tests that must notice each.

As a program, ``python tests/corefaults.py [WORD ...]`` tries those whose name holds a WORD, or
all, and prints which are caught; the faults go into a copy of the package, never into this one.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
SECONDS = 240  # for one selection on a busy machine; most take five
TESTS_FAILED = 1  # pytest's exit code, docs.pytest.org/en/stable/reference/exit-codes.html


class Fault(NamedTuple):
    """A fault in the package.

    Attributes:
        name: what is wrong, in words.
        file: below ``mmconvert/``.
        text: the source as it is, found there exactly once.
        wrong: what stands in its place.
        tests: which of the tests of ``make test`` should notice; below ``tests/``.
    """

    name: str
    file: str
    text: str
    wrong: str
    tests: tuple[str, ...]


def golden(record: str, step: str = "hf_to_mm") -> str:
    return f"golden/test_golden.py::test_{step}[{record}]"


SPANS, PLAN, PROOF = "sharding/spans.py", "plan/build.py", "plan/proof.py"
BLOCKS, SOURCE, DETECT = "converters/blocks.py", "formats/mm/source.py", "formats/mm/detect.py"
INSTANCES, VALUES = "formats/mm/instances.py", "executor/values.py"
EXECUTE, GATHER = "executor/execute.py", "executor/gather.py"
ROUNDING, COPYING = "executor/rounding.py", "executor/copying.py"
FILEIO = "executor/fileio.py"
TP2, PP4 = golden("qwen2vl-2b/tp2_pp1"), golden("qwen2vl-2b/tp1_pp4")
BACK = golden("qwen2vl-2b/tp2_pp1", "mm_to_hf")
SPAN_TESTS, EXPERT_TESTS = "property/test_spans.py", "property/test_experts.py"
ANY_KIND = f"{EXPERT_TESTS}::test_a_layout_is_read_off_the_folder_alone"
BROKEN = "property/test_roundtrip.py::test_a_broken_plan_is_refused"
REFERENCE = "integration/test_reference_faults.py"
CASTS, JOURNAL = "unit/test_casts.py", "unit/test_journal.py"
FILES = "unit/test_fileio.py"
HF_OUTPUT, SAFETENSORS = "integration/test_hf_output.py", "unit/test_safetensors.py"

FUSE_AND_SHARD = (
    Fault(
        "groups interleaved backwards",
        SPANS,
        "Span(g * step, g * stride + before, step) for g",
        "Span((groups - 1 - g) * step, g * stride + before, step) for g",
        (f"{SPAN_TESTS}::test_interleave_is_a_bijection_in_the_right_order",),
    ),
    Fault(
        "packed q and v swapped",
        SPANS,
        "thirds = _interleaved([length // 3] * 3, groups)",
        "thirds = _interleaved([length // 3] * 3, groups)[::-1]",
        (f"{SPAN_TESTS}::test_interleaved_thirds",),
    ),
    Fault(
        "k and v swapped",
        BLOCKS,
        'names = [f"{hf}.{x}_proj" for x in "qkv"]',
        'names = [f"{hf}.{x}_proj" for x in "qvk"]',
        (TP2,),
    ),
    Fault(
        "gate and up swapped",
        BLOCKS,
        'for x in ("gate", "up")]',
        'for x in ("up", "gate")]',
        (TP2,),
    ),
    Fault(
        "gate and up divided as one",
        SPANS,
        "GATED = Split(parts=2)",
        "GATED = Split()",
        (TP2,),
    ),
    Fault(
        "vision q, k and v left as they are",
        BLOCKS,
        'fuse, shard = Interleave("vit.heads", packed_qkv=True), heads("vit.heads")',
        'fuse, shard = CONCAT, heads("vit.heads")',
        (TP2,),
    ),
    Fault(
        "an output projection divided by rows",
        SPANS,
        "return Split(axis=1, unit=unit)",
        "return Split(axis=0, unit=unit)",
        (TP2,),
    ),
    Fault(
        "an off-by-one span",
        SPANS,
        "p * part + first * step, count * step)",
        "p * part + max(first - 1, 0) * step, count * step)",
        (f"{SPAN_TESTS}::test_split_gives_each_rank_its_units_of_every_part",),
    ),
    Fault(
        "observed shards placed in the wrong order",
        SPANS,
        "before = sum(steps[:rank])",
        "before = sum(steps[rank + 1 :])",
        (f"{SPAN_TESTS}::test_observed_is_what_spans_gave",),
    ),
    Fault(
        "uneven ranks that overlap",
        SPANS,
        "rank * each + min(rank, more)",
        "rank * each",
        (f"{SPAN_TESTS}::test_share_divides_into_neighbours_of_almost_equal_size",),
    ),
    Fault(
        "the other part of a stacked tensor",
        SPANS,
        "Span((g * self.of + self.index) * step",
        "Span((g * self.of + self.of - 1 - self.index) * step",
        ("unit/test_pieces.py::test_parts",),
    ),
    Fault(
        "axes of a device matrix in the wrong order",
        "sharding/slices.py",
        "for axis in self.axes[dim]:",
        "for axis in reversed(self.axes[dim]):",
        ("unit/test_strategy.py::test_slices_are_those_of_mindspore",),
    ),
    Fault(
        "the optimizer's slices transposed",
        "sharding/slices.py",
        "index = index * self.optimizer_parts + self._repetition(places)",
        "index = self._repetition(places) * parts + index",
        ("unit/test_strategy.py::test_slices_are_those_of_mindspore",),
    ),
)
PLACES = (
    Fault(
        "local layers one off",
        "sharding/stages.py",
        "[(stage, i) for stage, count",
        "[(stage, i + 1) for stage, count",
        (f"{SPAN_TESTS}::test_locate_gives_each_layer_one_place",),
    ),
    Fault(
        "a stage one off",
        "sharding/layout.py",
        "Rank(tp, stage % self.pp_size, ep)",
        "Rank(tp, (stage + 1) % self.pp_size, ep)",
        (PP4,),
    ),
    Fault(
        "virtual stages in the order of ranks",
        "sharding/layout.py",
        "return Chunk(Rank(tp, stage % self.pp_size, ep), stage // self.pp_size)",
        "return Chunk(Rank(tp, stage // self.vpp_size, ep), stage % self.vpp_size)",
        (golden("qwen2vl-7b/tp1_pp4_vpp3"),),
    ),
    Fault(
        "the tail on the first stage",
        "sharding/stages.py",
        "for s in reversed(range(len(counts)))",
        "for s in range(len(counts))",
        (PP4,),
    ),
    Fault(
        "experts not numbered anew on their rank",
        INSTANCES,
        "fill(row.mm, local, expert), range(ep, ep + 1)",
        "fill(row.mm, local, item.expert), range(ep, ep + 1)",
        (ANY_KIND, golden("qwen3vl-30b-a3b/tp1_ep2")),
    ),
    Fault(
        "experts dealt out in turn",
        INSTANCES,
        "ep, expert = divmod(item.expert, share)",
        "expert, ep = divmod(item.expert, layout.ep)",
        (ANY_KIND,),
    ),
    Fault(
        "an expert one off in its stack",
        "formats/hf/side.py",
        "below, item.expert * rows, tensor.shape",
        "below, (item.expert + 1) % experts * rows, tensor.shape",
        (ANY_KIND,),
    ),
    Fault(
        "an ep rank's replicas passed over",
        SOURCE,
        "        for ep in eps:",
        "        for ep in eps[:1]:",
        (f"{EXPERT_TESTS}::test_a_damaged_ep_rank_is_named",),
    ),
)
PLANS = (
    Fault(
        "columns of a source forgotten",
        PLAN,
        "s.col + col - s.whole_col",
        "s.col",
        (BACK, "unit/test_pieces.py::test_from_any_slicing_to_any_other"),
    ),
    Fault(
        "tall sources missed",
        PLAN,
        "_first_at_or_after(starts, d.whole_row - tallest)",
        "_first_at_or_after(starts, d.whole_row)",
        (TP2,),
    ),
    Fault(
        "a replica not planned to be compared",
        PLAN,
        "        for blocks in others:\n            plan.replicas +=",
        "        for blocks in others[1:]:\n            plan.replicas +=",
        (BACK, BROKEN),
    ),
    Fault(
        "replicas that pass not compared",
        "executor/replicas.py",
        "        if (c.src, c.dst) in self.repeats:\n            return",
        "        if (c.src, c.dst) not in self.repeats:\n            return",
        ("unit/test_replicas.py",),
    ),
    Fault(
        "replicas that do not pass forgotten",
        "executor/replicas.py",
        "rest += passing.pop(src)",
        "passing.pop(src)",
        ("unit/test_replicas.py",),
    ),
    Fault(
        "rows of a replica one band off",
        "executor/replicas.py",
        "left[(top - c.src_row) * line : (bottom - c.src_row) * line]",
        "left[: (bottom - top) * line]",
        ("unit/test_replicas.py",),
    ),
    Fault(
        "other shapes on both sides",
        PLAN,
        "if (a.shape, a.dtype) != (b.shape, b.dtype):",
        "if a.dtype != b.dtype:",
        ("unit/test_plan.py::test_other_shapes_and_dtypes",),
    ),
    Fault(
        "an overlap proven",
        PROOF,
        "if r.row > end or (once and r.row < end):",
        "if r.row > end:",
        (f"{SPAN_TESTS}::test_covers_any_rectangles",),
    ),
    Fault(
        "a source element unused",
        PROOF,
        "if not covers(reads[i], *matrix(source.shape), once=False):",
        "if reads[i] and not covers(reads[i], *matrix(source.shape), once=False):",
        ("unit/test_plan.py::test_a_source_that_is_used_nowhere",),
    ),
    Fault(
        "a gap in a target",
        PROOF,
        "        if end != rows:",
        "        if end < rows - 1:",
        (f"{SPAN_TESTS}::test_covers_any_rectangles",),
    ),
    Fault(
        "a dtype that changes",
        PROOF,
        "if plan.targets[c.dst].dtype != cast_dtype(",
        "if plan.targets[c.dst].dtype == cast_dtype(",
        (BROKEN,),
    ),
)
CHECKS = (
    Fault(
        "a replica unchecked",
        "executor/replicas.py",
        "if found.listed():",
        "if False:",
        (f"{HF_OUTPUT}::test_a_tied_model_whose_copies_differ",),
    ),
    Fault(
        "an output layer taken for the embedding",
        "formats/mm/model.py",
        "return len(origins) == len(heads) and all(",
        "return len(origins) == len(heads) or all(",
        ("property/test_roundtrip.py::test_reshard_is_a_direct_conversion",),
    ),
    Fault(
        "a tied copy not compared",
        "formats/hf/side.py",
        "    known.copies += whole.copies\n",
        "    known.copies += known.copies\n",
        (f"{HF_OUTPUT}::test_a_tied_model_whose_copies_differ",),
    ),
    Fault(
        "zeros not checked",
        "run.py",
        "found = compare.not_zero(plan.zeros, plan.sources)",
        "found = compare.not_zero([], plan.sources)",
        (f"{REFERENCE}::test_omni_k_bias_is_zero_and_must_stay_so",),
    ),
    Fault(
        "not a number taken for zero",
        VALUES,
        "if (values == 0).all():",
        "if not (np.abs(values) > 0).any():",
        (f"{REFERENCE}::test_omni_k_bias_that_is_almost_zero",),
    ),
    Fault(
        "a dropped tensor unnamed",
        "formats/hf/claims.py",
        "        notes.drop(why, names)\n    return kept",
        "        notes.drop(why, names[1:])\n    return kept",
        (f"{HF_OUTPUT}::test_an_unknown_tensor",),
    ),
    Fault(
        "an unknown tensor passed over",
        "formats/hf/claims.py",
        "    if lost:\n        first = lost[min(lost)]",
        "    if lost and not kept:\n        first = lost[min(lost)]",
        (f"{HF_OUTPUT}::test_an_unknown_tensor",),
    ),
    Fault(
        "a needed tensor dropped",
        "formats/hf/claims.py",
        "if pattern and (hit := index.find(name)) and hit[0].mm != OUTPUT_LAYER:",
        "if pattern and (hit := index.find(name)) and hit[0].mm == OUTPUT_LAYER:",
        (f"{HF_OUTPUT}::test_drop_takes_nothing_that_the_model_needs",),
    ),
    Fault(
        "a tensor on the wrong stage claimed",
        SOURCE,
        "if name in expected.get(stage, ()):",
        "if index.find(name):",
        ("unit/test_claims.py",),
    ),
    Fault(
        "a stage list not asserted",
        DETECT,
        "if grids.get(key, grid) != grid",
        "if len(grids.get(key, grid)) != len(grid)",
        (f"{REFERENCE}::test_line_28_wrong_lists_are_told_from_right_ones",),
    ),
    Fault(
        "a tp size not asserted",
        DETECT,
        "if tp.get(key, size) != size",
        "if tp.get(key, size) < 1",
        (f"{REFERENCE}", "integration/test_checks.py", "-k", "line_12 or tp_sizes"),
    ),
    Fault(
        "a seal not checked",
        "formats/containers/ckpt.py",
        "    if crc != found.crc:",
        "    if crc < 0:",
        ("unit/test_mindspore_ckpt.py::test_the_checksum",),
    ),
    Fault(
        "a seal not written",
        "formats/containers/image.py",
        "        if image.seal is not None:",
        "        if image.seal is None:",
        ("integration/test_qwenvl.py::test_the_checksum",),
    ),
    Fault(
        "a hole between tensors",
        "formats/containers/safetensors.py",
        "if tensor.offset != end:",
        "if tensor.offset < end:",
        (f"{SAFETENSORS}::test_tensors_that_do_not_tile_the_data",),
    ),
    Fault(
        "a size that lies",
        "formats/containers/safetensors.py",
        "if end - begin != tensor.nbytes:",
        "if end - begin > tensor.nbytes:",
        (f"{SAFETENSORS}::test_bad_entries",),
    ),
    Fault(
        "a source that changes meanwhile",
        "run.py",
        "            self.group.together(self.watch.check)\n",
        "",
        ("integration/test_changing_sources.py::test_hf_to_mm",),
    ),
)
BYTES = (
    Fault(
        "a transposed view not transposed",
        "stored.py",
        "else (right, down)",
        "else (down, right)",
        (ANY_KIND,),
    ),
    Fault(
        "blocks of a transposed tensor not exchanged",
        SOURCE,
        "[[exchanged(block) for block in blocks] for blocks in whole.copies]",
        "[list(blocks) for blocks in whole.copies]",
        (ANY_KIND,),
    ),
    Fault(
        "strides ignored",
        "executor/blockio.py",
        "    if tensor.strides is None:\n        return matrix",
        "    if tensor.strides is None or len(tensor.shape) > 1:\n        return matrix",
        ("integration/test_dtype.py::test_views_are_cast",),
    ),
    Fault(
        "a view's offset in its storage ignored",
        "formats/containers/ptfile.py",
        "(0 if empty else ref.offset * ITEM_SIZE[ref.dtype])",
        "0",
        ("unit/test_ptfile.py::test_we_read_theirs",),
    ),
    Fault(
        "a view's strides not read",
        "formats/containers/ptfile.py",
        "strides = None if empty or _is_contiguous(ref) else ref.strides",
        "strides = None",
        ("unit/test_ptfile.py::test_we_read_theirs",),
    ),
    Fault(
        "fills not filled",
        GATHER,
        "band[:] = bytes(len(band))  # the rest are fills",
        "pass  # the rest are fills",
        ("integration/test_manifest.py::test_zeros_that_hf_lacks_count",),
    ),
    Fault(
        "a value cast twice",
        GATHER,
        "found = cast(data, source.dtype, dtype)",
        'found = cast(data, source.dtype, "F32")\n'
        '        found = cast(cast(found.bits, "F32", "BF16").bits, "BF16", dtype)',
        ("integration/test_mixed_dtypes.py::test_each_part_is_cast_once",),
    ),
    Fault(
        "an F64 rounded twice",
        ROUNDING,
        "if values.dtype.itemsize > wide.dtype.itemsize:",
        "if values.dtype.itemsize < wide.dtype.itemsize:",
        (f"{CASTS}::test_f64_is_rounded_once",),
    ),
    Fault(
        "ties rounded up",
        ROUNDING,
        "(bits + 0x7FFF + ((bits >> 16) & 1)) >> 16",
        "(bits + 0x8000) >> 16",
        (f"{CASTS}::test_f32",),
    ),
    Fault(
        "what a table loses counted as underflow throughout",
        ROUNDING,
        "(result == 0) & (values != 0)",
        "result == 0",
        (CASTS,),
    ),
    Fault(
        "a second piece read from the start again",
        COPYING,
        "offset_src=span.start + done",
        "offset_src=span.start",
        (FILES,),
    ),
    Fault(
        "a row that one call has begun, written whole by the next",
        FILEIO,
        "batch[0] = batch[0][skipped:]",
        "batch[0] = batch[0][:]",
        (FILES,),
    ),
    Fault(
        "losses counted on every rank",
        GATHER,
        "if (c.src, c.dst) not in origin.repeats:",
        "if c.src >= 0:",
        ("integration/test_dtype.py::test_the_report",),
    ),
    Fault(
        "runs of two files joined",
        EXECUTE,
        "if joined and last.source.path == source.path:",
        "if joined:",
        ("unit/test_jobs.py",),
    ),
    Fault(
        "columns of a scattered source forgotten",
        EXECUTE,
        '(c.src_row - begin) * line + c.src_col * item, line, "band")',
        '(c.src_row - begin) * line, line, "band")',
        ("unit/test_jobs.py",),
    ),
    Fault(
        "bands of a target that begin anew",
        "executor/bands.py",
        "c._replace(src_row=c.src_row + skip, dst_row=c.dst_row + skip, rows",
        "c._replace(src_row=c.src_row, dst_row=c.dst_row + skip, rows",
        ("unit/test_jobs.py",),
    ),
    Fault(
        "a digest that knows no columns",
        "executor/digests.py",
        "block.whole_col * ITEM_SIZE[tensor.dtype]",
        "0",
        ("integration/test_manifest.py::test_the_same_in_every_layout",),
    ),
)
NAMES = (
    Fault(
        "rename before sync",
        "executor/output.py",
        "            if self._sync:\n                durable.sync_tree(self.folder)\n"
        "            self._put_in_place()\n",
        "            self._put_in_place()\n"
        "            if self._sync:\n                durable.sync_tree(self.final)\n",
        ("integration/test_power_loss.py::test_the_order_of_sync_and_rename",),
    ),
    Fault(
        "new folders above not synced",
        "executor/output.py",
        "for made in (self.final, *self._new_parents) if self._sync",
        "for made in (self.final,) if self._sync",
        ("integration/test_power_loss.py::test_new_folders_above_are_safe_too",),
    ),
    Fault(
        "an existing output replaced unasked",
        "executor/output.py",
        "if not self._overwrite:\n            raise OutputError(\n"
        '                f"{self.final} exists and is',
        "if not names:\n            raise OutputError(\n"
        '                f"{self.final} exists and is',
        ("integration/test_output_safety.py::test_an_existing_output_is_refused",),
    ),
    Fault(
        "the journal of another start believed",
        "executor/journal.py",
        "if head not in {_head(request, boot) for boot in boots if boot}:",
        "if not head.startswith(request.encode()):",
        (JOURNAL,),
    ),
    Fault(
        "the journal of another request believed",
        "executor/journal.py",
        "if head not in {_head(request, boot) for boot in boots if boot}:",
        "if not any(head.endswith(boot.encode()) for boot in boots if boot):",
        (f"{JOURNAL}::test_another_request",),
    ),
    Fault(
        "staged files not looked at",
        "executor/journal.py",
        "if not all(_in_place(folder / name, size) for name, size in files.items()):",
        "if not folder.is_dir():",
        (f"{JOURNAL}::test_files_must_be_as_they_were_left",),
    ),
)
FAULTS = (*FUSE_AND_SHARD, *PLACES, *PLANS, *CHECKS, *BYTES, *NAMES)


def run_tests(fault: Fault, *, harmless: bool = False, root: Path = ROOT) -> tuple[int, str]:
    """Runs the tests of a fault against a copy of the package that has it.

    Args:
        harmless: leave the fault out.
        root: the repository.

    Returns:
        pytest's exit code, and what it printed.

    Raises:
        subprocess.TimeoutExpired: no result in time.
    """
    with tempfile.TemporaryDirectory(prefix="mmconvert-fault-") as name:
        package = Path(name, "mmconvert")
        shutil.copytree(root / "mmconvert", package, ignore=shutil.ignore_patterns("__pycache__"))
        if not harmless:
            path = package / fault.file
            text = path.read_text(encoding="utf-8")
            assert text.count(fault.text) == 1, fault.name
            path.write_text(text.replace(fault.text, fault.wrong), encoding="utf-8")
        paths = [str(root / "tests" / t) if ".py" in t else t for t in fault.tests]
        options = ["-x", "-q", "-n", "0", "-p", "no:cacheprovider", "-c", root / "pyproject.toml"]
        basetemp = Path(name, "tests")
        # The working folder comes before everything on Python's path, so that the copy is found.
        done = subprocess.run(
            [sys.executable, "-m", "pytest", *options, f"--basetemp={basetemp}", *paths],
            cwd=name,
            env={**os.environ, "PYTHONPATH": name, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=SECONDS,
        )
        return done.returncode, done.stdout


def main(words: list[str]) -> int:
    caught = 0
    chosen = [f for f in FAULTS if not words or any(word in f.name for word in words)]
    for fault in chosen:
        code, printed = run_tests(fault)
        caught += code == TESTS_FAILED
        last = next((s for s in printed.splitlines() if s.startswith(("FAILED", "ERROR"))), "")
        print(
            f"{'caught' if code == TESTS_FAILED else f'NOT ({code})':8} {fault.name}: {last}",
            flush=True,
        )
    print(f"{caught} of {len(chosen)} caught")
    return int(caught < len(chosen))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
