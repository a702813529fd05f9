import io

from rich.console import Console

from veneer.data.progress import showing


def shown(terminal: bool, times: list[float]) -> str:
    out = io.StringIO()
    console = Console(file=out, force_terminal=terminal, width=80)
    with showing("rendering rows", 100, console, clock=iter(times).__next__) as advance:
        for _ in times[1:]:
            advance(10)
    return out.getvalue()


def test_short_work_is_silent() -> None:
    assert shown(terminal=True, times=[0, 0.5, 1.9]) == ""
    assert shown(terminal=False, times=[0, 0.5, 59]) == ""


def test_a_bar_on_a_terminal_after_two_seconds() -> None:
    assert "rendering rows" in shown(terminal=True, times=[0, 1, 2.5, 3])


def test_a_line_a_minute_elsewhere() -> None:
    assert shown(terminal=False, times=[0, 30, 61, 90, 122]) == (
        "rendering rows: 20 of 100 after 61 s\nrendering rows: 40 of 100 after 122 s\n"
    )
