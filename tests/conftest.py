"""In which order, and beside what, tests run.

`pytest` starts two processes, to which modules are dealt out in the order below. What drives real editors
is one group, which one of them begins with; what needs a real model is another, at the end. A `serial` test
measures time or memory: no other test runs meanwhile. One file, `-s` or `--pdb` run in one process; so does
everything with `-n 0`.
"""

import os
import tempfile
from pathlib import Path

import pytest
from xdist.scheduler import LoadGroupScheduling

# Each of the processes of a run has one core, and its tests have small models: threads of torch that wait for
# each other take more time than they save. Read when torch is imported, also by the programs of tests.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import profiles
from midfill.models import catalogue, fetch
from turns import fcntl, turn

TESTS = Path(__file__).parent
# From the cheapest to the dearest.
FOLDERS = ("unit", "scenarios", "engine", "lsp", "editors", "real", "gpu")
QUICK = ("unit", "scenarios")
# Never two tests of one of these at a time.
GROUPS = {"editors": "editors", "real": "models", "gpu": "models"}
NOT_QUICK = ("fuzz", "programs", "real", "serial", "slow")
SHARED = pytest.StashKey[str]()


def pytest_addoption(parser):
    parser.addoption("--vllm", action="store_true", help="run tests/real/test_vllm.py: 3.4 GB, ten minutes")


def pytest_configure(config):
    profiles.load("quick" if config.option.markexpr == "quick" else "default")
    if hasattr(config, "workerinput"):
        config.stash[SHARED] = config.workerinput["midfill_shared"]
    else:
        folder = tempfile.TemporaryDirectory(prefix="midfill-tests-")
        config.add_cleanup(folder.cleanup)
        config.stash[SHARED] = folder.name


def pytest_configure_node(node):
    """All processes of a run have one folder."""
    node.workerinput["midfill_shared"] = node.config.stash[SHARED]


def pytest_xdist_auto_num_workers(config):
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    single = any(Path(argument.split("::")[0]).suffix == ".py" for argument in config.args)
    return 0 if single or fcntl is None or config.option.capture == "no" or cores == 1 else 2


def pytest_ignore_collect(collection_path, config):
    """`-m quick` does not even import what the other folders need."""
    if config.option.markexpr == "quick" and collection_path.parent == TESTS and collection_path.is_dir():
        return True if collection_path.name not in QUICK else None
    return None


class _ByModule(LoadGroupScheduling):
    """A module stays in one process, for what its tests share; a group too, of whatever modules it is."""

    def _split_scope(self, nodeid):
        scope = super()._split_scope(nodeid)
        return nodeid.split("::")[0] if scope == nodeid else scope


def pytest_xdist_make_scheduler(config, log):
    return _ByModule(config, log)


def pytest_collection_modifyitems(config, items):
    for item in items:
        folder = _folder(item)
        marks = {mark.name for mark in item.iter_markers()}
        if folder in QUICK and marks.isdisjoint(NOT_QUICK):
            item.add_marker(pytest.mark.quick)
        group = "serial" if "serial" in marks else GROUPS.get(folder)
        if group is not None:
            item.add_marker(pytest.mark.xdist_group(group))
    shared = hasattr(config, "workerinput")
    items.sort(key=lambda item: _rank(item, shared=shared))


def _folder(item):
    return item.path.relative_to(TESTS).parts[0]


def _rank(item, *, shared):
    """Cheap tests first; but of two processes one begins with the editors, which mostly wait."""
    folder = _folder(item)
    begins = shared and folder == "editors"
    return item.get_closest_marker("serial") is not None, not begins, FOLDERS.index(folder)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item):
    if not hasattr(item.config, "workerinput"):
        return (yield)
    # Outermost, so that the time limit of a test is that of the test alone.
    with turn(item.config.stash[SHARED], alone=item.get_closest_marker("serial") is not None):
        return (yield)


@pytest.fixture(scope="session", autouse=True)
def _folders_of_its_own(tmp_path_factory):
    """What tests accept does not count as the developer's opinion, and no adapter of theirs is used."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MIDFILL_STATE", str(tmp_path_factory.mktemp("state")))
        patch.setenv("MIDFILL_DATA", str(tmp_path_factory.mktemp("data")))
        # The requests that only tests send (`lsp/handlers/hooks.py`).
        patch.setenv("MIDFILL_TEST_HOOKS", "1")
        yield


@pytest.fixture(scope="session")
def model():
    """The default model, fetched if it is not here. Without a network the error says what to do."""
    return fetch.pull(catalogue.DEFAULT, lambda _message, _share: None)
