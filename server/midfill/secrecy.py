"""What must not be shown to a model: files by name, lines by what stands in them.

A file is secret by its name (the setting `excluded_files`) or by a line in it. Lines are judged by the
detectors of detect-secrets, by the shapes of newer tokens, and by assignments to names like
`api_token`. No secret is tried out with the service that it is for: that would need the network.

There are two grades, because a wrong guess costs differently. A POSSIBLE secret (any quoted text that
looks random) is kept out of the context of other files. A CERTAIN one (a token of a known shape, a
private key, a password that is no placeholder) makes its whole file a secret.

All but `SecretWatch` is pure and runs in any thread. detect-secrets takes 0.3 s to import, so it is
imported by the first line that needs it.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from functools import cache, lru_cache
from typing import Any
from urllib.parse import unquote

from midfill.documents import Snapshot, changed_lines

# Where tools keep passwords, tokens and private keys.
SECRET_FILES = (
    *(".env", ".env.*", "*.env", ".envrc", "*.pem", "*.key", "*.pfx", "*.p12", "*.p8", "*.jks"),
    *("*.keystore", "*.kdbx", "*.ppk", "*.ovpn", "id_rsa*", "id_dsa*", "id_ecdsa*", "id_ed25519*"),
    *(".netrc", "_netrc", ".npmrc", ".yarnrc.yml", ".pypirc", ".pgpass", ".my.cnf", ".htpasswd"),
    *(".git-credentials", ".dockercfg", ".docker/config.json", ".kube/config", "*kubeconfig*"),
    *(".aws/credentials", "credentials", "credentials.json", "credentials.toml", "credentials.yml"),
    *("credentials.yaml", "service-account*.json", "secrets.json", "secrets.toml", "secrets.yml"),
    *("secrets.yaml", ".vault*", "*.tfstate", "*.tfstate.backup", "*.tfvars"),
)

# Also the colon of URIs without a path ("untitled:.env"), and the separator of Windows.
_SEPARATOR = re.compile(r"[/\\:]+")
_QUERY = re.compile(r"[?#]")

# A longer line is a line of data. Its ends are looked at, and it is a possible secret in any case.
_MAX_LINE = 2_000

# A line that has none of these is no secret to any detector; `test_secrecy.py` holds them to that. The
# detectors take 60 us a line, finding these in a whole text takes less than one.
_PASSWORD_WORDS = (
    *("password", "passwd", "pwd", "secret", "contrase", "apikey", "api_key", "authkey", "auth_key"),
    *("servicekey", "service_key", "accountkey", "account_key", "dbkey", "db_key", "databasekey"),
    *("database_key", "privkey", "priv_key", "privatekey", "private_key", "clientkey", "client_key"),
    *("dbpass", "db_pass", "databasepass", "database_pass", "keypass", "key_pass"),
)
_TOKEN_WORDS = ("token", "credential", "bearer", "passphrase", "accesskey", "access_key")
_SHAPE_WORDS = ("private key", "putty-user-key-file", "cloudant", "softlayer", "akc", "xox", "://")
_LONG_RUN = re.compile(r"[A-Za-z0-9+/=_\\-]{20,}")
_ARTIFACTORY = re.compile(r"AP[\dA-F][A-Za-z0-9]{8}")
# The alphabet's size bounds the entropy: 4.5 bits a character need 23 different ones.
_MIN_ALPHABET = 23

# Shapes that are younger than the last release of detect-secrets, from the services' own documentation.
_YOUNGER_SHAPES = re.compile(
    r"""\b(?:
      github_pat_[A-Za-z0-9_]{22,} | npm_[A-Za-z0-9]{36} | hf_[A-Za-z0-9]{30,} | AIza[A-Za-z0-9_-]{35}
    | sk-(?:ant|proj|svcacct|or-v1)-[A-Za-z0-9_-]{20,} | sk-[A-Za-z0-9]{40,} | dop_v1_[a-f0-9]{64}
    | shp(?:at|ca|pa|ss)_[a-fA-F0-9]{32} | [rs]k_test_[A-Za-z0-9]{24,} | xapp-\d-[A-Z0-9]+-\d+-[a-z0-9]+
    | ya29\.[A-Za-z0-9_-]{20,} | glpat-[A-Za-z0-9_-]{20,} | AGE-SECRET-KEY-1[A-Z0-9]{58}
    )""",
    re.VERBOSE,
)
_PRIVATE_KEY = re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY|PuTTY-User-Key-File|-----BEGIN PGP PRIVATE")
# `api_token = "..."`, `"credential": "..."`, `Authorization: Bearer ...`, TOKEN=... in a shell.
_ASSIGNED = re.compile(
    r"""(?:token|credentials?|passphrase|access_?key|passw(?:or)?d|(?<![a-z])pass|pwd|secret|api_?key|auth_?key)\w*["'\])]*
        \s*(?::=|=>|[:=]{1,3})\s* (?: [brf]{0,2}["'`]([^"'`]+)["'`] | ([^\s"'`,;(){}\[\]]+)(?!\S) )
      | \bbearer\s+([A-Za-z0-9._~+/-]{16,}=*)""",
    re.VERBOSE | re.IGNORECASE,
)
_PLACEHOLDER = re.compile(
    r"[<{$%\[(]|\.\.\.|(?-i:x{4}|X{4})|\*{3}|example|placeholder|change.?me|your|dummy|fake|redacted|^test"
    r"|^(?:my|the|some|old|new)?_?(?:secret|pass|passwd|password|pwd|token|none|null|key)[_-]?\d{0,3}$",
    re.IGNORECASE,
)
_UUID = re.compile(r"[\da-f]{8}(?:-[\da-f]{4}){3}-[\da-f]{12}\Z", re.IGNORECASE)
# Random text and password words only: everything else has a shape of its own.
_VAGUE = {"Base64 High Entropy String", "Hex High Entropy String", "Secret Keyword", "Basic Auth Credentials"}
# An address is no secret. IBM's shape is "any word of 44 characters after any `key`".
_LEFT_OUT = {"Public IP (ipv4)", "IBM Cloud IAM Key"}
# Of shorter text too little can be said: `"deadbeef"`, a colour, an abbreviated commit.
_MIN_HEX = 20
_MIN_VALUE = 6
# Judging a text takes 0.1 us a character; a large one would keep the event loop too long.
_LARGE = 200_000
_NEAR_LINES = 256


@dataclass(slots=True)
class SecretWatch:
    """Whether the open documents hold a CERTAIN secret, from version to version. One thread only.

    Of each version only what has changed since the last is judged.
    """

    _seen: dict[str, tuple[list[str], int]] = field(default_factory=dict)

    def finds_secret(self, snapshot: Snapshot) -> bool:
        """Whether there is one in the document; in a large one, whether there is one near the cursor."""
        document = snapshot.document
        lines = document.lines
        if document.num_chars > _LARGE:
            block = snapshot.cursor.line // _NEAR_LINES * _NEAR_LINES
            lines = lines[max(0, block - _NEAR_LINES) : block + 2 * _NEAR_LINES]
        old, num_secrets = self._seen.get(document.uri, ([], 0))
        first, old_end, new_end = changed_lines(old, lines)
        if old_end > first or new_end > first:
            num_secrets += _num_certain(lines[first:new_end]) - _num_certain(old[first:old_end])
            self._seen[document.uri] = lines, num_secrets
        return num_secrets > 0

    def forget(self, uri: str) -> None:
        """Drop what is remembered of a document that was closed."""
        self._seen.pop(uri, None)


class Grade(IntEnum):
    """How sure it is that a line holds a secret."""

    NONE = 0
    POSSIBLE = 1
    CERTAIN = 2


@lru_cache(maxsize=256)
def is_excluded(uri: str, patterns: tuple[str, ...]) -> bool:
    """Whether a URI or path matches one of the patterns, upper and lower case alike.

    A pattern without a slash is for the file's name; one with slashes for the end of the path
    (".aws/credentials").
    """
    # Not by `urlsplit`: it raises for some, and editors escape `?` and `#` as they please.
    paths = [_segments(uri), _segments(_QUERY.split(uri, maxsplit=1)[0])]
    for pattern in patterns:
        depth = pattern.count("/") + 1
        if any(fnmatch.fnmatchcase("/".join(path[-depth:]), pattern.lower()) for path in paths):
            return True
    return False


def _segments(uri: str) -> list[str]:
    return _SEPARATOR.split(unquote(uri).lower())


def _num_certain(lines: Sequence[str]) -> int:
    text = "\n".join([line.rstrip("\r\n") for line in lines])
    return sum(found is Grade.CERTAIN for found in find_secrets(text).values())


def find_secrets(text: str) -> dict[int, Grade]:
    """The lines of a text that hold a secret, by number from 0."""
    found: dict[int, Grade] = {}
    line, begin = 0, 0
    for at in _suspicious(text):
        if at < begin:
            continue
        line += text.count("\n", begin, at)
        begin = text.rfind("\n", 0, at) + 1
        end = text.find("\n", at)
        end = len(text) if end < 0 else end
        if worst := grade(text[begin:end]):
            found[line] = worst
        line, begin = line + 1, end + 1
    return found


def _suspicious(text: str) -> list[int]:
    """Where something stands that a detector might take for a secret, in order."""
    lower = text.lower()
    if len(lower) != len(text):
        # A few letters become two when they are made small; those places would be wrong.
        lower = "".join(char.lower() if char.isascii() else "?" for char in text)
    places = [match.start() for match in _ARTIFACTORY.finditer(text)]
    for word in (*_PASSWORD_WORDS, *_TOKEN_WORDS, *_SHAPE_WORDS):
        at = lower.find(word)
        while at >= 0:
            places.append(at)
            # The rest of the line is judged with it.
            at = lower.find("\n", at)
            at = lower.find(word, at) if at >= 0 else -1
    for match in _LONG_RUN.finditer(text):
        run = match.group()
        if len(set(run)) >= _MIN_ALPHABET or any(map(str.isdigit, run)):
            places.append(match.start())
    return sorted(places)


def grade(line: str) -> Grade:
    """The grade of one line. Of a very long one the ends are judged, and it is a possible secret anyway."""
    if len(line) > _MAX_LINE:
        return max(Grade.POSSIBLE, _grade(line[:_MAX_LINE]), _grade(line[-_MAX_LINE:]))
    return _grade(line.strip())


@lru_cache(maxsize=8192)
def _grade(line: str) -> Grade:
    if _PRIVATE_KEY.search(line) or _YOUNGER_SHAPES.search(line):
        return Grade.CERTAIN
    worst = Grade.NONE
    for match in _ASSIGNED.finditer(line):
        quoted, bare, bearer = match.groups()
        worst = max(worst, _grade_value(quoted or bearer) if bare is None else _grade_bare(bare))
    for plugin in _detectors():
        for secret in plugin.analyze_line(filename="", line=line):
            if plugin.secret_type not in _VAGUE:
                return Grade.CERTAIN
            worst = max(worst, _grade_vague(plugin.secret_type, secret.secret_value or ""))
    return worst


def _grade_vague(secret_type: str, value: str) -> Grade:
    if secret_type == "Hex High Entropy String":  # noqa: S105 - the detector's name
        return Grade.POSSIBLE if len(value) >= _MIN_HEX else Grade.NONE
    if secret_type == "Base64 High Entropy String":  # noqa: S105 - the detector's name
        return Grade.POSSIBLE
    return _grade_value(value)


def _grade_value(value: str) -> Grade:
    """Tell a placeholder, a word and a real secret apart, of what a name like `password` is given."""
    if len(value) < _MIN_VALUE or _PLACEHOLDER.search(value) or _UUID.match(value) or " " in value:
        return Grade.NONE
    digits = sum(map(str.isdigit, value))
    letters = sum(map(str.isalpha, value))
    if len(value) >= 8 and digits and letters and len(set(value)) >= 6:
        return Grade.CERTAIN
    return Grade.POSSIBLE


def _grade_bare(value: str) -> Grade:
    """The same of a value without quotes, which in code is mostly an expression."""
    return _grade_value(value) if sum(map(str.isdigit, value)) >= 3 else Grade.NONE


def prepare() -> None:
    """Import the detectors, so that the first line does not wait for that."""
    _detectors()


@cache
def _detectors() -> tuple[Any, ...]:
    from detect_secrets.core.plugins.util import (  # noqa: PLC0415 - see the module
        get_mapping_from_secret_type_to_class,
    )

    plugins = (plugin() for plugin in get_mapping_from_secret_type_to_class().values())
    return tuple(plugin for plugin in plugins if plugin.secret_type not in _LEFT_OUT)
