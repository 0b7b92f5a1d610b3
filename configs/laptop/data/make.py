"""Write the problems of configs/laptop as JSONL: `python configs/laptop/data/make.py`. Small tables and a fixed seed; a test compares the files.

facts.jsonl      a short question, its answer in one or two words
json.jsonl       the same questions, the answer as a JSON object
describe.jsonl   a thing to describe, for constraints on the form alone
commands.jsonl   a request to a household assistant, the call of a tool as JSON
programs.jsonl   a Python function to write, asserts to pass, and a solution
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
VALIDATION = 0.25  # share of each file

CAPITALS = {
    "France": "Paris", "Italy": "Rome", "Spain": "Madrid", "Germany": "Berlin", "Japan": "Tokyo", "China": "Beijing", "Russia": "Moscow",
    "Egypt": "Cairo", "Greece": "Athens", "Portugal": "Lisbon", "Austria": "Vienna", "Poland": "Warsaw", "Ireland": "Dublin",
    "Norway": "Oslo", "Sweden": "Stockholm", "Finland": "Helsinki", "Denmark": "Copenhagen", "Hungary": "Budapest", "Turkey": "Ankara",
    "India": "New Delhi", "Canada": "Ottawa", "Cuba": "Havana", "Peru": "Lima", "Kenya": "Nairobi", "Thailand": "Bangkok",
    "England": "London", "Belgium": "Brussels", "Iran": "Tehran", "Iraq": "Baghdad", "Argentina": "Buenos Aires",
}  # fmt: skip
OPPOSITES = {
    "hot": "cold", "big": "small", "up": "down", "left": "right", "day": "night", "black": "white", "open": "closed", "early": "late",
    "fast": "slow", "happy": "sad", "wet": "dry", "hard": "soft", "old": "young", "rich": "poor", "strong": "weak", "true": "false",
    "full": "empty", "long": "short", "high": "low", "first": "last", "inside": "outside", "love": "hate", "war": "peace",
    "north": "south", "east": "west", "push": "pull", "win": "lose", "buy": "sell", "begin": "end", "dark": "light",
}  # fmt: skip
COLOURS = {
    "a ripe banana": "yellow", "fresh grass": "green", "snow": "white", "coal": "black", "a ripe tomato": "red", "a carrot": "orange",
    "the clear sky at noon": "blue", "a lemon": "yellow", "blood": "red", "milk": "white",
}  # fmt: skip
YOUNG = {
    "a dog": "puppy", "a cat": "kitten", "a cow": "calf", "a sheep": "lamb", "a horse": "foal", "a duck": "duckling", "a goat": "kid",
    "a lion": "cub", "a pig": "piglet", "a hen": "chick",
}  # fmt: skip
LANGUAGES = {
    "Brazil": "Portuguese", "Mexico": "Spanish", "Austria": "German", "Japan": "Japanese", "Egypt": "Arabic", "Italy": "Italian",
    "Greece": "Greek", "Poland": "Polish", "Turkey": "Turkish", "Sweden": "Swedish",
}  # fmt: skip
SINGLE = {
    "How many legs does a spider have?": "8", "How many days are in a week?": "7", "How many months are in a year?": "12",
    "How many sides does a triangle have?": "3", "How many minutes are in an hour?": "60", "How many wheels does a bicycle have?": "2",
    "How many continents are there?": "7", "How many letters are in the English alphabet?": "26", "How many hours are in a day?": "24",
    "How many sides does a hexagon have?": "6", "How many players of one football team are on the field?": "11",
    "What is the chemical symbol of gold?": "Au", "What is the chemical formula of water?": "H2O",
    "What is the chemical symbol of oxygen?": "O", "Which planet do we live on?": "Earth", "Which planet is closest to the Sun?": "Mercury",
    "Which planet is the largest of the solar system?": "Jupiter", "Which planet is called the red planet?": "Mars",
    "Who wrote Romeo and Juliet?": "Shakespeare", "Who painted the Mona Lisa?": "Leonardo da Vinci",
    "What is the largest ocean on Earth?": "Pacific", "What is the tallest animal?": "giraffe", "What is the largest animal?": "blue whale",
    "Which organ pumps the blood through the body?": "heart", "Which gas do plants take from the air?": "carbon dioxide",
    "What is frozen water called?": "ice", "Which star is closest to Earth?": "Sun", "What do bees make?": "honey",
    "Which season comes after winter?": "spring", "Which month comes after June?": "July", "Which day comes after Monday?": "Tuesday",
    "Which month is the last of the year?": "December", "Which metal is liquid at room temperature?": "mercury",
    "On which continent is Egypt?": "Africa", "On which continent is China?": "Asia", "On which continent is Brazil?": "South America",
    "What is the currency of Japan?": "yen", "What is the currency of the United States?": "dollar",
    "What is the square root of 81?": "9", "What is the square root of 49?": "7",
}  # fmt: skip
THINGS = (
    "a bicycle", "the moon", "a library", "coffee", "a river", "winter", "a violin", "bread", "a lighthouse", "a cat", "a train station",
    "the sea", "a pencil", "honey", "a forest", "an umbrella", "a clock", "a market", "snow", "a garden", "a bridge", "a kitchen", "a candle",
    "a school", "rain", "a mirror", "a mountain", "chess", "a ladder", "tea", "a window", "an island", "a hammer", "a birthday", "the sun",
    "a boat", "a newspaper", "an elephant", "a blanket", "a desert", "a guitar", "an apple", "a hospital", "a telescope", "a village",
    "a spoon", "autumn", "a shadow", "a postcard", "a football", "a suitcase", "a cloud", "an owl", "a tunnel", "a farmer", "a puzzle",
    "a harbour", "a notebook", "a waterfall", "a teacher", "soup", "a key", "a castle", "a volcano", "a whistle", "a pillow", "a farm",
    "a dictionary", "an orange", "a campfire", "a parrot", "a bakery", "a compass", "a lake", "a robot", "a wedding", "a tent", "a dragon",
    "a pair of shoes", "the wind",
)  # fmt: skip
ROOMS = ("kitchen", "bedroom", "bathroom", "garage", "hall", "office")
SONGS = ("jazz", "rock", "piano music", "folk songs", "opera", "drums")
ITEMS = ("milk", "bread", "apples", "rice", "coffee", "soap", "eggs", "butter")
CITIES = ("Paris", "Oslo", "Rome", "Cairo", "Tokyo", "Lima")

PROGRAMS: dict[str, tuple[str, list[tuple[str, str]]]] = {
    "the sum of the numbers of a list": ("sum(x)", [("[1, 2, 3]", "6"), ("[]", "0")]),
    "the largest number of a list": ("max(x)", [("[4, 9, 2]", "9"), ("[-3, -5]", "-3")]),
    "the smallest number of a list": ("min(x)", [("[4, 9, 2]", "2"), ("[-3, -5]", "-5")]),
    "the length of a text": ("len(x)", [("'abc'", "3"), ("''", "0")]),
    "a text in capital letters": ("x.upper()", [("'abc'", "'ABC'"), ("'aB'", "'AB'")]),
    "a text in small letters": ("x.lower()", [("'ABC'", "'abc'"), ("'aB'", "'ab'")]),
    "a text backwards": ("x[::-1]", [("'abc'", "'cba'"), ("''", "''")]),
    "the square of a number": ("x * x", [("3", "9"), ("-4", "16")]),
    "the cube of a number": ("x**3", [("2", "8"), ("-1", "-1")]),
    "twice a number": ("2 * x", [("5", "10"), ("-3", "-6")]),
    "half of a number": ("x / 2", [("8", "4"), ("3", "1.5")]),
    "whether a number is even": ("x % 2 == 0", [("4", "True"), ("7", "False")]),
    "whether a number is odd": ("x % 2 == 1", [("4", "False"), ("7", "True")]),
    "whether a number is positive": ("x > 0", [("4", "True"), ("-7", "False")]),
    "the absolute value of a number": ("abs(x)", [("-4", "4"), ("7", "7")]),
    "a list sorted from small to large": ("sorted(x)", [("[3, 1, 2]", "[1, 2, 3]"), ("[]", "[]")]),
    "a list sorted from large to small": ("sorted(x, reverse=True)", [("[3, 1, 2]", "[3, 2, 1]"), ("[]", "[]")]),
    "a list backwards": ("x[::-1]", [("[1, 2, 3]", "[3, 2, 1]"), ("[]", "[]")]),
    "the first item of a list": ("x[0]", [("[5, 6]", "5"), ("['a']", "'a'")]),
    "the last item of a list": ("x[-1]", [("[5, 6]", "6"), ("['a']", "'a'")]),
    "the number of words of a text": ("len(x.split())", [("'a b c'", "3"), ("''", "0")]),
    "the first word of a text": ("x.split()[0]", [("'red car'", "'red'"), ("'one'", "'one'")]),
    "the last word of a text": ("x.split()[-1]", [("'red car'", "'car'"), ("'one'", "'one'")]),
    "a text without its spaces": ("x.replace(' ', '')", [("'a b c'", "'abc'"), ("'ab'", "'ab'")]),
    "whether a text reads the same backwards": ("x == x[::-1]", [("'level'", "True"), ("'ab'", "False")]),
    "the average of a list of numbers": ("sum(x) / len(x)", [("[1, 2, 3]", "2"), ("[4]", "4")]),
    "the product of the numbers of a list": ("__import__('math').prod(x)", [("[2, 3, 4]", "24"), ("[5]", "5")]),
    "the even numbers of a list": ("[n for n in x if n % 2 == 0]", [("[1, 2, 4]", "[2, 4]"), ("[1]", "[]")]),
    "the odd numbers of a list": ("[n for n in x if n % 2]", [("[1, 2, 3]", "[1, 3]"), ("[2]", "[]")]),
    "the squares of the numbers of a list": ("[n * n for n in x]", [("[1, 2, 3]", "[1, 4, 9]"), ("[]", "[]")]),
    "the numbers from 1 to a number": ("list(range(1, x + 1))", [("3", "[1, 2, 3]"), ("1", "[1]")]),
    "the sum of the numbers from 1 to a number": ("sum(range(x + 1))", [("4", "10"), ("1", "1")]),
    "the factorial of a number": ("__import__('math').factorial(x)", [("5", "120"), ("0", "1")]),
    "the sum of the digits of a number": ("sum(map(int, str(x)))", [("123", "6"), ("7", "7")]),
    "the number of digits of a number": ("len(str(x))", [("123", "3"), ("7", "1")]),
    "the number of times the letter a is in a text": ("x.count('a')", [("'banana'", "3"), ("'b'", "0")]),
    "a list without repeated items, in order": ("list(dict.fromkeys(x))", [("[1, 2, 1]", "[1, 2]"), ("[]", "[]")]),
    "how many items a list has": ("len(x)", [("[1, 2]", "2"), ("[]", "0")]),
    "a text with its first letter as a capital": ("x.capitalize()", [("'abc'", "'Abc'"), ("'a'", "'A'")]),
    "the words of a text as a list": ("x.split()", [("'a b'", "['a', 'b']"), ("'one'", "['one']")]),
}  # fmt: skip


def facts() -> list[tuple[str, str]]:
    """(question, answer)."""
    return [
        *((f"What is the capital of {country}?", city) for country, city in CAPITALS.items()),
        *((f"What is the opposite of {word!r}?", other) for word, other in OPPOSITES.items()),
        *((f"What colour is {thing}?", colour) for thing, colour in COLOURS.items()),
        *((f"What is the young of {animal} called?", young) for animal, young in YOUNG.items()),
        *((f"Which language do most people in {country} speak?", spoken) for country, spoken in LANGUAGES.items()),
        *((f"What is {a} + {b}?", str(a + b)) for a in range(2, 10) for b in (3, 7)),
        *((f"What is {a} times {b}?", str(a * b)) for a in range(2, 9) for b in (2, 5)),
        *SINGLE.items(),
    ]  # fmt: skip


def commands() -> list[tuple[str, dict[str, Any]]]:
    """(request, the call)."""
    return [
        *((f"Set a timer for {n} minutes.", {"tool": "timer", "value": n}) for n in (2, 3, 5, 8, 10, 12, 15, 20, 25, 30, 45, 90)),
        *((f"Wake me up in {n} minutes.", {"tool": "timer", "value": n}) for n in (6, 9, 18, 35, 40, 60)),
        *((f"Turn on the light in the {room}.", {"tool": "light", "value": room}) for room in ROOMS),
        *((f"It is too dark in the {room}.", {"tool": "light", "value": room}) for room in ROOMS),
        *((f"Play some {song}.", {"tool": "music", "value": song}) for song in SONGS),
        *((f"I would like to hear {song}.", {"tool": "music", "value": song}) for song in SONGS),
        *((f"Put {item} on the shopping list.", {"tool": "shopping", "value": item}) for item in ITEMS),
        *((f"We are out of {item}.", {"tool": "shopping", "value": item}) for item in ITEMS),
        *((f"What is the weather in {city}?", {"tool": "weather", "value": city}) for city in CITIES),
        *((f"Will it rain in {city} today?", {"tool": "weather", "value": city}) for city in CITIES),
    ]  # fmt: skip


def programs() -> list[dict[str, Any]]:
    rows = []
    for what, (expression, cases) in PROGRAMS.items():
        tests = [f"assert solve({given}) == {wanted}" for given, wanted in cases]
        solution = f"def solve(x):\n    return {expression}"
        for request in (f"Write a Python function that returns {what}.", f"I need {what}, in Python."):
            rows.append({"prompt": request, "answer": tests, "meta": {"solution": solution}})
    return rows


def files() -> dict[str, list[dict[str, Any]]]:
    """File name -> its lines, shuffled and split."""
    rows: dict[str, list[dict[str, Any]]] = {
        "facts": [{"prompt": question, "answer": answer} for question, answer in facts()],
        "json": [
            {"prompt": question, "answer": {"answer": int(answer) if answer.isdecimal() else answer}}
            for question, answer in facts()
        ],
        "describe": [{"prompt": f"Describe {thing}.", "answer": None} for thing in THINGS],
        "commands": [{"prompt": request, "answer": call} for request, call in commands()],
        "programs": programs(),
    }  # fmt: skip
    for name, lines in rows.items():
        random.Random(0).shuffle(lines)
        held_out = round(VALIDATION * len(lines))
        rows[name] = [
            {"id": f"{name}/{i}", "split": "validation" if i < held_out else "train", **line}
            for i, line in enumerate(lines)
        ]
    return rows


def text(lines: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(line) + "\n" for line in lines)


if __name__ == "__main__":
    for name, lines in files().items():
        (HERE / f"{name}.jsonl").write_text(text(lines))
        print(f"{name}.jsonl: {len(lines)} problems")
