from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from rlr_ray.core.seeds import permutation
from rlr_ray.errors import UserError
from rlr_ray.prompts.load import describe_prompts, load_prompts, prompt_sets, shipped_lists
from rlr_ray.prompts.order import PromptOrder, prompt_order
from rlr_ray.prompts.prompt import Prompt
from tests.runs import short_run


def test_text_file_has_one_prompt_a_line(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("a cat\n\n  a dög \r\na cow\u2028asleep", "utf-8")
    assert load_prompts(str(file)) == [Prompt("a cat"), Prompt("a dög"), Prompt("a cow\u2028asleep")]


def test_json_lines_hand_every_other_key_to_the_reward(tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "a cat", "count": 2}\n{"prompt": "a dog"}\n', "utf-8")
    assert load_prompts(str(file)) == [Prompt("a cat", metadata={"count": 2}), Prompt("a dog")]


def test_tables_hand_their_other_columns_to_the_reward(tmp_path: Path) -> None:
    (tmp_path / "prompts.csv").write_text('prompt,count\n"a cat, asleep",2\n a dog ,\n', "utf-8")
    expected = [Prompt("a cat, asleep", metadata={"count": 2}), Prompt("a dog", metadata={"count": None})]
    assert load_prompts(str(tmp_path / "prompts.csv")) == expected
    table = pyarrow.Table.from_pylist([{"prompt": "a cat", "box": [1, 2]}, {"prompt": "a dog", "box": [3]}])
    pyarrow.parquet.write_table(table, tmp_path / "prompts.parquet")
    expected = [Prompt("a cat", metadata={"box": [1, 2]}), Prompt("a dog", metadata={"box": [3]})]
    assert load_prompts(str(tmp_path / "prompts.parquet")) == expected


def test_every_column_has_its_field_in_every_format(tmp_path: Path) -> None:
    stages = {"coarse": "a cat", "mid": "a tabby cat", "fine": "its whiskers"}
    rows = [
        {"prompt": "007", "negative_prompt": "1", "weight": 2.5, **stages, "count": 3},
        {"prompt": "a dog", "negative_prompt": None, "weight": None, **dict.fromkeys(stages), "count": 4},
    ]
    for ending, separator in (("csv", ","), ("tsv", "\t")):
        lines = [separator.join("" if cell is None else str(cell) for cell in row.values()) for row in rows]
        (tmp_path / f"p.{ending}").write_text("\n".join([separator.join(rows[0]), *lines]), "utf-8-sig")
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, rows)), "utf-8-sig")
    (tmp_path / "p.json").write_text(json.dumps(rows))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "p.parquet")
    expected = [
        Prompt("007", "1", ("a cat", "a tabby cat", "its whiskers"), 2.5, {"count": 3}),
        Prompt("a dog", metadata={"count": 4}),
    ]
    for ending in ("csv", "tsv", "jsonl", "json", "parquet"):
        assert load_prompts(str(tmp_path / f"p.{ending}")) == expected, ending


PUBLIC = {  # the first lines of each, or lines of its form
    "PartiPrompts.tsv": (
        "Prompt\tCategory\tChallenge\tNote\n42\tAbstract\tBasic\tSimple numbers but challenging\n"
        'a wall with the words "Fly an airplane" on it\tOutdoor Scenes\tComplex\t\n',
        ["42", 'a wall with the words "Fly an airplane" on it'],
        {"Category": "Abstract", "Challenge": "Basic", "Note": "Simple numbers but challenging"},
    ),
    "drawbench.csv": (
        "Prompts,Category\nA red colored car.,Colors\nA blue colored dog.,Colors\n",
        ["A red colored car.", "A blue colored dog."],
        {"Category": "Colors"},
    ),
    "anime.json": ('["a king", "a queen"]', ["a king", "a queen"], {}),  # HPDv2's benchmark
    "evaluation_metadata.jsonl": (  # GenEval
        '{"tag": "single_object", "include": [{"class": "bench", "count": 1}], "prompt": "a photo of a bench"}\n',
        ["a photo of a bench"],
        {"tag": "single_object", "include": [{"class": "bench", "count": 1}]},
    ),
}


@pytest.mark.parametrize("name", PUBLIC)
def test_public_lists_load_as_they_are(tmp_path: Path, name: str) -> None:
    content, texts, metadata = PUBLIC[name]
    (tmp_path / name).write_text(content, "utf-8")
    prompts = load_prompts(str(tmp_path / name))
    assert [prompt.text for prompt in prompts] == texts
    assert prompts[0].metadata == metadata


def test_captions_of_pick_a_pic_load(tmp_path: Path) -> None:
    rows = [{"are_different": True, "caption": "a cat", "label_0": 0.5}, {"caption": "a dog", "text": "not this"}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "p.parquet")
    assert load_prompts(str(tmp_path / "p.parquet"))[0] == Prompt(
        "a cat", metadata={"are_different": True, "label_0": 0.5}
    )


def test_shipped_lists_load_whole_by_their_name() -> None:
    assert shipped_lists() == ["animals", "hands", "objects", "product_photography"]
    notes: list[str] = []
    texts = [prompt.text for name in shipped_lists() for prompt in load_prompts(name, notes.append)]
    assert len(set(texts)) == len(texts) == 4 * 42 and notes == []
    hands = load_prompts("hands")
    words = ("hand", "finger", "fist")
    assert all(any(word in prompt.text for word in words) for prompt in hands)


def test_empty_and_repeated_prompts_are_left_out_and_counted(tmp_path: Path) -> None:
    file = tmp_path / "prompts.csv"
    file.write_text("prompt,count,weight\na cat,1,\n,2,\na cat,1,3\na cat,2,\na cat,1,\n", "utf-8")
    notes: list[str] = []
    expected = [Prompt("a cat", metadata={"count": 1}), Prompt("a cat", metadata={"count": 2})]
    assert load_prompts(str(file), notes.append) == expected
    name = f"prompts file {str(file)!r}"
    assert notes == [f"{name}: 1 empty line left out", f"{name}: 2 duplicates left out"]
    assert load_prompts(["a cat", " ", "a cat", "a dog"]) == [Prompt("a cat"), Prompt("a dog")]


def test_every_prompt_is_used_once_before_any_is_used_again() -> None:
    orders = [[prompt_order(5, slot, 0, "train") for slot in range(first, first + 5)] for first in (0, 5, 10)]
    assert all(sorted(order) == list(range(5)) for order in orders)
    assert orders[0] != orders[1] or orders[1] != orders[2]


@pytest.mark.parametrize("weight", [1.0, 0.1, 1 / 3, 1e300, 5e-324])
def test_equal_weights_keep_the_order_of_no_weights(weight: float) -> None:
    order = PromptOrder([weight] * 7, 3, "train")
    expected = [index for number in range(200) for index in permutation(7, 3, "train", "prompts", number)]
    assert [order(slot) for slot in range(1400)] == expected


def test_weighted_prompts_get_their_shares_round_by_round_and_in_the_long_run() -> None:
    weights, rounds = [1.0, 2.0, 0.25, math.pi, 5.0, 0.01], 1000
    order = PromptOrder(weights, 3, "train")
    shares = [len(weights) * weight / sum(weights) for weight in weights]
    total: Counter[int] = Counter()
    for number in range(rounds):
        found = Counter(order(slot) for slot in range(6 * number, 6 * number + 6))
        assert all(math.floor(share) <= found[i] <= math.ceil(share) for i, share in enumerate(shares))
        total += found
        # independent rounds would stray by sqrt(1000) / 2 = 16
        assert all(abs(total[i] - (number + 1) * share) < 4 for i, share in enumerate(shares))
    again = PromptOrder(weights, 3, "train")
    assert [again(slot) for slot in (5999, 17, 0)] == [order(slot) for slot in (5999, 17, 0)]
    assert [PromptOrder(weights, 4, "train")(slot) for slot in range(60)] != [order(slot) for slot in range(60)]


def test_what_a_weighted_prompt_gets_of_a_round_is_spread_over_it() -> None:
    order = PromptOrder([50.0] + [1.0] * 50, 0)
    gaps = [slot for slot in range(51 * 20) if order(slot) == 0]
    halves = [slot % 51 < 25 for slot in gaps]
    assert 0.4 < sum(halves) / len(halves) < 0.58  # 25 / 51, standard error at most .023


def test_held_out_prompts_are_those_of_training_unless_said(tmp_path: Path) -> None:
    config = short_run(tmp_path)
    sets = prompt_sets(config)
    assert sets.train == sets.held_out == [Prompt("a handwritten three"), Prompt("a handwritten eight")]
    assert describe_prompts(config) == "prompts: 2 to train on; held-out chains have the same"
    assert prompt_sets(short_run(tmp_path, prompts={"source": config.prompts})) == sets


def test_a_split_holds_out_a_seeded_share(tmp_path: Path) -> None:
    config = short_run(tmp_path, prompts={"source": "animals", "held_out": 0.25})
    sets, whole = prompt_sets(config), load_prompts("animals")
    assert len(sets.held_out) == 10 and len(sets.train) == 32  # round(42 / 4)
    assert sorted(map(whole.index, sets.train + sets.held_out)) == list(range(42))
    assert prompt_sets(config) == sets != prompt_sets(config.model_copy(update={"seed": 1}))
    assert describe_prompts(config) == "prompts: 32 to train on; 10 held out"


def test_a_split_parts_no_rows_of_one_prompt(tmp_path: Path) -> None:
    file = tmp_path / "p.csv"
    file.write_text("prompt,id\n" + "".join(f"{'cat' if i % 2 else 'dog'},{i}\n" for i in range(10)))
    sets = prompt_sets(short_run(tmp_path, prompts={"source": str(file), "held_out": 0.3}))
    assert {len({prompt.text for prompt in side}) for side in (sets.train, sets.held_out)} == {1}
    assert sets.train[0].text != sets.held_out[0].text
    ids = [prompt.metadata["id"] for prompt in (*sets.train, *sets.held_out)]
    assert sorted(ids) == list(range(10)) and len(sets.train) == 5


@pytest.mark.parametrize("share", [1e-9, 0.999])
def test_a_split_leaves_a_prompt_on_each_side(tmp_path: Path, share: float) -> None:
    sets = prompt_sets(short_run(tmp_path, prompts={"source": ["a", "b", "c"], "held_out": share}))
    assert sorted(map(len, (sets.train, sets.held_out))) == [1, 2]


def test_held_out_prompts_of_their_own(tmp_path: Path) -> None:
    sets = prompt_sets(short_run(tmp_path, prompts={"source": "hands", "held_out": ["a hand", "a foot"]}))
    assert len(sets.train) == 42 and [prompt.text for prompt in sets.held_out] == ["a hand", "a foot"]


def test_held_out_prompts_that_are_trained_on_are_counted(tmp_path: Path) -> None:
    config = short_run(tmp_path, prompts={"source": ["a", "b", "c"], "held_out": ["d", "a", "c"]})
    assert describe_prompts(config).splitlines() == [
        "prompts: 3 to train on; 3 held out",
        "note: 2 of 3 held-out prompts are in prompts.source too",
    ]
    assert "note" not in describe_prompts(short_run(tmp_path, prompts={"source": ["a"], "held_out": ["b"]}))


def test_one_prompt_cannot_be_split(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"held_out is 0\.5, but .* holds 1 prompt; allowed: 2 or more"):
        prompt_sets(short_run(tmp_path, prompts={"source": ["a", "a"], "held_out": 0.5}))
    (tmp_path / "p.csv").write_text("prompt,id\na,1\na,2\n")
    with pytest.raises(UserError, match=r"held_out is 0\.5, but .* holds 1 prompt; allowed: 2 or more"):
        prompt_sets(short_run(tmp_path, prompts={"source": str(tmp_path / "p.csv"), "held_out": 0.5}))


def test_half_an_emoji_is_refused_wherever_it_stands(tmp_path: Path) -> None:
    file = tmp_path / "p.jsonl"
    for row in (
        '{"prompt": "a \\ud83d cat"}',
        '{"prompt": "a", "tags": [{"\\ud83d": 1}]}',
        '{"prompt": "a", "t": "\\ude00"}',
    ):
        file.write_text('{"prompt": "whole \\ud83d\\ude00"}\n' + row)
        with pytest.raises(UserError, match=r"p\.jsonl:2: '.*has half a character, \\ud[8e][03][d0] .*write the whole"):
            load_prompts(str(file))
    with pytest.raises(UserError, match="prompts, entry 2"):
        load_prompts(["whole \U0001f600", "half \ud83d"])


def test_a_negative_prompt_without_guidance_is_refused(tmp_path: Path) -> None:
    (tmp_path / "p.csv").write_text("prompt,negative_prompt\na three,\nan eight,blurred\n")
    source = str(tmp_path / "p.csv")
    with pytest.raises(UserError, match=r"'an eight' has the negative prompt 'blurred'.*guidance_scale 1; raise"):
        prompt_sets(short_run(tmp_path, prompts=source))
    guided = short_run(tmp_path, prompts=source, sampler={"guidance_scale": 2.0})
    assert [prompt.negative for prompt in prompt_sets(guided).train] == ["", "blurred"]


ALLOWED = ".txt, .jsonl, .csv, .tsv, .json, .parquet"


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("missing.txt", None, ["missing.txt", "not found"]),
        ("empty.txt", b"\n \n", ["empty.txt", "no prompt"]),
        ("latin.txt", b"a\ncaf\xe9\n", ["latin.txt", "line 2", "byte 5 (0xe9)", "UTF-8"]),
        ("latin.csv", b"prompt\n1\n2\ncaf\xe9\n", ["latin.csv", "line 4", "UTF-8"]),
        ("utf16.txt", "a cat".encode("utf-16"), ["utf16.txt", "is UTF-16", "iconv -f UTF-16 -t UTF-8"]),
        ("table.xlsx", b"prompt", ["table.xlsx", ".xlsx", ALLOWED, "animals, hands"]),
        ("headed.csv", b"prompt,count\n", ["headed.csv", "no prompt"]),
        ("nothing.csv", b"", ["nothing.csv", "could not be read"]),
        ("nameless.csv", b"title\na cat\n", ["nameless.csv, row 1", "prompt", "title"]),
        ("ragged.csv", b"prompt,count\na cat,1,2\n", ["ragged.csv", "could not be read"]),
        ("torn.parquet", b"PAR1", ["torn.parquet", "could not be read"]),
        ("broken.jsonl", b'{"prompt": "a"}\n{"prompt"\n', ["broken.jsonl:2", "JSON"]),
        ("nameless.jsonl", b'{"title": "a"}\n', ["nameless.jsonl:1", "prompt"]),
        ("number.jsonl", b'{"prompt": "a"}\n{"prompt": 3}\n', ["number.jsonl:2", "prompt is 3", "a text"]),
        ("array.jsonl", b"[1]\n", ["array.jsonl:1", "found [1]"]),
        ("broken.json", b'["a"', ["broken.json", "not JSON"]),
        ("object.json", b'{"prompt": "a"}', ["object.json", "dict", "a list"]),
        ("number.json", b'["a", 3]', ["number.json, entry 2", "found 3"]),
        ("light.csv", b"prompt,weight\na,1\nb,0\n", ["light.csv, row 2", "weight is '0'", "above 0"]),
        ("heavy.json", b'[{"prompt": "a", "weight": Infinity}]', ["heavy.json, entry 1", "weight is inf", "finite"]),
        ("word.csv", b"prompt,weight\na,1\nb,much\n", ["word.csv, row 2", "weight is 'much'"]),
        ("true.json", b'[{"prompt": "a", "weight": true}]', ["weight is True"]),
        (
            "staged.csv",
            b"prompt,coarse,mid,fine\na,b,c,d\na,b,,d\n",
            ["staged.csv, row 2", "mid is empty", "all three"],
        ),
        ("staged.jsonl", b'{"prompt": "a", "fine": "b"}', ["staged.jsonl:1", "coarse, mid is empty"]),
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
    assert [word for word in words if word not in str(error.value)] == [], str(error.value)
