"""People's votes: voted on the page in a browser, read back strictly, and counted."""

import html
import json
import re
from urllib.parse import unquote

import pytest
from browser import after
from comparisons import METRICS, SEEDS, rows_of, system, write_comparison

from prefopt.errors import InputError
from prefopt.evaluation import words
from prefopt.evaluation.report import notes, write_report
from prefopt.evaluation.votes import check_votes, read_votes, system_identity, tally

PROMPTS = ["p0 a red lion", "p1 two </script><b>zebras</b>", "p2 snow & ice", "p3 night"]
SYSTEMS = [system("base"), system("sft"), system("dpo")]
NAMED = {one["name"]: one for one in SYSTEMS}
IDENTITIES = {name: system_identity(one) for name, one in NAMED.items()}


def scores(name, i):
    """By clip dpo is the better one of p0 and p2, by truth of p1 and p3, and its error is lower at p3."""
    if name != "dpo":
        return {"clip": 5.0, "truth": i in (0, 2), "error": 0.5}
    return {"clip": (6.0, 4.0, 6.0, 4.0)[i], "truth": True, "error": (0.5, None, 0.5, 0.3)[i]}


ROWS = rows_of(NAMED, PROMPTS, scores)
IMAGES = {(row["system"], row["prompt"], row["seed"]) for row in ROWS}


def vote(**changes):
    return {"systems": ["base", "dpo"], "prompt": PROMPTS[0], "seed": 0, "winner": "dpo"} | changes


def written(path, *votes, **changes):
    path.write_text(json.dumps({"comparison": IDENTITIES, "votes": list(votes)} | changes))
    return path


# Votes for dpo at p0 and p1, a tie at p2, for base at p3, by buttons and by keys, whichever side it is on.
VOTE = """
const log = {left: [], prompts: [], named: []};
const press = (key) => document.dispatchEvent(new KeyboardEvent("keydown", {key, cancelable: true}));
const sides = ["left", "right"].map((id) => document.getElementById(id));
const ballot = document.getElementById("ballot");
press("ArrowRight");
press("Backspace");
while (!ballot.hidden) {
  const prompt = document.getElementById("prompt").textContent;
  const [left] = sides.map((image) => new URL(image.src).pathname.split("/").pop()[0]);
  log.left.push(left);
  log.prompts.push(prompt);
  log.named.push(/base|dpo|sft/.test(ballot.textContent) || !document.getElementById("result").hidden);
  const wanted = {p0: "2", p1: "2", p2: "", p3: "0"}[prompt.slice(0, 2)];
  if (!wanted) press("ArrowDown");
  else if (prompt.startsWith("p0")) press(left === wanted ? "ArrowLeft" : "ArrowRight");
  else document.querySelector(`[data-vote=${left === wanted ? "left" : "right"}]`).click();
}
log.kept = Object.keys(localStorage).map((key) => JSON.parse(localStorage[key]).votes.length);
Storage.prototype.setItem = () => { throw new Error("full"); };
document.getElementById("back").click();
press("ArrowDown");
log.unsaved = !document.getElementById("unsaved").hidden;
document.getElementById("back").click();
const prompt = document.getElementById("prompt").textContent.slice(0, 2);
const last = new URL(sides[0].src).pathname.split("/").pop()[0];
press(prompt === "p2" ? "ArrowDown" : (last === "2") === (prompt !== "p3") ? "ArrowLeft" : "ArrowRight");
log.result = document.getElementById("result").textContent;
const pre = Object.assign(document.createElement("pre"), {id: "log", textContent: JSON.stringify(log)});
document.body.append(pre);
"""


def test_what_is_voted_in_a_browser_is_read_back_and_counted(tmp_path):
    write_comparison(tmp_path, SYSTEMS, PROMPTS, scores)
    write_report(tmp_path)
    dom = after(tmp_path / "blind.html", VOTE)
    found = re.search(r'<pre id="log">(.*?)</pre>', dom)
    assert found, dom[-3000:]
    log = json.loads(html.unescape(found[1]))
    assert len(log["prompts"]) == 12 and log["prompts"] != sorted(log["prompts"]), "a random order"
    assert 2 <= log["left"].count("0") <= 10, "random sides"
    assert not any(log["named"]), "no names while votes are cast"
    assert log["kept"] == [12] and log["unsaved"] is True
    assert log["result"].startswith("dpo preferred 6 times, base 3 times, ties 3: 62.5 % for dpo")

    link = re.search(r'<a id="download" download="votes.json" href="data:application/json[^,]*,([^"]*)"', dom)
    assert link and "12 votes" in dom
    file = tmp_path / "votes.json"
    file.write_text(unquote(html.unescape(link[1])))
    assert json.loads(file.read_text()).keys() == {"ballot", "comparison", "votes"}
    ballots = read_votes([file])
    assert re.fullmatch("[0-9a-f]{32}", str(ballots[0].id))
    check_votes(ballots, IDENTITIES, IMAGES)
    counted = tally(ballots, ROWS, METRICS, 0.01, {})
    assert counted["people"] == [{"file": "votes.json", "votes": 12}]
    [pair] = counted["pairs"]
    # Means of four prompts of outcomes 1, 1, 1/2, 0: of all 256 resamples 5 lie below 1/4, 16 at 1.
    assert pair == {
        "system": "dpo",
        "against": "base",
        "wins": 6,
        "ties": 3,
        "losses": 3,
        "votes": 12,
        "groups": 4,
        "share": 0.625,
        "low": 0.25,
        "high": 1.0,
    }
    agreement = {
        metric: (one["share"], one["votes"], one["undecided"]) for metric, one in counted["agreement"].items()
    }
    assert agreement["clip"] == (pytest.approx(2 / 3), 9, 0), "dpo, base, base against dpo, dpo, base"
    assert agreement["truth"] == (0.5, 6, 3), "p0 is a tie"
    assert agreement["error"] == (0.0, 3, 6), "p0 is a tie, p1 was not read; a lower error is better"


def test_votes_are_in_report_and_terminal(tmp_path):
    votes = [
        vote(prompt=prompt, seed=1000 * i + seed, winner=(None, "dpo", "base", "base")[i])
        for i, prompt in enumerate(PROMPTS)
        for seed in SEEDS
    ]
    one = written(tmp_path / "one.json", *votes)
    two = written(tmp_path / "two.json", vote(winner="base"), vote(systems=["sft", "base"], winner=None))
    summary = write_comparison(tmp_path, SYSTEMS, PROMPTS, scores, read_votes([one, two]))
    page = write_report(tmp_path).read_text()
    assert "2 people voted" in page and "one.json 12, two.json 2." in page
    said = "Of 13 votes dpo against base wins 3, ties 3, loses 7: 34.6"
    assert said in page and any(said in line for line in notes(summary))
    assert "Of 1 vote sft against base wins 0, ties 1, loses 0: 50.0" in page
    assert "Too few to claim: 4 prompts." in page
    agreement = [line for line in notes(summary) if "agrees with people" in line]
    assert [line.partition(" agrees")[0] for line in agreement] == ["CLIP score", "truth", "error"]


def test_a_share_of_enough_prompts_is_claimed():
    pair = {
        "system": "dpo",
        "against": "base",
        "wins": 30,
        "ties": 0,
        "losses": 10,
        "votes": 40,
        "groups": 40,
    }
    pair |= {"share": 0.75, "low": 0.6, "high": 0.875}
    assert words.votes_sentence(pair).endswith("People prefer dpo.")
    assert words.votes_sentence(pair | {"low": 0.1, "high": 0.4}).endswith("People prefer base.")
    assert "No claim" in words.votes_sentence(pair | {"low": 0.4})
    assert "Too few to claim: 19 prompts" in words.votes_sentence(pair | {"groups": 19})
    none = {"share": None, "low": None, "high": None, "votes": 0, "undecided": 3}
    assert words.agreement_sentence("CLIP", none) == "CLIP has no preference in any of 3 votes."


@pytest.mark.parametrize(
    ("votes", "message"),
    [
        ([vote(), vote(systems=["dpo", "base"])], "vote 2 is about the same images as vote 1"),
        ([vote(), vote(seed="0")], "vote 2: `seed` is '0', not a whole number"),
        ([vote(seed=True)], "vote 1: `seed` is True"),
        ([vote(prompt=3)], "vote 1: `prompt` is 3, not a text"),
        ([vote(winner="sft")], "vote 1: `winner` is 'sft', not one of"),
        ([vote(systems=["base", "base"])], "not the names of two systems"),
        ([vote(systems=["base", {}])], "not the names of two systems"),
        ([vote(systems=["base", "cpo"])], "the file's `comparison` has no system 'cpo'"),
        ([{"prompt": "a", "seed": 0}], "vote 1 needs the keys prompt, seed, systems, winner"),
        ([vote(name="me")], "vote 1 needs the keys prompt, seed, systems, winner, and no other"),
        ([[]], "vote 1 needs the keys"),
        ([], "holds no votes"),
    ],
)
def test_a_malformed_vote_is_named(tmp_path, votes, message):
    with pytest.raises(InputError, match=re.escape(message)) as error:
        read_votes([written(tmp_path / "mine.json", *votes)])
    assert "mine.json" in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ("[]", "needs the keys `comparison` and `votes`"),
        ('{"comparison": {}, "votes": [], "name": "me"}', "may have `ballot`, and no other"),
        ('{"comparison": [], "votes": []}', "`comparison` is not an object"),
        ('{"comparison": {"base": 1}, "votes": []}', "`comparison` is not an object"),
        ('{"ballot": null, "comparison": {}, "votes": []}', "`ballot` is None, not an id; leave it out"),
        ('{"ballot": "", "comparison": {}, "votes": []}', "`ballot` is '', not an id"),
    ],
)
def test_a_file_that_is_no_votes_file_is_named(tmp_path, text, message):
    file = tmp_path / "mine.json"
    file.write_text(text)
    with pytest.raises(InputError, match=re.escape(message)) as error:
        read_votes([file])
    assert "mine.json" in str(error.value)


def test_missing_and_repeated_files_are_named(tmp_path):
    with pytest.raises(InputError, match=r"--votes: there is no file .*none\.json"):
        read_votes([tmp_path / "none.json"])
    one = written(tmp_path / "one.json", vote(), ballot="1")
    later = written(tmp_path / "later.json", vote(), vote(seed=1), ballot="1")
    with pytest.raises(InputError, match=r"one\.json and .*later\.json are of the same person; name"):
        read_votes([one, later])
    by_hand = written(tmp_path / "by_hand.json", vote())
    link = tmp_path / "link.json"
    link.symlink_to(by_hand)
    with pytest.raises(InputError, match=r"by_hand\.json and .*link\.json are of the same person"):
        read_votes([by_hand, one, link])


def test_people_who_vote_alike_are_counted_each(tmp_path):
    paged = [written(tmp_path / f"{name}.json", vote(), ballot=name) for name in ("anna", "ben")]
    by_hand = [written(tmp_path / f"{name}.json", vote()) for name in ("carl", "dora")]
    counted = tally(read_votes([*paged, *by_hand]), ROWS, METRICS, 0.01, {})
    assert [pair["wins"] for pair in counted["pairs"]] == [4]
    assert [person["votes"] for person in counted["people"]] == [1, 1, 1, 1]


# The ids of a page: at first, with a vote, as it is kept, and with all votes deleted for the next person.
IDS = """
const link = document.getElementById("download");
const ballot = () => JSON.parse(decodeURIComponent(link.href.split(",")[1])).ballot;
const ids = [ballot()];
document.dispatchEvent(new KeyboardEvent("keydown", {key: "ArrowDown"}));
ids.push(ballot(), ...Object.values(localStorage).map((kept) => JSON.parse(kept).ballot));
window.confirm = () => true;
document.getElementById("delete").click();
ids.push(ballot());
const pre = Object.assign(document.createElement("pre"), {id: "log", textContent: JSON.stringify(ids)});
document.body.append(pre);
"""


def test_a_ballot_keeps_its_id_until_its_votes_are_deleted(tmp_path):
    write_comparison(tmp_path, SYSTEMS, PROMPTS, scores)
    write_report(tmp_path)
    found = re.search(r'<pre id="log">(.*?)</pre>', after(tmp_path / "blind.html", IDS))
    assert found
    first, voted, kept, deleted = json.loads(html.unescape(found[1]))
    assert first == voted == kept != deleted


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": "another"}, "vote 2 is about the prompt 'another', which is not compared"),
        ({"seed": 7}, "vote 2 is about seed 7, which the prompt 'p0 a red lion' does not have"),
        ({"seed": 1000}, "vote 2 is about seed 1000"),
    ],
)
def test_votes_about_other_images_are_named(tmp_path, changes, message):
    ballots = read_votes([written(tmp_path / "mine.json", vote(), vote(**changes))])
    with pytest.raises(InputError, match=re.escape(message)):
        check_votes(ballots, IDENTITIES, IMAGES)


def test_votes_of_another_comparison_are_named(tmp_path):
    ballots = read_votes([written(tmp_path / "mine.json", vote())])
    with pytest.raises(InputError, match="about the system 'dpo'; this comparison has base; repeat") as e:
        check_votes(ballots, {"base": IDENTITIES["base"]}, IMAGES)
    assert str(e.value).endswith("with the same --systems, --guidance_scales and --lora_scales")
    with pytest.raises(InputError, match="of another comparison, whose system 'dpo' has other weights"):
        check_votes(ballots, IDENTITIES | {"dpo": "0" * 64}, IMAGES)
    more = IDENTITIES | {"cpo": "0" * 64}
    check_votes(ballots, more, {*IMAGES, ("cpo", "a further prompt", 0)})
