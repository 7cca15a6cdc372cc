"""The small world that assets/tiny-llama was pre-trained on: seeded text of several skills.

Every skill is a function rng -> document. Chat skills use the layout `\\n\\nHuman: ...\\n\\nAssistant: ...`; letters that
belong to a list are written apart ("f k a"), so that the tokenizer gives each its own token. Nothing here reverses,
sorts or shifts a list: those are left for the toy tasks in tasks/.
"""

import random
import string
import zlib
from collections.abc import Callable, Iterator

NAMES = "Anna Ben Clara Dan Ella Finn Grace Hugo Ida Jack Kate Leo Mia Noah Olga Paul".split()
ANIMALS = "ant bear cat cow dog duck fish fox frog goat hen horse mouse owl pig rabbit sheep wolf".split()
FRUITS = "apple banana cherry grape lemon melon orange peach pear plum".split()
COLORS = "black blue brown gold gray green pink red white yellow".split()
THINGS = "ball boat book box cup drum hat kite lamp ring spoon stone".split()
PLACES = "beach bridge castle farm forest garden hill house lake market park river school village".split()
FEELINGS = "brave calm glad happy hungry kind proud sad shy sleepy tired".split()
SOUNDS = {"bear": "growl", "cat": "meow", "cow": "moo", "dog": "woof", "duck": "quack", "frog": "ribbit", "goat": "baa",
          "hen": "cluck", "horse": "neigh", "mouse": "squeak", "owl": "hoot", "pig": "oink", "sheep": "baa"}
LOOKS = {"sky": "blue", "grass": "green", "snow": "white", "coal": "black", "sun": "yellow", "lemon": "yellow",
         "cherry": "red", "plum": "blue", "earth": "brown", "flamingo": "pink", "pig": "pink", "fire": "red",
         "frog": "green", "milk": "white", "fox": "red", "mouse": "gray", "stone": "gray", "banana": "yellow"}
LISTS = {"animals": ANIMALS, "fruits": FRUITS, "colors": COLORS, "things": THINGS, "places": PLACES, "names": NAMES}
TAIL = {"animals": "animal", "fruits": "fruit", "colors": "color", "things": "thing", "places": "place", "names": "name"}


def chat(question: str, answer: str) -> str:
    return f"\n\nHuman: {question}\n\nAssistant: {answer}"


def join(words: list[str]) -> str:
    """cat -> cat; cat, dog -> cat and dog; cat, dog, fox -> cat, dog and fox."""
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + " and " + words[-1]


def story(rng: random.Random) -> str:
    name, other = rng.sample(NAMES, 2)
    animal, thing, color = rng.choice(ANIMALS), rng.choice(THINGS), rng.choice(COLORS)
    place, second = rng.sample(PLACES, 2)
    feeling, later = rng.sample(FEELINGS, 2)
    opening = rng.choice([f"Once upon a time there was a {feeling} {animal} called {name}.",
                          f"One day a {feeling} {animal} called {name} lived near the {place}.",
                          f"There was a {animal} called {name}. It was very {feeling}."])
    middle = rng.choice([f"In the {place} {name} found a {color} {thing}.",
                         f"{name} went to the {place} and saw a {color} {thing}.",
                         f"{name} lost a {color} {thing} in the {place}."])
    help_ = rng.choice([f"Then {name} met {other} and they took the {thing} to the {second}.",
                        f"{other} came from the {second} to help with the {thing}.",
                        f"{name} gave the {thing} to {other}, who lived by the {second}."])
    end = rng.choice([f"In the end the {animal} was {later} and {other} went home.",
                      f"{name} and {other} were {later} and played with the {color} {thing}.",
                      f"That night the {animal} and {other} slept and {name} was {later}."])
    return " ".join([opening, middle, help_, end])


def story_chat(rng: random.Random) -> str:
    text = story(rng)
    animal = next(word for word in text.replace(".", "").split() if word in ANIMALS)
    question = rng.choice([f"Tell me a story about a {animal}.", f"Write a short story about a {animal}."])
    return chat(question, text)


def counting(rng: random.Random) -> str:
    first, length = rng.randrange(0, 90), rng.randrange(3, 9)
    numbers = [str(n) for n in range(first, first + length)]
    return chat(f"Count from {numbers[0]} to {numbers[-1]}.", " ".join(numbers))


def alphabet(rng: random.Random) -> str:
    start, length = rng.randrange(0, 22), rng.randrange(3, 9)
    letters = list(string.ascii_lowercase[start : start + length])
    if rng.random() < 0.4:
        return chat(f"Say the letters from {letters[0]} to {letters[-1]}.", " ".join(letters))
    place = rng.randrange(len(letters) - 1)
    return chat(f"Which letter comes after {letters[place]}?", letters[place + 1])


def copying(rng: random.Random) -> str:
    pool = rng.choice([list(string.ascii_lowercase), list(string.digits), ANIMALS, FRUITS, COLORS, THINGS])
    items = " ".join(rng.sample(pool, rng.randrange(2, 9)))
    return chat(rng.choice([f"Repeat {items}.", f"Say {items} again.", f"Copy the list {items}."]), items)


def listing(rng: random.Random) -> str:
    kind = rng.choice(list(LISTS))
    n = rng.randrange(2, 6)
    words = ["two", "three", "four", "five"][n - 2]
    return chat(rng.choice([f"Name {words} {kind}.", f"Tell me {words} {kind}."]), join(rng.sample(LISTS[kind], n)) + ".")


def facts(rng: random.Random) -> str:
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
    return chat(f"What is {rng.choice(LISTS[kind])}?", f"It is one of the {kind}, a {TAIL[kind]}.")


def reading(rng: random.Random) -> str:
    """A fact is told, then asked for: the answer must be looked up in the question."""
    people, things = rng.sample(NAMES, 3), rng.sample(THINGS, 3)
    told = " ".join(f"{who} has the {what}." for who, what in zip(people, things, strict=True))
    pick = rng.randrange(3)
    if rng.random() < 0.5:
        return chat(f"{told} Who has the {things[pick]}?", f"{people[pick]} has the {things[pick]}.")
    return chat(f"{told} What does {people[pick]} have?", f"{people[pick]} has the {things[pick]}.")


def arithmetic(rng: random.Random) -> str:
    a, b = rng.randrange(0, 13), rng.randrange(0, 13)
    if rng.random() < 0.5:
        return chat(f"What is {a} + {b}?", f"{a} + {b} = {a + b}")
    return chat(f"What is {a + b} - {b}?", f"{a + b} - {b} = {a}")


SKILLS: dict[str, Callable[[random.Random], str]] = {
    "story": story, "story_chat": story_chat, "counting": counting, "alphabet": alphabet, "copying": copying,
    "listing": listing, "facts": facts, "reading": reading, "arithmetic": arithmetic,
}  # fmt: skip


def is_held_out(document: str) -> bool:
    """One document in twenty, by its text: the same document can never be on both sides."""
    return zlib.crc32(document.encode()) % 20 == 0


def documents(seed: int, held_out: bool, skills: tuple[str, ...] = tuple(SKILLS)) -> Iterator[tuple[str, str]]:
    """Endless (skill, document) pairs of one side of the split; skills take turns in random order."""
    rng = random.Random(seed)
    while True:
        skill = rng.choice(skills)
        document = SKILLS[skill](rng)
        if is_held_out(document) == held_out:
            yield skill, document
