"""YAML is read as it looks, or refused with the line; what a dumper of YAML 1.1 wrote is read back."""

import random

import pytest
import yaml

from vaemo.config.strict_yaml import NotPlainYaml, dump, load


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("7", 7),
        ("-7", -7),
        ("1_000", 1000),
        ("0.5", 0.5),
        ("1.", 1.0),
        ("1.0e-3", 0.001),
        (".inf", float("inf")),
        ("true", True),
        ("False", False),
        ("null", None),
        ("~", None),
        ("", None),
        ("[1, a]", [1, "a"]),
        # Text, which a field of numbers refuses: YAML 1.1 reads 8, 16, 10, 90, 3661.5, True, False, False, a date.
        *[(text, text) for text in ("010", "0x10", "0b10", "1:30", "1:1:1.5", "yes", "No", "off", "2024-01-01")],
        *[(text, text) for text in ("00", "-010", "1__0", "5_", "0o17", "1e-3", "1,5", "=", "010.5", "9" * 5000)],
    ],
)
def test_a_value_is_what_it_looks_like(text, value):
    found = load(text)
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a: 1\nb: 2\na: 3", "line 3: 'a' occurs twice, first on line 1; leave one of them out"),
        ("x:\n  a: 1\n  a: 1", "line 3: 'a' occurs twice, first on line 2"),
        ("- {a: 1, b: {c: 1, c: 2}}", "line 1: 'c' occurs twice"),
        ("1: a\n1.0: b", "line 2: '1.0' occurs twice"),
        ("b: &b {x: 1}\nc: {<<: *b, <<: *b}", "line 2: '<<' occurs twice"),
        ("b: {<<: 3}", "line 1: '<<' takes a mapping"),
        ("a:\n\tb: 1", r"line 2: .*character '\\t' that cannot start any token"),
        ("a: [", "line 1: .*found '<stream end>'"),
        ("a: *b", "line 1: found undefined alias 'b'"),
        ("a: &a [1, *a]", "line 1: an alias is inside its own anchor"),
        ("[a]: 1", "line 1: a key is a single value"),
        ("a: 1\n---\nb: 2", "line 2: expected a single document"),
        ("a: !!int 1:30", "line 1: '1:30' is not what its tag says"),
        ("a: !!set {b}", "line 1: could not determine a constructor .* plain values alone are read"),
        ("a: !!python/object/apply:os.getcwd []", "line 1: could not determine a constructor"),
        ("%TAG ! tag:yaml.org,2002:python/\n---\na: !name:os.system", "line 3: could not determine a constructor"),
        ("a: " + "[" * 5000, "nested too deep"),
        ("a: " + "[" * 60 + "]" * 60, "line 1: its values are nested deeper than 50"),
        (b"a: \xe9", "unacceptable character"),
        ("a: \x00", "unacceptable character"),
    ],
)
def test_what_is_not_plain_is_refused_with_its_line(text, says):
    with pytest.raises(NotPlainYaml, match=says) as refusal:
        load(text)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("form", ["[{}]", "{{<<: [{}]}}"])
def test_aliases_that_stand_for_millions_of_values_are_refused(form):
    lines = ["a0: &a0 {k: 1}", *(f"a{n}: &a{n} {form.format(', '.join([f'*a{n - 1}'] * 10))}" for n in range(1, 40))]
    with pytest.raises(NotPlainYaml, match="with its aliases it stands for more than 10000 values"):
        load("\n".join(lines))


def test_anchors_and_merges_work():
    text = "base: &base {a: 1, b: 2}\nmore: &more {b: 5, c: 6}\nboth: {<<: [*base, *more], a: 3}\nsame: *base\n"
    loaded = load(text)
    assert loaded["both"] == {"a": 3, "b": 2, "c": 6}
    assert loaded["same"] == {"a": 1, "b": 2}


def test_files_of_windows_are_read():
    for encoded in ("\ufeffa: ü\r\nb: 1\r\n".encode(), "\ufeffa: ü\nb: 1\n".encode("utf-16-le")):
        assert load(encoded) == {"a": "ü", "b": 1}


def test_whatever_is_dumped_is_read_back():
    rng = random.Random(0)
    letters = "0123456789.eE+-_:xob~<=nNyYtTfFsSaAlLuUrRoO #'\"!&*,[]{}|>%@`\t\n"
    for _ in range(800):
        text = "".join(rng.choice(letters) for _ in range(rng.randint(0, 6)))
        number = rng.choice([rng.random() * 10 ** rng.randint(-300, 300), rng.randint(-(10**12), 10**12), None, True])
        value = {"text": text, text: [text, number], "number": number}
        assert load(dump(value)) == value
        assert yaml.safe_load(dump(load(dump(value)))) == value
