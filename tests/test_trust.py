"""Samples of the campaign of bad inputs, of kills and of failing disks; the whole is in scripts/trust/."""

import shutil
import subprocess
import sys

import pytest
from launching import ROOT, launch


def test_a_sample_of_the_campaign(tmp_path):
    running = launch("scripts/trust/campaign.py", {"sample": 5}, tmp_path / "output")
    assert running.wait(300) == 0, running.text()
    name, tried, *_ = running.text().strip().splitlines()[-1].split()
    assert name == "all" and int(tried) >= 60


@pytest.mark.skipif(not shutil.which("cc"), reason="needs a C compiler")
@pytest.mark.parametrize(
    ("program", "options", "last"),
    [
        ("kill", ["--rounds", "1", "--most", "2"], " kills of 1 programs in 1 rounds: 0 at fault"),
        pytest.param("disk", ["--writes", "2"], " right    0 at fault", marks=pytest.mark.slow),
    ],
)
def test_a_sample_of_kills_and_of_failing_disks(program, options, last, tmp_path):
    script = ROOT / "scripts" / "trust" / f"{program}.py"
    command = [sys.executable, script, "--only", "consensus_pairs", "--folder", tmp_path, *options]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert ended.stdout.splitlines()[-1].endswith(last)
    assert ended.stdout.splitlines()[-1].removesuffix(last).split()[-1] != "0"
