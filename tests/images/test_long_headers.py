"""Files without an end, while their images are counted: only their beginning is read."""

import pytest

from vlsm.archive.archive import open_archive

SIZE = 1 << 41  # bytes of a file that takes no room on the disk


@pytest.mark.parametrize(("name", "reason"), [("a.dcm", "corrupt"), ("a.tif", "corrupt")])
def test_a_file_of_zeros_is_a_failed_row_at_once(tmp_path, name, reason):
    with (tmp_path / name).open("wb") as file:
        file.truncate(SIZE)
    (row,) = open_archive(str(tmp_path / name), ("polyp",)).rows
    assert row["problem"].startswith(reason)
