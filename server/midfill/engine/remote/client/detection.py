"""Detect what answers at a URL: the kind of server, the model, and whether its vocabulary is known here.

A server that is sent token ids must have the vocabulary that made them. So the vocabulary of a model on this
machine is used only if the server converts a test text to the same ids (`/tokenize`), or if it serves a model
of the catalogue by its name. Otherwise it is sent text. Reads small responses only; runs on the event loop.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import httpx2

from midfill.engine.api import LocalModel, Tokenizer
from midfill.engine.remote.client.dialects import DIALECTS, OWNERS, Dialect, InvalidResponseError, typed
from midfill.errors import EngineError, EngineUnavailableError, ModelError
from midfill.models import catalogue
from midfill.models.vocabulary import tokenizer_of

_MOST_BYTES = 4_000_000
_ANSWER_S = 10.0
"""Time limit for one small response. Work that is done here meanwhile is not limited."""
_CONTEXT = 2048
"""Context in tokens, if a server does not report it."""

# Words, digits, indentation, other scripts, and characters that vocabularies split differently.
_SAMPLE = "def naïve_sum(xs):\n\treturn sum(x1234 for x in xs)  # 'größe', 合計 🙂\n\n\n        <=>::->\n"


@dataclass(frozen=True, slots=True)
class ServerInfo:
    """What was detected at a URL.

    Attributes:
        dialect: kind of server, a key of `dialects.DIALECTS`.
        model: the server's name for the model.
        base: the model that it is an adapter of, else the same.
        models: all models of the server, including adapters.
        tokenizer: the model's own, or None: then it is sent text.
        catalogue_name: the model's name in our catalogue, if it is certain.
        family: its FIM family, if the catalogue or the server declares one.
        architecture: transformers' `model_type`, or "" if unknown.
        context: maximum number of tokens of prompt and output.
        proven: the vocabulary was compared, not only assumed from the model's name.
    """

    dialect: str
    model: str
    base: str
    models: tuple[str, ...]
    tokenizer: Tokenizer | None
    catalogue_name: str | None
    family: str | None
    architecture: str
    context: int
    device: str = "remote"
    dtype: str = "unknown"
    adapter: str | None = None
    proven: bool = False

    @property
    def kind(self) -> Dialect:
        """The server's row in `DIALECTS`."""
        return DIALECTS[self.dialect]


async def ask(client: httpx2.AsyncClient, path: str, body: Mapping[str, Any] | None = None) -> Any:
    """Return a small response as JSON; None if the server has no such page.

    Raises:
        EngineUnavailableError: the server refuses the key, redirects, fails, or does not return JSON.
        TimeoutError: it does not answer.
        httpx2.TransportError: it cannot be reached.
    """
    method = "GET" if body is None else "POST"
    async with asyncio.timeout(_ANSWER_S), client.stream(method, path, json=body) as response:
        if response.status_code in {404, 405, 501}:
            return None
        if (why := refusal(response.status_code)) is not None:
            raise EngineUnavailableError(f"{client.base_url.netloc.decode()} {why}")
        data = b""
        async for chunk in response.aiter_bytes():
            data += chunk
            if len(data) > _MOST_BYTES:
                raise EngineUnavailableError(
                    f"{client.base_url.netloc.decode()} sent a response that is too long."
                )
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        kind = response.headers.get("content-type", "nothing").partition(";")[0]
        raise EngineUnavailableError(
            f"{client.base_url.netloc.decode()} answered with {kind:.40}, which no model server does; "
            "check `engine`."
        ) from None


def refusal(status: int) -> str | None:
    """Return what an HTTP status means for the user, after the server's name; None for success."""
    if status in {401, 403}:
        return f"refuses the key ({status}); check `engine_key`, which names the source of the key."
    if 300 <= status < 400:
        return f"redirects ({status}), and midfill follows no redirects; set `engine` to the final URL."
    if status == 407:
        return "is behind a proxy that requires a login (407); check HTTPS_PROXY."
    if status == 429:
        return "limits your requests (429); midfill will retry in a moment."
    if status >= 500:
        return f"failed with status {status}; see the log of that server."
    if status >= 400:
        return f"rejected the request with status {status}."
    return None


async def detect(
    client: httpx2.AsyncClient, *, api: str, wanted: str | None, candidates: Sequence[LocalModel]
) -> ServerInfo:
    """Detect the server at a URL and its model.

    Args:
        client: with the server's URL as its base.
        api: a key of `dialects.DIALECTS`, or "auto".
        wanted: the server's name of the model to use; None for its only or first one.
        candidates: models on this machine whose vocabularies may be the server's.

    Raises:
        EngineUnavailableError: no known kind of model server answers.
        EngineError: it does not have the wanted model.
        TimeoutError: it does not answer.
        httpx2.TransportError: it cannot be reached.
    """
    try:
        listed = await ask(client, "/v1/models")
        rows = typed(listed, "data", list, []) if isinstance(listed, Mapping) else []
        rows = [row for row in rows if isinstance(row, Mapping) and isinstance(row.get("id"), str)]
        if api == "auto":
            api = await _kind(client, rows)
        if not rows and api == "ollama":
            rows = await _ollama_models(client)
        row = _choose(client, rows, wanted, api)
        # An adapter of vLLM is a model beside its base; only the base reports what both have in common.
        base = next((other for other in rows if other["id"] == row.get("parent")), row)
        props = await ask(client, "/props") if api == "llama.cpp" else {}
        context = _context(base, props if isinstance(props, Mapping) else {})
        own = typed(row, "midfill", Mapping, {})
    except InvalidResponseError as error:
        raise EngineUnavailableError(
            f"{client.base_url.netloc.decode()} sent an unexpected response: {error}."
        ) from None
    name = row["id"]
    entry = catalogue.lookup(_stem(base["id"])) or catalogue.lookup(base["id"])
    tokenizer, proven = await _tokenizer(client, api, base["id"], candidates, own.get("vocabulary"))
    return ServerInfo(
        dialect=api,
        model=name,
        base=base["id"],
        models=tuple(other["id"] for other in rows) or (name,),
        tokenizer=tokenizer,
        catalogue_name=entry.name if entry else None,
        family="codestral" if api == "mistral" else own.get("family") or (entry.family if entry else None),
        architecture=str(own.get("architecture") or ""),
        context=context,
        device=str(own.get("device") or "remote"),
        dtype=str(own.get("dtype") or "unknown"),
        adapter=name if name != base["id"] else own.get("adapter"),
        proven=proven,
    )


def vocabulary_of(tokenizer: Tokenizer) -> str:
    """Return a digest of a vocabulary: the bytes of all tokens, the control tokens, a test text's ids."""
    digest = hashlib.sha256()
    for piece in tokenizer.vocab_bytes():
        digest.update(len(piece).to_bytes(4, "big") + piece)
    digest.update(repr(sorted(tokenizer.control_ids)).encode())
    digest.update(repr(tokenizer.encode(_SAMPLE)).encode())
    return digest.hexdigest()


async def _kind(client: httpx2.AsyncClient, rows: Sequence[Mapping[str, Any]]) -> str:
    for row in rows:
        if (found := OWNERS.get(str(row.get("owned_by")).casefold())) is not None:
            return found
    if isinstance(props := await ask(client, "/props"), Mapping) and "default_generation_settings" in props:
        return "llama.cpp"
    if isinstance(tags := await ask(client, "/api/tags"), Mapping) and "models" in tags:
        return "ollama"
    if rows:
        return "openai"
    raise EngineUnavailableError(
        f"{client.base_url.netloc.decode()} is not a model server that midfill recognises: "
        "it has no /v1/models, /props or /api/tags. If you know its kind, set `engine_api`."
    )


async def _ollama_models(client: httpx2.AsyncClient) -> list[Mapping[str, Any]]:
    tags = await ask(client, "/api/tags")
    rows = typed(tags, "models", list, []) if isinstance(tags, Mapping) else []
    return [
        {"id": row["name"]} for row in rows if isinstance(row, Mapping) and isinstance(row.get("name"), str)
    ]


def _choose(
    client: httpx2.AsyncClient, rows: Sequence[Mapping[str, Any]], wanted: str | None, api: str
) -> Mapping[str, Any]:
    if wanted is None and rows:
        return rows[0]
    for row in rows:
        if wanted in (row["id"], _stem(row["id"])):
            return row
    if wanted is not None and (not rows or api in {"openai", "mistral"}):
        # Some servers list nothing, or not all of their models.
        return {"id": wanted}
    known = ", ".join(row["id"] for row in rows[:5])
    if wanted is None:
        raise EngineUnavailableError(
            f"{client.base_url.netloc.decode()} serves no model yet; load one there, or set `engine_model`."
        )
    raise EngineError(
        f"{client.base_url.netloc.decode()} has no model {wanted!r} (`engine_model`); it has {known}."
    )


def _context(row: Mapping[str, Any], props: Mapping[str, Any]) -> int:
    settings = typed(props, "default_generation_settings", Mapping, {})
    meta = typed(row, "meta", Mapping, {})
    own = typed(row, "midfill", Mapping, {})
    for values, key in ((own, "context"), (settings, "n_ctx"), (row, "max_model_len"), (meta, "n_ctx")):
        size: int = typed(values, key, int, 0)
        if size > 0:
            return max(size, 64)
    return _CONTEXT


def _stem(name: str) -> str:
    return name.rpartition("/")[2].removesuffix(".gguf")


async def _tokenizer(
    client: httpx2.AsyncClient, api: str, name: str, candidates: Sequence[LocalModel], vocabulary: Any
) -> tuple[Tokenizer | None, bool]:
    """Return a vocabulary of this machine that the server has too, and whether it was compared."""
    kind = DIALECTS[api]
    if not kind.takes_ids:
        return None, False
    loaded: list[tuple[LocalModel, Tokenizer]] = []
    for model in candidates:
        try:
            loaded.append((model, await asyncio.to_thread(tokenizer_of, model.path)))
        except ModelError:
            continue
        if isinstance(vocabulary, str):
            if await asyncio.to_thread(vocabulary_of, loaded[-1][1]) == vocabulary:
                return loaded[-1][1], True
        elif await _agrees(client, kind, name, loaded[-1][1]):
            return loaded[-1][1], True
    for model, tokenizer in loaded:
        entry = catalogue.lookup(name) or catalogue.lookup(_stem(name))
        if kind.tokenize is None and vocabulary is None and entry is not None and entry.name == model.name:
            return tokenizer, False
    return None, False


async def _agrees(client: httpx2.AsyncClient, kind: Dialect, name: str, tokenizer: Tokenizer) -> bool:
    """Return whether the server makes the same ids of text and of control tokens."""
    if kind.tokenize is None:
        return False
    path, body = kind.tokenize
    marks = sorted(tokenizer.control_ids)[-8:]
    for text, expected in (
        (_SAMPLE, tokenizer.encode(_SAMPLE)),
        (tokenizer.decode(marks), marks),
    ):
        answer = await ask(client, path, body(name, text))
        if not isinstance(answer, Mapping) or answer.get("tokens") != expected:
            return False
    return True
