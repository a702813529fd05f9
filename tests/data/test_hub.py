import builtins
from typing import Any

import pytest

from veneer.data.sources import read_rows
from veneer.errors import DataError


def test_hub_rows_with_config_split_and_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    asked: list[Any] = []

    def load(name: str, config: str | None, *, split: str) -> list[dict[str, Any]]:
        asked.append((name, config, split))
        return [{"a": i} for i in range(5)]

    monkeypatch.setattr(datasets, "load_dataset", load)
    rows = read_rows("owner/name:main", split="test", limit=2)
    assert [(r.line, r.columns, r.source) for r in rows] == [
        (1, {"a": 0}, "owner/name:main"),
        (2, {"a": 1}, "owner/name:main"),
    ]
    read_rows("name")
    assert asked == [("owner/name", "main", "test"), ("name", None, "train")]


def test_offline_says_what_was_tried_and_how_to_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")

    def load(*_: Any, **__: Any) -> None:
        raise ConnectionError("no route to the hub")

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(DataError) as caught:
        read_rows("owner/name")
    for part in ("there is no file owner/name", "split 'train'", "no route to the hub", "Offline, download the rows"):
        assert part in str(caught.value)


@pytest.mark.parametrize(("source", "module"), [("owner/name", "datasets"), ("r.parquet", "pyarrow")])
def test_missing_library_names_the_extra(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any, source: str, module: str
) -> None:
    original = builtins.__import__

    def refuse(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.partition(".")[0] == module:
            raise ImportError(name)
        return original(name, *args, **kwargs)

    monkeypatch.chdir(tmp_path)
    (tmp_path / "r.parquet").write_bytes(b"PAR1")
    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(DataError, match=r"pip install 'veneer\[data\]'"):
        read_rows(source)
