"""The command `limbeck`: its verbs are imported when they are called, and every error becomes one sentence."""

from __future__ import annotations

import importlib
import logging
import os
import signal
import sys
import tempfile
import traceback
from contextlib import suppress
from types import FrameType
from typing import Any

import click

from .. import __version__
from ..errors import EXIT_DEFECT, EXIT_INTERRUPTED, LimbeckError, did_you_mean

# Verb to its line in `limbeck --help`; each lives in the module of its name, as `command`.
VERBS = {
    "quickstart": "Run the built-in recipe on a real sentence-embedding model.",
    "run": "Run a recipe: distil, prune, export, validate, gate.",
    "distill": "Train a small student to answer as its teacher does.",
    "ablate": "Show what each objective of a distillation contributes.",
    "prune": "Remove what a model needs least.",
    "sensitivity": "Show what cutting each part of a model would cost.",
    "export": "Compile a model for a backend, and check what was compiled.",
    "build": "Turn a TensorRT kit into an engine, on the GPU it is for.",
    "inspect": "Show what a checkpoint or an artifact is.",
    "verify": "Check what an artifact's files prove, without running it.",
    "validate": "Hold artifacts against their teacher and write a report.",
    "bisect": "Find the module where an artifact parts from its model.",
    "generate": "Write text with a language model or its artifact.",
    "bench": "Time models and artifacts side by side.",
    "gate": "Apply gates to a report; the exit code is the answer.",
    "diff": "Show what changed from one report to the next.",
    "backends": "List backends, what they can do here, and what mends them.",
}


class LazyGroup(click.Group):
    """A group whose help needs no verb to be imported."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in VERBS:
            return None
        command: click.Command = importlib.import_module(f".{cmd_name}", __package__).command
        return command

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        if args and args[0] not in VERBS and not args[0].startswith("-"):
            known = ", ".join(VERBS)
            meant = did_you_mean(args[0], VERBS)
            raise click.UsageError(f"There is no command {args[0]!r}; there are {known}.{meant}", ctx)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(VERBS.items()))


@click.group(
    cls=LazyGroup,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="Exit codes: 0 fine, 1 a gate said no, 2 usage, 3 backend or device missing, 4 bad input, 5 inconclusive, "
    "6 an export did not match its model, 70 a defect of limbeck, 130 interrupted.",
)
@click.version_option(__version__, prog_name="limbeck")
def cli() -> None:
    """Distil, prune, export and prove transformer models.

    Start with `limbeck quickstart`, or with one verb on a model of your own.
    """


def main(args: list[str] | None = None) -> None:
    """Run the command line and exit with its code."""
    signal.signal(signal.SIGTERM, _interrupt)  # a killed job cleans up as an interrupted one does
    # Before torch is loaded: its threads otherwise spin while they wait, which starves the compiled teacher beside them
    # and, on a machine that does anything else, slows training several times over.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # transformers imports torchao where it is installed (ExecuTorch brings it), which warns of GPUs that are not here.
    for chatty in ("torchao", "torch.utils._pytree"):
        logging.getLogger(chatty).setLevel(logging.ERROR)
    sys.exit(_run(args))


def _interrupt(signum: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _run(args: list[str] | None) -> int:
    try:
        code = cli.main(args=args, prog_name="limbeck", standalone_mode=False)
        sys.stdout.flush()
        return code if isinstance(code, int) else 0
    except LimbeckError as error:
        _complain(error.message, error.hint)
        return error.exit_code
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except click.exceptions.Exit as error:
        return error.exit_code
    except (KeyboardInterrupt, click.Abort):
        _complain("Interrupted. What was being written has been removed; what was finished before stays.")
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # The reader of our output left (`limbeck ... | head`): nothing more to say, and nothing to say it to.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception:  # the last line of defence: whatever gets here is a defect of ours
        return _report_defect()


def _complain(message: str, hint: str | None = None) -> None:
    with suppress(BrokenPipeError):  # nobody reads it: the exit code still says it
        click.echo(f"{click.style('Error:', fg='red', bold=True)} {message}", err=True)
        if hint:
            click.echo(f"       {hint}", err=True)


def _report_defect() -> int:
    from ..environment import versions

    with tempfile.NamedTemporaryFile("w", prefix="limbeck-defect-", suffix=".txt", delete=False) as file:
        file.write(f"limbeck {__version__}\ncommand: {' '.join(sys.argv[1:])}\nversions: {versions()}\n\n")
        file.write(traceback.format_exc())
    _complain(f"limbeck itself failed: {sys.exc_info()[1]!r}.", f"This is a defect; please report it with {file.name}.")
    return EXIT_DEFECT
