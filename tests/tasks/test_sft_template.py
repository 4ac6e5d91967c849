"""Which tokens carry loss, on five styles of chat templates; what happens to long rows and to hostile templates."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from adalora_dist.config.sections import ModelConfig
from adalora_dist.tasks.rows.bad_rows import BadRows
from adalora_dist.tasks.rows.tokens import IGNORED
from adalora_dist.tasks.sft import template as template_file
from adalora_dist.tasks.sft.config import SftDataConfig
from adalora_dist.tasks.sft.preview import marked_text, preview
from adalora_dist.tasks.sft.template import ChatTemplate, plain_template, set_template
from tests.support.chat_templates import STYLES, Style, Turns
from tests.support.paths import ROOT
from tests.support.refusals import refused
from tests.support.sft_rows import CONVERSATIONS, FIRST, content, loaded, marked, tokenizer_of
from tests.support.tiny_language_model import byte_tokenizer

every_style = pytest.mark.parametrize("style", STYLES.values(), ids=STYLES)


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ADALORA_DIST_CACHE", str(tmp_path / "cache"))


# ------------------------------------------------------------------------------------------------- what carries loss


@every_style
@pytest.mark.parametrize("turns", CONVERSATIONS.values(), ids=CONVERSATIONS)
@pytest.mark.parametrize("way", ["comparing", "marks"])
def test_replies_alone_are_learnt(style: Style, turns: Turns, way: str) -> None:
    tokenizer = tokenizer_of(style.plain if way == "comparing" else style.marked, style.specials)
    template = ChatTemplate(tokenizer)
    assert template.has_marks == (way == "marks")
    if turns[0][0] == "system" and not style.takes_system:
        with refused(r"a.jsonl:1: the chat template refuses the conversation \(no system turn here\).*--bad-rows skip"):
            marked(template, content(turns))
        return
    assert marked(template, content(turns)) == style.expected(turns)
    everything = marked(template, content(turns), "all")
    whole = style.expected(turns).replace("[[", "").replace("]]", "")
    assert everything.replace("[[", "").replace("]]", "") == whole
    assert len(everything) == len(whole) + 4 and everything.endswith("]]")  # all but the first token


@every_style
def test_completions_of_conversations(style: Style) -> None:
    """A prompt that is a list of messages may have replies of its own, which are given and not learnt."""
    turns = CONVERSATIONS["three turns"]
    row = content(turns) | {"first": 3}
    given, learnt = style.expected(turns[:3]), style.expected(turns)
    for text in (style.plain, style.marked):
        assert marked(ChatTemplate(tokenizer_of(text, style.specials)), row) == (
            given.replace("[[", "").replace("]]", "") + learnt[len(given) :]
        )


@every_style
def test_prompts_are_what_training_has_before_a_reply(style: Style) -> None:
    template = ChatTemplate(tokenizer_of(style.plain, style.specials))
    row = content(CONVERSATIONS["three turns"])
    encoded = template.encode(row, "", "assistant", 4096)
    prompt, reply = template.prompt(row, "")  # type: ignore[misc]
    assert encoded["input_ids"][: len(prompt)] == prompt and encoded["labels"][len(prompt)] != IGNORED
    assert reply == "日本"
    [closing] = template.closing(encoded)
    assert template.tokenizer.decode([closing]) in {*style.specials, "</s>"}


def test_plain_texts_and_prompts() -> None:
    template = ChatTemplate(tokenizer_of(None))
    assert marked(template, {"text": "One."}) == "<s>[[One.</s>]]"
    assert marked(template, {"prompt": "1 + 1 =", "completion": " 2"}) == "<s>1 + 1 =[[ 2</s>]]"
    assert marked(template, {"prompt": "1 + 1 =", "completion": " 2"}, "all") == "<s>[[1 + 1 = 2</s>]]"
    closed = ChatTemplate(byte_tokenizer(adds_eos=True))
    assert marked(closed, {"prompt": "1 + 1 =", "completion": " 2"}) == "<s>1 + 1 =[[ 2</s>]]"
    assert marked(closed, {"text": "One."}) == "<s>[[One.</s>]]"


@pytest.mark.parametrize(("bos", "eos"), [(True, True), (False, True), (True, False)])
def test_a_model_without_template_gets_a_plain_one(bos: bool, eos: bool) -> None:
    tokenizer = byte_tokenizer(bos=bos, eos=eos)
    said = set_template(tokenizer, "")
    assert said.startswith("Chat template: the tokenizer has none, so a plain one is taken and saved with the model")
    turns = CONVERSATIONS["a system turn"]
    names = {"system": "System", "user": "User", "assistant": "Assistant"}
    end = "</s>" if eos else ""
    expected = "<s>" if bos else ""
    for role, text in turns:
        # Without EOS, the blank line is all that tells where a reply ends.
        body = (f"[[{text}{end}]]\n\n" if eos else f"[[{text}\n\n]]") if role == "assistant" else f"{text}\n\n"
        expected += f"### {names[role]}:\n{body}"
    assert marked(ChatTemplate(tokenizer), content(turns)) == expected
    assert tokenizer.chat_template == plain_template(tokenizer)


def test_a_template_that_rewrites_earlier_turns_is_refused() -> None:
    """As those that take the thoughts out of all replies but the last one."""
    text = (
        "{% for m in messages %}{{ m['role'] + ': ' }}{% if m['role'] == 'assistant' and not loop.last %}"
        "{{ m['content'].split('|')[-1] }}{% else %}{{ m['content'] }}{% endif %}{{ '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    template = ChatTemplate(tokenizer_of(text))
    assert marked(template, content(FIRST)).endswith("assistant: [[Hello\nthere\n]]")
    thoughts = (("user", "Hi"), ("assistant", "hm|Ho"), ("user", "And?"), ("assistant", "hm|No"))
    with refused(
        r"a.jsonl:1: turn 2, of the assistant, is written differently when later turns follow.*--train-on all"
    ):
        marked(template, content(thoughts))
    assert marked(template, content(thoughts), "all").endswith("assistant: hm|No\n]]")
    with refused("turn 1, of the assistant, begins the conversation"):
        marked(template, content((("assistant", "Hello"), ("user", "Hi"), ("assistant", "No"))))


def test_tokenizers_without_offsets_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    style, turns = STYLES["chatml"], CONVERSATIONS["a system turn"]
    monkeypatch.setattr(PreTrainedTokenizerFast, "is_fast", property(lambda self: False))
    assert marked(ChatTemplate(tokenizer_of(style.plain, style.specials)), content(turns)) == style.expected(turns)


def test_calls_of_tools_are_said_as_the_template_has_them() -> None:
    call = {"type": "function", "function": {"name": "clock", "arguments": {"zone": "UTC"}}}
    turns = [{"role": "user", "content": "Time?"}, {"role": "assistant", "content": "", "tool_calls": [call]}]
    template = ChatTemplate(tokenizer_of(STYLES["chatml"].plain, STYLES["chatml"].specials))
    with refused("turn 2 calls a tool, for which the chat template has no place"):
        marked(template, {"messages": turns})
    written = [turns[0], turns[1] | {"call_text": '{"name": "clock"}'}]
    assert marked(template, {"messages": written}).endswith('[[{"name": "clock"}<|im_end|>]]\n')
    knows = (
        "{% if tools %}{{ tools | length }} tools\n{% endif %}"
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}"
        "{% for c in m.tool_calls or [] %}{{ c.function | tojson }}{% endfor %}{{ '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    shown = marked(ChatTemplate(tokenizer_of(knows)), {"messages": written, "tools": [call]})
    assert shown == '1 tools\nuser: Time?\nassistant: [[{"name": "clock", "arguments": {"zone": "UTC"}}\n]]'


def test_marks_end_where_a_terminal_would_move() -> None:
    template = ChatTemplate(tokenizer_of(None))
    row = template.encode({"prompt": "a", "completion": "b\x1b[2J"}, "", "assistant", 99)
    assert marked_text(row, template.tokenizer, colour=True) == "<s>a\033[32mb\\x1b[2J</s>\033[0m"


# ------------------------------------------------------------------------------------------------ hostile templates

LOOP = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
HOSTILE = {
    "a loop": (LOOP, "has run for 0.3 seconds without an end"),
    "much text": (
        "{% for a in range(90000) %}{{ 'aaaaaaaaaa' }}{% endfor %}",
        "has made 900,000 characters of a row of",
    ),
    "attributes": ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "cannot be used .*unsafe"),
    "a changed list": ("{{ messages.append(1) }}", "cannot be used .*unsafe"),
    "a long range": ("{{ range(10**8) | length }}", "refuses the conversation .*Range too big"),
    "a file": ("{% include '/etc/passwd' %}", "refuses the conversation .*no loader"),
    "no Jinja": ("{% for %}", "cannot be used .line 1"),
    "no conversation": ("Hello", "the row has no tokens to learn"),
    "a missing key": ("{{ messages[0]['text'] + 'x' }}", "refuses the conversation .*text"),
}


@pytest.mark.parametrize(("text", "reason"), HOSTILE.values(), ids=HOSTILE)
def test_templates_that_cannot_be_used_end_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, reason: str
) -> None:
    if text == LOOP:
        monkeypatch.setattr(template_file, "CPU_SECONDS", 0.3)
    path = tmp_path / "template.jinja"
    path.write_text(text)
    with refused(f"Chat template: {path}: .*({reason})"):
        set_template(tokenizer_of(None), str(path))


def test_a_loop_at_one_row_ends_the_run_whatever_the_policy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_file, "CPU_SECONDS", 0.3)
    style = STYLES["chatml"]
    (tmp_path / "template.jinja").write_text(
        "{% if messages[0].content == 'odd' %}" + LOOP + "{% endif %}" + style.plain
    )
    rows = [content(FIRST), content((("user", "odd"), ("assistant", "x")))]
    with refused("a.jsonl:2: the chat template has run for 0.3 seconds"):
        loaded(tmp_path, rows, style, bad=BadRows("skip"), chat_template=str(tmp_path / "template.jinja"))


def test_templates_that_are_no_files(tmp_path: Path) -> None:
    with refused("chat_template=.*none cannot be read .No such file"):
        set_template(tokenizer_of(None), str(tmp_path / "none"))
    (tmp_path / "latin").write_bytes(b"{{ '\xe9' }}")
    with refused("latin cannot be read .it is not UTF-8 text"):
        set_template(tokenizer_of(None), str(tmp_path / "latin"))


def test_other_threads_render_without_a_limit() -> None:
    found: list[str] = []
    template = ChatTemplate(tokenizer_of(STYLES["zephyr"].plain))
    thread = threading.Thread(target=lambda: found.append(marked(template, content(FIRST))))
    thread.start()
    thread.join()
    assert found == [STYLES["zephyr"].expected(FIRST)]


# ------------------------------------------------------------------------------------------------------ rows on disk


def test_long_rows_are_cut_and_counted(tmp_path: Path) -> None:
    short, long = content((("user", "a"), ("assistant", "b"))), content((("user", "a"), ("assistant", "b" * 99)))
    asks = content((("user", "a" * 99), ("assistant", "b")))
    said: list[str] = []
    rows = loaded(tmp_path, [short, long, asks, short], max_length=40, said=said)
    assert (
        "Cut: 2 rows are longer than max_length=40; 1 of them are left out, because no part of a reply is left" in said
    )
    assert said[-1] == "3 training rows, 0 validation rows"
    assert rows.train["num_tokens"] == [len(row) for row in rows.train["input_ids"]]
    assert sorted(rows.train["num_tokens"])[-1] == 40
    for row in rows.train:
        assert row["num_targets"] == sum(label != IGNORED for label in row["labels"]) > 0
    with refused("no row is left to train on"):
        loaded(tmp_path, [asks], max_length=40, name="b.jsonl")


def test_rows_that_the_template_refuses_are_named_or_counted(tmp_path: Path) -> None:
    good, bad_row = content(FIRST), content((("system", "x"), *FIRST))
    with refused("a.jsonl:2: the chat template refuses the conversation .no system turn here"):
        loaded(tmp_path, [good, bad_row], STYLES["gemma"])
    for _ in range(2):  # the second time from the cache
        bad = BadRows("skip")
        rows = loaded(tmp_path, [good, bad_row, bad_row], STYLES["gemma"], bad)
        assert len(rows.train) == 1 and dict(bad.counts) == {str(tmp_path / "a.jsonl"): 2}


def test_rows_held_out_follow_from_their_content(tmp_path: Path) -> None:
    rows = [{"text": f"row {number}"} for number in range(40)]

    def held_out(rows: list[dict[str, Any]], name: str, **settings: Any) -> tuple[set[Any], set[Any]]:
        found = loaded(tmp_path, rows, name=name, **settings)
        parts = [set(map(tuple, part["input_ids"])) for part in (found.held_out, found.train)]
        assert not parts[0] & parts[1]
        return parts[0], parts[1]

    held, kept = held_out(rows, "a.jsonl", eval_share=0.25)
    assert (len(held), len(kept)) == (10, 30)
    assert held_out(rows[::-1], "b.jsonl", eval_share=0.25)[0] == held
    assert held_out(rows * 2, "c.jsonl", eval_share=0.25) == (held, kept)  # equal rows are on one side
    assert len(held_out(rows, "d.jsonl", eval_share=0.5, max_eval_rows=3)[0]) == 3
    assert len(held_out(rows, "e.jsonl", eval_share=None)[0]) == 2
    with refused("cannot be held out"):
        held_out(rows[:1] * 3, "f.jsonl", eval_share=0.25)


def test_weights_repeat_rows(tmp_path: Path) -> None:
    (tmp_path / "b.jsonl").write_text("".join(json.dumps({"text": f"b{number}"}) + "\n" for number in range(10)))
    words = (f"{tmp_path}/a.jsonl=2", f"{tmp_path}/b.jsonl=0.5")
    rows = loaded(tmp_path, [{"text": "a0"}, {"text": "a1"}], source=words)
    texts = [tuple(row) for row in rows.train["input_ids"]]
    assert len(texts) == 9 and sorted(map(texts.count, set(texts))) == [1] * 5 + [2] * 2
    plan, again = (loaded(tmp_path, [{"text": "a0"}, {"text": "a1"}], source=words).plan(3, 1, True) for _ in range(2))
    assert plan.fingerprint() == again.fingerprint() and plan.num_batches_per_epoch == 3


def test_samples_are_prompts_of_rows_held_out(tmp_path: Path) -> None:
    rows = [content((("user", f"q{number}"), ("assistant", f"a{number}"))) for number in range(20)]
    found = loaded(tmp_path, rows, eval_share=0.2, samples=2, max_length=64)
    tokenizer = tokenizer_of(STYLES["chatml"].plain, STYLES["chatml"].specials)
    assert len(found.samples) == 2
    for prompt, reply in found.samples:
        number = reply.removeprefix("a")
        assert tokenizer.decode(prompt) == f"<|im_start|>user\nq{number}<|im_end|>\n<|im_start|>assistant\n"
    assert [tokenizer.decode([token]) for token in found.closing] == ["<|im_end|>"]


def test_a_template_that_no_row_reads_is_refused(tmp_path: Path) -> None:
    with refused("no row is a conversation, so it would not be read; leave it out"):
        loaded(tmp_path, [{"text": "a"}, {"text": "b"}], chat_template="x.jinja")


def test_tools_without_a_place_are_counted(tmp_path: Path) -> None:
    said: list[str] = []
    loaded(tmp_path, [content(FIRST) | {"tools": [{"name": "f"}]}, content(FIRST)], said=said)
    assert "Tools: the chat template has no place for their descriptions, which 1 rows have: left out" in said


# --------------------------------------------------------------------------------------------------------- --dry-run


def test_preview_marks_three_rows(tmp_path: Path) -> None:
    style = STYLES["zephyr"]
    tokenizer_of(style.plain).save_pretrained(tmp_path / "model")
    path = tmp_path / "a.jsonl"
    path.write_text((json.dumps(content(FIRST)) + "\n") * 3 + json.dumps(content(FIRST[:1] * 2 + FIRST[1:])) + "\n")
    data = SftDataConfig(source=(str(path),), eval_share=0.0)
    num_rows, shown = preview(data, ModelConfig(name=str(tmp_path / "model")))
    assert num_rows == 4 and shown.count(style.expected(FIRST)) == 3 and "a.jsonl:4" not in shown
    num_rows, shown = preview(data, ModelConfig(name=str(tmp_path / "none")))
    assert num_rows == 4 and "Rows       not shown: model=" in shown


def test_the_recipe_is_short() -> None:
    assert len((ROOT / "recipes" / "llama_sft.py").read_text().splitlines()) <= 110
