"""The small world that assets/tiny-llama was pre-trained on: seeded text of several skills.

A document is (question, answer); plain prose has an empty question. Chats use the layout of tasks/chat.py.
Items of a list of letters are written apart ("f k a"), so that each has a token of its own. Nothing here
sorts or shifts a list: those are left for the toy tasks in tasks/.
"""

import itertools
import random
import string
import zlib
from collections.abc import Callable, Iterator

Document = tuple[str, str]


def _words(text: str) -> list[str]:
    return text.split()


def _pairs(text: str) -> dict[str, str]:
    return dict(pair.split(":") for pair in text.split())


NAMES = _words("Anna Ben Clara Dan Ella Finn Grace Hugo Ida Jack Kate Leo Mia Noah Olga Paul")
ANIMALS = _words("ant bear cat cow dog duck fish fox frog goat hen horse mouse owl pig rabbit sheep wolf")
FRUITS = _words("apple banana cherry grape lemon melon orange peach pear plum")
COLORS = _words("black blue brown gold gray green pink red white yellow")
THINGS = _words("ball boat book box cup drum hat kite lamp ring spoon stone")
PLACES = _words("beach bridge castle farm forest garden hill house lake market park river school village")
FEELINGS = _words("brave calm glad happy hungry kind proud sad shy sleepy tired")
SOUNDS = _pairs(
    "bear:growl cat:meow cow:moo dog:woof duck:quack frog:ribbit goat:baa hen:cluck horse:neigh "
    "mouse:squeak owl:hoot pig:oink sheep:baa"
)
LOOKS = _pairs(
    "sky:blue grass:green snow:white coal:black sun:yellow lemon:yellow cherry:red plum:blue "
    "earth:brown flamingo:pink pig:pink fire:red frog:green milk:white fox:red mouse:gray stone:gray "
    "banana:yellow"
)
LISTS = {
    "animals": ANIMALS,
    "fruits": FRUITS,
    "colors": COLORS,
    "things": THINGS,
    "places": PLACES,
    "names": NAMES,
}
ONE = {kind: kind.removesuffix("s") for kind in LISTS}


def chat(question: str, answer: str) -> Document:
    return f"Human:\n{question}\n\nAssistant:\n", answer


def join(words: list[str]) -> str:
    """cat -> cat; cat, dog -> cat and dog; cat, dog, fox -> cat, dog and fox."""
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + " and " + words[-1]


def tale(rng: random.Random) -> str:
    name, other = rng.sample(NAMES, 2)
    animal, thing, color = rng.choice(ANIMALS), rng.choice(THINGS), rng.choice(COLORS)
    place, second = rng.sample(PLACES, 2)
    feeling, later = rng.sample(FEELINGS, 2)
    opening = rng.choice(
        [
            f"Once upon a time there was a {feeling} {animal} called {name}.",
            f"One day a {feeling} {animal} called {name} lived near the {place}.",
            f"There was a {animal} called {name}. It was very {feeling}.",
        ]
    )
    middle = rng.choice(
        [
            f"In the {place} {name} found a {color} {thing}.",
            f"{name} went to the {place} and saw a {color} {thing}.",
            f"{name} lost a {color} {thing} in the {place}.",
        ]
    )
    help_ = rng.choice(
        [
            f"Then {name} met {other} and they took the {thing} to the {second}.",
            f"{other} came from the {second} to help with the {thing}.",
            f"{name} gave the {thing} to {other}, who lived by the {second}.",
        ]
    )
    end = rng.choice(
        [
            f"In the end the {animal} was {later} and {other} went home.",
            f"{name} and {other} were {later} and played with the {color} {thing}.",
            f"That night the {animal} and {other} slept and {name} was {later}.",
        ]
    )
    return " ".join([opening, middle, help_, end])


def story(rng: random.Random) -> Document:
    return "", tale(rng)


def story_chat(rng: random.Random) -> Document:
    text = tale(rng)
    animal = next(word for word in text.replace(".", "").split() if word in ANIMALS)
    question = rng.choice([f"Tell me a story about a {animal}.", f"Write a short story about a {animal}."])
    return chat(question, text)


def counting(rng: random.Random) -> Document:
    first, length = rng.randrange(0, 90), rng.randrange(3, 9)
    numbers = [str(n) for n in range(first, first + length)]
    return chat(f"Count from {numbers[0]} to {numbers[-1]}.", " ".join(numbers))


def alphabet(rng: random.Random) -> Document:
    start, length = rng.randrange(0, 23), rng.randrange(3, 9)
    letters = list(string.ascii_lowercase[start : start + length])
    if rng.random() < 0.4:
        verb = rng.choice(["Say", "Name", "List"])
        return chat(f"{verb} the letters from {letters[0]} to {letters[-1]}.", " ".join(letters))
    one, after = rng.choice(list(itertools.pairwise(letters)))
    asked = [
        f"Which letter comes after {one}?",
        f"After {one} comes which letter?",
        f"What follows {one} in the alphabet?",
    ]
    return chat(rng.choice(asked), after)


def copying(rng: random.Random) -> Document:
    pool = rng.choice(
        [list(string.ascii_lowercase), list(string.digits), ANIMALS, FRUITS + COLORS, THINGS + PLACES]
    )
    items = " ".join(rng.choices(pool, k=rng.randrange(2, 11)))
    return chat(rng.choice([f"Repeat {items}.", f"Say {items} again.", f"Copy the list {items}."]), items)


def listing(rng: random.Random) -> Document:
    kind = rng.choice(list(LISTS))
    n = rng.randrange(2, 6)
    words = ["two", "three", "four", "five"][n - 2]
    return chat(
        rng.choice([f"Name {words} {kind}.", f"Tell me {words} {kind}."]),
        join(rng.sample(LISTS[kind], n)) + ".",
    )


def facts(rng: random.Random) -> Document:
    case = rng.randrange(3)
    if case == 0:
        animal = rng.choice(list(SOUNDS))
        question = rng.choice([f"What does a {animal} say?", f"What sound does the {animal} make?"])
        return chat(question, f"The {animal} says {SOUNDS[animal]}.")
    if case == 1:
        thing = rng.choice(list(LOOKS))
        question = rng.choice([f"What color is the {thing}?", f"Which color does the {thing} have?"])
        return chat(question, f"The {thing} is {LOOKS[thing]}.")
    kind = rng.choice(list(LISTS))
    return chat(f"What is {rng.choice(LISTS[kind])}?", f"It is one of the {kind}, a {ONE[kind]}.")


def reading(rng: random.Random) -> Document:
    """A fact is told, then asked for: the answer must be looked up in the question."""
    people, things = rng.sample(NAMES, 3), rng.sample(THINGS, 3)
    told = " ".join(f"{who} has the {what}." for who, what in zip(people, things, strict=True))
    pick = rng.randrange(3)
    if rng.random() < 0.5:
        return chat(f"{told} Who has the {things[pick]}?", f"{people[pick]} has the {things[pick]}.")
    return chat(f"{told} What does {people[pick]} have?", f"{people[pick]} has the {things[pick]}.")


def arithmetic(rng: random.Random) -> Document:
    a, b = rng.randrange(0, 13), rng.randrange(0, 13)
    if rng.random() < 0.5:
        return chat(f"What is {a} + {b}?", f"{a} + {b} = {a + b}")
    return chat(f"What is {a + b} - {b}?", f"{a + b} - {b} = {a}")


SKILLS: dict[str, Callable[[random.Random], Document]] = {
    "story": story, "story_chat": story_chat, "counting": counting, "alphabet": alphabet, "copying": copying,
    "listing": listing, "facts": facts, "reading": reading, "arithmetic": arithmetic,
}  # fmt: skip
WEIGHTS = {"copying": 5.0, "reading": 2.0}  # looking back takes longest to learn; every other skill has 1


def is_held_out(document: Document) -> bool:
    """One document in twenty, by its text: the same document can never be on both sides."""
    return zlib.crc32("".join(document).encode()) % 20 == 0


def documents(
    seed: int, held_out: bool, skills: tuple[str, ...] = tuple(SKILLS)
) -> Iterator[tuple[str, Document]]:
    """Endless (skill, document) pairs of one side of the split, the skills drawn by their weights."""
    rng = random.Random(seed)
    weights = [WEIGHTS.get(skill, 1.0) for skill in skills]
    while True:
        skill = rng.choices(skills, weights)[0]
        document = SKILLS[skill](rng)
        if is_held_out(document) == held_out:
            yield skill, document
