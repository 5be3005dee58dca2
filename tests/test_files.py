"Files are whole or not there, and folders are held by one process."
import os
from pathlib import Path

import platformdirs
import pytest

from efcn_nb.service.files import cache_folder, held, make_folder, write_atomic


@pytest.mark.parametrize("failing", ["replace", "fsync"])
def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, failing):
    write_atomic(tmp_path/"a.csv", "old")
    def fail(*args): raise OSError("disk full")
    monkeypatch.setattr(os, failing, fail)
    with pytest.raises(OSError, match="disk full"): write_atomic(tmp_path/"a.csv", "new")
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {"a.csv": "old"}


@pytest.mark.parametrize("content", ["täxt\n", b"\x00\xff"])
def test_written_as_it_is(tmp_path, content):
    write_atomic(tmp_path/"a", content)
    assert (tmp_path/"a").read_bytes() == (content if isinstance(content, bytes) else content.encode())


@pytest.mark.parametrize("spoil",
                         [lambda folder: folder.write_text("a file"),
                          lambda folder: (folder/"lock").mkdir(parents=True)],
                         ids=["no folder", "no lock"])
def test_a_folder_that_cannot_be_held_is_one_sentence(tmp_path, spoil):
    spoil(tmp_path/"s")
    with pytest.raises(OSError, match="nothing can be written to .*choose another folder") as error:
        with held(tmp_path/"s"): pass
    assert len(str(error.value).splitlines()) == 1


# The cache folder

def test_the_cache_folder(monkeypatch, tmp_path):
    for named, found in {tmp_path: tmp_path, "~/runs": Path.home()/"runs", "runs": Path.cwd()/"runs"}.items():
        monkeypatch.setenv("EFCN_NB_RUNS", str(named))
        assert cache_folder() == found
    assert not (tmp_path/"runs").exists()
    for unset in (lambda: monkeypatch.setenv("EFCN_NB_RUNS", "")), (lambda: monkeypatch.delenv("EFCN_NB_RUNS")):
        unset()
        assert cache_folder() == Path(platformdirs.user_cache_dir("efcn_nb"))/"runs"


def test_no_test_sees_the_cache_of_the_user():
    assert Path(platformdirs.user_cache_dir("efcn_nb")) not in cache_folder().parents


def test_a_folder_that_cannot_be_made_is_one_sentence(tmp_path):
    (tmp_path/"file").write_text("")
    for path in tmp_path/"file", tmp_path/"file"/"below":
        with pytest.raises(OSError, match="cannot be made a folder .*: choose another one$"): make_folder(path)
