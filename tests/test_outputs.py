"""Texts built token by token: stop strings, what may be shown already, what is new."""

import pytest

from minilora.outputs import TextBuilder, logprobs_at
from minilora.params import SamplingParams
from minilora.sequence import Sequence, TokenLogprobs
from minilora.tokenizer import Tokenizer, TokenizerFiles

from .support import make_checkpoint


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """Of bytes: each letter is a token."""
    return Tokenizer(TokenizerFiles.from_folder(make_checkpoint(tmp_path_factory.mktemp("letters"))))


def build(tokenizer, text, streamed, **params):
    """(the text that comes out, tokens it took), whole or from its deltas."""
    sequence = Sequence(1, [5], 1, SamplingParams(**params), 0)
    builder, heard = TextBuilder(sequence, 0, tokenizer), []
    for token in tokenizer.encode(text):
        if builder.add(token, None, False):
            sequence.finish_reason = "stop"
            break
        if streamed:
            heard.append(builder.delta())
    sequence.finish_reason = sequence.finish_reason or "length"
    builder.finish()
    heard.append(builder.delta())
    assert builder.delta() is None, "nothing comes after the end"
    shown = "".join(delta.text for delta in heard if delta)
    assert not streamed or shown == builder.output.text
    return builder.output.text, len(builder.output.token_ids)


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize(
    ("least", "expected"),
    [
        (0, ("ab", 6)),
        (6, ("ab", 6)),
        # Whole before the minimum: it ends nothing, the next one does.
        (7, ("abSTOPcd", 12)),
        # Begins before it and is whole after it.
        (11, ("abSTOPcd", 12)),
        (13, ("abSTOPcdSTOPef", 14)),
    ],
)
def test_a_stop_string_counts_from_the_minimum_on(tokenizer, least, expected, streamed):
    assert build(tokenizer, "abSTOPcdSTOPef", streamed, stop=["STOP"], min_tokens=least) == expected


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize(
    ("text", "stop", "expected"),
    [
        # Of those that are whole at once the one that begins first.
        ("abcdef", ["d", "bcd"], "a"),
        ("abSTOPcd", ["xyz", "STOP"], "ab"),
        ("xaabc", ["aab"], "x"),
        # Only begun when the text ends.
        ("abST", ["STOP"], "abST"),
    ],
)
def test_stop_strings(tokenizer, text, stop, expected, streamed):
    assert build(tokenizer, text, streamed, stop=stop)[0] == expected


@pytest.mark.parametrize("streamed", [False, True])
def test_a_stop_string_is_kept_where_it_is_wanted(tokenizer, streamed):
    assert build(tokenizer, "abSTOPcd", streamed, stop=["STOP"], include_stop_str_in_output=True) == ("abSTOP", 6)


@pytest.mark.parametrize(
    ("keep", "own", "expected"), [(False, True, "ab"), (True, True, "abX"), (False, False, "ab"), (True, False, "ab")]
)
def test_a_stop_token_is_kept_where_it_is_wanted(tokenizer, keep, own, expected):
    """The request's own, that is: the model's end of text never is."""
    sequence = Sequence(1, [5], 1, SamplingParams(include_stop_str_in_output=keep), 0)
    builder = TextBuilder(sequence, 0, tokenizer)
    *tokens, end = tokenizer.encode("abX")
    for token in tokens:
        builder.add(token, None, False)
    sequence.finish_reason, sequence.stop_token = "stop", end if own else None
    builder.add(end, None, True)
    assert builder.output.text == expected


def test_a_letter_of_which_the_end_is_missing_is_shown(tokenizer):
    sequence = Sequence(1, [5], 1, SamplingParams(), 0)
    builder = TextBuilder(sequence, 0, tokenizer)
    sequence.finish_reason = "length"
    builder.add(tokenizer.encode("é")[0], None, True)
    assert builder.output.text == "\N{REPLACEMENT CHARACTER}"


def test_logprobs_have_ranks(tokenizer):
    found = logprobs_at(TokenLogprobs(9, -3.0, 7, [(5, -0.5), (6, -1.0)]), tokenizer)
    assert [(id_, one.logprob, one.rank) for id_, one in found.items()] == [(5, -0.5, 1), (6, -1.0, 2), (9, -3.0, 7)]
