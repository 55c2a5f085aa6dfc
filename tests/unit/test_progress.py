"""Progress: silent without a reporter, exact counts with one, bars on a terminal."""

import io
import threading
from collections.abc import Iterator

import pytest
from rich.console import Console

from laconic.bars import Bars
from laconic.progress import progress, reporting


class Notes:
    """A reporter that notes what it is told."""

    def __init__(self) -> None:
        self.told: list[tuple[object, ...]] = []

    def start(self, label: str, total: int | None) -> int:
        self.told.append(("start", label, total))
        return len(self.told)

    def advance(self, handle: int) -> None:
        self.told.append(("advance", handle))

    def stop(self, handle: int) -> None:
        self.told.append(("stop", handle))


def test_without_a_reporter_the_items_pass_and_nothing_is_printed(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert list(progress(iter("abc"), "letters")) == ["a", "b", "c"]
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("items", "given", "total"),
    [([1, 2], None, 2), (range(3), None, 3), ((), None, 0), (iter([1]), None, None)],
)
def test_the_total_is_the_length_where_there_is_one(
    items: Iterator[int], given: int | None, total: int | None
) -> None:
    notes = Notes()
    with reporting(notes):
        list(progress(items, "counting", given))
    assert notes.told[0] == ("start", "counting", total)


def test_every_item_is_counted_after_it_was_used() -> None:
    notes = Notes()
    with reporting(notes):
        loop = progress("ab", "letters", 2)
        seen = [(item, notes.told.count(("advance", 1))) for item in loop]
    assert seen == [("a", 0), ("b", 1)]
    assert notes.told == [("start", "letters", 2), ("advance", 1), ("advance", 1), ("stop", 1)]


def test_a_loop_that_fails_closes_its_bar() -> None:
    notes = Notes()

    def failing() -> Iterator[int]:
        yield 1
        raise ValueError("broken")

    with reporting(notes), pytest.raises(ValueError, match="broken"):
        list(progress(failing(), "failing"))
    assert notes.told[-1] == ("stop", 1)


def test_a_loop_that_is_left_early_closes_its_bar() -> None:
    notes = Notes()
    with reporting(notes):
        loop = progress([1, 2, 3], "left")
        assert next(loop) == 1
        loop.close()
    assert notes.told == [("start", "left", 3), ("stop", 1)]


def test_loops_may_be_nested() -> None:
    notes = Notes()
    with reporting(notes):
        for _ in progress([1], "outer"):
            list(progress([2], "inner"))
    kinds = [entry[:2] for entry in notes.told]
    assert [kind for kind, _ in kinds] == ["start", "start", "advance", "stop", "advance", "stop"]


def test_a_reporter_lasts_as_long_as_its_block_even_if_that_fails() -> None:
    outer, inner = Notes(), Notes()
    with reporting(outer):
        with pytest.raises(ValueError, match="out"), reporting(inner):
            raise ValueError("out")
        list(progress([1], "after"))
        with reporting(None):
            list(progress([1], "silent"))
    list(progress([1], "outside"))
    assert inner.told == []
    assert outer.told == [("start", "after", 1), ("advance", 1), ("stop", 1)]


def test_a_reporter_is_of_its_thread() -> None:
    notes = Notes()
    with reporting(notes):
        other = threading.Thread(target=lambda: list(progress([1], "elsewhere")))
        other.start()
        other.join()
    assert notes.told == []


def terminal() -> tuple[Console, io.StringIO]:
    written = io.StringIO()
    console = Console(
        file=written, force_terminal=True, width=100, color_system=None, legacy_windows=False
    )
    return console, written


def test_bars_show_label_count_and_time_and_clean_up() -> None:
    console, written = terminal()
    bars = Bars(console)
    with reporting(bars):
        list(progress(range(3), "train 1 epochs"))
        list(progress(range(2), "recalibrate"))
    bars.close()
    text = written.getvalue()
    assert "train 1 epochs" in text
    assert "/3" in text
    assert "left" in text
    assert "recalibrate" in text
    assert not console._live_stack


def test_the_rate_is_items_per_second_or_seconds_per_item() -> None:
    console, written = terminal()
    bars = Bars(console)
    progressing = bars._progress
    progressing.get_time = iter(range(0, 1000, 4)).__next__  # type: ignore[method-assign]
    handle = bars.start("slow", 100)
    for _ in range(4):
        bars.advance(handle)
    progressing.refresh()
    bars.stop(handle)
    bars.close()
    assert "s each" in written.getvalue()
