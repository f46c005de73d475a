"""Hostile values for every field and hostile recipes: accepted, or a ConfigError, nothing else."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable, Sequence
from pathlib import Path

import pytest
import yaml

from megapoly.config import yaml_text
from megapoly.config.options import OPTIONS
from megapoly.config.parsing import load_yaml, to_yaml
from megapoly.config.schema import Config
from megapoly.config.yaml_text import LARGEST_FILE_BYTES, read_yaml
from megapoly.errors import ConfigError
from megapoly.pretrain import configure

LONGEST_MESSAGE = 2000
LONG = "a" * 5000
VALUES = [
    *["", " ", "null", "~", "None", "-", "--", "=", "'", '"', "3 4", "1,5", "1/3", "null null"],
    *["0", "-0", "-1", "1", "0.5", "0x10", "1_000", "1e3", "1e-30", "010", "-07", "1:30", "1j"],
    *["1e18", "1e30", "1e308", "1e400", "-1e-400", "nan", ".nan", ".inf", "-.inf", "inf"],
    *["2147483647", "2147483648", "4294967295", "9" * 18, "9" * 23, "9" * 400, "1" + "0" * 5000],
    *["0x" + "f" * 900, "0x" + "f" * 5000, "'010'", "'4'", "[010]", "['010']", f"[{'9' * 30}]"],
    *["true", "yes", "False", "2026-01-01", "2026-13-45", "12:61:99"],
    *["[]", "{}", "[1, 2]", "{a: 1}", "[[[[]]]]", "[" * 3000, "[a, [b]]", "{1: 2}", "{[a]: b}"],
    *["&a [*a]", "*a", "{", "[", "@", "%", "| x", "? :", "- - -", "<<: 3", "!!set {a}"],
    *["!!int x", "!!float x", "!!bool x", "!!timestamp x", "!!binary aGk=", "!!omap [a]"],
    *["!!python/object/apply:os.system [id]", "[&x [&y [*x]], *y]", "{a: &x {b: *x}}"],
    *[LONG, "/".join(["a" * 300] * 3), "x/" * 3000, "[!!pairs [b: 1]]"],
    *["\x07", "a\nb", "é\u202e", "\udcff", "\0", "a\0b"],
    *["/dev/null", "/dev/zero", "/proc/self/mem", "/etc/passwd", "$(touch x)", "/", ".", "[/**/x]"],
]
BOMB = "\n".join(
    f"{name}: &{name} [{', '.join([item] * 9)}]"
    for name, item in zip("abcdefgh", ["x", *(f"*{before}" for before in "abcdefg")], strict=True)
)
DOCUMENTS = {
    "alias bomb": f"{BOMB}\nmodel: {{num_layers: *h}}\n",
    "recursive section": "model: &m {num_layers: *m}\n",
    "recursive blend": "data: {blend: &b [*b]}\n",
    "recursive set": "data: {validation: &v {a: *v}}\n",
    "deep list": "model: " + "[" * 5000 + "]" * 5000,
    "deep mapping": "".join(" " * i + "a:\n" for i in range(2000)),
    "many digits": "model: {num_layers: " + "9" * 5000 + "}\n",
    "many digits as a key": "0x" + "f" * 5000 + ": 1\n",
    "keys of other types": "1: 2\n? [a, b]\n: 3\nmodel: {3: 4}\n2026-01-01: 3\ntrue: 5\n",
    "null keys": "? \n: 3\nmodel: {~: 3}\n",
    "long keys": f"? {LONG}\n: 1\nmodel:\n  ? {LONG}\n  : 1\n",
    "two documents": "model: {}\n---\nmodel: {}\n",
    "tab": "model:\n\tnum_layers: 1\n",
    "NUL": "model: {activation: \0}\n",
    "escaped NUL": 'run_dir: "a\\0b"\ndata: {tokenizer: "\\0", blend: ["a\\0"]}\n',
    "surrogate": 'run_dir: "\\ud800"\ncheckpoint: {load: "\\ud800"}\n',
    "blank": "run_dir: ''\ndata: {blend: ['', {path: '', weight: 1, name: ' '}], cache_dir: ''}\n",
    "long paths": f"run_dir: {LONG}\ncheckpoint: {{load: {LONG}}}\n"
    f"data: {{blend: [{LONG}, {{path: {LONG}, epochs: 1}}], tokenizer: {LONG}}}\n",
    "amounts": "data: {blend: [{path: x, weight: .nan}, {path: y, tokens: 1e300},"
    " {path: z, epochs: -.inf}, {path: u, weight: 1e-320}, {path: v, tokens: -1}]}\n",
    "sets": "data: {validation: {'': x, 'a/b': null, 3: x, \"\\0\": y, c: {path: {d: e}}}}\n",
    "ranks": "logging: {profile: true, profile_ranks: [-1, 99999999999999999999, 010, 1e30]}\n",
}


@pytest.fixture(autouse=True)
def one_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)


def answer(argv: Sequence[str]) -> Config | list[str]:
    """The configuration, or the numbered problems of it."""
    try:
        return configure(argv, default_recipe="dense_tiny", program="megapoly train")
    except ConfigError as error:
        first, *lines = str(error).split("\n  ")
        assert first.startswith("The configuration has ") and lines[0].startswith("1. ")
        assert error.problems and max(map(len, error.problems)) < LONGEST_MESSAGE
        return error.problems


def as_recipe(key: str, value: str) -> bytes:
    section, _, name = key.rpartition(".")
    text = f"{section}:\n  {name}: {value}\n" if section else f"{name}: {value}\n"
    return text.encode("utf-8", "surrogateescape")


def assert_all_are_answered(cases: Iterable[tuple[str, str, bool]]) -> None:
    """Cases are field, value and whether it is in a recipe, not on the command line."""
    unexpected = []
    for key, value, in_recipe in cases:
        Path("recipe.yaml").write_bytes(as_recipe(key, value))
        argv = ["--config", "recipe.yaml"] if in_recipe else [f"--{key}={value}"]
        try:
            found = answer(argv)
            if isinstance(found, Config):
                Path("saved.yaml").write_text(to_yaml(found), encoding="utf-8")
                assert load_yaml(Path("saved.yaml")) == found
        except Exception as error:  # whatever it is, it must not be
            unexpected.append((key, value[:40], in_recipe, repr(error)[:200]))
    assert unexpected == []


def test_a_hostile_value_is_accepted_or_refused() -> None:
    """A sample, the same in every run: two values of each field, and each value a few times."""
    chosen = random.Random(18)
    keys = [*OPTIONS] * 2
    values = list(itertools.islice(itertools.cycle(chosen.sample(VALUES, len(VALUES))), len(keys)))
    chosen.shuffle(keys)
    assert_all_are_answered(
        (key, value, bool(chosen.getrandbits(1))) for key, value in zip(keys, values, strict=True)
    )


@pytest.mark.slow
def test_many_hostile_values_are_accepted_or_refused() -> None:
    chosen = random.Random(19)
    assert_all_are_answered(
        (key, value, in_recipe)
        for key in OPTIONS
        for value in chosen.sample(VALUES, 12)
        for in_recipe in (False, True)
    )


@pytest.mark.parametrize("key", ["model.qk_norm", "parallel.recompute_modules", "training.bf16"])
@pytest.mark.parametrize("value", ["!!timestamp x", "!!bool x", "[" * 3000, "{[a]: b}", "&a [*a]"])
def test_text_that_the_type_checker_reads_as_yaml(key: str, value: str) -> None:
    for text in (value, f"['{value}']"):
        (problem,) = answer([f"--{key}={text}"])
        assert f"`{key}` is " in problem


@pytest.mark.parametrize("text", DOCUMENTS.values(), ids=DOCUMENTS)
def test_a_hostile_recipe_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "recipe.yaml").write_text(text, encoding="utf-8")
    assert isinstance(answer(["--config", "recipe.yaml"]), list)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("absent.yaml", "No such file"),
        (f"{LONG}.yaml", "File name too long"),
        ("loop.yaml", "symbolic links"),
        ("folder.yaml", "Is a directory"),
        ("binary.yaml", "utf-8"),
        ("/dev/zero", "more than 1 MiB"),
        ("", "`--config` needs a file"),
        ("a\0b.yaml", "null byte"),
        (LONG, "is neither a file nor a recipe"),
    ],
)
def test_a_file_that_cannot_be_a_recipe(tmp_path: Path, name: str, reason: str) -> None:
    (tmp_path / "loop.yaml").symlink_to("loop.yaml")
    (tmp_path / "folder.yaml").mkdir()
    (tmp_path / "binary.yaml").write_bytes(bytes(range(128, 256)))
    problems = answer([f"--config={name}"])
    assert isinstance(problems, list) and reason in problems[0]


@pytest.mark.parametrize("text", ["010", "1:30", "-07", "00", "'010'"])
def test_numbers_that_yaml_versions_read_differently_are_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.yaml").write_text(f"training: {{train_iters: {text}}}\n", encoding="utf-8")
    for argv in ([f"--training.train_iters={text}"], ["--config", "a.yaml"]):
        (problem,) = answer(argv)
        assert f"`training.train_iters` is '{text.strip(chr(39))}'; YAML 1.1 and 1.2" in problem
        assert "decimal digits" in problem


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("10", 10),
        ("-1_000", -1000),
        ("0x1F", 31),
        ("-0b11", -3),
        ("0", 0),
        ("1e3", 1000.0),
        ("-3.5E-4", -3.5e-4),
        (".5", 0.5),
        ("1_0.5", 10.5),
        ("08.5", 8.5),
        ("3e-4x", "3e-4x"),
        ("0o17", "0o17"),
        ("08", "08"),
        ("12:30:45", "12:30:45"),
        ("[&a 1, *a]", [1, 1]),
        ("{<<: {b: 1}, a: 2}", {"a": 2, "b": 1}),
    ],
)
def test_values_of_yaml(text: str, value: object) -> None:
    assert read_yaml(text) == value and type(read_yaml(text)) is type(value)
    if not isinstance(value, str):  # PyYAML reads the others alike
        assert yaml.safe_load(text.replace("e3", ".0e+3")) == value


def test_limits_of_yaml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(yaml_text, "MOST_VALUES", 100)
    assert read_yaml(f"[{'1, ' * 99}]") == [1] * 99
    assert read_yaml(f"[&a [{'1, ' * 48}], *a]") == [[1] * 48] * 2  # 1 + 49 + 49
    for text in (f"[{'1, ' * 100}]", f"[&a [{'1, ' * 49}], *a]"):
        with pytest.raises(yaml.YAMLError, match="stand for more than 100 values"):
            read_yaml(text)
    with pytest.raises(yaml.YAMLError, match="line 2 holds itself by an alias"):
        read_yaml("a:\n  &a\n  b: *a")
    (tmp_path / "a.yaml").write_text("#" * LARGEST_FILE_BYTES)
    assert load_yaml(tmp_path / "a.yaml") == Config()
    (tmp_path / "a.yaml").write_text("#" * (LARGEST_FILE_BYTES + 1))
    with pytest.raises(ConfigError, match="more than 1 MiB"):
        load_yaml(tmp_path / "a.yaml")


@pytest.mark.parametrize("key", ["run_dir", "data.tokenizer", "data.cache_dir", "checkpoint.load"])
@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "blank"),
        ("\t ", "blank"),
        ("a\0b", "NUL"),
        ("\udcff", "UTF-8"),
        (LONG, "at most 4096 bytes"),
        ("a" * 256, "File name too long"),
        ("loop", "symbolic links"),
    ],
)
def test_what_cannot_be_a_path(tmp_path: Path, key: str, text: str, reason: str) -> None:
    (tmp_path / "loop").symlink_to("loop")
    (problem,) = answer([f"--{key}={text}"])
    assert f"`{key}`" in problem and reason in problem


def test_the_tokenizers_file_is_a_problem_among_others() -> None:
    Path("tokenizer.json").write_text("{")
    problems = answer(["--data.tokenizer=tokenizer.json", "--model.num_layers=0"])
    assert len(problems) == 2
    assert "`tokenizer.json` is not a tokenizer.json that can be read" in problems[0]
