"""A person who types, against the real server: every request, what became of it, and what it cost.

Plays episodes in real time over pipes. The editor asks after a key as the episode says, and takes a request
back when the next key comes first. The user is an oracle: a suggestion that leads to the text that is to
be typed is accepted when it appears; the keys that it saves are left out, and the typing goes on
from there.

What is measured is what an editor sees, plus what `midfill/explain` tells of each answered request.
The work of a request that was cancelled is not visible from here.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from midfill.bench.figures import awaited, peak_rss_mb, percentiles, share
from midfill.bench.trace import Episode, Key, total_s
from midfill.client import SERVE_COMMAND, Client, ServerError
from midfill.documents import Change, Encoding
from midfill.errors import MidfillError

_CANCELLED = -32800
_PATIENCE_S = 60.0
FATES = ("accepted", "shown", "empty", "cancelled", "late", "failed")
"""Accepted; shown before the next key, but not what the user wanted; answered with nothing; taken back at
the next key and answered so; taken back, but a result had been sent; answered with an error."""


@dataclass(slots=True)
class Asked:
    """One request and what became of it. Times are seconds since the replay began.

    Attributes:
        episode: its number.
        code: the error that answered it; None if it was answered with a result.
        explained: what `midfill/explain` told of its answer.
    """

    episode: int
    asked_s: float
    cancelled_s: float | None = None
    answered_s: float | None = None
    text: str = ""
    code: int | None = None
    accepted: bool = False
    explained: dict[str, Any] = field(default_factory=dict)

    @property
    def fate(self) -> str:
        """One of `FATES`."""
        if self.accepted:
            return "accepted"
        if self.code == _CANCELLED:
            return "cancelled"
        if self.code is not None or self.answered_s is None:
            return "failed"
        if self.cancelled_s is not None:
            return "late"
        return "shown" if self.text else "empty"

    @property
    def waited_ms(self) -> float:
        """From the request to its answer, or to the key that took it back."""
        end_s = self.cancelled_s if self.cancelled_s is not None else self.answered_s
        return ((end_s if end_s is not None else self.asked_s) - self.asked_s) * 1000


@dataclass(slots=True)
class Session:
    """What a replay has seen.

    Attributes:
        num_keys: keys of the typist that were reached, accepted ones included.
        num_skipped: of these, the keys that accepted suggestions made unnecessary.
    """

    requests: list[Asked] = field(default_factory=list)
    num_episodes: int = 0
    num_keys: int = 0
    num_skipped: int = 0
    seconds: float = 0.0
    startup_s: float = 0.0
    peak_rss_mb: float = 0.0


@dataclass(frozen=True, slots=True)
class Pace:
    """`speed` divides all times; `limit_s` ends the typing after so many seconds, None when all is typed."""

    speed: float = 1.0
    limit_s: float | None = None


async def replay(
    episodes: Sequence[Episode],
    report: Callable[[str, float | None], None],
    *,
    engine: str | None = None,
    options: dict[str, Any] | None = None,
    pace: Pace | None = None,
) -> Session:
    """Start a server, play the episodes, end it.

    `engine` is for tests (`midfill serve --engine`), `options` are settings. Raises `MidfillError` if the
    model cannot be loaded or the server ends.
    """
    begun = time.monotonic()
    client = await Client.start([*SERVE_COMMAND, *(["--engine", engine] if engine else [])])
    try:
        await client.load(options, lambda message: report(message, None))
        player = _Player(client, pace or Pace(), report)
        player.session.startup_s = time.monotonic() - begun
        await player.play(episodes)
        player.session.peak_rss_mb = peak_rss_mb(client.process.pid)
        return player.session
    finally:
        await client.close()


class _Player:
    """Plays one episode after the other."""

    def __init__(self, client: Client, pace: Pace, report: Callable[[str, float | None], None]) -> None:
        self.session = Session()
        self._client = client
        self.speed = pace.speed
        self._limit_s = pace.limit_s
        self._report = report
        self._begun = time.monotonic()

    def now_s(self) -> float:
        """Seconds since the replay began."""
        return time.monotonic() - self._begun

    def over(self) -> bool:
        """Whether the time given for it is up."""
        return self._limit_s is not None and self.now_s() >= self._limit_s

    async def play(self, episodes: Sequence[Episode]) -> None:
        """Play them all, or until the time is up."""
        expected_s = total_s(episodes) / self.speed
        if self._limit_s is not None:
            expected_s = min(expected_s, self._limit_s)
        for number, episode in enumerate(episodes):
            if self.over():
                break
            self._report("typing", min(1.0, self.now_s() / expected_s) if expected_s else None)
            typing = _Typing(self, self._client, episode, number)
            await typing.run()
            self.session.num_episodes += 1
        self.session.seconds = self.now_s()


class _Typing:
    """One episode being typed."""

    def __init__(self, player: _Player, client: Client, episode: Episode, number: int) -> None:
        self._player = player
        self._client = client
        self._episode = episode
        self._number = number
        self._speed = player.speed
        self._documents = episode.documents()
        self._version = 1
        self._index = -1
        self._due_s = player.now_s()
        # When the editor will ask for a suggestion; the request that is being answered.
        self._ask_s: float | None = None
        self._flight: tuple[int, asyncio.Future[Any], Asked] | None = None
        self._pending: set[asyncio.Future[Any]] = set()

    async def run(self) -> None:
        """Open the document, type, close it."""
        episode, session = self._episode, self._player.session
        item = {"uri": episode.uri, "languageId": episode.language_id, "version": 1, "text": episode.text}
        self._client.notify("textDocument/didOpen", {"textDocument": item})
        while not self._player.over():
            more = self._index + 1 < len(episode.keys)
            gap_s = episode.keys[self._index + 1].gap_s if more else episode.rest_s
            next_s = self._due_s + gap_s / self._speed
            if (reached := await self._wait(next_s)) is not None:
                session.num_keys += reached - self._index
                session.num_skipped += reached - self._index
                self._accept(reached)
                continue
            self._take_back()
            if not more:
                break
            self._index += 1
            session.num_keys += 1
            self._due_s = next_s
            self._type(episode.keys[self._index])
        self._take_back()
        await self._settle()
        self._client.notify("textDocument/didClose", {"textDocument": {"uri": episode.uri}})

    async def _wait(self, until_s: float) -> int | None:
        """Wait for the next key, asking meanwhile. The key up to which a suggestion leads, if one comes."""
        if self._ask_s is not None and self._ask_s < until_s:
            await self._sleep(self._ask_s)
            self._ask()
        self._ask_s = None
        if self._flight is not None:
            _, future, asked = self._flight
            await asyncio.wait({future}, timeout=max(0.0, until_s - self._player.now_s()))
            if asked.text and (reached := self._leads_to(asked.text)) is not None:
                return reached
        await self._sleep(until_s)
        return None

    async def _sleep(self, until_s: float) -> None:
        await asyncio.sleep(max(0.0, until_s - self._player.now_s()))

    def _leads_to(self, text: str) -> int | None:
        """The key after which the document is what it becomes when `text` is accepted now."""
        edited = self._documents[self._index].edit([self._insertion(text)], 0, Encoding.UTF16)
        for index in range(self._index + 1, len(self._documents)):
            document = self._documents[index]
            if document.num_chars == edited.num_chars and document.lines == edited.lines:
                return index
        return None

    def _insertion(self, text: str) -> Change:
        cursor = self._episode.keys[self._index].cursor
        return Change(text, cursor, cursor)

    def _accept(self, reached: int) -> None:
        """Insert the suggestion on the screen; the typing goes on behind it."""
        if self._flight is None:
            return
        asked = self._flight[2]
        asked.accepted = True
        change = self._insertion(asked.text)
        key = self._episode.keys[reached]
        delay_s = self._episode.keys[self._index].request_after_s
        self._index, self._flight = reached, None
        self._due_s = self._player.now_s()
        self._type(Key(0.0, (change,), key.cursor, delay_s))

    def _type(self, key: Key) -> None:
        self._version += 1
        changes = [
            {"range": {"start": _place(change.start), "end": _place(change.end)}, "text": change.text}
            for change in key.changes
        ]
        document = {"uri": self._episode.uri, "version": self._version}
        self._client.notify("textDocument/didChange", {"textDocument": document, "contentChanges": changes})
        self._ask_s = None if key.request_after_s is None else self._due_s + key.request_after_s / self._speed

    def _ask(self) -> None:
        """Send the request. What comes is noted when it comes, whatever the typist does then."""
        document = {"uri": self._episode.uri}
        params = {
            "textDocument": document,
            "position": _place(self._episode.keys[self._index].cursor),
            "context": {"triggerKind": 2},
        }
        asked = Asked(self._number, self._player.now_s())
        self._player.session.requests.append(asked)

        def note(done: asyncio.Future[Any]) -> None:
            asked.answered_s = self._player.now_s()
            if isinstance(error := done.exception(), ServerError):
                asked.code = error.code
                return
            items = done.result()["items"]
            asked.text = items[0]["insertText"] if items else ""
            with suppress(ServerError):
                explanation = self._client.send_request("midfill/explain", {"textDocument": document})[1]
                explanation.add_done_callback(learn)
                self._pending.add(explanation)

        def learn(done: asyncio.Future[Any]) -> None:
            if done.exception() is None:
                asked.explained = done.result()

        id_, future = self._client.send_request("textDocument/inlineCompletion", params)
        future.add_done_callback(note)
        self._pending.add(future)
        self._flight = id_, future, asked

    def _take_back(self) -> None:
        """Cancel the request that is still being answered: the text has changed, or is being left."""
        if self._flight is not None:
            id_, future, asked = self._flight
            if not future.done():
                asked.cancelled_s = self._player.now_s()
                self._client.cancel(id_)
        self._flight = None

    async def _settle(self) -> None:
        """Wait for the answers to all that was asked. Raises `MidfillError` if they do not come."""
        while waiting := {future for future in self._pending if not future.done()}:
            _, missing = await asyncio.wait(waiting, timeout=_PATIENCE_S)
            if missing:
                raise MidfillError(f"The server left a request unanswered for {_PATIENCE_S:.0f} s.")
        for future in self._pending:
            if isinstance(error := future.exception(), ServerError) and error.code == 0:
                raise MidfillError("The server ended during the replay; its log says more.")
        self._pending.clear()


def _place(position: tuple[int, int] | None) -> dict[str, int]:
    line, character = position or (0, 0)
    return {"line": line, "character": character}


def summarise(session: Session) -> dict[str, Any]:
    """The figures, as `--json` prints them.

    suggestion_ms: from a request to its answer, of the requests that were answered with a suggestion.
    model_ran_ms: of these, the ones for which the model ran. answer_ms: answers with nothing too.
    awaited_ms: to an answer, had nobody cancelled: cancelled requests count as longer than they were.
    recomputed_tokens: prompt tokens computed, where the model ran, but for the first answer of a document.
    cancel_to_free_ms: from the client's cancel to the answer -32800.
    wasted_tokens: generated for answers that the user did not accept.
    keystrokes_saved: keys left out, less one for each acceptance.
    """
    requests = session.requests
    fates = Counter(asked.fate for asked in requests)
    answered = [asked for asked in requests if asked.fate in {"accepted", "shown", "empty"}]
    shown = [asked for asked in answered if asked.text]
    ran = [asked for asked in answered if _ran(asked)]
    first = {id(asked) for asked in {asked.episode: asked for asked in reversed(ran)}.values()}
    freed = [
        (asked.answered_s - asked.cancelled_s) * 1000
        for asked in requests
        if asked.fate == "cancelled" and asked.answered_s is not None and asked.cancelled_s is not None
    ]
    saved = session.num_skipped - fates["accepted"]
    generated = [(asked, int(asked.explained["generatedTokens"])) for asked in ran]
    return {
        "requests": len(requests),
        "suggestion_ms": percentiles([asked.waited_ms for asked in shown], 50, 95, 99),
        "model_ran_ms": percentiles([asked.waited_ms for asked in ran if asked.text], 50, 95, 99),
        "answer_ms": percentiles([asked.waited_ms for asked in answered], 50, 95, 99),
        "awaited_ms": awaited(
            [asked.waited_ms for asked in answered],
            [asked.waited_ms for asked in requests if asked.fate in {"cancelled", "late"}],
            50,
            95,
        ),
        "recomputed_tokens": percentiles([_computed(a) for a in ran if id(a) not in first], 50, 99),
        "recomputed_first_tokens": percentiles([_computed(a) for a in ran if id(a) in first], 50, 99),
        "cancel_to_free_ms": percentiles(freed, 50, 99),
        "reused_share": share(
            sum(asked.explained.get("source") not in {"model", "none", None} for asked in shown), len(shown)
        ),
        "keystrokes_saved": saved,
        "keystrokes_saved_share": share(saved, session.num_keys),
        "wasted_tokens": sum(num for asked, num in generated if not asked.accepted),
        "generated_tokens": sum(num for _, num in generated),
        "shown_before_next_key_share": share(len(shown), len(requests)),
        "cancelled_share": share(fates["cancelled"] + fates["late"], len(requests)),
        "fates": {fate: fates[fate] for fate in FATES},
        "reasons": dict(
            Counter(asked.explained.get("reason") for asked in answered if not asked.text).most_common()
        ),
        "peak_rss_mb": session.peak_rss_mb,
        "startup_s": round(session.startup_s, 2),
        "episodes": session.num_episodes,
        "keys": session.num_keys,
        "seconds": round(session.seconds, 1),
    }


def _ran(asked: Asked) -> bool:
    """Whether the model ran for this answer, and for this one only."""
    return asked.explained.get("source") in {"model", "none"} and bool(asked.explained.get("generatedTokens"))


def _computed(asked: Asked) -> int:
    return int(asked.explained["promptTokens"]) - int(asked.explained["reusedTokens"])


_ROWS = (
    ("suggestion_ms", "time to a suggestion, ms", "requests answered with one"),
    ("model_ran_ms", "... where the model ran, ms", ""),
    ("answer_ms", "time to an answer, ms", "answers with nothing too"),
    ("awaited_ms", "... if nobody cancelled, ms", "estimated: Kaplan-Meier"),
    ("recomputed_tokens", "prompt tokens computed", "but for the first answer in a document"),
    ("recomputed_first_tokens", "... for the first answer", ""),
    ("cancel_to_free_ms", "cancel to free, ms", "from the client's cancel to the answer -32800"),
    ("reused_share", "suggestions without the model", ""),
    ("shown_before_next_key_share", "shown before the next key", "share of the requests"),
    ("cancelled_share", "cancelled", "share of the requests"),
    ("keystrokes_saved", "keystrokes saved", "less one for each acceptance"),
    ("keystrokes_saved_share", "... share of the keys", ""),
    ("generated_tokens", "tokens generated", "without those of cancelled requests"),
    ("wasted_tokens", "... for what was not accepted", ""),
    ("fates", "fates", ""),
    ("reasons", "nothing, because", ""),
    ("peak_rss_mb", "server's peak memory, MB", ""),
    ("startup_s", "start to model loaded, s", ""),
)


def table(summary: dict[str, Any]) -> Any:
    """The figures for a person: a rich table."""
    from rich.table import Table  # noqa: PLC0415 - only a person needs it

    title = "{requests} requests, {keys} keys in {episodes} documents, {seconds} s".format(**summary)
    grid = Table(title=title, title_justify="left", show_header=False, box=None, padding=(0, 2, 0, 0))
    grid.add_column(no_wrap=True)
    grid.add_column()
    grid.add_column(style="dim")
    for key, label, note in _ROWS:
        value = summary[key]
        if isinstance(value, dict):
            text = "  ".join(f"{name} {'-' if item is None else item}" for name, item in value.items())
        elif value is None:
            text = "-"
        else:
            text = f"{value:.1%}" if key.endswith("_share") else str(value)
        grid.add_row(label, text or "-", note)
    return grid
