import os

import pytest


@pytest.fixture(scope="session", autouse=True)
def _state_of_its_own(tmp_path_factory):
    """What tests accept does not count as the developer's opinion."""
    before = os.environ.get("MIDFILL_STATE")
    os.environ["MIDFILL_STATE"] = str(tmp_path_factory.mktemp("state"))
    yield
    if before is None:
        del os.environ["MIDFILL_STATE"]
    else:
        os.environ["MIDFILL_STATE"] = before
