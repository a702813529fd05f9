"""What `import veneer` offers is there, is what it says, and stays itself whatever else is imported."""

import ast
import inspect
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import veneer

PUBLIC = [name for name in veneer.__all__ if name != "__version__"]


def test_the_list_is_short_sorted_and_what_dir_shows() -> None:
    assert len(veneer.__all__) <= 25 and sorted(set(PUBLIC)) == PUBLIC
    assert dir(veneer) == sorted(veneer.__all__)
    assert set(PUBLIC) == {*veneer._HOMES, *veneer._VERBS}


@pytest.mark.parametrize("name", list(veneer._HOMES))
def test_every_name_is_defined_at_its_home_and_says_what_it_is(name: str) -> None:
    home, _, there = veneer._HOMES[name].partition(":")
    thing = getattr(veneer, name)
    assert thing is vars(import_module(home))[there or name]
    if callable(thing):
        assert thing.__module__ == home and thing.__name__ == (there or name) and inspect.getdoc(thing)


@pytest.mark.parametrize("name", veneer._VERBS)
def test_a_verb_is_a_package_that_can_be_called(name: str) -> None:
    verb = getattr(veneer, name)
    assert verb is import_module(f"veneer.{name}") and callable(verb) and inspect.getdoc(type(verb).__call__)


def test_no_other_public_name_is_a_rooms() -> None:
    rooms = {p.stem for p in Path(veneer.__file__).parent.iterdir()}
    assert rooms & set(PUBLIC) == set(veneer._VERBS), "an imported room would take the place of the name"


def test_what_type_checkers_see_is_what_there_is() -> None:
    tree = ast.parse(Path(veneer.__file__).read_text(encoding="utf-8"))
    block = next(n for n in tree.body if isinstance(n, ast.If))
    seen, verbs = {}, {}
    for line in block.body:
        if isinstance(line, ast.AnnAssign):
            assert isinstance(line.target, ast.Name) and isinstance(line.annotation, ast.Name)
            verbs[line.target.id] = seen.pop(line.annotation.id)
            continue
        assert isinstance(line, ast.ImportFrom)
        for alias in line.names:
            assert alias.asname is not None
            seen[alias.asname] = f"{line.module}{'' if alias.asname == alias.name else ':' + alias.name}"
    assert seen == veneer._HOMES
    assert verbs == {name: f"veneer.{name}:Verb" for name in veneer._VERBS}
    assert all(type(getattr(veneer, name)).__name__ == "Verb" for name in veneer._VERBS)


def test_from_veneer_import_star_in_a_fresh_process() -> None:
    code = (
        "import veneer.train.run, veneer.generate.engine, veneer.evaluate.runner\n"
        "from veneer import *\n"
        "import sys\n"
        "assert train is sys.modules['veneer.train'] and evaluate is sys.modules['veneer.evaluate']\n"
        "assert callable(train) and callable(evaluate)\n"
        "assert generate_tokens is veneer.generate.engine.generate\n"
        f"assert all(name in globals() for name in {PUBLIC!r})\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_an_unknown_name_names_those_there_are() -> None:
    with pytest.raises(AttributeError, match=r"has no attribute 'load_modle'; it has __version__, .*load_model"):
        _ = veneer.load_modle  # type: ignore[attr-defined]


def test_the_version_is_that_of_the_package() -> None:
    from importlib.metadata import version

    assert veneer.__version__ == version("veneer")
