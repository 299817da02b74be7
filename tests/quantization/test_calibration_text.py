"""What is calibrated on, and what is said where it does not do."""

import pytest
import torch
from tiny_models import tokenizer

from sloth_plugins.errors import SlothError
from sloth_plugins.quantization.text import calibration_rows


def test_rows_are_spread_over_the_whole_text(tmp_path):
    (tmp_path / "text.txt").write_text("a" * 500 + "b" * 500)
    rows = calibration_rows(tokenizer(), tmp_path / "text.txt", 5, 10)
    assert rows.shape == (5, 10)
    assert tokenizer().decode(rows[0]) == "a" * 10
    assert tokenizer().decode(rows[-1]) == "b" * 10


def test_of_a_long_file_pieces_are_read(tmp_path):
    # Two bytes a character: every piece but the first begins or ends within one, sooner or later.
    (tmp_path / "text.txt").write_text("".join(chr(0xE0 + index % 17) for index in range(40_001)), encoding="utf-8")
    rows = calibration_rows(tokenizer(), tmp_path / "text.txt", 7, 11)
    assert rows.shape == (7, 11)
    assert len({tuple(row.tolist()) for row in rows}) > 1


def test_rows_do_not_overlap_where_text_is_just_enough(tmp_path):
    (tmp_path / "text.txt").write_text("".join(chr(33 + index % 90) for index in range(64)))
    rows = calibration_rows(tokenizer(), tmp_path / "text.txt", 4, 16)
    expected = torch.tensor(tokenizer()((tmp_path / "text.txt").read_text())["input_ids"]).view(4, 16)
    assert torch.equal(rows, expected)


def test_the_builtin_text_is_the_same_each_time_and_is_text():
    rows = calibration_rows(tokenizer(), "builtin", 8, 256)
    assert torch.equal(rows, calibration_rows(tokenizer(), "builtin", 8, 256))
    text = "".join(tokenizer().decode(row) for row in rows)
    assert sum(text.count(word) for word in ("the", "return", "def ", "self")) > 10


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is empty"),
        (b"  \n\n ", "is empty"),
        (b"\x89PNG\r\n\x1a\n\xff\xfe", "is no UTF-8 text"),
        (b"GGUF\0\0\0text", "is no UTF-8 text"),
        (b"word " * 20, "has 100 tokens, 4 samples of 32 take 128; give more text, or --samples 3"),
        (b"word", "has 4 tokens, 4 samples of 32 take 128; give more text"),
    ],
)
def test_text_that_does_not_do_is_one_line(tmp_path, content, said):
    (tmp_path / "text.txt").write_bytes(content)
    with pytest.raises(SlothError, match=r"text\.txt") as raised:
        calibration_rows(tokenizer(), tmp_path / "text.txt", 4, 32)
    assert said in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_file_that_is_not_there_has_a_nearest_one(tmp_path):
    (tmp_path / "train.txt").write_text("text")
    with pytest.raises(SlothError, match=r"trian.txt is no file; did you mean 'train.txt'\?.* builtin"):
        calibration_rows(tokenizer(), tmp_path / "trian.txt", 4, 32)


@pytest.mark.parametrize(("samples", "length"), [(0, 32), (4, 1), (-1, 10)])
def test_no_samples_are_no_calibration(samples, length):
    with pytest.raises(SlothError, match="nothing to calibrate on"):
        calibration_rows(tokenizer(), "builtin", samples, length)
