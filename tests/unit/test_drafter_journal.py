from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fourfold.drafter.journal import Journal, work_key

ROWS = [{"id": f"row {i}", "token_ids": [i, i + 1], "text": "é\u2028"} for i in range(3)]


def write(folder: Path, key: str = "k") -> Path:
    with Journal(folder, "answers", key) as journal:
        for row in ROWS:
            journal.append(row)
    return journal.path


def test_rows_are_read_back(tmp_path: Path) -> None:
    write(tmp_path / "work")
    with Journal(tmp_path / "work", "answers", "k") as journal:
        assert list(journal.rows.values()) == ROWS


def test_each_row_is_in_the_file_at_once(tmp_path: Path) -> None:
    with Journal(tmp_path, "answers", "k") as journal:
        for number, row in enumerate(ROWS, 1):
            journal.append(row)
            assert journal.path.read_bytes().count(b"\n") == number


def test_a_torn_line_is_dropped_wherever_it_was_cut(tmp_path: Path) -> None:
    path = write(tmp_path)
    content = path.read_bytes()
    for length in range(len(content) + 1):
        path.write_bytes(content[:length])
        whole = content[:length].count(b"\n")
        with Journal(tmp_path, "answers", "k") as journal:
            assert list(journal.rows.values()) == ROWS[:whole]
            for row in ROWS[whole:]:
                journal.append(row)
        assert path.read_bytes() == content


@pytest.mark.parametrize("rubbish", [b"\xff\xfe\n", b"[1]\n", b"{}\n", b"\0\0\0\0"])
def test_rubbish_ends_what_is_read(tmp_path: Path, rubbish: bytes) -> None:
    path = write(tmp_path)
    content = path.read_bytes()
    path.write_bytes(content + rubbish)
    with Journal(tmp_path, "answers", "k") as journal:
        assert list(journal.rows.values()) == ROWS
    assert path.read_bytes() == content


def test_a_journal_of_other_settings_is_not_used(tmp_path: Path) -> None:
    write(tmp_path, work_key("a", {"target": "1"}))
    with Journal(tmp_path, "answers", work_key("b", {"target": "1"})) as journal:
        assert journal.rows == {}


@given(st.lists(st.tuples(st.text(max_size=3), st.text(max_size=3)), min_size=2, max_size=5, unique=True))
def test_keys_differ_where_settings_or_inputs_do(pairs: list[tuple[str, str]]) -> None:
    keys = [work_key(settings, {"target": value}) for settings, value in pairs]
    assert len(set(keys)) == len(pairs)


def test_a_journal_can_be_removed(tmp_path: Path) -> None:
    path = write(tmp_path)
    Journal(tmp_path, "answers", "k").remove()
    assert not path.exists()
