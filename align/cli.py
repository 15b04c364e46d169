"""The command line. Each command imports what it needs when it runs, so that `align check` stays fast."""

import errno
import io
import json
import os
import shlex
import sys
import time
from collections.abc import Generator
from contextlib import closing, contextmanager, redirect_stdout, suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, NoReturn

import typer

from align.errors import AlignError, ConfigError, StoppedError, UsageError
from align.steps import STAGE_FUNCTIONS

if TYPE_CHECKING:
    from align.show import Display

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="SFT, reward model and PPO on one resident base model.",
)
ConfigFile = Annotated[Path, typer.Argument(help="A YAML file.", show_default=False)]
Overrides = Annotated[list[str] | None, typer.Argument(help="section.key=value ...", show_default=False)]
Quiet = Annotated[bool, typer.Option("--quiet", help="Only warnings and the final table.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON on stdout; all else goes to stderr.")]

_OUT_OF_REACH = (errno.EACCES, errno.EPERM, errno.ENAMETOOLONG)


@contextmanager
def _one_message() -> Generator[None]:
    """Around all of a command: whatever goes wrong in it ends in one message. The command imports what it needs inside,
    when our own packages come first: with `python -m align` the current folder would."""
    from align.installation import verify_packages

    try:
        verify_packages()
        yield
    except AlignError as error:
        _end_with(str(error), error.exit_code)
    except KeyboardInterrupt:
        _end_with("stopped", StoppedError.exit_code)
    except OSError as error:
        if error.errno in _OUT_OF_REACH and error.filename is not None:
            remedy = "look at its folders' permissions, or name another place"
            _end_with(f"{error.filename} is out of reach: {error.strerror}; {remedy}", UsageError.exit_code)
        if error.filename is None and not isinstance(error, BrokenPipeError):  # the latter is click's to end with
            _end_with(f"cannot say what there is to say: {error}", 1)
        raise


def _end_with(message: str, exit_code: int) -> NoReturn:
    from align.show import printable  # it may quote a row or a response

    for stream, text in ((sys.stdout, ""), (sys.stderr, f"error: {printable(message)}\n")):
        try:
            stream.write(text)
            stream.flush()
        except OSError:  # the reader is gone, as `tee` is after Ctrl-C: the exit code is what is left to say
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    raise typer.Exit(exit_code) from None


@contextmanager
def _display(*, quiet: bool, as_json: bool) -> Generator["Display"]:
    """What shows the work. With --json stdout is for the result alone, though Ray prints notices of its own there."""
    from align.show import make_display

    with redirect_stdout(sys.stderr if as_json else sys.stdout), closing(make_display(is_quiet=quiet)) as display:
        yield display


def _print_version(is_asked: bool) -> None:
    if is_asked:
        from align import __version__

        print(f"align {__version__}")
        raise typer.Exit


@app.callback()
def _align(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None: ...


@app.command()
def run(
    config: ConfigFile,
    overrides: Overrides = None,
    stage: Annotated[
        Literal["sft", "reward", "ppo"] | None, typer.Option(help="Only this stage, from the earlier ones' results.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue a stopped run.")] = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="Discard what is there of the stages to be run.")] = False,
    allow_change: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY", help="With --resume: go on though this has changed since; may be given again."),
    ] = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Run the stages of a config, or what is left of them."""
    with _one_message():
        if resume and fresh:
            raise ConfigError("--resume continues what --fresh discards: give one of them")
        if allow_change and not resume:
            raise ConfigError("--allow-change is about what --resume goes on from: give both")
        from align import settings
        from align.driver import run_folder, run_pipeline
        from align.pipeline import RunCall
        from align.show import print_view, summary_view

        loaded = settings.load(config, overrides or [])
        with _display(quiet=quiet, as_json=as_json) as display:
            command = shlex.join(["align", "run", str(config), *(overrides or [])])
            call = RunCall(command, stage, resume, fresh, tuple(allow_change or ()))
            started = time.monotonic()
            summary = run_pipeline(loaded, call, stages=STAGE_FUNCTIONS, display=display)
        if as_json:
            print(json.dumps(summary, indent=1))
        else:
            print_view(summary_view(summary, command_seconds=time.monotonic() - started))
            print(f"results: {run_folder(loaded)}")


@app.command()
def check(config: ConfigFile, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Check a config and the files that it names, without torch, Ray or the network."""
    with _one_message():
        from align import settings
        from align.check import check_config
        from align.show import check_view, print_view

        loaded = settings.load(config, overrides or [])
        findings = check_config(loaded)
        wrong = [finding.detail for finding in findings if finding.verdict == "wrong"]
        if as_json:
            print(json.dumps({"ok": not wrong, "findings": [asdict(finding) for finding in findings]}, indent=1))
        else:
            rows = [("config", "ok", str(config)), *((f.what, f.verdict, f.detail) for f in findings)]
            print_view(check_view(rows))
        if wrong:
            raise ConfigError("\n".join(wrong))


@app.command()
def plan(
    config: ConfigFile,
    overrides: Overrides = None,
    gpus: Annotated[int, typer.Option(min=1, help="Data-parallel: each holds the base.")] = 1,
    gpu_memory: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Of each, say 24GB: does it fit, and if not, what to change.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Forecast memory and work from the base's configuration alone: no weights are loaded."""
    with _one_message():
        from align import settings
        from align.plan.view import print_plan

        loaded = settings.load(config, overrides or [])
        if not print_plan(loaded, gpus=gpus, gpu_memory=gpu_memory, as_json=as_json):
            raise typer.Exit(1)


@app.command()
def inspect(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="The data set that `align ingest --to` wrote.", show_default=False)
    ],
    tokenizer: Annotated[
        str | None, typer.Option(metavar="MODEL", help="Count and show tokens as this base.model has them.")
    ] = None,
    system_prompt: Annotated[str | None, typer.Option(help="As data.system_prompt; needs --tokenizer.")] = None,
    max_length: Annotated[
        int | None, typer.Option(min=1, help="Count the rows over so many tokens; needs --tokenizer.")
    ] = None,
    html: Annotated[Path | None, typer.Option(metavar="FILE", help="Also write it as one page.")] = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Describe a data set: its rows, lengths, biases, duplicates, and a few rows as they are learnt."""
    with _one_message():
        if tokenizer is None and (system_prompt is not None or max_length is not None):
            raise UsageError("--system-prompt and --max-length are about tokens: give --tokenizer, too")
        if html is not None and html.is_dir():
            raise UsageError(f"--html: cannot write {html}: it is a folder; name a file")
        if html is not None and folder.resolve() in html.resolve().parents:
            raise UsageError(f"--html {html}: a page inside {folder} would damage the data set; write it elsewhere")
        from align.inspect_view import inspection_view, write_page
        from align.show import late_progress, print_view
        from data.ingestion.inspection import inspect_dataset

        with _display(quiet=quiet, as_json=as_json) as display:
            codec = None
            if tokenizer is not None:
                display.note(f"loading the tokenizer of {tokenizer}")  # its import alone takes seconds
                from align.ingest import load_named_codec

                codec = load_named_codec(tokenizer, system_prompt)
            on_progress = late_progress(display, stage="inspect", doing="reading rows")
            found = inspect_dataset(folder, codec=codec, max_length=max_length, on_progress=on_progress)
        if html is not None:
            write_page(html, inspection_view(found))
        if as_json:
            print(json.dumps(asdict(found), indent=1))
        else:
            print_view(inspection_view(found))
            if html is not None:
                print(f"page: {html}")


@app.command()
def status(
    run_folder: Annotated[Path, typer.Argument(help="root/name of a run.", show_default=False)],
    as_json: AsJson = False,
) -> None:
    """Say how far a run is."""
    with _one_message():
        from align.show import print_view, state_view
        from align.status import read_state

        now = time.time()
        state = read_state(run_folder, now)
        if as_json:
            left = state.status.seconds_left(now) if state.status and state.state == "running" else None
            print(json.dumps({**asdict(state), "seconds_left": left}, indent=1))
        else:
            print_view(state_view(state))


@app.command()
def ingest(
    sources: Annotated[
        list[str], typer.Argument(help="Files, quoted globs, hub:NAME or hub:NAME:SPLIT.", show_default=False)
    ],
    to: Annotated[Path, typer.Option(help="The data set's folder; it must not exist yet.", show_default=False)],
    shape: Annotated[str | None, typer.Option("--format", help="What the rows are; found out if not given.")] = None,
    columns: Annotated[
        str | None, typer.Option("--map", help="For flat rows: prompt=COLUMN,chosen=COLUMN,rejected=COLUMN and so on.")
    ] = None,
    held_out: Annotated[
        list[str] | None, typer.Option(help="A fraction (0.05 if not given), or a source; may be given again.")
    ] = None,
    weight: Annotated[list[float] | None, typer.Option(help="Each source's share, in their order.")] = None,
    near: Annotated[
        float | None, typer.Option(min=0.5, max=1.0, help="Reject near duplicates from this similarity on, say 0.8.")
    ] = None,
    keep_ties: Annotated[bool, typer.Option("--keep-ties", help="Keep pairs of which neither is preferred.")] = False,
    tokenizer: Annotated[
        str | None, typer.Option(help="As base.model: with --max-length, reject what a stage would set aside.")
    ] = None,
    max_length: Annotated[int | None, typer.Option(min=8, help="In tokens, as in the stage's config.")] = None,
    system_prompt: Annotated[str | None, typer.Option(help="As data.system_prompt; for token lengths.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the split.")] = 0,
    engine: Annotated[Literal["local", "ray"], typer.Option(help="Processes here, or Ray Data.")] = "local",
    address: Annotated[
        str, typer.Option(help="Of the Ray cluster, as cluster.address; its nodes must share the folder of --to.")
    ] = "local",
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Turn raw data into a verified data set, with an account of every row."""
    with _one_message():
        from align.ingest import as_columns, as_held_out, as_token_rule, run_ingest
        from align.show import print_view
        from data.ingestion.find import IngestRequest

        if engine == "local" and address != "local":
            raise UsageError(f"--address {address} names a Ray cluster: give --engine ray, too")
        fraction, held_out_sources = as_held_out(held_out or ())
        asked = IngestRequest(
            sources=tuple(sources),
            held_out=held_out_sources,
            shape=shape,
            columns=as_columns(columns),
            held_out_fraction=fraction,
            seed=seed,
            keep_ties=keep_ties,
            near_threshold=near,
            weights=tuple(weight or ()),
            tokens=as_token_rule(tokenizer, max_length, system_prompt),
        )
        with _display(quiet=quiet, as_json=as_json) as display:
            account, view = run_ingest(asked, to, engine=engine, address=address, display=display)
        if as_json:
            print(json.dumps(account, indent=1))
        else:
            print_view(view)
            print(f"data set: {to}")


def main() -> None:
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            with suppress(OSError):  # it flushes, and the reader may be gone
                stream.reconfigure(errors="replace")  # a terminal may not have every letter of a response
    app()


if __name__ == "__main__":
    main()
