"""The hash of a run's data: it changes with everything that training sees, and with nothing else."""

from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from deltalens.train.data import data_hash, rows
from deltalens.train.tasks import Example, Sums


def test_every_part_counts(tmp_path: Path) -> None:
    red, blue = tmp_path / "red.png", tmp_path / "blue.png"
    Image.new("RGB", (4, 4), "red").save(red)
    Image.new("RGB", (4, 4), "blue").save(blue)
    example = Example(prompt="a", context="b", answer="c", images=(red,))
    variants = [
        [example],
        [example, example],
        [replace(example, prompt="ab", context="")],
        [replace(example, answer="d")],
        [replace(example, images=())],
        [replace(example, images=(blue,))],
        [replace(example, images=(red, blue))],
        [replace(example, images=(Image.open(blue),))],
    ]
    assert len({data_hash(v) for v in variants}) == len(variants)
    copy = tmp_path / "copy.png"
    copy.write_bytes(red.read_bytes())
    assert data_hash([replace(example, images=(str(copy),))]) == data_hash([example])


@pytest.mark.parametrize("completions", [False, True])
def test_rows_keep_their_order(completions: bool) -> None:
    examples = Sums().train(5)
    table = rows(examples, completions=completions)
    assert [row["prompt"][0]["content"] for row in table] == [e.prompt for e in examples]
    if completions:
        assert [row["completion"][0]["content"] for row in table] == [e.answer for e in examples]
    else:
        assert table["index"][:] == list(range(5))
