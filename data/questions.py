"""Questions and answers about one rendered picture, written from what the simulator knows about it (numpy only).

    facts (a dict, one per picture, from data/build.py)
      |-- turns(facts, rng)             questions of every type           -> [Turn, ...] -> to_llava -> LLaVA's JSON
      |-- turns(facts, rng, "general")  only: what is it, its colour, a caption, is there a cabinet
      '-- dialogue(facts, rng)          3-5 turns that read well in a demonstration
    instruction -> contact_question -> (the model) -> parse_contact       the robot's question and its answer

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
| past     | what has just been done (the same)        | "opened the lid", "nothing, the attempt failed"             |
| future   | what a pull or a push will do             | "the lid swings open", "nothing, the lid is already closed" |
| contact  | where to touch, and from which direction  | "37 52 05 71 93": pixel (u, v), approach (x, y, z)          |

Every fact has ONE wording as an answer (the metric is exact match) and 4 to 8 wordings as a question.
No question gives away the answer of another one: those about "this object" come first, then those that name a part,
half of them without the object's noun. An ANSWER still helps the turns after it: evaluation asks each question alone.
The robot's question types are RoboVQA's six: planning, success, possible (discriminative affordance), contact
(generative affordance), past and future. Success and past are asked of pictures after an attempt (facts["event"]).
"No" is as frequent as "yes", its words are drawn as often as the catalogue has them, and only for kinds of parts that
no object shows as a fixed piece (a cabinet has handles, but none of them is a movable part of its own).

Source: RoboMamba (arXiv 2406.04339) section 3.3 and Figures 1, 4 and RoboVQA (arXiv 2311.00899) for the question types;
LLaVA (arXiv 2304.08485) for the layout; POPE (arXiv 2305.10355) for balanced presence. Differs: sentences from
templates, not from people; one picture, not a video.
"""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from data.prompts import contact_answer, contact_question, number
from sim.objects import GADGET, NOUNS, PART_KINDS, SEEN, UNSEEN, make_object

MIN_VISIBLE = 0.001  # share of the picture's pixels below which a part is not asked about (16 pixels at 128 x 128)
CLOSED_UP_TO = 0.10  # openness (share of the joint's range) that still looks closed; the start jitter is 0.08
OPEN_FROM = 0.25  # openness from which a part looks open; in between nothing about its state is asked
STATE_CLOSED = 0.2  # share of the pictures with nothing open that are asked for a state, or nearly all were "closed"
ABSENT_COUNT = 0.3  # share of "how many drawers" that is asked where there is none
CLOSE_CLOSED = 0.15  # share of "no" that asks to close what is closed: as frequent as "close", "yes" in opened scenes
CATALOGUE_SAMPLES = 40  # instances of a category from which the frequency of its part words is counted

# Longer side of the box as a share of the frame, up to: word; near a limit nothing is asked.
SIZES = ((0.50, "small"), (0.56, ""), (0.66, "medium"), (0.72, ""), (9, "large"))
LARGER = 1.6  # ratio of pixels from which one part is plainly larger than another
ASIDE = 0.08  # of the frame, from which something is plainly to the left of, or above, something else
FIVE = 5  # steps of a long plan that are asked for at once
# What becomes of a part, by the verb of its instruction; PAST only of the verbs of CLOSABLE_KINDS.
FUTURE = {"pull off": "comes off", "lift": "comes up", "pull up": "comes up", "raise": "comes up", "tilt": "tilts",
          "fold up": "folds up", "slide": "slides", "swing out": "swings out", "press down": "goes down",
          "push back": "slides back"}  # fmt: skip
PAST = {"open": "opened", "lift": "lifted", "pull off": "pulled off", "push back": "pushed back"}

PLAIN_KINDS = ("drawer", "door", "lid", "cap", "flap", "cover", "slider")  # no object shows one that is fixed
CLOSABLE_KINDS = ("drawer", "door", "lid", "cap", "flap", "cover")  # "open" and "closed" are words for these
SIDES = ("top", "upper", "front", "left", "middle", "right", "lower", "bottom", "back")  # order of listing
COUNT_WORDS = ("none", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")

ASK = {
    "object": ("What is this?", "What is this object?", "What object is in the picture?", "Name this object.",
               "What do you see?", "What kind of thing is this?"),
    "caption": ("Describe this object briefly.", "Give a short caption of the picture.", "Caption this picture.",
                "What is in the picture, and in which colour?", "Describe this object in a few words."),
    "full caption": ("Describe this object and what can move on it.", "Caption this picture with the movable parts.",
                     "Describe this object with its movable parts.", "What is this, and what can move on it?"),
    "colour": ("What colour is this object?", "What colour is it?", "Name the colour of this object.",
               "Which colour does this object have?", "What color is this object?"),
    "part colour": ("What colour is {the}?", "Name the colour of {the}.", "Which colour does {the} have?",
                    "What color is {the}?"),
    "size": ("How large is this object in the picture: small, medium or large?", "How large does this object look?",
             "Does this object look small, medium or large?", "Of what size is this object in the picture?"),
    "larger": ("Which looks larger, {a} or {b}?", "Which is larger in the picture, {a} or {b}?",
               "{a} or {b}: which is larger?", "Of {a} and {b}, which is the larger one?"),
    "side": ("Is this object in the left or in the right half of the picture?", "Left or right: where is this object?",
             "On which side of the picture is this object, left or right?", "Which half holds it: left, right?"),
    "left right": ("Is {a} to the left or to the right of {b}?", "Left or right of {b}: where is {a}?",
                   "On which side of {b} is {a}, left or right?", "Seen from here, is {a} left or right of {b}?"),
    "above below": ("Is {a} above or below {b}?", "Above or below {b}: where is {a}?",
                    "In the picture, is {a} above or below {b}?", "Is {a} higher than {b} or lower, above or below?"),
    "parts": ("Which parts of this object can you see that move?", "Which movable parts can you see?",
              "What can be moved on this object?", "Name the parts of this object that can move.",
              "List the movable parts in view."),
    "count": ("How many movable parts can you see?", "How many parts of this object can move?",
              "Count the movable parts.", "What is the number of movable parts in view?"),
    "count kind": ("How many {kinds} can you see?", "Count the {kinds}.", "How many {kinds} are there?",
                   "What is the number of {kinds}?"),
    "state": ("Is {the} open or closed?", "Is {the} closed or open?", "In which state is {the}, open or closed?",
              "Tell me whether {the} is open or closed."),
    "where": ("Where is {the}?", "Where in the picture is {the}?", "Give the position of {the}.", "Locate {the}.",
              "Point to {the}."),
    "box": ("Give the bounding box of {the}.", "What is the bounding box of {the}?", "Put a box around {the}.",
            "Which bounding box holds {the}?"),
    "presence": ("Is there {a} in this picture?", "Is there {a}?", "Can you see {a}?", "Does the picture show {a}?",
                 "Do you see {a} here?"),
    "possible": ("Is it possible to {act}?", "Can a robot {act} now?", "{act}: possible right now?",
                 "Would it work to {act}?", "Could you {act} right now?"),
    "plan": ("How do I {act}?", "Which steps does it take to {act}?", "Goal: {act}. What are the steps?",
             "Plan how to {act}.", "How would a robot {act}?"),
    "next": ("Goal: {act}. Done so far: {done}. What next?", "I want to {act}. So far: {done}. Next step?",
             "Current goal is: {act}. Last steps: {done}. Immediate next step?",
             "Task: {act}. Finished: {done}. What follows?"),
    "five": ("Goal: {act}. Done so far: {done}. What are the next five steps?", "I want to {act}. Next five steps?",
             "Current goal is: {act}. Last steps: {done}. Next five steps?", "Plan ahead, five steps: {act}."),
    "success": ("The goal was to {act}. Did it work?", "Somebody tried to {act}. Was it a success?",
                "Goal: {act}. Has it been reached?", "Was the attempt to {act} successful?"),
    "past": ("What has just been done?", "What did the robot just do?", "Which action has just been finished?",
             "What happened right before this picture?"),
    "future": ("The gripper holds {the} and pulls. What will happen?", "What happens if the robot pulls at {the}?",
               "The robot is about to pull at {the}. What comes next?", "Predict what a pull at {the} will do."),
    "future push": ("The gripper touches {the} and pushes. What will happen?", "What happens if one pushes {the}?",
                    "The robot is about to push {the}. What comes next?", "Predict what a push at {the} will do."),
    "actions": ("What actions are possible now?", "What could a robot do with this object?",
                "Which actions are possible on this object?", "What can be done with this object now?"),
}  # fmt: skip

# Half with the object's noun, a quarter with "object", a quarter with neither: the part is told by its own name.
INSTRUCTIONS_NOUN = ("{act} of the {noun}", "{act} on the {noun}", "{act} of this {noun}", "on the {noun}, {act}")
INSTRUCTIONS_PLAIN = ("{act} of the object", "{act} of this object", "{act}", "{act}, please")


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


def count_word(n: int) -> str:
    return COUNT_WORDS[n] if n < len(COUNT_WORDS) else str(n)


def join_words(items: Sequence[str]) -> str:
    """["a", "b", "c"] -> "a, b and c"."""
    return f"{', '.join(items[:-1])} and {items[-1]}" if len(items) > 1 else items[0]


def action_words(verb: str, thing: str) -> str:
    """ "pull off the cap", but a pronoun goes inside: "pull it off"."""
    first, *rest = verb.split()
    return " ".join([first, thing, *rest] if thing == "it" else [verb, thing])


def draw_one(rng: np.random.Generator, options: Sequence):
    return options[int(rng.integers(len(options)))]


def draw_weighted(rng: np.random.Generator, weights: Mapping):
    """A key of `weights`, as often as its weight says; None if there is none."""
    if not weights:
        return None
    p = np.array(list(weights.values()))
    return list(weights)[int(rng.choice(len(p), p=p / p.sum()))]


def fit_together(noun: str, label: str) -> bool:
    """May noun and label stand together? Not "the door of the door", "the lamp head of the lamp"."""
    return not set(noun.split()) & set(label.split())


def name_part(label: str, noun: str, rng: np.random.Generator) -> str:
    """Half of the time "the top drawer", else "the top drawer of the cabinet"."""
    with_noun = rng.random() < 0.5 and fit_together(noun, label)
    return f"the {label} of the {noun.removeprefix('pair of ')}" if with_noun else f"the {label}"


def write_pixels(values: Sequence[float], size: float) -> str:
    """Pixels as text, without spaces because a space is a token of its own: (12.8, 64) of 128 -> "(10,50)"."""
    return f"({','.join(number(value, size) for value in values)})"


def instruction(part, noun: str, rng: np.random.Generator) -> str:
    """The sentence for the robot: verb and label of a part in one of eight wordings, half of them with the noun.

    part: an entry of facts["parts"], or anything with the attributes `verb` and `label` (objects.Part).
    """
    verb, label = (part["verb"], part["label"]) if isinstance(part, Mapping) else (part.verb, part.label)
    with_noun = rng.random() < 0.5 and fit_together(noun, label)
    wording = draw_one(rng, INSTRUCTIONS_NOUN if with_noun else INSTRUCTIONS_PLAIN)
    return wording.format(act=action_words(verb, f"the {label}"), noun=noun.removeprefix("pair of "))


# ---- what the facts say ----------------------------------------------------------------------------------------------


def listing_order(part: Mapping) -> tuple:
    """Sort key from the label alone, so a set of parts has ONE listing: drawers, doors ..; top first, left first."""
    kind = PART_KINDS.index(part["kind"]) if part["kind"] in PART_KINDS else len(PART_KINDS)
    return kind, part["kind"], [SIDES.index(word) for word in part["label"].split() if word in SIDES], part["label"]


def visible_parts(facts: Mapping) -> list[dict]:
    least = MIN_VISIBLE * facts["image_size"] ** 2
    return sorted((p for p in facts["parts"] if p["pixels"] >= least and p["centre"] and p["box"]), key=listing_order)


def part_state(part: Mapping) -> str | None:
    """ "open", "closed", or None where these are no words for it or the picture does not decide."""
    if part["kind"] not in CLOSABLE_KINDS or CLOSED_UP_TO < part["openness"] < OPEN_FROM:
        return None
    return "open" if part["openness"] >= OPEN_FROM else "closed"


def is_at_start(part: Mapping) -> bool:
    return part["openness"] <= CLOSED_UP_TO


@functools.cache
def plain_parts(category: str) -> dict[tuple[str, str], float]:
    """(verb, label) -> chance to be a random plain part of a random instance, counted on fixed sample instances."""
    found: dict[tuple[str, str], float] = {}
    for seed in range(CATALOGUE_SAMPLES):
        parts = make_object(category, np.random.default_rng(seed)).parts
        plain = [(part.verb, part.label) for part in parts if part.kind in PLAIN_KINDS]
        for key in plain:
            found[key] = found.get(key, 0) + 1 / len(plain) / CATALOGUE_SAMPLES
    return found


@functools.cache
def vocabulary(shares: tuple[tuple[str, float], ...]) -> tuple[dict[str, float], dict[tuple[str, str], float]]:
    """({noun: weight}, {(verb, label): weight}) of things that may be absent. Words of UNSEEN parts are in no text."""
    nouns, parts = {}, {}
    for category, share in ((c, s) for c, s in shares if s > 0):
        nouns[NOUNS[category]] = share
        for key, n in plain_parts(category).items() if category not in UNSEEN else ():
            parts[key] = parts.get(key, 0) + share * n
    return nouns, parts


def caption(facts: Mapping, parts: Sequence[Mapping] = ()) -> str:
    """ "a brown cabinet"; with parts: "a brown cabinet with two drawers and a door"."""
    groups: dict[str, list[str]] = {}
    for part in parts:
        groups.setdefault(part["kind"], []).append(part["label"])
    words = [f"{count_word(len(g))} {plural(kind)}" if len(g) > 1 else with_article(g[0]) for kind, g in groups.items()]
    whole = with_article(f"{facts['colour']} {NOUNS[facts['category']]}")
    return whole + (f" with {join_words(words)}" if words else "")


def list_steps(part: Mapping) -> list[str]:
    """What the gripper does: a pull needs a grip, a push only a touch."""
    opening = "pull it out" if part["joint"] == "prismatic" else "swing it open"
    last = opening if part["verb"] == "open" else action_words(part["verb"], "it")
    return [f"move to the {part['label']}", "grip it" if part["primitive"] == "pull" else "touch it", last]


# ---- questions about the whole ---------------------------------------------------------------------------------------


def draw_turn(rng: np.random.Generator, question_type: str, answer: str, wording=None, part=None, **slots) -> Turn:
    """A turn with one of the wordings of ASK[wording], or of ASK[question_type]."""
    return Turn(question_type, draw_one(rng, ASK[wording or question_type]).format(**slots), answer, part)


def general_turns(facts: Mapping, nouns: Mapping[str, float], rng: np.random.Generator) -> tuple[list, list]:
    """(turns about "this object", turns that name a thing), not a word about parts: as in any set of pictures."""
    noun = NOUNS[facts["category"]]
    whole = [
        draw_turn(rng, "object", with_article(noun)),
        draw_turn(rng, "caption", caption(facts)),
        draw_turn(rng, "colour", facts["colour"]),
    ]
    if facts["box"]:
        x0, y0, x1, y1 = np.array(facts["box"]) / facts["image_size"]
        if looks := next(word for limit, word in SIZES if max(x1 - x0, y1 - y0) < limit):
            whole.append(draw_turn(rng, "size", looks))
        if abs(aside := (x0 + x1) / 2 - 0.5) > ASIDE:
            whole.append(draw_turn(rng, "relation", "left" if aside < 0 else "right", "side"))
    # Not "is there a door?" - "no" where the object has a door without being a Door
    others = {n: w for n, w in nouns.items() if n != noun and all(fit_together(n, p["label"]) for p in facts["parts"])}
    other = draw_weighted(rng, others)
    if other is None:
        return whole, []
    yes = rng.random() < 0.5
    asked = with_article(noun if yes else other)
    return whole, [draw_turn(rng, "presence", "yes" if yes else "no", a=asked)]


def overview_turns(parts: Sequence[Mapping], facts: Mapping, rng: np.random.Generator) -> list[Turn]:
    """How many parts, which, and what can be done with them, of "this object": no part is named."""
    found = [draw_turn(rng, "count", count_word(len(parts)))]
    if parts:
        found.append(draw_turn(rng, "caption", caption(facts, parts), "full caption"))
        found.append(draw_turn(rng, "parts", join_words([f"the {p['label']}" for p in parts])))
    if parts and all(is_decided(p) for p in parts):
        actions = [action_words(p["verb"], f"the {p['label']}") for p in parts if part_state(p) != "open"]
        answer = join_words(actions or ["nothing, everything is already open"])
        found.append(draw_turn(rng, "plan", answer, "actions"))
    return found


# ---- questions that name a part --------------------------------------------------------------------------------------


def is_decided(part: Mapping) -> bool:
    """Does the picture tell what can be done with it now?"""
    return is_at_start(part) or part_state(part) == "open"


def part_turns(facts: Mapping, words: Mapping, rng: np.random.Generator) -> tuple[list, list]:
    """(turns about the parts of "this object" that name none of them, turns that name a part)."""
    noun, parts = NOUNS[facts["category"]], visible_parts(facts)
    decided = [p for p in parts if is_decided(p)]
    whole = overview_turns(parts, facts, rng)
    naming = place_turns(parts, facts, rng)
    naming += look_turns(parts, facts, rng)
    naming += pair_turns(parts, facts["image_size"], rng)
    naming += presence_turns(parts, facts, words, rng)
    naming += possible_turns(facts, words, rng)
    naming += plan_turns(decided, noun, rng)
    naming += future_turns(decided, noun, rng)
    if event := facts.get("event"):
        whole_event, naming_event = event_turns(event, parts, noun, rng)
        whole += whole_event
        naming += naming_event
    return whole, naming


def place_turns(parts: Sequence[Mapping], facts: Mapping, rng: np.random.Generator) -> list[Turn]:
    """The object's box; of every part where it is, and where to touch it if that is known."""
    noun, size = NOUNS[facts["category"]], facts["image_size"]
    box = facts["box"]
    found = [draw_turn(rng, "box", write_pixels(box, size), the="this object")] if box else []
    for part in parts:
        label = part["label"]
        the = name_part(label, noun, rng)
        found.append(draw_turn(rng, "where", write_pixels(part["centre"], size), None, label, the=the))
        if part["contact"]:
            question = contact_question(instruction(part, noun, rng))
            found.append(Turn("contact", question, contact_answer(part["contact"], size), label))
    return found


def look_turns(parts: Sequence[Mapping], facts: Mapping, rng: np.random.Generator) -> list[Turn]:
    """The colour of one part, the state of one and the box of one."""
    stated = [p for p in parts if part_state(p)]
    if not any(part_state(p) == "open" for p in stated) and rng.random() >= STATE_CLOSED:
        stated = []
    answers = {
        "part colour": (parts, lambda part: part["colour"]),
        "state": (stated, part_state),
        "box": (parts, lambda part: write_pixels(part["box"], facts["image_size"])),
    }
    found = []
    for wording, (options, answer) in answers.items():
        if options:
            part = draw_one(rng, options)
            the = name_part(part["label"], NOUNS[facts["category"]], rng)
            question_type = wording.removeprefix("part ")
            found.append(draw_turn(rng, question_type, answer(part), wording, part["label"], the=the))
    return found


def pair_turns(parts: Sequence[Mapping], size: int, rng: np.random.Generator) -> list[Turn]:
    """Which of two parts looks larger, and how they lie to each other in the picture, where that is plain to see.

    Not asked of parts whose names tell it ("above or below: the top drawer, the bottom drawer").
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


def presence_turns(parts: Sequence[Mapping], facts: Mapping, words: Mapping, rng: np.random.Generator) -> list[Turn]:
    """Is there a part of this kind, and how many. Where only one answer could be given nothing is asked: balance."""
    kinds = sorted({p["kind"] for p in parts} & set(PLAIN_KINDS))
    absent: dict[str, float] = {}
    for (_, label), weight in words.items():
        if (kind := label.split()[-1]) not in {p["kind"] for p in facts["parts"]}:
            absent[kind] = absent.get(kind, 0) + weight
    other = draw_weighted(rng, absent)
    if not kinds or not other:
        return []
    yes = rng.random() < 0.5
    kind = draw_one(rng, kinds) if yes else other
    found = [draw_turn(rng, "presence", "yes" if yes else "no", None, kind, a=with_article(kind))]
    kind = other if rng.random() < ABSENT_COUNT else draw_one(rng, kinds)
    n = sum(p["kind"] == kind for p in parts)
    return [*found, draw_turn(rng, "count", count_word(n), "count kind", kind, kinds=plural(kind))]


# ---- the robot's questions -------------------------------------------------------------------------------------------


def possible_turns(facts: Mapping, words: Mapping, rng: np.random.Generator) -> list[Turn]:
    """Can this be done now? At most one turn."""
    drawn = draw_possible(facts, words, rng)
    if drawn is None:
        return []
    verb, label, answer = drawn
    action = action_words(verb, name_part(label, NOUNS[facts["category"]], rng))
    return [draw_turn(rng, "possible", answer, None, label, act=action)]


def draw_possible(facts: Mapping, words: Mapping, rng: np.random.Generator) -> tuple[str, str, str] | None:
    """(verb, label, answer) of an action that may or may not be possible. The answer is drawn first, one half each.

    Something is absent when its name is no part's name with words added or dropped: where there is a "top left drawer"
    nobody asks for a "top drawer", but "the middle drawer" of two drawers is a fair question.
    """
    plain = [p for p in visible_parts(facts) if p["kind"] in PLAIN_KINDS]
    opened = [p for p in plain if part_state(p) == "open"]
    closed = [p for p in plain if is_at_start(p)]
    names = [set(p["label"].split()) for p in facts["parts"]]
    absent = {}
    for (verb, label), weight in words.items():
        asked = set(label.split())
        if not any(asked <= name or name <= asked for name in names):
            absent[verb, label] = weight
    other = draw_weighted(rng, absent)
    if not other or not (opened or closed):
        return None
    if rng.random() < 0.5:
        part = draw_one(rng, opened + closed)
        return "close" if part_state(part) == "open" else part["verb"], part["label"], "yes"
    if opened and rng.random() < 0.5:
        part = draw_one(rng, opened)
        return part["verb"], part["label"], f"no, the {part['label']} is already open"
    closable = [p for p in closed if part_state(p)]
    if closable and rng.random() < CLOSE_CLOSED:
        label = draw_one(rng, closable)["label"]
        return "close", label, f"no, the {label} is already closed"
    return *other, f"no, there is no {other[1]}"


def plan_turns(decided: Sequence[Mapping], noun: str, rng: np.random.Generator) -> list[Turn]:
    """How to work one part, or what comes next; and the next five steps of everything."""
    if not decided:
        return []
    part = draw_one(rng, decided)
    steps = list_steps(part)
    wording = draw_one(rng, ("plan", "next"))
    is_open = part_state(part) == "open"
    n_done = int(rng.integers(len(steps) + 1)) if wording == "next" and not is_open else 0
    answer = ", ".join(steps) if wording == "plan" else (*steps, "done")[n_done]
    if is_open:
        answer = f"nothing, the {part['label']} is already open"
    goal = action_words(part["verb"], name_part(part["label"], noun, rng))
    done = ", ".join(steps[:n_done]) or "nothing"
    plan = draw_turn(rng, "plan", answer, wording, part["label"], act=goal, done=done)
    return [plan, five_steps_turn(decided, rng)]


def five_steps_turn(decided: Sequence[Mapping], rng: np.random.Generator) -> Turn:
    """The next five steps towards working every part that is still closed, with or without some of them done."""
    steps = [step for p in decided if part_state(p) != "open" for step in (*list_steps(p), "let go")]
    wording = draw_one(rng, ASK["five"])
    n_done = int(rng.integers(min(len(steps), 3) + 1)) if "{done}" in wording else 0
    answer = ", ".join(steps[n_done : n_done + FIVE]) or "nothing, everything is already open"
    goal = "use every part that is still closed"
    if len(decided) == 1:
        goal = action_words(decided[0]["verb"], "the part that moves")
    names = " and ".join(p["label"] for p in decided)
    return Turn("plan", wording.format(act=goal, done=", ".join(steps[:n_done]) or "nothing"), answer, names)


def future_turns(decided: Sequence[Mapping], noun: str, rng: np.random.Generator) -> list[Turn]:
    """What a pull or a push will do to one part."""
    movable = [p for p in decided if p["verb"] == "open" or p["verb"] in FUTURE]
    movable = [p for p in movable if p["primitive"] == "pull" or part_state(p) != "open"]
    if not movable:
        return []
    part = draw_one(rng, movable)
    push = part["primitive"] == "push" or (part_state(part) is not None and rng.random() < 0.4)
    the = name_part(part["label"], noun, rng)
    wording = "future push" if push else None
    return [draw_turn(rng, "future", tell_future(part, push), wording, part["label"], the=the)]


def tell_future(part: Mapping, push: bool) -> str:
    """What a pull at a part, or a push against it, will do to it as it stands."""
    if push and part["primitive"] == "pull":
        closes = part_state(part) == "open"
        return f"the {part['label']} closes" if closes else f"nothing, the {part['label']} is already closed"
    opens = "slides out" if part["joint"] == "prismatic" else "swings open"
    return f"the {part['label']} {FUTURE.get(part['verb'], opens)}"


def event_turns(event: Mapping, parts: Sequence[Mapping], noun: str, rng: np.random.Generator) -> tuple[list, list]:
    """Past and success, of a picture after an attempt, where the parts' states tell it."""
    now = {p["label"]: p for p in parts}
    goal, acted = now.get(event["goal"]), now.get(event["acted"])
    whole, naming = [], []
    if acted and part_state(acted):
        did = f"{PAST[acted['verb']]} the {acted['label']}"
        whole.append(draw_turn(rng, "past", did if part_state(acted) == "open" else "nothing, the attempt failed"))
    if goal and part_state(goal) and event["success"] == (part_state(goal) == "open"):
        action = action_words(goal["verb"], name_part(goal["label"], noun, rng))
        naming.append(draw_turn(rng, "success", "yes" if event["success"] else "no", None, goal["label"], act=action))
    return whole, naming


# ---- all of them -----------------------------------------------------------------------------------------------------


def turns(
    facts: Mapping, rng: np.random.Generator, allowed: str = "all", shares: Mapping[str, float] | None = None
) -> list[Turn]:
    """All questions about one picture; the same facts and the same state of rng give the same turns.

    Args     facts: one picture, as data/build.py writes them. allowed: "all", or "general" for pictures of unseen
             categories (no part, position, contact, affordance or plan). shares: category -> its share of the data set;
             "no" takes its nouns and part words from there, in these proportions. Default: equal shares of SEEN and
             GADGET, so that no word of an unseen category occurs (strict rule). For the paper's rule add UNSEEN: only
             their nouns are used, their parts never.
    Returns  turns with different questions: in random order those about "this object", then in random order the rest.
    Raises   ValueError for another `allowed`, an unknown category, or facts that lack a field.
    """
    if allowed not in ("all", "general"):
        raise ValueError(f"allowed={allowed!r}; choose 'all' or 'general'")
    if missing := [key for key in ("category", "image_size", "box", "colour", "parts") if key not in facts]:
        raise ValueError(f"facts lack {', '.join(missing)}; data/build.py writes one complete dict per picture")
    if unknown := {facts["category"], *(shares or {})} - set(NOUNS):
        raise ValueError(f"unknown category {', '.join(map(repr, sorted(unknown)))}; choose from {', '.join(NOUNS)}")
    nouns, words = vocabulary(tuple((shares or dict.fromkeys((*SEEN, GADGET), 1.0)).items()))
    whole, naming = general_turns(facts, nouns, rng)
    if allowed == "all":
        more_whole, more_naming = part_turns(facts, words, rng)
        whole += more_whole
        naming += more_naming
    found: dict[str, Turn] = {}
    for turn in [group[i] for group in (whole, naming) for i in rng.permutation(len(group))]:
        found.setdefault(turn.question, turn)  # "Is there a door?" can come up twice: for the object and for a part
    return list(found.values())


def dialogue(facts: Mapping, rng: np.random.Generator) -> list[Turn]:
    """Three to five turns in a natural order: what it is, its colour, its parts, what is possible, a plan."""
    found: dict[str, Turn] = {}
    for turn in turns(facts, rng):
        names_part = turn.question_type in ("state", "possible", "plan")
        if (turn.part is not None) == names_part:
            found.setdefault(turn.question_type, turn)
    if "state" in found and "possible" in found:
        del found[draw_one(rng, ("state", "possible"))]
    said = [found[name] for name in ("object", "colour", "parts", "state", "possible", "plan") if name in found]
    return said if len(said) >= 3 else [*said, found["caption"]]


def to_llava(record_id: str, image: str | None, turns: Sequence[Turn]) -> dict:
    """LLaVA's {"id", "image", "conversations": [{"from": "human", "value": "<image>\\n.."}, {"from": "gpt", ..}]}.

    image: path relative to the data folder, or None for text alone. ValueError without turns.
    """
    if not turns:
        raise ValueError(f"record {record_id!r}: no turns")
    said = [{"from": who, "value": s} for t in turns for who, s in (("human", t.question), ("gpt", t.answer))]
    if image is not None:
        said[0]["value"] = "<image>\n" + said[0]["value"]
    return {"id": record_id, **({} if image is None else {"image": image}), "conversations": said}
