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
    "a token of the Hub": r"hf_[A-Za-z0-9]{16,}|hf_(?:oauth|jwt)_[\w.-]{16,}|api_org_[A-Za-z0-9]{16,}",
    "a token of GitHub": r"gh[pousr]_[A-Za-z0-9]{16,}|github_pat_\w{16,}",
    "a token of GitLab": r"gl(?:pat|dt|rt|cbt|ptt|ft|soat|agent)-[\w-]{16,}",
    "a key of OpenAI or Anthropic": r"sk-(?:proj|ant|or|svcacct|admin|None)-[\w-]{16,}|sk-[A-Za-z0-9]{16,}",
    "a key of a model service": (
        r"(?:gsk_|xai-|r8_|tgp_v1_|pplx-)[A-Za-z0-9]{20,}|nvapi-[\w-]{20,}"
        r"|(?:ak|as)-(?=[A-Za-z]*\d)[A-Za-z0-9]{22}(?![A-Za-z0-9])"
        r"|(?:rpa|KGAT|esecret|e2b|sk|secret|key)_(?=[A-Za-z]*\d)[A-Za-z0-9]{20,}"
        r"|(?:sess|pa|nk|m0|fc)-(?=[A-Za-z]*\d)[A-Za-z0-9]{30,}|AQVN[\w-]{30,}"
    ),
    "a key of AWS": r"(?:AKIA|ASIA|ABIA|ACCA)[A-Z0-9]{16}",
    "a key of Alibaba or Tencent": r"LTAI(?=[A-Za-z]*\d)[A-Za-z0-9]{16,}|AKID(?=[A-Za-z]*\d)[A-Za-z0-9]{28,}",
    "a key of Google": r"AIza[\w-]{30,}|ya29\.[\w-]{20,}|GOCSPX-[\w-]{20,}|1//0[\w-]{30,}",
    "a token of Slack": r"xox[abeoprs]-[\w-]{10,}|xapp-[\w-]{10,}|hooks\.slack\.com/services/[\w/]{16,}",
    "a token of a bot": (
        r"(?:bot)?\d{8,10}:[\w-]{35}|discord(?:app)?\.com/api/webhooks/[\w/-]{16,}|webhook\.office\.com/[\w@/-]{16,}"
        r"|[MNO](?=[\w-]{0,27}\d)[\w-]{23,27}\.[\w-]{6}\.(?=[\w-]*[A-Z])[\w-]{27,}"
    ),
    "a token of npm": r"npm_[A-Za-z0-9]{20,}",
    "a token of PyPI": r"pypi-(?=[\w-]{0,40}[A-Z])(?=[\w-]{0,40}\d)[\w-]{16,}",
    "a token of Docker": r"dckr_(?:pat|oat)_[\w-]{16,}",
    "a key of Stripe": r"(?:sk|rk|pk)_(?:live|test)_\w{16,}",
    "a key of SendGrid": r"SG\.[\w-]{16,}\.[\w-]{16,}",
    "a token of Databricks": r"dapi[a-f0-9]{32}",
    "a token of DigitalOcean": r"do[opr]_v1_[a-f0-9]{40,}",
    "a token of Atlassian": r"ATATT3[\w=-]{20,}",
    "a key of a service": (
        r"(?:shp(?:at|ss|ca|pa)|glsa|glc|lin_(?:api|oauth)|figd|ntn|sntry[su]|pscale_(?:tkn|pw|oauth)|jina|sbp|sb_secret"
        r"|whsec|lsv2_(?:pt|sk)|ph[acx]|rubygems|cf[au]t|vc[pk]|wandb_v1|fw|bkua|nfp|rnd|napi|sq[upa]|re_[A-Za-z0-9]{8})"
        r"_(?=[A-Za-z]*\d)[A-Za-z0-9]{20,}"
        r"|(?:pcsk|CCIPAT)_(?=[A-Za-z_]*\d)\w{30,}|fm2_[\w+/=-]{40,}|ops_eyJ[\w+/=-]{40,}"
        r"|(?:pul|PMAK|NRAK|HRKU|xkeysib|csk|tvly|tskey(?:-[a-z]+)?|sq0(?:atp|csp))"
        r"-(?=[A-Za-z]*\d)[A-Za-z0-9]{20,}[\w-]*"
        r"|(?:hv[sb]|dp\.(?:pt|st|ct|sa|scim|audit)|sl(?:\.u)?)\.(?=[\w-]*\d)(?=[\w-]*[A-Z])[\w-]{20,}"
        r"|(?:[sp]k-lf-|pat-[a-z]{2}\d-|st\.)[0-9a-f]{8}-[0-9a-f-]{27}[\w.]*|pat[A-Za-z0-9]{14}\.[0-9a-f]{40,}"
        r"|[A-Za-z0-9]{14}\.atlasv1\.[\w-]{40,}|[0-9a-f]{32}-us\d{1,2}|AKCp\w{40,}|cmVmdGtuO\w{40,}"
        r"|v1\.0-[0-9a-f]{100,}"
        r"|(?:SK|key-)[0-9a-f]{32}|EAACEdEose0cBA\w*"
    ),
    "a JSON web token": (
        r"(?:sk\.)?eyJ(?:(?![_-]eyJ)[\w-]){8,}\.[\w-]{8,}(?:\.[\w-]*|(?<=\w{16}))|eyJhcGlf[\w=-]{30,}"
    ),
}
"""What such secrets look like wherever they stand, by what they are."""
_TOKENS = {kind: rf"(?<![A-Za-z0-9])(?:{shape})" for kind, shape in _KINDS.items()}
_TOKENS["a private key"] = (
    r"----[- ]BEGIN (?:[A-Z0-9]+ )*PRIVATE KEY(?: BLOCK)?[- ]----[\s\S]*?(?:----[- ]END [A-Z0-9 ]+[- ]----|\Z)"
    r"|PuTTY-User-Key-File-[\s\S]*?(?:Private-MAC:[^\n]*|\Z)|AGE-SECRET-KEY-1[A-Z0-9]{20,}"
)
_ANY_TOKEN = re.compile(rf"(?<![A-Za-z0-9])(?:{'|'.join(_KINDS.values())})|{_TOKENS['a private key']}")
"""No shape looks ahead for farther than it hides, or a text of many beginnings would take the square of its length."""

_NAMES = (
    r"token|passwd|password|passphrase|pwd|secret|credentials?|signature|sig"
    r"|(?:api|access|account|secret|private|shared|signing|wandb|subscription)[-_]?key|sharedaccess\w*"
)
_NAMES_BUT_TOKEN = _NAMES.replace("token|", "")
"""Whose values are secrets, whatever they look like; a token may be ``<pad>`` as well."""
_START = r"(?:(?<![a-z])|(?-i:(?<=[a-z])(?=[A-Z])))"
"""Of a name, the last word of ``db_password`` or of ``clientSecret``."""
_SIGN = r"(?:\\*[\"'])?[ \t]{0,9}(?:=>|[:=])[ \t]{0,9}"
_QUOTE = r"[bru]?(?P<quote>\\*[\"'])"
"""What opens a value, and closes it where no backslash stands before: in a text of JSON, JSON has \" for it."""
_OF_TOKENS = r"(?=[\w.~+/=-]*\d)[\w.~+/=-]{16,}"
_IN_ADDRESS = re.compile(  # scheme://name:password@host, scheme://token@host; in JSON a slash may have a backslash
    r"(?:(?<=://)|(?<=:\\/\\/))"
    r"(?:[^/\s:@]*:(?!\d+(?:/|$))(?:[^\s/]+|[^\s@]+)(?=@)|[^/\s]+(?=@))"
)
_WITHOUT_SCHEME = re.compile(r"(?<![\w/@.:-])[\w.-]+:[^\s:@/]{6,}(?=@(?:[\w-]+\.\w|localhost))")
_WITH_PASSWORD = re.compile(r"://[^/\s:@\"']*:(?!\d+(?:/|$))[^/\s@\"']+@")
_IN_QUOTES = re.compile(
    rf"(?i)({_START}(?:{_NAMES_BUT_TOKEN}|authorization|cookie){_SIGN}{_QUOTE})(?:(?!(?<!\\)(?P=quote))[^\n])+"
)
_TOKEN_IN_QUOTES = re.compile(rf"(?i)({_START}token{_SIGN}{_QUOTE}){_OF_TOKENS}(?=(?P=quote))")
_IN_TEXT = re.compile(  # of YAML, JSON, headers, a netrc, and whatever else has names and values
    rf"(?i)({_START}(?:{_NAMES_BUT_TOKEN}){_SIGN})(?!\*\*\*)(?:\d{{6,}}|[^\s\"']{{6,}})"
    rf"|({_START}token{_SIGN}){_OF_TOKENS}(?![^\s\"':;,)\]}}])"
    r"|(\blogin\s{1,9}\S+\s{1,9}password\s{1,9})[^\s\"']{6,}"
)
_IN_QUERY = re.compile(rf"(?i)({_START}(?:{_NAMES})=|(?<![a-z])key=|(?<![a-z])(?:pass|auth)=(?=[^&;\s]{{6}}))[^&;\s]+")
_IN_FLAG = re.compile(  # of a command line, and of one that is shown as a list
    rf"(?i)((?<![\w-])--?(?:[\w-]*{_START})?(?:{_NAMES})\s+)(?!-)(?:\"[^\"\n]+\"?\S*|'[^'\n]+'?\S*|\S+)"
    rf"|((?<![\w-])--?(?:[\w-]*{_START})?(?:{_NAMES})[\"'],\s*[\"'])(?!-)[^\"']+"
    r"|((?<![\w-])(?:-u|--user|--proxy-user)[\s=]+[^\s:/]+:)\S{6,}"
)
_IN_HEADER = re.compile(
    r"(?i)(\bbearer\s+|\bauthorization\s*[:=]\s*(?:\w+\s+)?|\bbasic\s+(?=[\w+/]*[\d=]))[\w.~+/=-]{8,}"
    r"|(\bcookie:\s*)[^\r\n]+"
)
_SECRET_FLAG = re.compile(rf"(?i)--?[\w-]*(?:{_NAMES})$")


def redacted(value: Any) -> Any:
    """``value`` (text, or lists and mappings of it) with everything that looks like a secret replaced by ``***``."""
    if isinstance(value, str):
        value = _ANY_TOKEN.sub(HIDDEN, value)
        if "@" in value:
            value = _WITHOUT_SCHEME.sub(HIDDEN, re.sub(r"\S+", _without_password, value))
        for shape in (_IN_HEADER, _IN_QUOTES, _TOKEN_IN_QUOTES, _IN_QUERY, _IN_TEXT, _IN_FLAG):
            value = shape.sub(lambda found: found[found.lastindex or 0] + HIDDEN, value)
        return value
    if isinstance(value, dict):
        return {redacted(key): redacted(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [redacted(item) for item in value]
    return value


def _without_password(word: re.Match[str]) -> str:
    """Only of what lies before an @: looked for from each ://, it would be looked for through the whole word."""
    address, at, rest = word[0].rpartition("@")
    return f"{_IN_ADDRESS.sub(HIDDEN, address + at)}{rest}" if "/" in address else word[0]


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
    if found := _ANY_TOKEN.search(text):
        return next(kind for kind, shape in _TOKENS.items() if re.match(shape, found[0]))
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
