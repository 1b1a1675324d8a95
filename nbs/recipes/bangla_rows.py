"""Writes nbs/prompts/bangla.jsonl: short questions in Bangla with their answers, each made from a pattern of this project.

The rows are for trying `bangla-tinyllama` on a CPU, and for nothing else: a small model learns from them to answer in
Bangla and in whole sentences, and some arithmetic. `python nbs/recipes/bangla_rows.py` writes the same file again.
"""
import json
import random
from pathlib import Path

FILE = Path(__file__).resolve().parent.parent/"prompts"/"bangla.jsonl"
COUNT, SEED = 64, 7  # rows a kind at most, and of the draw

# A name or a thing as it stands, and as whose something is.
PEOPLE = [("মিনা", "মিনার"), ("রহিম", "রহিমের"), ("সীমা", "সীমার"), ("কামাল", "কামালের"), ("রুপা", "রুপার"), ("তপন", "তপনের"),
          ("আয়েশা", "আয়েশার"), ("জয়", "জয়ের"), ("নীলা", "নীলার"), ("হাসান", "হাসানের"), ("পুতুল", "পুতুলের"), ("রবি", "রবির")]
THINGS = [("আম", "আমের"), ("কলম", "কলমের"), ("বই", "বইয়ের"), ("ডিম", "ডিমের"), ("ফুল", "ফুলের"), ("লিচু", "লিচুর"), ("খাতা", "খাতার"),
          ("কলা", "কলার")]
DAYS = ["শনিবার", "রবিবার", "সোমবার", "মঙ্গলবার", "বুধবার", "বৃহস্পতিবার", "শুক্রবার"]
MONTHS = ["বৈশাখ", "জ্যৈষ্ঠ", "আষাঢ়", "শ্রাবণ", "ভাদ্র", "আশ্বিন", "কার্তিক", "অগ্রহায়ণ", "পৌষ", "মাঘ", "ফাল্গুন", "চৈত্র"]
SEASONS = ["গ্রীষ্ম", "বর্ষা", "শরৎ", "হেমন্ত", "শীত", "বসন্ত"]  # two months each
COLOURS = {"পাকা কলার": "হলুদ", "আকাশের": "নীল", "ঘাসের": "সবুজ", "রক্তের": "লাল", "দুধের": "সাদা", "কয়লার": "কালো", "কাকের": "কালো",
           "বকের": "সাদা", "টিয়ার": "সবুজ", "পাকা টমেটোর": "লাল", "লবণের": "সাদা", "সরিষা ফুলের": "হলুদ"}
OPPOSITES = {"বড়": "ছোট", "দিন": "রাত", "গরম": "ঠান্ডা", "উঁচু": "নিচু", "নতুন": "পুরনো", "ভালো": "মন্দ", "আলো": "অন্ধকার",
             "হাসি": "কান্না", "কাছে": "দূরে", "সকাল": "বিকাল", "শক্ত": "নরম", "ভারী": "হালকা"}


def bn(number):
    "A number in Bangla digits"
    return str(number).translate({ord("0") + i: chr(0x9E6 + i) for i in range(10)})


def sum_of_two(draw):
    a, b = draw.randint(2, 40), draw.randint(2, 40)
    return f"{bn(a)} আর {bn(b)} যোগ করলে কত হয়?", f"{bn(a)} আর {bn(b)} যোগ করলে {bn(a + b)} হয়।"


def difference(draw):
    b = draw.randint(2, 30)
    a = b + draw.randint(1, 30)
    return f"{bn(a)} থেকে {bn(b)} বাদ দিলে কত থাকে?", f"{bn(a)} থেকে {bn(b)} বাদ দিলে {bn(a - b)} থাকে।"


def product(draw):
    a, b, (thing, _) = draw.randint(2, 9), draw.randint(2, 9), draw.choice(THINGS)
    return f"এক বাক্সে {bn(a)}টি {thing}। {bn(b)} বাক্সে কয়টি?", f"{bn(b)} বাক্সে {bn(a * b)}টি {thing} আছে।"


def have_now(draw):
    (_, whose), (thing, _), a, b = draw.choice(PEOPLE), draw.choice(THINGS), draw.randint(2, 20), draw.randint(2, 20)
    return f"{whose} {bn(a)}টি {thing} ছিল, সে আরও {bn(b)}টি পেল। এখন কয়টি?", f"এখন {whose} {bn(a + b)}টি {thing} আছে।"


def larger(draw):
    a, b = draw.sample(range(10, 100), 2)
    return f"{bn(a)} আর {bn(b)}, কোনটি বড়?", f"{bn(a)} আর {bn(b)}-এর মধ্যে {bn(max(a, b))} বড়।"


def even_or_odd(draw):
    a = draw.randint(2, 200)
    return f"{bn(a)} জোড় না বিজোড়?", f"{bn(a)} একটি {'বিজোড়' if a % 2 else 'জোড়'} সংখ্যা।"


def following(draw):
    a = draw.randint(2, 300)
    return f"{bn(a)}-এর পরের সংখ্যা কত?", f"{bn(a)}-এর পরের সংখ্যা {bn(a + 1)}।"


def weekday(draw):
    day, after = draw.randrange(7), draw.randint(1, 6)
    then = DAYS[(day + after) % 7]
    return f"আজ {DAYS[day]}। {bn(after)} দিন পরে কী বার?", f"{bn(after)} দিন পরে {then}।"


def month(draw):
    n, what = draw.randrange(12), draw.randrange(3)
    if what == 0: return f"{MONTHS[n]} কোন ঋতুর মাস?", f"{MONTHS[n]} {SEASONS[n // 2]} ঋতুর মাস।"
    step, where = (1, "পরের") if what == 1 else (-1, "আগের")
    return f"{MONTHS[n]} মাসের {where} মাস কোনটি?", f"{MONTHS[n]} মাসের {where} মাস {MONTHS[(n + step) % 12]}।"


def taller(draw):
    (a, of_a), (b, of_b) = draw.sample(PEOPLE, 2)
    if draw.random() < 0.5: return f"{a} {of_b} চেয়ে লম্বা। কে খাটো?", f"{b} {of_a} চেয়ে খাটো।"
    return f"{a} {of_b} চেয়ে বড়। কে ছোট?", f"{b} {of_a} চেয়ে ছোট।"


def price(draw):
    (thing, of_it), a, b = draw.choice(THINGS), draw.randint(2, 20), draw.randint(2, 5)
    return f"একটি {thing} {bn(a)} টাকা হলে {bn(b)}টির দাম কত?", f"{bn(b)}টি {of_it} দাম {bn(a * b)} টাকা।"


def clock(draw):
    hour, after = draw.randint(1, 9), draw.randint(1, 3)
    return f"এখন {bn(hour)}টা। {bn(after)} ঘণ্টা পরে কয়টা বাজবে?", f"{bn(after)} ঘণ্টা পরে {bn(hour + after)}টা বাজবে।"


def colour(draw):
    thing = draw.choice(list(COLOURS))
    return f"{thing} রং কী?", f"{thing} রং {COLOURS[thing]}।"


def opposite(draw):
    word = draw.choice(list(OPPOSITES))
    return f"'{word}' কথাটির বিপরীত কী?", f"'{word}' কথাটির বিপরীত '{OPPOSITES[word]}'।"


KINDS = [sum_of_two, difference, product, have_now, larger, even_or_odd, following, weekday, month, taller, price, clock, colour,
         opposite]


def rows():
    "Every question once, `COUNT` of a kind or as many as there are"
    draw, made = random.Random(SEED), []
    for kind in KINDS:
        found = {}
        for _ in range(20 * COUNT):
            question, answer = kind(draw)
            found.setdefault(question, answer)
            if len(found) == COUNT: break
        name = kind.__name__.replace("_", "-")
        made += [{"id": f"{name}-{n:02d}", "kind": name, "question": question, "answer": answer}
                 for n, (question, answer) in enumerate(found.items(), 1)]
    return made


if __name__ == "__main__":
    FILE.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows()), encoding="utf-8")
    print(f"{FILE.name}: {len(rows())} rows")
