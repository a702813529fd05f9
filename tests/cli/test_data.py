import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from veneer.cli.main import invoke


@pytest.fixture
def recipe(tiny_model: Path, tmp_path: Path) -> Callable[..., str]:
    """Write a recipe over two rows, one of them held out, and return its path."""

    def write(**data: Any) -> str:
        rows = [{"question": f"how {n}?", "sql": f"SELECT {n}", "id": n} for n in range(6)]
        (tmp_path / "train.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
        (tmp_path / "eval.jsonl").write_text(json.dumps(rows[0]) + "\n")
        settings = {"train": str(tmp_path / "train.jsonl"), "prompt": "{question}", "completion": "{sql}"} | data
        file = tmp_path / "recipe.yaml"
        file.write_text(json.dumps({"model": str(tiny_model), "data": settings, "run": str(tmp_path / "run")}))
        return str(file)

    return write


def test_rows_lengths_and_totals_for_people(recipe: Callable[..., str], capsys: pytest.CaptureFixture[str]) -> None:
    assert invoke(["data", recipe(), "--rows", "2"]) == 0
    out = capsys.readouterr().out
    assert "trained text is between ⟦ and ⟧" in out
    assert "<|im_start|>user\nhow 1?<|im_end|>\n<|im_start|>assistant\n⟦SELECT 1<|im_end|>⟧" in out
    assert "how 2?" not in out
    for part in ("columns 'id'", "6, none too long; 6 examples", "one epoch   1 steps", "packing efficiency"):
        assert part in out
    assert not (Path(recipe()).parent / "run").exists()


def test_json_is_one_object(recipe: Callable[..., str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["data", recipe(eval=str(tmp_path / "eval.jsonl")), "--json", "--rows", "1", "--data.rows", "4"]
    assert invoke(arguments) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["train"]["rows"] == 4
    assert result["eval"]["rows"] == 1
    assert result["train"]["preview"][0]["segments"][-1] == {"text": "SELECT 0<|im_end|>", "trained": True}
    keys = {"tokens", "supervised_share", "truncated", "dropped", "packing_efficiency", "steps_per_epoch"}
    assert keys <= set(result["train"])


def test_a_wrong_column_is_wrong_input(recipe: Callable[..., str], capsys: pytest.CaptureFixture[str]) -> None:
    assert invoke(["data", recipe(completion="{sqll}")]) == 2
    err = capsys.readouterr().err
    assert "data.completion names the column 'sqll'" in err
    assert "Did you mean 'sql'? Columns seen: 'question', 'sql', 'id'." in err


def test_a_missing_file_is_wrong_input(recipe: Callable[..., str], capsys: pytest.CaptureFixture[str]) -> None:
    assert invoke(["data", recipe(train="nowhere.jsonl")]) == 2
    assert "there is no file nowhere.jsonl" in capsys.readouterr().err
