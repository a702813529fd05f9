import json
import re
from contextlib import closing
from pathlib import Path

import veneer.cli.demo as command
from demo import KINDS, SHOWCASE, make_questions, write_demo_data
from demo.database import database_in_memory
from demo.values import reserved

SHIPPED = Path(command.__file__).parent / "demo_data"


def rows(name: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in (SHIPPED / name).read_text("utf-8").splitlines()]


def test_the_package_ships_what_the_generator_writes(tmp_path: Path) -> None:
    write_demo_data(tmp_path)
    made, shipped = ({p.name: p.read_bytes() for p in folder.iterdir()} for folder in (tmp_path, SHIPPED))
    assert sorted(made) == ["company.sql", "held_out.jsonl", "showcase.jsonl", "train.jsonl"]
    differing = [name for name in {**made, **shipped} if made.get(name) != shipped.get(name)]
    assert differing == [], "run `make demo-data`"


def test_rows_are_new_and_the_default_sets_have_all_kinds_alike() -> None:
    train, held_out = rows("train.jsonl"), rows("held_out.jsonl")
    assert (len(train), len(held_out)) == (4_000, 500)
    assert all(list(row) == ["question", "sql", "kind"] for row in train + held_out)
    for column in ("question", "sql"):
        assert not {row[column] for row in train} & {row[column] for row in held_out}
    assert len({row["sql"] for row in held_out}) == 500
    for part in (train[:3_000], held_out[:200]):
        assert {kind: sum(row["kind"] == kind for row in part) for kind in KINDS} == dict.fromkeys(
            KINDS, len(part) // len(KINDS)
        )
    assert [row["question"] for row in held_out[:200]] == [q.question for q in make_questions(200, 0, held_out=True)]


def test_all_sql_runs_and_held_out_answers_have_rows() -> None:
    with closing(database_in_memory()) as connection:
        assert all(connection.execute(row["sql"]).fetchall() for row in rows("held_out.jsonl"))
        assert all(connection.execute(row["sql"]).description for row in rows("train.jsonl"))


def test_the_showcase_has_answers_and_is_in_no_set() -> None:
    held_out = rows("held_out.jsonl")  # training rows have no such constants
    with closing(database_in_memory()) as connection:
        for question in SHOWCASE:
            assert len(connection.execute(question.sql).fetchall()) >= 3
            assert question.question not in {row["question"] for row in held_out}
            words = re.findall(r"= '(\w+)'|> (\d+)|LIKE '(\d+)%'|LIMIT (\d+)", question.sql)
            assert words and all(reserved("".join(w)) and "".join(w) in question.question for w in words)
            assert question.sql not in {row["sql"] for row in held_out}
