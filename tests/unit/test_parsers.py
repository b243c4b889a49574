"""Readers of files and texts, fed with whatever hypothesis makes: a value, or one line that says what is wrong."""

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from fourfold.artifacts.files import read_jsonl
from fourfold.artifacts.tensors import read_header
from fourfold.benchmark.answers import as_number, extract_answer, normalise
from fourfold.config import Config, parse_config
from fourfold.config.load import with_overrides
from fourfold.errors import FourfoldError
from fourfold.model.gguf import GgufFile

# A file's fixture is one folder for all examples: each writes its file anew.
FILES = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


def outcome(read: Callable[..., Any], *arguments: Any) -> tuple[Any, str | None]:
    """What a reader gives, and None; or None, and the one line of its error. Any other exception fails the test."""
    try:
        return read(*arguments), None
    except (FourfoldError, ValueError) as error:
        text = str(error)
    assert text
    assert len(text.splitlines()) == 1
    return None, text


@FILES
@given(rows=st.lists(st.dictionaries(st.text(max_size=8), JSON, max_size=4), max_size=6), mark=st.booleans())
def test_json_lines_come_back(tmp_path: Path, rows: list[dict[str, Any]], mark: bool) -> None:
    path = tmp_path / "rows.jsonl"
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n \n" for row in rows)
    path.write_text(lines, encoding="utf-8-sig" if mark else "utf-8", errors="surrogatepass", newline="")
    found, message = outcome(read_jsonl, path)
    # A lone surrogate is text to Python and to JSON, but not to UTF-8.
    if any("\ud800" <= character <= "\udfff" for character in lines):
        assert message is not None
        assert "not UTF-8" in message
    else:
        assert found == rows


@FILES
@given(content=st.binary(max_size=200) | st.text(max_size=100).map(str.encode))
@example(content=b"\xef\xbb\xbf{}")
@example(content=b'{"a": NaN}\r{"a": 1}')
def test_any_bytes_are_json_lines_or_one_line_that_names_the_place(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    rows, message = outcome(read_jsonl, path)
    if message is None:
        assert all(isinstance(row, dict) for row in rows)
    else:
        assert message.startswith(f"{path}, line ")


def header_file(path: Path, header: bytes, data: bytes) -> Path:
    path.write_bytes(struct.pack("<Q", len(header)) + header + data)
    return path


@FILES
@given(shapes=st.dictionaries(st.text(min_size=1, max_size=8), st.lists(st.integers(0, 4), max_size=3), max_size=4))
def test_safetensors_headers_are_read_as_the_library_wrote_them(tmp_path: Path, shapes: dict[str, list[int]]) -> None:
    shapes.pop("__metadata__", None)
    path = tmp_path / "a.safetensors"
    path.write_bytes(save({name: torch.zeros(shape, dtype=torch.bfloat16) for name, shape in shapes.items()}))
    assert {name: info["shape"] for name, info in read_header(path).items()} == shapes
    cut = path.read_bytes()[:-1]
    path.write_bytes(cut)
    with pytest.raises(ValueError, match=r"bytes|header"):
        read_header(path)


@FILES
@given(content=st.binary(max_size=64), header=JSON, data=st.binary(max_size=8))
@example(content=b"", header={"a": {"dtype": "BF16", "shape": [1], "data_offsets": [2, 0]}}, data=b"")
@example(content=b"", header={"a": {"dtype": "BF16", "shape": [True], "data_offsets": [0, 2]}}, data=b"12")
def test_any_bytes_are_a_header_or_a_value_error(tmp_path: Path, content: bytes, header: Any, data: bytes) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(content)
    for _ in range(2):
        found, message = outcome(read_header, path)
        assert message or all(info["data_offsets"][1] >= 0 for info in found.values())
        header_file(path, json.dumps(header).encode(errors="surrogatepass"), data)


def gguf_bytes(keys: list[tuple[bytes, int, bytes]], tensors: int = 0) -> bytes:
    entries = b"".join(struct.pack("<Q", len(key)) + key + struct.pack("<I", kind) + value for key, kind, value in keys)
    return struct.pack("<4sIQQ", b"GGUF", 3, tensors, len(keys)) + entries


NESTED = struct.pack("<IQ", 9, 1)
GGUF = st.builds(
    gguf_bytes, st.lists(st.tuples(st.binary(max_size=6), st.integers(0, 14), st.binary(max_size=24)), max_size=3)
)


@FILES
@given(content=st.binary(max_size=100) | GGUF, tail=st.binary(max_size=40))
@example(content=gguf_bytes([], tensors=2**63), tail=b"")
@example(content=gguf_bytes([(b"a", 9, NESTED * 5000)]), tail=b"")
@example(content=gguf_bytes([(b"a", 9, struct.pack("<IQ", 4, 2**62))]), tail=b"")
@example(content=gguf_bytes([(b"a", 8, struct.pack("<Q", 2**63))]), tail=b"")
@example(content=gguf_bytes([(b"general.alignment", 4, bytes(4))]), tail=b"")
@example(content=gguf_bytes([(b"general.alignment", 8, struct.pack("<Q", 1) + b"a")]), tail=b"")
@example(content=gguf_bytes([], 1) + struct.pack("<Q1sIQIQ", 1, b"t", 1, 7, 2, 0), tail=bytes(99))
def test_any_bytes_are_gguf_or_one_line(tmp_path: Path, content: bytes, tail: bytes) -> None:
    path = tmp_path / "a.gguf"
    path.write_bytes(content + tail)
    file, message = outcome(GgufFile, path)
    assert isinstance(file.metadata, dict) if message is None else message.startswith("a.gguf: ")


ANSWER_TEXT = st.text(max_size=40) | st.text("0123456789.,/-+$%\\{} boxedfrac#answeris\n", max_size=60)


@given(ANSWER_TEXT)
@example("\\boxed{" * 50)
@example("#### \n####")
@example("1,000/0")
@example("\\frac{1}{0}")
def test_any_text_has_an_answer_or_none(text: str) -> None:
    answer = extract_answer(text)
    if answer is None:
        return
    assert answer
    assert "\n" not in answer.strip("\n") or "\\boxed" in text or "\\fbox" in text
    normal = normalise(answer)
    as_number(normal)
    # A normal form is one: normalising it again changes nothing.
    assert normalise(normal) == normal


@given(
    st.integers(-(10**12), 10**12),
    st.sampled_from(["{}", "${}", "{} apples", "**{}**", "\\text{{}}{}", "{}.", "$\\${}$"]),
)
def test_a_whole_number_is_found_in_every_dress(number: int, dress: str) -> None:
    plain, grouped = dress.replace("{}", str(number)), dress.replace("{}", f"{number:,}")
    for text in (plain, grouped):
        if "{" in text:
            continue
        for marked in (f"so \\boxed{{{text}}}", f"12 then 7\n#### {text}\n", f"5 or 6. The final answer is {text}"):
            found = extract_answer(marked)
            assert found is not None
            assert as_number(normalise(found)) == number, marked


@given(
    over=st.integers(-999, 999),
    under=st.integers(1, 999),
    form=st.sampled_from(["{}/{}", "{} / {}", "\\frac{{{}}}{{{}}}", "\\dfrac{{{}}}{{{}}}"]),
)
def test_fractions_are_exact(over: int, under: int, form: str) -> None:
    value = as_number(normalise(form.format(over, under)))
    assert value is not None
    assert value * under == over


KEYS = st.sampled_from(
    ["name", "model", "benchmark", "engines", "drafter", "seed", "max_tokens", "training", "a b", ""]
)
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3), max_leaves=6
)


@given(values=st.dictionaries(KEYS, VALUES, max_size=5), overrides=st.dictionaries(KEYS, VALUES, max_size=3))
def test_any_overrides_are_a_configuration_or_one_line(values: dict[str, Any], overrides: dict[str, Any]) -> None:
    config, message = outcome(lambda: parse_config(with_overrides(values, overrides)))
    assert message or isinstance(config, Config)


@given(st.integers() | st.booleans() | st.none())
def test_an_override_that_was_text_is_the_value_that_it_spells(value: int | bool | None) -> None:
    overrides = {"a": {"b": [json.dumps(value)]}}
    result = with_overrides({}, overrides)["a"]["b"][0]
    assert result == value
    assert type(result) is type(value)
