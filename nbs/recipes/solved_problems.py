"""Writes the seeds of `phi3-cot` and a recording of a teacher that expands them: a program that knows how its problems are made.

No model that runs on a CPU can make new problems and solve them. So the small form of the recipe is taught by a recording,
as if an API had answered: `nbs/prompts/cot-seeds.jsonl` holds 50 seeds, five of each kind below, and
`nbs/recipes/phi3-cot.jsonl` holds their worked solutions and `VARIATIONS` new problems a seed, with worked solutions too.
`python nbs/recipes/solved_problems.py` writes the same two files again, from the templates of 12_teacher.prompts.
"""
import json
import random
import re
from pathlib import Path

from distill_nb.teacher.chains import ChainPlan, Seen, Solution, solve, transform
from distill_nb.teacher.journal import Usage, entry, write_shard
from distill_nb.teacher.prompts import TEMPLATES

NBS = Path(__file__).resolve().parent.parent
SEEDS, RECORDING = NBS/"prompts"/"cot-seeds.jsonl", NBS/"recipes"/"phi3-cot.jsonl"
SEEDS_A_KIND, VARIATIONS, SEED = 5, 15, 11
NEAR_DUPLICATE = 0.7  # as annotate has it

NAMES = ("Ana Ben Chen Dina Emil Farah Goran Hana Ivan Jamila Kofi Lena Marta Nuri Omar Priya Ravi Sofia Tariq Uma Vera Wen "
         "Yusuf Zora").split()
GOODS = ["pen", "mug", "book", "ball", "candle", "plant", "cap", "lamp"]
FRUIT = ["apples", "pears", "plums", "figs", "lemons", "oranges", "peaches", "mangoes"]
PLACES = ["shop", "bakery", "library", "museum", "school", "garden", "market", "farm"]
LESSONS = ["lesson", "film", "match", "concert", "meeting", "walk", "bus ride", "boat trip"]


def clock(minutes):
    return f"{minutes // 60}:{minutes % 60:02d}"


def purchase(draw):
    who, (thing, other) = draw.choice(NAMES), draw.sample(GOODS, 2)
    n, price, extra = draw.randint(2, 9), draw.randint(2, 9), draw.randint(3, 20)
    return (f"{who} buys {n} {thing}s for {price} dollars each and one {other} for {extra} dollars. How much does {who} pay?",
            f"{n} {thing}s cost {n} * {price} = {n * price} dollars. With the {other} that is {n * price} + {extra} = "
            f"{n * price + extra} dollars.", n * price + extra)


def change(draw):
    who, thing = draw.choice(NAMES), draw.choice(GOODS)
    n, price = draw.randint(2, 9), draw.randint(2, 12)
    paid = draw.choice([note for note in (20, 50, 100, 200) if note > n * price])
    return (f"{who} buys {n} {thing}s at {price} dollars each and pays with {paid} dollars. How much change does {who} get?",
            f"The {thing}s cost {n} * {price} = {n * price} dollars. The change is {paid} - {n * price} = {paid - n * price} dollars.",
            paid - n * price)


def gift(draw):
    a, b = draw.sample(NAMES, 2)
    fruit, had, gave, got = draw.choice(FRUIT), draw.randint(20, 40), draw.randint(3, 15), draw.randint(2, 12)
    return (f"{a} has {had} {fruit}. {a} gives {gave} to {b} and picks {got} more. How many {fruit} does {a} have now?",
            f"After the gift {a} has {had} - {gave} = {had - gave} {fruit}. Then {a} has {had - gave} + {got} = "
            f"{had - gave + got} {fruit}.", had - gave + got)


def sharing(draw):
    fruit, place, n, each = draw.choice(FRUIT), draw.choice(PLACES), draw.randint(2, 9), draw.randint(3, 9)
    eaten = draw.randint(1, each - 1)
    return (f"At the {place}, {n * each} {fruit} are shared equally among {n} children. Each child eats {eaten}. "
            f"How many {fruit} does each child have left?",
            f"Each child gets {n * each} / {n} = {each} {fruit}. After eating, {each} - {eaten} = {each - eaten} are left.",
            each - eaten)


def saving(draw):
    who, thing = draw.choice(NAMES), draw.choice(GOODS)
    week, weeks = draw.randint(3, 9), draw.randint(3, 9)
    price = draw.randint(5, week * weeks - 1)
    return (f"{who} saves {week} dollars a week for {weeks} weeks and then buys a {thing} for {price} dollars. "
            f"How many dollars are left?",
            f"{who} saves {week} * {weeks} = {week * weeks} dollars. After buying the {thing}, {week * weeks} - {price} = "
            f"{week * weeks - price} dollars are left.", week * weeks - price)


def older(draw):
    a, b = draw.sample(NAMES, 2)
    age, more, later = draw.randint(4, 30), draw.randint(2, 15), draw.randint(2, 9)
    return (f"{a} is {more} years older than {b}. {b} is {age} years old. How old will {a} be in {later} years?",
            f"{a} is {age} + {more} = {age + more} now. In {later} years {a} will be {age + more} + {later} = "
            f"{age + more + later}.", age + more + later)


def twice(draw):
    a, b, c = draw.sample(NAMES, 3)
    (word, times), age, third = draw.choice([("twice", 2), ("three times", 3)]), draw.randint(3, 15), draw.randint(3, 40)
    old = age * times
    return (f"{a} is {word} as old as {b}, who is {age}. {c} is {third}. How old are the three together?",
            f"{a} is {times} * {age} = {old}. {a} and {b} together are {old} + {age} = {old + age}. With {c} that is "
            f"{old + age} + {third} = {old + age + third}.", old + age + third)


def arrival(draw):
    what, who = draw.choice(LESSONS), draw.choice(NAMES)
    start, lasts = draw.randrange(8 * 60, 20 * 60, 10), draw.randrange(10, 60, 10)
    end = start + lasts
    past = "" if start // 60 == end // 60 else f" That is past the full hour, so it is {clock(end)}."
    sum_ = f"{start % 60} + {lasts} = {start % 60 + lasts} minutes past {start // 60}"
    return (f"{who}'s {what} begins at {clock(start)} and lasts {lasts} minutes. When does it end?",
            f"It ends {sum_}.{past}", clock(end))


def duration(draw):
    what, place = draw.choice(LESSONS), draw.choice(PLACES)
    hour, start, end = draw.randint(8, 19), draw.randrange(0, 30, 5), draw.randrange(35, 60, 5)
    return (f"The {what} at the {place} begins at {hour}:{start:02d} and ends at {hour}:{end:02d}. How many minutes does it last?",
            f"From {start} to {end} minutes past {hour} it is {end} - {start} = {end - start} minutes.", end - start)


def ordering(draw):
    a, b, c = draw.sample(NAMES, 3)
    more, least, most = draw.choice([("taller", "shortest", "tallest"), ("older", "youngest", "oldest"),
                                     ("faster", "slowest", "fastest")])
    lines = [f"{a} is {more} than {b}.", f"{b} is {more} than {c}."]
    draw.shuffle(lines)
    asked, answer = draw.choice([(least, c), (most, a)])
    return (f"{' '.join(lines)} Who is the {asked}?", f"In order, the {most} first: {a}, {b}, {c}. The {asked} is {answer}.", answer)


KINDS = [purchase, change, gift, sharing, saving, older, twice, arrival, duration, ordering]


def problems():
    "Each seed and, after it, its variations: id, question, solution. No two are near-duplicates, or differ in their names alone"
    draw, seen, made = random.Random(SEED), Seen(NEAR_DUPLICATE), {}
    for kind in KINDS:
        used = set()
        for n in range(1, SEEDS_A_KIND + 1):
            family = []
            while len(family) <= VARIATIONS:
                question, steps, answer = kind(draw)
                numbers = tuple(re.findall(r"\d+|twice|three", question))
                if numbers and numbers in used or not seen.add(question): continue
                used.add(numbers)
                family.append((question, f"{steps}\nAnswer: {answer}"))
            made[f"{kind.__name__}-{n}"] = family
    return made


def recorded(made):
    "What the teacher says to each call that an expansion of the seeds can make, in the journal's form"
    plan, said = ChainPlan(TEMPLATES["cot"], max_new_tokens=1), {}  # the limit is no part of what is asked
    texts = {question: solution for family in made.values() for question, solution in family}
    def ask(texts):
        def answer(requests):
            for request, text in zip(requests, texts): said[request.asked] = text
            return [{"text": text, "finish_reason": "stop"} for text in texts]
        return answer
    solve(plan, list(texts), ask(list(texts.values())))
    for (question, solution), *family in made.values():
        wanted = [({"question": question}, Solution(solution, "", 1.0), n) for n in range(1, len(family) + 1)]
        transform(plan, wanted, ask([question for question, _ in family]))
    def as_entry(asked, text):
        made = entry("answer", asked, {"text": text, "finish_reason": "stop", "asked": asked}, Usage())
        return (*made[:-1], 0.0)  # no time: the file is the same whenever it is made
    return [as_entry(*item) for item in said.items()]


if __name__ == "__main__":
    made = problems()
    seeds = [{"id": id, "kind": id.partition("-")[0], "question": family[0][0], "answer": family[0][1]} for id, family in made.items()]
    SEEDS.write_text("".join(json.dumps(s, ensure_ascii=False) + "\n" for s in seeds), encoding="utf-8")
    entries = recorded(made)
    RECORDING.unlink(missing_ok=True)
    write_shard(RECORDING, entries)
    print(f"{SEEDS.name}: {len(seeds)} seeds; {RECORDING.name}: {len(entries)} answers, {RECORDING.stat().st_size:,} bytes")
