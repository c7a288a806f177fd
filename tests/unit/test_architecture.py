"""The layers of ARCHITECTURE.md: imports go down only, and heavy ones stay where they belong."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import midfill

ROOT = Path(midfill.__file__).parent

# Lower number, lower layer. A module may import its own layer and those below.
LAYERS = [
    {"shown"},
    {"errors"},
    {
        "activity",
        "characters",
        "git",
        "documents",
        "feedback",
        "heap",
        "jsonfiles",
        "messages",
        "notebooks",
        "outlet",
        "private",
        "programs",
        "settings",
        "languages",
        "notation",
        "reasons",
        "repetition",
        "secrecy",
        "secret_shapes",
        "secret_watch",
        "syntax",
        "textfiles",
    },
    {"indentation", "place"},
    {"brackets"},
    {"comments", "repeats", "tabs"},
    {"midline", "received"},
    {"models"},
    {"engine", "adapters"},
    {"metrics"},
    {"calibrations", "confidence", "context", "families", "probing", "prompt", "suggestions", "trim"},
    {"generation"},
    {"completer"},
    {"explanation"},
    {
        "protocol",
        "items",
        "commands",
        "switching",
        "training",
        "server",
        "progress",
        "client",
        "recording",
        "bench",
        "demo",
        "doctor",
        "editors",
        "enginecheck",
        "evaluation",
        "learning",
    },
    {"cli"},
    {"__main__"},
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}

TORCH_ALLOWED = {
    "engine/attention.py",
    "engine/fuse.py",
    "engine/memory.py",
    "engine/replay.py",
    "engine/cuda.py",
    "engine/runner.py",
    "engine/lora.py",
    "engine/quantize.py",
    "engine/weights.py",
    "engine/torch_loading.py",
    "learning/frozen.py",
    "learning/model.py",
    "learning/train.py",
}
MAX_MODULE_LINES = 600


def modules():
    return sorted(path for path in ROOT.rglob("*.py") if path != ROOT / "__init__.py")


def imports(path, *, top_level_only=False):
    """(module, line) of every import; without those under `if TYPE_CHECKING`."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    body = tree.body if top_level_only else list(ast.walk(tree))
    typing_only = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    for node in body:
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            if node.module == "midfill":
                yield from ((f"midfill.{alias.name}", node.lineno) for alias in node.names)
            else:
                yield node.module, node.lineno


def test_every_module_has_a_layer():
    names = {path.relative_to(ROOT).parts[0].removesuffix(".py") for path in modules()} - {"samples"}
    assert names == set(LEVEL)


def test_imports_go_down_only():
    wrong = []
    for path in modules():
        own = path.relative_to(ROOT).parts[0].removesuffix(".py")
        for name, line in imports(path):
            parts = name.split(".")
            ours = parts[0] == "midfill" and len(parts) > 1 and parts[1] in LEVEL and own in LEVEL
            if ours and LEVEL[parts[1]] > LEVEL[own]:
                wrong.append(f"{path.relative_to(ROOT)}:{line} imports {name}")
    assert not wrong


def test_the_protocol_library_stays_at_the_edge():
    users = {
        path.relative_to(ROOT).as_posix()
        for path in modules()
        for name, _ in imports(path)
        if name.split(".")[0] in {"pygls", "lsprotocol"}
    }
    assert users == {"server.py", "commands.py", "items.py", "protocol.py", "progress.py"}


def test_torch_stays_in_the_engine():
    for path in modules():
        place = path.relative_to(ROOT).as_posix()
        heavy = {name.split(".")[0] for name, _ in imports(path, top_level_only=True)} & {
            "torch",
            "transformers",
            "peft",
        }
        assert not heavy or place in TORCH_ALLOWED, f"{place} imports {heavy} at its top"


def test_the_schedulers_books_use_the_standard_library_only():
    for name in ("scheduler.py", "slots.py"):
        for module, line in imports(ROOT / "engine" / name):
            top = module.split(".")[0]
            assert top in sys.stdlib_module_names or top == "midfill", f"{name}:{line} imports {module}"


def test_git_is_started_in_one_module_only():
    scripts = ROOT.parents[1] / "clients"
    starters = {
        path.name
        for path in [*modules(), *scripts.rglob("*.py")]
        if "node_modules" not in path.parts
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant)
        and isinstance(node.value, str)
        # The command, alone or at the begin of a line for a shell.
        and re.match(r"(?:\S*/)?git(?:\.exe)?(?:\s+-?[a-z]|\Z)", node.value)
    }
    assert starters == {"git.py"}


def test_json_of_files_is_read_within_bounds():
    """By `jsonfiles`; what other processes say comes in pieces that are bounded where they arrive."""
    wrong = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in modules()
        if path.name not in {"jsonfiles.py", "rivals.py", "llama_vim.py"}
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call)
        and (called := ast.unparse(node.func)) in {"json.load", "json.loads"}
        and (called == "json.load" or re.search(r"\.read(_bytes|_text)?\(", ast.unparse(node)))
    ]
    assert not wrong


def test_what_is_printed_commands_no_terminal():
    """Texts are printed by `cli.terminal`, JSON as it is, and markup is never read out of a text."""
    wrong = []
    for path in modules():
        place = path.relative_to(ROOT).as_posix()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            called = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
            first = ast.unparse(node.args[0]) if called and node.args else ""
            plain = first.startswith(("json.dumps(", "'")) or (place, first) == ("cli/__init__.py", "answer")
            if called in {"click.echo", "click.secho"} and place != "cli/terminal.py" and not plain:
                wrong.append(f"{place}:{node.lineno} prints {first}")
            if called.endswith("Console") and place != "cli/terminal.py":
                wrong.append(f"{place}:{node.lineno} makes a console")
            if called == "TextColumn" and not any(
                word.arg == "markup" and ast.unparse(word.value) == "False" for word in node.keywords
            ):
                wrong.append(f"{place}:{node.lineno} reads markup")
            if called.endswith("status.update") and not first.startswith("Text("):
                wrong.append(f"{place}:{node.lineno} reads markup out of {first}")
            if called.endswith(("Text.from_markup", "render_markup", "logging.Formatter")):
                wrong.append(f"{place}:{node.lineno} calls {called}")
    assert not wrong


def test_modules_are_of_a_readable_size():
    long = {
        path.name: n for path in modules() if (n := len(path.read_text().splitlines())) > MAX_MODULE_LINES
    }
    assert not long


def test_importing_the_server_imports_no_torch():
    code = "import midfill.server, midfill.engine, sys\n"
    code += "print({'torch', 'transformers', 'peft'} & set(sys.modules))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "set()"
