"""Run a notebook of examples/ anew, in the folder of its images, and keep what it shows: notebooks.py NAME FOLDER."""

import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode

EXAMPLES = Path(__file__).parents[2] / "examples"
WIDGET = "application/vnd.jupyter.widget-view+json"


def executed(notebook: NotebookNode, folder: Path, before: str = "") -> NotebookNode:
    """The notebook with the outputs that its cells give in this folder; `before` is run first and not kept."""
    first = nbformat.v4.new_code_cell(before or "None")
    whole = nbformat.v4.new_notebook(cells=[first, *notebook.cells], metadata=notebook.metadata)
    options = {"timeout": 1800, "record_timing": False, "store_widget_state": False}
    NotebookClient(whole, resources={"metadata": {"path": folder}}, **options).execute()
    cells, count = whole.cells[1:], 0
    for cell in cells:
        if cell.cell_type != "code":
            continue
        count += 1
        cell.execution_count = count
        cell.outputs = joined([output for output in cell.outputs if WIDGET not in output.get("data", {})])
        for output in cell.outputs:
            if output.output_type == "execute_result":
                output.execution_count = count
            if "image/png" in output.get("data", {}):
                output.data.pop("image/jpeg", None)  # Pillow gives both
    metadata = {"kernelspec": notebook.metadata.kernelspec, "language_info": {"name": "python"}}
    return nbformat.v4.new_notebook(cells=cells, metadata=metadata)


def joined(outputs: list[NotebookNode]) -> list[NotebookNode]:
    """The outputs with what a stream says in one piece, as it is where no bar stands between."""
    kept: list[NotebookNode] = []
    for output in outputs:
        before = kept[-1] if kept else {}
        if output.output_type == "stream" and before.get("name") == output.name:
            kept[-1].text += output.text
        else:
            kept.append(output)
    return kept


if __name__ == "__main__":
    name, folder = sys.argv[1:]
    path = EXAMPLES / name
    nbformat.write(executed(nbformat.read(path, as_version=4), Path(folder)), path)
