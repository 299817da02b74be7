"""Rows of files: what is wrong with one is counted with its line, and the others come as they were written."""

import csv
import json

import pyarrow as pa
import pytest
from chat_tokenizers import tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from sloth_plugins.data import check_rows, load_rows
from sloth_plugins.errors import SlothError

CELL = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=10).filter(str.strip)
ROWS = st.lists(st.fixed_dictionaries({"instruction": CELL, "output": CELL}), min_size=1, max_size=6)


def write(path, rows):
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    elif path.suffix == ".csv":
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), quoting=csv.QUOTE_ALL)
            writer.writeheader()
            writer.writerows(rows)
    else:
        parquet.write_table(pa.Table.from_pylist(rows), path)
    return path


def found(report):
    return [(problem.line, problem.kind) for problem in report.problems]


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
@settings(max_examples=30, deadline=None)
@given(rows=ROWS)
def test_texts_come_through_as_they_are(tmp_path_factory, suffix, rows):
    path = write(tmp_path_factory.mktemp("rows") / f"train{suffix}", rows)
    assert load_rows(path).to_list() == rows


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_chinese_and_emoji(tmp_path, suffix, capsys):
    rows = [{"instruction": "请写一首诗、\n关于春天", "output": '"春眠不觉晓"、🌸👩‍👩‍👧‍👦🇩🇪\u2028', "input": ""}] * 3
    assert load_rows(write(tmp_path / f"a{suffix}", rows)).to_list() == rows
    assert capsys.readouterr().err == ""


def test_lines_of_jsonl(tmp_path, capsys):
    lines = [
        b'\xef\xbb\xbf{"instruction": "a", "output": "b"}',
        b"",
        b'{"instruction": "a"}',
        b'{"instruction": "a", "output": 5}',
        b'{"instruction": "  ", "output": "b"}',
        b'{"instruction": "a", "output": null}',
        b'{"instruction": "a", "output": "b"',
        b'["a"]',
        b'{"instruction": "\xff", "output": "b"}',
        b'{"instruction": "\\ud800", "output": "b"}',
        '{"instruction": "很长", "output": "'.encode() + b"x" * 40 + b'"}',
        b'{"instruction": "c", "output": "d", "input": "e"}',
        b'{"instruction": "c", "output": "d", "input": 7}',
    ]
    path = tmp_path / "train.jsonl"
    path.write_bytes(b"\r\n".join(lines))
    report = check_rows(path, max_length=20)
    assert found(report) == [
        (3, "missing column"),
        (4, "wrong type"),
        (5, "empty text"),
        (6, "missing column"),
        (7, "unreadable"),
        (8, "unreadable"),
        (9, "unreadable"),
        (10, "unreadable"),
        (11, "too long"),
        (13, "wrong type"),
    ]
    data = load_rows(path, max_length=20)
    assert data.to_list() == [
        {"instruction": "a", "output": "b", "input": None},
        {"instruction": "c", "output": "d", "input": "e"},
    ]
    said = capsys.readouterr().err
    assert f"{path}: 2 rows read, 10 left out" in said
    assert "missing column: 2 (line 3: no 'output'; line 6: no 'output')" in said
    assert "too long: 1 (line 11: 42 characters, and at most 20 are wanted)" in said
    with pytest.raises(SlothError, match=r"train\.jsonl, line 3: missing column: no 'output'"):
        load_rows(path, strict=True)


def test_lines_of_csv(tmp_path):
    path = tmp_path / "train.csv"
    text = 'instruction,output\n"two\nlines",b\na\na,\na,b,c\n\n' + "x" * 200_000 + ',"b\xff'
    path.write_bytes(text.encode("latin-1"))
    report = check_rows(path)
    assert found(report) == [
        (4, "missing column"),
        (5, "empty text"),
        (6, "unreadable"),
        (8, "unreadable"),
    ]
    assert report.rows == [{"instruction": "two\nlines", "output": "b"}]
    path.write_bytes(b"a,b\n\xff,x\n\xe4\xbd\xa0,x\n")
    assert found(check_rows(path)) == [(2, "unreadable")]
    assert check_rows(path).rows == [{"a": "你", "b": "x"}]


def test_rows_of_parquet(tmp_path):
    path = write(tmp_path / "a.parquet", [{"a": "x", "n": 1}, {"a": None, "n": 2}, {"a": " ", "n": 3}])
    assert found(check_rows(path)) == [(2, "missing column"), (3, "empty text")]
    assert "row 2: no 'a'" in check_rows(path).summary()
    path.write_bytes(b"PAR1")
    with pytest.raises(SlothError, match="cannot be read as parquet"):
        check_rows(path)


def test_conversations(tmp_path):
    good = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "", "tool_calls": []}]
    rows = [
        {"messages": good},
        {"messages": []},
        {"messages": [{"role": "user", "content": ""}]},
        {"messages": "q"},
        {},
    ]
    path = write(tmp_path / "a.jsonl", rows)
    expected = [(2, "empty text"), (3, "empty text"), (4, "wrong type"), (5, "missing column")]
    assert found(check_rows(path, {"messages": list})) == expected
    assert load_rows(path, {"messages": list})[0]["messages"][0] == {"role": "user", "content": "q", "tool_calls": None}


def test_length_in_tokens(tmp_path):
    made = tokenizer()
    path = write(tmp_path / "a.jsonl", [{"text": "a b c"}, {"text": "🦥" * 9}])
    lengths = [len(made(text)["input_ids"]) for text in ("a b c", "🦥" * 9)]
    assert found(check_rows(path, max_length=lengths[0], tokenizer=made)) == [(2, "too long")]
    assert found(check_rows(path, max_length=lengths[1], tokenizer=made)) == []


def test_named_columns_must_be_there(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"instruction": "a", "outptu": "b"}])
    with pytest.raises(SlothError, match=r"a\.jsonl: line 1: no 'output'; did you mean 'outptu'\?$"):
        load_rows(path, ["instruction", "output"])


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.txt", b"", "cannot be read: .txt"),
        ("a.jsonl", b'[{"a": 1}]', "is one JSON list"),
        ("a.jsonl", b"", "no good row"),
        ("a.csv", b"a,a\n1,2\n", "a different name for every column"),
        ("missing.csv", None, "is no file"),
        ("a.jsonl", b'{"a": [1]}\n{"a": ["x"]}\n', "do not fit together"),
    ],
)
def test_files_that_cannot_be_read(tmp_path, name, content, said):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(SlothError, match=said):
        load_rows(tmp_path / name)
