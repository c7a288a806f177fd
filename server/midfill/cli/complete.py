"""`midfill complete`: one completion, printed."""

from __future__ import annotations

import asyncio
import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from midfill.cli.engine_choice import engine_factory, read_settings
from midfill.cli.options import ADAPTER, ENGINE, JSON, MODEL
from midfill.cli.terminal import say
from midfill.errors import MidfillError
from midfill.system.file_errors import why_unreadable

if TYPE_CHECKING:
    from midfill.engine.api import Engine
    from midfill.settings import Settings


# "-:3:1" is a position in stdin, not an option.
@click.command(context_settings={"ignore_unknown_options": True})
@click.argument("where", metavar="FILE:LINE:COL")
@click.option(
    "--language", metavar="ID", help="LSP language identifier, such as python. [default: from the file name]"
)
@click.option(
    "--max-tokens",
    type=click.IntRange(1, 1024),
    help="Maximum number of tokens to generate. [default: the setting `max_new_tokens`]",
)
@click.option(
    "--explain",
    "explained",
    is_flag=True,
    help="Show the prompt, the stages and the filters instead of the suggestion alone.",
)
@MODEL
@ADAPTER
@JSON
@ENGINE
def complete(
    where: str,
    language: str | None,
    max_tokens: int | None,
    explained: bool,
    model: str | None,
    adapter: str | None,
    as_json: bool,
    engine_override: str | None,
) -> None:
    """Complete at one position of a file and print the text to insert.

    LINE and COL count from 1; the text is inserted before that column. With - as FILE the text is read from
    stdin; a bare - completes at its end.

    \b
    Examples:
      midfill complete src/app.py:42:17
      midfill complete src/app.py:42:17 --explain
      git show HEAD:src/app.py | midfill complete -:42:17 --language python --json
      printf 'def add(a, b):\\n    return' | midfill complete - --language python
    """
    from midfill.text.documents import Snapshot

    document, cursor = _read_position(where, language)
    settings = read_settings(model=model, adapter=adapter, max_new_tokens=max_tokens)
    answer, info = asyncio.run(
        _complete_once(settings, engine_factory(engine_override), Snapshot(document, cursor))
    )
    explanation = info.pop("explanation")
    if as_json:
        click.echo(json.dumps(info | ({"explanation": explanation} if explained else {})))
    elif explained:
        from midfill.completion.explanation import describe

        say(describe(explanation))
    elif answer:
        if isinstance(sys.stdout, io.TextIOWrapper):
            # Print the line ends of the file, unchanged.
            sys.stdout.reconfigure(newline="")
        click.echo(answer)
    else:
        raise MidfillError(f"No suggestion: {info['message']}")


async def _complete_once(
    settings: Settings, make: Callable[[Settings], Engine], snapshot: Any
) -> tuple[str, dict[str, Any]]:
    """Start an engine, ask for one completion and close the engine. Return the text and its details."""
    from midfill.completion.answer import Trigger
    from midfill.completion.completer import Completer
    from midfill.completion.explanation import explain
    from midfill.completion.reasons import REASONS
    from midfill.fim.probing import identify

    engine = make(settings)
    try:
        await engine.start(lambda _message, _share: None)
        completer = Completer(settings.model_copy(update={"prefetch": False}))
        completer.use(engine, await identify(engine, settings.family))
        answer = await completer.complete(snapshot, Trigger.INVOKED)
        info = {
            "text": answer.text,
            "source": answer.source,
            "reason": answer.reason,
            "message": REASONS[answer.reason] if answer.reason else None,
            "latency_ms": round(answer.latency_ms, 1),
            "prompt_tokens": answer.num_prompt,
            "generated_tokens": answer.num_generated,
            "model": engine.model.name,
            "explanation": explain(answer, engine.model.tokenizer),
        }
        return answer.text, info
    finally:
        await engine.close()


def _read_position(where: str, language: str | None) -> Any:
    """Parse FILE:LINE:COL and read the file. Return the document and the cursor's `Point`."""
    from midfill.text.documents import Document, Encoding, Point
    from midfill.text.languages import language_id

    name, _, position = where.partition(":") if where.startswith("-") else _split_position(where)
    try:
        data = sys.stdin.buffer.read() if name == "-" else Path(name).read_bytes()
        text = data.decode("utf-8-sig")
    except OSError as error:
        raise MidfillError(f"Cannot read {name}: {why_unreadable(error)}.") from error
    except UnicodeDecodeError as error:
        raise MidfillError(f"{name} is not UTF-8 text.") from error
    uri = "untitled:stdin" if name == "-" else Path(name).resolve().as_uri()
    document = Document.open(uri, language or language_id(name), 0, text)
    if not position and name == "-":
        last = len(document.lines) - 1
        return document, Point(last, len(document.lines[last]))
    line, _, column = position.partition(":")
    if not (line.isdecimal() and column.isdecimal() and int(line) and int(column)):
        raise MidfillError(
            f"{where!r} is not FILE:LINE:COL, for example src/app.py:42:17. Both numbers count from 1."
        )
    if int(line) > len(document.lines):
        raise MidfillError(f"{name} has {len(document.lines)} lines, so there is no line {line}.")
    return document, document.point((int(line) - 1, int(column) - 1), Encoding.UTF32)


def _split_position(where: str) -> tuple[str, str, str]:
    """Split at the last two colons: a Windows path contains another one."""
    parts = where.rsplit(":", 2)
    return (parts[0], ":", ":".join(parts[1:])) if len(parts) == 3 else (where, "", "?")
