"""Access tokens and passwords stay out of everything that a run writes down or says.

One table of what secrets look like, for two uses: :func:`redacted` puts ``***`` in their place, and :func:`secret_in`
names the kind, where a file that holds one must not leave the machine.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

HIDDEN = "***"

_KINDS: dict[str, str] = {
    "a token of the Hub": r"hf_[A-Za-z0-9]{16,}|hf_oauth_[\w.-]{16,}|api_org_[A-Za-z0-9]{16,}",
    "a token of GitHub": r"gh[pousr]_[A-Za-z0-9]{16,}|github_pat_\w{16,}",
    "a token of GitLab": r"gl(?:pat|dt|rt|cbt|ptt|ft|soat|agent)-[\w-]{16,}",
    "a key of OpenAI or Anthropic": r"sk-(?:proj|ant|or|svcacct|admin|None)-[\w-]{16,}|sk-[A-Za-z0-9]{16,}",
    "a key of a model service": r"(?:gsk_|xai-|r8_|tgp_v1_|pplx-)[A-Za-z0-9]{20,}|nvapi-[\w-]{20,}",
    "a key of AWS": r"(?:AKIA|ASIA|ABIA|ACCA)[A-Z0-9]{16}",
    "a key of Google": r"AIza[\w-]{30,}|ya29\.[\w-]{20,}|GOCSPX-[\w-]{20,}|1//0[\w-]{30,}",
    "a token of Slack": r"xox[abeoprs]-[\w-]{10,}|xapp-[\w-]{10,}|hooks\.slack\.com/services/[\w/]{16,}",
    "a token of a bot": r"\d{8,10}:[\w-]{35}|discord(?:app)?\.com/api/webhooks/[\w/-]{16,}",
    "a token of npm": r"npm_[A-Za-z0-9]{20,}",
    "a token of PyPI": r"pypi-(?=[\w-]*[A-Z])(?=[\w-]*\d)[\w-]{16,}",
    "a token of Docker": r"dckr_(?:pat|oat)_[\w-]{16,}",
    "a key of Stripe": r"(?:sk|rk|pk)_(?:live|test)_\w{16,}",
    "a key of SendGrid": r"SG\.[\w-]{16,}\.[\w-]{16,}",
    "a token of Databricks": r"dapi[a-f0-9]{32}",
    "a token of DigitalOcean": r"do[opr]_v1_[a-f0-9]{40,}",
    "a token of Atlassian": r"ATATT3[\w=-]{20,}",
    "a key of a service": (
        r"(?:shp(?:at|ss|ca|pa)|glsa|glc|lin_(?:api|oauth)|figd|ntn|sntry[su]|pscale_(?:tkn|pw|oauth)|jina|sbp|sb_secret"
        r"|whsec|lsv2_(?:pt|sk)|ph[acx]|pcsk|rubygems|cf[au]t|vc[pk]|wandb_v1|fw)_(?=[A-Za-z]*\d)[A-Za-z0-9]{20,}"
        r"|(?:pul|PMAK|NRAK|csk|tvly|tskey(?:-[a-z]+)?|sq0(?:atp|csp))-(?=[A-Za-z]*\d)[A-Za-z0-9]{20,}[\w-]*"
        r"|(?:hv[sb]|dp\.(?:pt|st|ct|sa|scim|audit)|sl)\.(?=[\w-]*\d)(?=[\w-]*[A-Z])[\w-]{20,}"
        r"|(?:SK|key-)[0-9a-f]{32}|EAACEdEose0cBA\w*"
    ),
    "a JSON web token": r"eyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]*",
}
"""What such secrets look like wherever they stand, by what they are."""
_TOKENS = {kind: re.compile(rf"(?<![A-Za-z0-9])(?:{shape})") for kind, shape in _KINDS.items()}
_TOKENS["a private key"] = re.compile(
    r"-----BEGIN (?:[A-Z0-9]+ )*PRIVATE KEY(?: BLOCK)?-----[\s\S]*?(?:-----END [A-Z0-9 ]+-----|\Z)"
    r"|AGE-SECRET-KEY-1[A-Z0-9]{20,}"
)

_NAMES = (
    r"token|passwd|password|passphrase|pwd|secret|credentials?|signature|sig"
    r"|(?:api|access|account|secret|private|shared|signing|wandb)[-_]?key|sharedaccess\w*"
)
_IN_ADDRESS = re.compile(
    r"(?<=://)(?:[^/\s:@]*:(?!\d+(?:/|$))(?:[^\s/]+|[^\s@]+)(?=@)|[^/\s]+(?=@))"  # scheme://name:password@host, scheme://token@host
    r"|(?<![\w/@.:-])[\w.-]+:[^\s:@/]{6,}(?=@(?:[\w-]+\.\w|localhost))"  # name:password@host.org
)
_WITH_PASSWORD = re.compile(r"://[^/\s:@\"']*:(?!\d+(?:/|$))[^/\s@\"']+@")
_IN_QUERY = re.compile(rf"(?i)(?<![a-z])((?:{_NAMES}|key)=|(?:pass|auth|authorization)=(?=[^&;\s]{{6}}))[^&;\s]+")
_NAMES_BUT_TOKEN = _NAMES.replace("token|", "")
"""Whose values are secrets, whatever they look like; a token may be ``<pad>`` as well."""
_CAMELS = r"(?-i:[a-z]\w*(?:Secret|Password|Passphrase|Credentials?|ApiKey|AccessKey|SecretKey|PrivateKey))"
_IN_JSON = re.compile(
    rf"(?i)([\"'](?:(?:\w+[-_])?(?:{_NAMES_BUT_TOKEN})|{_CAMELS})[\"']\s*:\s*[\"'])[^\"']+"
    r"|([\"']\w*token[\"']\s*:\s*[\"'])(?=[^\"']*\d)[\w.~+/=-]{16,}(?=[\"'])"
)
_IN_FLAG = re.compile(  # of a command line, and of one that is shown as a list
    rf"(?i)((?<![\w-])--?(?:[\w-]*[-_])?(?:{_NAMES})\s+)(?!-)\S+"
    rf"|((?<![\w-])--?(?:[\w-]*[-_])?(?:{_NAMES})[\"'],\s*[\"'])(?!-)[^\"']+"
    r"|((?<![\w-])(?:-u|--user|--proxy-user)[\s=]+[^\s:/]+:)\S{6,}"
)
_IN_LINE = re.compile(  # of YAML, of headers, and of a netrc
    rf"(?i)((?<![A-Za-z])(?:{_NAMES_BUT_TOKEN})\s*:\s+|\blogin\s+\S+\s+password\s+)[^\s\"']{{6,}}"
    r"|((?<![A-Za-z])token:\s+)(?=[^\s\"']*\d)[\w.~+/=-]{16,}(?![^\s\"':;,)\]}])"
)
_IN_HEADER = re.compile(
    r"(?i)(\bbearer\s+|\bauthorization:\s*(?:\w+\s+)?|\bbasic\s+(?=[\w+/]*[\d=])|\bx-api-key:\s*)[\w.~+/=-]{8,}"
    r"|(\bcookie:\s*)[^\r\n]+"
)
_SECRET_FLAG = re.compile(rf"(?i)--?[\w-]*(?:{_NAMES})$")


def redacted(value: Any) -> Any:
    """``value`` (text, or lists and mappings of it) with everything that looks like a secret replaced by ``***``."""
    if isinstance(value, str):
        for shape in _TOKENS.values():
            value = shape.sub(HIDDEN, value)
        value = _IN_ADDRESS.sub(HIDDEN, value)
        for shape in (_IN_QUERY, _IN_JSON, _IN_FLAG, _IN_LINE, _IN_HEADER):
            value = shape.sub(lambda found: "".join(filter(None, found.groups())) + HIDDEN, value)
        return value
    if isinstance(value, dict):
        return {redacted(key): redacted(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [redacted(item) for item in value]
    return value


def redacted_command(words: Sequence[str]) -> list[str]:
    """A command line, also without the values of flags that are called token, password, secret and the like."""
    shown: list[str] = redacted(list(words))
    for index, word in enumerate(words[:-1]):
        if _SECRET_FLAG.match(word) and not words[index + 1].startswith("--"):
            shown[index + 1] = HIDDEN
    return shown


def secret_in(text: str) -> str | None:
    """What kind of secret is in ``text``, in words such as "a token of GitHub"; None without.

    Only what can hardly be anything else: a vocabulary or a chat template may well hold ``key=``.
    """
    for kind, shape in _TOKENS.items():
        if shape.search(text):
            return kind
    return "an address with a password" if _WITH_PASSWORD.search(text) else None


_FOLDER = re.compile(r"(?:~[\w-]*|\.{1,2})?/|[A-Za-z]:[\\/]|\\\\")


def without_folders(value: Any) -> Any:
    """Text, or a list of it, without folders of this machine: what begins like a path goes by its last name.

    ``--data=/home/somebody/rows.jsonl`` becomes ``--data=rows.jsonl``; ``recipes/a.py``, Hub ids and addresses stay.
    """
    if isinstance(value, list | tuple):
        return [without_folders(item) for item in value]
    if not isinstance(value, str):
        return value
    flag, equals, path = value.partition("=") if value.startswith("-") else ("", "", value)
    if _FOLDER.match(path):
        path = re.split(r"[\\/]+", path.rstrip("\\/"))[-1] or "."
    return f"{flag}{equals}{path}"
