"""Faults made by hand in the core are noticed by the tests; see ``corefaults``."""

from __future__ import annotations

import pytest

from corefaults import FAULTS, ROOT, TESTS_FAILED, Fault, run_tests

each = pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
SELECTIONS = {fault.tests: fault for fault in FAULTS}


@each
def test_the_list_is_of_this_source(fault: Fault) -> None:
    text = (ROOT / "mmconvert" / fault.file).read_text(encoding="utf-8")
    assert text.count(fault.text) == 1
    assert fault.wrong != fault.text
    compile(text.replace(fault.text, fault.wrong), fault.file, "exec")
    for name in (test.partition("::")[0] for test in fault.tests if ".py" in test):
        assert (ROOT / "tests" / name).is_file()


def test_no_fault_is_listed_twice() -> None:
    assert len(FAULTS) >= 30
    assert len({fault.name for fault in FAULTS}) == len(FAULTS)
    assert len({(fault.file, fault.text, fault.wrong) for fault in FAULTS}) == len(FAULTS)


@pytest.mark.nightly
@each
def test_a_fault_is_noticed(fault: Fault) -> None:
    code, printed = run_tests(fault)
    assert code == TESTS_FAILED, printed


@pytest.mark.nightly
@pytest.mark.parametrize("fault", SELECTIONS.values(), ids=lambda fault: " ".join(fault.tests))
def test_its_tests_pass_without_it(fault: Fault) -> None:
    code, printed = run_tests(fault, harmless=True)
    assert code == 0, printed
