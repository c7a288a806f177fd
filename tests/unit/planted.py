"""Made-up secrets of many kinds, new in every run, so that no file of ours holds one."""

import base64
import json
import random
import string

_ALNUM = string.ascii_letters + string.digits


def _of(rng, alphabet, length):
    # With a digit and enough variety: a draw without them would not look like the real thing.
    while True:
        text = "".join(rng.choice(alphabet) for _ in range(length))
        if any(map(str.isdigit, text)) and len(set(text)) > min(length, len(alphabet)) // 2:
            return text


def certain(rng=None):
    """{kind: (line of a file, the secret in it)} of what makes a whole file a secret."""
    rng = rng or random.Random()  # noqa: S311 - nothing here is kept
    hexes = string.hexdigits[:16]
    header, claims = (
        base64.urlsafe_b64encode(json.dumps(part).encode()).decode().rstrip("=")
        for part in ({"alg": "HS256", "typ": "JWT"}, {"sub": _of(rng, string.digits, 10), "name": "A B"})
    )
    jwt = f"{header}.{claims}.{_of(rng, _ALNUM, 43)}"
    secrets = {
        "AWS key": "AKIA" + _of(rng, string.ascii_uppercase + string.digits, 16),
        "GitHub token": "ghp_" + _of(rng, _ALNUM, 36),
        "GitHub fine-grained": "github_pat_" + _of(rng, _ALNUM, 40),
        "GitLab token": "glpat-" + _of(rng, _ALNUM, 20),
        "Slack token": f"xoxb-{_of(rng, string.digits, 12)}-{_of(rng, _ALNUM, 24).lower()}",
        "Stripe key": "sk_live_" + _of(rng, _ALNUM, 24),
        "npm token": "npm_" + _of(rng, _ALNUM, 36),
        "Google key": "AIza" + _of(rng, _ALNUM, 35),
        "Hugging Face": "hf_" + _of(rng, _ALNUM, 34),
        "OpenAI": "sk-proj-" + _of(rng, _ALNUM, 48),
        "Anthropic": "sk-ant-" + _of(rng, _ALNUM, 40),
        "SendGrid": f"SG.{_of(rng, _ALNUM, 22)}.{_of(rng, _ALNUM, 43)}",
        "Telegram": f"{_of(rng, string.digits, 9)}:{_of(rng, _ALNUM, 35)}",
        "Twilio": "SK" + _of(rng, string.ascii_lowercase + string.digits, 32),
        "Mailchimp": _of(rng, string.ascii_lowercase + string.digits, 32) + "-us12",
        "PyPI": "pypi-AgEIcHlwaS5vcmc" + _of(rng, _ALNUM, 80),
        "JWT": jwt,
        "Shopify": "shpat_" + _of(rng, hexes, 32),
    }
    planted = {kind: (f'    value = call("{secret}", 1)', secret) for kind, secret in secrets.items()}
    password, word = _of(rng, _ALNUM, 14), _of(rng, _ALNUM, 12)
    planted |= {
        "password in code": (f'password = "{password}"', password),
        "password in JSON": (f'  "db_password": "{password}",', password),
        "password in an argument": (f"connect(user='a', password='{password}')", password),
        "token in a shell": (f"export API_TOKEN={password}42x7", password),
        "secret key in YAML": (f"secret_key: '{password}'", password),
        "bearer": (f'curl -H "Authorization: Bearer {_of(rng, _ALNUM, 10)}{word}"', word),
        "password in a URL": (f'url = "postgres://admin:{word}@db.internal/x"', word),
        "private key": ("-----BEGIN RSA PRIVATE KEY-----", "BEGIN RSA PRIVATE KEY"),
        "SSH key": ("-----BEGIN OPENSSH PRIVATE KEY-----", "BEGIN OPENSSH PRIVATE KEY"),
    }
    return planted


def possible(rng=None):
    """The same of what is kept out of the context with the lines around it."""
    rng = rng or random.Random()  # noqa: S311
    encoded, hexed = _of(rng, _ALNUM + "+/", 64), _of(rng, string.hexdigits[:16], 40)
    word = "".join(rng.choice(string.ascii_lowercase) for _ in range(12))
    return {
        "random base64": (f'salt = "{encoded}"', encoded),
        "random hex": (f"digest = '{hexed}'", hexed),
        "a word as password": (f'PASSWORD = "{word}"', word),
    }
