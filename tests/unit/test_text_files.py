"""Text files that a person writes, as editors save them."""

import os
import stat
import sys

import pytest

from midfill.system import text_files as textfiles

TEXT = 'eagerness = "low"  # ruhig, tranquilo, 静か\n'


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_a_byte_order_mark_is_no_part_of_the_text(mark):
    assert textfiles.decode(mark + TEXT.encode()) == TEXT
    assert textfiles.decode(mark) == ""


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-be"])
def test_another_encoding_is_named_with_what_to_do(encoding):
    with pytest.raises(UnicodeError, match=r"UTF-(16|32).*Save it as UTF-8"):
        textfiles.decode(TEXT.encode(encoding))


def test_a_line_in_an_old_code_page_is_named():
    with pytest.raises(UnicodeError, match=r"line 2 is not in UTF-8\. Save it as UTF-8"):
        textfiles.decode(b"a = 1\nb = '\xfcber'\n")


@pytest.fixture
def umask():
    old = os.umask(0o022)
    yield
    os.umask(old)


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX modes and links")
@pytest.mark.usefixtures("umask")
class TestReplace:
    @pytest.mark.parametrize("mode", [0o600, 0o640, 0o644])
    def test_the_mode_of_a_file_stays(self, tmp_path, mode):
        path = tmp_path / "a.toml"
        path.write_text("a")
        path.chmod(mode)
        textfiles.replace(path, "b\r\n")
        assert path.read_bytes() == b"b\r\n"
        assert stat.S_IMODE(path.stat().st_mode) == mode

    def test_a_new_file_is_made_with_its_folders(self, tmp_path):
        path = tmp_path / "deep" / "er" / "a.toml"
        textfiles.replace(path, "b")
        assert path.read_text() == "b"
        assert stat.S_IMODE(path.stat().st_mode) == 0o644

    @pytest.mark.parametrize("exists", [True, False])
    def test_a_chain_of_links_stays_and_its_end_is_written(self, tmp_path, exists):
        real = tmp_path / "dotfiles" / "midfill.toml"
        if exists:
            real.parent.mkdir()
            real.write_text("a")
        middle, link = tmp_path / "middle", tmp_path / "config.toml"
        middle.symlink_to("dotfiles/midfill.toml")
        link.symlink_to(middle)
        textfiles.replace(link, "b")
        assert link.is_symlink()
        assert middle.is_symlink()
        assert real.read_text() == "b"

    def test_a_file_that_cannot_be_replaced_is_as_it_was(self, tmp_path):
        path = tmp_path / "a.toml"
        path.mkdir()
        with pytest.raises(OSError, match="directory"):
            textfiles.replace(path, "b")
        assert [one.name for one in tmp_path.iterdir()] == ["a.toml"]

    @pytest.mark.skipif(sys.platform == "win32" or os.geteuid() == 0, reason="root may write everything")
    def test_a_read_only_file_is_respected(self, tmp_path):
        path = tmp_path / "a.toml"
        path.write_text("a")
        path.chmod(0o444)
        with pytest.raises(PermissionError, match="read-only"):
            textfiles.replace(path, "b")
        assert path.read_text() == "a"

    def test_a_private_file_is_its_owners_alone_whatever_it_was(self, tmp_path):
        real, link = tmp_path / "index.json", tmp_path / "link.json"
        link.symlink_to(real)
        for mode in (None, 0o644, 0o400):
            if mode is not None:
                real.chmod(mode)
            textfiles.replace(link, f"{mode}", private=True)
            assert link.is_symlink()
            assert real.read_text() == f"{mode}"
            assert stat.S_IMODE(real.stat().st_mode) == 0o600
        assert sorted(one.name for one in tmp_path.iterdir()) == ["index.json", "link.json"]

    def test_no_folder_is_made_for_a_private_file(self, tmp_path):
        with pytest.raises(FileNotFoundError):
            textfiles.replace(tmp_path / "none" / "a.json", "b", private=True)
        assert not list(tmp_path.iterdir())

    def test_a_pipe_is_written_to_and_stays(self, tmp_path):
        pipe = tmp_path / "pipe"
        os.mkfifo(pipe)
        reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
        try:
            textfiles.replace(pipe, "job", private=True)
            assert os.read(reader, 100) == b"job"
        finally:
            os.close(reader)
        assert stat.S_ISFIFO(pipe.stat().st_mode)
