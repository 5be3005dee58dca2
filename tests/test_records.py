"Records travel with the package and are found by name."
import pytest

import keep
from efcn_nb.service.records import record_folder, record_names

COMMITTED = {path for path in (keep.ROOT / keep.PACKAGE / "records").rglob("*") if path.is_file()}


def test_each_committed_table_belongs_to_a_record_that_says_where_it_comes_from():
    assert {path.parent for path in COMMITTED} == {record_folder(name) for name in record_names()}
    for name in record_names():
        assert name == "bench_embed" or (record_folder(name) / "command.txt").read_text().strip()


def test_an_unknown_record_is_refused_with_the_names_that_there_are():
    with pytest.raises(ValueError, match="no record is called 'photos'; there are .*photographs_1k, "):
        record_folder("photos")
    with pytest.raises(ValueError, match="no record is called"): record_folder("../ladder")


def test_records_are_small():
    "They are in every wheel."
    assert sum(path.stat().st_size for path in COMMITTED) < 3e6
