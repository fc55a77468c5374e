"""The documents agree with the code and with each other."""

import ast
import dataclasses
import re

import pytest

from amodal_fusion_transformer import AmodalFusionTransformer, TrainConfig
from tests.scripts import ROOT


def read(name):
    return (ROOT / name).read_text(encoding="utf-8")


def test_config_aliases_and_network_sizes_are_documented():
    names = set(re.findall(r"`(\w+)`", read("docs/options.md")))
    aliases = {name for field in dataclasses.fields(TrainConfig) for name in field.metadata["aliases"]}
    assert aliases and not (aliases | set(TrainConfig.ALIASES)) - names
    for size in ((256, 6, 6, 8), (128, 2, 2, 4)):
        count = sum(p.numel() for p in AmodalFusionTransformer(*size).parameters())
        assert f" {count / 1e6:.1f} M" in read("docs/options.md")


FOLDERS = (".", "docs", "benchmarks", "experiments", "examples", "pretrained")
DOCUMENTS = [path.relative_to(ROOT).as_posix() for folder in FOLDERS for path in sorted((ROOT / folder).glob("*.md"))]


@pytest.mark.parametrize("name", DOCUMENTS)
def test_links_and_named_files_exist(name):
    text = read(name)
    targets = [link.split("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", text) if not link.startswith("http")]
    for target in targets:
        assert ((ROOT / name).parent / target).exists(), target
    for path in re.findall(r"`((?:amodal_fusion|tests|docs|pretrained|experiments|benchmarks)/[\w./]+)`", text):
        assert (ROOT / path).exists(), path
    for module in re.findall(r"python3? -m ((?:experiments|benchmarks|tests)\.[a-z_]+)", text):
        assert (ROOT / f"{module.replace('.', '/')}.py").exists(), module


def outline(text):
    """Per section its level, commands, link targets, code names and table numbers: alike in every language."""
    sections, language = [{"level": 0, "commands": [], "prose": "", "figures": []}], None
    for line in text.splitlines():
        section = sections[-1]
        if line.startswith("```"):
            language = line[3:] if language is None else None
        elif language is not None:  # a block without a language is a drawing, whose words are translated
            section["commands"] += re.sub(r"\s*#.*", "", line).split() if language else []
        elif line.startswith("#"):
            sections.append({"level": len(line.split()[0]), "commands": [], "prose": "", "figures": []})
        else:
            section["prose"] += f"{line}\n"
            section["figures"] += re.findall(r"\d+(?:\.\d+)?", line) if line.startswith("|") else []
    for section in sections:
        prose = section.pop("prose")
        section["links"] = sorted(target.split("#")[0] for target in re.findall(r"\]\(([^)\s]+)\)", prose))
        section["names"] = sorted(" ".join(name.split()) for name in re.findall(r"`([^`]+)`", prose))
    return sections


def test_korean_readme_matches_the_english():
    english = outline(read("README.md"))
    text = read("README.ko.md").replace("](README.md)", "](README.ko.md)")  # each links to the other
    korean = outline(text.replace("scripts.ko.md", "scripts.md"))
    assert [section["level"] for section in korean] == [section["level"] for section in english]
    for one, other in zip(english, korean):
        assert other == one


def test_korean_page_on_earlier_scripts_matches():
    english = outline(read("docs/earlier_scripts.md").replace("earlier_scripts.ko.md", "earlier_scripts.md"))
    assert outline(read("docs/earlier_scripts.ko.md")) == english


def test_outline_shows_every_difference():
    english = "# A\n```bash\n# a comment\npython x.py --a 1  # why\n```\n[b](c.md#d) `e`\n## F\n| a | 1.5 |\n"
    korean = "# 가\n```bash\n# 설명\npython x.py --a 1  # 이유\n```\n`e` [나](c.md#다)\n## 라\n| 마 | 1.5 |\n"
    assert outline(korean) == outline(english)
    changes = {"--a 1": "--a 2", "## F": "### F", "\n## F": "\nF", "c.md": "d.md", "1.5": "1.6", "`e`": "`f`"}
    for old, new in changes.items():
        assert outline(english.replace(old, new)) != outline(korean), old


def test_every_fault_names_its_test():
    keywords = re.findall(r"\|`(\w+)`$", read("docs/reliability.md"), re.M)
    tests = {node.name for path in (ROOT / "tests").glob("test_*.py")
             for node in ast.parse(path.read_text(encoding="utf-8")).body if isinstance(node, ast.FunctionDef)}
    assert len(keywords) > 30
    assert not [keyword for keyword in keywords if not any(keyword in test for test in tests)]
