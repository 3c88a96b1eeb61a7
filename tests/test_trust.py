"""A sample of the campaign of bad inputs; the whole of it is `python scripts/trust/campaign.py`."""

from launching import launch


def test_a_sample_of_the_campaign(tmp_path):
    running = launch("scripts/trust/campaign.py", {"sample": 5}, tmp_path / "output")
    assert running.wait(300) == 0, running.text()
    name, tried, *_ = running.text().strip().splitlines()[-1].split()
    assert name == "all" and int(tried) >= 60
