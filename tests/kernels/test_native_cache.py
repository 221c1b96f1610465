"""The compiled kernels' cache: nobody but its user may have written what is loaded from there."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from jakiro_vllm.kernels import native

pytestmark = pytest.mark.skipif(native.compiler() is None, reason="there is no C++ compiler")


@pytest.fixture
def private_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], Path]:
    """A cache folder of this test, and a source that builds in no time; called, it builds."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(native, "SOURCES", (tmp_path / "native.cpp",))
    native.SOURCES[0].write_text('extern "C" int tree_attention(const void*) { return 0; }')
    compiler = native.compiler()
    assert compiler is not None
    return lambda: native.build(compiler)


def mode(path: Path) -> int:
    return path.lstat().st_mode & 0o777


@pytest.mark.parametrize("umask", [0o000, 0o002, 0o022], ids=oct)
def test_only_its_user_may_write_into_the_cache(umask: int, private_cache: Callable[[], Path]) -> None:
    kept = os.umask(umask)
    try:
        built = private_cache()
    finally:
        os.umask(kept)
    assert mode(built.parent) == 0o700
    assert mode(built) == 0o700


def test_a_cache_that_was_open_to_others_is_closed_and_built_anew(private_cache: Callable[[], Path]) -> None:
    """Whoever could write the library could have written anything."""
    built = private_cache()
    good = built.read_bytes()
    built.parent.chmod(0o775)
    assert private_cache().read_bytes() == good
    assert mode(built.parent) == 0o700
    built.write_bytes(b"planted")
    built.chmod(0o770)
    assert private_cache().read_bytes() == good
    assert mode(built) == 0o700


def test_a_link_in_place_of_the_library_is_not_followed(private_cache: Callable[[], Path], tmp_path: Path) -> None:
    built = private_cache()
    planted = tmp_path / "planted.so"
    built.rename(planted)
    planted.write_bytes(b"planted")
    planted.chmod(0o700)
    built.symlink_to(planted)
    assert private_cache().read_bytes() != b"planted"
    assert not built.is_symlink()


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give a file to another user")
@pytest.mark.parametrize("owned", ["library", "folder", "parent", "open parent"])
def test_what_another_user_could_have_written_is_not_loaded(
    owned: str, private_cache: Callable[[], Path], caplog: pytest.LogCaptureFixture
) -> None:
    built = private_cache()
    good = built.read_bytes()
    if owned == "library":
        built.write_bytes(b"planted")
        os.chown(built, 12345, 12345)
        assert private_cache().read_bytes() == good
        assert built.lstat().st_uid == os.getuid()
        return
    built.write_bytes(b"planted")
    if owned == "open parent":
        built.parent.parent.chmod(0o777)
    else:
        os.chown(built.parent if owned == "folder" else built.parent.parent, 12345, 12345)
    elsewhere = private_cache()
    assert elsewhere.read_bytes() == good
    assert elsewhere != built
    assert mode(elsewhere.parent) == 0o700
    assert "another user" in caplog.text
    assert built.read_bytes() == b"planted", "what is not ours is left alone"


def test_a_sticky_folder_may_hold_the_cache(private_cache: Callable[[], Path], tmp_path: Path) -> None:
    """As /tmp: everyone may write there, but nobody may move what is another's."""
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache").chmod(0o1777)
    built = private_cache()
    assert built.is_relative_to(tmp_path / "cache")
    assert private_cache() == built


def test_a_relative_cache_folder_is_ignored(
    private_cache: Callable[[], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a library would be loaded from wherever the command was started; the XDG specification says so, too."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", "cache")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert private_cache().is_relative_to(tmp_path / "home" / ".cache")


def test_without_a_home_the_library_is_built_for_this_process(
    private_cache: Callable[[], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", homeless)
    assert private_cache().exists()
