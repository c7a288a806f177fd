"""The secret filter: files by name, and lines by content, that must not be shown to a model.

A file is secret by its name (the setting `excluded_files`) or by a line in it. Lines are judged by the
formats of tokens and by assignments to names like `api_token` (both in `secret_shapes`). No secret is
verified with its service: that would need the network.

There are two severities, because a wrong guess costs differently. A POSSIBLE secret (any quoted text that
looks random) is kept out of the context of other files. A CERTAIN one (a token of a known format, a private
key, a password that is not a placeholder) makes its whole file secret.

Takes time at most proportional to the text's length. Pure; any thread. `secret_watch` judges open documents.
"""

from __future__ import annotations

import base64
import fnmatch
import math
import re
from collections import Counter
from enum import IntEnum
from functools import lru_cache
from urllib.parse import unquote

from midfill.text.secret_shapes import (
    LONG_RUN,
    NAME_WORDS,
    Assigned,
    assigned,
    bearer_tokens,
    carried_passwords,
    has_private_key,
    has_token,
    is_published,
    is_sample_jwt,
    names_private_key,
)

# Files in which tools keep passwords, tokens and private keys.
SECRET_FILES = (
    *(".env", ".env.*", "*.env", ".envrc", "*.pem", "*.key", "*.pfx", "*.p12", "*.p8", "*.jks"),
    *("*.keystore", "*.kdbx", "*.ppk", "*.ovpn", "id_rsa*", "id_dsa*", "id_ecdsa*", "id_ed25519*"),
    *(".netrc", "_netrc", ".npmrc", ".yarnrc.yml", ".pypirc", ".pgpass", ".my.cnf", ".htpasswd"),
    *(".git-credentials", ".dockercfg", ".docker/config.json", ".kube/config"),
    *(
        "kubeconfig",
        "kubeconfig.y*ml",
        "kubeconfig.json",
        "kubeconfig.conf",
        "*.kubeconfig",
        "*[-_]kubeconfig",
    ),
    *("*[-_]kubeconfig.y*ml", "kubeconfig[-_.]*.y*ml"),
    *(".aws/credentials", "credentials", "credentials.json", "credentials.toml", "credentials.yml"),
    *("credentials.yaml", "service-account*.json", "secrets.json", "secrets.toml", "secrets.yml"),
    *("secrets.yaml", ".vault*", "*.tfstate", "*.tfstate.backup", "*.tfvars"),
)

# Also the colon of URIs without a path ("untitled:.env"), and the separator of Windows.
_SEPARATOR = re.compile(r"[/\\:]+")
_QUERY = re.compile(r"[?#]")

# A longer line is data: it is a possible secret in any case, and judged in overlapping pieces.
MAX_LINE = 2_000
_OVERLAP = 400

_PLACEHOLDER = re.compile(
    r"[<{$%\[(]|\.\.\.|(?-i:x{4}|X{4})|\*{3}|example|placeholder|change.?me|your|dummy|fake|redacted|^test"
    r"|^(?:my|the|some|old|new)?_?(?:secret|pass|passwd|password|pwd|token|none|null|key)[_-]?\d{0,3}$",
    re.IGNORECASE,
)
# Values chosen where any password would do: a word for it, also with digits for letters, or keys next to each
# other.
_LIKE_LETTERS = str.maketrans("0134578$@!", "oieastbsai")
_LIKE_PASSWORD = re.compile(
    r"passw|pasw|secret|^pass|pass$|userpass|changeit|letmein|qwerty|admin|correcthorse|security|pa[se]{2}word"
    # What everybody knows as one.
    r"|^hunter.{1,4}$"
)
_COUNTED = re.compile(
    r"abc123|123abc|(?<!\d)(?:0?12345|1234\D{0,3}\Z|[a-z]123\D{0,3}\Z)|abcdef|aaaaaa", re.IGNORECASE
)
# Every line with a secret contains one of these, or a long run of letters and digits.
_LITERALS = (
    *NAME_WORDS,
    "bearer",
    "basic",
    "://",
    "sig=",
    "private key",
    "putty-user-key-file",
    "begin ssh2",
)
_UUID = re.compile(r"[\da-f]{8}(?:-[\da-f]{4}){2,3}-[\da-f]{12}\Z", re.IGNORECASE)
# Shorter values are ambiguous: `"deadbeef"`, a colour, an abbreviated commit.
_MIN_HEX = 20
_MIN_VALUE = 6
# Shorter ones may be the encoding of a text by chance.
_MIN_ENCODED = 20
_RANDOM_CHARS = re.compile(r"""(["'])([A-Za-z0-9+/=_\\-]{20,2000}+)\1""")
_HEX = re.compile(r"[0-9a-fA-F]+\Z")
# The alphabet's size bounds the entropy: 4.5 bits a character need 23 different ones.
_MIN_ALPHABET = 23
# A location: a URL without a password, a path, a name with dots or of Amazon's form. Or a rate, such as `5/m`
# or `100/hour`.
_LOCATION = re.compile(
    r"[a-z][a-z0-9+.-]{1,20}://|arn:[a-z-]{1,20}:"
    r"|\.{0,2}/|~|\d{4}-\d\d-\d\d|[A-Za-z]:\\|[A-Za-z_][\w-]*(?:\.[A-Za-z_][\w-]*)+\Z"
    r"|\d{1,6}/\d{0,3}(?:s|sec|m|min|h|d|seconds?|minutes?|hours?|days?)(?![A-Za-z0-9])"
)
_CHUNK = re.compile(r"[A-Za-z0-9]+")
_WORD_LIKE = re.compile(
    r"\d{1,8}\Z|\d{0,2}(?:[a-z]+|[A-Z]+|[A-Z][a-z]+|[A-Z]?[a-z]{2,}(?:[A-Z][a-z]{2,})+)\d{0,4}\Z"
    # Versioned type names, such as `V1beta1EndpointSlice`.
    r"|[A-Z]{1,2}\d{1,2}(?:(?:alpha|beta)\d{1,2})?(?:[A-Z][a-z]{2,}){2,}\Z"
    r"|(?=.{1,9}\Z)(?:[a-z]+|[A-Z]+)\d{1,2}(?:[a-z]+|[A-Z]+)\d{0,2}\Z"
)
_CONSONANTS = re.compile(r"[b-df-hj-np-tv-xz]{6}", re.IGNORECASE)


class Severity(IntEnum):
    """How certain it is that a line holds a secret."""

    NONE = 0
    POSSIBLE = 1
    CERTAIN = 2


@lru_cache(maxsize=256)
def is_excluded(uri: str, patterns: tuple[str, ...]) -> bool:
    """Return whether a URI or path matches one of the patterns; case does not matter.

    A pattern without a slash is for the file's name; one with slashes for the end of the path
    (".aws/credentials").
    """
    # Not by `urlsplit`: it raises for some, and editors escape `?` and `#` in different ways.
    paths = [_segments(uri), _segments(_QUERY.split(uri, maxsplit=1)[0])]
    for pattern in patterns:
        depth = pattern.count("/") + 1
        if any(fnmatch.fnmatchcase("/".join(path[-depth:]), pattern.lower()) for path in paths):
            return True
    return False


def _segments(uri: str) -> list[str]:
    return _SEPARATOR.split(unquote(uri).lower())


def find_secrets(text: str) -> dict[int, Severity]:
    """Return the lines of a text that may hold a secret: number, from 0, to severity."""
    found: dict[int, Severity] = {}
    line, begin = 0, 0
    for at in _suspicious(text):
        if at < begin:
            continue
        line += text.count("\n", begin, at)
        begin = text.rfind("\n", 0, at) + 1
        end = text.find("\n", at)
        end = len(text) if end < 0 else end
        if worst := severity(text[begin:end]):
            found[line] = worst
        line, begin = line + 1, end + 1
    return found


def _suspicious(text: str) -> list[int]:
    """Yield the offsets at which a secret may be, in order; at least one in each such line."""
    lower = _lowered(text)
    offsets = []
    for word in _LITERALS:
        at = lower.find(word)
        while at >= 0:
            offsets.append(at)
            # The rest of the line is judged with it.
            at = lower.find("\n", at)
            at = lower.find(word, at) if at >= 0 else -1
    offsets += [run.start() for run in LONG_RUN.finditer(text) if _is_varied(run[0])]
    return sorted(offsets)


def _is_varied(run: str) -> bool:
    return any(map(str.isdigit, run)) or len(set(run)) >= _MIN_ALPHABET


def _lowered(text: str) -> str:
    """Return a text in lower case with the same length: a few letters would become two."""
    lower = text.lower()
    if len(lower) == len(text):
        return lower
    return "".join(char.lower() if char.isascii() else "?" for char in text)


def severity(line: str) -> Severity:
    """Return the severity of one line."""
    if len(line) <= MAX_LINE:
        return _severity(line.strip())
    worst = Severity.POSSIBLE
    for begin in range(0, len(line) - _OVERLAP, MAX_LINE - _OVERLAP):
        worst = max(worst, _severity(line[begin : begin + MAX_LINE]))
        if worst is Severity.CERTAIN:
            break
    return worst


def _severity(line: str) -> Severity:
    lower = _lowered(line)
    long_run = "sig=" in lower or any(map(_is_varied, LONG_RUN.findall(line)))
    if (long_run and has_token(line, lower)) or has_private_key(line, lower):
        return Severity.CERTAIN
    worst = Severity.NONE
    if any(word in lower for word in NAME_WORDS):
        for one in assigned(line):
            worst = max(worst, _severity_assigned(one))
    for value in bearer_tokens(line, lower):
        worst = max(worst, _severity_value(value) if _looks_random(value) else Severity.POSSIBLE)
    for value in carried_passwords(line, lower):
        worst = max(worst, _severity_value(value))
    if worst is Severity.NONE and (_has_random_text(line) or names_private_key(line)):
        return Severity.POSSIBLE
    return worst


def _has_random_text(line: str) -> bool:
    """Return whether quoted text looks random: a digest, a key, base64 data."""
    for found in _RANDOM_CHARS.finditer(line):
        run = found[2]
        if _HEX.match(run):
            if len(run) >= _MIN_HEX and not run.isdigit() and _entropy(run) > 3.0:
                return True
        elif len(set(run)) >= _MIN_ALPHABET and _entropy(run) > 4.5:
            return True
    return False


def _entropy(text: str) -> float:
    return -sum(n / len(text) * math.log2(n / len(text)) for n in Counter(text).values())


def _severity_assigned(one: Assigned) -> Severity:
    found = _severity_value(one.value)
    if found is not Severity.CERTAIN:
        return found if one.quoted else Severity.NONE
    if _LOCATION.match(one.value) or (not one.quoted and sum(map(str.isdigit, one.value)) < 3):
        return Severity.NONE
    if one.password and one.exact:
        read = one.value.lower().translate(_LIKE_LETTERS)
        return Severity.POSSIBLE if _LIKE_PASSWORD.search(read) else found
    # Tokens and keys are generated by machines; `gpt2-medium` is neither.
    if not _looks_random(one.value) or (not one.exact and len(one.value) < 16):
        return Severity.POSSIBLE
    return found


def _severity_value(value: str) -> Severity:
    """Tell a placeholder, a word and a real secret apart, for the value of a name like `password`."""
    if len(value) < _MIN_VALUE or _PLACEHOLDER.search(value) or _UUID.match(value) or " " in value:
        return Severity.NONE
    if _COUNTED.search(value) or is_published(value) or is_sample_jwt(value):
        return Severity.POSSIBLE
    digits = sum(map(str.isdigit, value))
    letters = sum(map(str.isalpha, value))
    if len(value) >= 8 and digits and letters and len(set(value)) >= 6:
        return Severity.CERTAIN
    return Severity.POSSIBLE


def _looks_random(value: str) -> bool:
    """Return whether a value does not consist of words and numbers, as names do."""
    return not all(map(_is_word, _CHUNK.findall(_encoded_text(value) or value)))


def _encoded_text(value: str) -> str | None:
    """Return the text that a value encodes in base64, such as JSON; None if it encodes none.

    That random bytes are a text of this length is as good as impossible.
    """
    if len(value) < _MIN_ENCODED:
        return None
    try:
        text = base64.urlsafe_b64decode(value + "=" * (-len(value) % 4)).decode("ascii")
    except ValueError:
        return None
    return text if text.isprintable() else None


def _is_word(chunk: str) -> bool:
    return _WORD_LIKE.match(chunk) is not None and _CONSONANTS.search(chunk) is None
