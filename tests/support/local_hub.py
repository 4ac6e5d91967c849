"""The Hub of tests/support/hub_server.py as a process of its own, a run to push to it, and commands that talk to it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import torch

from adalora_dist.artifacts.export import save_adapter
from adalora_dist.config.sections import ExportConfig, ModelConfig, TrainConfig
from adalora_dist.methods.update import AdapterWeights
from adalora_dist.tasks.commonsense.config import CommonsenseConfig
from adalora_dist.training.run_folder import RunFolder
from tests.support.paths import ROOT
from tests.support.tiny_language_model import byte_tokenizer, tiny_llama

TOKEN = "hf_" + "Zq7" * 12
REPO = "somebody/a-model"


class LocalHub:
    """Started by the constructor, ended by :meth:`stop`."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.home = folder / "server", folder / "home"
        self.home.mkdir(parents=True)
        command = [sys.executable, str(Path(__file__).with_name("hub_server.py")), str(self.folder)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(TOKEN + "\n")
        self.process.stdin.flush()
        self.address = self.process.stdout.readline().strip()
        assert self.address.startswith("http://127.0.0.1:")

    def stop(self) -> None:
        self.process.kill()
        self.process.communicate()

    def get(self, path: str, body: Any = None) -> bytes | None:
        """What a reader with the token gets; None: there is no such thing."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.address + path, data, {"Authorization": f"Bearer {TOKEN}"})
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return answer.read()
        except urllib.error.HTTPError as error:
            assert error.code == 404, error
            return None

    def faults(self, *faults: dict[str, Any]) -> None:
        self.get("/_control/faults", [{"times": 1, **fault} for fault in faults])

    def faults_left(self) -> list[dict[str, Any]]:
        return json.loads(self.get("/_control/state") or b"")["faults_left"]

    def log(self) -> list[str]:
        """Every request so far, ``METHOD path outcome``."""
        return json.loads(self.get("/_control/state") or b"")["log"]

    def release(self) -> None:
        self.get("/_control/release")

    def num_pushes(self, repo: str = REPO) -> int:
        return json.loads(self.get("/_control/pushes") or b"")[repo]

    def names(self, revision: str = "main", repo: str = REPO) -> set[str]:
        """Files that a reader sees, without what the Hub itself puts there; none without a repository."""
        answer = self.get(f"/api/models/{repo}/revision/{revision}")
        listed = json.loads(answer)["siblings"] if answer else []
        return {file["rfilename"] for file in listed} - {".gitattributes"}

    def files(self, revision: str = "main", repo: str = REPO) -> dict[str, bytes]:
        found = {name: self.get(f"/{repo}/resolve/{revision}/{name}") for name in self.names(revision, repo)}
        assert None not in found.values()
        return {name: content for name, content in found.items() if content is not None}

    def environment(self, **changes: str | None) -> dict[str, str]:
        """Of a process that uses this Hub as the Hub, logged in."""
        unwanted = ("HF_", "HUGGING", "RANK", "LOCAL_RANK", "WORLD_SIZE", "ACCELERATE_")
        values: dict[str, str | None] = {k: v for k, v in os.environ.items() if not k.startswith(unwanted)}
        values |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
        values |= {"HF_ENDPOINT": self.address, "HF_HOME": str(self.home), "HF_TOKEN": TOKEN, **changes}
        return {k: v for k, v in values.items() if v is not None}

    def start_push(self, *arguments: Any, **environment: str | None) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "adalora_dist.__main__", "push", *(str(word) for word in arguments)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen(command, env=self.environment(**environment), cwd=ROOT, **pipes)

    def push(self, *arguments: Any, **environment: str | None) -> subprocess.CompletedProcess[str]:
        process = self.start_push(*arguments, **environment)
        out, errors = self.outputs(process)
        return subprocess.CompletedProcess(process.args, process.returncode, out, errors)

    def outputs(self, process: subprocess.Popen[str]) -> tuple[str, str]:
        """What a process printed until its end; kept in a file, too, for the search for the token."""
        out, errors = process.communicate(timeout=300)
        with (self.folder.parent / "outputs.txt").open("a", encoding="utf-8") as file:
            file.write(out + errors)
        return out, errors


def write_inspectable_run(folder: Path) -> Path:
    """:func:`write_run` with an adapter of one matrix beside, which pictures can be drawn of."""
    run = write_run(folder)
    matrices = [AdapterWeights("layers.0.q", torch.ones(4, 2), torch.ones(2), torch.ones(2, 4), 1.0, False)]
    save_adapter(matrices, run / "adapter", "a/b", None)
    return run


def write_run(folder: Path, seed: int = 0, max_shard_size: str = "120KB", draw: bool = True) -> Path:
    """A finished run as a recipe leaves it: a tiny merged LLaMA in several files, and everything that a card tells.

    Without ``draw``, all but what pictures are drawn of.
    """
    config = CommonsenseConfig(
        model=ModelConfig(name="somebody/a-base"),
        train=TrainConfig(output_dir=str(folder)),
        export=ExportConfig(base_license="apache-2.0"),
    )
    facts = {
        "engine": "fsdp2",
        "num_processes": 2,
        "base_commit": "c0ffee" * 6 + "c0de",
        "num_trainable_parameters": 1234,
    }
    run = RunFolder(config, True, facts)
    tokenizer = byte_tokenizer()
    model = tiny_llama(600, hidden_size=96)  # 230 kB of embeddings: a file that is uploaded in parts
    with torch.no_grad():
        model.lm_head.weight.add_(seed)
    model.save_pretrained(folder / "merged", max_shard_size=max_shard_size)
    tokenizer.save_pretrained(folder / "merged")
    task = {"task": "boolq", "method": "likelihood", "num_rows": 40, "majority": 0.5, "num_parse_failures": 0}
    run.write_json("results.json", {"before": [{**task, "num_correct": 21}], "after": [{**task, "num_correct": 33}]})
    differences = {"largest_logit_difference": 0.000123, "mean_logit_difference": 4.5e-5, "largest_logit": 12.25}
    run.write_json("verification.json", differences)
    if draw:
        linear = [n for n, module in model.named_modules() if isinstance(module, torch.nn.Linear) and "layers" in n]
        run.write_json("rank_pattern.json", {name: index % 4 for index, name in enumerate(linear)})
        change = {"lowest_kept_score": 1e-9, "pruned": 2, "returned": 1}
        allocations = [json.dumps({"step": step, "budget": 56 - step, **change}) for step in range(2, 14, 2)]
        (folder / "allocations.jsonl").write_text("\n".join(allocations) + "\n")
    for step in range(20):
        run.log({"step": step, "loss": 1.0 / (1 + step), "budget": 56 - step})
    return folder
