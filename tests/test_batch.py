"""The input of a step: what goes in comes out, part by part."""

import numpy as np
import pytest

from minilora.batch import Chunk, Draw, Packer, Use
from minilora.params import SamplingParams
from minilora_kernels.batch import (
    FLOATS,
    INTS,
    NO_NUMBER,
    NOT_CHOSEN,
    StepInput,
    all_ended,
    pack,
    rounds_of,
    token_at,
    unpack,
)
from minilora_kernels.jit import kernel, program

WIDTHS = (1, 1, 1, 1, 4, 4, 4, 1, 1, 1, 1, 4, 4, 4, 4, 1, 1, 1, 1, 3)


@kernel
def _copy(packed, rows, ints, floats):
    """All parts behind each other; rows of each."""
    batch, i, f = unpack(packed), 0, 0
    rows_of_all = batch.tokens, batch.positions, batch.pages_at, batch.pages
    rows_of_wanted = batch.out_rows, batch.out_tokens, batch.out_positions, batch.out_pages_at
    for part in (*rows_of_all, *rows_of_wanted, batch.ends, batch.chosen):
        for value in part:
            ints[i] = value
            i += 1
    tables = batch.tiles, batch.long, batch.segments, batch.out_tiles, batch.out_long, batch.out_segments, batch.choices
    for table in tables:
        for row in range(table.shape[0]):
            for column in range(table.shape[1]):
                ints[i] = table[row, column]
                i += 1
    for part in (batch.scales, batch.out_scales):
        for value in part:
            floats[f] = value
            f += 1
    for row in range(len(batch.cuts)):
        for column in range(3):
            floats[f] = batch.cuts[row, column]
            f += 1
    rows[0], rows[1], rows[2], rows[3] = len(batch.tiles), len(batch.long), len(batch.choices), len(batch.cuts)
    rows[4], rows[5] = i, f


COPY = program(_copy)


def parts_of(packed):
    """The parts by name, read in Python."""
    places = packed.ints.tolist()
    found = {}
    for i, (name, width) in enumerate(zip(StepInput._fields, WIDTHS, strict=True)):
        array, at = (packed.ints, i) if i < INTS else (packed.floats, i + 1)
        found[name] = array[places[at] : places[at + 1]].reshape(-1, *([width] if width > 1 else []))
    return found


@pytest.mark.parametrize("rows", [0, 1, 3])
def test_what_is_packed_comes_out(rows):
    random = np.random.default_rng(rows)
    ints = [random.integers(-(1 << 62), 1 << 62, rows * width).tolist() for width in WIDTHS[:INTS]]
    floats = [random.standard_normal(rows * width).astype(np.float32).tolist() for width in WIDTHS[INTS:]]
    packed = pack(**dict(zip(StepInput._fields, [*ints, *floats], strict=True)))
    assert [part.ravel().tolist() for part in parts_of(packed).values()] == [*ints, *floats]
    assert packed.chosen == ints[-1]
    counts, numbers, reals = np.zeros(6, np.int64), np.zeros(200, np.int64), np.zeros(50, np.float32)
    COPY(packed, counts, numbers, reals)
    order = (0, 1, 2, 3, 7, 8, 9, 10, 15, 16, 4, 5, 6, 11, 12, 13, 14)
    assert counts[:4].tolist() == [rows] * 4
    assert numbers[: counts[4]].tolist() == [value for i in order for value in ints[i]]
    assert reals[: counts[5]].tolist() == [value for part in floats for value in part]
    assert len(floats) == FLOATS


def test_unknown_parts_are_refused():
    with pytest.raises(TypeError, match="token_s"):
        pack(token_s=[1])


def test_a_step_of_a_prompt_and_two_decodes():
    packer = Packer(group=3, kv_heads=3, part=10, most_parts=0, workers=8)
    packer.ranks = 96
    uses = (Use(5, 0.5), Use(6, 2.0))
    chunks = [
        Chunk([*range(100, 120)], 2, 13, [7, 8], (), 14),
        Chunk([*range(300, 340)], 39, 1, [1, 2, 3], uses, 39),
        Chunk([*range(50, 60)], 9, 1, [4], uses, 10),
    ]
    params = SamplingParams(temperature=0.5, top_k=40, top_p=0.75, min_p=0.25)
    draws = [Draw(0, SamplingParams(temperature=0), 9, 15, [], [], ()), Draw(1, params, -3, 40, [], [], ())]
    found = parts_of(packer.pack(chunks, draws))
    assert found["tokens"].tolist() == [*range(102, 115), 339, 59]
    assert found["positions"].tolist() == [*range(2, 15), 39, 9]
    assert found["pages_at"].tolist() == [0] * 13 + [2, 5]
    assert found["pages"].tolist() == [7, 8, 1, 2, 3, 4]
    assert found["tiles"].tolist() == [[13, 1, 39, 2], [8, 5, 10, 0], [14, 1, 9, 5], [0, 8, 2, 0]], "the longest first"
    assert found["segments"].tolist() == [[13, 15, 5, 0], [13, 15, 6, 96]] and found["scales"].tolist() == [0.5, 2.0]
    assert found["out_rows"].tolist() == [12, 13]
    assert found["out_tokens"].tolist() == [114, 339] and found["out_positions"].tolist() == [14, 39]
    assert found["out_pages_at"].tolist() == [0, 2]
    assert found["out_tiles"].tolist() == [[1, 1, 39, 2], [0, 1, 14, 0]]
    assert found["out_segments"].tolist() == [[1, 2, 5, 0], [1, 2, 6, 96]]
    assert found["out_scales"].tolist() == [0.5, 2.0]
    assert (
        found["choices"].tolist() == [[0, 0, 9, 15], [1, 40, -3, 40]] and found["chosen"].tolist() == [NOT_CHOSEN] * 2
    )
    assert found["cuts"].tolist() == [[0.0, 1.0, 0.0], [0.5, 0.75, 0.25]]


def test_of_a_step_whose_logits_are_all_wanted_nothing_is_said_twice():
    packer = Packer(group=3, kv_heads=3, part=10, most_parts=0, workers=8)
    chunks = [Chunk([*range(20)], 10, 3, [7], (), 0), Chunk([*range(9)], 8, 1, [4], (Use(5, 0.5),), 8)]
    found = parts_of(packer.pack(chunks, []))
    assert found["out_rows"].tolist() == [0, 1, 2, 3] and len(found["tokens"]) == 4
    assert not any(len(part) for name, part in found.items() if name.startswith("out_") and name != "out_rows")


def test_the_last_row_of_a_long_prompt_is_shared_by_all_threads():
    """It is the only row that the last layer's attention has, though there are two chunks."""
    packer = Packer(group=3, kv_heads=1, part=10, most_parts=40, workers=2)
    chunks = [Chunk([0] * 613, 600, 13, [1], (), 612), Chunk([0] * 900, 300, 8, [2], (), 900)]
    found = parts_of(packer.pack(chunks, []))
    assert found["out_rows"].tolist() == [12] and found["out_long"].tolist() == [[0, 612, 0, 0]]
    assert len(found["tiles"]) == 3 and len(found["long"]) == len(found["out_tiles"]) == 0


@kernel
def _follow(packed, turn, tokens):
    """The tokens of a round's rows; then whether all texts end in it, and the number of rounds."""
    batch = unpack(packed)
    for row in range(len(batch.tokens)):
        tokens[row] = token_at(batch, turn, row)
    tokens[-2], tokens[-1] = all_ended(batch, turn), rounds_of(batch)


FOLLOW = program(_follow)


@pytest.mark.parametrize(
    "turn, expected", [(0, [11, 12, 13, 0, 4]), (1, [21, 22, 23, 0, 4]), (2, [31, 0, 9, 1, 4]), (3, [8, 9, 0, 0, 4])]
)
def test_each_round_goes_on_with_the_tokens_of_the_one_before(turn, expected):
    rounds = [[21, 22, 23], [31, NO_NUMBER, 9], [8, 9, NO_NUMBER], [NOT_CHOSEN] * 3]
    choices, tokens = [0] * 12, np.zeros(5, np.int64)
    packed = pack(tokens=[11, 12, 13], choices=choices, ends=[9, 8], chosen=[token for one in rounds for token in one])
    FOLLOW(packed, turn, tokens)
    assert tokens[[0, 1, 2, 4]].tolist() == [*expected[:3], 4]
    assert turn == 3 or tokens[3] == expected[3]


def test_room_for_a_long_text_in_every_round():
    """A token at position 250, with 20 to follow: its positions are shared out from the start, in up to two splits."""
    packer = Packer(group=3, kv_heads=1, part=10, most_parts=40, workers=8)
    chunk, draw = Chunk([0] * 251, 250, 1, [1], (), 250), Draw(0, SamplingParams(), 1, 250, [], [], ())
    for rounds, long in ((1, []), (20, [[0, 250, 0, 0]])):
        found = parts_of(packer.pack([chunk], [draw], rounds, {7}))
        assert found["long"].tolist() == long and len(found["tiles"]) == 1 - len(long)
        assert len(found["chosen"]) == rounds and found["ends"].tolist() == [7]
