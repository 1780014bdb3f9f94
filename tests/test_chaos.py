"""A run that is killed ends with the bits of one that is not; `chaos.py` has the whole table."""

import pytest


@pytest.fixture
def chaos(experiment):
    return experiment("benchmarks/chaos")


def test_a_run_that_is_killed_while_it_saves_ends_with_the_same_bits(
    chaos, tmp_path, compiled_folder, monkeypatch
):
    monkeypatch.delenv("XLA_FLAGS")  # one device
    monkeypatch.setenv("JAX_ENABLE_COMPILATION_CACHE", "true")
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(compiled_folder))
    whole = chaos.ended(chaos.start(tmp_path / "whole"))
    assert (whole.code, whole.errors) == (0, [])
    expected = chaos.result(tmp_path / "whole")
    assert len(expected["sft"]) > 30 and len(expected["lines"]) == 20
    row = chaos.killed(tmp_path / "killed", ("saving", 2, 0.01), expected)
    assert row.held, row.how


@pytest.mark.slow
def test_whatever_happens_to_a_run_it_continues_or_is_refused_in_one_line(chaos, tmp_path):
    for row in chaos.rows(tmp_path, every=6):
        assert row.held, row
