"""Secrets are found by name and by line, and ordinary code is not taken for one."""

import asyncio
import base64
import json
import random
import sysconfig
from pathlib import Path

import pytest
from planted import certain, possible

from midfill.settings import Settings
from midfill.text.documents import Change, Document, Encoding
from midfill.text.secret_filter import Severity, find_secrets, is_excluded, severity
from midfill.text.secret_watch import SecretWatch, Verdict

ORDINARY = [
    "def set_password(self, raw_password):",
    "    password = get_password()",
    '    password_field_name="password1",',
    'password = "secret"',
    'password = "<your password>"',
    'api_key = os.environ["API_KEY"]',
    "token = tokens[index + 1]",
    "elif token.token_type == TokenType.VAR:",
    "_csrf_id_token = MASKED_TEST_SECRET2",
    "token: str = field(default_factory=new_token)",
    'token = "{{ csrf_token }}"',
    'secret = f"{prefix}-{name}"',
    "for key, value in secrets.items():",
    'color = "#a1b2c3"',
    'commit = "deadbeef01"',
    'id = "550e8400-e29b-41d4-a716-446655440000"',
    'raise ValueError("The password must have at least 8 characters, 1 digit")',
    "https://user:password@example.com:8080/",
    "from django.contrib.auth.tokens import default_token_generator2",
    "test_files_that_hold_secrets_never_reach_the_model_2()",
    "        pass",
    "",
]
# Names of a secret's place, kind, reader or holder, and values that are names.
NO_SECRETS = [
    'TOKENIZER = "gpt2-medium"',
    'tokenizer_name: "meta-llama/Llama-3.2-1B"',
    'GOOGLE_TOKENINFO_URL = "https://oauth2.googleapis.com/tokeninfo"',
    'TOKEN_ENDPOINT = "https://login.example.org/oauth2/v2.0/token"',
    'API_KEY_HEADER = "X-Api-Key-V2"',
    'const apiKeyHeaderName = "x-amz-security-token2";',
    "    secretName: web-tls-2024",
    "    secretRef: {name: db-credentials-v2}",
    "  secret: web-tls-2024",
    "  passwordSecretKey: db-password-2",
    'PASSWORD_FIELD = "password_field_1"',
    'PASSWORD_HASHER = "django.contrib.auth.hashers.BCryptSHA256PasswordHasher"',
    'token_type = "urn:ietf:params:oauth:token-type:id_token2"',
    'pad_token = "<|pad_151643|>"',
    'eos_token: "endoftext2"',
    'token: "keyword.operator.arithmetic2",',
    '"secret_ref": "V1SecretReference",',
    "secretRef: V1beta1ExternalSecretRef",
    'nextPageToken: "CAUQAA2xYz91Kd0pQ7",',
    'export const DEFAULT_TOKEN = "eyJzZXNzaW9uX2lkIjogImRlZmF1bHQifQ";',  # {"session_id": "default"}
    'publicKeyToken="b77a5c561934e089"',
    'private_key = "/etc/ssl/private/server2.key"',
    'client_key: "./certs/client1.pem"',
    "PWD=/home/user1/project2",
    '"AWS::ApiGateway::ApiKey": "48205d4ffd7feba3",',
    "credentialsId: 'jenkins-deploy-2'",
    'password = "Passw0rd123"',
    "password: 'p4ssw0rd'",
    'token = "abc123def"',
    'api_key = "1234567890abcdef"',
    'last_password_change: "2022-11-23T00:00:00.000Z"',
    'if line.startswith("-----BEGIN RSA PRIVATE KEY-----"):',
    '_HEADER = b"-----BEGIN OPENSSH PRIVATE KEY-----"',
    "var ppk = 'PuTTY-User-Key-File-2: ' + algorithm",
    'key = "AKIAIOSFODNN7EXAMPLE"',
    'token = "ghp_xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx"',
    "Authorization: Basic dXNlcjpwYXNzd29yZA==",
    'url = "postgres://user:password@localhost/db1"',
    'MultiHostUrl("https://foo.com:123,foo:bar@bar.com/path1")',
    '"change_password": "20/m/ip,5/m/key",',
    'PASSWORD = "c0rrecth0rse"',
    'MasterUserPassword="hunter2000",',
    'password = b"S3CuR1Ty"',
    'credentials="arn:aws:iam::000000000000:role/service-role/role1",',
    'client_request_token = "ED9F8B6C-85B7-B7E4-38F2A3BEB13C"',
    'IdempotencyToken="k3f9-20221125230308947400000001q7x",',
    '"SECRET_HASH": "kIWuIv6ElVe9ahZHJ+gqvZe6CgEkVE/BjQmJcMSgF3E=",',
    'headers["Authorization"] == "Bearer synthetic-access-token-1"',
    '"authorizationToken": "QVdTOnVzLWVhc3QtMS1hdXRoLXRva2Vu",',  # AWS:us-east-1-auth-token
    "Example api_key='d5345c0ecc68ae6295c69f91926b2bd379e25481a40c34b5884d157a9f65d8fa'",
    "'mssql+pyodbc://scott:tiger^5HHH@mssql2017:1433/test'",
    # {"sub": "foo"}
    '"Authorization": "Bearer eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiJmb28ifQ.NnExK_dlNAYyzACrXtXDrc",',
    'compute("", "test_secret") => "f7f9bd47fb987337b5796fdc1fdb9ba221d0d5396814bfcaf9521f43fd8927fd"',
]


def test_a_random_token_with_a_few_x_is_no_placeholder():
    assert severity('curl -H "Authorization: Bearer jjD37Wpl0g4cFu6qxXxxKO"') is Severity.CERTAIN
    assert severity('curl -H "Authorization: Bearer xxxxxxxxxxxxxxxxxxxxxx"') is Severity.NONE


@pytest.mark.parametrize("kind", certain())
def test_a_planted_secret_makes_its_file_a_secret(kind):
    for _ in range(20):
        line, secret = certain()[kind]
        assert secret in line
        assert severity(line) is Severity.CERTAIN, line
        assert find_secrets(f"x = 1\n{line}\ny = 2\n") == {1: Severity.CERTAIN}


@pytest.mark.parametrize("kind", possible())
def test_what_may_be_a_secret_is_kept_out_of_the_context(kind):
    for _ in range(20):
        line, _ = possible()[kind]
        assert severity(line) is Severity.POSSIBLE, line
        assert find_secrets(f"\n\n{line}") == {2: Severity.POSSIBLE}


@pytest.mark.parametrize("line", ORDINARY)
def test_ordinary_code_is_no_secret(line):
    assert severity(line) is Severity.NONE


@pytest.mark.parametrize("line", NO_SECRETS)
def test_what_is_about_secrets_does_not_silence_its_file(line):
    assert severity(line) is not Severity.CERTAIN


@pytest.mark.parametrize(
    "line",
    [
        'oauth_token="kkk9d7dh3k39sjv7",',
        "&oauth_timestamp=137131201&oauth_token=kkk9d7dh3k39sjv7",
        '"access_token":"2YotnFZFEjr1zCsicMWpAA",',
        '"access_token":"mF_9.B5f-4.1JqM",',
        "http://www.example.com/path?access_token=h480djs93hd8",
        'SECRET_KEY = "09d25e094faa6ca2556c818166b7a9563b93f7099f6f0f4caa6cf63b88e8d3e7"',
        '"AWS_SECRET_ACCESS_KEY": "uV3F3YluFJax1cknvbcGwgjvx4QpvB+leU8dUj2o",',
        "Authorization: Basic czZCaGRSa3F0MzpnWDFmQmF0M2JW",
        "token=45ghiukldjahdnhzdauz&token_type_hint=refresh_token",
        "eyJhbGciOiJIUzI1NiIsInR5cCI6IkpXVCJ9.eyJzdWIiOiIxMjM0NTY3ODkwIiwibmFtZSI6IkpvaG4gRG9lIiwiaWF0IjoxNTE2Mj"
        "M5MDIyfQ.SflKxwRJSMeKKF2QT4fwpMeJf36POk6yJV_adQssw5c",
    ],
)
def test_the_examples_of_standards_do_not_silence_who_quotes_them(line):
    assert severity(line) is not Severity.CERTAIN
    # A secret beside one is a secret all the same.
    assert severity(f'{line} api_key = "q8Zr2LmV0xTn5Kb7Wd3H"') is Severity.CERTAIN


def test_a_random_value_within_encoded_json_is_one():
    value = json.dumps({"session": "default", "key": "q8Zr2LmV0xTn5Kb7Wd3H"}).encode()
    assert severity(f'token = "{base64.b64encode(value).decode()}"') is Severity.CERTAIN


def test_a_password_that_somebody_chose_is_one():
    for line in (
        'password = "Tr0ub4dor&3"',
        "DB_PASSWORD=winter2024x",
        'passphrase: "k9-lunchbox-77"',
        '  "apiToken": "q8Zt3LmX02bVn7",',
        'const clientSecret: string = "Vb7xQ2m9Tz4Lw8Rk";',
        '{\\"password\\": \\"Kx82mmQ1z\\"}',
        "config['secret_key'] = 'n3B0xq7Lr2Vt'",
        'password = "5/mXq8LtZ2"',
        'password = "hunter-of-9-ghosts"',
        'headers["Authorization"] = "Bearer synthetic-access-q8Zr2LmV0xTn5Kb7"',
        "for example with api_key='d5345c0ecc68ae6295c69f91926b2bd379e25481a40c34b5884d157a9f65d8fa'",
        'TOKEN_GITHUB_PROD = "a8f5f167f44f4964e6c998dee827110c"',
    ):
        assert severity(line) is Severity.CERTAIN, line


def test_a_very_long_line_is_judged_by_its_whole():
    line, _ = certain()["GitHub token"]
    assert severity("x " * 10_000 + line + " x" * 10_000) is Severity.CERTAIN
    assert severity("x" * 3_000) is Severity.POSSIBLE
    assert severity(line + "x " * 50_000) is Severity.CERTAIN
    assert severity("x " * 50_000 + line) is Severity.CERTAIN


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_line_numbers_and_line_ends(end):
    rng = random.Random(3)
    lines, expected = [], {}
    for number, (line, _) in enumerate((certain(rng) | possible(rng)).values()):
        lines += ["a = 1", "İ = 'ß'", line]
        expected[3 * number + 2] = severity(line)
    assert find_secrets(end.join(lines)) == expected


def test_the_quick_search_finds_what_judging_every_line_finds():
    """On real code, with secrets planted in it."""
    rng = random.Random(7)
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    lines = [line for path in rng.sample(files, 6) for line in path.read_text("utf-8").split("\n")[:400]]
    for line, _ in (certain(rng) | possible(rng)).values():
        lines.insert(rng.randrange(len(lines)), line)
    naive = {number: found for number, line in enumerate(lines) if (found := severity(line))}
    assert find_secrets("\n".join(lines)) == naive
    assert len(naive) >= len(certain() | possible())


def test_watching_edits_finds_what_judging_the_whole_text_finds():
    rng = random.Random(11)
    secrets = [line for line, _ in certain(rng).values()]
    watch, lines = SecretWatch(in_background=False), []
    verdicts = set()
    for version in range(400):
        at = rng.randint(0, len(lines))
        new = [rng.choice(secrets) if rng.random() < 0.05 else "x = 1" for _ in range(rng.randint(0, 3))]
        lines[at : at + rng.randint(0, 4)] = new
        text = rng.choice(["\n", "\r\n", "\r"]).join(lines)
        document = Document.open("file:///a.py", "python", version, text)
        found = watch.verdict(document)
        assert (found is Verdict.SECRET) is (Severity.CERTAIN in map(severity, lines))
        verdicts.add(found)
    assert verdicts == {Verdict.SECRET, Verdict.CLEAN}


@pytest.mark.parametrize("at", [0, 50_000, 99_999])
async def test_the_whole_of_a_large_document_is_searched_in_the_background(at):
    line, _ = certain()["AWS key"]
    lines = ["x = 1\n"] * 100_000
    clean = Document.open("file:///a.py", "python", 0, "".join(lines))
    lines[at] = line + "\n"
    document = Document.open("file:///a.py", "python", 0, "".join(lines))
    watch = SecretWatch()
    assert watch.verdict(document) is Verdict.PENDING
    assert await watch.wait(document, 60)
    assert watch.verdict(document) is Verdict.SECRET
    # The change back is small, and known at once.
    assert watch.verdict(clean) is Verdict.CLEAN


async def test_a_document_that_takes_long_is_pending_and_keeps_no_other_waiting():
    watch = SecretWatch()
    # Each line costs as much as any can.
    slow_lines = [f"# {'password' * 240}{number}\n" for number in range(1_000)]
    slow = Document.open("file:///slow.py", "python", 0, "".join(slow_lines))
    quick = Document.open("file:///quick.py", "python", 0, "x = 1\n" * 2_000)
    assert not await watch.wait(slow, 0)
    assert await watch.wait(quick, 60)
    assert watch.verdict(quick) is Verdict.CLEAN
    # It had one turn of many.
    assert watch.verdict(slow) is Verdict.PENDING
    assert await watch.wait(slow, 120)
    assert watch.verdict(slow) is Verdict.CLEAN


async def test_a_document_that_is_closed_meanwhile_is_forgotten():
    watch = SecretWatch()
    document = Document.open("file:///a.py", "python", 0, "x = 1\n" * 200_000)
    assert watch.verdict(document) is Verdict.PENDING
    watch.forget(document.uri)
    await asyncio.sleep(0)
    assert not watch._judged
    assert not watch._tasks
    assert await watch.wait(document, 60)


async def test_edits_while_a_document_is_searched_are_seen():
    line, _ = certain()["GitHub token"]
    watch = SecretWatch()
    old = Document.open("file:///a.py", "python", 0, "x = 1\n" * 20_000)
    new = old.edit([Change(line + "\n", (5, 0), (5, 0))], 1, Encoding.UTF16)
    assert watch.verdict(old) is Verdict.PENDING
    assert watch.verdict(new) is Verdict.PENDING
    assert await watch.wait(new, 60)
    assert watch.verdict(new) is Verdict.SECRET
    assert watch.verdict(old) is Verdict.CLEAN


@pytest.mark.parametrize(
    ("uri", "excluded"),
    [
        ("file:///w/.env", True),
        ("file:///w/.env.local", True),
        ("file:///w/prod.env", True),
        ("file:///w/%2Eenv", True),
        ("file:///w/Server.PEM", True),
        ("file:///w/id_rsa", True),
        ("file:///w/.npmrc", True),
        ("file:///w/.pypirc", True),
        ("file:///w/.git-credentials", True),
        ("file:///home/u/.aws/credentials", True),
        ("file:///home/u/.kube/config", True),
        ("file:///w/kubeconfig.yaml", True),
        ("file:///w/kubeconfig", True),
        ("file:///w/prod.kubeconfig", True),
        ("file:///w/admin-kubeconfig.yml", True),
        ("file:///w/kubeconfig-prod.yaml", True),
        ("file:///w/secrets.yaml", True),
        ("file:///w/credentials.json", True),
        ("file:///w/terraform.tfstate", True),
        ("C:\\Users\\u\\.docker\\config.json", True),
        ("git:/work/.env?x", True),
        ("vscode-notebook-cell:/work/.env#1", True),
        ("untitled:.env", True),
        ("file:///w/config", False),
        ("file:///w/config.json", False),
        ("file:///w/secrets.py", False),
        ("file:///w/credentials.py", False),
        ("file:///w/kubeconfig.go", False),
        ("file:///w/kubeconfig_test.go", False),
        ("file:///w/KubeConfigLoader.java", False),
        ("file:///w/read-kubeconfig.ts", False),
        ("file:///w/environment.py", False),
        ("file:///w/env.py", False),
        ("file:///w/keyboard.py", False),
        ("untitled:Untitled-1", False),
        ("vscode-notebook-cell:/w/a.ipynb#X1", False),
    ],
)
def test_secret_files_are_known_by_name(uri, excluded):
    assert is_excluded(uri, Settings().excluded_files) is excluded
