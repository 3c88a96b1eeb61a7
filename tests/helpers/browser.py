"""Pages in a headless browser."""

import base64
import hashlib
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

CHROMIUM = shutil.which("chromium")
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="the program `chromium` is not here")


def after(page: Path, script: str) -> str:
    """The DOM of a page after its own scripts and then this one ran, as HTML.

    The script is added to a copy of the page beside it, and its hash to the page's content security policy,
    which else holds as it does for a reader.
    """
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    text = page.read_text(encoding="utf-8")
    text = re.sub(r"(script-src )", rf"\g<1>'sha256-{digest}' ", text, count=1)
    text = text.replace("</body>", f"<script>{script}</script></body>")
    with tempfile.TemporaryDirectory() as profile:
        copy = page.with_name(f"{page.stem}-{digest[:8].replace('/', '_')}.html")
        copy.write_text(text, encoding="utf-8")
        command = [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={profile}"]
        command += ["--dump-dom", "--virtual-time-budget=5000", copy.resolve().as_uri()]
        try:
            return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
        finally:
            copy.unlink()
