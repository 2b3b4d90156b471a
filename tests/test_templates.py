"""Templates read strictly and filled in; questions as arrays; few-shot samples; mixtures."""

import json

import numpy as np
import pytest

from fishjax import data, models
from fishjax.data import Question, Template
from fishjax.errors import FileFormatError, UsageError

tokenizers = pytest.importorskip("tokenizers")
CONFIG = {"model_type": "t5", "vocab_size": 12, "d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1}
CONFIG |= {"num_heads": 2}
TEXT = """
task: colour
templates:
  - input: "{{word}} {word} is what?"
    choices: ["red", "blue {word}"]
  - input: "which of {options} is {word}?"
    choices: "{options}"
    label: best
"""


def tokenizer():
    words = ["<pad>", "</s>", "<unk>", "red", "blue", "green", "sky", "is"]
    made = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>")
    )
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.post_processor = tokenizers.processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    return made


def test_a_file_is_read_and_rows_are_filled_in(tmp_path):
    (tmp_path / "t.yaml").write_text(TEXT)
    two = data.load_templates(tmp_path / "t.yaml")
    assert two[0].choices == ("red", "blue {word}") and two[1].label == "best"
    row = {
        "word": "a{b}",
        "options": ["p", "q"],
        "label": 1,
        "best": 0,
    }  # a value is never read as a template
    first, second = data.render_all(two, [row])
    assert first == Question("{word} a{b} is what?", ("red", "blue a{b}"), 1)
    assert second == Question("which of p, q is a{b}?", ("p", "q"), 0)
    (tmp_path / "t.json").write_text(json.dumps({"templates": [{"input": "{x}", "choices": ["a"]}]}))
    assert data.load_templates(tmp_path / "t.json") == [Template("{x}", ("a",))]


def test_templates_are_drawn_by_the_seed():
    several = [Template(f"{i} {{x}}", ("a", "b")) for i in range(3)]
    rows = [{"x": i, "label": i % 2} for i in range(300)]
    drawn = [q.text[0] for q in data.render_all(several, rows, seed=1)]
    assert drawn == [q.text[0] for q in data.render_all(several, rows, seed=1)]
    assert drawn != [q.text[0] for q in data.render_all(several, rows, seed=2)]
    assert min(drawn.count(str(i)) for i in range(3)) > 75
    assert len(data.render_all(several, rows)) == 900
    with pytest.raises(UsageError, match="at least one template"):
        data.render_all([], rows)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- 1", "must be a mapping of `task` and `templates`"),
        ("templates: []", "at least one"),
        ("template: []", "must be a mapping of `task`"),
        ("templates: [{input: a}]", "template 0 .* `choices`"),
        ("templates: [{input: a, choices: [b], extra: 1}]", "perhaps `label`"),
        ("templates: [{input: a, choices: [yes, no]}]", "quote yes and no"),
        ("templates: [{input: a, input: b, choices: [c]}]", "key `input` twice"),
        ("templates: [{input: '{a.__class__}', choices: [c]}]", "plain fields"),
        ("templates: [{input: '{a[0]}', choices: [c]}]", "plain fields"),
        ("templates: [{input: '{a!r}', choices: [c]}]", "plain fields"),
        ("templates: [{input: '{a:>99999999}', choices: [c]}]", "plain fields"),
        ("templates: [{input: '{}', choices: [c]}]", "plain fields"),
        ("templates: [{input: '{a', choices: [c]}]", "braces that do not pair"),
        ("templates: [{input: a, choices: [' {b.c}']}]", "plain fields"),
        ("templates: [{input: a, choices: 'b'}]", "one field"),
        ("templates: !!python/object:os.system [a]", "not YAML"),
    ],
)
def test_malformed_files_are_refused(tmp_path, text, message):
    path = tmp_path / "t.yaml"
    path.write_text(text)
    with pytest.raises(UsageError, match=message):
        data.load_templates(path)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"label": 0}, "asks for `x`"),
        ({"x": "a"}, "asks for `label`"),
        ({"x": "a", "label": 2}, "one of 2 choices; got 2"),
        ({"x": "a", "label": -1}, "one of 2 choices"),
        ({"x": "a", "label": True}, "one of 2 choices"),
        ({"x": {"a": 1}, "label": 0}, "must be text, a number"),
    ],
)
def test_rows_that_do_not_fit_are_refused(row, message):
    with pytest.raises(UsageError, match=message):
        data.render(Template("{x}", ("a", "b")), row)


def test_blank_choices_are_refused():
    for blank in ("", " ", "\t\n"):
        with pytest.raises(UsageError, match="choice 1 of the row is blank"):
            data.render(Template("{x}", "{options}"), {"x": "a", "options": ["b", blank], "label": 0})
        with pytest.raises(UsageError, match="choice 0 of the row is blank"):
            data.render(Template("?", ("{x}", "b")), {"x": blank, "label": 1})


def test_questions_become_arrays_padded_to_the_widest():
    model = models.build(CONFIG)
    questions = [Question("sky is", ("blue", "red red"), 0), Question("sky", ("green", "red", "is"), 2)]
    batch = data.encode_choices(questions, tokenizer(), model)
    assert batch["input_ids"].tolist() == [[6, 7, 1], [6, 1, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    none = [-100] * 3
    assert batch["choices"].tolist() == [
        [[4, 1, -100], [3, 3, 1], none],
        [[5, 1, -100], [3, 1, -100], [7, 1, -100]],
    ]
    assert batch["choice_mask"].tolist() == [[True, True, False], [True] * 3]
    assert batch["answer"].tolist() == [0, 2]
    cut = data.encode_choices(questions, tokenizer(), model, max_length=2)
    assert cut["input_ids"].tolist() == [[6, 1], [6, 1]]
    bare = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 2}, unk_token="a"))
    bare.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    with pytest.raises(UsageError, match="choice 1 of example 0 has no tokens"):
        data.encode_choices([Question("a", ("a", ""), 0)], bare, model)


def test_samples_and_mixtures():
    drawn = data.few_shot(range(50), 20, seed=3)
    assert len(set(drawn)) == 20 and drawn[:7] == data.few_shot(range(50), 7, seed=3)
    assert drawn != data.few_shot(range(50), 20, seed=4)
    with pytest.raises(UsageError, match="`shots`"):
        data.few_shot(range(5), 6, seed=0)
    one = {"choices": np.arange(1, 21).reshape(10, 2, 1), "answer": np.zeros(10, int)}
    two = {"choices": np.full((3, 1, 2), 7), "answer": np.zeros(3, int)}
    mixed = data.mix([one, two], seed=0, limit=4)
    assert mixed["choices"].shape == (7, 2, 2) and mixed["choice_mask"].sum() == 4 * 2 + 3
    first = mixed["choices"][:4, 0, 0]
    assert (np.diff(first) > 0).all() and first.tolist() != [1, 3, 5, 7]
    data.check_choices(mixed)
    with pytest.raises(UsageError, match="at least one task"):
        data.mix([], seed=0)
    with pytest.raises(UsageError, match="must have the same"):
        data.mix([one, two | {"more": np.zeros(3)}], seed=0)


def test_lines_with_choices_and_lines_for_templates(tmp_path):
    model = models.build(CONFIG)
    tokenizer().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "a.jsonl").write_text('{"text": "sky is", "choices": ["red", "blue"], "answer": 1}\n')
    batch = data.load_jsonl(tmp_path / "a.jsonl", tmp_path, model)
    assert batch["choices"].tolist() == [[[3, 1], [4, 1]]] and batch["answer"].tolist() == [1]
    (tmp_path / "b.jsonl").write_text('{"w": "sky", "label": 0}\n{"w": "red", "label": 1}\n')
    templates = [Template("{w} is", ("blue", "red")), Template("is {w}", ("red", "blue"))]
    batch = data.load_jsonl(tmp_path / "b.jsonl", tmp_path, model, templates=templates)
    assert batch["input_ids"].tolist() == [[6, 7, 1], [7, 6, 1], [3, 7, 1], [7, 3, 1]]
    for line in ('{"text": "a", "choices": ["b"]}', '{"text": "a", "choices": [], "answer": 0}'):
        (tmp_path / "c.jsonl").write_text(line)
        with pytest.raises(ValueError, match="line 1"):
            data.load_jsonl(tmp_path / "c.jsonl", tmp_path, model)
    good = '{"text": "sky", "choices": ["red", "is"], "answer": 0}\n'
    (tmp_path / "d.jsonl").write_text(good + '{"text": "sky", "choices": ["", "red"], "answer": 0}\n')
    with pytest.raises(FileFormatError, match="line 2: choice 0 of `choices` is blank"):
        data.load_jsonl(tmp_path / "d.jsonl", tmp_path, model)
    (tmp_path / "e.jsonl").write_text('{"w": ["red", "is"], "label": 0}\n{"w": ["red", " "], "label": 0}\n')
    with pytest.raises(UsageError, match=r"e\.jsonl`, line 2: choice 1 of the row is blank"):
        data.load_jsonl(tmp_path / "e.jsonl", tmp_path, model, templates=[Template("sky is", "{w}")])
