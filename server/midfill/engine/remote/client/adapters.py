"""Find a LoRA adapter on a server: there it is a model beside the others, named as the model of a request.

An adapter that is known to be the same is preferred: our own server reports the digest of each; vLLM, if that
is allowed, loads it from its folder under a name that contains the digest. Otherwise the name that the user
gave it must match. Reads small responses only; runs on the event loop.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from typing import Any

import httpx2

from midfill.engine.api import AdapterSource
from midfill.engine.remote.client.detection import ServerInfo, ask
from midfill.engine.remote.client.dialects import typed
from midfill.errors import AdapterError

_LOG = logging.getLogger(__name__)

_LOAD_S = 30.0


async def find(
    client: httpx2.AsyncClient, served: ServerInfo, source: AdapterSource, *, is_local: bool
) -> str:
    """Return the name by which a request gets this adapter.

    Args:
        client: of that server.
        served: what was detected there.
        source: the adapter, in a folder of this machine.
        is_local: the server is on this machine too, so that it can read the folder.

    Raises:
        AdapterError: the server does not have it and cannot load it; says what to do.
        EngineUnavailableError, InvalidResponseError, TimeoutError, httpx2.TransportError: as `detection.ask`.
    """
    listed = await ask(client, "/v1/models")
    rows = typed(listed, "data", list, []) if isinstance(listed, Mapping) else []
    by_name: dict[str, Any] = {
        row["id"]: row for row in rows if isinstance(row, Mapping) and isinstance(row.get("id"), str)
    }
    address = client.base_url.netloc.decode()
    if served.dialect == "midfill":
        for name, row in by_name.items():
            if typed(row, "midfill", Mapping, {}).get("adapter_digest") == source.key:
                return name
        raise AdapterError(
            f"{address} does not have the adapter {source.name}; start it with --with-adapter {source.name}."
        )
    own = f"midfill-{source.key[:16]}"
    if own in by_name:
        return own
    if served.dialect == "vllm" and is_local and await _load(client, own, source):
        return own
    if source.name in by_name and _is_of(by_name[source.name], served):
        return source.name
    remedy = "--enable-lora and VLLM_ALLOW_RUNTIME_LORA_UPDATING=1, or " if is_local else ""
    remedy = f" (vLLM: {remedy}--enable-lora --lora-modules {source.name}=DIR)"
    raise AdapterError(
        f"{address} does not have the adapter {source.name}{remedy if served.dialect == 'vllm' else ''}."
    )


def _is_of(row: Mapping[str, Any], served: ServerInfo) -> bool:
    """Return whether a model of that name is an adapter of the one in use, as far as the server tells."""
    parent = typed(row, "parent", str, None)
    return row["id"] not in (served.base, served.model) and parent in (None, served.base)


async def _load(client: httpx2.AsyncClient, name: str, source: AdapterSource) -> bool:
    """Make vLLM load the adapter; return False if that is not allowed or fails."""
    body = {"lora_name": name, "lora_path": str(source.path)}
    async with asyncio.timeout(_LOAD_S):
        answer = await client.post("/v1/load_lora_adapter", json=body)
    if answer.is_success:
        _LOG.info("the server loaded the adapter %s as %s", source.name, name)
    else:
        _LOG.info("the server could not load the adapter %s (status %d)", source.name, answer.status_code)
    return bool(answer.is_success)
