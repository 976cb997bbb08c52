"""Reading YAML: every problem at once, each with its file and key."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import pytest
import yaml
from pydantic import Field, model_validator

from fedmerge.errors import Problem, ScenarioError, nearest
from fedmerge.registry import Spec
from fedmerge.system.yaml_loader import check, lined, lines_named, read_as, read_yaml


class Inner(Spec):
    amount: int = Field(1, ge=1)
    share: float = Field(0.0, le=1)

    @model_validator(mode="after")
    def _even(self) -> Inner:
        if self.amount == 7:
            raise ValueError("amount must not be 7")
        return self


class Circle(Spec):
    kind: Literal["circle"]
    radius: int = 0


class Square(Spec):
    kind: Literal["square"]
    side: int = 0


class Outer(Spec):
    name: str
    inner: Inner = Inner()
    many: tuple[Inner, ...] = ()
    shape: Annotated[Circle | Square, Field(discriminator="kind")]


def problems(content: object) -> list[str]:
    with pytest.raises(ScenarioError) as caught:
        check(Outer, content, "f.yaml")
    return [str(problem) for problem in caught.value.problems]


def test_all_problems_are_named_at_once() -> None:
    content = {
        "nam": 1,
        "inner": {"amount": 0, "shaer": 3},
        "many": [{"amount": 7}, {"share": 2}],
        "shape": {"kind": "square", "sides": 2},
    }
    text = problems(content)
    assert len(text) == 7
    assert "f.yaml: inner.amount: found 0; expected greater than or equal to 1" in text
    assert "f.yaml: inner.shaer: found an unknown key; expected a known one; did you mean 'share'?" in text
    assert "f.yaml: many[0]: found {'amount': 7}: amount must not be 7" in text
    assert "f.yaml: many[1].share: found 2; expected less than or equal to 1" in text
    assert "f.yaml: shape.sides: found an unknown key; expected a known one; did you mean 'side'?" in text
    assert "f.yaml: nam: found an unknown key; expected a known one; did you mean 'name'?" in text


class Either(Spec):
    patient: Annotated[int, Field(strict=True, ge=1)] | Annotated[str, Field(max_length=3)] | None = None


@pytest.mark.parametrize(
    ("value", "said"), [("long", "found 'long'; expected text that should have"), (0, "found 0; expected greater")]
)
def test_a_key_of_several_types_has_one_problem_without_their_names(value: object, said: str) -> None:
    with pytest.raises(ScenarioError) as caught:
        check(Either, {"patient": value}, "f.yaml")
    (problem,) = map(str, caught.value.problems)
    assert problem.startswith(f"f.yaml: patient: {said}")


def test_an_unknown_kind_names_the_nearest() -> None:
    assert problems({"name": "x", "shape": {"kind": "sqare"}}) == [
        "f.yaml: shape: found 'sqare'; expected a known kind; did you mean 'square'?"
    ]


def test_a_key_given_twice_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "twice.yaml"
    file.write_text("name: a\nseed: 1\nname: b\n")
    with pytest.raises(ScenarioError, match=r"twice\.yaml, line 3, column 1: found key 'name' given twice"):
        read_yaml(file)


@pytest.mark.parametrize(
    ("text", "said"),
    [("", "an empty file"), ("- a\n- b\n", "a list"), ("a: [1\n", "line 2"), ("a: \t1: 2\n", "line 1")],
)
def test_what_is_no_mapping_is_refused(tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "odd.yaml"
    file.write_text(text)
    with pytest.raises(ScenarioError, match=said):
        read_yaml(file)


def test_a_missing_file_names_its_neighbor(tmp_path: Path) -> None:
    (tmp_path / "organs.yaml").write_text("name: organs\n")
    with pytest.raises(ScenarioError, match=r"did you mean 'organs\.yaml'"):
        read_yaml(tmp_path / "organ.yaml")


def test_a_link_to_itself_is_no_neighbor_and_a_nul_is_in_no_name(tmp_path: Path) -> None:
    (tmp_path / "loop.yaml").symlink_to("loop.yaml")
    with pytest.raises(ScenarioError, match=r"found Too many levels of symbolic links; expected a readable YAML file$"):
        read_yaml(tmp_path / "loop.yaml")
    (tmp_path / "dangling.yaml").symlink_to("nowhere.yaml")
    with pytest.raises(ScenarioError, match=r"found No such file or directory; .* did you mean 'loop\.yaml'|known: loop\.yaml"):
        read_yaml(tmp_path / "dangling.yaml")
    with pytest.raises(ScenarioError, match=r"found no name of a file .*; expected a readable YAML file"):
        read_yaml(tmp_path / "a\0b.yaml")


def test_bytes_that_are_no_text_are_refused(tmp_path: Path) -> None:
    (tmp_path / "image.yaml").write_bytes(b"\xff\xd8\xff\xe0")
    with pytest.raises(ScenarioError, match="UTF-8"):
        read_yaml(tmp_path / "image.yaml")


def test_nearest_lists_what_is_known_when_nothing_is_near() -> None:
    assert nearest("qqq", ["mean", "ties"]) == "known: mean, ties"


TEXT = """\
# A comment.
name: x
inner:
  amount: 0
  shaer: 3
many:
  - amount: 1

  - {amount: 1,
     "share": 2}
shape:
  kind: square
  sides: 2
"""


def told(file: Path, text: str) -> list[str]:
    file.write_text(text)
    with pytest.raises(ScenarioError) as caught:
        read_as(Outer, file)
    return [f"{problem.where.removeprefix(str(file))}: {problem.key}" for problem in caught.value.problems]


def test_a_problem_names_its_line(tmp_path: Path) -> None:
    file = tmp_path / "odd.yaml"
    lines = {"inner.amount": 4, "inner.shaer": 5, "many[1].share": 10, "shape.sides": 13}
    assert told(file, TEXT) == [f", line {line}: {key}" for key, line in lines.items()]
    assert told(file, TEXT.replace("\n", "\r\n")) == [f", line {line}: {key}" for key, line in lines.items()]
    assert told(file, "shape: {kind: square}\n") == [": name"]  # nothing is above what is missing
    assert told(file, "name: 1e-3\nshape:\n  side: 1\n") == [", line 2: shape"]
    for text, line in {
        "name: x\n'name': y\n": 2,
        "name: [\n": 2,
        "a:\n  b: @\n": 2,
        "a:\nb: '\x07'": 2,
        "a: {b: 1,\n b: 2}": 2,
    }.items():
        (place,) = told(file, text)
        assert place.startswith(f", line {line}")


def test_only_what_stands_in_the_file_has_a_line(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text("a.b: 1\na: {c: 2}\n")
    keys = ("a.b", "a.c", "a.d", "e", "a[0]", "")
    found = lined([Problem(str(file), key, "1", "2") for key in keys], file)
    assert [problem.where.removeprefix(str(file)) for problem in found] == [", line 1", ", line 2", ", line 2", "", ", line 2", ""]
    assert lined(found, file) == found
    other = [Problem("b.yaml", "a", "1", "2")]
    assert lined(other, file) == other
    with (
        pytest.raises(ScenarioError, match=r"a\.yaml, as the command line changes it: a\.c"),
        lines_named(file, lambda key: key != "a.c"),
    ):
        raise ScenarioError([Problem(str(file), "a.c", "1", "2")])


ROOT = Path(__file__).resolve().parents[3]
SCALARS = """
yes no on off Yes NO y n Y N true TRUE ~ null NULL 1e-3 1.e-3 1.0e-3 1.0e3 1e3 1.5e+3 12e03 1E5 .5 5. ._1 0o17 08 0x1F 0b11 00.5
1_000 1_0.5 2001-12-14 2001-12-14t21:59:43.10-05:00 .inf -.inf +1 -0 -_ 0b 1,100
'yes' "no" '1' !!str<1 !!int<'3' !!float<3 !!binary<aGk= {a} [1,y] {yes:<1} 1e nan x#y |<
"""


@pytest.mark.parametrize("scalar", [scalar.replace("<", " ") for scalar in SCALARS.split()])
def test_values_are_those_of_plain_yaml(scalar: str, tmp_path: Path) -> None:
    file = tmp_path / "odd.yaml"
    file.write_text(f"a: {scalar}\nb: [{scalar if scalar != '| ' else 1}]\nc: &c {{d: 1}}\ne: {{<<: *c, d: 2}}\n")
    mine, plain = read_yaml(file), yaml.safe_load(file.read_text())
    assert repr(mine) == repr(plain)  # 1, 1.0 and True are equal, but do not read the same


@pytest.mark.parametrize("scalar", ["017", "0_7", "-01", "190:20:30", "190:20:30.15", "1:30", "1:60", "-1:30", "="])
def test_what_yaml_1_1_alone_takes_for_a_number_is_text(scalar: str, tmp_path: Path) -> None:
    file = tmp_path / "odd.yaml"
    file.write_text(f"a: {scalar}\nb: [{scalar}]\n{scalar}: {{{scalar}: {scalar}}}\n")
    assert read_yaml(file) == {"a": scalar, "b": [scalar], scalar: {scalar: scalar}}


@pytest.mark.parametrize("file", sorted(ROOT.glob("s[ci]*s/*.yaml")), ids=lambda path: path.stem)
def test_shipped_files_are_read_like_plain_yaml(file: Path) -> None:
    mine = read_yaml(file)
    assert repr(mine) == repr(yaml.safe_load(file.read_text(encoding="utf-8")))


@pytest.mark.parametrize(
    "text",
    ["a: 2001-99-99\n", "a: !!timestamp x\n", "a: !!int ''\n", "a: !!python/object:os.x {}\n", "a: &x 1\nb: &x 2\n"],
)
def test_values_that_are_none_are_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "odd.yaml").write_text(text)
    with pytest.raises(ScenarioError, match=r"odd\.yaml"):
        read_yaml(tmp_path / "odd.yaml")


@pytest.mark.parametrize("text", ["yes: a\ntrue: b\n", "1: a\n0x1: b\n", "a: {no: 1, off: 2}\n"])
def test_keys_that_only_their_values_show_to_be_the_same_are_refused(text: str, tmp_path: Path) -> None:
    file = tmp_path / "x.yaml"
    file.write_text(text)
    with pytest.raises(ScenarioError, match="given twice"):
        read_yaml(file)


def test_merge_keys_are_those_of_yaml(tmp_path: Path) -> None:
    """A mapping's own keys win, and of several mappings the first; also where anchors are used twice, and within one another."""
    file = tmp_path / "a.yaml"
    text = "base: &b {x: 1, y: 2}\na: &a {<<: *b, x: 3}\nb: {<<: *a, z: 1}\nc: *a\nd: {<<: [*a, *b], y: 0}\ne: {<<: [*b, *a]}\n"
    file.write_text(text)
    assert read_yaml(file) == {
        "base": {"x": 1, "y": 2},
        "a": {"x": 3, "y": 2},
        "b": {"x": 3, "y": 2, "z": 1},
        "c": {"x": 3, "y": 2},
        "d": {"x": 3, "y": 0},
        "e": {"x": 1, "y": 2},
    }
    for wrong in ("b: &b {x: 1}\na: {<<: *b, x: 3, x: 4}\n", "a: {<<: text}\n"):
        file.write_text(wrong)
        with pytest.raises(ScenarioError, match=r"found (key 'x' given twice|a scalar after <<)"):
            read_yaml(file)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("a: größer\n".encode("latin-1"), r"a byte that is no UTF-8 text \(0xf6 in line 1\); .* Save it as UTF-8"),
        ("a: 1\n".encode("utf-16"), "Save it as UTF-8"),
        ("a: 1\n".encode("utf-16-le"), "Save it as UTF-8"),
        ("a: 1\n".encode("utf-32"), "Save it as UTF-8"),
    ],
)
def test_what_editors_make_of_a_file(tmp_path: Path, content: bytes, said: str) -> None:
    file = tmp_path / "a.yaml"
    file.write_bytes(content)
    with pytest.raises(ScenarioError, match=said):
        read_yaml(file)
    file.write_bytes(b"\xef\xbb\xbfa: 1\r\n")
    assert read_yaml(file) == {"a": 1}


class Words(Spec):
    name: str = ""
    sites: tuple[str, ...] = ()
    inner: Inner = Inner()
    count: int = 0
    file: Path = Path()
    shares: dict[str, float] = {}
    names: tuple[str, ...] | dict[str, tuple[str, ...]] | str = ()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("name: no\n", "line 1: name: found no; expected text. Put it in quotes: without them, YAML takes it for a truth value"),
        ("sites: [a, 2023]\n", "sites[1]: found 2023; expected text. Put it in quotes: without them, YAML takes it for a number"),
        ("sites: [2023-05-01]\n", "expected text. Put it in quotes: without them, YAML takes it for a date"),
        ("sites: a, b\n", "sites: found 'a, b'; expected a list, e.g. [a, b]"),
        ("sites: a\n", "sites: found 'a'; expected a list, e.g. [a]"),
        ("name: 0x1F\n", "name: found 0x1F; expected text. Put it in quotes"),
        ("name: ~\n", "line 1: name: found nothing; expected text"),
        ("name: x\nno: 1\n", "line 2: False: found a key that YAML takes for a truth value; expected text. Put it in quotes"),
        ("name: x\n2023: 1\n", "line 2: 2023: found a key that YAML takes for a number; expected text. Put it in quotes"),
        ("inner: 3\n", "inner: found 3; expected a mapping of keys to values"),
        ("file: no\n", "line 1: file: found no; expected a path. Put it in quotes: without them, YAML takes it for a truth value"),
        ("shares: {no: 1}\n", "line 1: shares.False: found a key that YAML takes for a truth value; expected text. Put it in"),
        ("count: 1:30\n", "line 1: count: found '1:30'; expected a valid integer"),
        ("count: 2023-05-01\n", "line 1: count: found 2023-05-01; expected a valid integer"),
    ],
)
def test_words_that_help(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(ScenarioError) as error:
        read_as(Words, tmp_path / "a.yaml")
    assert said in str(error.value)


@pytest.mark.parametrize(
    ("given", "key", "found"),
    [
        ("[a, no]", "names[1]", "no"),
        ("{north: [a, on]}", "names.north[1]", "on"),
        ("{no: [a, b]}", "names.False", "a key that YAML takes for a truth value"),
        ("{2023: [a, b]}", "names.2023", "a key that YAML takes for a number"),
    ],
)
def test_a_value_of_several_types_is_told_where_it_is_wrong(given: str, key: str, found: str, tmp_path: Path) -> None:
    """And not that it is none of the other types."""
    (tmp_path / "a.yaml").write_text(f"names: {given}\n")
    with pytest.raises(ScenarioError) as error:
        read_as(Words, tmp_path / "a.yaml")
    (problem,) = error.value.problems
    assert (problem.key, problem.found, problem.expected) == (key, found, "text")
    assert problem.where.endswith("line 1")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a:\n\tb: 1\n", "Indent with spaces"),
        ("a: b: c\n", "Put a text with ': ' in it in quotes"),
        ("a: @b\n", "Put a text that begins with it in quotes"),
        ("a: *b\n", "line 1, column 4: found undefined alias 'b'"),
        ("a: 1\n---\nb: 1\n", "found another document; expected YAML. Leave out the line '---'"),
        ("a: 1\na: 2\n", "found key 'a' given twice; expected every key once"),
        ("a: &x [*x]\n", "an anchor within its own value"),
        ("a: &x {b: *x}\n", "an anchor within its own value"),
        ("a: &x {<<: *x}\n", "too deep"),
        ("a: " + "[" * 3000 + "]" * 3000, "too deep"),
        ("- " * 3000, "too deep"),
        (
            "a0: &a0 [1]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 12)),
            "anchors that make more",
        ),
    ],
)
def test_what_cannot_be_read_says_how_to_mend_it(text: str, said: str, tmp_path: Path) -> None:
    file = tmp_path / "odd.yaml"
    file.write_text(text)
    with pytest.raises(ScenarioError) as caught:
        read_yaml(file)
    assert said in str(caught.value)
