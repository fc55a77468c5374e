"""What documents say is so."""

import dataclasses
import re

import pytest

from amodal_fusion_transformer import AmodalFusionTransformer, TrainConfig
from tests.scripts import ROOT


def read(name):
    return (ROOT / name).read_text(encoding="utf-8")


def test_every_name_from_elsewhere_is_documented_and_the_size_it_makes():
    names = set(re.findall(r"`(\w+)`", read("docs/options.md")))
    aliases = {name for field in dataclasses.fields(TrainConfig) for name in field.metadata["aliases"]}
    assert aliases and not (aliases | set(TrainConfig.FOREIGN)) - names
    for size in ((256, 6, 6, 8), (128, 2, 2, 4)):
        count = sum(p.numel() for p in AmodalFusionTransformer(*size).parameters())
        assert f" {count / 1e6:.1f} M" in read("docs/options.md")


@pytest.mark.parametrize("name", ["CONTRIBUTING.md", "CHANGELOG.md", "docs/licences.md", "docs/options.md"])
def test_links_and_named_files_are_there(name):
    text = read(name)
    targets = [link.split("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", text) if not link.startswith("http")]
    for target in targets:
        assert ((ROOT / name).parent / target).exists(), target
    for path in re.findall(r"`((?:fusion|tests|docs|pretrained)/[\w./]+)`", text):
        assert (ROOT / path).exists(), path
