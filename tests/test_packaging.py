"""What `pip install .` adds, and that version and licence are the same everywhere."""

import ast
import configparser
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile

import yaml

from amodal_fusion.checkpoints import PRETRAINED
from amodal_fusion.model.backbone import WEIGHTS
from amodal_fusion_transformer_inference import SHIPPED
from tests.scripts import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
BUILD = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"


def test_the_wheel_adds_only_names_of_amodal_fusion(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for pattern in ("*.py", "pyproject.toml", "README.md", "LICENSE", "requirements.txt"):
        for path in ROOT.glob(pattern):
            shutil.copy(path, source)
    for name in ("amodal_fusion", "pretrained", "tests", "benchmarks", "examples"):
        shutil.copytree(ROOT / name, source / name, copy_function=shutil.copy,
                        ignore=shutil.ignore_patterns("__pycache__", "*.png"))
    command = [sys.executable, "-c", BUILD, str(tmp_path)]
    process = subprocess.run(command, cwd=source, capture_output=True, text=True, timeout=120, check=False)
    assert process.returncode == 0, process.stdout + process.stderr
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        info = f"amodal_fusion_transformer-{PROJECT['version']}.dist-info"
        names = {name for name in archive.namelist() if not name.startswith(info)}
        entries = archive.read(f"{info}/entry_points.txt").decode()
        metadata = archive.read(f"{info}/METADATA").decode()
    below = [path for path in ROOT.glob("amodal_fusion/**/*") if path.is_file() and path.parent.name != "__pycache__"]
    expected = {path.relative_to(ROOT).as_posix() for path in (*ROOT.glob("amodal_fusion*.py"), *below)}
    expected |= {f"amodal_fusion/pretrained/{path.name}" for path in (SHIPPED, WEIGHTS, PRETRAINED / "README.md")}
    assert names == expected
    assert all(name.startswith("amodal_fusion") for name in names)
    for line in (ROOT / "requirements.txt").read_text().split():
        assert f"Requires-Dist: {line}\n" in metadata
    assert "License-Expression: MIT\n" in metadata

    scripts = configparser.ConfigParser()
    scripts.read_string(entries)
    assert set(scripts["console_scripts"]) == {f"amodal-fusion-{name}" for name in ("train", "infer", "prepare")}
    for target in scripts["console_scripts"].values():
        module, function = target.split(":")
        tree = ast.parse((ROOT / f"{module.replace('.', '/')}.py").read_text(encoding="utf-8"))
        assert any(isinstance(node, ast.FunctionDef) and node.name == function for node in tree.body)


def test_version_licence_and_authors_agree():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert {"cff-version", "message", "title", "authors", "version", "license"} <= set(citation)
    newest = re.search(r"^## (\S+) \((\S+)\)$", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.M)
    assert newest.groups() == (citation["version"], str(citation["date-released"]))
    assert citation["version"] == PROJECT["version"]
    licence = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert licence.startswith(f"{citation['license']} License") and PROJECT["license"] == citation["license"]
    assert f"Copyright (c) 2026 {citation['authors'][0]['name']}\n" in licence
    assert citation["authors"][0]["name"] == PROJECT["authors"][0]["name"]
