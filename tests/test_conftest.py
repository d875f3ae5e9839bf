"""Tests of a file share what they have trained, so they go to one test process."""

import os

import pytest


@pytest.mark.parametrize("number", range(8))
def test_a_file_goes_to_one_process(number, tmp_path_factory):
    shared = tmp_path_factory.getbasetemp()
    worker = os.environ.get("PYTEST_XDIST_WORKER", "")
    note = (shared.parent if worker else shared) / "who-had-test-conftest"
    if not note.exists():
        note.write_text(worker)
    assert note.read_text() == worker
