"""Made-up secrets of many kinds, new in every run, so that no file of ours holds one."""

import base64
import json
import random
import string

_ALNUM = string.ascii_letters + string.digits


def _of(rng, alphabet, length, *, varied=True):
    if not varied:
        return "".join(rng.choice(alphabet) for _ in range(length))
    # With a digit and enough variety: a draw without them would not look like the real thing.
    while True:
        text = "".join(rng.choice(alphabet) for _ in range(length))
        if any(map(str.isdigit, text)) and len(set(text)) > min(length, len(alphabet)) // 2:
            return text


def certain(rng=None):
    """{kind: (line of a file, the secret in it)} of what makes a whole file a secret."""
    rng = rng or random.Random()
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
        **_services(rng),
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
        "basic": (
            f'headers = {{"Authorization": "Basic {base64.b64encode(f"admin:{word}".encode()).decode()}"}}',
            base64.b64encode(f"admin:{word}".encode()).decode(),
        ),
        "SSH key": ("-----BEGIN OPENSSH PRIVATE KEY-----", "BEGIN OPENSSH PRIVATE KEY"),
    }
    return planted


def _services(rng):
    """{kind: token} of services whose tokens have a shape of their own, as they document them."""
    hexes, upper, b64 = string.hexdigits[:16], string.ascii_uppercase + string.digits, _ALNUM + "-_"
    signature = base64.b64encode(rng.randbytes(32)).decode().replace("+", "%2B").replace("/", "%2F")
    discord, slack = "https://discord.com/api/webhooks", "https://hooks.slack.com/services"
    uuid = "-".join(_of(rng, hexes, size) for size in (8, 4, 4, 4, 12))
    der = base64.b64encode(b"\x30\x82\x04\xa4\x02\x01\x00\x02\x82\x01\x01\x00" + rng.randbytes(60)).decode()
    return {
        "Vault": "hvs." + _of(rng, b64, 90),
        "Databricks": "dapi" + _of(rng, hexes, 32),
        "Discord bot": f"M{_of(rng, _ALNUM, 25)}.{_of(rng, _ALNUM, 6)}.{_of(rng, b64, 38)}",
        "Discord webhook": f"{discord}/{_of(rng, string.digits, 18)}/{_of(rng, b64, 68)}",
        "Azure SAS": f"https://x.blob.core.windows.net/c?sp=r&sig={signature.replace('=', '%3D')}",
        "Azure storage": "AccountKey=" + base64.b64encode(rng.randbytes(64)).decode(),
        "Azure application": f"{_of(rng, _ALNUM, 3)}8Q~{_of(rng, _ALNUM, 34)}",
        "Cloudflare": f"v1.0-{_of(rng, hexes, 24)}-{_of(rng, hexes, 146)}",
        "Doppler": "dp.st." + _of(rng, _ALNUM, 43),
        "Google client": "GOCSPX-" + _of(rng, b64, 28),
        "Linear": "lin_api_" + _of(rng, _ALNUM, 40),
        "Notion": "ntn_" + _of(rng, _ALNUM, 46),
        "Figma": "figd_" + _of(rng, b64, 40),
        "New Relic": "NRAK-" + _of(rng, upper, 27),
        "Atlassian": "ATATT3" + _of(rng, b64, 186),
        "Okta": "00" + _of(rng, string.ascii_letters, 1, varied=False) + _of(rng, b64, 39),
        "DigitalOcean": "dop_v1_" + _of(rng, hexes, 64),
        "Grafana": f"glsa_{_of(rng, _ALNUM, 32)}_{_of(rng, hexes, 8)}",
        "Docker": "dckr_pat_" + _of(rng, b64, 27),
        "Postman": f"PMAK-{_of(rng, hexes, 24)}-{_of(rng, hexes, 34)}",
        "RubyGems": "rubygems_" + _of(rng, hexes, 48),
        "Brevo": f"xkeysib-{_of(rng, hexes, 64)}-{_of(rng, _ALNUM, 16)}",
        "Tailscale": f"tskey-auth-{_of(rng, _ALNUM, 14)}-{_of(rng, _ALNUM, 32)}",
        "Terraform Cloud": f"{_of(rng, _ALNUM, 14)}.atlasv1.{_of(rng, b64, 67)}",
        "Sentry": "sntryu_" + _of(rng, hexes, 64),
        "PlanetScale": "pscale_pw_" + _of(rng, b64, 43),
        "Pulumi": "pul-" + _of(rng, hexes, 40),
        "SonarQube": "sqp_" + _of(rng, hexes, 40),
        "Supabase": "sbp_" + _of(rng, hexes, 40),
        "Square": "sq0csp-" + _of(rng, b64, 43),
        "Airtable": f"pat{_of(rng, _ALNUM, 14)}.{_of(rng, hexes, 64)}",
        "Slack webhook": f"{slack}/T{_of(rng, upper, 9)}/B{_of(rng, upper, 9)}/{_of(rng, _ALNUM, 24)}",
        "Slack app": f"xapp-1-A{_of(rng, upper, 10)}-{_of(rng, string.digits, 13)}-{_of(rng, hexes, 64)}",
        "Stripe webhook": "whsec_" + _of(rng, _ALNUM, 32),
        "Groq": "gsk_" + _of(rng, _ALNUM, 52),
        "OpenRouter": "sk-or-v1-" + _of(rng, hexes, 64),
        "Replicate": "r8_" + _of(rng, _ALNUM, 37),
        "Heroku": f"HRKU-{uuid}",
        "Fly.io": "fm2_" + _of(rng, _ALNUM, 120),
        "Dynatrace": f"dt0c01.{_of(rng, upper, 24)}.{_of(rng, upper, 64)}",
        "Artifactory": "AKCp" + _of(rng, _ALNUM, 69),
        "Mailgun": "key-" + _of(rng, hexes, 32),
        "PyPI, for tests": "pypi-AgENdGVzdC5weXBpLm9yZw" + _of(rng, b64, 80),
        "age": "AGE-SECRET-KEY-1" + _of(rng, "QPZRY9X8GF2TVDW0S3JN54KHCE6MUA7L", 58),
        "the body of a private key": der,
        "a private key in base64": base64.b64encode(
            f"-----BEGIN RSA PRIVATE KEY-----\n{der}".encode()
        ).decode(),
    }


def possible(rng=None):
    """The same of what is kept out of the context with the lines around it."""
    rng = rng or random.Random()
    encoded, hexed = _of(rng, _ALNUM + "+/", 64), _of(rng, string.hexdigits[:16], 40)
    word = "".join(rng.choice(string.ascii_lowercase) for _ in range(12))
    return {
        "random base64": (f'salt = "{encoded}"', encoded),
        "random hex": (f"digest = '{hexed}'", hexed),
        "a word as password": (f'PASSWORD = "{word}"', word),
    }
