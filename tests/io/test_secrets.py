"""Shapes of secrets x everything that a run writes or prints: nothing comes through, and nothing of it is pushed."""

from __future__ import annotations

from pathlib import Path

import pytest

from adalora_dist.artifacts.hub.files import refuse_token
from adalora_dist.io.errors import UserError
from adalora_dist.io.redaction import redacted, redacted_command, secret_in
from tests.support.secret_words import FLAGS, IN_PATHS, IN_TEXT, INNOCENT, SECRET
from tests.support.signal_runs import Project


@pytest.mark.parametrize("shape", [*IN_PATHS, *IN_TEXT])
@pytest.mark.parametrize("around", ["{}", "error: cannot read {}: gone", "--model={}", "['a', '{}']", "['{}']"])
def test_no_shape_comes_through(shape: str, around: str) -> None:
    text = {**IN_PATHS, **IN_TEXT}[shape]
    hidden = text if shape in IN_PATHS else SECRET
    for value in (around.format(text), {"a": [around.format(text)]}, {around.format(text): 1}):
        assert hidden not in str(redacted(value)) and "***" in str(redacted(value))
    assert redacted(redacted(around.format(text))) == redacted(around.format(text))


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
