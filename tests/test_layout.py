"""The rooms import only upwards, and what works on files alone starts without jax."""

import ast
import pathlib
import subprocess
import sys

import fishjax

ORDER = [
    ["types", "errors", "progress"],
    ["strict_yaml"],
    ["tree"],
    ["leaves"],
    ["fisher"],
    ["masks"],
    ["patches"],
    ["checkpoint"],
    ["models"],
    ["data"],
    ["mesh"],
    ["train"],
    ["contribute"],
    ["merge"],
    ["compose"],
    ["vet"],
    ["store"],
    ["swarm"],
    ["plot"],
    ["cli"],
    ["__main__"],
]
RANK = {room: i for i, rooms in enumerate(ORDER) for room in rooms}
ROOT = pathlib.Path(fishjax.__file__).parent


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "fishjax":
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("fishjax."):
            yield node.module.split(".")[1]
        elif isinstance(node, ast.Import):
            yield from (a.name.split(".")[1] for a in node.names if a.name.startswith("fishjax."))


def test_rooms_import_only_upwards():
    wrong = []
    for path in ROOT.rglob("*.py"):
        room = path.relative_to(ROOT).with_suffix("").parts[0]
        if room == "__init__":
            continue
        assert room in RANK, f"{path.name} is in no known room"
        wrong += [
            f"{path.relative_to(ROOT)} imports {other}"
            for other in imports(path)
            if other != room and other in RANK and RANK[other] > RANK[room]
        ]
    assert not wrong, wrong


def test_importing_the_package_loads_neither_jax_nor_a_room():
    code = "import fishjax, fishjax.tree, sys; assert not {'jax', 'fishjax.patches'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
