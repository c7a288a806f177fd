"""A real model server: vLLM's build for CPUs, with the default model, driven through `midfill serve`.

It takes 3.4 GB on the disk and about ten minutes, so it is not part of a plain `pytest`:

    pytest tests/real/test_vllm.py --vllm
"""

import asyncio
import contextlib
import json
import os
import re
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import httpx2
import psutil
import pytest
import pytest_asyncio
from through_serve import (
    cancel_one,
    fill_in_tasks,
    free_port,
    ghost,
    lose,
    see,
    serving,
    until_back,
    until_loaded,
)

from midfill.adapters.bindings import Bindings
from midfill.adapters.registry import Registry
from midfill.bench.adapters import _made_up

INSTALL = Path(__file__).with_name("install_vllm.sh")
STARTS_S = 300

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def python(request):
    """The interpreter of an environment that has vLLM; it is made if it is not there."""
    if not request.config.getoption("--vllm"):
        pytest.skip("vLLM takes 3.4 GB and ten minutes; it is run by: pytest tests/real/test_vllm.py --vllm")
    return subprocess.run([INSTALL], check=True, stdout=subprocess.PIPE, text=True).stdout.strip()


class Vllm:
    """vLLM's server as a process, with the children that it has."""

    def __init__(self, python, model, log):
        self.port = free_port()
        self.log = log
        # `vllm serve` looks for a distribution of that name, which this build is not.
        self.command = [python, "-P", "-m", "vllm.entrypoints.openai.api_server", "--host", "127.0.0.1"]
        self.command += [
            "--port",
            str(self.port),
            "--model",
            str(model.path),
            "--served-model-name",
            model.name,
        ]
        self.command += ["--dtype", "float32", "--max-model-len", "1024", "--enforce-eager"]
        self.command += ["--enable-prefix-caching", "--block-size", "32", "--enable-lora"]
        self.process = None

    async def start(self):
        env = os.environ | {
            "HF_HUB_OFFLINE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
        }
        with self.log.open("ab") as log:
            self.process = psutil.Popen(
                self.command, env=env, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        begun = time.monotonic()
        async with httpx2.AsyncClient(base_url=f"http://127.0.0.1:{self.port}", trust_env=False) as client:
            while True:
                assert self.process.poll() is None, self.log.read_text()[-3000:]
                assert time.monotonic() - begun < STARTS_S, self.log.read_text()[-3000:]
                try:
                    if (await client.get("/health")).is_success:
                        break
                except httpx2.TransportError:
                    await asyncio.sleep(0.5)
        print(f"vLLM serves after {time.monotonic() - begun:.0f} s")

    def kill(self):
        if self.process.poll() is not None:
            return
        family = [self.process, *self.process.children(recursive=True)]
        for process in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(family, 20)

    async def counted(self, name):
        rows = (await see(self.port, "metrics")).splitlines()
        (value,) = [row.split()[-1] for row in rows if row.startswith(f"vllm:{name}{{")]
        return float(value)

    async def computes(self):
        return await self.counted("num_requests_running") > 0


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def vllm(python, model, tmp_path_factory):
    server = Vllm(python, model, tmp_path_factory.mktemp("vllm") / "log")
    try:
        await server.start()
        yield server
    finally:
        server.kill()


async def test_infilling_tasks_get_suggestions(vllm, tmp_path):
    async with serving(vllm.port, tmp_path) as client:
        await client.initialize({})
        await until_loaded(client)
        await fill_in_tasks(client)


async def test_a_half_typed_word_is_healed(vllm, tmp_path):
    async with serving(vllm.port, tmp_path) as client:
        await client.initialize({})
        await until_loaded(client)
        text, _ = await ghost(client, "import json\n\n\ndef read(text):\n    return json.lo▮\n", "heal.py")
        assert text == "ads(text)"


async def test_a_cancelled_request_stops_there(vllm, tmp_path):
    async with serving(vllm.port, tmp_path) as client:
        await client.initialize({})
        await until_loaded(client)
        await cancel_one(client, vllm.computes, partial(vllm.counted, "generation_tokens_total"))


async def test_an_adapter_that_the_user_has_chosen_is_loaded_there(vllm, model, tmp_path, monkeypatch):
    monkeypatch.setenv("MIDFILL_DATA", str(tmp_path / "data"))
    source = _made_up(model.path, tmp_path / "mine", rank=8, seed=1)
    Registry().add(source.path, name="mine", base=model)
    Bindings().bind(source.key)
    name = f"midfill-{source.key[:16]}"
    async with serving(vllm.port, tmp_path) as client:
        await client.initialize({})
        await until_loaded(client)
        assert (await client.request("midfill/status", {}))["adapter"] == "mine"
        models = {row["id"]: row["parent"] for row in (await see(vllm.port, "v1/models"))["data"]}
        assert models == {model.name: None, name: model.name}
        text, _ = await ghost(client, "def add(a, b):\n    return a ▮\n", "adapted.py")
        assert text
        assert re.search(f'running_lora_adapters="{name}"', await see(vllm.port, "metrics"))
        assert client.shown == []


async def test_it_is_found_fit(vllm):
    command = [sys.executable, "-P", "-m", "midfill", "engine", "check", f"http://127.0.0.1:{vllm.port}"]
    process = await asyncio.create_subprocess_exec(*command, "--json", stdout=asyncio.subprocess.PIPE)
    out, _ = await process.communicate()
    found = json.loads(out)
    print(json.dumps(found))
    assert process.returncode == 0
    assert found["passed"]
    numbers = found["numbers"]
    assert (numbers["kind"], numbers["token_ids"], numbers["prefix_cache_hits"]) == ("vllm", True, True)
    assert {check["name"]: check["status"] for check in found["checks"]}["cancels"] == "ok"


async def test_killed_in_the_middle_and_back_again(vllm, tmp_path):
    async with serving(vllm.port, tmp_path) as client:
        await client.initialize({})
        await until_loaded(client)
        await lose(client, vllm.computes, vllm.kill)
        await vllm.start()
        await until_back(client, vllm.port)
