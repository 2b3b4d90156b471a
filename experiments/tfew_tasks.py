"""The tasks of `experiments.tfew`: Python's own docstrings, and questions on words that are made by rule.

A task gives rows; how they are asked is in `configs/tfew/tasks/TASK.yaml`. The base is trained on `MIXTURE`;
the tasks in `HELD_OUT` are what few shots must teach: the same facts about words and texts, asked for in
ways, or about modules, that the mixture does not have.
"""

import ast
import collections
import re
import sysconfig
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tokenizers

from fishjax import data
from fishjax.types import Batch

Row = dict[str, Any]
KNOWN = ("tkinter", "asyncio", "importlib", "email", "logging", "decimal", "xml", "inspect")
NEW = ("multiprocessing", "turtle", "unittest", "http")
OTHER = (
    "argparse",
    "codecs",
    "collections",
    "concurrent",
    "ctypes",
    "datetime",
    "json",
    "mailbox",
    "pathlib",
)
OTHER += ("shutil", "socket", "ssl", "subprocess", "tarfile", "threading", "typing", "urllib", "zipfile")
SPECIAL = ("<pad>", "</s>", "<unk>", "<a>", "<b>")  # <a> and <b> stand for what is cut out of a text
LENGTH = 12  # words of a docstring that are kept
MODEL = {"model_type": "t5", "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
MODEL |= {"pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0}


class Task(NamedTuple):
    """A held-out task as arrays, all tasks of the same shapes."""

    shots: Batch  # [rows * templates]: each row under each template, in this order
    tests: list[Batch]  # one for each template


class World(NamedTuple):
    """What the tasks are made of."""

    texts: dict[str, list[list[str]]]  # module -> docstrings as words
    words: list[str]  # frequent words


def read_world() -> World:
    """Read first paragraphs of docstrings of the standard library; nothing is imported or run."""
    root = Path(sysconfig.get_path("stdlib"))
    texts: dict[str, list[list[str]]] = {}
    for module in (*KNOWN, *NEW, *OTHER):
        files = [root / f"{module}.py", root / f"_py{module}.py", *sorted((root / module).rglob("*.py"))]
        files = [file for file in files if file.is_file() and not {"test", "tests"} & set(file.parts)]
        texts[module] = [text for file in files for text in _docstrings(file)]
    # Each text once, and none that several modules have: its module could not be told.
    homes = collections.Counter(t for found in texts.values() for t in set(map(tuple, found)))
    single = lambda found: [list(t) for t in dict.fromkeys(map(tuple, found)) if homes[t] == 1]
    texts = {module: single(found) for module, found in texts.items()}
    counts = collections.Counter(w for found in texts.values() for text in found for w in text)
    words = sorted(w for w, n in counts.items() if n >= 5 and 3 <= len(w) <= 12)
    return World(texts, words)


def _docstrings(path: Path) -> list[list[str]]:
    try:
        nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    except (SyntaxError, UnicodeDecodeError):
        return []
    named = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    found = [ast.get_docstring(node) or "" for node in nodes if isinstance(node, named)]
    texts = [re.findall("[a-z]+", text.split("\n\n")[0].lower())[:LENGTH] for text in found]
    return [text for text in texts if len(text) >= 6]


def make_tokenizer(
    world: World, templates: dict[str, list[data.Template]], size: int
) -> tokenizers.Tokenizer:
    """Return a tokenizer of whole words: the special ones, those of the tasks, then the frequent ones."""
    counts = collections.Counter(w for found in world.texts.values() for text in found for w in text)
    asked = [t.input for several in templates.values() for t in several]
    asked += [c for several in templates.values() for t in several for c in t.choices]
    letters, numbers = [chr(i) for i in range(97, 123)], [str(i) for i in range(1, 13)]
    first = [*SPECIAL, *"?:,", *re.findall("[a-z]+", " ".join(asked)), *letters, *numbers, *KNOWN, *NEW]
    words = dict.fromkeys([*first, *world.words, *(w for w, _ in counts.most_common())])
    vocabulary = {w: i for i, w in enumerate(list(words)[:size])}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    end = [("</s>", vocabulary["</s>"])]
    made.post_processor = tokenizers.processors.TemplateProcessing(single="$A </s>", special_tokens=end)
    return made


# Rows of each task. A maker is given the world and a generator of random numbers and returns one row.
Maker = Callable[[World, np.random.Generator], Row]


def _pick(rng: np.random.Generator, items: Sequence[Any], count: int) -> list[Any]:
    return [items[i] for i in rng.choice(len(items), count, replace=False)]


def _options(rng: np.random.Generator, right: Any, others: Sequence[Any], count: int = 4) -> Row:
    """Return options in random order and where the right one is."""
    wrong = [x for x in dict.fromkeys(map(str, others)) if x != str(right)]
    options = [str(right), *_pick(rng, wrong, min(count - 1, len(wrong)))]
    order = rng.permutation(len(options)).tolist()
    return {"options": [options[i] for i in order], "label": order.index(0)}


def _module(modules: Sequence[str], choices: int) -> Maker:
    def make(world: World, rng: np.random.Generator) -> Row:
        right = modules[rng.integers(len(modules))]
        found = world.texts[right]
        text = found[rng.integers(len(found))]
        if choices == len(modules):
            return {"text": " ".join(text), "label": modules.index(right)}
        return {"text": " ".join(text), **_options(rng, right, modules, choices)}

    return make


def _missing(world: World, rng: np.random.Generator) -> Row:
    found = world.texts[KNOWN[rng.integers(len(KNOWN))]]
    text = list(found[rng.integers(len(found))])[:12]
    at = int(rng.integers(len(text)))
    word, text[at] = text[at], "<a>"
    return {"text": " ".join(text), **_options(rng, word, _pick(rng, world.words, 8))}


def _of_word(ask: Callable[[str], Any], others: Sequence[Any]) -> Maker:
    def make(world: World, rng: np.random.Generator) -> Row:
        word = world.words[rng.integers(len(world.words))]
        return {"word": word, **_options(rng, ask(word), others)}

    return make


def _yes_or_no(ask: Callable[[str], bool]) -> Maker:
    """Ask yes (0) or no (1) about a word, as often yes as no."""

    def make(world: World, rng: np.random.Generator) -> Row:
        wanted = bool(rng.integers(2))
        word = next(
            w for w in iter(lambda: world.words[rng.integers(len(world.words))], None) if ask(w) == wanted
        )
        return {"word": word, "label": 0 if wanted else 1}

    return make


def _place(place: Callable[[list[str]], str]) -> Maker:
    def make(world: World, rng: np.random.Generator) -> Row:
        words = _pick(rng, world.words, int(rng.integers(3, 6)))
        right = place(words)
        return {"words": " ".join(words), **_options(rng, right, words, 3)}

    return make


def _contains(world: World, rng: np.random.Generator) -> Row:
    *words, other = _pick(rng, world.words, int(rng.integers(3, 6)))
    inside = bool(rng.integers(2))
    word = words[rng.integers(len(words))] if inside else other
    return {"words": " ".join(words), "word": word, "label": 0 if inside else 1}


def _count(world: World, rng: np.random.Generator) -> Row:
    count = int(rng.integers(1, 7))
    return {"words": " ".join(_pick(rng, world.words, count)), **_options(rng, count, range(1, 7))}


def _many(world: World, rng: np.random.Generator) -> Row:
    count = int(rng.integers(1, 7))
    return {"words": " ".join(_pick(rng, world.words, count)), "label": 0 if count > 3 else 1}


LETTERS = [chr(i) for i in range(97, 123)]
MIXTURE: dict[str, Maker] = {
    "module": _module(KNOWN, 4),
    "missing": _missing,
    "begins": _of_word(lambda w: w[0], LETTERS),
    "ends": _of_word(lambda w: w[-1], LETTERS),
    "letters": _of_word(len, range(3, 13)),
    "first": _place(lambda words: words[0]),
    "last": _place(lambda words: words[-1]),
    "contains": _contains,
    "count": _count,
}
HELD_OUT: dict[str, Maker] = {
    "new_modules": _module(NEW, 4),  # texts of modules that no question of the mixture is about
    "long": _yes_or_no(lambda w: len(w) > 6),  # the mixture asks for the number of letters
    "vowel": _yes_or_no(lambda w: w[0] in "aeiou"),  # ... for the letter itself
    "second": _place(lambda words: words[1]),  # ... for the first and the last
    "many": _many,  # ... for the number of words
}


def rows_of(maker: Maker, world: World, count: int, *, seed: int) -> list[Row]:
    """Return rows of a task, the same for the same seed."""
    rng = np.random.default_rng(seed)
    return [maker(world, rng) for _ in range(count)]


def parts(world: World, *, split: str, seed: int) -> tuple[World, World]:
    """Split texts and words: few shots come from the first half, validation and test from the other.

    Args:
      split: `"validation"` or `"test"`: which part of the second half is returned.
    """
    rng = np.random.default_rng(seed)
    first, last = {"validation": (0.5, 0.7), "test": (0.7, 1.0)}[split]

    def cut(items: list[Any]) -> tuple[list[Any], list[Any]]:
        mixed = [items[i] for i in rng.permutation(len(items))]
        at = [int(share * len(mixed)) for share in (0.5, first, last)]
        return mixed[: at[0]], mixed[at[1] : at[2]]

    texts = {m: cut(found) for m, found in world.texts.items()}
    words = cut(world.words)
    few, held = (World({m: t[i] for m, t in texts.items()}, words[i]) for i in range(2))
    return few, held


def denoising(world: World, count: int, *, seed: int) -> list[data.Question]:
    """Return texts with two spans cut out, and the spans as the only choice (arXiv 1910.10683, 3.1.4)."""
    rng = np.random.default_rng(seed)
    texts = [text for module, found in world.texts.items() if module not in NEW for text in found]
    questions = []
    for _ in range(count):
        text = texts[rng.integers(len(texts))]
        a, b = np.sort(rng.choice(np.arange(len(text) // 2), 2, replace=False)) * 2
        ends = a + 1 + rng.integers(2), b + 1 + rng.integers(2)
        cut = [*text[:a], "<a>", *text[ends[0] : b], "<b>", *text[ends[1] :]]
        spans = ["<a>", *text[a : ends[0]], "<b>", *text[b : ends[1]]]
        questions.append(data.Question(" ".join(cut), (" ".join(spans),), 0))
    return questions


def answers(rows: Batch) -> Batch:
    """Keep the right choice alone: all that L_LM sees."""
    right = np.take_along_axis(rows["choices"], rows["answer"][:, None, None], axis=1)
    return {
        **rows,
        "choices": right,
        "choice_mask": np.ones(right.shape[:2], bool),
        "answer": 0 * rows["answer"],
    }


def prepared(
    few: World,
    held: World,
    templates: dict,
    encode: Callable,
    *,
    shots: int,
    tests: int,
) -> dict[str, Task]:
    """Return the held-out tasks, padded to common shapes so that one program serves them all."""
    blocks, places = [], []
    for name, maker in HELD_OUT.items():
        rows = rows_of(maker, few, shots, seed=4)
        blocks.append(encode(data.render_all(templates[name], rows)))
        rows = rows_of(maker, held, tests, seed=5)
        blocks += [encode(data.render_all([template], rows)) for template in templates[name]]
        places += [name] * (1 + len(templates[name]))
    whole, ends = data.mix(blocks, seed=0), np.cumsum([data.examples(b) for b in blocks])
    cut = [{n: x[end - data.examples(b) : end] for n, x in whole.items()} for b, end in zip(blocks, ends)]
    of = {name: [c for c, place in zip(cut, places) if place == name] for name in HELD_OUT}
    return {name: Task(first, rest) for name, (first, *rest) in of.items()}
