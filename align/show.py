"""What a user sees: bars while a run works, one table when it is done."""

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, TextIO, cast

from rich.console import Console, Group, RenderableType
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.table import Table
from rich.text import Text

from align.status import RunState, Status

_PLAIN_EVERY_SECONDS = 15.0
_SILENT_FOR_SECONDS = 2.0
Section = Mapping[str, object]


class Display(Protocol):
    """Where a command says what happens."""

    def note(self, text: str) -> None:
        """A line of its own; one that begins with "warning" or "error" is shown in any case."""
        ...

    def step(self, name: str, text: str) -> None:
        """What is done about a step: run, skip, resume, and why."""
        ...

    def progress(self, status: Status) -> None: ...

    def close(self) -> None: ...


class QuietDisplay:
    """Says nothing but warnings, on stderr."""

    def note(self, text: str) -> None:
        if text.startswith(("warning", "error")):
            print(printable(text), file=sys.stderr, flush=True)

    def step(self, name: str, text: str) -> None: ...

    def progress(self, status: Status) -> None: ...

    def close(self) -> None: ...


class PlainDisplay:
    """For logs and pipes: a line for each step, and one for the progress now and then."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._last_line = 0.0

    def note(self, text: str) -> None:
        print(printable(text), file=self._stream, flush=True)

    def step(self, name: str, text: str) -> None:
        self.note(f"{name}: {text}")
        self._last_line = 0.0

    def progress(self, status: Status) -> None:
        now = time.monotonic()
        if now - self._last_line >= _PLAIN_EVERY_SECONDS:
            self._last_line = now
            self.note(f"{status.stage}: {status.doing}, {status.done}/{status.total} {pace(status)}".rstrip())

    def close(self) -> None: ...


class BarDisplay:
    """For terminals: a bar that is redrawn in place, with what was said above it."""

    def __init__(self, console: Console) -> None:
        columns = ("{task.fields[stage]}", "{task.fields[doing]}", BarColumn(), "{task.completed}/{task.total}")
        last = TextColumn("{task.fields[pace]}")
        self._bars = Progress(*(TextColumn(c) if isinstance(c, str) else c for c in columns), last, console=console)
        self._bar: TaskID | None = None
        self._bars.start()

    def note(self, text: str) -> None:
        self._bars.console.print(printable(text))

    def step(self, name: str, text: str) -> None:
        if self._bar is not None:
            self._bars.remove_task(self._bar)
            self._bar = None
        self._bars.console.print(Text.assemble((name, "bold"), ": ", printable(text)))

    def progress(self, status: Status) -> None:
        doing = escape(status.doing)
        if self._bar is None:
            self._bar = self._bars.add_task("", total=None, stage=status.stage, doing=doing, pace="")
        self._bars.update(self._bar, total=status.total, completed=status.done, doing=doing, pace=pace(status))

    def close(self) -> None:
        self._bars.stop()


class WhileSeen:
    """What is shown as long as anybody sees it: where it cannot be written, as behind `head` or on a full disk, it
    falls silent, and the work goes on."""

    def __init__(self, shown: Display) -> None:
        self._shown = shown
        self._is_seen = True

    def note(self, text: str) -> None:
        self._show(lambda: self._shown.note(text))

    def step(self, name: str, text: str) -> None:
        self._show(lambda: self._shown.step(name, text))

    def progress(self, status: Status) -> None:
        self._show(lambda: self._shown.progress(status))

    def close(self) -> None:
        self._show(self._shown.close)

    def _show(self, what: Callable[[], None]) -> None:
        try:
            if self._is_seen:
                what()
        except OSError:
            self._is_seen = False


def make_display(*, is_quiet: bool) -> Display:
    if is_quiet:
        return WhileSeen(QuietDisplay())
    return WhileSeen(BarDisplay(Console(file=sys.stdout)) if sys.stdout.isatty() else PlainDisplay(sys.stdout))


def late_progress(display: Display, *, stage: str, doing: str) -> Callable[[int, int], None]:
    """(done, total) for the display, from the third second on: what is over before needs no bar."""
    started = time.time()

    def report(done: int, total: int) -> None:
        now = time.time()
        if now - started > _SILENT_FOR_SECONDS:
            display.progress(Status(stage, doing, done, total, started, now, {}))

    return report


def pace(status: Status) -> str:
    """For example "2.1/s, 0:40 left"; empty before the first unit is done."""
    left = status.seconds_left(time.time())
    if status.rate is None or left is None:
        return ""
    rate = f"{status.rate:.1f}/s" if status.rate >= 1 else f"{1 / status.rate:.1f} s each"
    return f"{rate}, {clock(left)} left"


def clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def summary_view(summary: Section, *, command_seconds: float) -> RenderableType:
    """The final table; what has not run yet, or has no gold, is left out.

    Args:
        command_seconds: how long this command took; the summary has the time of all that stands, whoever made it.
    """
    parts: list[RenderableType] = []
    sft, reward, evaluation = (_section(summary, name) for name in ("sft", "reward", "eval"))
    if sft or reward:
        parts.append(_stages_table(sft, reward))
    if evaluation:
        before = "SFT" if sft else "the reference"
        parts.append(_comparison_table(evaluation, before))
        parts.extend(_samples(cast(Sequence[Section], evaluation.get("samples") or ()), before))
    seconds = _section(summary, "seconds")
    spent = ", ".join(f"{name} {clock(_number(seconds, name))}" for name in seconds if name != "install_excluded_total")
    total = _number(seconds, "install_excluded_total")
    own = f", {clock(command_seconds)} of it in this command" if total > command_seconds + 1 else ""
    memory = _number(summary, "peak_rss_bytes") / 2**30
    parts.append(
        Text(f"time {clock(total)} ({spent or 'no stage'}){own}, peak memory of the worker {memory:.2f} GiB", "dim")
    )
    forecasts = [f"{name} {_forecast(stage)}" for name, stage in _section(summary, "memory").items()]
    if forecasts:
        what = "memory" if "peak_device_memory_bytes" in summary else "memory above the imports"
        parts.append(Text(f"{what}, GiB, forecast at full length / measured peak: {', '.join(forecasts)}", "dim"))
    return Group(*parts)


def _forecast(stage: object) -> str:
    forecast, peak = (_number(cast(Section, stage), f"{name}_bytes") / 2**30 for name in ("forecast", "peak"))
    return f"{forecast:.2f} / {peak:.2f}"


def make_table(title: str, *columns: str, texts: int = 1) -> Table:
    """All columns but the first `texts` hold numbers."""
    table = Table(title=title, title_justify="left")
    for index, column in enumerate(columns):
        if index < texts:
            table.add_column(column, overflow="fold")
        else:
            table.add_column(column, justify="right", no_wrap=True)
    return table


def _stages_table(sft: Section, reward: Section) -> Table:
    table = make_table("held-out data", "", "before", "after")
    if sft:
        table.add_row("SFT: NLL per token", _cell(sft, "nll_before"), _cell(sft, "nll_after"))
    if reward:
        what = "accuracy of verdicts" if "auc" in reward else "pair accuracy"
        table.add_row(
            f"reward: {what} (before: by length alone)",
            _cell(reward, "length_baseline_accuracy", interval="length_baseline_ci95"),
            _cell(reward, "accuracy", interval="accuracy_ci95"),
        )
        table.add_row("reward: margin", "", _cell(reward, "margin"))
    return table


def _comparison_table(evaluation: Section, before: str) -> Table:
    table = make_table("held-out prompts (95 % intervals)", "", before, "PPO")
    rows = (
        ("score", "score_sft", "score_ppo"),
        ("gold score", "gold_sft", "gold_ppo"),
        ("gold gain", "", "gold_gain"),
        ("KL to the reference, nats a response", "", "kl"),
        ("response length, tokens", "length_sft", "length_ppo"),
        ("EOS rate", "eos_rate_sft", "eos_rate"),
        (f"win rate against {before}", "", "win_rate"),
        (f"base NLL per token, over {before}'s", "", "nll_ratio"),
        (f"distinct bigrams, over {before}'s", "", "distinct2_ratio"),
    )
    for label, first, second in rows:
        if second in evaluation:
            table.add_row(label, _cell(evaluation, first), _cell(evaluation, second))
    return table


def _samples(samples: Sequence[Section], before: str) -> list[RenderableType]:
    views: list[RenderableType] = []
    for sample in samples[:3]:
        grid = Table.grid(padding=(0, 1))
        grid.add_column(style="bold", no_wrap=True)
        grid.add_column(overflow="fold")
        for label, key in (("prompt", "prompt"), (before, "sft"), ("PPO", "ppo")):
            grid.add_row(label, printable(str(sample.get(key, "")).strip()))
        views += ["", grid]
    return [*views, ""] if views else views


def printable(text: str) -> Text:
    """A model or a row of data may hold anything, also what a terminal would obey."""
    return Text("".join(c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}" for c in text))


def _cell(section: Section, key: str, *, interval: str | None = None) -> str:
    value = section.get(key)
    if not isinstance(value, int | float):
        return ""
    limits = section.get(interval or f"{key}_ci95")
    if not isinstance(limits, list | tuple):
        return f"{value:.3f}"
    low, high = cast(Sequence[float], limits)
    # Rich would read [0.1, 0.2] as markup if it were not escaped
    return escape(f"{value:.3f} [{low:.3f}, {high:.3f}]")


def _section(summary: Section, name: str) -> Section:
    return cast(Section, summary.get(name) or {})


def _number(section: Section, name: str) -> float:
    value = section.get(name)
    return float(value) if isinstance(value, int | float) else 0.0


def state_view(state: RunState) -> RenderableType:
    """What `align status` prints."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold")
    table.add_column()
    table.add_row("state", state.state)
    table.add_row("finished", printable(", ".join(state.finished_steps) or "nothing yet"))
    if state.steps_to_go:
        table.add_row("to go", printable(", ".join(state.steps_to_go)))
    status = state.status
    if status is not None and state.state != "finished":
        table.add_row("stage", printable(status.stage))
        table.add_row("doing", printable(f"{status.doing} ({status.done}/{status.total})"))
        if state.state == "running" and pace(status):
            table.add_row("pace", f"{pace(status)} of this activity")
        for name, value in status.metrics.items():
            table.add_row("", printable(f"{name} {value:.4g}"))
    if state.error is not None and state.state == "stopped":
        table.add_row("why", printable(state.error))
    return table


def check_view(rows: Sequence[tuple[str, str, str]]) -> RenderableType:
    """What `align check` prints: (what, verdict, detail)."""
    table = Table()
    for column in ("checked", "verdict", "detail"):
        table.add_column(column, overflow="fold")
    for what, verdict, detail in rows:
        style = {"ok": "green", "wrong": "red"}.get(verdict, "yellow")
        table.add_row(printable(what), Text(verdict, style), printable(detail))
    return table


def print_view(view: RenderableType) -> None:
    console: Any = Console(width=None if sys.stdout.isatty() else 120)
    console.print(view)
