"""Run the code cells of a notebook one after the other, as Jupyter does: python -m tests.notebook FILE."""

import json
import os
import sys
from pathlib import Path


def main():
    path = Path(sys.argv[1]).resolve()
    os.chdir(path.parent)  # where Jupyter starts
    names = {"__name__": "__main__"}
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), f"{path.name}:{cell['id']}", "exec"), names)


if __name__ == "__main__":
    main()
