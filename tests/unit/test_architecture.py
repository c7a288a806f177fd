"""The layers of ARCHITECTURE.md: imports go down only, and heavy ones stay where they belong."""

import ast
import subprocess
import sys
from pathlib import Path

import midfill

ROOT = Path(midfill.__file__).parent

# Lower number, lower layer. A module may import its own layer and those below.
LAYERS = [
    {"errors"},
    {
        "activity",
        "documents",
        "feedback",
        "heap",
        "messages",
        "notebooks",
        "settings",
        "languages",
        "secrecy",
        "secret_shapes",
        "secret_watch",
        "syntax",
    },
    {"indentation", "place"},
    {"brackets"},
    {"midline"},
    {"models"},
    {"engine", "adapters"},
    {"metrics"},
    {"context", "families", "probing", "prompt", "suggestions", "trim", "confidence"},
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
