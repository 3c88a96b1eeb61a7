"""Pages in a headless Chromium, as a reader would use them."""

import base64
import hashlib
import re
import shutil
import subprocess
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def after(page: Path, script: str) -> str:
    """The DOM of a page after a script ran at its end; the test is skipped without a Chromium.

    The script may await. An error in it, or one that the page itself raises meanwhile, fails the test.
    """
    if CHROMIUM is None:
        pytest.skip("no chromium on the PATH: install it to run the pages' scripts")
    script = (
        "const failed = (error) => { document.body.dataset.error = error?.stack ?? error; };"
        'addEventListener("error", (event) => failed(event.error ?? event.message));'
        f"(async () => {{{script}}})().catch(failed);"
    )
    copy = page.with_name(f"copy-of-{page.name}")  # beside it, where its images are
    copy.write_text(_with_script(page.read_text(encoding="utf-8"), script), encoding="utf-8")
    with TemporaryDirectory() as profile:
        command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={profile}"]
        command += ["--virtual-time-budget=5000", "--dump-dom", copy.resolve().as_uri()]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    copy.unlink()
    assert "</html>" in done.stdout, done.stderr
    if error := re.search(r'<body[^>]* data-error="([^"]*)"', done.stdout):
        pytest.fail(f"{page.name}: {error[1]}")
    return done.stdout


def _with_script(text: str, script: str) -> str:
    """The page with one more script at its end, which its content security policy allows."""
    allowed = f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"
    if "script-src " in text:
        text = text.replace("script-src ", f"script-src {allowed} ", 1)
    else:
        text = text.replace("default-src 'none'", f"default-src 'none'; script-src {allowed}", 1)
    before, _, rest = text.rpartition("</body>")
    return f"{before}<script>{script}</script></body>{rest}"
