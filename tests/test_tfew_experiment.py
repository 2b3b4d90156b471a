"""The T-Few experiment: its tasks ask what they say, and a toy run writes its tables and goes on."""

import json

import jax
import numpy as np
import pytest

pytest.importorskip("gin")
pytest.importorskip("tokenizers")
pytest.importorskip("matplotlib")

from experiments import tfew, tfew_tasks
from fishjax import data, models

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def standard_promotion():
    """Flax and optax mix dtypes of their own."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


@pytest.fixture(scope="module")
def world():
    return tfew_tasks.read_world()


def test_tasks_ask_what_they_say(world):
    rows = lambda name: tfew_tasks.rows_of(
        {**tfew_tasks.MIXTURE, **tfew_tasks.HELD_OUT}[name], world, 50, seed=3
    )
    said = lambda row: row["options"][row["label"]]
    assert all(r["word"].startswith(said(r)) for r in rows("begins"))
    assert all(r["word"].endswith(said(r)) for r in rows("ends"))
    assert all(len(r["word"]) == int(said(r)) for r in rows("letters"))
    assert all(len(r["words"].split()) == int(said(r)) for r in rows("count"))
    for name, place in (("first", 0), ("second", 1), ("last", -1)):
        assert all(said(r) == r["words"].split()[place] for r in rows(name))
    assert all((r["word"] in r["words"].split()) == (r["label"] == 0) for r in rows("contains"))
    assert all((len(r["words"].split()) > 3) == (r["label"] == 0) for r in rows("many"))
    assert all((len(r["word"]) > 6) == (r["label"] == 0) for r in rows("long"))
    assert all((r["word"][0] in "aeiou") == (r["label"] == 0) for r in rows("vowel"))
    assert all(r["text"].split() in world.texts[said(r)] for r in rows("module"))
    for row in rows("missing"):
        filled = row["text"].replace("<a>", said(row)).split()
        assert any(t[:12] == filled for texts in world.texts.values() for t in texts)
    for r in rows("new_modules"):
        assert r["text"].split() in world.texts[tfew_tasks.NEW[r["label"]]]
    assert all(len(set(r["options"])) == len(r["options"]) for n in ("begins", "second") for r in rows(n))


def test_few_shots_and_scores_share_nothing(world):
    few, test = tfew_tasks.parts(world, split="test", seed=0)
    again, validation = tfew_tasks.parts(world, split="validation", seed=0)
    assert few == again
    for a, b in ((few, test), (few, validation), (validation, test)):
        assert not set(a.words) & set(b.words)
        texts = lambda w: {tuple(t) for m in tfew_tasks.NEW for t in w.texts[m]}
        assert texts(a) and texts(b) and not texts(a) & texts(b)
    whole = tfew_tasks.denoising(world, 300, seed=0)
    for question in whole:  # what is cut out fits back in
        head, rest = question.choices[0].removeprefix("<a> ").split(" <b> ")
        text = question.text.replace("<a>", head).replace("<b>", rest).split()
        assert any(text in world.texts[m] for m in world.texts if m not in tfew_tasks.NEW)


@pytest.mark.parametrize("base", ["given", pytest.param("made", marks=pytest.mark.slow)])
def test_a_toy_run_is_told_and_goes_on(world, tmp_path, monkeypatch, base):
    monkeypatch.setattr(tfew_tasks, "read_world", lambda: world)
    monkeypatch.setattr(tfew_tasks, "HELD_OUT", {n: tfew_tasks.HELD_OUT[n] for n in ("long", "second")})
    monkeypatch.setattr(tfew_tasks, "MIXTURE", {n: tfew_tasks.MIXTURE[n] for n in ("begins", "module")})
    sizes = {"width": 8, "layers": 1, "vocabulary": 400, "shots": 8, "tests": 6, "rows": 40}
    steps = {"text_steps": 2, "mixture_steps": 2, "pretrain_steps": 2, "steps": 2}
    ways = [tfew.Method("(IA)^3", "pretrained", 3e-2)]
    if base == "given":  # as an earlier run left it
        config = tfew_tasks.MODEL | {"vocab_size": 400, "d_model": 8, "d_kv": 2, "num_heads": 4}
        model = models.build(config | {"d_ff": 16, "num_layers": 1})
        rng, shapes = np.random.default_rng(0), jax.eval_shape(model.init, jax.random.key(0))
        drawn = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), shapes)
        models.save(tmp_path / "run" / "base", model, drawn)
    play = lambda: tfew.run(out=str(tmp_path / "run"), methods=ways, seeds=(0, 1), **sizes, **steps)
    results = play()
    cells = results["methods"]["(IA)^3"]
    assert set(cells) == {"long", "second"} and all(len(c) == 2 for c in cells.values())
    assert (
        all(0 <= a <= 1 for c in cells["long"] for a in c["accuracy"]) and len(first(cells)["accuracy"]) == 2
    )
    # Keys and values of three attentions and two feed-forwards, all of width 8 or 16.
    assert first(cells)["parameters"] == 3 * 2 * 8 + 2 * 16
    assert first(cells)["bytes"] == (tmp_path / "run" / "patches" / "_IA__3.safetensors").stat().st_size
    assert results["chance"] == pytest.approx({"long": 1 / 2, "second": 1 / 3})
    assert "| (IA)^3 |" in (tmp_path / "run" / "report.md").read_text()
    assert (tmp_path / "run" / "plots" / "methods.svg").stat().st_size > 100
    assert json.loads((tmp_path / "run" / "results.json").read_text())["methods"] == results["methods"]
    monkeypatch.setattr(tfew.Learner, "learn", None)  # nothing is left to be learnt
    assert play() == results
    (tmp_path / "run" / "config.gin").write_text("of other settings")
    with pytest.raises(SystemExit, match="other settings"):
        play()


def first(cells):
    return cells["long"][0]


def test_answers_alone():
    rows = {"choices": np.arange(12).reshape(2, 3, 2), "answer": np.array([2, 0])}
    alone = tfew_tasks.answers({**rows, "choice_mask": np.ones((2, 3), bool)})
    assert alone["choices"].tolist() == [[[4, 5]], [[6, 7]]] and alone["answer"].tolist() == [0, 0]
    data.check_choices(alone)
