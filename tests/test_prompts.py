from __future__ import annotations

from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from rlr_ray.errors import UserError
from rlr_ray.prompts import Prompt, load_prompts, prompt_order


def test_text_file_has_one_prompt_a_line(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("a cat\n\n  a dög \n", "utf-8")
    assert load_prompts(str(file)) == [Prompt("a cat"), Prompt("a dög")]


def test_json_lines_hand_every_other_key_to_the_reward(tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "a cat", "count": 2}\n{"prompt": "a dog"}\n', "utf-8")
    assert load_prompts(str(file)) == [Prompt("a cat", {"count": 2}), Prompt("a dog")]


def test_tables_hand_their_other_columns_to_the_reward(tmp_path: Path) -> None:
    (tmp_path / "prompts.csv").write_text('prompt,count\n"a cat, asleep",2\n a dog ,\n', "utf-8")
    expected = [Prompt("a cat, asleep", {"count": 2}), Prompt("a dog", {"count": None})]
    assert load_prompts(str(tmp_path / "prompts.csv")) == expected
    table = pyarrow.Table.from_pylist([{"prompt": "a cat", "box": [1, 2]}, {"prompt": "a dog", "box": [3]}])
    pyarrow.parquet.write_table(table, tmp_path / "prompts.parquet")
    expected = [Prompt("a cat", {"box": [1, 2]}), Prompt("a dog", {"box": [3]})]
    assert load_prompts(str(tmp_path / "prompts.parquet")) == expected


def test_every_prompt_is_used_once_before_any_is_used_again() -> None:
    orders = [[prompt_order(5, slot, 0, "train") for slot in range(first, first + 5)] for first in (0, 5, 10)]
    assert all(sorted(order) == list(range(5)) for order in orders)
    assert orders[0] != orders[1] or orders[1] != orders[2]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("missing.txt", None, ["missing.txt", "not found"]),
        ("empty.txt", b"\n \n", ["empty.txt", "no prompt"]),
        ("latin.txt", b"caf\xe9\n", ["latin.txt", "UTF-8", "byte 3"]),
        ("table.xlsx", b"prompt", ["table.xlsx", ".xlsx", ".txt, .jsonl, .csv, .parquet"]),
        ("headed.csv", b"prompt,count\n", ["headed.csv", "no prompt"]),
        ("nameless.csv", b"text\na cat\n", ["nameless.csv, row 1", "prompt"]),
        ("gap.csv", b"prompt,count\na cat,1\n,2\n", ["gap.csv, row 2", "prompt"]),
        ("ragged.csv", b"prompt,count\na cat,1,2\n", ["ragged.csv", "could not be read"]),
        ("torn.parquet", b"PAR1", ["torn.parquet", "could not be read"]),
        ("broken.jsonl", b'{"prompt": "a"}\n{"prompt"\n', ["broken.jsonl:2", "JSON"]),
        ("nameless.jsonl", b'{"text": "a"}\n', ["nameless.jsonl:1", "prompt"]),
    ],
)
def test_a_bad_file_is_refused_with_its_place(
    tmp_path: Path, name: str, content: bytes | None, words: list[str]
) -> None:
    file = tmp_path / name
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(UserError) as error:
        load_prompts(str(file))
    assert all(word in str(error.value) for word in words)
