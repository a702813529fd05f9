"""`veneer demo` from end to end on the tiny model: every part of it runs, whatever so small a model learns."""

import json
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

import veneer.cli.demo as demo
from veneer.cli.main import invoke
from veneer.cli.train import TrainProgress
from veneer.errors import DiskError
from veneer.evaluate.runner import Evaluation

FIGURES = ["accuracy_before", "accuracy_after", "seconds", "peak_bytes", "adapter_bytes", "merged_equal"]
SHIPPED = Path(demo.__file__).parent / "demo_data"
SMALL = ["--train-rows", "20", "--held-out-rows", "10"]


@pytest.fixture
def small(tiny_model: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The demo on the tiny model; returns a folder for it."""
    assert "model: smollm2-135m-instruct\n" in demo.RECIPE
    monkeypatch.setattr(demo, "RECIPE", demo.RECIPE.replace("smollm2-135m-instruct", str(tiny_model)))
    return tmp_path / "demo"


def test_all_of_it(small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert invoke(["demo", "--folder", str(small), *SMALL]) == 0
    captured = capsys.readouterr()
    *told, last = captured.out.splitlines()
    result = json.loads(last)
    assert list(result) == FIGURES
    assert result["accuracy_before"] == 0.0 and 0 <= result["accuracy_after"] <= 1
    assert result["merged_equal"] is True and result["seconds"] > 0 and result["peak_bytes"] > 1e8
    assert result["adapter_bytes"] == sum(f.stat().st_size for f in (small / "run" / "adapter").iterdir())
    text = "\n".join(told)
    for part in (
        "question type",
        "two filters",
        "Can you list the employees located in Berlin",
        "for 100% of 10 questions",
    ):
        assert part in text
    for number in range(1, 7):
        assert f"{number}. " in captured.err
    after = text[text.index("Next:") :].splitlines()[1:]
    assert [line.split()[:2] for line in after] == [["veneer", v] for v in ("generate", "eval", "generate")]
    named = [word for line in after for word in line.split() if word.startswith(str(small))]
    assert named and all(Path(word).exists() for word in named), "the next commands name what is there"
    assert "--format plain" in after[2] and "--format" not in after[0], "only the adapter's folder knows its form"
    assert {p.name for p in small.iterdir()} == {
        "company.sqlite", "train.jsonl", "held_out.jsonl", "recipe.yaml", "run", "merged",
    }  # fmt: skip
    assert invoke(["train", str(small / "recipe.yaml")]) == 0
    assert "is done already" in capsys.readouterr().err


def test_with_json_stdout_holds_nothing_else(small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert invoke(["demo", "--folder", str(small), *SMALL, "--json"]) == 0
    captured = capsys.readouterr()
    assert list(json.loads(captured.out)) == FIGURES and captured.out.count("\n") == 1
    assert "question type" in captured.err and "Next:" in captured.err


def test_interrupted_in_training_it_says_how_to_go_on(
    small: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(self: TrainProgress, event: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "measured", lambda *given: Evaluation({"sql": 0.0}, 10, [], 0, 0, 0.0))
    monkeypatch.setattr(TrainProgress, "__call__", interrupt)
    assert invoke(["demo", "--folder", str(small), *SMALL]) == 1
    assert f"interrupted. `veneer train {small}/recipe.yaml` goes on" in capsys.readouterr().err
    monkeypatch.undo()
    assert invoke(["train", str(small / "recipe.yaml")]) == 0


@pytest.mark.parametrize("name", ["demo #2", "a: b", "[demo", "'demo"])
def test_a_folder_that_yaml_would_misread(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert invoke(["demo", "--folder", name, *SMALL]) == 2
    assert "would need quotes in a recipe; name a folder of letters with --folder" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_folder_in_use_or_a_file_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    assert invoke(["demo", "--folder", str(tmp_path), *SMALL]) == 2
    assert f"{tmp_path} is not empty; name another folder with --folder, or remove this one" in capsys.readouterr().err
    assert invoke(["demo", "--folder", str(tmp_path / "thesis.txt"), *SMALL]) == 2
    assert "thesis.txt is a file; name a new folder with --folder" in capsys.readouterr().err
    assert [p.read_text() for p in tmp_path.iterdir()] == ["mine"]


@pytest.mark.parametrize("flags", [["--train-rows", "19"], ["--held-out-rows", "9"], ["--train-rows", "many"]])
def test_too_few_rows(flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert invoke(["demo", "--folder", str(tmp_path / "d"), *flags]) == 2
    assert flags[0] in capsys.readouterr().err and not (tmp_path / "d").exists()


def test_the_table_counts_by_kind(tmp_path: Path) -> None:
    demo.write_data(tmp_path, train_rows=20, held_out_rows=50)
    kinds = [json.loads(line)["kind"] for line in (tmp_path / "held_out.jsonl").read_text().splitlines()]
    right = [kind in ("date", "join") for kind in kinds]
    before, after = (
        Evaluation({"sql": 0.0}, 50, [{"scores": {"sql": float(r and n)}} for r in right], 0, 0, 0.0) for n in (0, 1)
    )
    columns = [list(column.cells) for column in demo.by_kind(tmp_path, before, after).columns]
    table = {row[0]: row[1:] for row in zip(*columns, strict=True)}
    assert list(table) == [*sorted(set(kinds)), "all"]
    assert table["date"] == (str(kinds.count("date")), "0%", "100%") and table["filter"][2] == "0%"
    assert table["all"] == ("50", "0%", f"{sum(right) / 50:.0%}")


def test_the_data_is_the_database_and_the_first_rows_of_each_set(tmp_path: Path) -> None:
    demo.write_data(tmp_path / "demo", train_rows=30, held_out_rows=20)
    names = ["company.sqlite", "held_out.jsonl", "train.jsonl"]
    assert sorted(p.name for p in (tmp_path / "demo").iterdir()) == names
    for name, n in (("train.jsonl", 30), ("held_out.jsonl", 20)):
        written, shipped = ((folder / name).read_text() for folder in (tmp_path / "demo", SHIPPED))
        assert shipped.startswith(written) and written.count("\n") == n
    with closing(sqlite3.connect(tmp_path / "demo" / "company.sqlite")) as connection:
        assert connection.execute("SELECT COUNT(*) FROM orders").fetchone() == (460,)
        assert all(connection.execute(json.loads(line)["sql"]).fetchall() for line in written.splitlines())


def test_more_rows_than_there_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--train-rows", "4001", "--held-out-rows", "501"]
    assert invoke(["demo", "--folder", str(tmp_path / "d"), *flags]) == 2
    told = capsys.readouterr().err
    assert "--train-rows is 4001, but there are 4000 such questions; ask for at most 4000" in told
    assert "--held-out-rows is 501, but there are 500 such questions; ask for at most 500" in told
    assert not (tmp_path / "d").exists()
    demo.write_data(tmp_path, 4000, 500)
    assert (tmp_path / "train.jsonl").read_bytes() == (SHIPPED / "train.jsonl").read_bytes()


def test_a_database_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "company.sqlite").mkdir()
    with pytest.raises(DiskError, match=r"company\.sqlite was not written"):
        demo.write_data(tmp_path, 20, 10)


def test_a_result_on_one_line() -> None:
    assert demo.shown([]) == "(no rows)"
    assert demo.shown([("Ada", 3), ("Bo", None)]) == "Ada, 3; Bo, None"
    assert demo.shown([(n,) for n in range(9)]) == "0; 1; 2; 3; 4; 5; ... 9 rows"


def test_an_unknown_device_is_refused_before_anything_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert invoke(["demo", "--folder", str(tmp_path / "demo"), "--device", "cdua"]) == 2
    assert "device is 'cdua'. Did you mean 'cuda'?" in capsys.readouterr().err
    assert not (tmp_path / "demo").exists()
