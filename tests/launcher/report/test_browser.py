"""The page in a browser: nothing on its console, every curve in its place, nothing wider than the window."""

import json
import re
import shutil
import subprocess
from html import escape, unescape
from pathlib import Path
from typing import Any

import pytest

from narrowgauge.launcher.report.curves import charts_over
from narrowgauge.launcher.report.page import page
from narrowgauge.launcher.report.runs import read_runs
from tests.launcher.report.folders import write_run

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
# The page in a frame as wide as a window would be, and what is seen of it for each axis.
_FRAME = """<!doctype html><body><pre></pre>
<iframe id="page" style="width:{width}px;height:800px;border:0" srcdoc="{page}"></iframe>
<script>
const frame = document.getElementById("page");
frame.onload = () => {{
  const inside = frame.contentDocument, seen = {{}};
  for (const axis of ["steps", "tokens", "time"]) {{
    inside.getElementById("axis-" + axis).checked = true;
    const boxes = [...inside.querySelectorAll(".over-" + axis + " figure > svg .curve")].map(curve => {{
      const box = curve.getBoundingClientRect(), style = frame.contentWindow.getComputedStyle(curve);
      return {{name: curve.dataset.curve, left: box.left, right: box.right, stroke: style.stroke}};
    }});
    seen[axis] = {{boxes, width: inside.documentElement.scrollWidth}};
  }}
  seen.background = frame.contentWindow.getComputedStyle(inside.body).backgroundColor;
  document.querySelector("pre").textContent = JSON.stringify(seen);
}};
</script>"""


def look(text: str, tmp_path: Path, *, width: int, dark: bool) -> dict[str, Any]:
    assert BROWSER is not None
    (tmp_path / "frame.html").write_text(_FRAME.format(width=width, page=escape(text)))
    words = ["--headless=new", "--no-sandbox", "--disable-gpu", "--window-size=1400,900", "--virtual-time-budget=5000"]
    words += [f"--user-data-dir={tmp_path}/profile", "--enable-logging=stderr", "--dump-dom"]
    # 0 is dark, 1 is light.
    words += [f"--blink-settings=preferredColorScheme={0 if dark else 1}", (tmp_path / "frame.html").as_uri()]
    done = subprocess.run([BROWSER, *words], capture_output=True, text=True, timeout=120, check=True)  # noqa: S603
    assert [line for line in done.stderr.splitlines() if "CONSOLE" in line] == []
    (seen,) = re.findall(r"<pre>(.*?)</pre>", done.stdout, re.DOTALL)
    return json.loads(unescape(seen))


@pytest.mark.skipif(BROWSER is None, reason="no Chromium or Chrome on PATH")
@pytest.mark.parametrize(("width", "dark"), [(1300, False), (390, True)])
def test_every_curve_is_seen(tmp_path: Path, width: int, dark: bool) -> None:
    runs = read_runs([write_run(tmp_path / "a"), write_run(tmp_path / "b", lr=0.25, restarted_after=8)])
    seen = look(page(runs), tmp_path, width=width, dark=dark)
    for axis in ("steps", "tokens", "time"):
        expected = [curve.name for chart in charts_over(axis, runs) for curve in chart.curves]
        boxes = seen[axis]["boxes"]
        assert [box["name"] for box in boxes] == expected
        assert all(0 < box["left"] < box["right"] <= width for box in boxes)
        # Two runs, two colours.
        assert len({box["stroke"] for box in boxes}) == 2
        assert seen[axis]["width"] <= width
    assert seen["background"] == ("rgb(23, 24, 28)" if dark else "rgb(255, 255, 255)")
