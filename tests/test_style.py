"""The house rules that a machine can see: heads, equations, imports, flags, commands."""

import ast
import re
from pathlib import Path

import pytest

import models

ROOT = Path(__file__).resolve().parent.parent
HEADINGS = ["Paper", "Official", "Idea", "Shapes", "Equations"]
NOTES = ["Notes", "Departs", "Silent", "Omits"]
FIRST_MODULE = {"rs2sam2": 180, "rsrefseg2": 200}          # two towers to describe; elsewhere 160
TITLES = {"crobim_u": "CroBIM-U", "icipnet": "ICIPNet", "rsrefseg2": "RSRefSeg 2", "rs2sam2": "RS2-SAM 2",
          "prompt_ris": "Prompt-RIS"}
EQUATIONS = {"crobim_u": 20, "icipnet": 14, "rsrefseg2": 13, "rs2sam2": 7, "prompt_ris": 9}


def numbers(text):
    """Equation numbers written as Eq. (7) or Eqs. (9)-(12)."""
    found = set()
    for first, last in re.findall(r"Eqs?\. ?\((\d+)\)(?:\s*(?:-|–|to)\s*\((\d+)\))?", text):
        found |= set(range(int(first), int(last or first) + 1))
    return found


def marks(text, title=""):
    """Numbers on marked lines: `# Eq. (7)`, in the shared files `# TITLE Eq. (7)`."""
    return {int(number) for number in re.findall(rf"# {re.escape(title + ' ') if title else ''}Eq\. \((\d+)\)", text)}


@pytest.mark.parametrize("name", models.PAPERS)
def test_the_paper_comes_first(name):
    """Head, Config, modules, model, recipe, tokenizer, notes: DESIGN section 4."""
    text = (ROOT / f"models/{name}.py").read_text()
    tree = ast.parse(text)
    head = ast.get_docstring(tree)
    places = [re.search(rf"^{heading}$", head, re.M) for heading in HEADINGS]
    assert all(places), [heading for heading, place in zip(HEADINGS, places, strict=True) if not place]
    assert [place.start() for place in places] == sorted(place.start() for place in places)
    assert head.count("\n") + 1 <= 45
    modules = [node for node in tree.body if isinstance(node, ast.ClassDef)
               and any(ast.unparse(base) == "nn.Module" for base in node.bases)]
    assert modules[0].lineno < FIRST_MODULE.get(name, 160)
    order = {node.name: node.lineno for node in tree.body if isinstance(node, (ast.ClassDef, ast.FunctionDef))}
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            order.setdefault(node.targets[0].id, node.lineno)
    wanted = [order["Config"], modules[0].lineno, order[models.PAPERS[name]], order["RECIPE"], order["RECIPE_FOR"],
              order["RECIPE_TINY"], order["ABLATIONS"], order["SPECIAL_TOKENS"], order["tokenizer"]]
    assert wanted == sorted(wanted)
    notes = [re.search(rf"^# {heading}\b", text, re.M) for heading in NOTES]
    assert all(notes) and [note.start() for note in notes] == sorted(note.start() for note in notes)
    closing = text[notes[0].start():].rstrip("\n").split("\n")
    assert all(line.startswith("#") for line in closing), "the notes are the end of the file"


@pytest.mark.parametrize("name", models.PAPERS)
def test_every_equation_is_indexed_marked_and_tested(name):
    text = (ROOT / f"models/{name}.py").read_text()
    head = ast.get_docstring(ast.parse(text))
    shared = (ROOT / "losses.py").read_text() + (ROOT / "metrics.py").read_text()
    every = set(range(1, EQUATIONS[name] + 1))
    index = head[re.search(r"^Equations$", head, re.M).start():]
    indexed = numbers(index)
    assert every <= indexed, f"not in the index: {every - indexed}"
    marked = marks(text) | marks(shared, TITLES[name])
    assert every <= marked, f"no marked line: {every - marked}"
    tests = (ROOT / f"tests/test_{name}.py").read_text()
    tested = {int(n) for n in re.findall(r"def test_eq0?(\d+)", tests)} | numbers(tests)
    for file in ("test_losses.py", "test_metrics.py"):
        for line in (ROOT / "tests" / file).read_text().split("\n"):
            if TITLES[name] in line:
                tested |= numbers(line)
    assert every <= tested, f"no test: {every - tested}"


@pytest.mark.parametrize("name", models.PAPERS)
def test_model_file_stands_on_losses_alone(name):
    local = {path.stem for path in ROOT.glob("*.py")} | {"models"}
    for node in ast.walk(ast.parse((ROOT / f"models/{name}.py").read_text())):
        modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else \
            [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        assert not {module.split(".")[0] for module in modules} & (local - {"losses"}), modules


@pytest.mark.parametrize("file", ["train.py", "evaluate.py", "data.py"])
def test_every_flag_is_read(file):
    text = (ROOT / file).read_text()
    for call in re.findall(r"add_argument\(([^)]*)", text):
        flag = re.findall(r'"--([a-z-]+)"', call)[0].replace("-", "_")
        uses = len(re.findall(rf"(?:args|options)\.{flag}\b|['\"]{flag}['\"]", text))
        assert uses, f"--{flag} of {file} is never read"


def test_readme_commands_are_those_that_ci_runs():
    readme, ci = (ROOT / "README.md").read_text(), (ROOT / ".ci/run").read_text()
    command = "pip install -r requirements.txt && python -m pytest"
    assert command in readme and command in ci
    assert "pip install -r requirements.txt && python train.py" in readme


def test_top_level_is_closed():
    allowed = {"README.md", "requirements.txt", "models", "tests",
               "data.py", "train.py", "evaluate.py", "losses.py", "metrics.py"}
    ignored = {line.strip("/\n") for line in (ROOT / ".gitignore").read_text().split("\n")}
    there = {path.name for path in ROOT.iterdir() if not path.name.startswith(".")} - ignored
    assert there <= allowed, there - allowed
