"""Formats of secrets: fixed formats of tokens, and names that passwords and keys are assigned to.

The formats are those that the services document. A row is a literal that every such token has, and a pattern,
which is tried only where the literal occurs. Every repetition has an upper limit, so that a line takes time
at most proportional to its length, whatever it holds.

Pure data and pure functions; any thread. The patterns are compiled for the first line that needs them.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

# Letters and digits; the same plus the two of base64 for URLs; lower-case hexadecimal.
_A, _W, _H = "[A-Za-z0-9]", "[A-Za-z0-9_-]", "[a-f0-9]"
_UUID = f"{_H}{{8}}-{_H}{{4}}-{_H}{{4}}-{_H}{{4}}-{_H}{{12}}"

# Tokens that begin with a literal: (literal, pattern of the rest).
_PREFIXED = (
    *[(kind, "[0-9A-Z]{16}(?![0-9A-Za-z])") for kind in ("AKIA", "ASIA", "ABIA", "ACCA")],  # AWS
    *[(f"gh{kind}_", f"{_A}{{36}}") for kind in "pousr"],  # GitHub
    ("github_pat_", "[A-Za-z0-9_]{22,200}"),
    *[(f"gl{kind}-", f"{_W}{{20,200}}") for kind in ("pat", "dt", "ft", "soat", "rt", "cbt", "ptt", "imt")],
    *[(f"gl{kind}-", f"{_W}{{20,200}}") for kind in ("agent", "oas", "ffct")],  # GitLab, the rest
    ("GR1348941", f"{_W}{{20,50}}"),
    *[(f"xox{kind}-", r"\d{1,20}-[A-Za-z0-9-]{10,200}") for kind in "abposre"],  # Slack
    ("xoxe.xox", "[bp]-[0-9]-[A-Za-z0-9]{100,200}"),
    ("xapp-", r"\d-[A-Z0-9]{1,20}-\d{1,20}-[a-z0-9]{10,100}"),
    (
        "hooks.slack.com/",
        r"(?:services|workflows)/T[A-Za-z0-9_]{6,20}/[AB][A-Za-z0-9_]{6,20}/[A-Za-z0-9_]{15,60}",
    ),
    *[
        (f"{kind}k_{mode}_", f"{_A}{{24,200}}") for kind in "sr" for mode in ("live", "test", "prod")
    ],  # Stripe
    ("whsec_", "[A-Za-z0-9+/=]{24,100}"),
    ("npm_", f"{_A}{{36}}"),
    ("AIza", f"{_W}{{35}}"),  # Google
    ("GOCSPX-", f"{_W}{{28}}"),
    ("ya29.", f"{_W}{{20,200}}"),
    ("hf_", f"{_A}{{30,60}}"),  # Hugging Face
    ("api_org_", "[A-Za-z]{34}"),
    ("sk-ant-", f"{_W}{{20,200}}"),  # Anthropic
    *[
        (f"sk-{kind}-", f"{_W}{{20,200}}") for kind in ("proj", "svcacct", "admin", "or-v1", "lf")
    ],  # OpenAI, others
    ("sk-", f"{_A}{{32,100}}(?!{_W})"),
    ("gsk_", f"{_A}{{40,80}}"),  # Groq
    ("xai-", f"{_A}{{70,90}}"),
    ("pplx-", f"{_A}{{40,60}}"),  # Perplexity
    ("r8_", f"{_A}{{37}}(?!{_A})"),  # Replicate
    ("pcsk_", "[A-Za-z0-9_]{50,90}"),  # Pinecone
    ("lsv2_", f"(?:pt|sk)_{_H}{{32}}_{_H}{{10}}"),  # LangSmith
    ("SG.", f"{_W}{{22}}\\.{_W}{{43}}"),  # SendGrid
    ("xkeysib-", f"{_H}{{64}}-{_A}{{16}}"),  # Brevo
    *[(f"pypi-{kind}", f"{_W}{{50,200}}") for kind in ("AgEIcHlwaS5vcmc", "AgENdGVzdC5weXBpLm9yZw")],
    ("rubygems_", f"{_H}{{48}}"),
    ("CLOJARS_", f"{_H}{{60}}"),
    ("dckr_pat_", f"{_W}{{27}}"),  # Docker
    ("dckr_oat_", f"{_W}{{32}}"),
    *[(f"shp{kind}_", "[a-fA-F0-9]{32}") for kind in ("at", "ca", "pa", "ss")],  # Shopify
    *[(f"do{kind}_v1_", f"{_H}{{64}}") for kind in "opr"],  # DigitalOcean
    *[
        (f"dp.{kind}.", "[A-Za-z0-9._-]{40,60}") for kind in ("st", "pt", "ct", "sa", "scim", "audit")
    ],  # Doppler
    *[(f"hv{kind}.", f"{_W}{{24,200}}") for kind in "sbr"],  # HashiCorp Vault
    ("dapi", f"{_H}{{32}}(?:-\\d)?(?!{_A})"),  # Databricks
    ("v1.0-", f"{_H}{{24}}-{_H}{{100,200}}"),  # Cloudflare
    ("lin_api_", f"{_A}{{32,60}}"),  # Linear
    ("lin_oauth_", f"{_A}{{32,80}}"),
    ("ntn_", f"{_A}{{40,60}}"),  # Notion
    ("secret_", f"{_A}{{43}}(?!{_W})"),
    *[(f"fig{kind}_", f"{_W}{{40,60}}") for kind in "dour"],  # Figma
    ("NRAK-", "[A-Z0-9]{27}"),  # New Relic
    ("NRJS-", f"{_H}{{19}}"),
    ("NRII-", f"{_W}{{32}}"),
    *[(f"AT{kind}TT3", "[A-Za-z0-9_=-]{50,200}") for kind in "AC"],  # Atlassian
    ("ATBB", f"{_A}{{24,40}}(?!{_A})"),  # Bitbucket
    ("glc_", "[A-Za-z0-9+/]{32,200}"),  # Grafana
    ("glsa_", f"{_A}{{32}}_[A-Fa-f0-9]{{8}}"),
    ("sntrys_", "[A-Za-z0-9+/=_]{40,200}"),  # Sentry
    ("sntryu_", f"{_H}{{64}}"),
    *[(f"fm{kind}_", "[A-Za-z0-9+/=]{50,200}") for kind in "12"],  # Fly.io
    ("HRKU-", f"{_W}{{36,80}}"),  # Heroku
    *[(f"pscale_{kind}_", "[A-Za-z0-9_.=-]{32,64}") for kind in ("tkn", "pw", "oauth")],  # PlanetScale
    ("PMAK-", f"{_H}{{24}}-{_H}{{34}}"),  # Postman
    ("pul-", f"{_H}{{40}}(?!{_A})"),  # Pulumi
    ("pnu_", f"{_A}{{36}}(?!{_A})"),  # Prefect
    ("rdme_", "[a-z0-9]{70}"),  # ReadMe
    ("CCIPAT_", f"{_A}{{20,30}}_{_H}{{40}}"),  # CircleCI
    ("bkua_", f"{_H}{{40}}"),  # Buildkite
    *[(f"sq{kind}_", f"{_H}{{40}}(?!{_A})") for kind in "pua"],  # SonarQube
    ("sgp_", f"(?:[A-Fa-f0-9]{{16}}_|local_)?{_H}{{40}}"),  # Sourcegraph
    ("tskey-", f"(?:api|auth|client|webhook)-{_A}{{8,40}}-{_A}{{20,60}}"),  # Tailscale
    ("sbp_", f"{_H}{{40}}"),  # Supabase
    ("sb_secret_", f"{_W}{{22,60}}"),
    ("nfp_", f"{_A}{{36,60}}"),  # Netlify
    ("PRIVATE-", f"{_A}{{32,64}}-{_A}{{8,32}}(?!{_A})"),
    ("sq0csp-", f"{_W}{{43}}"),  # Square
    ("sq0atp-", f"{_W}{{22}}"),
    ("EAAA", f"{_W}{{60}}(?!{_W})"),
    ("access_token$production$", f"[a-z0-9]{{16}}\\${_H}{{32}}"),  # PayPal's Braintree
    ("rzp_live_", f"{_A}{{14,40}}"),  # Razorpay
    ("FLWSECK", f"_?(?:TEST)?-{_H}{{32}}"),  # Flutterwave
    ("shippo_live_", f"{_H}{{40}}"),
    ("LTAI", f"{_A}{{20}}(?!{_A})"),  # Alibaba Cloud
    ("dt0c01.", "[A-Z0-9]{24}\\.[A-Z0-9]{64}"),  # Dynatrace
    ("CFPAT-", f"{_W}{{43}}"),  # Contentful
    ("tfp_", "[A-Za-z0-9_.=-]{59}"),  # Typeform
    ("pat.", f"{_W}{{22}}\\.{_H}{{24}}\\.{_A}{{20}}"),  # Harness
    ("EZAK", f"{_A}{{54}}"),  # EasyPost
    ("AKC", f"{_A}{{40,100}}(?!{_A})"),  # JFrog Artifactory
    ("cmVmd", f"{_A}{{59}}(?!{_A})"),
    (
        "A3-",
        "[A-Z0-9]{6}-(?:[A-Z0-9]{11}|[A-Z0-9]{6}-[A-Z0-9]{5})-[A-Z0-9]{5}-[A-Z0-9]{5}(?![A-Z0-9])",
    ),  # 1Password
    ("ops_eyJ", "[A-Za-z0-9+/]{200}"),
    ("AGE-SECRET-KEY-1", "[A-Z0-9]{58}"),
    ("sha256~", f"{_W}{{43}}(?!{_W})"),  # OpenShift
    ("AQVN", f"{_W}{{35,38}}(?!{_W})"),  # Yandex Cloud
    ("oy2", "[a-z0-9]{43}(?!{_A})".replace("{_A}", _A)),  # NuGet
    ("figma_", f"{_W}{{40,60}}"),
)
# Tokens that contain a literal or are next to one: (literal in lower case, pattern).
_AROUND = (
    # Telegram's and Discord's bots, and Discord's webhooks.
    (":", rf"(?<![0-9A-Za-z])\d{{8,10}}:{_W}{{35}}(?!{_W})"),
    (".", rf"(?<!{_W})[MNO]{_W}{{23,27}}+\.{_W}{{6}}\.{_W}{{27,40}}+(?!{_W})"),
    ("/api/webhooks/", rf"/api/webhooks/(?<=discord\.com/api/webhooks/)\d{{15,22}}/{_W}{{50,100}}"),
    ("/api/webhooks/", rf"/api/webhooks/(?<=discordapp\.com/api/webhooks/)\d{{15,22}}/{_W}{{50,100}}"),
    # Azure: signatures of shared links, keys of storage and of applications.
    ("sig=", r"sig=(?<=[?&;]sig=)(?=[A-Za-z0-9+/%]{43})(?:[A-Za-z0-9+/]|%2[BbFf]){40,100}+(?:%3[Dd]|=)"),
    ("accountkey=", r"AccountKey=[A-Za-z0-9+/]{40,90}+={0,2}"),
    ("sharedaccesskey=", r"SharedAccessKey=[A-Za-z0-9+/]{40,90}+={0,2}"),
    ("q~", r"(?<![A-Za-z0-9_~.-])[A-Za-z0-9_~.]{3}\dQ~[A-Za-z0-9_~.-]{31,34}+(?![A-Za-z0-9_~.-])"),
    *[(kind.lower(), rf"{kind}(?<!{_A}{kind})[a-z0-9]{{32}}(?!{_A})") for kind in ("SK", "AC")],  # Twilio
    ("-us", rf"(?<!{_A})[0-9a-z]{{32}}-us\d{{1,2}}(?!\d)"),  # Mailchimp
    ("00", rf"00(?<!{_W}00)[A-Za-z]{_W}{{39}}(?!{_W})"),  # Okta
    (".atlasv1.", rf"{_A}{{14}}\.atlasv1\.{_W}{{60,70}}"),  # Terraform Cloud
    ("_authtoken", rf"_authToken\s{{0,4}}=\s{{0,4}}(?:{_UUID}|[A-Za-z0-9+/=_-]{{30,200}})"),  # npm
    ("pat", rf"pat(?<!{_A}pat){_A}{{14}}\.{_H}{{64}}"),  # Airtable
    ("key-", rf"key-(?<!{_A}key-){_H}{{32}}(?!{_A})"),  # Mailgun
    ("api.softlayer.com", r"api\.softlayer\.com/soap/v3(?:\.1)?/[a-z0-9]{64}"),
    # The beginnings of encoded private RSA, EC, Ed25519 and OpenSSH keys, whose header is on the line before;
    # and "-----BEGIN ... PRIVATE KEY" itself in base64, as in Kubernetes' files.
    ("mii", r"MII(?<![A-Za-z0-9+/]MII)[A-Za-z0-9+/]{2}[AQgw]IBA[A-Za-z0-9+/]{20,80}+(?!\.{3})"),
    *[
        (begin.lower(), f"{begin}(?<![A-Za-z0-9+/]{begin})[A-Za-z0-9+/]{{10,80}}+(?!\\.{{3}})")
        for begin in (
            *("MHcCAQEEI", "MIGkAgEBBD", "MIHcAgEBBEI", "MIGHAgEAMBMGByqGSM49", "MC4CAQAwBQYDK2VwBCIEI"),
            "b3BlbnNzaC1rZXktdjEA",
        )
    ],
    (
        "ls0tls1crudjti",
        r"LS0tLS1CRUdJTi[A-Za-z0-9+/]{0,12}(?:BQUklWQVRFIEtFW|UFJJVkFURSBLRV|QUklWQVRFIEtFW)",
    ),
)
# The header of a private key. In quotes, programs search for it, unless the key follows.
_PEM = re.compile(
    r"-----BEGIN [A-Z0-9 ]{0,30}PRIVATE KEY(?: BLOCK)?(?:-----)?|---- BEGIN SSH2 ENCRYPTED PRIVATE KEY"
)
_PUTTY = re.compile(r"PuTTY-User-Key-File-\d: (?:ssh|ecdsa)-")
_KEY_BODY = re.compile(r"(?:\\r|\\n|\s|[\"'`+,.;]){0,12}+[A-Za-z0-9+/]{24}")
_JWT = re.compile(rf"(?<!{_W})eyJ({_W}{{6,2000}}+)={{0,2}}\.eyJ({_W}{{4,4000}}+)={{0,2}}(?:\.{_W}{{10}})")

LONG_RUN = re.compile(r"[A-Za-z0-9+/=_\\-]{20,2000}+")
# Made-up tokens count, repeat, or say so.
_MADE_UP = re.compile(
    r"example|placeholder|x{5}|\*{3}|0{7}|1{7}|1234567|7654321|abcdefg|deadbeef|\.\.\.",
    re.IGNORECASE,
)
# Values printed in standards and manuals, and quoted by programs: nobody's secrets. By source.
_PUBLISHED = re.compile(
    "|".join(
        [
            *("dpf43f3p2l4k3l03", "kd94hf93k423kf44", "pfkkdhi9sl3r4s00", "nnch734d00sl2jdk"),  # OAuth 1.0
            *("hh5s93j4hdidpola", "hdhd0244k9j7ao03", "kkk9d7dh3k39sjv7", "j49sk3j29djd"),  # RFC 5849
            *("dh893hdasih9", "ad180jjd733klru7", "jjd999tj88uiths3", "h480djs93hd8"),  # the same
            *("2YotnFZFEjr1zCsicMWpAA", "tGzv3JOkF0XG5Qx2TlKWIA", "7Fjfp0ZBr1KtDRbnfVdmIw"),  # RFC 6749
            *("gX1fBat3bV", "SplxlOBeZQQYbYS6WxSbIA", "czZCaGRSa3F0MzpnWDFmQmF0M2JW"),  # the same
            *(r"mF_9\.B5f-4\.1JqM", "vF9dft4qmT", "45ghiukldjahdnhzdauz"),  # RFC 6750, drafts, 7009
            *("SlAV32hkKG", "8xLOxBtZp8", "ZJYCqe3GGRvdrudKyZS0XhGv_Z45DuKhCR0gK"),  # OpenID Connect
            "cf136dc3c1fc93f31185e5885805d",  # RFC 7591
            *(
                "dBjftJeZ4C",
                "SflKxwRJSM",
            ),  # how the signatures of RFC 7515 and jwt.io begin, as `_JWT` takes them
            "Eby8vdM02xNO",  # every Azure Storage emulator
            *("0PN5J17HBGZHT7JJ3X82", "uV3F3YluFJax1cknvbcGwgjvx4Qp"),  # Amazon S3's first manual
            "09d25e094faa6ca2556c818166b7a9563b93f7099f6f0f4caa6cf63b88e8d3e7",  # FastAPI's manual
        ]
    )
)


@dataclass(frozen=True, slots=True)
class TokenFormat:
    """A token format: the literal (in lower case; "" for a long run of characters) and the pattern."""

    literal: str
    pattern: re.Pattern[str]


@cache
def shapes() -> tuple[TokenFormat, ...]:
    """Return all token formats."""
    prefixed = (
        TokenFormat(literal.lower(), re.compile(f"{re.escape(literal)}(?<!{_A}{re.escape(literal)}){rest}"))
        for literal, rest in _PREFIXED
    )
    return (*prefixed, *(TokenFormat(literal, re.compile(pattern)) for literal, pattern in _AROUND))


def prepare() -> None:
    """Compile the patterns, so that the first line does not wait for it."""
    shapes()


def has_token(line: str, lower: str) -> bool:
    """Return whether a line, also given in lower case, contains a token of a known format."""
    for shape in shapes():
        if shape.literal in lower and any(not is_made_up(found[0]) for found in shape.pattern.finditer(line)):
            return True
    return "eyj" in lower and _has_jwt(line)


def has_private_key(line: str, lower: str) -> bool:
    """Return whether a private key begins in a line."""
    if "begin" not in lower:
        return "putty-user" in lower and _PUTTY.search(line) is not None
    # A header that ends its line begins a key; a quoted one is searched for or written by a program.
    for found in _PEM.finditer(line):
        rest = line[found.end() :]
        if not rest.strip() or (_KEY_BODY.match(rest) and "..." not in rest[:120]):
            return True
    return False


def names_private_key(line: str) -> bool:
    """Return whether a line contains the header of a private key, with or without a key."""
    return _PEM.search(line) is not None


def is_made_up(token: str) -> bool:
    """Return whether a text in a token's format is an example: it says so, counts, or repeats."""
    return len(set(token)) < 8 or _MADE_UP.search(token) is not None or is_published(token)


def is_published(value: str) -> bool:
    """Return whether a value is an example from a standard or a manual."""
    return _PUBLISHED.search(value) is not None


def _has_jwt(line: str) -> bool:
    return any(
        not is_made_up(found[0]) and _json_text(found[1]) and not _is_sample(found)
        for found in _JWT.finditer(line)
    )


def is_sample_jwt(value: str) -> bool:
    """Return whether a value is a JWT that somebody has made up: nothing in its claims is a number."""
    found = _JWT.match(value)
    return found is not None and _is_sample(found)


def _is_sample(jwt: re.Match[str]) -> bool:
    # A server writes when a token ends, or for whom it is.
    text = _json_text(jwt[2])
    return not any(map(str.isdigit, text))


def _json_text(part: str) -> str:
    """Return the JSON that a part of a JWT, without its `eyJ`, encodes; "" if it encodes none.

    A claim set may be cut off at the pattern's limit: its beginning is enough.
    """
    part = "eyJ" + part
    try:
        text = base64.urlsafe_b64decode(part + "A" * (-len(part) % 4)).decode("utf-8", "ignore")
    except (ValueError, binascii.Error):
        return ""
    return text if text.startswith('{"') and '":' in text else ""


# Names of secrets: chosen by people, or made by machines.
_CHOSEN = (
    r"passw(?:or)?d|passphrase|pwd|contrase(?:ñ|n)a"
    r"|(?<![a-z])(?:(?:db|database|key|user|admin|root)[_-]?)?pass(?!wo?r?d|phrase)"
)
_KEY_OF = (
    "api|auth|aws|access|service|account|db|database|priv|private|client|secret|encryption|signing|master"
    "|license"
)
_MADE = rf"token|secret|credentials?|(?:{_KEY_OF})[_-]?key|key[_-]?pass"
# Every assignment to such a name contains one of these; faster than the pattern.
NAME_WORDS = ("passw", "passphrase", "pwd", "contrase", "pass", "token", "secret", "credential", "key")
_NOUN = re.compile(f"(?P<chosen>{_CHOSEN})|{_MADE}", re.IGNORECASE)
# A name and the text between it and its value; each name is read once. The text after `::` is a type.
_ASSIGNMENT = re.compile(
    r"""(?<![A-Za-z0-9_-]) (?<!::) (?P<name>[A-Za-z0-9_-]{3,100}+) ["'`\]\\]{0,4}+ [ \t]{0,20}+
        (?: :[ \t]{0,4}+ [A-Za-z][\w.\[\]]{0,40}+ [ \t]{0,4}+ (?==) )?+
        (?: :=|=>|\?=|={1,3}|:{1,2} ) [ \t]{0,20}+""",
    re.VERBOSE,
)
_VALUE = re.compile(
    r"""[brfuL@]{0,2}\\?["'`](?P<quoted>[^"'`\\\r\n]{1,300}+)\\?["'`]
      | (?P<bare>[^\s"'`,;(){}\[\]]{1,300}+) (?=\s|\Z)""",
    re.VERBOSE,
)
_BEARER = re.compile(r"\bbearer[ \t]{1,4}+([A-Za-z0-9._~+/-]{16,300}+)", re.IGNORECASE)
_BASIC = re.compile(r"\bbasic[ \t]{1,4}+([A-Za-z0-9+/]{8,300}+={0,2})", re.IGNORECASE)
# Before a name: its value is one, as in `Example api_key='...'`.
_EXAMPLE = re.compile(r"\b(?:example|e\.g\.)[:,]?[ \t]{1,4}+[`\"']?\Z", re.IGNORECASE)
_IN_ADDRESS = re.compile(r"://[^\s/:@,\"'<>{}$`]{0,100}+:(?<!//scott:)([^\s/@,\"'<>{}$`]{3,200}+)@")
# Before `token` and `key`, these name something that is not a secret.
_OTHER_KINDS = frozenset(
    [
        "public",
        "next",
        "previous",
        "prev",
        "continuation",
        "page",
        "paging",
        "pagination",
        "cursor",
        "sync",
        "csrf",
        "xsrf",
        "cancellation",
        "cancel",
        "pad",
        "eos",
        "bos",
        "unk",
        "mask",
        "cls",
        "sep",
        "eot",
        "special",
        "stop",
        "start",
        "end",
        "begin",
        "first",
        "last",
        "idempotency",
        "creation",
        "image",
        "audio",
        "video",
        "design",
    ]
)
# After the noun, these say that the value is computed from the secret, not the secret.
_DIGESTS = frozenset(["hash", "digest", "checksum", "fingerprint", "thumbprint"])
# The words of a name; "APIToken" has two, as "apiToken" and "API_TOKEN" have.
_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+")
# After the noun, these do not change what the name stands for.
_SAME = frozenset(
    [
        "key",
        "access",
        "value",
        "val",
        "prod",
        "production",
        "dev",
        "staging",
        "stage",
        "test",
        "live",
        "default",
        "raw",
        "text",
        "string",
        "str",
        "plain",
        "base",
        "b",
        "hex",
        "data",
        "old",
        "new",
        "current",
        "v",
    ]
)


@dataclass(frozen=True, slots=True)
class Assigned:
    """A value assigned to a name like `api_token`.

    Attributes:
        password: the name is that of a password, which people choose, not of a key or a token.
        quoted: the value is in quotes; else it may be an expression.
        exact: the name ends with the noun; else it may name a location, a kind or a reader.
    """

    value: str
    password: bool
    quoted: bool
    exact: bool


def assigned(line: str) -> Iterator[Assigned]:
    """Yield the values that a line assigns to names of passwords, keys and tokens."""
    for found in _ASSIGNMENT.finditer(line):
        name = found["name"]
        lower = name.lower()
        if not any(word in lower for word in NAME_WORDS):
            continue
        for noun in _NOUN.finditer(name):
            rest = name[noun.end() :]
            if _continues_word(noun[0][-1], rest) or (
                noun[0].lower().startswith(("token", "key")) and _is_other_kind(name[: noun.start()])
            ):
                continue
            if (value := _VALUE.match(line, found.end())) is None:
                break
            words = [word.lower() for word in _WORD.findall(rest)]
            if noun["chosen"] is None and not _DIGESTS.isdisjoint(words):
                break
            if _EXAMPLE.search(line, max(0, found.start() - 12), found.start()) is not None:
                break
            exact = all(word in _SAME or word.isdigit() for word in words)
            is_quoted = value["quoted"] is not None
            yield Assigned(value["quoted"] or value["bare"], noun["chosen"] is not None, is_quoted, exact)
            break


def _continues_word(last: str, rest: str) -> bool:
    """Return whether the following characters continue the word, as in `tokenizer`; not in `tokenURL`."""
    return rest[:1].isalpha() and (rest[0].islower() or last.isupper())


def _is_other_kind(before: str) -> bool:
    """Return whether the first words of a name make it harmless, as in `next_page_token`."""
    return any(word.lower() in _OTHER_KINDS for word in _WORD.findall(before)[-2:])


def bearer_tokens(line: str, lower: str) -> Iterator[str]:
    """Yield the tokens in request headers."""
    if "bearer" in lower:
        yield from (found[1] for found in _BEARER.finditer(line))


def carried_passwords(line: str, lower: str) -> Iterator[str]:
    """Yield passwords in request headers and in addresses."""
    if "basic" in lower:
        yield from (password for found in _BASIC.finditer(line) if (password := _decoded_password(found[1])))
    if "://" in lower:
        yield from (found[1] for found in _IN_ADDRESS.finditer(line))


def _decoded_password(encoded: str) -> str | None:
    try:
        text = base64.b64decode(encoded, validate=True).decode("ascii")
    except (ValueError, binascii.Error):
        return None
    user, colon, password = text.partition(":")
    return password if user and colon and text.isprintable() else None
