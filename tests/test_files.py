"""The one writer: file modes follow the umask, what is kept from others does not."""

from __future__ import annotations

import os
import stat

import pytest

from fedlora.files import append_line, write_bytes, write_json


@pytest.fixture
def umask():
    before = os.umask(0o022)
    yield os.umask
    os.umask(before)


@pytest.mark.parametrize(("mask", "expected"), [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600), (0o027, 0o640)])
def test_modes_follow_the_umask(tmp_path, umask, mask, expected):
    umask(mask)
    write_bytes(tmp_path / "a.bin", b"x")
    write_json(tmp_path / "a.json", {})
    append_line(tmp_path / "a.jsonl", {})
    write_bytes(tmp_path / "secret", b"x", mode=0o600)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
    assert modes == {"a.bin": expected, "a.json": expected, "a.jsonl": expected, "secret": 0o600}


def test_a_secret_stays_one_when_it_is_replaced_and_was_open_to_all(tmp_path):
    path = tmp_path / "secret"
    path.write_bytes(b"old")
    path.chmod(0o666)
    write_bytes(path, b"new", mode=0o600)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_link_is_replaced_and_not_followed(tmp_path):
    (tmp_path / "outside").write_bytes(b"mine")
    (tmp_path / "a.json").symlink_to(tmp_path / "outside")
    write_json(tmp_path / "a.json", {})
    assert (tmp_path / "outside").read_bytes() == b"mine"
    assert not (tmp_path / "a.json").is_symlink()


def test_what_lies_in_the_place_of_the_temporary_file_is_not_used(tmp_path):
    (tmp_path / "outside").write_bytes(b"mine")
    temporary = tmp_path / f".a.tmp-{os.getpid()}"
    temporary.symlink_to(tmp_path / "outside")
    write_bytes(tmp_path / "a", b"x", mode=0o600)
    temporary.touch(mode=0o666)
    write_bytes(tmp_path / "a", b"y", mode=0o600)
    assert (tmp_path / "outside").read_bytes() == b"mine"
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o600
    assert not temporary.exists()
