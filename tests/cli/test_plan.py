"""`veneer plan`: the table, the JSON, and the exit status."""

import json
from pathlib import Path
from typing import Any

import pytest

from veneer.cli.main import invoke
from veneer.kernels import native
from veneer.plan.alternatives import Fit
from veneer.plan.disk import Disk
from veneer.plan.memory import Estimate
from veneer.plan.time import Times
from veneer.recipe.overrides import with_changes
from veneer.train.preflight import Checked, preflight


@pytest.fixture
def file(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "the count of", "completion": "name"}) + "\n")
    monkeypatch.setenv("VENEER_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "recipe.yaml"
    path.write_text(
        f"model: {tiny_model}\nrun: {tmp_path}/run\ndata: {{train: {tmp_path}/rows.jsonl}}\ntrain: {{steps: 1}}\n"
    )
    return path


def fit_of(made: Checked, changes: dict[str, Any], found: Estimate) -> Fit:
    return Fit(changes, found, preflight(made.job.with_recipe(with_changes(made.recipe, changes)), earlier=made))


def test_a_table_and_a_verdict(file: Path, capsys: Any) -> None:
    assert invoke(["plan", str(file)]) == 0
    said = capsys.readouterr().out
    assert "memory at the peak (forward pass):" in said and said.rstrip().endswith("it fits")
    assert "time, from blocks that were timed here:\n" in said and "\n  1 steps of " in said
    assert not (file.parent / "run").exists()


def test_seconds_in_json_and_none_where_none_are_wanted(file: Path, capsys: Any) -> None:
    assert invoke(["plan", str(file), "--json"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert 0 < found["seconds_a_step"] <= found["seconds_total"] == sum(found["seconds"].values())
    parts = {"loading", "quantizing", "training", "restarts", "evaluation", "saving"}
    assert set(found["seconds"]) == parts and found["read_bytes_a_second"] is None and found["warnings"] == []
    assert invoke(["plan", str(file), "--json", "--no-time"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (found["seconds_a_step"], found["seconds_total"], found["seconds"]) == (None, None, None)


def test_a_slow_disk_is_shown_with_its_rate(file: Path, capsys: Any, monkeypatch: Any) -> None:
    slow = Times([10.0, 10.0], 5.0, 0.01, disk=Disk(2**20, None), waits={"weights": 8.0})
    monkeypatch.setattr("veneer.plan.time.times", lambda *_: slow)
    assert invoke(["plan", str(file)]) == 0
    said = capsys.readouterr().out
    assert "the disk reads 1 MiB a second; a step waits 8.0 s for weights" in said
    assert "evaluation" in said and "saving" not in said and "loading" not in said  # too short to matter
    assert "warning: the disk is slow for this: it reads 1 MiB a second, so 8.0 s of a step's 10.0 s" in said
    assert said.rstrip().endswith("it fits")  # slowly
    assert invoke(["plan", str(file), "--json"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert len(found["warnings"]) == 1 and found["seconds_waiting"] == {"weights": 8.0}


def test_json_has_the_figures_and_too_small_a_budget_is_status_3(file: Path, capsys: Any) -> None:
    assert invoke(["plan", str(file), "--json", "--memory.budget", "1MiB"]) == 3
    out, err = capsys.readouterr()
    found = json.loads(out.splitlines()[-1])
    assert found["fits"] is False and found["peak_bytes"] == sum(found["parts"].values())
    assert found["disk_bytes"] == sum(found["disk"].values()) and found["memory_bytes"] == 2**20
    assert "it does not fit:\n  memory: " in err
    assert found["nearest"] == [] and "no change of storage, portions or paging helps" in err


def test_what_would_fit_is_shown_as_flags_with_what_it_costs(file: Path, capsys: Any, monkeypatch: Any) -> None:
    again, both = {"train.recompute": True}, {"train.recompute": True, "optimizer.bits": 8}
    found = Estimate({"base": 2**20}, "head", 2**20, {}, 1)
    monkeypatch.setattr("veneer.plan.fit.nearest", lambda made, *_: [fit_of(made, c, found) for c in (again, both)])
    timed: list[Any] = []

    def slower(made: Checked, *_: Any) -> Times:
        timed.append((made.recipe.train.recompute, made.recipe.optimizer.bits))
        return Times([2.0 * len(timed)], 0.0, 0.0)

    monkeypatch.setattr("veneer.plan.time.times", slower)
    assert invoke(["plan", str(file), "--json", "--memory.budget", "1MiB"]) == 3
    out, err = capsys.readouterr()
    assert timed == [(True, 32), (True, 8)]
    assert "would:\n  --train.recompute true   (1 MiB at the peak, 2.0 s a step)\n" in err
    assert "  --train.recompute true --optimizer.bits 8   (1 MiB at the peak, 4.0 s a step)" in err
    costs = [{"peak_bytes": 2**20, "seconds_a_step": s} for s in (2.0, 4.0)]
    wanted = [{"changes": changes, **cost} for changes, cost in zip((again, both), costs, strict=True)]
    assert json.loads(out)["nearest"] == wanted

    monkeypatch.setattr("veneer.cli.plan.ENOUGH", 0.0)  # there is no time left
    assert invoke(["plan", str(file), "--memory.budget", "1MiB"]) == 3
    assert "--optimizer.bits 8   (1 MiB at the peak)" in capsys.readouterr().err and len(timed) == 2
    assert invoke(["plan", str(file), "--json", "--memory.budget", "1MiB", "--no-time"]) == 3
    assert [n["seconds_a_step"] for n in json.loads(capsys.readouterr().out)["nearest"]] == [None, None]
    assert len(timed) == 2


def test_the_recipe_comes_first(capsys: Any) -> None:
    assert invoke(["plan", "--train.steps", "3"]) == 2
    assert "the recipe comes first" in capsys.readouterr().err


def test_memory_auto_shows_what_train_would_pick(file: Path, capsys: Any, monkeypatch: Any) -> None:
    found, change = (
        Estimate({"base": 2**20}, "head", 2**20, {"adapter": 1, "checkpoints": 1}, 1),
        {"train.recompute": True},
    )
    monkeypatch.setattr("veneer.plan.fit.nearest", lambda made, *_: [fit_of(made, change, found)])
    flags = ["--memory", "auto", "--memory.budget", "1MiB", "--no-time"]
    assert invoke(["plan", str(file), *flags]) == 0
    assert "memory.auto picks --train.recompute true\nit fits" in capsys.readouterr().out
    assert invoke(["plan", str(file), "--json", *flags]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (found["picked"], found["fits"], found["peak_bytes"]) == ({"train.recompute": True}, True, 2**20)


@pytest.mark.parametrize(
    ("flags", "what"),
    [([], None), (["--storage", "nf4"], "with 4-bit weights"), (["--optimizer.bits", "8"], "8-bit AdamW")],
)
def test_a_missing_c_library_is_said(
    flags: list[str], what: str | None, file: Path, capsys: Any, monkeypatch: Any
) -> None:
    monkeypatch.setattr(native, "load", lambda: native.Status(False, None, None, "turned off"))
    assert invoke(["plan", str(file), "--no-time", *flags]) == 0
    line = f"plain torch computes {what}, slower: turned off"
    assert [said for said in capsys.readouterr().err.splitlines() if "plain torch" in said] == ([line] if what else [])
