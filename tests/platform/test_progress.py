"""Bars show what was finished."""

import io

from rich.console import Console

from megapoly.platform.progress import bytes_bar, counting_bar


def shown(console):
    return " ".join(console.file.getvalue().split())


def test_a_counting_bar_changes_its_text_at_the_first_count():
    texts = []
    for counts in ((), (1, 4)):
        console = Console(file=io.StringIO(), width=100)
        with counting_bar("scored", console, until_first="reading") as on_progress:
            if counts:
                on_progress(*counts)
        texts.append(shown(console))
    assert "reading" in texts[0] and "scored" not in texts[0]
    assert "scored" in texts[1] and "1/4" in texts[1] and "reading" not in texts[1]


def test_a_bytes_bar_adds_up_parts():
    console = Console(file=io.StringIO(), width=100)
    with bytes_bar("writing", 3_000_000, console) as advance:
        advance(1_000_000)
        advance(500_000)
    assert "writing" in shown(console) and "1.5/3.0 MB" in shown(console)
