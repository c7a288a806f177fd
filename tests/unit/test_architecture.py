"""The rooms of `server/midfill`: imports go down only, and heavy ones stay where they belong.

Started as a program, it writes the map of the architecture page.
"""

import ast
import itertools
import re
import subprocess
import sys
from pathlib import Path

import pytest

import midfill

ROOT = Path(midfill.__file__).parent
PAGE = Path(__file__).parents[2] / "server" / "docs" / "architecture.md"

# From the lowest to the highest: a room imports itself and those before it.
ORDER = [
    "system",
    "errors",
    "text",
    "settings",
    "models",
    "adapters",
    "engine",
    "fim",
    "completion",
    "evaluation",
    "training",
    "lsp",
    "bench",
    "cli",
    "__main__",
]
MAX_ENTRIES = 14
MAX_MODULE_LINES = 600

TORCH_ALLOWED = {
    *(
        f"engine/torch/{name}.py"
        for name in ("attention", "cuda", "cuda_graphs", "errors", "fuse", "kv_cache", "loading")
    ),
    *(
        f"engine/torch/{name}.py"
        for name in ("lora", "quantize", "runner", "sampling", "weight_only", "weights")
    ),
    *(f"training/{name}.py" for name in ("model", "quantized_base", "trainer")),
    *(f"bench/{name}.py" for name in ("gpu", "gpu_model")),
}


def modules():
    return sorted(path for path in ROOT.rglob("*.py") if path != ROOT / "__init__.py")


def name_of(path):
    return ".".join(("midfill", *path.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__")


MODULES = {name_of(path): path for path in modules()}


def imports(path, *, top_level_only=False):
    """(module, line) of every import, those inside functions too; without those under `if TYPE_CHECKING`."""
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
            if (node.module or "").split(".")[0] == "midfill":
                yield from ((f"{node.module}.{alias.name}", node.lineno) for alias in node.names)
            else:
                yield node.module, node.lineno


def own_imports(path):
    """(module of ours, line): the module that holds the imported name."""
    for name, line in imports(path):
        found = name
        while found and found not in MODULES:
            found = found.rpartition(".")[0]
        if found:
            yield found, line


def room(path):
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def summary(path):
    """The first sentence of a module's docstring, as far as it fits onto a line."""
    text = (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").split("\n\n")[0]
    return " ".join(text.split()).removesuffix(".")


def render_map():
    """Every room, highest first, and its modules with their first sentences."""
    lines = []

    def add(depth, name, text):
        line = f"{'  ' * depth}{name:<{24 - 2 * depth}} {text}".rstrip()
        lines.append(line if len(line) <= 120 else f"{line[:119]}…")

    def walk(folder, depth):
        inside = [path for path in folder.iterdir() if path.name not in {"__init__.py", "__pycache__"}]
        for path in sorted((path for path in inside if path.suffix == ".py"), key=lambda path: path.name):
            add(depth, path.name, summary(path))
        for path in sorted(path for path in inside if (path / "__init__.py").exists()):
            add(depth, f"{path.name}/", summary(path / "__init__.py"))
            walk(path, depth + 1)

    for name in reversed(ORDER):
        if (ROOT / name).is_dir():
            add(0, f"{name}/", summary(ROOT / name / "__init__.py"))
            walk(ROOT / name, 1)
        else:
            add(0, f"{name}.py", summary(ROOT / f"{name}.py"))
    return "```\n" + "\n".join(lines) + "\n```\n"


def with_map(page):
    """The page with a fresh map between its two marks."""
    begin, end = "<!-- map -->\n", "<!-- end of map -->\n"
    return page.partition(begin)[0] + begin + render_map() + end + page.partition(end)[2]


def test_the_map_of_the_page_is_that_of_the_modules():
    page = PAGE.read_text(encoding="utf-8")
    assert page == with_map(page), f"python {Path(__file__).name} writes it anew"


def test_the_order_has_every_room_and_there_are_few():
    assert {room(path) for path in modules()} == set(ORDER)
    assert len(set(ORDER) - {"__main__"}) <= MAX_ENTRIES


def test_imports_go_down_only():
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for path in modules()
        for name, line in own_imports(path)
        if ORDER.index(name.split(".")[1]) > ORDER.index(room(path))
    ]
    assert not wrong, "\n".join(wrong)


def test_no_imports_go_in_circles():
    """Those inside functions are counted. Prints the lines of one circle."""
    edges = {}
    for name, path in MODULES.items():
        edges[name] = {
            found: f"{path.relative_to(ROOT)}:{line} imports {found}"
            for found, line in own_imports(path)
            if found != name
        }
    done, trail = set(), []

    def visit(name):
        if name in trail:
            circle = [*trail[trail.index(name) :], name]
            pytest.fail("\n".join(edges[a][b] for a, b in itertools.pairwise(circle)), pytrace=False)
        if name in done:
            return
        trail.append(name)
        for found in sorted(edges[name]):
            visit(found)
        trail.pop()
        done.add(name)

    for name in sorted(edges):
        visit(name)


def test_packages_hold_no_logic():
    wrong = [
        f"{path.relative_to(ROOT)}:{node.lineno} {ast.unparse(node)[:60]}"
        for path in ROOT.rglob("__init__.py")
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if not isinstance(node, ast.Import | ast.ImportFrom)
        and not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant))
        and not (isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) in {"__all__", "__version__"})
    ]
    assert not wrong, "\n".join(wrong)


def test_the_protocol_library_stays_at_the_edge():
    users = {
        path.relative_to(ROOT).as_posix()
        for path in modules()
        for name, _ in imports(path)
        if name.split(".")[0] in {"pygls", "lsprotocol"}
    }
    assert all(user.startswith("lsp/") for user in users), users


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
    for name in ("scheduler.py", "kv_slots.py"):
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
    """By `system.json_files`; what other processes say comes in pieces that are bounded where they arrive."""
    wrong = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in modules()
        if path.name not in {"json_files.py", "baselines.py", "llama_vim.py"}
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
            plain = first.startswith(("json.dumps(", "'")) or (place, first) == ("cli/complete.py", "answer")
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
    code = "import midfill.lsp.server, midfill.engine.factory, sys\n"
    code += "print({'torch', 'transformers', 'peft'} & set(sys.modules))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "set()"


if __name__ == "__main__":
    PAGE.write_text(with_map(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
