"""The modules of deltaserve.torch import each other in one direction."""

import re
from pathlib import Path

import deltaserve.torch

ORDER = "_tensors _element_types _groups _states _local_steps _options _overlap _remote _optimizers __init__".split()  # noqa: SIM905


def test_a_module_imports_only_those_before_it() -> None:
    folder = Path(deltaserve.torch.__file__).parent
    assert sorted(ORDER) == sorted(path.stem for path in folder.glob("*.py"))
    for index, name in enumerate(ORDER):
        imported = re.findall(r"from deltaserve\.torch\.(\w+) import", (folder / f"{name}.py").read_text())
        assert set(imported) <= set(ORDER[:index]), name
