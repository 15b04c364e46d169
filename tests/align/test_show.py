import io

import pytest
from rich.console import Console, RenderableType

from align.show import BarDisplay, PlainDisplay, QuietDisplay, WhileSeen, check_view, state_view, summary_view
from align.status import RunState, Status

SUMMARY: dict[str, object] = {
    "sft": {"nll_before": 3.25, "nll_after": 2.5},
    "reward": {"accuracy": 0.8, "accuracy_ci95": [0.7, 0.9], "length_baseline_accuracy": 0.55,
               "length_baseline_ci95": [0.45, 0.65], "margin": 1.5},
    "eval": {"gold_sft": 0.1, "gold_ppo": 0.4, "gold_gain": 0.3, "gold_gain_ci95": (0.2, 0.4), "score_sft": -1.0,
             "score_ppo": 1.0, "kl": 3.0, "length_sft": 20, "length_ppo": 21.5, "eos_rate": 0.95, "win_rate": 0.75,
             "samples": [{"prompt": "Why [bold]?", "sft": "So.", "ppo": "Because\x1b[2J of it."}]},
    "seconds": {"install_excluded_total": 75.0, "sft": 15.0},
    "peak_rss_bytes": 2**30,
}  # fmt: skip


def rendered(view: RenderableType) -> str:
    stream = io.StringIO()
    Console(file=stream, width=120).print(view)
    return stream.getvalue()


def shown_summary(summary: dict[str, object]) -> RenderableType:
    return summary_view(summary, command_seconds=75.0)


def test_the_table_shows_each_number_beside_its_interval() -> None:
    text = rendered(shown_summary(SUMMARY))
    for shown in ("3.250", "2.500", "0.550 [0.450, 0.650]", "0.800 [0.700, 0.900]", "0.300 [0.200, 0.400]", "21.500",
                  "Why [bold]?", "So.", "time 1:15", "1.00 GiB"):  # fmt: skip
        assert shown in text


def test_the_time_of_earlier_commands_is_told_apart() -> None:
    for command, said in ((76.0, "time 1:15 (sft 0:15), peak"), (5.0, "(sft 0:15), 0:05 of it in this command, peak")):
        assert said in rendered(summary_view(SUMMARY, command_seconds=command))


def test_what_was_before_stands_left_of_what_came_after() -> None:
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in rendered(shown_summary(SUMMARY)).splitlines()]
    assert ["SFT: NLL per token", "3.250", "2.500"] in rows
    assert ["gold score", "0.100", "0.400"] in rows
    assert ["score", "-1.000", "1.000"] in rows
    assert ["response length, tokens", "20.000", "21.500"] in rows
    assert ["EOS rate", "", "0.950"] in rows


def test_the_table_says_whether_pairs_or_verdicts_were_judged() -> None:
    reward = {"accuracy": 0.8, "margin": 1.5}
    assert "reward: pair accuracy" in rendered(shown_summary({"reward": reward}))
    assert "reward: accuracy of verdicts" in rendered(shown_summary({"reward": {**reward, "auc": 0.9}}))


def test_the_forecast_stands_beside_the_measured_peak() -> None:
    memory = {"sft": {"forecast_bytes": 2**30, "peak_bytes": 2**31}, "ppo": {"forecast_bytes": 0, "peak_bytes": 2**29}}
    text = rendered(shown_summary({**SUMMARY, "memory": memory}))
    said = "memory above the imports, GiB, forecast at full length / measured peak: sft 1.00 / 2.00, ppo 0.00 / 0.50"
    assert said in text
    on_gpu = rendered(shown_summary({**SUMMARY, "memory": memory, "peak_device_memory_bytes": 1}))
    assert "memory, GiB, forecast at full length / measured peak" in on_gpu
    assert "forecast" not in rendered(shown_summary({**SUMMARY, "memory": {}}))


def test_what_a_model_wrote_cannot_steer_the_terminal() -> None:
    text = rendered(shown_summary(SUMMARY))
    assert "\x1b" not in text
    assert "Because\N{REPLACEMENT CHARACTER}[2J of it." in text


def test_the_table_of_a_task_without_gold_has_no_gold() -> None:
    evaluation = {"score_sft": 0.0, "score_ppo": 1.0}
    text = rendered(shown_summary({**SUMMARY, "eval": evaluation}))
    assert " score " in text
    assert "gold" not in text


def test_what_the_policy_is_held_against_is_called_sft_only_where_there_was_sft() -> None:
    assert "win rate against SFT" in rendered(shown_summary(SUMMARY))
    without = rendered(shown_summary({key: value for key, value in SUMMARY.items() if key != "sft"}))
    assert "win rate against the reference" in without
    assert "SFT" not in without


@pytest.mark.parametrize("missing", ["sft", "reward", "eval", "seconds", "peak_rss_bytes"])
def test_the_table_stands_without_what_has_not_run(missing: str) -> None:
    assert rendered(shown_summary({key: value for key, value in SUMMARY.items() if key != missing}))


def status(done: int) -> Status:
    return Status("ppo", "update [1]", done, 4, started=0.0, updated=2.0, metrics={})


def test_without_a_terminal_there_is_a_line_for_a_step_and_not_one_for_each_tick() -> None:
    stream = io.StringIO()
    display = PlainDisplay(stream)
    for step in ("sft", "ppo"):
        display.step(step, "run (not run yet)")
        for done in range(4):
            display.progress(status(done))
    lines = stream.getvalue().splitlines()
    assert len(lines) == 4
    assert lines[:2] == ["sft: run (not run yet)", "ppo: update [1], 0/4"]


def test_a_terminal_shows_a_bar_with_what_is_done_and_the_pace() -> None:
    stream = io.StringIO()
    display = BarDisplay(Console(file=stream, force_terminal=True, width=120))
    display.step("ppo", "run")
    display.progress(status(2))
    display.note("warning: [not markup]")
    display.close()
    text = stream.getvalue()
    assert "2/4" in text
    assert "1.0/s" in text
    assert "warning: [not markup]" in text


def test_where_nobody_sees_it_any_more_it_falls_silent() -> None:
    class Full(io.StringIO):
        writes = 0

        def write(self, text: str) -> int:
            self.writes += 1
            raise OSError(28, "No space left on device")

    stream = Full()
    display = WhileSeen(PlainDisplay(stream))
    display.note("row 1")
    display.step("sft", "run")
    display.progress(status(1))
    display.close()
    assert stream.writes == 1


@pytest.mark.parametrize("kind", ["quiet", "plain", "bar"])
def test_what_is_noted_cannot_steer_the_terminal(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    stream = io.StringIO()
    displays = {"quiet": QuietDisplay(), "plain": PlainDisplay(stream), "bar": BarDisplay(Console(file=stream))}
    displays[kind].note("warning: row 3 holds \x1b]0;mine\x07 and \x9b2J\nand goes on")
    displays[kind].close()
    text = stream.getvalue() + "".join(capsys.readouterr())
    assert (
        "holds \N{REPLACEMENT CHARACTER}]0;mine\N{REPLACEMENT CHARACTER} and \N{REPLACEMENT CHARACTER}2J\nand" in text
    )
    assert not {"\x1b", "\x07", "\x9b"} & set(text)


def test_status_and_check_cannot_steer_the_terminal_either() -> None:
    state = RunState("stopped", (), (), None, "said \x1b[2J")
    text = rendered(state_view(state)) + rendered(check_view([("a\x1bb", "wrong", "c\x1bd")]))
    assert "\x1b" not in text
    assert text.count("\N{REPLACEMENT CHARACTER}") == 3


def test_quiet_still_says_warnings_and_says_them_on_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    display = QuietDisplay()
    display.step("sft", "run")
    display.progress(status(1))
    display.note("60 rows in")
    display.note("warning: hear this")
    display.note("error: and this")
    assert capsys.readouterr() == ("", "warning: hear this\nerror: and this\n")
