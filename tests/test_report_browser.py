"""The report in a real browser: hostile text runs nothing, and the page fits a narrow window."""

import shutil
import subprocess
from pathlib import Path

import pytest
from matplotlib.image import imread
from run_files import hostile_run, summary, write_run

from opentao.report import write_report

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
]

pytestmark = [pytest.mark.browser, pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")]


def browse(page: Path, *flags: str) -> str:
    """Open the page with a profile of its own and return what the command printed."""
    profile = page.parent / "profile"
    command = [str(CHROMIUM), *FLAGS, f"--user-data-dir={profile}", *flags, page.as_uri()]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout


def test_hostile_text_runs_nothing(tmp_path):
    dom = browse(write_report(hostile_run(tmp_path)), "--dump-dom")
    head = dom[: dom.index("</head>")]
    assert "<title>OpenTAO: &lt;/title&gt;" in head
    assert "<title>owned" not in dom
    for tag in ("<script", "<img", "<base", "<iframe", '<meta http-equiv="refresh'):
        assert tag not in dom
    assert dom.count("<article") == 20  # the page was read to its end


def test_the_test_would_notice_a_script(tmp_path):
    page = tmp_path / "page.html"
    page.write_text("<title>safe</title><script>document.title='owned'</script>")
    assert "<title>owned" in browse(page, "--dump-dom")


@pytest.mark.parametrize("dark", [False, True])
def test_pictures_can_be_taken(dark, tmp_path):
    page, picture = write_report(write_run(tmp_path, summary())), tmp_path / "picture.png"
    scheme = ["--blink-settings=preferredColorScheme=0"] if dark else []
    browse(page, "--window-size=1200,900", f"--screenshot={picture}", *scheme)
    image = imread(picture)
    assert image.shape[:2] == (900, 1200)
    assert (image[5, 5, :3].mean() < 0.2) == dark


def test_nothing_sticks_out_of_a_narrow_window(tmp_path):
    """A frame of 400 pixels in a page of ours measures the report; the report itself has its scripts forbidden."""
    page = write_report(write_run(tmp_path, summary()))
    outer = tmp_path / "outer.html"
    outer.write_text(
        f'<iframe id="f" src="{page.name}" width="400" height="800"></iframe><script>'
        'onload = () => { const d = f.contentDocument.documentElement; document.title = "width " + d.scrollWidth }'
        "</script>"
    )
    assert "<title>width 400</title>" in browse(outer, "--allow-file-access-from-files", "--dump-dom")
