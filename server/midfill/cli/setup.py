"""`midfill setup`: configure the editors of this machine."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import click

from midfill.cli.options import JSON
from midfill.cli.terminal import say

if TYPE_CHECKING:
    from midfill.cli.editor_files import Home, Plan
    from midfill.cli.editor_setup import Editor


@click.command()
@click.argument("names", metavar="[EDITOR]...", nargs=-1)
@click.option(
    "--write",
    "writes",
    is_flag=True,
    help="Write the configuration after showing it. A backup of each changed file is kept beside it.",
)
@click.option(
    "--undo", "undoes", is_flag=True, help="Take out again what setup has written, and nothing else."
)
@JSON
def setup(names: tuple[str, ...], writes: bool, undoes: bool, as_json: bool) -> None:
    """Configure your editors to start midfill. Without --write, only show what would be written.

    EDITOR is one of vscode, vscode-insiders, vscodium, neovim, vim, emacs, helix, sublime, kate, zed and
    jetbrains; the default is every editor that is installed. Your own lines in a file are not changed.

    \b
    Examples:
      midfill setup
      midfill setup neovim --write
      midfill setup emacs helix --write
      midfill setup helix --undo --write
      midfill setup --json
    """
    from midfill.cli import editor_setup as editors

    chosen = [editors.find(name) for name in names]
    if not names:
        chosen = [editor for editor in editors.EDITORS if editor.found is not None]
    home = editors.here()
    reports = [_set_up(one, home, writes=writes, undoes=undoes, shows=not as_json) for one in chosen]
    if as_json:
        click.echo(json.dumps({"command": list(home.command), "editors": reports}))
    elif not chosen:
        known = ", ".join(editor.name for editor in editors.EDITORS)
        say(f"No supported editor was found on your PATH. Name one of these: {known}")
    elif not writes and any(report["status"] == "to do" for report in reports):
        options = ("--undo", "--write") if undoes else ("--write",)
        say("Nothing was written. To write it, run: midfill setup " + " ".join((*names, *options)))


def _set_up(editor: Editor, home: Home, *, writes: bool, undoes: bool, shows: bool) -> dict[str, Any]:
    """Show an editor's plan and, if `writes`, carry it out. Return the report for JSON."""
    from midfill.cli.editor_files import write

    plan = _undo(editor, home) if undoes else editor.plan(home)
    edit = plan.edit
    diff = edit.diff if edit is not None else ""
    status = "by hand" if edit is None else "to do" if diff else "ready"
    report: dict[str, Any] = {
        "editor": editor.name,
        "program": editor.found,
        "status": status,
        "steps": plan.steps,
    }
    if shows:
        say(editor.title + ("" if editor.found else " (not on your PATH)"), bold=True)
        for text in (diff, plan.shown):
            if text:
                say(text.rstrip("\n"))
    if edit is None:
        report["configuration"] = plan.shown
    else:
        report |= {"file": str(edit.path), "diff": diff}
    if edit is not None and diff and writes:
        backup = write(edit)
        report |= {"status": "written", "backup": None if backup is None else str(backup)}
    if shows:
        if report["status"] == "ready":
            say("Nothing of midfill's setup is in it." if undoes else "It is already set up.")
        elif report["status"] == "written":
            kept = f" The previous version is in {report['backup']}." if report["backup"] else ""
            done = "Written to" if edit is not None and edit.after is not None else "Removed"
            say(f"{done} {report['file']}.{kept}")
        for step in plan.steps:
            say(step)
        say()
    return report


def _undo(editor: Editor, home: Home) -> Plan:
    from midfill.cli.editor_files import Plan

    if editor.undo is not None:
        return editor.undo(home)
    return Plan(None, (f"midfill writes nothing for {editor.title}: take out by hand what you have put in.",))
