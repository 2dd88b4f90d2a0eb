"""A few mutated inputs of every format; ``tests/fuzz_readers.py`` makes as many as one likes."""

from collections import Counter

import pytest

import fuzz_readers


@pytest.mark.parametrize("source", fuzz_readers.GENERATORS)
def test_mutated_files_are_refused_or_read_as_they_are(source):
    outcomes = [fuzz_readers.fuzz_reader(source, number) for number in range(15)]
    assert [outcome for outcome in outcomes if outcome.startswith("!")] == []
    counts = Counter(outcomes)
    assert counts["accepted"] >= 5  # every third is as it was
    assert counts["refused"]


def test_mutated_prepared_data_are_refused_or_the_same(tmp_path):
    original = fuzz_readers.make_prepared(tmp_path)
    outcomes = [fuzz_readers.fuzz_prepared(original, number) for number in range(40)]
    assert [outcome for outcome in outcomes if outcome.startswith("!")] == []
    assert outcomes.count("refused") > 30


@pytest.mark.parametrize("source", fuzz_readers.GENERATORS)
def test_a_reader_that_bends_a_value_is_found(source, monkeypatch):
    """The slow reading does not follow the readers, so what they get wrong shows."""
    original = fuzz_readers.read

    def late(*arguments, **options):
        log = original(*arguments, **options)
        log.events = log.events.with_columns(time=log.events["time"] + 1)
        return log

    monkeypatch.setattr(fuzz_readers, "read", late)
    assert fuzz_readers.fuzz_reader(source, 0).startswith("!read otherwise")
