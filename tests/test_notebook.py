"""The notebook of examples/."""

import json
import os
import subprocess
import sys

from tests.scripts import ROOT

NOTEBOOK = ROOT / "examples" / "quickstart.ipynb"


def test_notebook_runs_from_its_own_folder(tmp_path):
    environment = {**os.environ, "MPLBACKEND": "Agg", "TMPDIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    process = subprocess.run([sys.executable, "-m", "tests.notebook", NOTEBOOK], cwd=ROOT, env=environment, text=True,
                             capture_output=True, timeout=600, check=False)
    assert process.returncode == 0, process.stdout + process.stderr
    assert "sum in the hole: 1.0" in process.stdout and "| ours |" in process.stdout
    (work,) = tmp_path.glob("tmp*/out")
    assert (work / "report.html").exists() and (work.parent / "my_weights" / "config.json").exists()
    assert (work.parent / "lama" / "football_camera_mask.png").exists()


def test_notebook_is_clean_and_valid():
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    assert notebook["nbformat"] == 4 and notebook["metadata"]["kernelspec"]["language"] == "python"
    for cell in notebook["cells"]:
        assert cell["cell_type"] in ("code", "markdown") and isinstance(cell["source"], list) and cell["id"]
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [] and cell["execution_count"] is None
