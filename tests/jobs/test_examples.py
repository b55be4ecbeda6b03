"""The notebooks of jobs/examples: they run from the first cell to the last, and hold nothing of a machine."""

import ast
import json
from pathlib import Path

import numpy as np
import pytest

EXAMPLES = sorted((Path(__file__).parents[2] / "jobs" / "examples").glob("*.ipynb"))


def code_cells(path):
    return [cell for cell in json.loads(path.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]


def run(cells):
    """Run the cells in one namespace, as a notebook does; return it and the value of each cell's last line."""
    names, values = {}, []
    for cell in cells:
        tree = ast.parse("".join(cell["source"]))
        last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
        exec(compile(tree, "cell", "exec"), names)
        values.append(eval(compile(ast.Expression(last.value), "cell", "eval"), names) if last else None)
    return names, values


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_a_notebook_is_stored_without_outputs(path):
    for cell in code_cells(path):
        assert cell["outputs"] == [] and cell["execution_count"] is None
    assert "/home/" not in (text := path.read_text(encoding="utf-8")) and "/tmp/" not in text and "/work/" not in text


def test_the_notebook_segments_the_stones_that_it_draws(tmp_path, monkeypatch):
    from PIL import Image

    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    (path,) = EXAMPLES
    names, values = run(code_cells(path))
    for image, result in zip(names["images"], names["results"], strict=True):
        stone = np.asarray(Image.open(names["folder"] / "masks" / "stone" / f"{image.stem}.png")) > 0
        assert 2 * (stone & (result.mask == 1)).sum() / (stone.sum() + result.sum()) > 0.6
    assert any(isinstance(value, Image.Image) for value in values)
    assert all(len(repr(value)) < 500 for value in values)
    assert any("<img" in value._repr_html_() for value in values if hasattr(value, "_repr_html_"))
