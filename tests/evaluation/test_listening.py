"""The listening test from two folders to a p-value: the page in a real browser, and answers whose truth is known."""

import csv
import json
import pathlib
import random
import shutil

import numpy as np
import pytest
import soundfile

from chroma_jax.audio import load_audio
from chroma_jax.evaluation import report, statistics
from chroma_jax.evaluation.listening import answers, sheet

pytest.importorskip("pyloudnorm", reason="pip install pyloudnorm")


@pytest.fixture
def folders(tmp_path):
    """Two systems that say 6 things: tones in noise, of other loudness and rate; and a list with prompts."""
    rng = np.random.default_rng(0)
    for system, rate, loudness in (("ours", 24000, 0.3), ("theirs", 16000, 0.05), ("prompt", 16000, 0.1)):  # fmt: skip
        (tmp_path / system).mkdir()
        for i in range(6):
            t = np.arange(round(0.5 * rate)) / rate
            x = loudness * (np.sin(2 * np.pi * (200 + 50 * i) * t) + 0.05 * rng.standard_normal(len(t)))  # fmt: skip
            soundfile.write(tmp_path / system / f"{i}.wav", x, rate)
    lines = [f"{i}|said|prompt/{i}.wav|text {i}" for i in range(6)]
    (tmp_path / "meta.lst").write_text("\n".join(lines))
    return tmp_path


def build(folders, out="sheet", **more):
    given = dict(names=("ours", "theirs"), items=4, training=1, identical=1)
    return sheet.build(folders / "ours", folders / "theirs", folders / out, **{**given, **more})


def content(folder):
    page = (folder / "page" / "index.html").read_text()
    inside = page.split('<script type="application/json" id="sheet">')[1].split("</script>")[0]
    return json.loads(inside)


def test_a_sheet_tells_nothing(folders):
    made = build(folders, dimensions=("naturalness", "similarity"), list_path=folders / "meta.lst")
    assert made["items"] == 2 * (4 + 1 + 1 + 1)
    page = folders / "sheet" / "page"
    assert sorted(p.name for p in page.iterdir()) == ["audio", "index.html"]
    text = (page / "index.html").read_text()
    for word in ("ours", "theirs", "broken", "identical", "intact", str(folders)):
        assert word not in text
    shown = content(folders / "sheet")
    assert shown["version"] == made["version"]
    assert [i["training"] for i in shown["items"]] == [True] * 2 + [False] * 12
    files = [f for i in shown["items"] for f in (*i["sounds"], i["reference"]) if f]
    assert sorted(files) == sorted(p.stem for p in (page / "audio").iterdir())
    assert len(set(files)) == len(files)
    assert all((i["reference"] is not None) == (i["dimension"] == "similarity") for i in shown["items"])  # fmt: skip


def test_sounds_are_of_one_loudness_and_rate(folders):
    import pyloudnorm

    build(folders)
    meter = pyloudnorm.Meter(24000)
    for path in (folders / "sheet" / "page" / "audio").iterdir():
        samples, rate = soundfile.read(path)
        assert rate == 24000
        assert meter.integrated_loudness(samples) == pytest.approx(-23, abs=0.1)


def test_the_key_opens_it(folders):
    build(folders)
    version, scale, items = answers.read_key(folders / "sheet" / "key.csv")
    assert (version, scale) == (content(folders / "sheet")["version"], "preference")
    kinds = [i.kind for i in items.values()]
    assert {k: kinds.count(k) for k in kinds} == {"trial": 4, "training": 1, "identical": 1, "broken": 1}  # fmt: skip
    audio = folders / "sheet" / "page" / "audio"
    for item in items.values():
        x, y = (load_audio(audio / f"{file}.wav", 24000) for file in item.systems)
        assert np.array_equal(x, y) == (item.kind == "identical")
        if item.kind == "trial":
            ours = next(f for f, s in item.systems.items() if s == "ours")
            want = load_audio(folders / "ours" / f"{item.source}.wav", 24000)
            got = load_audio(audio / f"{ours}.wav", 24000)
            assert np.corrcoef(want, got)[0, 1] > 0.999


def test_the_seed_makes_the_sheet(folders):
    versions = [build(folders, out=f"s{i}", seed=seed)["version"] for i, seed in enumerate((0, 0, 1))]  # fmt: skip
    assert versions[0] == versions[1] != versions[2]
    assert (folders / "s0" / "key.csv").read_text() == (folders / "s1" / "key.csv").read_text()


BAD_SHEETS = {
    "no_folder": (dict(first="absent"), "no such folder"),
    "nothing_in_common": (dict(first="."), "no WAV of the same name"),
    "dimension": (dict(dimensions=("taste",)), "no dimension 'taste'"),
    "no_prompts": (dict(dimensions=("similarity",)), "--list with prompts"),
    "scale": (dict(scale="stars"), "no scale 'stars'"),
    "one_name": (dict(names=("a", "a")), "names of their own"),
    "sheet_is_there": (dict(), "has a sheet already"),
}


@pytest.mark.parametrize(("change", "message"), BAD_SHEETS.values(), ids=BAD_SHEETS.keys())
def test_mistakes_are_told(folders, change, message):
    if not change:
        (folders / "sheet" / "page").mkdir(parents=True)
    first = folders / change.pop("first", "ours")
    with pytest.raises(ValueError, match=message):
        sheet.build(first, folders / "theirs", folders / "sheet", **{"names": ("ours", "theirs"), **change})  # fmt: skip


def listener(folder, path, session, opinion, *, deaf=False, version=None):
    """Writes the CSV of a session whose `opinion(item)` is 1 for ours, -1 for theirs, 0 for the same."""
    found, scale, items = answers.read_key(folder / "key.csv")
    rng = random.Random(session)
    with open(path, "w", newline="") as f:
        out = csv.writer(f)
        out.writerow(answers.COLUMNS)
        for name, item in items.items():
            sides = list(item.systems)
            rng.shuffle(sides)
            good = {"broken": "intact", "trial": "ours", "training": "ours"}.get(item.kind)
            value = {"identical": 0, "broken": -1 if deaf else 1}.get(item.kind, opinion(name))
            if value and item.systems[sides[0]] == good:
                value = -value
            words = {-1: "a", 1: "b", 0: rng.choice(["same", "unsure"])} if scale == "preference" else {-1: "-2", 1: "2", 0: "0"}  # fmt: skip
            out.writerow([session, name, item.dimension, *sides, words[value], 1, 1, "3.5", version or found])  # fmt: skip
    return path


@pytest.fixture
def scored(folders):
    """Six sessions on four items: ours wins two, ties one, loses one; one session is deaf."""
    build(folders)
    _, _, items = answers.read_key(folders / "sheet" / "key.csv")
    trials = [name for name, item in items.items() if item.kind == "trial"]
    opinion = dict(zip(trials, (1, 1, 0, -1), strict=True))
    paths = [
        listener(
            folders / "sheet",
            folders / f"{i}.csv",
            f"s{i}",
            lambda n: opinion.get(n, 1),
            deaf=i == 5,
        )
        for i in range(6)
    ]
    return folders, paths


def test_scores(scored):
    folders, paths = scored
    key = folders / "sheet" / "key.csv"
    # A file that was sent twice counts once.
    found = answers.score(key, [*paths, paths[0]], folders / "out", system="ours")
    natural = found["dimensions"]["naturalness"]
    assert (natural["wins"], natural["losses"], natural["ties"]) == (10, 5, 5)
    assert natural["preference"] == 25.0
    assert natural["p"] == pytest.approx(statistics.sign_test(10, 5))
    assert natural["interval"][0] < -40 < 80 < natural["interval"][1]  # four items say little
    assert found["failed_sessions"] == ["s5"]
    assert "Identical pairs called the same: 5 of 5" in found["tables"][0]["note"]
    other = answers.score(key, paths, folders / "out2", system="theirs")
    assert other["dimensions"]["naturalness"]["preference"] == -25.0
    report.write([folders / "out"], folders / "page.html")
    assert "25.0 [" in (folders / "page.html").read_text()


def test_cmos(folders):
    build(folders, scale="cmos")
    paths = [listener(folders / "sheet", folders / f"{i}.csv", f"s{i}", lambda n: 1) for i in range(20)]  # fmt: skip
    # One of twenty says the opposite of one item: beyond 3.29 standard deviations.
    _, _, items = answers.read_key(folders / "sheet" / "key.csv")
    odd = next(name for name, item in items.items() if item.kind == "trial")
    listener(folders / "sheet", paths[0], "s0", lambda n: -1 if n == odd else 1)
    found = answers.score(folders / "sheet" / "key.csv", paths, folders / "out", system="ours")
    assert found["outliers"] == 1
    assert found["dimensions"]["naturalness"]["mean"] == 2.0
    assert found["dimensions"]["naturalness"]["n"] == 4 * 20 - 1


def change(path, old, new):
    path.write_text(path.read_text().replace(old, new, 1))


def test_answers_of_another_sheet_are_refused(scored):
    folders, paths = scored
    key = folders / "sheet" / "key.csv"
    listener(folders / "sheet", paths[1], "s1", lambda n: 1, version="0123456789ab")
    with pytest.raises(ValueError, match=r"1.csv:2: answers sheet 0123456789ab, but the key is of"):
        answers.score(key, paths, folders / "out", system="ours")


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda p: change(p, "session,item", "listener,item"), "wanted the columns session, item"),
        (lambda p: change(p, "001", "999"), "item 999 with these sounds is not in the key"),
        (lambda p: change(p, ",b,", ",c,"), "no answer 'c'"),
        (lambda p: p.write_text(p.read_text() + "s0,001"), "has not 10 fields"),
        (lambda p: p.write_text(""), "wanted the columns"),
        (lambda p: p.unlink(), "no such file"),
        (lambda p: p.write_bytes(b"\xff\xfe\x00"), "is no CSV"),
    ],
    ids=["columns", "item", "answer", "cut", "empty", "absent", "bytes"],
)
def test_bad_answers_are_told(scored, edit, message):
    folders, paths = scored
    edit(paths[0])
    with pytest.raises(ValueError, match=message):
        answers.score(folders / "sheet" / "key.csv", paths, folders / "out", system="ours")
    assert not (folders / "out").exists()


def test_one_session_cannot_say_two_things(scored):
    folders, paths = scored
    listener(folders / "sheet", folders / "again.csv", "s0", lambda n: -1)
    with pytest.raises(ValueError, match="session s0 answered item .* otherwise in"):
        answers.score(folders / "sheet" / "key.csv", [*paths, folders / "again.csv"], folders / "out", system="ours")  # fmt: skip


def test_an_unknown_system(scored):
    folders, paths = scored
    with pytest.raises(ValueError, match="has no system 'mine': there are ours, theirs"):
        answers.score(folders / "sheet" / "key.csv", paths, folders / "out", system="mine")


# --- in a browser ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def browser():
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="pip install playwright, apt-get install chromium"
    )
    chromium = shutil.which("chromium")
    if not chromium:
        pytest.skip("chromium is not installed: apt-get install chromium")
    with playwright.sync_playwright() as p:
        opened = p.chromium.launch(
            executable_path=chromium,
            args=["--no-sandbox", "--disable-gpu", "--autoplay-policy=no-user-gesture-required"],
        )
        yield opened
        opened.close()


def fits(page):
    """Nothing is wider than the screen."""
    return page.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth")  # fmt: skip


@pytest.mark.slow  # a browser that plays 12 sounds to their ends
def test_a_listener_with_a_keyboard_on_a_narrow_screen(folders, browser, tmp_path):
    build(folders, items=2, training=1, dimensions=("similarity",), list_path=folders / "meta.lst")
    key = folders / "sheet" / "key.csv"
    _, _, items = answers.read_key(key)
    page = browser.new_page(viewport={"width": 320, "height": 640}, accept_downloads=True)
    told = []
    page.on("pageerror", lambda error: told.append(error))
    address = (folders / "sheet" / "page" / "index.html").as_uri()
    page.goto(address)

    def focused():
        return page.evaluate("document.activeElement.textContent.trim() || document.activeElement.value")  # fmt: skip

    def tab_to(text):
        for _ in range(20):
            if focused().startswith(text):
                return
            page.keyboard.press("Tab")
        pytest.fail(f"no way to {text!r} by Tab")

    assert fits(page)
    tab_to("Begin")
    page.keyboard.press("Enter")
    count = len(items)
    for number in range(count):
        if number == 2:  # closed and opened again: it goes on where it was
            page.goto(address)
            assert page.is_visible("#resume")
            tab_to("Begin")
            page.keyboard.press("Enter")
        assert f"air {number + 1} of {count}" in page.inner_text("#heading")
        assert fits(page)
        # No answer before all was heard.
        assert page.is_disabled("input[value=a]")
        tab_to("Next")
        page.keyboard.press("Enter")
        assert "to the end first" in page.inner_text("#told")
        for i, name in enumerate(("Play reference", "Play A", "Play B")):
            page.keyboard.press("Shift+Tab")
            page.evaluate("document.activeElement.blur(); document.getElementById('heading').focus()")  # fmt: skip
            tab_to(name)
            page.keyboard.press("Enter")
            page.wait_for_function(f"document.querySelectorAll('[data-heard]').length == {i + 1}", timeout=20_000)  # fmt: skip
        placed = page.evaluate("state.order[state.answers.length]")
        systems = [items[placed["item"]].systems[side] for side in placed["sides"]]
        wanted = next((i for i, s in enumerate(systems) if s in ("ours", "intact")), 2)
        page.keyboard.press("Tab")  # into the answers: the first radio
        page.keyboard.press("Space")
        for _ in range(wanted):
            page.keyboard.press("ArrowDown")
        tab_to("Next")
        page.keyboard.press("Enter")
    page.wait_for_selector("#end", state="visible")
    assert fits(page)
    tab_to("Save answers")
    with page.expect_download() as download:
        page.keyboard.press("Enter")
    saved = tmp_path / "answers.csv"
    download.value.save_as(saved)
    assert pathlib.Path(download.value.suggested_filename).suffix == ".csv"
    assert not told
    found = answers.score(key, [saved], folders / "out", system="ours")
    similar = found["dimensions"]["similarity"]
    assert (similar["wins"], similar["losses"], similar["ties"]) == (2, 0, 0)
    assert found["failed_sessions"] == []
