"""A few damages of every kind of file; ``python tests/fuzz_files.py --count N`` tries more."""

import collections

import fuzz_files


def test_damaged_files_are_refused_or_whole(tmp_path):
    found = list(fuzz_files.trials(tmp_path, 150, seed=1))
    assert not [trial for trial in found if trial[1].isupper()]
    ends = collections.Counter(end for _, end, _ in found)
    assert ends["refused"] > 100
    assert len({name for name, _, _ in found}) == 5


def test_the_fuzzer_sees_a_silent_change(tmp_path, monkeypatch):
    """Without the checksum some damages load with other numbers: it is what this looks for."""
    monkeypatch.setattr("lcr_fast.storage._check_metadata", lambda *_: None)
    ends = collections.Counter(end for _, end, _ in fuzz_files.trials(tmp_path, 60, seed=1))
    assert ends["SILENT CHANGE"] > 5
