"""data/questions.py: true to the facts, one answer a question, nothing given away, "yes" as often as "no", the layout.

The facts are made up by a small generator: no simulator is needed.
"""

import json
import math
import re
from collections import Counter, defaultdict

import numpy as np
import pytest

from data import questions
from data.dataset import check_record
from data.prompts import GENERAL_TYPES, ROBOT_TYPES, contact_question, parse_contact
from data.questions import ASK, PLAIN_KINDS, Turn, contact_answer, dialogue, instruction, number, to_llava, turns
from sim.catalogue import NOUNS, SEEN, UNSEEN, make_object
from sim.grammar import ARCHETYPES, PREFIX
from sim.objects import PART_KINDS, Part, main_colour

SIZE = 128  # pixels
GRAMMAR = tuple(PREFIX + name for name in ARCHETYPES)
SIDES = {"left", "right"}
GENERAL = {"object", "caption", "colour", "size", "relation", "presence"}
# Question types that speak of "this object" when no part is named.
WHOLE = ("object", "caption", "colour", "size", "relation", "parts", "count", "past", "movable")


def make_facts(rng, categories=(*SEEN, *GRAMMAR[:10]), opened=0.15, hidden=0.1, after=0.2):
    """Facts of a made-up picture of an object of the catalogue, in the form that data/build.py writes."""
    spec = make_object(categories[rng.integers(len(categories))], np.random.default_rng(rng.integers(10_000)))
    any_open, parts = rng.random() < opened, []
    for part in spec.parts:
        shown, (x, y), approach = rng.random() >= hidden, rng.uniform(20, 100, 2), rng.normal(size=3)
        fact = {key: getattr(part, key) for key in ("label", "kind", "verb", "primitive", "joint")}
        fact |= {"colour": main_colour(part.shapes), "pixels": int(rng.integers(20, 900)) if shown else 3}
        fact |= {"centre": [x, y] if shown else None, "contact": None}
        fact |= {"box": [int(x) - 8, int(y) - 5, int(x) + 9, int(y) + 6] if shown else None}
        fact["openness"] = rng.uniform(0.15, 0.8) if any_open and rng.random() < 0.7 else rng.uniform(0, 0.08)
        if shown and not any_open:
            unit = approach / np.linalg.norm(approach)
            fact["contact"] = {"u": x + 1.5, "v": y - 2.5, "approach": unit.tolist()}
        parts.append(fact)
    x, y, w, h = rng.integers((0, 0, 20, 20), (40, 40, 88, 88)).tolist()
    facts = {"category": spec.category, "seed": 1, "image_size": SIZE, "box": [x, y, x + w, y + h], "parts": parts}
    if not any_open and rng.random() < after:  # somebody tried: the acted part opens, or the attempt fails
        goal, acted = (parts[i] for i in rng.integers(len(parts), size=2))
        worked = bool(rng.random() < 0.5)
        acted["openness"] = rng.uniform(0.15, 0.8) if worked else acted["openness"]
        facts["event"] = {"goal": goal["label"], "acted": acted["label"], "success": worked and goal is acted}
        for part in parts:
            part["contact"] = None
    facts["points"] = [[int(u), int(v), bool(i % 2)] for i, (u, v) in enumerate(rng.integers(0, SIZE, (6, 2)))]
    return json.loads(json.dumps({**facts, "colour": main_colour(spec.base)}))


def scenes(n, seed=0, **kwargs):
    rng = np.random.default_rng(seed)
    return [make_facts(rng, **kwargs) for _ in range(n)]


def words(text):
    return set(re.findall(r"[\w-]+", text.lower()))


def visible(facts):
    return [p for p in facts["parts"] if p["pixels"] >= 16]


@pytest.fixture(scope="module")
def many():
    """2,000 made-up pictures with all their questions."""
    rng = np.random.default_rng(7)
    return [(facts, turns(facts, rng)) for facts in scenes(2000)]


def test_articles_pronouns_plurals_and_lists():
    for phrase in "a cabinet|an orange box|a USB stick|an oven|a pair of pliers|an upper drawer|an object".split("|"):
        assert questions.with_article(phrase.split(" ", 1)[1]) == phrase
    assert questions.action_words("pull off", "it") == "pull it off"
    assert questions.action_words("pull off", "the cap") == "pull off the cap"
    assert [questions.plural(w) for w in ("door", "box", "switch")] == ["doors", "boxes", "switches"]
    assert questions.join_words(["x"]) == "x" and questions.join_words(["x", "y", "z"]) == "x, y and z"


def test_every_text_picks_its_article_and_reads_as_a_sentence(many):
    for facts, asked in many:
        for turn in asked:
            for text in (turn.question, turn.answer):
                assert not re.search(r"\ba [aeiou]", text) and not re.search(r"\ban [^aeiou]", text), text
                assert "{" not in text and "  " not in text and text.strip() == text and text
            assert turn.question[-1] in "?." and len(turn.answer) <= 120, (turn, facts["parts"])
    articles = Counter(w for _, asked in many for t in asked for w in re.findall(r"\ban?\b", t.answer))
    assert articles["a"] > 500 and articles["an"] > 50  # the test above had something to look at


def test_wordings_per_question():
    assert all(4 <= len(set(w)) <= 8 for w in ASK.values())
    assert len({w for group in ASK.values() for w in group}) == sum(len(w) for w in ASK.values())  # none for two types
    assert set(PLAIN_KINDS) < set(PART_KINDS)


def test_numbers_fall_into_the_bins_of_the_interface():
    for c in range(SIZE):
        assert number(c, SIZE) == f"{100 * c // SIZE:02d}"  # whole numbers: exact
    for size in (96, 100, 128, 224, 336):  # a bin's edge belongs to the bin it opens, also where 29 / 100 * 100 < 29
        assert all(number(c, size) == f"{100 * c // size:02d}" for c in range(size))
    directions = (-1, -0.99, -0.02, 0, 0.5, 0.999, 1)
    assert [number(d + 1, 2) for d in directions] == ["00", "00", "49", "50", "75", "99", "99"]
    assert [number(c, SIZE) for c in (-5, 127.99, 128, 500)] == ["00", "99", "99", "99"]
    for bad in ((math.nan, 1), (math.inf, 1), (1, 0)):
        with pytest.raises(ValueError, match="c must be finite"):
            number(*bad)


def test_contact_survives_its_text_within_one_bin():
    rng = np.random.default_rng(0)
    for i in range(3000):
        approach = rng.normal(size=3) if i % 4 else np.eye(3)[i // 4 % 3] * rng.choice([-1, 1])
        approach /= np.linalg.norm(approach)
        u, v = rng.uniform(0, SIZE, 2)
        text = contact_answer({"u": u, "v": v, "approach": approach.tolist()}, SIZE)
        got_u, got_v, got = parse_contact(text)
        assert abs(got_u - u / SIZE) <= 0.005 + 1e-9 and abs(got_v - v / SIZE) <= 0.005 + 1e-9  # half a bin
        assert abs(np.linalg.norm(got) - 1) < 1e-12
        # half a bin of 0.02 in each of three components moves a unit vector by at most 0.01 * sqrt(3)
        assert math.degrees(math.acos(min(1, float(got @ approach)))) <= math.degrees(0.01 * math.sqrt(3)) + 0.01
        raw = 2 * (np.array([int(w) for w in text.split()[2:]]) + 0.5) / 100 - 1
        assert np.abs(raw - approach).max() <= 0.01 + 1e-9


def test_what_is_no_contact_is_none():
    for text in ("", "37 52 05 71", "37 52 05 71 93 11", "37,52,05,71,93", "37  52 05 71 93", "3 52 05 71 93",
                 "137 52 05 71 93", "37 52 05 71 93.", "the contact is 37 52 05 71 93", "-7 52 05 71 93",
                 "٣٧ 52 05 71 93", "37 52\n05 71 93"):  # fmt: skip
        assert parse_contact(text) is None, text
    u, v, approach = parse_contact(" 00 99 50 50 99\n")  # white space around it is forgiven
    assert (u, v) == (0.005, 0.995) and approach[2] > 0.99 and abs(approach[0] - approach[1]) < 1e-12


def test_instruction_names_verb_and_part_and_half_of_the_time_the_object():
    rng = np.random.default_rng(0)
    part = Part("top drawer", "prismatic", (0, 0, 0), (1, 0, 0), 0, 0.3, [])
    said = Counter(instruction(vars(part), "cabinet", rng) for _ in range(4000))
    assert len(said) == 8 and all("open the top drawer" in s for s in said)
    assert abs(sum(n for s, n in said.items() if "cabinet" in s) / 4000 - 0.5) < 0.04  # 5 standard deviations
    assert abs(sum(n for s, n in said.items() if "object" in s) / 4000 - 0.25) < 0.035


def test_instruction_never_says_the_door_of_the_door():
    rng = np.random.default_rng(0)
    for label, noun in (("left door", "door"), ("lamp head", "lamp")):
        said = [instruction({"verb": "open", "label": label}, noun, rng) for _ in range(200)]
        assert all(f" {noun}" not in s.replace(label, "") for s in said)
    said = {instruction({"verb": "open", "label": "handle"}, "pair of pliers", rng) for _ in range(200)}
    assert "open the handle of the pliers" in said and not any("pair" in s for s in said)


def test_contact_question_is_the_same_for_the_same_instruction():
    expected = "Predict the contact point and direction: open the top drawer."
    for text in ("open the top drawer", "Open the top drawer.", "  open the  top drawer!\n"):
        assert contact_question(text) == expected
    for text in ("", "  \n", "..."):
        with pytest.raises(ValueError, match="instruction is empty"):
            contact_question(text)


def test_same_seed_same_turns_and_questions_differ_within_a_picture(many):
    for i, (facts, asked) in enumerate(many[:300]):
        before = json.dumps(facts)
        assert turns(facts, np.random.default_rng(i)) == turns(facts, np.random.default_rng(i))
        assert len({t.question for t in asked}) == len(asked) and json.dumps(facts) == before
    wordings = {t.question for _ in range(3) for t in turns(many[0][0], np.random.default_rng(_))}
    assert len(wordings) > len(many[0][1])  # another seed asks otherwise
    found = {t.question_type for _, asked in many for t in asked}
    assert found == GENERAL | {"parts", "state", "count", "where", "box", "contact"} | set(ROBOT_TYPES)
    assert {*GENERAL_TYPES, *ROBOT_TYPES, "where", "box", "contact"} == found


def test_a_question_has_one_answer(many):
    """Exact match needs it: the same words about the same picture get the same answer, however they are drawn."""
    for facts, _ in many[:40]:
        answers = defaultdict(set)
        for seed in range(40):
            for turn in turns(facts, np.random.default_rng(seed)):
                answers[turn.question].add((turn.answer, turn.question_type))
        assert all(len(known) == 1 for known in answers.values()), answers


def point_text(*values):
    return f"({','.join(number(value, SIZE) for value in values)})"


def expected(turn, facts):
    """The answers that are right by the facts; None for the types that `test_answers_are_true` spells out."""
    parts, noun = {p["label"]: p for p in facts["parts"]}, NOUNS[facts["category"]]
    part, shown = parts.get(turn.part), visible(facts)
    kinds = Counter(p["kind"] for p in shown)
    side = max(np.subtract(facts["box"][2:], facts["box"][:2])) / SIZE
    middle = sum(facts["box"][::2]) / 2 - SIZE / 2
    right = {
        "object": lambda: questions.with_article(noun),
        "colour": lambda: (part or facts)["colour"],
        "count": lambda: ["none", "one", "two", "three", "four"][kinds[turn.part] if turn.part else len(shown)],
        "state": lambda: {True: "open", False: "closed"}[part["openness"] > 0.2],
        "where": lambda: point_text(*part["centre"]),
        "box": lambda: point_text(*(part or facts)["box"]),
        "contact": lambda: contact_answer(part["contact"], SIZE),
        "presence": lambda: "yes" if (kinds[turn.part] if turn.part else f" {noun}" in turn.question) else "no",
        "success": lambda: "yes" if part["openness"] >= 0.25 else "no",
        "size": lambda: None if turn.part else "small" if side < 0.5 else "medium" if side < 0.66 else "large",
        "relation": lambda: None if turn.part else "left" if middle < 0 else "right",
    }
    return right[turn.question_type]() if turn.question_type in right else None


def test_answers_are_true(many):
    for facts, asked in many:
        parts = {p["label"]: p for p in facts["parts"]}
        shown = visible(facts)
        for turn in asked:
            part, answer, kind = parts.get(turn.part), turn.answer, turn.question_type
            is_open = part is not None and part["openness"] > 0.2
            if (right := expected(turn, facts)) is not None:
                assert answer == right, turn
            if kind in ("state", "success"):
                assert part in shown and not 0.1 < part["openness"] < 0.25
            elif kind == "parts":
                assert words(answer) - {"the", "and"} == set().union(*(p["label"].split() for p in shown))
            elif kind == "movable":
                at = [movable for u, v, movable in facts["points"] if point_text(u, v) in turn.question]
                assert (answer == "yes") in at and turn.part is None
            elif kind == "contact":
                assert parse_contact(answer) and f"{part['verb']} the {part['label']}" in turn.question
            elif kind == "presence" and turn.part:
                assert (answer == "yes") == any(p["kind"] == turn.part for p in facts["parts"])
            elif kind == "possible":
                closing = "close the" in turn.question
                if answer == "yes":
                    assert part in shown and is_open == closing
                elif "already" in answer:
                    assert part in shown and (part["openness"] <= 0.1) == closing
                    assert answer == f"no, the {turn.part} is already {'closed' if closing else 'open'}"
                else:
                    assert turn.part not in parts and answer == f"no, there is no {turn.part}"
                    assert not any(set(turn.part.split()) <= set(label.split()) for label in parts)
            elif kind in ("size", "relation") and turn.part:
                first, second = (parts[name] for name in turn.part.split(" and "))
                (x, y), (u, v) = first["centre"], second["centre"]
                said = {"left": x < u - 10, "right": x > u + 10, "above": y < v - 10, "below": y > v + 10}
                for p, q in ((first, second), (second, first)):
                    said[f"the {p['label']}"] = p["pixels"] > 1.6 * q["pixels"]
                    assert f"the {p['label']}" in turn.question
                assert said[answer], (turn, first, second)
            elif kind in ("size", "relation"):
                x0, y0, x1, y1 = facts["box"]
                side = max(x1 - x0, y1 - y0) / SIZE
                assert (
                    not 0.5 <= side < 0.56 and not 0.66 <= side < 0.72 if kind == "size" else abs(x0 + x1 - SIZE) > 20
                )
            elif kind == "past":
                acted = parts[facts["event"]["acted"]]
                did = rf"(opened|lifted|pulled off|pushed back) the {acted['label']}"
                assert acted in shown and not 0.1 < acted["openness"] < 0.25
                assert re.fullmatch(did if acted["openness"] > 0.2 else "nothing, the attempt failed", answer)
            elif kind == "future":
                is_open &= part["kind"] in questions.CLOSABLE_KINDS
                assert part["label"] in answer and (part["primitive"] == "pull" or "push" in turn.question)
                if "push" in turn.question and part["primitive"] == "pull":
                    assert answer.split()[-1] == ("closes" if is_open else "closed")
                else:
                    assert answer.startswith(f"the {part['label']} ") and "clos" not in answer
            elif kind == "plan" and "five " in turn.question:
                closed = [p for p in shown if p["openness"] <= 0.1]
                steps = {"let go"}.union(*(questions.list_steps(p) for p in closed))
                assert ("already" in answer) == (not closed) and 1 <= len(answer.split(", ")) <= 5
                assert not closed or set(answer.split(", ")) <= steps
            elif kind == "plan" and part:
                steps = questions.list_steps(part)
                done = [s for s in steps if s in turn.question]
                right = {(*steps, "done")[len(done)], ", ".join(steps)}
                if is_open and part["kind"] in questions.CLOSABLE_KINDS:
                    right = {f"nothing, the {turn.part} is already open"}
                assert answer in right
        caption = [t.answer for t in asked if t.question_type == "caption"]
        start = questions.with_article(f"{facts['colour']} {NOUNS[facts['category']]}")
        assert caption[0].startswith(start) and len(caption) == 1 + bool(shown)


def test_wording_of_some_answers():
    facts = scenes(1, categories=("StorageFurniture",), opened=0, hidden=0)[0]
    facts["colour"] = "orange"
    base = facts["parts"][0] | {"contact": None, "joint": "prismatic", "verb": "open", "primitive": "pull"}
    facts["parts"] = [
        base | {"label": "door", "kind": "door", "joint": "revolute"},
        base | {"label": "bottom drawer", "kind": "drawer"},
        base | {"label": "top drawer", "kind": "drawer"},
    ]
    found = defaultdict(set)
    for seed in range(200):
        for turn in turns(facts, np.random.default_rng(seed)):
            found[turn.question_type].add(turn.answer)
    assert found["caption"] == {"an orange cabinet", "an orange cabinet with two drawers and a door"}
    assert found["parts"] == {"the top drawer, the bottom drawer and the door"}  # one order, whatever the facts' order
    assert {"three", "two", "one"} <= found["count"]
    assert "open the top drawer, open the bottom drawer and open the door" in found["plan"]
    assert "move to the top drawer, grip it, pull it out" in found["plan"]
    assert "move to the door, grip it, swing it open" in found["plan"]
    assert not {"no, there is no drawer", "no, there is no top left drawer"} & found["possible"]


def test_what_is_asked_first_names_neither_object_nor_part(many):
    for facts, asked in many:
        secret = set(NOUNS[facts["category"]].split()) - {"of", "pair", "can", "object"}  # "can you see"
        secret |= set().union(*(p["label"].split() for p in facts["parts"])) - SIDES  # "left or right?" tells nothing
        naming = [t.part is not None or t.question_type in ("presence", "box") for t in asked]
        assert naming == sorted(naming)  # all the questions about "this object" come first
        for turn, names in zip(asked, naming, strict=True):
            if not names:
                assert turn.question_type in WHOLE or turn.question_type == "plan"
                assert not words(turn.question) & secret, turn
                assert not {w + "s" for w in secret} & words(turn.question), turn
    first = Counter(asked[0].question_type for _, asked in many)
    assert min(first[name] for name in ("object", "caption", "colour", "parts")) > 100


def test_half_of_the_part_questions_use_no_noun(many):
    said = Counter()
    for facts, asked in many:
        noun = NOUNS[facts["category"]].removeprefix("pair of ")
        for turn in asked:
            other = turn.question_type in ("count", "presence", "size", "relation") or "five" in turn.question
            if turn.part and not other and not set(noun.split()) & set(turn.part.split()):
                said[noun in turn.question] += 1
    assert said.total() > 5000 and 0.47 < said[True] / said.total() < 0.53


def test_general_pictures_have_no_word_about_their_parts():
    """Unseen categories under the paper's rule: what is it, its colour, a caption, is there (the object)."""
    shares = dict.fromkeys((*SEEN, *UNSEEN), 1.0)
    for chosen in (None, shares):
        rng = np.random.default_rng(3)
        for facts in scenes(1000, seed=1, categories=UNSEEN, hidden=0.3):
            noun = NOUNS[facts["category"]]
            for turn in turns(facts, rng, allowed="general", shares=chosen):
                assert turn.question_type in GENERAL and turn.part is None
                said = words(turn.question) | words(turn.answer)
                for part in facts["parts"]:
                    assert not set(part["label"].split()) & said - set(noun.split()) - SIDES, turn
                assert not re.search(r"\d|possible|robot|open|closed|mov(e|able)", turn.question + turn.answer)


def yes_share(answers):
    assert set(answers) == {"yes", "no"}
    return answers["yes"] / answers.total()


def test_yes_and_no_are_balanced(many):
    """Bounds .45-.55: with 700 questions five points are 2.6 standard deviations."""
    answers = defaultdict(Counter)
    for facts, asked in many:
        opened = any(p["openness"] > 0.2 for p in visible(facts))
        for turn in asked:
            if turn.question_type in ("presence", "possible", "movable"):
                key = "part presence" if turn.question_type == "presence" and turn.part else turn.question_type
                answers[key][turn.answer.split(",")[0]] += 1
                answers[f"{key}, opened scene {opened}"][turn.answer.split(",")[0]] += 1
    for key in ("presence", "part presence", "possible", "movable"):
        assert answers[key].total() > 700 and 0.45 <= yes_share(answers[key]) <= 0.55, (key, answers[key])
        assert 0.4 <= yes_share(answers[f"{key}, opened scene True"]) <= 0.6, key  # some 200 questions
    rng, unseen = np.random.default_rng(5), Counter()
    for facts in scenes(2000, seed=2, categories=UNSEEN):
        unseen.update(t.answer for t in turns(facts, rng, "general") if t.question_type == "presence")
    assert 0.45 <= yes_share(unseen) <= 0.55


def test_the_words_of_a_question_do_not_tell_its_answer(many):
    """A table from the asked word to its most frequent answer (the blind way to answer) stays near one half."""
    tables = {"presence": defaultdict(Counter), "possible": defaultdict(Counter)}
    for _, asked in many:
        for turn in asked:
            if turn.question_type in tables and turn.part:
                kind = turn.part.split()[-1], "close" in turn.question
                tables[turn.question_type][kind][turn.answer.split(",")[0]] += 1
    for name, table in tables.items():
        right, n = sum(max(c.values()) for c in table.values()), sum(c.total() for c in table.values())
        assert n > 700 and right / n < 0.6, (name, right / n, dict(table))
    states = Counter(t.answer for _, asked in many for t in asked if t.question_type == "state")
    assert 0.2 < states["open"] / states.total() < 0.6  # one picture in seven has something open


def test_negative_nouns_follow_the_shares():
    """With the data set's shares a noun is asked for with "no" about as often as with "yes"."""
    known = (*SEEN, *UNSEEN)
    rng, asked = np.random.default_rng(0), defaultdict(Counter)
    for facts in scenes(2000, seed=4, categories=known):
        for turn in turns(facts, rng, "general", shares=dict.fromkeys(known, 1.0)):
            if turn.question_type == "presence":
                noun = next(n for n in NOUNS.values() if re.search(rf"\b{n}\b", turn.question))
                asked[noun][turn.answer] += 1
    for noun, answers in asked.items():
        if noun != NOUNS["Door"]:  # never asked for with "no" where an object has a door
            assert 0.3 < yes_share(answers) < 0.7, (noun, answers)


def test_absent_parts_come_from_the_catalogue(many):
    samples = [make_object(c, np.random.default_rng(seed)) for c in SEEN for seed in range(40)]
    known = {part.label for spec in samples for part in spec.parts}
    rng, shares = np.random.default_rng(0), dict.fromkeys((*SEEN, *UNSEEN), 1.0)
    assert any(label not in known for _, label in questions.plain_parts("Phone"))  # there is something to leave out
    with_unseen = [turns(facts, rng, shares=shares) for facts, _ in many]  # their nouns, but none of their parts
    nouns = re.compile(rf"\b({'|'.join(re.escape(NOUNS[c]) for c in UNSEEN)})s?\b")
    assert not any(nouns.search(f"{t.question} {t.answer}") for _, asked in many for t in asked)  # the strict rule
    for collection in ([asked for _, asked in many], with_unseen):
        absent = {t.part for asked in collection for t in asked if "there is no" in t.answer}
        assert len(absent) > 10 and absent <= known and {label.split()[-1] for label in absent} <= set(PLAIN_KINDS)


def test_hidden_parts_are_not_asked_about_and_not_called_absent():
    rng, n = np.random.default_rng(0), 0
    for facts in scenes(600, seed=3, categories=("StorageFurniture", "Refrigerator", "grammar:trays"), hidden=0.5):
        for part in facts["parts"]:
            if part["pixels"] < 16 and rng.random() < 0.5:  # a few pixels are hidden, too
                part |= {"centre": [50, 50], "box": [49, 49, 51, 50]}
        hidden = {p["label"] for p in facts["parts"] if p["pixels"] < 16}
        gone = {p["kind"] for p in facts["parts"]} - {p["kind"] for p in visible(facts)}
        for turn in turns(facts, rng):
            assert turn.part not in hidden | gone or turn.answer in ("yes", "one", "two"), turn
            n += bool(hidden)
        shown = next(t.answer for t in turns(facts, rng) if t.question_type == "count" and not t.part)
        assert shown == questions.COUNT_WORDS[len(visible(facts))]
    assert n > 1000


def test_nothing_visible_is_no_crash():
    for facts in scenes(50, hidden=1.0, opened=0) + [scenes(1)[0] | {"parts": [], "box": None}]:
        facts["points"] = []
        asked = turns(facts, np.random.default_rng(0))
        assert {t.question_type for t in asked} <= GENERAL | {"count", "box"} and not any(t.part for t in asked)
        assert [t.answer for t in asked if t.question_type == "count"] == ["none"]


def test_grammar_objects_have_no_name_and_all_other_questions(many):
    named = Counter()
    for facts, asked in many:
        if facts["category"].startswith(PREFIX):
            types = {t.question_type for t in asked}
            assert "object" not in types and {"caption", "colour", "count"} <= types
            for turn in asked:  # a fixed disc looks like a lid, and one plate is a lid, a cover or a flap
                assert turn.question_type != "presence" and "there is no" not in turn.answer
                assert turn.question_type != "count" or turn.part is None
            named.update(types)
    assert min(named[name] for name in ("contact", "plan", "where", "possible", "movable", "future")) > 100
    shares = dict.fromkeys((*SEEN, *GRAMMAR), 1.0)
    nouns, parts = questions.vocabulary(tuple(shares.items()), UNSEEN)
    lent = questions.vocabulary(
        (("Display", 0.5), ("Toaster", 0.5)), ("Toaster",)
    )  # held out: a noun, no word of a part
    assert (set(lent[0]), set(lent[1])) == ({"monitor", "toaster"}, set(questions.plain_parts("Display")))
    assert (nouns, parts) == questions.vocabulary(tuple((c, 1.0) for c in SEEN), UNSEEN)  # nor is it a "no"


def test_points_are_asked_about_only_with_both_answers():
    facts, rng = scenes(1)[0], np.random.default_rng(0)
    for points in ([], [[3, 4, True]], [[3, 4, False]]):
        assert not [t for t in turns(facts | {"points": points}, rng) if t.question_type == "movable"]
    assert not [t for t in turns(facts, rng, "general") if t.question_type == "movable"]
    asked = [t for t in turns(facts, rng) if t.question_type == "movable"]
    assert len({re.search(r"\(.*\)", t.question)[0] for t in asked}) == questions.ASKED_POINTS  # no point twice


def test_bad_arguments_are_named():
    facts, rng = scenes(1)[0], np.random.default_rng(0)
    lacking = {k: v for k, v in facts.items() if k not in ("box", "parts")}
    for wrong, more, reason in (
        (facts, {"allowed": "none"}, "allowed='none'"),
        (lacking, {}, "facts lack box, parts"),
        (facts | {"category": "Spoon"}, {}, "unknown category 'Spoon'"),
        (facts, {"shares": {"Fork": 1.0}}, "unknown category 'Fork'"),
    ):
        with pytest.raises(ValueError, match=reason):
            turns(wrong, rng, **more)


def test_dialogue_has_three_to_five_turns():
    asked = Counter()
    for i, facts in enumerate(scenes(300, seed=9, categories=(*SEEN, *UNSEEN), hidden=0.2)):
        said = dialogue(facts, np.random.default_rng(i))
        assert 3 <= len(said) <= 5 and said == dialogue(facts, np.random.default_rng(i))
        assert said[0].question_type == "object" and len({t.question_type for t in said}) == len(said)
        asked.update(t.question_type for t in said)
    assert asked["parts"] > 200 and asked["plan"] > 200
    assert asked["possible"] > 100 and asked["state"] > 10


@pytest.fixture
def root(tmp_path):
    (tmp_path / "data" / "images").mkdir(parents=True)
    (tmp_path / "data" / "images" / "1.png").write_bytes(b"png")
    (tmp_path / "secret.png").write_bytes(b"png")
    (tmp_path / "data" / "images" / "link.png").symlink_to(tmp_path / "secret.png")
    (tmp_path / "data" / "images" / "inside.png").symlink_to(tmp_path / "data" / "images" / "1.png")
    return tmp_path / "data"


PAIR = [Turn("object", "What is this?", "a box"), Turn("colour", "What colour is it?", "red")]


def test_to_llava_is_llavas_layout(root, many):
    record = to_llava("7", "images/1.png", PAIR)
    said = [turn.values() for turn in record["conversations"]]
    assert list(map(tuple, said)) == [("human", "<image>\nWhat is this?"), ("gpt", "a box"),
                                      ("human", "What colour is it?"), ("gpt", "red")]  # fmt: skip
    assert list(record["conversations"][0]) == ["from", "value"] and record["id"] == "7"
    assert list(record) == ["id", "image", "conversations"] and record["image"] == "images/1.png"
    text_only = to_llava("8", None, PAIR)
    assert "image" not in text_only and "<image>" not in json.dumps(text_only)
    for good in (record, text_only, record | {"model": "x", "image": "images/inside.png"}):
        assert check_record(json.loads(json.dumps(good)), root, 0, "f.json") == []
    for i, (_, asked) in enumerate(many[:200]):
        assert check_record(to_llava(str(i), "images/1.png", asked), root, i, "f.json") == []
    with pytest.raises(ValueError, match="'9': no turns"):
        to_llava("9", None, [])


BAD_IMAGES = {"images/2.png": "no file", "images": "no file", "../secret.png": "'..'", "images/../images/1.png": "'..'",
              "/etc/hostname": "absolute", "images/link.png": "link that leaves", "images/\x00.png": "", "x" * 5000: "",
              7: "expected a path", " ": "expected a path", None: "expected a path"}  # fmt: skip
BAD_TURNS = {(0, "from", "gpt"): "expected 'human'", (3, "from", "human"): "expected 'gpt'",
             (1, "from", None): "expected 'gpt'", (1, "value", " \n"): "expected text",
             (2, "value", None): "expected text", (0, "value", "<image>\n"): "expected text"}  # fmt: skip


def test_bad_record_is_named_with_file_index_and_field(root):
    good = to_llava("7", "images/1.png", PAIR)
    said = good["conversations"]
    cases = [(good | {"image": image}, "image", problem) for image, problem in BAD_IMAGES.items()]
    for value, problem in (([], "empty list"), ("hello", "expected a list"), (None, "expected a list")):
        cases.append((good | {"conversations": value}, "conversations", problem))
    for (i, key, value), problem in BAD_TURNS.items():
        spoilt = [turn | {key: value} if i == j else turn for j, turn in enumerate(said)]
        cases.append((good | {"conversations": spoilt}, f"conversations[{i}].{key}", problem))
    cases.append((good | {"conversations": ["hello", *said[1:]]}, "conversations[0]", "expected an object"))
    cases.append((good | {"conversations": said[:-1]}, "conversations", "last question has no answer"))
    cases.append(({k: v for k, v in good.items() if k != "image"}, "conversations[0].value", "no image"))
    cases += [(record, "record", "expected an object") for record in (None, [], "x", 3)]
    for record, field, problem in cases:
        problems = check_record(record, root, 12, "mine.json")
        named = [p for p in problems if p.startswith(f"mine.json, record 12: {field}: ") and problem in p]
        assert named and len(problems) <= 2, (record, problems)
