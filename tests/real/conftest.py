import pytest
import pytest_asyncio

from midfill.lsp.client import SERVE_COMMAND, Client


def pytest_collection_modifyitems(items):
    for item in items:
        if "tests/real/" in item.nodeid:
            item.add_marker(pytest.mark.real)
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="module", autouse=True)
def threads_as_for_a_user():
    """Programs with a real model use as many threads as they would outside these tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("OMP_NUM_THREADS", raising=False)
        yield


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def server(model):
    """A server that has loaded the default model; loading takes seconds, so a module shares it."""
    client = await Client.start([*SERVE_COMMAND])
    await client.load()
    yield client
    await client.close()
