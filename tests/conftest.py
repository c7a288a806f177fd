import os

import pytest
from hypothesis import settings

from midfill.models import catalogue, fetch

# HYPOTHESIS_PROFILE=nightly draws more, and .ci/fuzz goes on with others for ten minutes.
# How long one example takes is the machine's affair.
settings.register_profile("default", deadline=None)
settings.register_profile("nightly", deadline=None, max_examples=300)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


def pytest_addoption(parser):
    parser.addoption("--vllm", action="store_true", help="run tests/real/test_vllm.py: 3.4 GB, ten minutes")


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
