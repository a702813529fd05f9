import json
import re
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from veneer.data.company import SHOWCASE, make_questions, write_demo_files
from veneer.data.company.values import reserved
from veneer.errors import ConfigError


def test_three_files_are_written_with_the_rows_asked_for(tmp_path: Path) -> None:
    files = write_demo_files(tmp_path / "demo", train_rows=30, held_out_rows=20)
    assert sorted(p.name for p in (tmp_path / "demo").iterdir()) == ["company.sqlite", "held_out.jsonl", "train.jsonl"]
    train = [json.loads(line) for line in files.train.read_text("utf-8").splitlines()]
    held_out = [json.loads(line) for line in files.held_out.read_text("utf-8").splitlines()]
    assert (len(train), len(held_out)) == (30, 20)
    assert all(list(row) == ["question", "sql", "kind"] for row in train + held_out)
    assert [row["question"] for row in held_out] == [q.question for q in make_questions(20, 0, held_out=True)]
    with closing(sqlite3.connect(files.database)) as connection:
        assert all(connection.execute(row["sql"]).fetchall() for row in held_out)
        assert [connection.execute(row["sql"]).description for row in train]  # runs, with or without rows


def test_the_seed_changes_the_training_rows_alone(tmp_path: Path) -> None:
    first, second = (write_demo_files(tmp_path / str(s), train_rows=20, held_out_rows=20, seed=s) for s in (0, 1))
    assert first.train.read_bytes() != second.train.read_bytes()
    assert first.held_out.read_bytes() == second.held_out.read_bytes()
    assert first.database.read_bytes() == second.database.read_bytes()


def test_nothing_is_written_where_the_rows_cannot_be_made(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="asked for 0 company questions"):
        write_demo_files(tmp_path / "demo", held_out_rows=0, train_rows=10)
    assert not (tmp_path / "demo").exists()


def test_the_showcase_has_answers_and_is_in_no_set(tmp_path: Path) -> None:
    files = write_demo_files(tmp_path, train_rows=10, held_out_rows=10)
    rows = make_questions(200, 0, held_out=True)  # training rows have no such constants
    with closing(sqlite3.connect(files.database)) as connection:
        for question in SHOWCASE:
            assert len(connection.execute(question.sql).fetchall()) >= 3
            assert question.question not in {q.question for q in rows}
            words = re.findall(r"= '(\w+)'|> (\d+)|LIKE '(\d+)%'|LIMIT (\d+)", question.sql)
            assert words and all(reserved("".join(w)) and "".join(w) in question.question for w in words)
            assert question.sql not in {q.sql for q in rows}
