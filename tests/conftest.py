import pytest


@pytest.fixture(scope="session", autouse=True)
def _folders_of_its_own(tmp_path_factory):
    """What tests accept does not count as the developer's opinion, and no adapter of theirs is used."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MIDFILL_STATE", str(tmp_path_factory.mktemp("state")))
        patch.setenv("MIDFILL_DATA", str(tmp_path_factory.mktemp("data")))
        yield
