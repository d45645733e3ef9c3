"""Prompt files as people bring them: what stands in them is what rewards get, and what cannot be is refused by name."""

from __future__ import annotations

import datetime
import gzip
import json
import shlex
import subprocess
import time
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from rlr_ray.config.recipe import load_config
from rlr_ray.errors import UserError
from rlr_ray.prompts.load import load_prompts, prompt_sets
from rlr_ray.prompts.order import PromptOrder
from tests.runs import logged, short_run

CELLS: dict[str, tuple[list[str], list[Any]]] = {  # cells of a column, and what rewards get of them
    "whole numbers": (["2", "-3", "0"], [2, -3, 0]),
    "leading noughts": (["007", "12", "3"], ["007", "12", "3"]),
    "versions": (["1.10", "1.9", "2.0"], ["1.10", "1.9", "2.0"]),
    "decimals": (["1.5", "2", "0.25"], [1.5, 2.0, 0.25]),
    "dates": (["2024-01-02", "2024-02-03", ""], ["2024-01-02", "2024-02-03", ""]),
    "times": (["12:30", "2024-01-02 03:04:05", "1"], ["12:30", "2024-01-02 03:04:05", "1"]),
    "exponents, as of commits": (["1e5", "2e6", "3"], ["1e5", "2e6", "3"]),
    "more digits than a float has": (["0.12345678901234567890", "1", "2"], ["0.12345678901234567890", "1", "2"]),
    "large whole numbers": (["9007199254740993", "1", "2"], [9007199254740993, 1, 2]),
    "no numbers": (["NA", "nan", "null"], ["NA", "nan", "null"]),
    "truth": (["true", "false", ""], [True, False, None]),
    "blanks": ([" 7", "8 ", "+9"], [" 7", "8 ", "+9"]),
    "gaps": (["1", "", "3"], [1, None, 3]),
    "nothing": (["", "", ""], [None, None, None]),
    "words": (["cat", "dog", "1"], ["cat", "dog", "1"]),
}


@pytest.mark.parametrize("delimiter", [",", "\t"])
def test_cells_are_what_stands_in_the_file(tmp_path: Path, delimiter: str) -> None:
    file = tmp_path / f"p.{'csv' if delimiter == ',' else 'tsv'}"
    rows = zip(*(cells for cells, _ in CELLS.values()), strict=True)
    heads = [name.replace(",", "") for name in CELLS]
    lines = [["prompt", *heads], *([f"{number}", *row] for number, row in enumerate(rows))]
    file.write_text("\n".join(delimiter.join(line) for line in lines))
    prompts = load_prompts(str(file))
    assert [prompt.text for prompt in prompts] == ["0", "1", "2"]
    for head, (_, expected) in zip(heads, CELLS.values(), strict=True):
        values = [prompt.metadata[head] for prompt in prompts]
        assert values == expected and [*map(type, values)] == [*map(type, expected)], head
        json.dumps(values, allow_nan=False)


def test_what_parquet_has_beside_text_and_numbers_is_text_that_json_can_carry(tmp_path: Path) -> None:
    day = datetime.date(2024, 1, 2)
    row = {
        "prompt": "a",
        "day": day,
        "at": datetime.datetime(2024, 1, 2, 3, 4),
        "price": Decimal("1.10"),
        "all": [{"d": day}],
    }
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row]), tmp_path / "p.parquet")
    expected = {"day": "2024-01-02", "at": "2024-01-02T03:04:00", "price": "1.10", "all": [{"d": "2024-01-02"}]}
    assert load_prompts(str(tmp_path / "p.parquet"))[0].metadata == expected


TWICE = {
    "p.csv": "prompt,n,n\na,1,2\n",
    "p.tsv": "prompt\tn\tn\na\t1\t2\n",
    "p.jsonl": '{"prompt": "a", "n": 1, "n": 2}\n',
    "p.json": '[{"prompt": "a", "more": {"n": 1, "n": 2}}]',
    "p.parquet": "",
}


@pytest.mark.parametrize("name", TWICE)
def test_a_column_twice_is_refused(tmp_path: Path, name: str) -> None:
    file = tmp_path / name
    if name == "p.parquet":
        column = pyarrow.array(["a"])
        pyarrow.parquet.write_table(pyarrow.Table.from_arrays([column] * 3, names=["prompt", "n", "n"]), file)
    else:
        file.write_text(TWICE[name])
    with pytest.raises(UserError, match=r"'n' (stands )?twice"):
        load_prompts(str(file))


@pytest.mark.parametrize("ending", ["csv", "jsonl"])
def test_a_field_over_a_mebibyte_is_read(tmp_path: Path, ending: str) -> None:
    file, long = tmp_path / f"p.{ending}", "word " * 500_000
    rows = [{"prompt": f"{n}", "n": long} for n in range(2)]
    lines = map(json.dumps, rows) if ending == "jsonl" else ["prompt,n", *(f'{row["prompt"]},"{long}"' for row in rows)]
    file.write_text("\n".join(lines))
    assert [prompt.metadata["n"] == long for prompt in load_prompts(str(file))] == [True, True]


def test_prompts_column_names_the_column(tmp_path: Path) -> None:
    file, other = tmp_path / "p.csv", tmp_path / "q.csv"
    file.write_text("prompt,Prompt_EN,n\n一只猫,007,2\n一只狗,a dog,3\n")
    other.write_text("prompt_en\na cow\n")
    keys = {"source": str(file), "held_out": str(other), "column": "prompt_en"}
    sets = prompt_sets(short_run(tmp_path, prompts=keys))
    assert [(prompt.text, prompt.metadata) for prompt in sets.train] == [
        ("007", {"prompt": "一只猫", "n": 2}),
        ("a dog", {"prompt": "一只狗", "n": 3}),
    ]
    assert [prompt.text for prompt in sets.held_out] == ["a cow"]
    with pytest.raises(UserError, match=r'row 1: found .*"caption_fr" \(prompts.column\).*set prompts.column'):
        load_prompts(str(file), column="caption_fr")
    with pytest.raises(UserError, match=r"found a text, 'a', where prompts.column is 'x'; .*leave prompts.column out"):
        load_prompts(["a"], column="x")


UTF16 = "prompt,n\na cat,1\n".encode("utf-16")
FOREIGN = [
    ("p.csv", UTF16, "is UTF-16"),
    ("p.txt", "a cat".encode("utf-16-le"), "is UTF-16"),
    ("p.jsonl", '{"prompt": "é"}'.encode("utf-16-be"), "is UTF-16"),
    ("p.txt", "café".encode("cp1252"), "is not UTF-8"),
    ("p.csv", "prompt\ncafé “x”\n".encode("cp1252"), "is not UTF-8"),
    ("p.csv.gz", gzip.compress(b"prompt\na cat\n"), "ends in '.gz'"),
    ("p.jsonl", gzip.compress(b'{"prompt": "a cat"}\n'), "is .gz inside"),
    ("p.xlsx", b"PK\x03\x04", "ends in '.xlsx'"),
    ("p.csv", b"PK\x03\x04 a workbook", "is .xlsx inside"),
    ("p.txt.zst", b"", "ends in '.zst'"),
]


@pytest.mark.parametrize(("name", "content", "words"), FOREIGN, ids=[f"{name}-{words}" for name, _, words in FOREIGN])
def test_what_is_no_utf8_is_refused_with_the_command_that_makes_it_so(
    tmp_path: Path, name: str, content: bytes, words: str
) -> None:
    """The command of an encoding is run, and what it makes is read."""
    file = tmp_path / f"my {name}"
    file.write_bytes(content)
    with pytest.raises(UserError) as error:
        load_prompts(str(file))
    text = str(error.value)
    assert words in text and shlex.quote(str(file)) in text
    command = text.split("convert it: ")[1].split(" (")[0]
    if command.startswith("iconv"):
        subprocess.run(command, shell=True, check=True)
        assert load_prompts(str(tmp_path / f"my p.utf8{file.suffix}"))[0].text[:2] in ("a ", "é", "ca")
    else:
        assert command.startswith(("gunzip", "unzstd", "soffice --headless --convert-to csv"))


RECIPE = "name: x\nmodel: {name: digits}\nreward: {name: digits}\n"
YAML = {
    "a section twice": (
        "prompts: [a]\ntrain: {iterations: 1}\ntrain: {chains: 2}\n",
        "key 'train' stands twice, in line 5",
    ),
    "a key twice": ("prompts: [a]\ntrain: {chains: 2, chains: 4}\n", "key 'chains' stands twice"),
    "a colon": ("prompts:\n- a dog\n- a cat: sitting\n", 'entry 2 is .*write it in quotes: - "a cat: sitting"'),
    "a colon below source": ("prompts: {source: [a: b]}\n", r'prompts.source: entry 1 .*quotes: - "a: b"'),
    "held out": ("prompts: {source: [a], held_out: [7]}\n", "prompts.held_out: entry 1 is 7 to YAML; .*in quotes"),
    "a truth value": ("prompts: [no]\n", "entry 1 is False to YAML; .*put what stands there in quotes"),
    "nothing": ("prompts: [a, ]\n- b\n", "is not YAML"),
}


@pytest.mark.parametrize("name", YAML)
def test_yaml_that_means_something_else_is_refused(tmp_path: Path, name: str) -> None:
    text, words = YAML[name]
    (tmp_path / "r.yaml").write_text(RECIPE + text)
    with pytest.raises(UserError, match=words):
        load_config(str(tmp_path / "r.yaml"), [])


def test_an_override_has_no_key_twice_either(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(RECIPE + "prompts: &list [a]\ntrain: &here {chains: 4, chunk_size: 2}\n")
    assert load_config(str(tmp_path / "r.yaml"), ["train={chains: 8, chunk_size: 2}"]).train.chains == 8
    with pytest.raises(UserError, match="'chains' stands twice"):
        load_config(str(tmp_path / "r.yaml"), ["train={chains: 4, chains: 8}"])


def test_a_hundred_thousand_prompts_take_a_second_or_two_and_say_how_far_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A million takes ten times that, and then no update waits for its prompts."""
    monkeypatch.setattr("rlr_ray.prompts.load._SAY_S", 0.05)
    file, count, started = tmp_path / "p.txt", 100_000, time.process_time()
    file.write_text("\n".join(f"a cat and {n} mice" for n in range(count)))
    with logged() as said:
        prompts = load_prompts(str(file))
    order = PromptOrder([prompt.weight for prompt in prompts], 0)
    assert len({order(slot) for slot in range(1000)}) == 1000
    assert time.process_time() - started < 5 and len(prompts) == count
    assert any("0,000 rows read" in text for text in said)
