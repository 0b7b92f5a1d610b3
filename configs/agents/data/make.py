"""Write handbook.jsonl (documents of a shop that does not exist) and questions.jsonl: python configs/agents/data/make.py

What is asked stands in the handbook only: the shelf of a product in its own document, the town of its maker in another one.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

WHAT = [
    "lantern",
    "kettle",
    "ladder",
    "saddle",
    "compass",
    "blanket",
    "whistle",
    "mirror",
    "hammer",
    "basket",
    "candle",
    "teapot",
    "bucket",
    "pillow",
    "drum",
    "anchor",
]
KIND = ["brass", "copper", "cedar", "velvet", "folding", "striped"]
MAKERS = [
    "Arlo",
    "Berit",
    "Corvin",
    "Dagny",
    "Edda",
    "Falk",
    "Gesine",
    "Hobart",
    "Ilse",
    "Jorun",
    "Klaas",
    "Liv",
]
TOWNS = [
    "Abern",
    "Bresk",
    "Colmar",
    "Dunmoor",
    "Elsted",
    "Farrow",
    "Glenby",
    "Hartle",
    "Invery",
    "Jessop",
    "Kelby",
    "Lorne",
]


def main() -> None:
    rng = random.Random(0)
    folder = Path(__file__).parent
    town = dict(zip(MAKERS, rng.sample(TOWNS, len(TOWNS)), strict=True))
    documents = [
        {
            "title": f"{maker} & Co.",
            "text": f"{maker} & Co. is a workshop in {place}. It delivers on Mondays.",
        }
        for maker, place in town.items()
    ]
    questions = []
    for number, (kind, what) in enumerate((kind, what) for what in WHAT for kind in KIND):
        maker, shelf = rng.choice(MAKERS), 100 + number
        name = f"{kind} {what}"
        documents.append(
            {"title": name, "text": f"The {name} is kept on shelf {shelf}. It is made by {maker} & Co."}
        )
        asked = (
            (f"On which shelf is the {name}?", str(shelf))
            if number % 2
            else (f"In which town is the maker of the {name}?", town[maker])
        )
        questions.append({"id": name.replace(" ", "-"), "prompt": asked[0], "answer": asked[1]})
    rng.shuffle(questions)
    for i, question in enumerate(questions):
        question["split"] = "train" if i < 64 else "validation"
    for file, rows in (("handbook.jsonl", documents), ("questions.jsonl", questions)):
        (folder / file).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    main()
