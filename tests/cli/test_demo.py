"""`veneer demo` from end to end on the tiny model: every part of it runs, whatever so small a model learns."""

import json
from pathlib import Path
from typing import Any

import pytest

import veneer.cli.demo as demo
from veneer.cli.main import invoke
from veneer.cli.train import TrainProgress
from veneer.data.company import DemoFiles, write_demo_files
from veneer.evaluate.runner import Evaluation

FIGURES = ["accuracy_before", "accuracy_after", "seconds", "peak_bytes", "adapter_bytes", "merged_equal"]
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
    files: DemoFiles = write_demo_files(tmp_path, train_rows=20, held_out_rows=10)
    kinds = [json.loads(line)["kind"] for line in files.held_out.read_text().splitlines()]
    right = [kind in ("date", "join") for kind in kinds]
    before, after = (
        Evaluation({"sql": 0.0}, 10, [{"scores": {"sql": float(r and n)}} for r in right], 0, 0, 0.0) for n in (0, 1)
    )
    columns = [list(column.cells) for column in demo.by_kind(files, before, after).columns]
    table = {row[0]: row[1:] for row in zip(*columns, strict=True)}
    assert list(table) == [*sorted(set(kinds)), "all"]
    assert table["date"] == (str(kinds.count("date")), "0%", "100%") and table["filter"][2] == "0%"
    assert table["all"] == ("10", "0%", f"{sum(right) / 10:.0%}")


def test_a_result_on_one_line() -> None:
    assert demo.shown([]) == "(no rows)"
    assert demo.shown([("Ada", 3), ("Bo", None)]) == "Ada, 3; Bo, None"
    assert demo.shown([(n,) for n in range(9)]) == "0; 1; 2; 3; 4; 5; ... 9 rows"
