"""Assemble the `midfill` command line, and turn errors into one line and an exit status.

Every other module of this package holds one command or one group of commands, or logic that only a command
needs. Heavy modules are imported inside the commands that need them: `midfill --help` must stay fast.
"""

from __future__ import annotations

import sys

import click

from midfill import __version__
from midfill.cli import output
from midfill.cli.adapter import adapter
from midfill.cli.adapter_training import adapter_eval, adapter_plan, adapter_stats, adapter_train
from midfill.cli.bench import bench
from midfill.cli.bench_gpu import bench_gpu
from midfill.cli.bench_load import bench_load
from midfill.cli.bench_soak import bench_soak
from midfill.cli.complete import complete
from midfill.cli.demo import demo
from midfill.cli.doctor import doctor
from midfill.cli.engine import engine
from midfill.cli.evaluate import evaluate
from midfill.cli.model import model
from midfill.cli.replay import replay
from midfill.cli.serve import serve
from midfill.cli.setup import setup
from midfill.cli.status import status
from midfill.cli.terminal import say
from midfill.errors import MidfillError


@click.group(
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="To see it work, run: midfill demo",
)
@click.version_option(__version__, message="midfill %(version)s")
def cli() -> None:
    """Fill-in-the-middle code completion that runs on your own machine, for any editor that speaks LSP."""


for _command in (adapter_plan, adapter_train, adapter_eval, adapter_stats):
    adapter.add_command(_command)
for _command in (bench_gpu, bench_load, bench_soak):
    bench.add_command(_command)
for _command in (serve, complete, demo, doctor, status, replay, setup):
    cli.add_command(_command)
for _group in (model, engine, adapter, bench, evaluate):
    cli.add_command(_group)


def main() -> None:
    """Run the command line and exit. An error is printed as one line, never as a traceback."""
    sys.exit(output.guard(_run))


def _run() -> int:
    try:
        # Outside standalone mode click returns the status of `Exit` instead of raising it.
        return cli(prog_name="midfill", standalone_mode=False) or 0
    except click.exceptions.NoArgsIsHelpError as error:
        # Its message is the help page of the group.
        error.show()
        return error.exit_code
    except click.UsageError as error:
        command = error.ctx.command_path if error.ctx is not None else "midfill"
        say(f"{command}: {_sentence(error.format_message())} For help: {command} --help", err=True)
        return error.exit_code
    except click.ClickException as error:
        say(f"midfill: {_sentence(error.format_message())}", err=True)
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        say("Stopped.", err=True)
        return 130
    except MidfillError as error:
        say(f"midfill: {error}", err=True)
        return 1


def _sentence(text: str) -> str:
    """Return the text on one line, ending with a full stop."""
    line = " ".join(text.split())
    return line if line.endswith((".", "?", "!")) else f"{line}."
