"""The wheel, built and checked by the commands of CONTRIBUTING.md and installed from the file."""

import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

import midfill

TOP = Path(__file__).parents[2]
GUIDE = (TOP / "CONTRIBUTING.md").read_text(encoding="utf-8")

pytestmark = pytest.mark.slow


def run(*command, folder):
    done = subprocess.run(
        command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dist")
    assert "`pip wheel --no-deps --wheel-dir dist .`" in GUIDE
    run(
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--wheel-dir",
        folder,
        TOP,
        folder=folder,
    )
    [file] = folder.iterdir()
    assert file.name == f"midfill-{midfill.__version__}-py3-none-any.whl"
    return file


def test_the_wheel_is_fit_for_a_package_index(wheel):
    assert "`twine check --strict dist/*.whl`" in GUIDE
    assert "PASSED" in run(sys.executable, "-m", "twine", "check", "--strict", wheel, folder=wheel.parent)


def test_the_wheel_has_the_package_and_the_plugins_and_nothing_else(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    package = TOP / "server" / "midfill"
    files = {
        f"midfill/{path.relative_to(package).as_posix()}"
        for path in package.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    plugins = {
        f"midfill/clients/{path.relative_to(TOP / 'clients').as_posix()}"
        for editor in ("emacs", "neovim", "vim")
        for path in (TOP / "clients" / editor).rglob("*")
        if path.is_file()
    }
    information = {name for name in names if name.startswith(f"midfill-{midfill.__version__}.dist-info/")}
    assert names - information == files | plugins


def test_the_wheel_is_installed_from_the_file(wheel, tmp_path):
    """Into an environment of its own; the packages that it needs are those of the one that runs the tests."""
    venv.create(tmp_path, with_pip=True)
    python = tmp_path / "bin" / "python"
    run(python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", wheel, folder=tmp_path)
    site = Path(
        run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", folder=tmp_path).strip()
    )
    # Read after the environment's own, so that midfill is the one that was installed.
    needed = [path for path in sys.path if Path(path).name == "site-packages"]
    (site / "needed.pth").write_text("\n".join(needed) + "\n")
    where = run(python, "-c", "import midfill; print(midfill.__file__)", folder=tmp_path)
    assert Path(where.strip()).is_relative_to(site)
    said = run(tmp_path / "bin" / "midfill", "--version", folder=tmp_path)
    assert said.split()[-1] == midfill.__version__
