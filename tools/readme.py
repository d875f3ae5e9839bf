"""README.md from nbs/index.ipynb, without Quarto: prints the markdown cells and the code cells, with image paths seen from the root."""

import json
import re
from pathlib import Path

NBS = Path(__file__).parent.parent / "nbs"


def readme() -> str:
    "The index notebook as one markdown text"
    parts = ["<!-- made from nbs/index.ipynb by `make readme`; edit the notebook -->"]
    for cell in json.loads((NBS / "index.ipynb").read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(re.sub(r"\]\((?!https?:|#)([^)]+)\)", r"](nbs/\1)", source).replace("(nbs/../", "("))
        elif not source.startswith("#| hide"):
            parts.append(f"```python\n{source}\n```")
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    print(readme(), end="")
