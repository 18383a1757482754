"""Questions and answers about one rendered picture, generated from what the simulator knows about it (numpy only).

    turns(facts, rng)             questions of every type           -> [Turn, ...] -> to_llava -> LLaVA's JSON
    turns(facts, rng, "general")  only: what is it, its colour, a caption, is there a cabinet
    dialogue(facts, rng)          3-5 turns that read well in a demonstration

| type     | asks                                      | answers                                                     |
|----------|-------------------------------------------|-------------------------------------------------------------|
| object   | what it is                                | "a cabinet"                                                 |
| caption  | for a description                         | "a brown cabinet", "a brown cabinet with two drawers"       |
| colour   | for the colour of the object or of a part | "brown"                                                     |
| size     | how large it looks; which part is larger  | "small", "medium", "large"; "the top drawer"                |
| relation | left or right, above or below, as seen    | "left", "right", "above", "below"                           |
| parts    | which movable parts are in view           | "the top drawer and the bottom drawer"                      |
| count    | how many movable parts, how many drawers  | "two", "none"                                               |
| state    | open or closed, of a part                 | "closed"                                                    |
| where    | where a part is                           | "(37,52)": centre, hundredths of width and height           |
| box      | for the box of the object or of a part    | "(20,41,55,63)": left, top, right, bottom                   |
| presence | is there a drawer, is there a cabinet     | "yes", "no": half of each, with plausible negatives         |
| possible | can this be done now                      | "yes", "no, there is no lid", "no, the lid is already open" |
| plan     | how to do it, what next, the next five    | "move to the lid, grip it, swing it open"                   |
|          | steps, what can be done                   |                                                             |
| success  | was the goal reached (after an attempt)   | "yes", "no"                                                 |
| past     | what was just done (after an attempt)     | "opened the lid", "nothing, the attempt failed"             |
| future   | what a pull or a push will do             | "the lid swings open", "nothing, the lid is already closed" |
| movable  | can the point (37,52) be moved            | "yes", "no": on a movable part, on anything else            |
| contact  | where to touch, and from which direction  | "37 52 05 71 93": pixel (u, v), approach (x, y, z)          |

Every fact has ONE wording as an answer (the metric is exact match) and 4 to 8 wordings as a question. Questions about
"this object" come first, then those that name a part, half of them without the object's noun, so that none gives away
another's answer. An ANSWER still helps later turns, so evaluation asks each question on its own.
"No" is as frequent as "yes". Its words are drawn as often as they occur in the catalogue, and only for kinds of parts
that no category has as a fixed piece (a cabinet has handles, but none of them is a movable part of its own). Grammar
objects get no questions about their name or kinds of parts: their fixed discs and panels look like lids and drawers,
and the same plate is called a lid, a cover or a flap.

Source: RoboMamba (arXiv 2406.04339) section 3.3 and Figures 1, 4; RoboVQA (arXiv 2311.00899) for the robot's types
(possible and contact: discriminative and generative affordance); ManipLLM for movable; LLaVA (arXiv 2304.08485) for the
layout; POPE (arXiv 2305.10355) for balanced presence. Differs: templates, not people's words; one picture, not a video.
"""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.random import Generator

from data.prompts import ASK, INSTRUCTIONS_NOUN, INSTRUCTIONS_PLAIN, contact_answer, contact_question, number
from sim.catalogue import NOUNS, SEEN, UNSEEN, make_object
from sim.grammar import PREFIX
from sim.objects import PART_KINDS, pick

MIN_VISIBLE = 0.001  # share of the picture's pixels below which a part is not asked about (16 pixels at 128 x 128)
CLOSED_UP_TO = 0.10  # openness (share of the joint's range) that still looks closed; the start jitter is 0.08
OPEN_FROM = 0.25  # openness from which a part looks open; in between, its state is not asked for
STATE_CLOSED = 0.2  # share of pictures with nothing open that get a state question, or nearly all would be "closed"
ABSENT_COUNT = 0.3  # share of "how many drawers" questions asked where there are none
CLOSE_CLOSED = 0.15  # share of "no" that is about closing a closed part: as frequent as "yes" to closing an open one
CATALOGUE_SAMPLES = 40  # instances per category from which the frequency of its part words is counted

# (Upper limit of the box's longer side as a share of the frame, word); near a limit nothing is asked.
SIZES = ((0.50, "small"), (0.56, ""), (0.66, "medium"), (0.72, ""), (9, "large"))
LARGER = 1.6  # pixel ratio from which one part is clearly larger than another
ASIDE = 0.08  # share of the frame from which something is clearly to the left of, or above, something else
ASKED_POINTS = 2  # "can this point be moved?" questions per picture
FIVE = 5  # steps of a long plan that are asked for at once
# What happens to a part, by the verb of its instruction; PAST has only the verbs of CLOSABLE_KINDS.
FUTURE = {"pull off": "comes off", "lift": "comes up", "pull up": "comes up", "raise": "comes up", "tilt": "tilts",
          "fold up": "folds up", "slide": "slides", "swing out": "swings out", "press down": "goes down",
          "push back": "slides back"}  # fmt: skip
PAST = {"open": "opened", "lift": "lifted", "pull off": "pulled off", "push back": "pushed back"}

PLAIN_KINDS = ("drawer", "door", "lid", "cap", "flap", "cover", "slider")  # no category has a fixed one
CLOSABLE_KINDS = ("drawer", "door", "lid", "cap", "flap", "cover")  # the words "open" and "closed" apply to these
SIDES = ("top", "upper", "front", "left", "middle", "right", "lower", "bottom", "back")  # order of listing
COUNT_WORDS = ("none", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", *map(str, range(10, 99)))


@dataclass(frozen=True)
class Turn:
    """One question and its answer. part: label or kind of the part it names (two: "a and b"); None = whole object."""

    question_type: str
    question: str
    answer: str
    part: str | None = None


# ---- words -----------------------------------------------------------------------------------------------------------


def with_article(words: str) -> str:
    """ "an orange box", "a lamp", "a USB stick" (said letter by letter)."""
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def plural(noun: str) -> str:
    return noun + ("es" if noun.endswith(("s", "x", "z", "ch", "sh")) else "s")


def join_words(items: Sequence[str]) -> str:
    """["a", "b", "c"] -> "a, b and c"."""
    return f"{', '.join(items[:-1])} and {items[-1]}" if len(items) > 1 else items[0]


def action_words(verb: str, thing: str) -> str:
    """ "pull off the cap", but a pronoun goes inside: "pull it off"."""
    first, *rest = verb.split()
    return " ".join([first, thing, *rest] if thing == "it" else [verb, thing])


def draw_weighted(rng: Generator, weights: Mapping):
    """A key of `weights`, drawn in proportion to its weight; None if there are none."""
    p = np.array(list(weights.values()))
    return list(weights)[int(rng.choice(len(p), p=p / p.sum()))] if weights else None


def fit_together(noun: str, label: str) -> bool:
    """Can noun and label be combined? Not in "the door of the door" or "the lamp head of the lamp"."""
    return not set(noun.split()) & set(label.split())


def name_part(label: str, noun: str, rng: Generator) -> str:
    """Half of the time "the top drawer", else "the top drawer of the cabinet"."""
    with_noun = rng.random() < 0.5 and fit_together(noun, label)
    return f"the {label} of the {noun.removeprefix('pair of ')}" if with_noun else f"the {label}"


def write_pixels(values: Sequence[float], size: float) -> str:
    """Pixels as text, without spaces because a space is a token of its own: (12.8, 64) of 128 -> "(10,50)"."""
    return f"({','.join(number(value, size) for value in values)})"


def instruction(part: Mapping, noun: str, rng: Generator) -> str:
    """The sentence for the robot: verb and label of a part in one of eight wordings, half of them with the noun."""
    verb, label = part["verb"], part["label"]
    with_noun = rng.random() < 0.5 and fit_together(noun, label)
    wording = pick(rng, *(INSTRUCTIONS_NOUN if with_noun else INSTRUCTIONS_PLAIN))
    return wording.format(act=action_words(verb, f"the {label}"), noun=noun.removeprefix("pair of "))


def listing_order(part: Mapping) -> tuple:
    """Sort key from the label alone, so a set of parts has ONE listing: drawers, doors ..; top first, left first."""
    kind = (*PART_KINDS, part["kind"]).index(part["kind"])
    return kind, part["kind"], [SIDES.index(word) for word in part["label"].split() if word in SIDES], part["label"]


def visible_parts(facts: Mapping) -> list[dict]:
    least = MIN_VISIBLE * facts["image_size"] ** 2
    return sorted((p for p in facts["parts"] if p["pixels"] >= least and p["centre"] and p["box"]), key=listing_order)


def part_state(part: Mapping) -> str | None:
    """ "open", "closed", or None if neither word applies to the part or the picture does not settle it."""
    if part["kind"] not in CLOSABLE_KINDS or CLOSED_UP_TO < part["openness"] < OPEN_FROM:
        return None
    return "open" if part["openness"] >= OPEN_FROM else "closed"


def is_decided(part: Mapping) -> bool:
    """Does the picture show what can be done with the part now?"""
    return part_state(part) is not None or part["openness"] <= CLOSED_UP_TO


@functools.cache
def plain_parts(category: str) -> dict[tuple[str, str], float]:
    """(verb, label) -> probability of being a random plain part of a random instance, from fixed sample instances."""
    found: dict[tuple[str, str], float] = {}
    for seed in range(CATALOGUE_SAMPLES):
        parts = make_object(category, np.random.default_rng(seed)).parts
        plain = [(part.verb, part.label) for part in parts if part.kind in PLAIN_KINDS]
        for key in plain:
            found[key] = found.get(key, 0) + 1 / len(plain) / CATALOGUE_SAMPLES
    return found


@functools.cache
def vocabulary(shares: tuple[tuple[str, float], ...], untold: tuple[str, ...]) -> tuple[dict, dict]:
    """({noun: weight}, {(verb, label): weight}) of things that may be absent; see `turns`."""
    nouns, parts = {}, {}
    for category, share in ((c, s) for c, s in shares if s > 0 and not c.startswith(PREFIX)):
        nouns[NOUNS[category]] = share
        for key, n in plain_parts(category).items() if category not in untold else ():
            parts[key] = parts.get(key, 0) + share * n
    return nouns, parts


def caption(facts: Mapping, parts: Sequence[Mapping] = ()) -> str:
    """ "a brown cabinet"; with parts: "a brown cabinet with two drawers and a door"."""
    words = []
    for kind in dict.fromkeys(part["kind"] for part in parts):
        labels = [part["label"] for part in parts if part["kind"] == kind]
        words.append(with_article(labels[0]) if len(labels) == 1 else f"{COUNT_WORDS[len(labels)]} {plural(kind)}")
    whole = with_article(f"{facts['colour']} {NOUNS[facts['category']]}")
    return whole + (f" with {join_words(words)}" if words else "")


def list_steps(part: Mapping) -> list[str]:
    """What the gripper does: a pull needs a grip, a push only a touch."""
    opening = "pull it out" if part["joint"] == "prismatic" else "swing it open"
    last = opening if part["verb"] == "open" else action_words(part["verb"], "it")
    return [f"move to the {part['label']}", "grip it" if part["primitive"] == "pull" else "touch it", last]


# ---- questions about the whole ---------------------------------------------------------------------------------------


def draw_turn(rng: Generator, question_type: str, answer: str, wording=None, part=None, **slots) -> Turn:
    """A turn with one of the wordings of ASK[wording], or of ASK[question_type]."""
    return Turn(question_type, pick(rng, *ASK[wording or question_type]).format(**slots), answer, part)


def general_turns(facts: Mapping, nouns: Mapping[str, float], rng: Generator) -> tuple[list, list]:
    """(turns about "this object", turns that name a thing), none about parts: as in any set of pictures."""
    noun = NOUNS[facts["category"]]
    has_name = not facts["category"].startswith(PREFIX)  # "an object" would be the answer to any unknown thing
    whole = [draw_turn(rng, "object", with_article(noun))] if has_name else []
    whole += [draw_turn(rng, "caption", caption(facts)), draw_turn(rng, "colour", facts["colour"])]
    if facts["box"]:
        x0, y0, x1, y1 = np.array(facts["box"]) / facts["image_size"]
        if looks := next(word for limit, word in SIZES if max(x1 - x0, y1 - y0) < limit):
            whole.append(draw_turn(rng, "size", looks))
        if abs(aside := (x0 + x1) / 2 - 0.5) > ASIDE:
            whole.append(draw_turn(rng, "relation", "left" if aside < 0 else "right", "side"))
    # Avoids "is there a door?" - "no" for an object that has a door without being a Door
    others = {n: w for n, w in nouns.items() if n != noun and all(fit_together(n, p["label"]) for p in facts["parts"])}
    other = draw_weighted(rng, others) if has_name else None
    if other is None:
        return whole, []
    yes = rng.random() < 0.5
    return whole, [draw_turn(rng, "presence", "yes" if yes else "no", a=with_article(noun if yes else other))]


def overview_turns(parts: Sequence[Mapping], facts: Mapping, rng: Generator) -> list[Turn]:
    """How many parts "this object" has, which ones, and what can be done with them; no question names a part."""
    found = [draw_turn(rng, "count", COUNT_WORDS[len(parts)])]
    if parts:
        found.append(draw_turn(rng, "caption", caption(facts, parts), "full caption"))
        found.append(draw_turn(rng, "parts", join_words([f"the {p['label']}" for p in parts])))
    if parts and all(is_decided(p) for p in parts):
        actions = [action_words(p["verb"], f"the {p['label']}") for p in parts if part_state(p) != "open"]
        answer = join_words(actions or ["nothing, everything is already open"])
        found.append(draw_turn(rng, "plan", answer, "actions"))
    return found


def part_turns(facts: Mapping, words: Mapping[tuple[str, str], float], rng: Generator) -> tuple[list, list]:
    """(turns about the parts of "this object" that name none of them, turns that name a part)."""
    noun, parts = NOUNS[facts["category"]], visible_parts(facts)
    decided = [p for p in parts if is_decided(p)]
    whole = [*overview_turns(parts, facts, rng), *movable_turns(facts, rng)]
    naming = [*place_turns(parts, facts, rng), *look_turns(parts, facts, rng)]
    naming += [*pair_turns(parts, facts["image_size"], rng), *presence_turns(parts, facts, words, rng)]
    naming += [*possible_turns(parts, facts, words, rng), *plan_turns(decided, noun, rng)]
    naming += future_turns(decided, noun, rng)
    past, success = event_turns(facts.get("event"), parts, noun, rng)
    return whole + past, naming + success


def place_turns(parts: Sequence[Mapping], facts: Mapping, rng: Generator) -> list[Turn]:
    """The object's box; for every part, where it is and, if known, where to touch it."""
    noun, size, box = NOUNS[facts["category"]], facts["image_size"], facts["box"]
    found = [draw_turn(rng, "box", write_pixels(box, size), the="this object")] if box else []
    for part in parts:
        label = part["label"]
        the = name_part(label, noun, rng)
        found.append(draw_turn(rng, "where", write_pixels(part["centre"], size), None, label, the=the))
        if part["contact"]:
            question = contact_question(instruction(part, noun, rng))
            found.append(Turn("contact", question, contact_answer(part["contact"], size), label))
    return found


def look_turns(parts: Sequence[Mapping], facts: Mapping, rng: Generator) -> list[Turn]:
    """The colour of one part, the state of one and the box of one."""
    stated = [p for p in parts if part_state(p)]
    if not any(part_state(p) == "open" for p in stated) and rng.random() >= STATE_CLOSED:
        stated = []
    found = []
    asked = (("colour", "part colour", parts), ("state", None, stated), ("box", None, parts))
    for question_type, wording, options in asked:
        if options:
            part = pick(rng, *options)
            box = write_pixels(part["box"], facts["image_size"])
            answers = {"colour": part["colour"], "state": part_state(part), "box": box}
            the = name_part(part["label"], NOUNS[facts["category"]], rng)
            found.append(draw_turn(rng, question_type, answers[question_type], wording, part["label"], the=the))
    return found


def pair_turns(parts: Sequence[Mapping], size: int, rng: Generator) -> list[Turn]:
    """Which of two parts looks larger, and their relative position in the picture, if these are clear to see.

    The position is not asked if their names give it away ("above or below: the top drawer, the bottom drawer").
    """
    if len(parts) < 2:
        return []
    first, second = (parts[i] for i in rng.permutation(len(parts))[:2])
    both = f"{first['label']} and {second['label']}"
    names = {"a": f"the {first['label']}", "b": f"the {second['label']}"}
    ratio = first["pixels"] / second["pixels"]
    found = []
    if max(ratio, 1 / ratio) > LARGER:
        found.append(draw_turn(rng, "size", names["a" if ratio > 1 else "b"], "larger", both, **names))
    if set(both.split()) & set(SIDES):
        return found
    x, y = (np.array(first["centre"]) - second["centre"]) / size
    if abs(x) > ASIDE:
        found.append(draw_turn(rng, "relation", "left" if x < 0 else "right", "left right", both, **names))
    if abs(y) > ASIDE:
        found.append(draw_turn(rng, "relation", "above" if y < 0 else "below", "above below", both, **names))
    return found


def presence_turns(parts: Sequence[Mapping], facts: Mapping, words: Mapping, rng: Generator) -> list[Turn]:
    """Is there a part of this kind, and how many? For balance, nothing is asked if only one answer is possible."""
    kinds = sorted({p["kind"] for p in parts} & set(PLAIN_KINDS))
    absent: dict[str, float] = {}
    for (_, label), weight in words.items():
        if (kind := label.split()[-1]) not in {p["kind"] for p in facts["parts"]}:
            absent[kind] = absent.get(kind, 0) + weight
    other = draw_weighted(rng, absent)
    if not kinds or not other or facts["category"].startswith(PREFIX):
        return []
    yes = rng.random() < 0.5
    kind = pick(rng, *kinds) if yes else other
    found = [draw_turn(rng, "presence", "yes" if yes else "no", None, kind, a=with_article(kind))]
    kind = other if rng.random() < ABSENT_COUNT else pick(rng, *kinds)
    n = sum(p["kind"] == kind for p in parts)
    return [*found, draw_turn(rng, "count", COUNT_WORDS[n], "count kind", kind, kinds=plural(kind))]


# ---- the robot's questions -------------------------------------------------------------------------------------------


def movable_turns(facts: Mapping, rng: Generator) -> list[Turn]:
    """Can this point be moved? For facts["points"], [[u, v, on a movable part], ..]; "yes" and "no" equally often."""
    points = {answer: [p for p in facts.get("points", ()) if p[2] == answer] for answer in (True, False)}
    found = []
    for _ in range(min(ASKED_POINTS, len(points[True]), len(points[False]))):
        same = points[bool(rng.random() < 0.5)]
        u, v, answer = same.pop(int(rng.integers(len(same))))  # no point twice
        where = write_pixels((u, v), facts["image_size"])
        found.append(draw_turn(rng, "movable", "yes" if answer else "no", point=where))
    return found


def possible_turns(parts: Sequence[Mapping], facts: Mapping, words: Mapping, rng: Generator) -> list[Turn]:
    """Can this be done now? At most one turn. The answer is drawn first, half "yes", half "no".

    Something counts as absent if its name is no part's name with words added or dropped: next to a "top left drawer" we
    do not ask for a "top drawer", but "the middle drawer" of two drawers is a fair question.
    """
    plain = [p for p in parts if p["kind"] in PLAIN_KINDS]
    opened = [p for p in plain if part_state(p) == "open"]
    closed = [p for p in plain if p["openness"] <= CLOSED_UP_TO]
    names = [set(p["label"].split()) for p in facts["parts"]]
    asked = {key: set(key[1].split()) for key in words}
    absent = {key: n for key, n in words.items() if not any(asked[key] <= x or x <= asked[key] for x in names)}
    grammar = facts["category"].startswith(PREFIX)  # "no" only for what is already open or closed
    other = draw_weighted(rng, {} if grammar else absent)
    closable = [p for p in closed if part_state(p)]
    if not (opened or closed) or not (other or grammar):
        return []
    if grammar and not opened and not (closable and rng.random() < CLOSE_CLOSED):
        return []
    if rng.random() < 0.5:
        part = pick(rng, *opened, *closed)
        verb, label, answer = "close" if part_state(part) == "open" else part["verb"], part["label"], "yes"
    elif opened and (grammar or rng.random() < 0.5):
        part = pick(rng, *opened)
        verb, label, answer = part["verb"], part["label"], f"no, the {part['label']} is already open"
    elif closable and (grammar or rng.random() < CLOSE_CLOSED):
        label = pick(rng, *closable)["label"]
        verb, answer = "close", f"no, the {label} is already closed"
    else:
        verb, label = other
        answer = f"no, there is no {label}"
    action = action_words(verb, name_part(label, NOUNS[facts["category"]], rng))
    return [draw_turn(rng, "possible", answer, None, label, act=action)]


def plan_turns(decided: Sequence[Mapping], noun: str, rng: Generator) -> list[Turn]:
    """How to operate one part, or what comes next; and the next five steps for all parts, some already done."""
    if not decided:
        return []
    part = pick(rng, *decided)
    steps = list_steps(part)
    wording = pick(rng, "plan", "next")
    is_open = part_state(part) == "open"
    n_done = int(rng.integers(len(steps) + 1)) if wording == "next" and not is_open else 0
    answer = ", ".join(steps) if wording == "plan" else (*steps, "done")[n_done]
    if is_open:
        answer = f"nothing, the {part['label']} is already open"
    goal = action_words(part["verb"], name_part(part["label"], noun, rng))
    done = ", ".join(steps[:n_done]) or "nothing"
    found = [draw_turn(rng, "plan", answer, wording, part["label"], act=goal, done=done)]

    steps = [step for p in decided if part_state(p) != "open" for step in (*list_steps(p), "let go")]
    wording = pick(rng, *ASK["five"])
    n_done = int(rng.integers(min(len(steps), 3) + 1)) if "{done}" in wording else 0
    answer = ", ".join(steps[n_done : n_done + FIVE]) or "nothing, everything is already open"
    one = len(decided) == 1
    goal = action_words(part["verb"], "the part that moves") if one else "use every part that is still closed"
    question = wording.format(act=goal, done=", ".join(steps[:n_done]) or "nothing")
    return [*found, Turn("plan", question, answer, " and ".join(p["label"] for p in decided))]


def future_turns(decided: Sequence[Mapping], noun: str, rng: Generator) -> list[Turn]:
    """What a pull or a push will do to one part in its present state."""
    movable = [p for p in decided if p["verb"] == "open" or p["verb"] in FUTURE]
    movable = [p for p in movable if p["primitive"] == "pull" or part_state(p) != "open"]
    if not movable:
        return []
    part = pick(rng, *movable)
    state, label = part_state(part), part["label"]
    push = part["primitive"] == "push" or (state is not None and rng.random() < 0.4)
    the = name_part(label, noun, rng)
    opens = "slides out" if part["joint"] == "prismatic" else "swings open"
    answer = f"the {label} {FUTURE.get(part['verb'], opens)}"
    if push and part["primitive"] == "pull":
        answer = f"the {label} closes" if state == "open" else f"nothing, the {label} is already closed"
    return [draw_turn(rng, "future", answer, "future push" if push else None, label, the=the)]


def event_turns(event: Mapping | None, parts: Sequence[Mapping], noun: str, rng: Generator) -> tuple[list, list]:
    """(past, success) turns for a picture after an attempt, if the parts' states show the outcome."""
    whole, naming = [], []
    states = {p["label"]: (part_state(p), p["verb"]) for p in parts if part_state(p)} if event else {}
    if event and event["acted"] in states:
        state, verb = states[event["acted"]]
        did = f"{PAST[verb]} the {event['acted']}" if state == "open" else "nothing, the attempt failed"
        whole.append(draw_turn(rng, "past", did))
    if event and event["goal"] in states:
        state, verb = states[event["goal"]]
        if event["success"] == (state == "open"):
            action = action_words(verb, name_part(event["goal"], noun, rng))
            answer = "yes" if event["success"] else "no"
            naming.append(draw_turn(rng, "success", answer, None, event["goal"], act=action))
    return whole, naming


def turns(facts: Mapping, rng: Generator, allowed="all", shares: Mapping | None = None, untold=UNSEEN) -> list[Turn]:
    """All questions about one picture; the same facts and the same state of rng give the same turns.

    Args     facts: one picture, as data/build.py writes them. allowed: "all", or "general" for pictures of unseen
             categories (no part, position, contact, affordance or plan). shares: category -> its share of the data set,
             by which nouns and part words for "no" are drawn; default: equal shares of SEEN, so that no word of an
             unseen category occurs (strict rule). untold: categories whose nouns are used, but never their parts.
    Returns  turns with distinct questions: those about "this object" in random order, then the rest in random order.
    Raises   ValueError for any other `allowed`, an unknown category, or facts that lack a field.
    """
    if allowed not in ("all", "general"):
        raise ValueError(f"allowed={allowed!r}; choose 'all' or 'general'")
    if missing := [key for key in ("category", "image_size", "box", "colour", "parts") if key not in facts]:
        raise ValueError(f"facts lack {', '.join(missing)}; data/build.py writes one complete dict per picture")
    if unknown := {facts["category"], *(shares or {})} - set(NOUNS):
        raise ValueError(f"unknown category {', '.join(map(repr, sorted(unknown)))}; choose from {', '.join(NOUNS)}")
    nouns, words = vocabulary(tuple((shares or dict.fromkeys(SEEN, 1.0)).items()), tuple(untold))
    groups = general_turns(facts, nouns, rng)
    if allowed == "all":
        groups = [general + more for general, more in zip(groups, part_turns(facts, words, rng), strict=True)]
    found: dict[str, Turn] = {}
    for group in groups:
        for i in rng.permutation(len(group)):
            found.setdefault(group[i].question, group[i])  # "Is there a door?": about the object, or about a part
    return list(found.values())


def dialogue(facts: Mapping, rng: Generator) -> list[Turn]:
    """Three to five turns in a natural order: what it is, its colour, its parts, what is possible, a plan."""
    found: dict[str, Turn] = {}
    for turn in turns(facts, rng):
        if (turn.part is not None) == (turn.question_type in ("state", "possible", "plan")):
            found.setdefault(turn.question_type, turn)
    if "state" in found and "possible" in found:
        del found[pick(rng, "state", "possible")]
    said = [found[name] for name in ("object", "colour", "parts", "state", "possible", "plan") if name in found]
    return said if len(said) >= 3 else [*said, found["caption"]]


def to_llava(record_id: str, image: str | None, turns: Sequence[Turn]) -> dict:
    """LLaVA's {"id", "image", "conversations": [{"from": "human", "value": "<image>\\n.."}, {"from": "gpt", ..}]}.

    image: path relative to the data folder, or None for text only. ValueError if there are no turns.
    """
    if not turns:
        raise ValueError(f"record {record_id!r}: no turns")
    said = [{"from": who, "value": s} for t in turns for who, s in (("human", t.question), ("gpt", t.answer))]
    if image is not None:
        said[0]["value"] = "<image>\n" + said[0]["value"]
    return {"id": record_id, **({} if image is None else {"image": image}), "conversations": said}
