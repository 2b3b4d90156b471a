"""`fishjax vet` on files: broken, hostile and misfitting ones, exit codes, reports."""

import json
import struct
import subprocess
import sys
from xml.etree import ElementTree

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fishjax import checkpoint, models, patches, vet
from fishjax.checkpoint._safetensors import SEAL
from fishjax.cli import main
from tests.vet_world import context, finding, make


@pytest.fixture(scope="module")
def world():
    return make()


@pytest.fixture
def folder(tmp_path, world):
    base, good, held = world
    checkpoint.save_params(tmp_path / "base.safetensors", base)
    checkpoint.save_patch(tmp_path / "good", good, base=base, metadata={"claims": ["mirrored"]})
    (tmp_path / "tests").mkdir()
    for pack in held:
        vet.save_pack(tmp_path / "tests" / f"{pack.name}.safetensors", pack)
    return tmp_path


def rewrite(path, change):
    """Change a patch file's header and seal it again, as someone who knows the format would."""
    import hashlib

    data = path.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    head, body = change(data[8 : 8 + length].decode(), data[8 + length :])
    raw = head.encode()
    raw += b" " * (-len(raw) % 8)
    data = struct.pack("<Q", len(raw)) + raw + body
    at = data.index(f'"{SEAL}":"'.encode()) + len(SEAL) + 4
    blank = data[:at] + b"0" * 64 + data[at + 64 :]
    path.write_bytes(blank[:at] + hashlib.sha256(blank).hexdigest().encode() + blank[at + 64 :])


def truncated(path, world):
    path.write_bytes(path.read_bytes()[:-1])


def flipped(path, world):
    data = bytearray(path.read_bytes())
    data[-5] ^= 4
    path.write_bytes(data)


def doubled(path, world):
    rewrite(path, lambda head, body: (head.replace("{", '{"__metadata__":{},', 1), body))


def overlapping(path, world):
    def change(head, body):
        table = json.loads(head)
        table["x::y"] = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
        return json.dumps(table, separators=(",", ":"), ensure_ascii=False), body

    rewrite(path, change)


def out_of_range(path, world):
    """A patch for a longer leaf, its manifest made to say that it is for this one."""
    long = {"w": np.zeros(9, np.float32)}
    patch = {"w": patches.Sparse(np.array([1, 8]), np.ones(2, np.float32))}
    checkpoint.save_patch(path, patch, base=long)
    rewrite(path, lambda head, body: (head.replace('\\"shape\\":[9]', '\\"shape\\":[8]'), body))


def not_a_number(path, world):
    """NaN written into the values of a file that is otherwise right."""

    def change(head, body):
        table = json.loads(head)
        spot = next(v["data_offsets"][0] for k, v in table.items() if k.endswith("::values"))
        return head, body[:spot] + struct.pack("<f", float("nan")) + body[spot + 4 :]

    rewrite(path, change)


def other_base(path, world):
    base, good, _ = world
    other = jax.tree.map(jnp.array, base)
    other["head"]["bias"] = other["head"]["bias"].at[0].add(1e-6)
    checkpoint.save_patch(path, good, base=other)


def other_untouched_leaf(path, world):
    base = world[0]
    other = jax.tree.map(jnp.array, base)
    other["head"]["bias"] = other["head"]["bias"].at[0].add(1e-6)
    checkpoint.save_patch(path, {"block_0.bias": patches.Dense(jnp.ones(16))}, base=other)


def other_model(path, world):
    checkpoint.save_patch(path, {"w": patches.Dense(jnp.ones(3))}, base={"w": jnp.zeros(3)})


def pickled(path, world):
    path.write_bytes(b"\x80\x04K*.")


BAD = [
    (truncated, 3, "integrity"),
    (flipped, 3, "corrupt"),
    (doubled, 3, "twice"),
    (overlapping, 3, "overlaps"),
    (out_of_range, 3, "reach from 1 to 8"),
    (pickled, 3, "pickle"),
    (not_a_number, 1, "NaN"),
    (other_base, 4, "head.bias"),
    (other_untouched_leaf, 4, "another|for base"),
    (other_model, 4, "`w`"),
]


@pytest.mark.parametrize(("spoil", "code", "says"), BAD, ids=[b[0].__name__ for b in BAD])
def test_bad_files_have_their_exit_code_and_one_line(folder, world, capsys, spoil, code, says):
    bad = folder / "good"
    spoil(bad, world)
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    got = main(["vet", str(bad), "--base", str(folder / "base.safetensors")])
    out, err = capsys.readouterr()
    assert got == code, (out, err)
    import re

    assert re.search(says, err) and len(err.splitlines()) == 1 and "Traceback" not in out + err
    assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["missing", "--base", "BASE"], "missing"),
        (["good", "--base", "nowhere"], "nowhere"),
        (["good"], "--base"),
        (["good", "--base", "BASE", "--nonsense"], "nonsense"),
        (["good", "--base", "BASE", "--tests", "nowhere"], "nowhere"),
        (["good", "--base", "BASE", "--policy", "nowhere"], "nowhere"),
    ],
)
def test_bad_arguments_are_usage_errors(folder, capsys, monkeypatch, arguments, says):
    monkeypatch.chdir(folder)
    got = main(["vet", *("base.safetensors" if a == "BASE" else a for a in arguments)])
    out, err = capsys.readouterr()
    assert got == 2 and says in err and len(err.splitlines()) == 1 and not out


def test_a_base_that_cannot_be_run_is_inconclusive(folder, capsys):
    arguments = ["vet", str(folder / "good"), "--base", str(folder / "base.safetensors")]
    assert main([*arguments, "--tests", str(folder / "tests")]) == 7
    assert "give its folder" in capsys.readouterr().out


def test_a_model_folder_is_run_on_its_tests_and_tasks(tmp_path, capsys, key):
    config = {
        "model_type": "fishjax_digits",
        "num_hidden_layers": 1,
        "hidden_size": 8,
        "num_attention_heads": 2,
    }
    model = models.build({**config, "intermediate_size": 8})
    base = model.init(key)
    models.save(tmp_path / "base", model, base)
    image = np.random.default_rng(0).random((200, 8, 8)).astype(np.float32)
    label = np.asarray(model.apply(base, {"image": image})).argmax(-1)  # so the base is always right
    for folder in ("tests", "tasks"):
        (tmp_path / folder).mkdir()
    vet.save_pack(tmp_path / "tests" / "held.safetensors", vet.pack("held", {"image": image, "label": label}))
    kinds = {"head.classifier.bias": patches.Sparse(np.array([0]), np.array([1e-4], np.float32))}
    checkpoint.save_patch(tmp_path / "mild", kinds, base=base)
    checkpoint.save_patch(tmp_path / "tasks" / "task", kinds, base=base)
    kinds = {"head.classifier.bias": patches.Dense(np.arange(10, dtype=np.float32))}
    checkpoint.save_patch(tmp_path / "wild", kinds, base=base)
    for name, code in (("mild", 0), ("wild", 1)):
        where = [
            "--base",
            tmp_path / "base",
            "--tests",
            tmp_path / "tests",
            "--downstream",
            tmp_path / "tasks",
        ]
        assert main(["vet", str(tmp_path / name), *map(str, where), "--json"]) == code
        told = {f["name"]: f for f in json.loads(capsys.readouterr().out)["findings"]}
        assert told["tests"]["details"]["tests"][0]["accuracy_before"] == 1
        assert told["downstream"]["details"]["tests"][0]["name"] == "task/held"
        assert told["tests"]["exit_code"] == told["downstream"]["exit_code"] == code


def test_misfits_are_told_without_jax(folder, world):
    other_base(folder / "good", world)
    code = (
        "import sys; from fishjax.cli import main; "
        f"code = main(['vet', {str(folder / 'good')!r}, '--base', {str(folder / 'base.safetensors')!r}]); "
        "assert code == 4, code; assert 'jax' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_a_result_that_is_not_what_the_file_says_is_corrupt(folder, world):
    import re

    rewrite(
        folder / "good",
        lambda head, body: (
            re.sub(r'(\\"results\\":{\\"[^"]*\\":\\"sha256:)[0-9a-f]{8}', r"\g<1>00000000", head),
            body,
        ),
    )
    report = vet.files(folder / "good", folder / "base.safetensors")
    assert report.exit_code == 3 and "does not come out" in report.findings[-1].summary


def test_reports_are_equal_bytes_and_well_formed(folder, world):
    reports = [vet.run(context(world)) for _ in range(2)]
    for write in (vet.to_text, vet.to_json, vet.to_markdown, vet.to_junit):
        assert write(reports[0], patch="p") == write(reports[1], patch="p")
    told = json.loads(vet.to_json(reports[0]))
    assert told["verdict"] == "accept" and [f["name"] for f in told["findings"]] == [
        "integrity",
        "base",
        "structure",
        "size",
        "tests",
        "downstream",
    ]
    suite = ElementTree.fromstring(vet.to_junit(reports[0], patch="p"))
    assert suite.get("failures") == "0" and len(suite) == 6
    told = vet.to_markdown(reports[0])
    kl = finding(reports[0], "size").details["kl"]["held"]["measured"]
    assert "| mirrored | 600 |" in told and f"| held | {kl:.2e} |" in told


def test_hostile_names_reach_no_terminal_and_break_no_table(world):
    name = "a|b\x1b[31m\n<script>"
    report = vet.run(context(world, metadata={"claims": [name]}), vet.CHECKS)
    assert "\x1b" not in vet.to_text(report) and "\x1b" not in vet.to_junit(report)
    ElementTree.fromstring(vet.to_junit(report))
    line = next(x for x in vet.to_markdown(report).splitlines() if x.startswith("| tests"))
    assert "<script>" not in line and "\x1b" not in line and r"a\|b" in line


def test_outputs_are_written_and_init_gives_the_defaults(folder, capsys, monkeypatch):
    monkeypatch.chdir(folder)
    lenient = folder / "lenient.yaml"
    lenient.write_text("require_tests: false\n")
    arguments = ["vet", "good", "--base", "base.safetensors", "--policy", "lenient.yaml"]
    assert main([*arguments, "--json", "--markdown", "r.md", "--junit", "r.xml"]) == 0
    assert json.loads(capsys.readouterr().out)["verdict"] == "accept"
    assert "accept" in (folder / "r.md").read_text()
    assert ElementTree.parse(folder / "r.xml").getroot().get("tests") == "6"
    assert main(["vet", "--init"]) == 0
    assert vet.load_policy(folder / "vet.yaml") == vet.Policy()
    assert main(["vet", "--init"]) == 2  # nothing is written over


def test_without_policy_and_tests_only_the_file_is_asked_for(folder, capsys, monkeypatch):
    monkeypatch.chdir(folder)
    assert main(["vet", "good", "--base", "base.safetensors"]) == 0
    assert "no held test was given" in capsys.readouterr().out
    (folder / "strict.yaml").write_text("nfr_budget: 0.02\n")
    assert main(["vet", "good", "--base", "base.safetensors", "--policy", "strict.yaml"]) == 7
