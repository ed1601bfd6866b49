"""Flat token files are read as their writers meant them, and refused in one line where they are not whole."""

import numpy as np
import pytest
from specimens import tokenizer

from longlora.data.flat import flat_documents

WORDS = tokenizer()  # begin 0, end 1, 300 ids


def put(file, tokens) -> None:
    np.array(tokens, dtype="<u2").tofile(file)


@pytest.mark.parametrize(
    ("tokens", "cut"),
    [
        ([0, 5, 6, 1, 0, 7, 1], [[0, 5, 6, 1], [0, 7, 1]]),
        ([5, 6, 0, 7, 8], [[5, 6], [0, 7, 8]]),
        ([5, 6, 1, 7, 8, 1], [[5, 6, 1], [7, 8, 1]]),
        ([5, 6, 1, 7], [[5, 6, 1], [7]]),
        ([299, 298, 297], [[299, 298, 297]]),
    ],
)
def test_documents_are_cut_at_begin_marks_else_behind_end_marks(tmp_path, tokens, cut):
    put(tmp_path / "pg19.bin", tokens)
    found = flat_documents(tmp_path / "pg19.bin", tokenizer=WORDS)
    assert list(found) == [f"pg19-{i}" for i in range(len(cut))]
    assert [d.tolist() for d in found.values()] == cut


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "has 0 bytes; a file of uint16 tokens has an even number"),
        (b"abc", "has 3 bytes; a file of uint16 tokens has an even number"),
        (np.array([3, 31999, 4], dtype="<u2").tobytes(), "holds token 31999, at place 1, and the tokenizer has 300"),
        (None, "no token file at"),
    ],
)
def test_what_is_no_such_file_is_refused_in_one_line(tmp_path, data, said):
    if data is not None:
        (tmp_path / "x.bin").write_bytes(data)
    with pytest.raises(ValueError, match=said) as error:
        flat_documents(tmp_path / "x.bin", tokenizer=WORDS)
    assert "\n" not in str(error.value)
