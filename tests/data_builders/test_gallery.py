"""The gallery: every candidate in its place with its reason, nothing of a prompt run as HTML."""

import base64
import hashlib
import io
import math
import re
import shutil
import subprocess
import weakref
from html.parser import HTMLParser

import pyarrow as pa
import pytest
from PIL import Image

from data_builders.engine.stages import by_prompt
from data_builders.engine.tables import CANDIDATES, features
from data_builders.export.gallery import ABSENT, number, write_gallery
from prefopt.errors import InputError
from prefopt.evaluation.words import MINUS
from prefopt.files import content_key
from prefopt.pocket.world import Scene, caption, held_out_scenes, render

QUESTIONS = ["realistic", "odd_pattern", "class_visible", "normal_shape", "natural_behaviour"]
QUESTIONS += ["lookalike", "anatomy", "colours", "hidden_flaw", "whole_prompt"]
NEGATIVE = {"odd_pattern", "lookalike", "hidden_flaw"}
CHROMIUM = shutil.which("chromium")


def stored(image):
    buffer = io.BytesIO()
    image.save(buffer, format="WEBP", lossless=True)
    return {"bytes": buffer.getvalue(), "path": None}


def candidate(scene, place, answers="", *, rank=None, selected=False, reason="", boxes=(), **changes):
    """A candidate as a build decides on it; `answers` has y, n or u for each question, or is empty."""
    verdicts = [{"y": "yes", "n": "no", "u": ""}[letter] for letter in answers]
    points = [
        0.0 if v == "" else (1.0 if (v == "yes") != (name in NEGATIVE) else -1.0)
        for name, v in zip(QUESTIONS, verdicts, strict=False)
    ]
    prompt = caption(scene, 0)
    judged = {
        "questions": QUESTIONS[: len(answers)],
        "verdicts": verdicts,
        "log_odds": [{"yes": 2.31, "no": -1.7, "": 0.02}[v] + place / 10 for v in verdicts],
        "empty_log_odds": [0.4] * len(answers),
        "other_mass": [0.012] * len(answers),
        "points": points,
        "hard_score": sum(points),
        "soft_score": 0.7 * sum(points),
        "judge_score": 0.7 * sum(points),
    }
    generated = {"seed": int(content_key(f"{prompt} {place}")[:8], 16), "candidate": place, "model": "pocket"}
    generated |= {"detector": "pocket"}
    generated |= {"num_inference_steps": 20, "guidance_scale": 3.0, "adapter": None, "adapter_scale": 1.0}
    judged = judged if answers else {"questions": QUESTIONS}
    invalid = bool(reason) and not answers
    decided = {"rank": rank, "selected": selected}
    decided |= {"invalid_reason": reason if invalid else "", "not_selected_reason": "" if invalid else reason}
    decided |= {"boxes": list(boxes), "confidence": max((b["confidence"] for b in boxes), default=0.0)}
    generated |= {
        "image": stored(render(scene, place)),
        "prompt": prompt,
        "prompt_id": content_key(prompt),
        "class": scene.animal,
    }
    return generated | judged | decided | changes


def box(label, confidence, *sides):
    return {"label": label, "confidence": confidence} | dict(
        zip(("left", "top", "right", "bottom"), sides, strict=True)
    )


def three_prompts():
    """Two classes; a black image, a tie, an image without pixels, a prompt of which nothing was taken."""
    lions, zebra = Scene("lion", "red", 2, "savanna"), Scene("zebra", "blue", 1, "snow")
    elephant = Scene("lion", "green", 3, "lake")
    first, second = box("lion", 0.91, 4, 20, 33, 58), box("lion", 0.64, 36, 18, 63, 57)
    black = stored(Image.new("RGB", (64, 64)))
    return [
        [
            candidate(lions, 0, reason="black", image=black),
            candidate(lions, 1, "ynyyynyyny", rank=2, reason="detected less surely", boxes=[first]),
            candidate(lions, 2, "yynnnnnnyn", rank=4, reason="a lower score"),
            candidate(lions, 3, "ynyyynyyny", rank=1, selected=True, boxes=[first, second]),
        ],
        [
            candidate(zebra, 0, "ynyyunyynn", rank=2, reason="a lower score"),
            candidate(zebra, 1, "ynyyynyyny", rank=1, reason="no detection"),
            candidate(zebra, 2, "ynyyunyynn", rank=2, reason="a lower score"),
            candidate(zebra, 3, reason="not finite", image=None),
        ],
        [
            candidate(
                elephant,
                k,
                "ynyyynyuny"[: 10 - k] + "u" * k,
                rank=k + 1,
                selected=k == 0,
                reason="a lower score" if k else "",
                boxes=[box("lion", 0.8 - k / 10, 10 * k, 5, 10 * k + 30, 70)],
            )
            for k in range(4)
        ],
    ]


class Element:
    def __init__(self, tag, attributes):
        self.tag, self.attributes, self.children, self.words = tag, attributes, [], []

    @property
    def text(self):
        parts = [part if isinstance(part, str) else part.text for part in self.words]
        return re.sub(r"\s+", " ", "".join(parts)).strip()

    def all(self, name):
        """Descendants of this class, or of this tag."""
        for child in self.children:
            if name == child.tag or name in child.attributes.get("class", "").split():
                yield child
            yield from child.all(name)


class Tree(HTMLParser):
    """A page as elements, as strict as a reader could wish: whatever is opened must be closed."""

    def __init__(self, page):
        super().__init__()
        self.root = Element("", {})
        self.open = [self.root]
        self.feed(page)
        assert self.open == [self.root]

    def handle_starttag(self, tag, attrs):
        element = Element(tag, {name: value or "" for name, value in attrs})
        self.open[-1].children.append(element)
        self.open[-1].words.append(element)
        if tag not in ("meta", "img", "br", "input"):
            self.open.append(element)

    def handle_endtag(self, tag):
        assert self.open.pop().tag == tag

    def handle_data(self, data):
        self.open[-1].words.append(data)


def written(folder, groups, **options):
    options = {"facts": {"judge": "pocket"}} | options
    page = write_gallery(folder, groups, **options).read_text()
    return page, Tree(page).root


@pytest.fixture(scope="module")
def gallery(tmp_path_factory):
    return written(tmp_path_factory.mktemp("gallery"), three_prompts())


def test_records_read_back_from_a_build_give_the_same_page(gallery, tmp_path):
    page, _ = gallery
    rows = [row for group in three_prompts() for row in group]
    table = pa.Table.from_pylist(rows, schema=features(CANDIDATES).arrow_schema)
    groups = by_prompt(table.to_pylist())
    assert written(tmp_path, groups)[0] == page
    assert table.num_rows == 12 and set(rows[1]) <= set(CANDIDATES)


def test_candidates_stand_in_rank_order_with_their_scores_and_reasons(gallery):
    _, root = gallery
    prompts = list(root.all("prompt"))
    assert [next(p.all("h2")).text for p in prompts] == [
        "two red lions on the savanna lion",
        "one blue zebra in the snow zebra, none selected",
        "three green lions by the lake lion",
    ]
    shown = [[c.text for c in p.all("candidate")] for p in prompts]
    alts = [next(c.all("img")).attributes["alt"] for c in prompts[0].all("candidate")]
    assert alts == ["Candidate 3", "Candidate 1", "Candidate 2", "Candidate 0"]
    best, less_sure, lower, black = shown[0]
    assert "rank 1 ✓ selected hard +10, soft +7.00 confidence 0.91 seed" in best
    assert "Not selected" not in best and "Not selected: detected less surely" in less_sure
    assert (
        "rank 4" in lower
        and f"hard {MINUS}6, soft {MINUS}4.20" in lower
        and "Not selected: a lower score" in lower
    )
    assert "nothing detected" in lower
    made = "Generated by pocket, 20 steps, guidance 3."
    assert black == f"no rank seed 311231590 Invalid: blacknot judged {made}"
    assert [("tied" in text, "no image" in text) for text in shown[1]] == [
        (False, False),
        (True, False),
        (True, False),
        (False, True),
    ]
    selected = [c for c in root.all("candidate") if "selected" in c.attributes["class"].split()]
    assert len(selected) == 2 == len(list(root.all("chosen")))
    assert "3 prompts, 12 candidates; an image was selected for 2 of the prompts." in next(root.all("p")).text
    seeds = [str(row["seed"]) for group in three_prompts() for row in group]
    assert all(root.text.count(f"seed {seed}") == 1 for seed in seeds)


def test_every_answer_has_a_mark_in_words_and_a_line_in_the_table(gallery):
    _, root = gallery
    zebra = list(root.all("prompt"))[1]
    tied = list(zebra.all("candidate"))[1]
    marks = list(tied.all("mark"))
    assert [mark.text for mark in marks] == [
        *("yes+1", "no+1", "yes+1", "yes+1", "?0"),
        *("no+1", "yes+1", "yes+1", "no+1", f"no{MINUS}1"),
    ]
    senses = [mark.attributes["class"].split()[1] for mark in marks]
    assert senses == ["good"] * 4 + ["neither"] + ["good"] * 4 + ["bad"]
    assert marks[4].attributes["aria-label"] == "natural behaviour: unclear, 0"
    assert marks[9].attributes["aria-label"] == f"whole prompt: no, {MINUS}1"
    rows = [row.text for row in tied.all("tr")]
    assert len(rows) == 11 and rows[1] == "realisticyes+2.31+0.401.2 %+1", rows[1]
    assert [len(list(row.children)) for row in tied.all("tr")] == [6] * 11
    unjudged = list(zebra.all("candidate"))[3]
    assert not list(unjudged.all("mark")) and not list(unjudged.all("table"))
    assert "Generated by pocket, 20 steps, guidance 3." in unjudged.text


def test_boxes_are_in_percent_of_the_image_and_end_at_its_edge(gallery):
    _, root = gallery
    lions, _, cut = root.all("prompt")
    first, second = next(lions.all("candidate")).all("box")
    assert first.text == "lion 0.91" and second.text == "lion 0.64"
    assert first.attributes["style"] == "left:6.25%;top:31.25%;width:45.31%;height:59.38%"
    assert "from-right" in second.attributes["class"] and "from-right" not in first.attributes["class"]
    styles = [b.attributes["style"] for b in cut.all("box")]
    assert styles[0] == "left:0.00%;top:7.81%;width:46.88%;height:92.19%"


def test_a_picture_is_a_small_lossy_copy_and_a_small_one_stays_crisp(tmp_path):
    scene = held_out_scenes()[0]
    wide = Image.linear_gradient("L").resize((600, 300)).convert("RGB")
    groups = [[candidate(scene, 0), candidate(scene, 1, image=stored(wide))]]
    _, root = written(tmp_path, groups, thumbnail=200)
    sizes = []
    for img in root.all("img"):
        content = base64.b64decode(img.attributes["src"].removeprefix("data:image/webp;base64,"))
        assert content[12:16] == b"VP8 ", "lossy"
        with Image.open(io.BytesIO(content)) as image:
            sizes.append((image.size, img.attributes.get("class", ""), img.attributes["width"]))
    assert sizes == [((64, 64), "pixels", "64"), ((200, 100), "", "600")]
    with pytest.raises(InputError, match=r"candidate 1 of the prompt .* is no image"):
        written(tmp_path, [[candidate(scene, 1, image={"bytes": b"RIFF", "path": None})]])


def test_of_many_prompts_a_sample_is_shown_and_the_rest_counted(tmp_path):
    """Guards against a page that shows the first class alone."""
    groups = [[candidate(scene, 0)] for scene in held_out_scenes()[:20]]
    page, root = written(tmp_path, groups, limit=5)
    warning = next(root.all("warning")).text
    assert warning.startswith("15 of the 20 prompts are left out") and "the 5 shown" in warning
    texts = [t.text for p in root.all("prompt") for t in p.all("text")]
    order = [group[0]["prompt"] for group in groups]
    assert texts == sorted(sorted(order, key=content_key)[:5], key=order.index)
    assert "20 prompts, 20 candidates" in root.text and page.count("<img") == 5
    assert not list(written(tmp_path, groups, limit=20)[1].all("warning"))
    assert "1 of the 20 prompts is left out" in written(tmp_path, groups, limit=19)[1].text
    assert "20 of the 20 prompts are left out" in written(tmp_path, groups, limit=0)[1].text
    assert "0 prompts, 0 candidates" in written(tmp_path, [])[1].text


def test_groups_are_streamed(tmp_path):
    """A build's images need not fit in memory: the group at hand and the one before are all that is alive."""

    class Group(list):
        __hash__ = object.__hash__

    living = weakref.WeakSet()

    def groups():
        for scene in held_out_scenes()[:8]:
            assert len(living) <= 1
            group = Group([candidate(scene, 0)])
            living.add(group)
            yield group
            del group

    written(tmp_path, groups(), limit=8)


def test_nothing_in_a_record_is_run_as_html(tmp_path):
    evil = '"><script>alert(1)</script>'
    row = candidate(held_out_scenes()[0], 0, "yn", rank=1, selected=True, reason=evil, boxes=[])
    row |= {"prompt": evil, "class": evil, "model": evil, "adapter": evil, "verdicts": [evil, "yes"]}
    row |= {"questions": [evil, "x"], "boxes": [box(evil, 0.5, 1, 1, 9, 9)]}
    other = candidate(held_out_scenes()[1], 0)
    page, root = written(tmp_path, [[row], [other]], facts={evil: evil})
    assert evil not in page and page.count("<script") == page.count("</script") == 1
    assert page.count("&#34;&gt;&lt;script&gt;alert(1)&lt;/script&gt;") >= 14
    assert evil in next(root.all("h1")).text and next(root.all("box")).text == f"{evil} 0.50"
    assert next(root.all("prompt")).attributes["data-class"] == evil


def test_the_page_needs_nothing_beside_itself_and_runs_its_own_script_only(gallery):
    page, root = gallery
    assert not re.search(r"https?:|url\(|@import|<link|<iframe|\son\w+=", page)
    script = re.search(r"<script>(.*)</script>", page, re.DOTALL)[1]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = next(m for m in root.all("meta") if "http-equiv" in m.attributes).attributes["content"]
    assert f"script-src 'sha256-{digest}'" in policy and "default-src 'none'" in policy
    assert "hidden" in next(root.all("form")).attributes, "no controls that do nothing"
    assert not [c for c in root.all("candidate") if "hidden" in c.attributes]


def test_numbers_that_are_not_finite_are_said(tmp_path):
    assert [number(x) for x in (1.5, -2.0, 0.0, -0.001, None)] == [
        "+1.50",
        f"{MINUS}2.00",
        "0.00",
        "0.00",
        f"{ABSENT}",
    ]
    assert [number(x) for x in (math.inf, -math.inf, math.nan)] == ["+∞", f"{MINUS}∞", "undefined"]
    odds = {
        "log_odds": [math.inf, -math.inf, math.nan],
        "empty_log_odds": None,
        "other_mass": [None, 0.0, 1.0],
    }
    row = candidate(held_out_scenes()[0], 0, "ynu") | odds
    _, root = written(tmp_path, [[row | {"detector": ""}]])
    assert "confidence" not in root.text and "nothing detected" not in root.text, "nobody looked"
    assert [tr.text for tr in root.all("tr")][1:] == [
        f"realisticyes+∞{ABSENT}{ABSENT}+1",
        f"odd patternno{MINUS}∞{ABSENT}0.0 %+1",
        f"class visibleunclearundefined{ABSENT}100.0 %0",
    ]


FILTERED = """{
const form = document.querySelector("form"), seen = [];
function state(name) {
  form.dispatchEvent(new Event("input"));
  const visible = [...document.querySelectorAll(".candidate")].filter((c) => c.checkVisibility()).length;
  const boxes = [...document.querySelectorAll(".box")].filter((b) => b.checkVisibility()).length;
  seen.push(`${name}: ${visible} ${boxes} ${document.querySelector("output").value}`);
}
const set = (name, value) => { form.elements[name].value = value; };
state("all");
set("class", "zebra"); state("class"); set("class", "");
set("reason", "a lower score"); state("reason"); set("reason", "");
set("text", "GREEN"); state("text"); set("text", "");
form.elements.selected.checked = true; state("selected");
form.elements.boxes.checked = false; state("bare");
document.title = seen.join("; ");
}"""


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
def test_the_filters_work_in_a_browser(gallery, tmp_path):
    page, _ = gallery
    # The page's own script runs under its policy; the one added here is allowed beside it.
    digest = base64.b64encode(hashlib.sha256(FILTERED.encode()).digest()).decode()
    page = page.replace("script-src ", f"script-src 'sha256-{digest}' ")
    (tmp_path / "page.html").write_text(page.replace("</body>", f"<script>{FILTERED}</script></body>"))
    command = [
        CHROMIUM,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        f"--user-data-dir={tmp_path / 'profile'}",
    ]
    done = subprocess.run(
        [*command, "--dump-dom", (tmp_path / "page.html").as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
    )
    title = re.search(r"<title>(.*)</title>", done.stdout)
    assert title, done.stderr
    assert title[1].split("; ") == [
        "all: 12 7 3 of 3 prompts",
        "class: 4 0 1 of 3 prompts",
        "reason: 6 3 3 of 3 prompts",
        "text: 4 4 1 of 3 prompts",
        "selected: 2 3 2 of 3 prompts",
        "bare: 2 0 2 of 3 prompts",
    ]
