"""Shapes of secrets x everything that a run writes or prints: nothing comes through, and nothing of it is pushed."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from adalora_dist.artifacts.hub.files import refuse_token
from adalora_dist.io.errors import UserError
from adalora_dist.io.redaction import redacted, redacted_command, secret_in
from tests.support.secret_words import (
    BEGINNINGS,
    FLAGS,
    IN_CODE,
    IN_PATHS,
    IN_TEXT,
    INNOCENT,
    LETTERS,
    SECRET,
    SERVICES,
)
from tests.support.signal_runs import Project


@pytest.mark.parametrize("shape", [*IN_PATHS, *IN_TEXT])
@pytest.mark.parametrize("around", ["{}", "error: cannot read {}: gone", "--model={}", "['a', '{}']", "['{}']"])
def test_no_shape_comes_through(shape: str, around: str) -> None:
    text = {**IN_PATHS, **IN_TEXT}[shape]
    hidden = text if shape in IN_PATHS else SECRET
    for value in (around.format(text), {"a": [around.format(text)]}, {around.format(text): 1}):
        assert hidden not in str(redacted(value)) and "***" in str(redacted(value))
    assert redacted(redacted(around.format(text))) == redacted(around.format(text))


@pytest.mark.parametrize("shape", [*IN_CODE, *SERVICES])
def test_nor_in_any_quotes_or_of_another_service(shape: str) -> None:
    text = {**IN_CODE, **SERVICES}[shape]
    hidden = SECRET if shape in IN_CODE else text[-16:]
    for value in (text, f"error: {text}", [text], {text: {"a": text}}):
        assert hidden not in str(redacted(value)) and "***" in str(redacted(value))
    if shape in SERVICES:
        assert secret_in(f"see {text}") is not None


@pytest.mark.parametrize("beginning", BEGINNINGS)
def test_many_beginnings_of_secrets_take_no_longer_than_text(beginning: str) -> None:
    """What is printed is anybody's: of a search that begins at each, and goes to the end, 200 kB took two minutes."""

    def seconds(text: str) -> float:
        start = time.thread_time()
        redacted(text)
        secret_in(text)
        return time.thread_time() - start

    size = 60_000
    plain = min(seconds("a word, " * (size // 8)) for _ in range(2))
    assert min(seconds(beginning * (size // len(beginning))) for _ in range(2)) < 8 * plain


@pytest.mark.parametrize("text", INNOCENT)
def test_what_is_no_secret_stays(text: str) -> None:
    assert redacted(text) == text and secret_in(text) is None


@pytest.mark.parametrize("flag", FLAGS)
def test_values_of_flags_that_say_so(flag: str) -> None:
    assert redacted_command(["x", flag, "plain", "y"]) == ["x", flag, "***", "y"]
    assert redacted_command(["x", f"{flag}=plain", "y"]) == ["x", f"{flag}=***", "y"]


@pytest.mark.parametrize("shape", [*IN_PATHS, "password", "pem", "ssh", "a database"])
@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "chat_template.jinja", "README.md"])
def test_a_push_refuses_the_file_and_names_the_kind(shape: str, name: str, tmp_path: Path) -> None:
    text = {**IN_PATHS, **IN_TEXT}[shape]
    (tmp_path / name).write_text(f'{{"note": "see {text}"}}', encoding="utf-8")
    with pytest.raises(UserError) as refused:
        refuse_token(tmp_path / name, None)
    said = str(refused.value)
    assert f"{name} holds a" in said and "remove it from the file" in said and text not in said
    (tmp_path / name).write_text('{"pad_token": "<pad>", "see": "https://huggingface.co/a/b"}', encoding="utf-8")
    refuse_token(tmp_path / name, None)


TOKEN = "hf_" + LETTERS
WRITTEN = {
    "utf-16": TOKEN.encode("utf-16"), "utf-16 of Windows": TOKEN.encode("utf-16-le"), "utf-32": TOKEN.encode("utf-32"),
    "mark": TOKEN.encode("utf-8-sig"), "json": b'{"a": "\\u0068f_%s"}' % LETTERS.encode(),
    "slashes": b'{"a": "https:\\/\\/u:%s@h"}' % SECRET.encode(), "html": b"&#104;&#x66;_" + LETTERS.encode(),
    "a space of no width": f"hf\u200b_{LETTERS}".encode(),
}  # fmt: skip


@pytest.mark.parametrize("how", WRITTEN)
def test_a_push_reads_as_others_do(how: str, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_bytes(WRITTEN[how])
    with pytest.raises(UserError, match=r"README\.md holds a"):
        refuse_token(tmp_path / "README.md", None)


# --------------------------------------------------------------------------------------------------- a run's sinks


def everything_of(folder: Path) -> dict[str, str]:
    return {str(p.relative_to(folder)): p.read_bytes().decode("latin-1") for p in folder.rglob("*") if p.is_file()}


def test_no_sink_of_a_run_has_any_of_them(tmp_path: Path) -> None:
    """Model and data lie in folders that are called like secrets; the run is interrupted, goes on, and exports."""
    deep = tmp_path.joinpath(*IN_PATHS.values())
    deep.mkdir(parents=True)
    project = Project(deep)
    output = tmp_path / "run"
    own = ["--output-dir", str(output), "--export-formats", "merged", "lora", "peft", "--trackers", "tensorboard"]
    own += ["--checkpoint-every", "2"]
    try:
        import tensorboard  # noqa: F401
    except ImportError:
        del own[-4:-2]
    for times, more in enumerate([[], ["--resume", "auto", "--overwrite"], ["--resume", "auto"]]):
        [ended] = project.start(f"{times}", 1, None, *own, *more).wait()
        (tmp_path / f"log-{times}").write_text(ended.log, encoding="utf-8")
        assert ended.code == (2 if times == 1 else 0), ended.log
    written = everything_of(output) | {f"log-{k}": (tmp_path / f"log-{k}").read_text() for k in range(3)}
    for name in ("config.yaml", "run.json", "metrics.jsonl", "adapter/adapter.json", "lora/adapter_config.json"):
        assert name in written
    assert any(name.endswith("state.json") for name in written)
    hits = [(name, shape) for name, text in written.items() for shape, secret in IN_PATHS.items() if secret in text]
    assert not hits
