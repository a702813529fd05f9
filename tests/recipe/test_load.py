"""Recipes from files and flags: strict, helpful, and written back as they were."""

from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from veneer.errors import ConfigError
from veneer.recipe.aliases import OTHER_MEANING, SAME_MEANING
from veneer.recipe.load import keys, load_recipe, parse_flags, recipe_from, write_recipe
from veneer.recipe.settings import LEFT_OUT, Recipe

GOOD = """\
model: tiny
run: runs/x
lora_r: 4
method: lora
learning_rate: 2e-4
data:
  train: rows.jsonl
  prompt: "{question}"
  completion: "{sql}"
train:
  steps: 1e2
"""


@pytest.fixture
def file(tmp_path: Path) -> Any:
    def write(text: str) -> Path:
        path = tmp_path / "recipe.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


def complaint(path: Path | str, *flags: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_recipe(path, parse_flags(flags))
    return str(caught.value).replace(str(path), "FILE").splitlines()


def test_a_recipe_with_names_from_elsewhere(file: Any) -> None:
    recipe = load_recipe(file(GOOD))
    assert recipe.method.name == "lora"
    assert recipe.method.own == {"rank": 4}
    assert recipe.optimizer.lr == 2e-4
    assert (recipe.train.steps, type(recipe.train.steps)) == (100, int)


def test_flags_outrank_the_file_by_whatever_name_each_has(file: Any) -> None:
    flags = ["--optimizer.lr", "1e-3", "--method.rank=2", "--max_steps", "7", "--data.train", "other.jsonl"]
    recipe = load_recipe(file(GOOD), parse_flags(flags))
    assert (recipe.optimizer.lr, recipe.method.own, recipe.train.steps) == (1e-3, {"rank": 2}, 7)
    assert recipe.data.train == "other.jsonl"
    assert recipe.data.prompt == "{question}"


def test_a_method_by_flag_keeps_what_the_file_says_of_it(file: Any) -> None:
    recipe = load_recipe(file(GOOD), parse_flags(["--method", "dora", "--method.rank_pattern.q_proj", "2"]))
    assert (recipe.method.name, recipe.method.own) == ("dora", {"rank": 4, "rank_pattern": {"q_proj": 2}})


@pytest.mark.parametrize(
    ("storage", "flags", "meant"),
    [
        ("", ["--load_in_4bit", "true"], {"name": "nf4"}),
        ("", ["--load_in_8bit=True", "--load_in_4bit", "false"], {"name": "int8"}),
        ("storage: {name: fp4, block: 32}", ["--load_in_4bit", "true"], {"name": "fp4", "block": 32}),
        ("storage: {name: fp4, block: 32}", ["--load_in_8bit", "true"], {"name": "int8"}),
        ("storage: {name: fp4, block: 32}", ["--load_in_4bit", "false"], {"name": "dense"}),
        ("load_in_4bit: true", ["--load_in_4bit", "false"], {"name": "dense"}),
        ("storage: int8", ["--load_in_4bit", "false"], {"name": "int8"}),
        ("storage: int8", ["--load_in_4bit", "true", "--bnb_4bit_quant_type", "fp4"], {"name": "fp4"}),
        ("", ["--load_in_4bit", "true", "--storage.block", "32"], {"name": "nf4", "block": 32}),
    ],
)
def test_a_switch_of_quantization_is_a_flag(file: Any, storage: str, flags: list[str], meant: dict[str, Any]) -> None:
    got = load_recipe(file(GOOD + storage), parse_flags(flags)).storage
    wanted = recipe_from({"model": "m", "run": "r", "data": {"train": "x"}, "storage": meant}).storage
    assert got == wanted


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        (["--load_in_4bit", "4"], "--load_in_4bit: load_in_4bit is 4, true or false is needed"),
        (["--load_in_4bit", "true", "--storage", "int8"], "--load_in_4bit: load_in_4bit is true, but storage.name is"),
        (["--load_in_4bit", "false", "--storage.name", "nf4"], "load_in_4bit is false, but storage.name is 'nf4'"),
        (["--load_in_4bit", "true", "--load_in_8bit", "true"], "load_in_4bit is true, but storage.name is 'int8'"),
    ],
)
def test_flags_that_contradict_a_switch(file: Any, flags: list[str], problem: str) -> None:
    assert problem in "\n".join(complaint(file(GOOD), *flags))


def test_everything_wrong_comes_at_once_with_its_place(file: Any) -> None:
    path = file(
        "model: tiny\nrun: runs/x\nbatch_size: 8\nepohs: 3\n"
        "data:\n  train: rows.jsonl\n  promt: '{x}'\n"
        "train:\n  steps: -1\n  schedule: cosin\nmethod:\n  rnak: 4\n"
    )
    assert complaint(path, "--optimizer.lr", "fast") == [
        "FILE, line 3: batch_size: batches are counted in tokens here: set train.tokens_per_step (rows x their mean "
        "length)",
        "FILE, line 7: there is no key data.promt. Did you mean 'prompt'?",
        "--optimizer.lr: optimizer.lr is 'fast': input should be a valid number, unable to parse string as a number. "
        "Learning rate at the schedule's top.",
        "FILE, line 9: train.steps is -1: input should be greater than or equal to 1. Optimizer steps; give this or "
        "epochs.",
        "FILE, line 10: train.schedule is 'cosin': input should be 'constant', 'linear' or 'cosine'. How the learning "
        "rate falls after the warm-up.",
        "FILE, line 4: there is no key epohs. Did you mean 'epochs' or 'num_epochs' or 'steps'?",
        "FILE, line 12: method lora has no setting 'rnak'. Did you mean 'rank'? It has: targets, rank, alpha, "
        "rank_pattern, alpha_pattern, dropout, rank_stabilized, init.",
    ]


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("run: x", ["FILE: model is missing: The frozen base: an alias, a hub id, a folder or a .gguf file.",
                    "FILE: data is missing: it has no default"]),
        (GOOD + "lora_rank: 8", ["FILE, line 12: method.rank is given twice: 4, and 8 as lora_rank"]),
        (GOOD + "run: y", ["FILE, line 12: run is given twice (first in line 2)"]),
        (GOOD.replace("steps: 1e2", "steps: true"),
         ["FILE, line 11: train.steps is True, where a number belongs. Optimizer steps; give this or epochs."]),
        (GOOD.replace("lora_r: 4", "lora_r: four"),
         ["FILE, line 3: lora.rank is 'four': input should be a valid integer, unable to parse string as an integer"]),
        (GOOD.replace("lora_r: 4", "lora_r: 0"), ["FILE, line 3: "]),
        (GOOD.replace("method: lora", "method: lroa"), ["FILE, line 4: there is no method 'lroa'. Did you mean "]),
        (GOOD.replace("learning_rate: 2e-4", "learning_rate: -1"), ["FILE, line 5: optimizer.lr is -1: "]),
        (GOOD.replace('"{question}"', "{question}"),
         ["FILE, line 8: data.prompt is {'question': None}: input should be a valid string. Template of what the model "
          "reads. A single word is a column's name. Put quotes around a text that begins with a brace."]),
        (GOOD.replace("  steps: 1e2", "  steps: 5\n  epochs: 2"),
         ["FILE, line 10: give train.steps (5) or train.epochs (2.0), not both"]),
        (GOOD.replace("  steps: 1e2", "  eval_every: 5"),
         ["FILE: train.eval_every is 5, but data.eval names no rows to evaluate"]),
        (GOOD.replace("train:\n  steps: 1e2", "train: 5"), ["FILE, line 10: train is 5: "]),
        (GOOD.replace('  prompt: "{question}"\n', ""), ["FILE, line 6: data: prompt and completion go together"]),
    ],
    ids=lambda x: None,
)  # fmt: skip
def test_each_problem_has_its_line(file: Any, text: str, wanted: list[str]) -> None:
    found = complaint(file(text))
    assert len(found) == len(wanted)
    assert all(line.startswith(start) for line, start in zip(found, wanted, strict=True)), found


@pytest.mark.parametrize("key", OTHER_MEANING)
def test_what_means_something_else_here_is_refused_in_a_file_and_as_a_flag(file: Any, key: str) -> None:
    assert complaint(file(GOOD + f"{key}: 1")) == [f"FILE, line 12: {key}: {OTHER_MEANING[key]}"]
    assert complaint(file(GOOD), f"--{key}", "1") == [f"--{key}: {key}: {OTHER_MEANING[key]}"]


def test_no_file(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").touch()
    with pytest.raises(ConfigError, match=r"there is no recipe .*recipes.yaml. Did you mean 'recipe.yaml'\?"):
        load_recipe(tmp_path / "recipes.yaml")
    with pytest.raises(ConfigError, match=r"cannot be read: .*Is a directory"):
        load_recipe(tmp_path)
    (tmp_path / "recipe.yaml").write_bytes(b"model: \xff\xfe")
    with pytest.raises(ConfigError, match=r"recipe.yaml cannot be read: 'utf-8' codec"):
        load_recipe(tmp_path / "recipe.yaml")


def sample(key: str) -> tuple[str, Any]:
    """A flag's text for every key, and the value it should have."""
    texts: dict[str, tuple[str, Any]] = {
        "data.format": ("plain", "plain"),
        "data.too_long": ("drop", "drop"),
        "data.packing": ("false", False),
        "storage.name": ("nf4", "nf4"),
        "storage.head": ("true", True),
        "storage.backend": ("bitsandbytes", "bitsandbytes"),
        "storage.embeddings": ("true", True),
        "method.name": ("dora", "dora"),
        "method.targets": ("[q_proj, v_proj]", ("q_proj", "v_proj")),
        "method.exclude": (".*k_proj", ".*k_proj"),
        "method.layers": ("[0, 1]", (0, 1)),
        "prompt.name": ("prefix", "prefix"),
        "task": ("causal-lm", "causal-lm"),
        "device": ("cuda:1", "cuda:1"),
        "optimizer.name": ("adamw", "adamw"),
        "optimizer.bits": ("8", 8),
        "optimizer.paged": ("true", True),
        "optimizer.in_backward": ("true", True),
        "optimizer.momentum": ("0.5", 0.5),
        "optimizer.betas": ("[0.8, 0.9]", (0.8, 0.9)),
        "restarts.reset": ("random", "random"),
        "restarts.keep": ("0.5", 0.5),
        "restarts.fold": ("beside", "beside"),
        "train.schedule": ("cosine", "cosine"),
        "train.floor": ("0.5", 0.5),
        "train.recompute": ("true", True),
        "train.dtype": ("float32", "float32"),
        "memory.budget": ("8GiB", "8GiB"),
        "memory.auto": ("true", True),
        "memory.page_weights": ("true", True),
        "memory.page_activations": ("true", True),
        "method.trained_modules": ("[norm, lm_head]", ("norm", "lm_head")),
        "tokens.add": ("[<a>, <b>]", ("<a>", "<b>")),
        "tokens.train": ("[5, <a>]", (5, "<a>")),
    }
    numbers = {"data.rows", "data.eval_rows"}
    if key in texts:
        return texts[key]
    numeric = key.startswith(("optimizer.", "train.", "restarts.")) or key in numbers
    return ("3", 3) if numeric else ("{q} [1", "{q} [1")


@pytest.mark.parametrize("key", keys())
def test_every_key_is_a_flag(key: str) -> None:
    text, value = sample(key)
    for flags in ([f"--{key}", text], [f"--{key}={text}"]):
        data = {"train": "x", "eval": "y", **NEEDED.get(key, {})}
        tree = {"model": "m", "run": "r", "data": data, "storage": {"name": "nf4"}, "train": {"recompute": True}}
        tree["restarts"] = {"every": 9, "reset": "random"} if key.startswith("restarts.") else {}
        tree["optimizer"] = {"name": "sgd"} if key == "optimizer.momentum" else {}
        recipe: Any = load_with(tree, parse_flags(flags))
        for part in key.split("."):
            recipe = getattr(recipe, part)
        assert recipe == value
    assert keys()[key]


@pytest.mark.parametrize(
    "flags",
    [
        ["--train.recompute=3"],
        ["--optimizer.in_backward=true", "--train.clip=0"],
        ["--train.recompute=true", "--memory.page_activations=true"],
    ],
)
def test_what_gives_time_for_memory_makes_a_run_lean(flags: list[str]) -> None:
    tree = {"model": "m", "run": "r", "data": {"train": "x"}}
    assert load_with(tree, parse_flags(flags)).lean and not load_with(tree, {}).lean


NEEDED = {
    "data.separator": {"format": "plain"},
    "data.prompt": {"completion": "x"},
    "data.completion": {"prompt": "x"},
}
"""What else a recipe has to say for some keys to make sense."""


def load_with(tree: dict[str, Any], overrides: dict[str, Any]) -> Recipe:
    from veneer.recipe.load import _checked

    return _checked(tree, overrides, "recipe", {}, "")


@pytest.mark.parametrize("alias", SAME_MEANING)
def test_every_alias_is_a_flag(alias: str) -> None:
    parse_flags([f"--{alias}", "3"])


def test_a_flag_takes_text_as_it_stands() -> None:
    flags = ["--data.prompt", "{q}: [", "--run", "2024", "--data.eval", "null", "--data.text=", "--model", "on"]
    assert parse_flags(flags) == {
        "data.prompt": "{q}: [",
        "run": "2024",
        "data.eval": None,
        "data.text": "",
        "model": "on",
    }


def test_wrong_flags_come_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        parse_flags(["steps=3", "--train.stpes", "3", "--train.clip", "[1", "--run", "--model"])
    first, second, *others = str(caught.value).splitlines()
    assert first == "'steps=3' is no flag; recipe keys are given like --train.steps 50"
    assert second.startswith("there is no key --train.stpes. Did you mean 'train.steps' or ")
    assert second.endswith("? `veneer train --help` lists all keys.")
    assert others == [
        "--train.clip: '[1' is not valid YAML: expected ',' or ']', but got '<stream end>'",
        "--run needs a value, like --run VALUE",
        "--model needs a value, like --model VALUE",
    ]


def test_what_is_written_is_read_back_as_it_was(file: Any) -> None:
    recipe = load_recipe(file(GOOD), parse_flags(["--run", "1e5", "--method.rank_pattern", "{q_proj: 2}"]))
    text = write_recipe(recipe)
    again = load_recipe(file(text))
    assert again == recipe
    assert write_recipe(again) == text
    assert set(keys()) <= {f"{s}.{k}" for s, v in yaml.safe_load(text).items() if isinstance(v, dict) for k in v} | {
        "model",
        "run",
        *LEFT_OUT,
    }


def test_keys_that_earlier_runs_lack_are_written_only_where_they_are_set(file: Any) -> None:
    plain, placed = (load_recipe(file(GOOD), parse_flags(flags)) for flags in ([], ["--device", "cpu"]))
    assert set(yaml.safe_load(write_recipe(placed))) - set(yaml.safe_load(write_recipe(plain))) == {"device"}
    assert load_recipe(file(write_recipe(placed))).device == "cpu"
    assert not set(LEFT_OUT) & set(yaml.safe_load(write_recipe(plain)))


def test_unknown_tasks_and_devices_are_refused_with_close_matches(file: Any) -> None:
    assert complaint(file(GOOD + "task: causal_lm\ndevice: cdua:1\n")) == [
        "FILE, line 12: there is no task 'causal_lm'. Did you mean 'causal-lm'? Known: causal-lm.",
        "FILE, line 13: device is 'cdua:1'. Did you mean 'cuda'? Give auto, cpu, cuda, cuda:N or mps.",
    ]


TEXTS = st.text(min_size=1, max_size=12)


@settings(deadline=None)
@given(TEXTS, TEXTS, st.floats(1e-9, 1e3), st.integers(0, 2**63 - 1), st.lists(TEXTS, max_size=3))
def test_any_recipe_is_read_back_as_it_was(model: str, run: str, lr: float, seed: int, targets: list[str]) -> None:
    tree = {"model": model, "run": run, "data": {"train": run}, "optimizer": {"lr": lr}, "train": {"seed": seed}}
    recipe = recipe_from({**tree, "method": {"targets": targets}})
    from veneer.recipe.yaml_io import read_tree

    again = recipe_from(read_tree(Path("recipe.yaml"), write_recipe(recipe))[0])
    assert again == recipe


PLAIN = st.none() | st.booleans() | st.integers(-3, 10**30) | st.floats() | st.text(max_size=5) | st.dates()
INNER = st.dictionaries(st.text(max_size=5) | st.sampled_from(sorted(SAME_MEANING)), PLAIN, max_size=3)
SOME = PLAIN | st.lists(PLAIN, max_size=3) | INNER | st.dictionaries(st.text(max_size=5), INNER | PLAIN, max_size=3)
NAMES = st.sampled_from(
    [*keys(), *SAME_MEANING, *OTHER_MEANING, "data", "train", "method", "optimizer", "storage"]
) | st.text(max_size=8)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.dictionaries(NAMES | st.integers() | st.none(), SOME, max_size=6))
def test_nothing_but_config_errors_from_any_tree(tree: dict[Any, Any]) -> None:
    for given_tree in (tree, {"model": "m", "run": "r", "data": {"train": "x"}, **tree}):
        try:
            recipe_from(given_tree)
        except ConfigError as error:
            assert str(error).startswith("recipe")


@settings(deadline=None)
@given(st.lists(st.sampled_from(["--", "=", *(f"--{k}" for k in keys())]) | st.text(max_size=8), max_size=6))
def test_nothing_but_config_errors_from_any_flags(flags: list[str]) -> None:
    tree = {"model": "m", "run": "r", "data": {"train": "x"}}
    with suppress(ConfigError):
        load_with(tree, parse_flags(flags))


@pytest.mark.parametrize(("flag", "read"), [("true", True), ("1", 1), ("12", 12), ("[0, 3]", (0, 3)), ("false", False)])
def test_recompute_is_all_blocks_a_count_or_numbers(flag: str, read: object, tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("model: m\nrun: r\ndata: {train: t.jsonl}\n")
    recipe = load_recipe(path, parse_flags(["--train.recompute", flag]))
    assert (recipe.train.recompute, type(recipe.train.recompute)) == (read, type(read))
    assert recipe_from(yaml.safe_load(write_recipe(recipe))) == recipe


def test_rows_beside_the_recipe_are_not_those_in_the_current_folder(
    file: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "below").mkdir()
    (tmp_path / "rows.jsonl").write_text("{}")
    recipe = file(GOOD)
    monkeypatch.chdir(tmp_path / "below")
    for path in (recipe, Path("..", recipe.name)):
        with pytest.raises(ConfigError) as caught:
            load_recipe(path)
        assert str(caught.value).splitlines() == [
            f"data.train: there is no rows.jsonl in {tmp_path / 'below'}, but there is {path.parent / 'rows.jsonl'}",
            "Paths in a recipe count from the folder that the command runs in: run it there, or write them so.",
        ]
    assert load_recipe(recipe, {"data.train": "../rows.jsonl"}).data.train == "../rows.jsonl"
    monkeypatch.chdir(tmp_path)
    assert load_recipe(recipe).data.train == "rows.jsonl"


def test_memory_auto_in_the_file_and_as_a_flag(file: Any) -> None:
    path = file(GOOD)
    assert not load_recipe(path).memory.auto and load_recipe(file(GOOD + "memory: auto\n")).memory.auto
    path = file(GOOD)
    assert load_recipe(path, parse_flags(["--memory", "auto"])).memory.auto
    assert load_recipe(path, parse_flags(["--memory", "auto", "--memory.budget", "6GiB"])).memory.budget == "6GiB"
    (said,) = complaint(path, "--memory", "much")
    assert said.startswith("--memory: memory is 'much'")
