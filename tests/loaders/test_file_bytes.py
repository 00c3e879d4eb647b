"""A file's bytes come whole and in order, in place and copied; a file that is cut short is an error, not a signal."""

import errno
import mmap
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from assay.loaders import file_bytes as under_test
from assay.loaders.file_bytes import Pieces, file_bytes

WAYS = [
    pytest.param("in place", marks=pytest.mark.skipif(sys.platform != "linux", reason="only Linux can")),
    "copied",
]
PAGES = 5 * mmap.PAGESIZE


@contextmanager
def opened(path: Path, way: str) -> Iterator[Pieces]:
    """The file's bytes in one of the two ways, in small arrays."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(under_test, "IN_PLACE", 3000)
        patch.setattr(under_test, "COPIED", 3000)
        if way == "copied":
            patch.setattr(under_test, "_brings_pages", lambda mapping: False)
        yield file_bytes(path)


@pytest.mark.parametrize("way", WAYS)
@given(begin=st.integers(0, PAGES), nbytes=st.integers(0, PAGES), unit=st.sampled_from([1, 2, 17, 34, 210]))
def test_every_byte_once(way, tmp_path_factory, begin, nbytes, unit):
    path = tmp_path_factory.getbasetemp() / "bytes"
    raw = np.random.default_rng(3).bytes(2 * PAGES)
    path.write_bytes(raw)
    with opened(path, way) as pieces:
        got = [array.tobytes() for array in pieces(begin, nbytes, unit)]
    assert b"".join(got) == raw[begin : begin + nbytes]
    assert [len(piece) for piece in got[:-1]] == [3000 // unit * unit] * (len(got) - 1)


@pytest.mark.parametrize("way", WAYS)
def test_whether_they_are_copied(way, tmp_path):
    (tmp_path / "file").write_bytes(bytes(100))
    with opened(tmp_path / "file", way) as pieces:
        (array,) = pieces(0, 100, 1)
    assert array.flags.writeable == (way == "copied")


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kept", [0, 100, mmap.PAGESIZE, PAGES - 100])
def test_a_file_cut_short_after_it_was_opened(way, tmp_path, kept):
    """Also within its last page, which then shows zeros where the bytes were."""
    (tmp_path / "short").write_bytes(bytes(PAGES))
    with opened(tmp_path / "short", way) as pieces:
        os.truncate(tmp_path / "short", kept)
        with pytest.raises(EOFError):
            list(pieces(0, PAGES, 1))
        assert sum(map(len, pieces(0, kept, 1))) == kept


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has MADV_POPULATE_READ")
def test_a_disk_that_cannot_deliver(tmp_path, monkeypatch):
    """Bringing the pages in fails though the file is as long as it was."""
    (tmp_path / "file").write_bytes(bytes(PAGES))

    class Mapping(mmap.mmap):
        def madvise(self, option: int, start: int = 0, length: int = 0) -> None:
            if option == under_test.POPULATE_READ and start:
                raise OSError(errno.EFAULT, "Bad address")

    with open(tmp_path / "file", "rb") as file:
        monkeypatch.setattr(under_test, "map_file", lambda path: Mapping(file.fileno(), 0, access=mmap.ACCESS_READ))
        with pytest.raises(OSError, match=os.strerror(errno.EIO)):
            list(file_bytes(tmp_path / "file")(mmap.PAGESIZE, 100, 1))


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has MADV_POPULATE_READ")
def test_a_system_without_it_copies(tmp_path, monkeypatch):
    (tmp_path / "file").write_bytes(b"abc")

    class Mapping(mmap.mmap):
        def madvise(self, option: int, start: int = 0, length: int = 0) -> None:
            raise OSError(errno.EINVAL, "Invalid argument")

    with open(tmp_path / "file", "rb") as file:
        monkeypatch.setattr(under_test, "map_file", lambda path: Mapping(file.fileno(), 0, access=mmap.ACCESS_READ))
        (array,) = file_bytes(tmp_path / "file")(1, 2, 1)
    assert array.tobytes() == b"bc"
    assert array.flags.writeable
