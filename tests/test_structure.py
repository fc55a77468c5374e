"""The house: nothing imports upwards or in a circle, and no file is too long, code or document."""

import ast
import re
from graphlib import CycleError, TopologicalSorter

from tests.scripts import ROOT

SCRIPTS = ("amodal_fusion_transformer", "amodal_fusion_transformer_inference", "prepare_dataset")
# These import the rooms, never the other way round. prepare is in the package because the installed command needs it.
ABOVE = (*SCRIPTS, "amodal_fusion.prepare", "benchmarks", "experiments", "tests")
# What each room may not import: the rooms above it. From the bottom to the top:
ROOMS = ("data", "ingest", "synthesis", "model", "evaluation", "training", "output")
NOT_FROM = {f"amodal_fusion.{room}": tuple(f"amodal_fusion.{above}" for above in ROOMS[number + 1 :])
            for number, room in enumerate(ROOMS)} | {"experiments": ("benchmarks",)}
MODULE_LINES, SCRIPT_LINES, FORWARD_LINES = 500, 599, 25
DOCUMENT_WORDS = 8000  # in all, Korean README included
NAME_WORDS = 8  # of a test


def read_house():
    """{dotted name: source} of all our modules; packages by their own names."""
    paths = [ROOT / f"{name}.py" for name in SCRIPTS]
    for folder in ("amodal_fusion", "benchmarks", "experiments", "tests"):
        paths += sorted((ROOT / folder).rglob("*.py"))
    return {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"):
            path.read_text(encoding="utf-8") for path in paths}


def imports(name, house):
    """The modules of `house` that module `name` imports, within functions, too."""
    found = set()
    for node in ast.walk(ast.parse(house[name])):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    return {module for module in found if module in house} - {name}


def within(module, package):
    return module == package or module.startswith(package + ".")


def code_lines(source, class_name, function_name):
    """Lines of a method's body, without its docstring, comments and blank lines."""
    classes = (node for node in ast.parse(source).body if isinstance(node, ast.ClassDef) and node.name == class_name)
    (method,) = (node for node in next(classes).body
                 if isinstance(node, ast.FunctionDef) and node.name == function_name)
    body = method.body[1:] if ast.get_docstring(method) else method.body
    lines = source.splitlines()[body[0].lineno - 1 : body[-1].end_lineno]
    return sum(bool(line.strip()) and not line.strip().startswith("#") for line in lines)


ERRORS = r"\w*Error|LpipsUnavailable|NoMeeting"


def flags_in_messages(source):
    """Lines on which the message of an error names a flag of a command line; its text for a terminal may."""
    for call in ast.walk(ast.parse(source)):
        if isinstance(call, ast.Call) and re.fullmatch(ERRORS, getattr(call.func, "id", "")):
            texts = [node.value for argument in call.args for node in ast.walk(argument)
                     if isinstance(node, ast.Constant) and isinstance(node.value, str)]
            if any(re.search(r"(^|\W)--[a-z]", text) for text in texts):
                yield call.lineno


def import_faults(house):
    """A line per import of {dotted name: source} that goes upwards or in a circle."""
    uses = {name: imports(name, house) for name in house}
    for name, used in uses.items():
        if name.split(".")[0] == "amodal_fusion":
            yield from (f"{name} imports {other}, upwards" for other in used
                        if any(within(other, above) for above in ABOVE))
        for room, forbidden in NOT_FROM.items():
            if within(name, room):
                yield from (f"{name} imports {other}" for other in used if any(within(other, f) for f in forbidden))
    try:
        TopologicalSorter(uses).prepare()
    except CycleError as error:
        yield "circle: " + " ← ".join(error.args[1])


def text_faults(house):
    """A line per file of {dotted name: source} that is too long, flag in a message, and long name of a test."""
    for name, source in house.items():
        count = len(source.splitlines())
        most = SCRIPT_LINES if name in SCRIPTS else MODULE_LINES if within(name, "amodal_fusion") else count
        if count > most:
            yield f"{name}: {count} lines"
        if within(name, "amodal_fusion"):
            yield from (f"{name}, line {line}: a flag in a message" for line in flags_in_messages(source))
        if within(name, "tests"):
            tests = re.findall(r"^ *def test_(\w+)", source, re.M)
            yield from (f"{name}: test_{test} has more than {NAME_WORDS} words" for test in tests
                        if len(test.split("_")) > NAME_WORDS)
    if SCRIPTS[0] in house:
        count = code_lines(house[SCRIPTS[0]], "AmodalFusionTransformer", "forward")
        if count > FORWARD_LINES:
            yield f"AmodalFusionTransformer.forward: {count} lines"


def faults(house):
    return [*import_faults(house), *text_faults(house)]


def test_structure_rules_hold():
    house = read_house()
    assert {*SCRIPTS, "amodal_fusion.model", "amodal_fusion.data.scenes", "tests.test_structure"} <= house.keys()
    assert {"amodal_fusion.config", "amodal_fusion.model.cues"} <= imports(SCRIPTS[0], house)
    assert faults(house) == []


def test_structure_faults_are_found():
    network = "class AmodalFusionTransformer:\n  def forward(self):\n    '''Doc.'''\n\n    # why\n" + "    pass\n" * 26
    house = {
        "amodal_fusion_transformer": network, "prepare_dataset": "pass\n" * 600,
        "amodal_fusion.long": "pass\n" * 501, "amodal_fusion.fine": "pass\n" * 500,
        "amodal_fusion.training.run": "import amodal_fusion.fine",
        "amodal_fusion.model.up": "def f():\n  from amodal_fusion_transformer import g",
        "tests.helper": "import amodal_fusion.fine", "tests.fine": "def test_a_b_c_d_e_f_g_h(): pass",
        "tests.long": "class A:\n  def test_a_b_c_d_e_f_g_h_i(): pass",
        "amodal_fusion.prepare": "import amodal_fusion.training.run",
        "amodal_fusion.ingest.up": "import amodal_fusion.prepare", "amodal_fusion.data.up": "from tests import helper",
        "amodal_fusion.data.over": "from amodal_fusion.training import run",
        "amodal_fusion.message": "UserError('(--gpus)')\nUserError('a', 'b', terminal='c --d')\nopen('--e')",
        "amodal_fusion.a": "import amodal_fusion.b", "amodal_fusion.b": "from amodal_fusion import a",
    }
    circles = [fault for fault in faults(house) if fault.startswith("circle: ")]
    assert len(circles) == 1 and "amodal_fusion.a ← amodal_fusion.b" in circles[0]
    assert sorted(set(faults(house)) - set(circles)) == [
        "AmodalFusionTransformer.forward: 26 lines",
        "amodal_fusion.data.over imports amodal_fusion.training.run",
        "amodal_fusion.data.up imports tests.helper, upwards",
        "amodal_fusion.ingest.up imports amodal_fusion.prepare, upwards",
        "amodal_fusion.long: 501 lines",
        "amodal_fusion.message, line 1: a flag in a message",
        "amodal_fusion.model.up imports amodal_fusion_transformer, upwards",
        "prepare_dataset: 600 lines",
        "tests.long: test_a_b_c_d_e_f_g_h_i has more than 8 words",
    ]


def test_documents_stay_short():
    documents = [path for folder in (".", "docs", "benchmarks", "experiments", "examples", "pretrained")
                 for path in (ROOT / folder).glob("*.md")]
    assert {"README.md", "README.ko.md", "CONTRIBUTING.md", "design.md"} <= {path.name for path in documents}
    words = {str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").split()) for path in documents}
    assert sum(words.values()) <= DOCUMENT_WORDS, words
