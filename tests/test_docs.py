"""The documentation site as `make docs` builds it, in a browser; and maelab in a real notebook's kernel."""

import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import nbformat
import pytest
from nbclient import NotebookClient

from maelab.data import Dataset, ImageSet
from maelab.fitting import Fit

ROOT = Path(__file__).parents[1]


class Page(HTMLParser):
    """Where a page leads, and what can be led to on it."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.links: set[str] = set()
        self.ids: set[str] = {""}
        self.feed(file.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name == "id" and value:
                self.ids.add(value)
            elif name in ("href", "src") and value and not value.startswith("data:"):
                self.links.add(value)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("docs") / "site"
    flags = ("--quiet", "--fail-on-warning", "--keep-going", "-c", "docs", ".", str(out))
    built = subprocess.run([sys.executable, "-m", "sphinx", *flags], cwd=ROOT, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr[-5000:]
    return out


def run_in_a_notebook(folder: Path, *cells: str) -> list[list[dict]]:
    """The outputs of each cell."""
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    NotebookClient(book, timeout=600, resources={"metadata": {"path": str(folder)}}).execute()
    return [cell.outputs for cell in book.cells]


@pytest.mark.slow
def test_a_training_in_a_notebook_shows_lines_and_a_bar_and_leaves_its_plots_alone(digits_folder: Path, tmp_path: Path):
    start = """
from dataclasses import replace

import IPython.display
import maelab
from maelab import recipes

updates, update = [], IPython.display.DisplayHandle.update

def recorded(self, shown):
    updates.append(shown.data)
    update(self, shown)

IPython.display.DisplayHandle.update = recorded
"""
    train = f"config = replace(recipes.pretrain_smoke(), data='folder:{digits_folder}', limit=64, batch_size=16)\n"
    train += "maelab.pretrain(config, options=maelab.RunOptions(out='run', device='cpu'))[0]"
    plot = "import matplotlib.pyplot as plt\nplt.plot([1, 2]);"
    trained, updates, plotted = run_in_a_notebook(tmp_path, start + train, "print(updates)", plot)
    text = json.dumps(trained)
    assert "train loss" in text and "ipywidgets" not in text
    assert "<progress value=" in updates[0]["text"] and updates[0]["text"].rstrip().endswith("'']")
    assert "image/png" in plotted[-1]["data"]


@pytest.mark.slow
def test_every_link_of_the_site_leads_somewhere(site: Path):
    pages = {file: Page(file) for file in site.rglob("*.html")}
    assert len(pages) > 20
    for file, page in pages.items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme:
                continue
            target = (file.parent / unquote(parts.path)).resolve() if parts.path else file
            assert target.is_file(), f"{file.name}: {link}"
            if target in pages and file.name not in ("genindex.html", "search.html"):
                assert unquote(parts.fragment) in pages[target].ids, f"{file.name}: {link}"


@pytest.mark.slow
@pytest.mark.browser
def test_the_site_asks_no_host_and_shows_the_notebook_as_it_ran(site: Path, browser):
    tab, asked = browser.new_page(), []
    tab.on("request", lambda request: asked.append(request.url))
    tab.goto((site / "index.html").as_uri())
    tab.wait_for_url("**/docs/index.html")
    for page in sorted((site / "docs").glob("*.html")):
        tab.goto(page.as_uri())
    assert {urlsplit(url).scheme for url in asked} <= {"file", "data"}
    tab.goto((site / "docs" / "notebook.html").as_uri())
    assert "begins from" in tab.inner_text("table") and "own autoencoder" in tab.inner_text("table")
    pictures = tab.eval_on_selector_all("article img", "images => images.map(image => image.naturalWidth)")
    assert len(pictures) >= 5 and min(pictures) > 100


# ------------------------------------------------------------------------------------------------- without a kernel


def test_a_fit_shows_its_verdict_accuracies_and_pictures(tmp_path: Path):
    from PIL import Image

    Image.new("RGB", (3, 2)).save(tmp_path / "rebuilt.png")
    result = Fit(
        verdict="It is <b>good</b>.\n\nIs it? \x1b[31m",
        val={"images": 20, "pretrained": 0.5, "scratch": 0.25},
        test={"images": 30, "pretrained": 0.7512, "scratch": 0.2},
        reconstruction=str(tmp_path / "rebuilt.png"),
        mistakes=str(tmp_path / "not there.png"),
        report="<report>",
        model=None,
    )
    page = result._repr_html_()
    assert "<p>It is &lt;b&gt;good&lt;/b&gt;.</p>" in page and "\x1b" not in page and "<b>" not in page
    assert "<tr><td>own autoencoder</td><td>0.5000</td><td>0.7512</td></tr>" in page and "the weights given" not in page
    assert "n = 20" in page and "n = 30" in page and page.count("data:image/png;base64,") == 1
    assert "<code>&lt;report&gt;</code>" in page and "model:" not in page
    unlabelled = Fit({key: value for key, value in result.items() if key not in ("val", "test")})
    assert "<table>" not in unlabelled._repr_html_()


def test_a_data_set_is_shown_in_a_line():
    import torch

    images = torch.zeros(5, 3, 4, 6, dtype=torch.uint8)
    data = Dataset("folder:x", ImageSet(images, torch.zeros(5, dtype=torch.int64)), None, ("a", "b"), {})
    assert repr(data) == "Dataset('folder:x', train=ImageSet(5 images of 3 x 4 x 6, labelled), 2 classes)"
    assert repr(ImageSet(images, None)) == "ImageSet(5 images of 3 x 4 x 6, without labels)"


def test_the_notebook_is_kept_without_what_it_showed():
    book = json.loads((ROOT / "docs" / "notebook.ipynb").read_text(encoding="utf-8"))
    assert all(not cell.get("outputs") and not cell.get("execution_count") for cell in book["cells"])
    assert not re.search(r"https?://|/home/|/tmp", json.dumps(book))
