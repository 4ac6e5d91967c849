"""Push and pull through real HTTP: a server that speaks the Hub's interface, that fails, and that is left hanging."""

from __future__ import annotations

import ast
import json
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import httpx2  # huggingface_hub's own client
import pytest
import torch
from huggingface_hub.errors import HfHubHTTPError
from transformers import AutoModelForCausalLM, AutoTokenizer

from adalora_dist.artifacts.hub.push import _asked_to_wait, _Persistence, check_push_of_run, push
from adalora_dist.artifacts.peft_format import save_adalora, save_lora
from adalora_dist.config.sections import ExportConfig, RunConfig
from adalora_dist.methods.update import AdapterWeights
from adalora_dist.tasks.glue.config import GlueConfig
from tests.support.limits import HANG_SECONDS
from tests.support.local_hub import REPO, ROOT, TOKEN, LocalHub, write_run
from tests.support.ranks import free_port
from tests.support.refusals import refusal
from tests.support.tiny_project import write_data, write_model

COMMIT = "POST /api/models/somebody/.*/commit/"
ERROR = re.compile(r"^error: .*$", re.MULTILINE)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("hub")


@pytest.fixture(scope="module")
def hub(place: Path) -> Iterator[LocalHub]:
    hub = LocalHub(place)
    yield hub
    hub.stop()


@pytest.fixture(scope="module")
def run(place: Path) -> Path:
    """With ten files of weights, and more in its merged folder than may leave the machine."""
    run = write_run(place / "run")
    for name in ("notes.txt", "optimizer.pt", ".env"):
        (run / "merged" / name).write_text("not for others")
    (run / "merged" / "checkpoints").mkdir()
    (run / "merged" / "checkpoints" / "model.safetensors").write_bytes(b"")
    return run


@pytest.fixture(scope="module")
def plain(run: Path, place: Path) -> Path:
    """The same without what pictures are drawn of, which would take longer than all the rest of a push."""
    plain = shutil.copytree(run, place / "plain")
    for name in ("rank_pattern.json", "allocations.jsonl"):
        (plain / name).unlink()
    return plain


LEFT_OUT = {"notes.txt", "optimizer.pt", ".env", "checkpoints"}


def exported(run: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in (run / "merged").iterdir() if p.name not in LEFT_OUT}


def names_of(run: Path) -> frozenset[str]:
    """What a reader should see of a run without pictures."""
    return frozenset({*exported(run), "README.md"})


def without_card(files: dict[str, bytes]) -> dict[str, bytes]:
    return {name: content for name, content in files.items() if name != "README.md" and not name.endswith(".svg")}


def error_of(finished: subprocess.CompletedProcess[str]) -> str:
    """The one line that a push that cannot be made ends with."""
    assert finished.returncode == 2 and "Traceback" not in finished.stderr, finished.stderr
    [line] = ERROR.findall(finished.stderr)
    return line


# ------------------------------------------------------------------------------------------------------ push and pull


@pytest.fixture(scope="module")
def pushed(hub: LocalHub, run: Path) -> subprocess.CompletedProcess[str]:
    """A push through a server that fails once wherever it can. (Some failures are left to other tests: waits grow.)"""
    hub.faults(
        {"match": "POST /api/repos/create", "do": "429", "retry_after": "3"},
        {"match": "POST .*/preupload/", "do": "429"},
        {"match": "POST .*/objects/batch", "do": "500"},
        {"match": "PUT /_lfs/[0-9a-f]+$", "do": "drop"},
        {"match": "PUT /_lfs/[0-9a-f]+$", "do": "503", "retry_after": "1"},
        {"match": "PUT /_lfs/[0-9a-f]+/2$", "do": "500"},
        {"match": "POST /_lfs/[0-9a-f]+/complete", "do": "drop_answer"},
        {"match": "POST /_lfs/[0-9a-f]+/verify", "do": "429"},
        {"match": COMMIT, "do": "drop_answer"},
    )
    return hub.push(run, REPO, HF_DEBUG="1", HF_HUB_VERBOSITY="debug")  # whatever the client can tell of its requests


def test_push_gets_through_whatever_fails_once(pushed: Any, hub: LocalHub) -> None:
    assert pushed.returncode == 0, pushed.stderr[-4000:]
    assert hub.faults_left() == []
    assert f"{hub.address}/{REPO}/commit/" in pushed.stdout
    assert "429" in pushed.stdout and "next attempt in 3 s" in pushed.stdout
    # The commit whose answer was lost had happened: no second one was made.
    assert hub.num_pushes() == 1
    assert [line for line in hub.log() if re.search(COMMIT, line)] == [f"POST /api/models/{REPO}/commit/main lost"]


def test_what_is_pushed_is_the_export_and_its_card(pushed: Any, hub: LocalHub, run: Path) -> None:
    files = hub.files()
    assert without_card(files) == exported(run)
    assert files.keys() - exported(run).keys() == {"README.md", "ranks.svg", "history.svg"}
    assert b"somebody/a-base" in files["README.md"]
    left_out = next(line for line in pushed.stdout.splitlines() if line.startswith("Left out"))
    assert set(re.findall(r"'([^']+)'", left_out)) == LEFT_OUT


def pull(hub: LocalHub, *lines: str) -> str:
    """What a program of another process prints that has this server for its Hub."""
    program = "\n".join(["import sys", "from huggingface_hub import snapshot_download", *lines])
    command = [sys.executable, "-c", program]
    pulled = subprocess.run(
        command, env=hub.environment(), cwd=ROOT, capture_output=True, text=True, timeout=HANG_SECONDS
    )
    assert pulled.returncode == 0, pulled.stderr[-4000:]
    return pulled.stdout.strip()


def test_pulled_back_it_is_equal_to_the_last_bit(pushed: Any, hub: LocalHub, run: Path) -> None:
    """The client's own download gives up at the first 500; whoever pulls again gets the rest."""
    files = f"GET /{REPO}/resolve/.*/"
    hub.faults(
        {"match": f"{files}model-00001", "do": "drop"},
        {"match": f"{files}model-00002", "do": "500"},
        {"match": f"{files}tokenizer.json", "do": "429"},
    )
    attempt = f"try: print(snapshot_download({REPO!r}), flush=True); sys.exit()"
    snapshot = Path(
        pull(hub, *("for _ in range(4):", f"    {attempt}", "    except OSError: pass", "sys.exit('never')"))
    )
    assert hub.faults_left() == [] and str(snapshot).startswith(str(hub.home))
    pulled = {path.name: path.read_bytes() for path in snapshot.iterdir() if path.name != ".gitattributes"}
    assert without_card(pulled) == exported(run)
    assert torch.equal(logits(snapshot), logits(run / "merged"))


@torch.no_grad()
def logits(folder: Path) -> torch.Tensor:
    ids = AutoTokenizer.from_pretrained(folder)("which ranks?", return_tensors="pt").input_ids
    return AutoModelForCausalLM.from_pretrained(folder)(ids).logits


@pytest.mark.slow
def test_the_lines_of_the_card_load_it(pushed: Any, hub: LocalHub, run: Path, tmp_path: Path) -> None:
    hub.faults()
    [lines] = re.findall(r"```python\n(.*?)\n```", hub.files()["README.md"].decode(), re.DOTALL)
    assert len([line for line in lines.splitlines() if line]) == 3
    said = tmp_path / "said.pt"
    ask = "ids = tokenizer('which ranks?', return_tensors='pt').input_ids"
    pull(hub, lines, "import torch", ask, f"torch.save(model(ids).logits.detach(), {str(said)!r})")
    assert torch.equal(torch.load(said, weights_only=True), logits(run / "merged"))


def test_a_second_push_of_the_same_changes_nothing(pushed: Any, hub: LocalHub, run: Path) -> None:
    hub.faults()
    before, num_requests = hub.files(), len(hub.log())
    again = hub.push(run, REPO)
    assert again.returncode == 0, again.stderr
    assert hub.files() == before and hub.num_pushes() == 1
    assert not [line for line in hub.log()[num_requests:] if line.startswith("PUT")]


def test_a_repository_is_private_unless_told_otherwise(pushed: Any, hub: LocalHub, plain: Path) -> None:
    open_to_all = "somebody/open"
    hub.faults(
        {"match": "POST /api/repos/create", "do": "drop_answer"},  # it is there at the next attempt
        {"match": "GET .*/xet-write-token/", "do": "drop"},
    )
    assert hub.push(plain, open_to_all, "--public").returncode == 0
    private = {name: json.loads(hub.get(f"/api/models/{name}") or b"")["private"] for name in (REPO, open_to_all)}
    assert private == {REPO: True, open_to_all: False}
    # Neither is turned into the other by the way.
    assert "is public: pass --public" in error_of(hub.push(plain, open_to_all))
    assert "is private: leave out --public" in error_of(hub.push(plain, REPO, "--public"))
    assert hub.num_pushes() == hub.num_pushes(open_to_all) == 1


@pytest.mark.parametrize(("to", "save"), [("lora", save_lora), ("peft", save_adalora)])
def test_adapters(hub: LocalHub, plain: Path, to: str, save: Any) -> None:
    hub.faults()
    adapters = [
        AdapterWeights(f"model.layers.{k}.mlp.up_proj", torch.ones(8, 2), torch.ones(2), torch.ones(2, 8), 0.5, False)
        for k in range(2)
    ]
    save(adapters, plain / to, "somebody/a-base")
    repo = f"somebody/a-model-{to}"
    finished = hub.push(plain, repo, "--to", to)
    assert finished.returncode == 0, finished.stderr
    files = hub.files(repo=repo)
    assert without_card(files) == {path.name: path.read_bytes() for path in (plain / to).iterdir()}
    assert files.keys() == {"adapter_config.json", "adapter_model.safetensors", "README.md"}
    assert b"library_name: peft" in files["README.md"]


def test_an_export_without_its_run_brings_its_own_card(hub: LocalHub, plain: Path, tmp_path: Path) -> None:
    hub.faults()
    alone, repo = shutil.copytree(plain / "merged", tmp_path / "alone"), "somebody/alone"
    (alone / "README.md").write_bytes(b"---\nlicense: mit\n---\nMine.\n")
    finished = hub.push(alone, repo)
    assert finished.returncode == 0, finished.stderr
    assert hub.files(repo=repo) == exported(plain) | {"README.md": (alone / "README.md").read_bytes()}
    assert "README.md" not in next(line for line in finished.stdout.splitlines() if line.startswith("Left out"))
    (alone / "README.md").write_bytes(f"\xff {TOKEN}".encode("latin-1"))
    assert "README.md holds a token" in error_of(hub.push(alone, repo))


def test_a_branch(pushed: Any, hub: LocalHub, plain: Path, place: Path) -> None:
    hub.faults({"match": "POST /api/validate-yaml", "do": "502"}, {"match": "POST .*/branch/", "do": "500"})
    other = write_run(place / "other", seed=1, draw=False)
    main = hub.files()
    finished = hub.push(other / "merged", REPO, "--revision", "tries/one", "--base-license", "llama3.1")
    assert finished.returncode == 0, finished.stderr
    branch = hub.files("tries%2Fone")
    assert without_card(branch) == exported(other) and hub.files() == main
    assert b"license: llama3.1" in branch["README.md"] and b"revision='tries/one'" in branch["README.md"]


# ------------------------------------------------------------------------------------------------ kill in the middle

POINTS = {
    "before anything is sent": "POST .*/preupload/",
    "with half of the weights sent": "PUT /_lfs/[0-9a-f]+/2( |$)",
    "with all weights sent": COMMIT,
}


class Reader:
    """Looks at the repository all the time; every set of files that it ever saw."""

    def __init__(self, hub: LocalHub, repo: str) -> None:
        self.hub, self.repo, self.stopped = hub, repo, threading.Event()
        self.seen: set[frozenset[str]] = set()
        self.thread = threading.Thread(target=self.keep_looking)

    def look(self) -> None:
        self.seen.add(frozenset(self.hub.names(repo=self.repo)))

    def keep_looking(self) -> None:
        while not self.stopped.wait(0.01):
            self.look()

    def __enter__(self) -> Reader:
        self.look()
        self.thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.stopped.set()
        self.thread.join()
        self.look()


def wait_for(hub: LocalHub, pattern: str, process: subprocess.Popen[str], num_requests: int = 0) -> None:
    """Until the Hub has logged a request that matches, after its first ``num_requests``."""
    deadline = time.monotonic() + HANG_SECONDS
    while not any(re.search(pattern, line) for line in hub.log()[num_requests:]):
        if process.poll() is not None or time.monotonic() > deadline:
            process.kill()
            pytest.fail(f"no request {pattern}: {hub.outputs(process)}")
        time.sleep(0.01)


def kill_at(hub: LocalHub, pattern: str, *arguments: Any, do: str = "stall") -> None:
    """Push, and end the process without notice when its request that matches arrives."""
    num_requests = len(hub.log())
    hub.faults({"match": pattern, "do": do})
    process = hub.start_push(*arguments)
    wait_for(hub, pattern, process, num_requests)
    process.send_signal(signal.SIGKILL)
    hub.outputs(process)
    assert process.returncode == -signal.SIGKILL


@pytest.mark.parametrize("point", [pytest.param(p, marks=[pytest.mark.slow] * ("half" not in p)) for p in POINTS])
def test_killed_in_the_middle(hub: LocalHub, plain: Path, point: str) -> None:
    repo = f"somebody/killed-{list(POINTS).index(point)}"
    whole = names_of(plain)
    with Reader(hub, repo) as reader:
        # The request that the kill cuts off is answered only when the second call is done, by then to nobody.
        kill_at(hub, POINTS[point], plain, repo)
        assert hub.names(repo=repo) == set()
        num_requests = len(hub.log())
        again = hub.push(plain, repo)
        assert again.returncode == 0, again.stderr
    hub.release()
    assert without_card(hub.files(repo=repo)) == exported(plain) and hub.num_pushes(repo) == 1
    assert reader.seen == {frozenset(), whole}
    sent_again = [line for line in hub.log()[num_requests:] if line.startswith("PUT")]
    if point == "with all weights sent":
        assert sent_again == []


def test_killed_after_the_commit(hub: LocalHub, plain: Path) -> None:
    repo = "somebody/killed-late"
    kill_at(hub, COMMIT, plain, repo, do="drop_answer")
    assert without_card(hub.files(repo=repo)) == exported(plain)
    again = hub.push(plain, repo)
    assert again.returncode == 0 and hub.num_pushes(repo) == 1


def test_another_export_replaces_the_first_at_once(hub: LocalHub, plain: Path, place: Path) -> None:
    """Ten files and an index give way to one file that a reader would otherwise load, or not, beside them."""
    repo, single = "somebody/replaced", write_run(place / "single", seed=2, max_shard_size="1GB", draw=False)
    hub.faults()
    assert hub.push(plain, repo).returncode == 0
    old, new = frozenset(hub.names(repo=repo)), names_of(single)
    assert "model.safetensors" in new - old and len(old - new) == 11
    with Reader(hub, repo) as reader:
        kill_at(hub, COMMIT, single, repo)
        assert without_card(hub.files(repo=repo)) == exported(plain)
        hub.faults({"match": COMMIT, "do": "503", "retry_after": "1"})
        assert hub.push(single, repo).returncode == 0
    assert reader.seen == {old, new}
    assert without_card(hub.files(repo=repo)) == exported(single)


@pytest.mark.slow
def test_two_pushes_at_once_leave_one_of_them_whole(hub: LocalHub, plain: Path, place: Path) -> None:
    repo, single = "somebody/contested", place / "single"
    if not single.exists():
        write_run(single, seed=2, max_shard_size="1GB", draw=False)
    hub.faults()
    processes = [hub.start_push(folder, repo) for folder in (plain, single)]
    assert [hub.outputs(process) and process.returncode for process in processes] == [0, 0]
    assert without_card(hub.files(repo=repo)) in (exported(plain), exported(single))


# -------------------------------------------------------------------------------------------------------- a recipe


def test_a_recipe_pushes_when_its_other_ranks_have_ended(hub: LocalHub, place: Path, tmp_path: Path) -> None:
    """The Hub keeps rank 0 waiting for as long as rank 1 lives."""
    write_data(tmp_path / "data")
    write_model(tmp_path / "model", tmp_path / "data")
    repo, folder = "somebody/of-two-ranks", place / "of-two-ranks"
    hub.faults({"match": COMMIT, "do": "stall"})
    command = [
        *(sys.executable, str(ROOT / "recipes" / "llama_commonsense.py")),
        *("--model", str(tmp_path / "model"), "--data", str(tmp_path / "data"), "--output-dir", str(folder)),
        *("--max-steps", "6", "--batch-size", "4", "--max-eval-rows", "2", "--init-rank", "3", "--target-rank", "2"),
        *("--evaluate-by", "likelihood", "--push-to-hub", repo, "--base-license", "mit"),
    ]
    joined = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "GLOO_SOCKET_IFNAME": "lo"}
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": ROOT}
    ranks = [
        subprocess.Popen(command, env=hub.environment(**joined, RANK=str(rank), LOCAL_RANK=str(rank)), **pipes)
        for rank in range(2)
    ]
    try:
        wait_for(hub, f"POST /api/models/{repo}/commit/.* stalled", ranks[0])
        printed = hub.outputs(ranks[1])
        assert ranks[1].returncode == 0, printed
        assert ranks[0].poll() is None and hub.names(repo=repo) == set()
        hub.release()
        printed = hub.outputs(ranks[0])
        assert ranks[0].returncode == 0 and "Pushed: " in printed[0], printed
    finally:
        for rank in ranks:
            rank.kill()
    assert without_card(hub.files(repo=repo)) == exported(folder)
    card = hub.files(repo=repo)["README.md"].decode()
    found = json.loads((folder / "verification.json").read_text())
    assert f"largest difference {found['largest_logit_difference']:.4g}, mean" in card
    assert found["largest_logit_difference"] < 1e-3 < found["largest_logit"] and "license: mit" in card


# --------------------------------------------------------------------------------------------------------- refusals


def test_what_the_hub_refuses_is_one_line(hub: LocalHub, plain: Path) -> None:
    hub.faults()
    num_requests = len(hub.log())
    assert "run hf auth login" in error_of(hub.push(plain, "somebody/x", HF_TOKEN=None))
    assert "HF_HUB_OFFLINE" in error_of(hub.push(plain, "somebody/x", HF_HUB_OFFLINE="1"))
    assert len(hub.log()) == num_requests  # not even asked
    wrong = "hf_" + "Wrong7" * 6
    refused = hub.push(plain, "somebody/x", HF_TOKEN=wrong)
    assert "token is not accepted" in error_of(refused) and wrong not in refused.stdout + refused.stderr
    assert "may not write to forbidden/x" in error_of(hub.push(plain, "forbidden/x"))
    assert hub.names(repo="somebody/x") == set()


def test_a_refusal_is_final_and_what_can_pass_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    told: list[str] = []
    monkeypatch.setattr("adalora_dist.artifacts.hub.push.time.sleep", waits.append)

    def fail(error: Exception) -> None:
        raise error

    persist = _Persistence("a/b", told.append)
    passing = RuntimeError("Error while uploading")
    passing.__cause__ = ConnectionResetError(104, "Connection reset by peer")
    assert "failed 8 times ([Errno 104] Connection reset by peer)" in refusal(persist, lambda: fail(passing))
    assert waits == [1, 2, 4, 8, 16, 32, 60] and len(told) == 7
    assert "cannot be pushed to" in refusal(persist, lambda: fail(FileNotFoundError(2, f"no {TOKEN}")))
    assert "no ***" in refusal(persist, lambda: fail(ValueError(f"no {TOKEN}"))) and len(waits) == 7
    with pytest.raises(TypeError):  # a mistake of the program's is not the Hub's
        persist(lambda: fail(TypeError()))


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({"Retry-After": "7"}, 7),
        ({"Retry-After": "in 90 seconds"}, 90),
        ({"Retry-After": "Sun, 06 Nov 1994 08:49:37 GMT"}, 0),
        ({"Retry-After": "soon"}, 0),
        ({"ratelimit": '"api";r=0;t=55'}, 55),
        ({"ratelimit": '"api";r=3;t=55'}, 0),
        ({}, 0),
    ],
)
def test_how_long_the_server_asks_to_wait(headers: dict[str, str], seconds: float) -> None:
    if headers.get("Retry-After") == "in 90 seconds":
        headers = {"Retry-After": format_datetime(datetime.now(UTC) + timedelta(seconds=90), usegmt=True)}
    response = httpx2.Response(429, headers=headers, request=httpx2.Request("POST", "http://127.0.0.1/"))
    assert _asked_to_wait(HfHubHTTPError("slow down", response=response)) == pytest.approx(seconds, abs=2)


def test_a_run_that_could_not_be_pushed_does_not_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("adalora_dist.artifacts.hub.push.get_token", lambda: None)
    pushing = {"export": ExportConfig(push_to_hub="a/b")}
    config = RunConfig(**pushing)
    assert "hf auth login" in refusal(check_push_of_run, config, {"RANK": "0"})
    assert "hf auth login" in refusal(check_push_of_run, config, {})
    check_push_of_run(config, {"RANK": "1"})  # where nobody has to be logged in
    check_push_of_run(RunConfig(), {})
    several = GlueConfig(**pushing, train={"seeds": (1, 2)})
    assert "seeds 1 2" in refusal(check_push_of_run, several, {"RANK": "1"})


@pytest.mark.parametrize("recipe", sorted((ROOT / "recipes").glob("*.py")), ids=lambda path: path.stem)
def test_every_recipe_checks_and_pushes(recipe: Path) -> None:
    """Its other ranks are shown to end for one recipe; that the others do it at the same place is read off the text.

    ``Run(config)`` checks and ``close()`` pushes: both once in every recipe, the one first and the other last.
    """
    verbs = (ROOT / "adalora_dist" / "training" / "run.py").read_text(encoding="utf-8")
    lines = [line.strip() for line in verbs.splitlines()]
    assert lines.index("check_push_of_run(config)") < next(i for i, x in enumerate(lines) if "build_accelerator(c" in x)
    ended, pushed = (lines.index(call) for call in ("self.accelerator.end_training()", "push_run(self.config)"))
    assert pushed > ended > max(i for i, x in enumerate(lines) if "wait_for_everyone" in x)
    body = ast.parse(recipe.read_text(encoding="utf-8")).body
    text = ast.unparse(next(node for node in body if isinstance(node, ast.FunctionDef) and node.name == "main"))
    [name] = re.findall(r"^    (\w+) = Run\(config\)$", text, re.MULTILINE)
    assert text.count("Run(config)") == text.count(".close()") == 1 and text.endswith(f"\n    {name}.close()")
    assert text.index("Run(config)") < text.index(".load_model(") < text.index(".finish(")


def test_login_of_the_cache_is_enough(hub: LocalHub, plain: Path, tmp_path: Path) -> None:
    hub.faults()
    (tmp_path / "token").write_text(TOKEN)
    finished = hub.push(plain, "somebody/logged-in", HF_TOKEN=None, HF_TOKEN_PATH=str(tmp_path / "token"))
    assert finished.returncode == 0, finished.stderr


def change(action: str, run: Path) -> None:
    merged = run / "merged"
    weights = merged / "model-00003-of-00010.safetensors"
    if action == "cut off":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif action == "file missing":
        weights.unlink()
    elif action == "matrix missing":
        index = merged / "model.safetensors.index.json"
        content = json.loads(index.read_text())
        content["weight_map"] = {k: v for k, v in content["weight_map"].items() if v != weights.name}
        index.write_text(json.dumps(content))
        weights.unlink()
    elif action == "token in a file":
        (merged / "generation_config.json").write_text(json.dumps({"key": "hf_" + "abc" * 12}))
    elif action == "no configuration":
        (merged / "config.json").unlink()
    elif action == "no such export":
        shutil.rmtree(merged)


@pytest.mark.parametrize(
    ("action", "says"),
    [
        ("cut off", "model-00003-of-00010.safetensors is not a whole safetensors file"),
        ("file missing", "is said to be in model-00003-of-00010.safetensors, and is not"),
        ("matrix missing", "its weights lack model.layers"),
        ("token in a file", "generation_config.json holds a token"),
        ("no configuration", "neither config.json nor adapter_config.json"),
        ("no such export", "adalora-dist export"),
    ],
)
def test_an_export_that_is_not_whole_is_not_pushed(run: Path, tmp_path: Path, action: str, says: str) -> None:
    shutil.copytree(run, tmp_path / "run")
    change(action, tmp_path / "run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_TOKEN", TOKEN)
        patch.setattr("adalora_dist.artifacts.hub.push.HfApi", None)  # it must not come so far
        assert says in refusal(push, tmp_path / "run", "somebody/broken")


def test_a_wrong_folder_is_told_before_a_missing_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("adalora_dist.artifacts.hub.push.get_token", lambda: None)
    assert "neither config.json nor" in refusal(push, tmp_path, "somebody/x")
    assert "is not a folder" in refusal(push, tmp_path / "none", "somebody/x")
    (tmp_path / "config.json").write_text("{}")
    assert "run hf auth login" in refusal(push, tmp_path, "somebody/x")


# -------------------------------------------------------------------------------------------------------- the token


def files_with(needle: str, folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file() and needle.encode() in path.read_bytes()]


def test_the_token_is_in_no_file_and_no_log(pushed: Any, hub: LocalHub, place: Path) -> None:
    """Runs after the others, over all that they left: run folders, the server's blobs, caches, everything printed."""
    assert len(list((hub.folder / "blobs").iterdir())) > 10 and (place / "outputs.txt").stat().st_size > 10_000
    assert "authorization: <TOKEN>" in (place / "outputs.txt").read_text()  # the client's log at its wordiest
    assert files_with(TOKEN, place) == []
    planted = place / "run" / "merged" / "planted"
    planted.write_text(f"x{TOKEN}x")
    assert files_with(TOKEN, place) == [planted]  # the search finds what is there
    planted.unlink()
