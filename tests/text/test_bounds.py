"""What a parser holds is bounded, whatever a model writes: a server must not be stalled by one answer."""

import pytest

from rorqual.text import CallEnd, ContentDelta, Parsed, StreamParser, get_encoding
from rorqual.text.parser import LIMIT

EOS = "<｜end▁of▁sentence｜>"
D = "｜DSML｜"
BLOCK = f"<{D}tool_calls>\n"
INVOKE = f'<{D}invoke name="f">\n'
ENDLESS = [  # encoding, how the text begins, what follows over and over
    ("v4", f'\n\n{BLOCK}<{D}invoke name="', "x"),
    ("v4", f'\n\n{BLOCK}<{D}invoke name="', ">"),
    ("v4", f"\n\n{BLOCK}<{D}invoke name=", " "),
    ("v4", f'\n\n{BLOCK}{INVOKE}<{D}parameter name="', "x\n"),
    ("v4", f'\n\n{BLOCK}{INVOKE}<{D}parameter name="k" string="false">', "1"),
    ("v4", f'\n\n{BLOCK}{INVOKE}<{D}parameter name="k" string="true">', "<"),
    ("v4", f"\n\n{BLOCK}", "x "),
    ("v4", f"<{D}zz", "z"),
    ("v4", f"\n\n{BLOCK}<{D}zz", "z"),
    ("v4", "", "\n"),
    ("v4", EOS, " "),
    ("v4", EOS, " x"),
    ("v31", "<｜tool▁", "x"),
    ("v31", "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>", "n"),
    ("v31", "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>f<｜tool▁sep｜>{}<｜tool▁", "x"),
    ("roles", "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>", "n"),
    ("r1", "", "\n"),
    ("r1-0528", "", " "),
    ("r1-zero", " <think>x</think>", "\n"),
]


def by_letters(parser: StreamParser, text: str) -> Parsed:
    """Feed letter by letter; the buffer must never hold more than a header and a tag."""
    held = 0
    for letter in text:
        parser.feed(letter)
        held = max(held, len(parser.buffer))
    assert held <= LIMIT + 64
    return parser.finish()


@pytest.mark.parametrize(("name", "begin", "more"), ENDLESS)
def test_the_buffer_stays_small_and_nothing_is_lost(name: str, begin: str, more: str) -> None:
    text = begin + more * (20_000 // len(more))
    parsed = by_letters(get_encoding(name).parser(), text)
    at_once = get_encoding(name).parser()
    at_once.feed(text)
    assert at_once.finish() == parsed
    if not more.isspace():
        kept = parsed.reasoning + parsed.content + parsed.unparsed
        kept += "".join(call.name + call.arguments for call in parsed.tool_calls)
        assert kept.count(more) >= 20_000 // len(more) - len(begin)


def test_200_000_letters_are_fed_one_by_one() -> None:
    by_letters(get_encoding("v4").parser(thinking=False), f'{BLOCK}<{D}invoke name="' + "x" * 200_000)


@pytest.mark.parametrize("length", range(LIMIT - 40, LIMIT + 40))
def test_a_border_near_the_limit_is_seen_in_every_split(length: int) -> None:
    for begin, then in [
        (f'\n\n{BLOCK}<{D}invoke name="', f'">\n</{D}invoke>'),
        (f'\n\n{BLOCK}<{D}invoke name="', f"</{D}tool_calls>"),
        (f'\n\n{BLOCK}<{D}invoke name="', EOS),
        (f"\n\n{BLOCK}<{D}zz", ">after"),
        (f"\n\n{BLOCK}<{D}zz", f"<{D}zz" + EOS),
    ]:
        text = begin + "x" * (length - (len(begin) - begin.rindex("<"))) + then
        at_once = get_encoding("v4").parser(thinking=False)
        at_once.feed(text)
        assert by_letters(get_encoding("v4").parser(thinking=False), text) == at_once.finish()


def test_many_calls_in_one_feed_are_not_copied_for_each() -> None:
    """Reading moves an offset; only the end of a feed forgets, once."""
    calls = 8_000
    text = (
        f"\n\n{BLOCK}"
        + f'{INVOKE}<{D}parameter name="k" string="true">v</{D}parameter>\n</{D}invoke>\n' * calls
    )
    parser = get_encoding("v4").parser(thinking=False)
    dropped = []
    drop = parser.buffer.drop
    parser.buffer.drop = lambda: (dropped.append(len(parser.buffer)), drop())[1]  # type: ignore[method-assign]
    events = parser.feed(text + f"</{D}tool_calls>" + EOS)
    assert sum(isinstance(event, CallEnd) for event in events) == calls
    assert dropped == [0]
    assert parser.finish().problem is None


def test_a_tool_token_without_end_does_not_swallow_the_stop() -> None:
    text = "hi<｜tool▁garbage " + EOS
    for pieces in ([text], list(text)):
        parser = get_encoding("v31").parser()
        for piece in pieces:
            parser.feed(piece)
        parsed = parser.finish()
        assert (parsed.content, parsed.unparsed, parsed.truncated) == ("hi", "<｜tool▁garbage ", False)
        assert parsed.problem == "a tool token stands where none belongs"


def test_blank_lines_before_an_answer_are_kept_unless_think_follows() -> None:
    parser = get_encoding("r1-0528").parser()
    assert next(event for letter in "\n \nyes" for event in parser.feed(letter)) == ContentDelta("\n \ny")
    parser = get_encoding("r1-0528").parser()
    assert by_letters(parser, "\n \n<think>\nhm\n</think>\n\nyes" + EOS) == Parsed("hm", "yes")


def test_what_is_not_text_is_refused() -> None:
    with pytest.raises(ValueError, match="found a NoneType"):
        get_encoding("v4").parser().feed(None)  # type: ignore[arg-type]
