"""The journal, after kills, torn and flipped bytes, lost and full disks: what was paid for is there once, and nothing wrong is."""
import asyncio
import itertools
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
import uuid
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from distill_nb.core import DistillError, digest, write_text
from distill_nb.teacher.journal import FIELDS, INSERT, Journal, Usage, begin, end, entry, read_shard, write_shard

from conftest import DEADLINE, environment, snapshot

PRICE = Usage(20, 5, 1e-6)
TEXTS = ["", "plain", "line\u2028separator\u2029 and \x85", "NUL \0 inside", "\u202eright to left \u200f\u05e9\u05dc\u05d5\u05dd", "মধু কোথা থেকে আসে?", "\ufffd\ufeff", "\\ud800 \"'\n\r\t\x1f\x7f", "🐝" * 3]
many = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])  # each example has a folder of its own


def answer(i, text="Answer {}", usage=PRICE):
    return entry("answer", digest(i), {"text": text.format(i)}, usage)


def contents(journal):
    "Every entry, in the order in which it was committed"
    return list(map(tuple, journal.db.execute(f"select {', '.join(FIELDS)} from entries order by n")))


def leave(journal):
    "Let go of a journal without the last shard, as a crash would; its commits go into the main file"
    journal.copier.shutdown()
    journal.db.close()
    journal.guard.release()


def shards(folder):
    "Every shard by name, with the time at which it was written"
    return {k: v for k, v in snapshot(folder).items() if Path(k).name.startswith("shard-")}


def numbers(folder):
    "The numbers in the names of a folder's shards"
    return [int(f.name[6:11]) for f in sorted(Path(folder).glob("shard-*.jsonl"))]


def first_shard(folder):
    return next(Path(folder).glob("shard-00001*.jsonl"))


def in_shards(folder):
    "The entries of all shards; each shard is whole"
    found = [read_shard(f) for f in sorted(Path(folder).glob("shard-*.jsonl"))]
    assert not any(wrong for _, wrong in found), found
    return [e for entries, _ in found for e in entries]


def python(code, *arguments, timeout=DEADLINE):
    "Run code in a process of its own: what it printed, one JSON value a line"
    done = subprocess.run([sys.executable, "-c", code, *map(str, arguments)], env=environment(None), text=True, capture_output=True, timeout=timeout)
    assert "Traceback" not in done.stderr, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines() if line[0] in '[{"']


def start(code, *arguments):
    return subprocess.Popen([sys.executable, "-c", code, *map(str, arguments)], env=environment(None), text=True, stdout=subprocess.PIPE, stdin=subprocess.PIPE)


@pytest.fixture
def fast(tmp_path):
    "A folder in memory where there is one, since thousands of journals are opened in it"
    if not os.access("/dev/shm", os.W_OK): yield tmp_path; return
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder: yield Path(folder)


# A torn log

LOG = """
import json, os, sys
from pathlib import Path
from distill_nb.core import digest
from distill_nb.teacher.journal import *
file = Path(sys.argv[1])
journal = Journal(file)
for i in range(7):
    journal.put([entry("answer", digest(i), {"text": f"Answer {i}"}, Usage(20, 5, 1e-6))])
    if i == 2: journal.db.execute("pragma wal_checkpoint(truncate)").fetchall()
    print(json.dumps([i, os.path.getsize(f"{file}-wal")]), flush=True)
os._exit(9)
"""


@pytest.fixture
def torn(fast):
    "A process ended after seven commits, three of them in the main file and four in the log: a function that opens the journal with another log, and the log"
    sizes = [size for _, size in python(LOG, fast/"killed"/"journal.sqlite")]
    file = fast/"again"/"journal.sqlite"
    main, log = ((fast/"killed"/f"journal.sqlite{end}").read_bytes() for end in ("", "-wal"))
    file.parent.mkdir()
    def entries_with(log, main=main):
        file.unlink(missing_ok=True)
        if main is not None: file.write_bytes(main)
        Path(f"{file}-wal").write_bytes(log)
        Path(f"{file}-shm").unlink(missing_ok=True)
        journal = Journal(file)
        found = contents(journal)
        leave(journal)
        return found
    whole = entries_with(log)
    assert sizes[-1] == len(log) and [(e[0], json.loads(e[3])) for e in whole] == [(digest(i), {"text": f"Answer {i}"}) for i in range(7)]
    return SimpleNamespace(entries_with=entries_with, file=file, main=main, log=log, whole=whole, ends=sizes[2:])  # ends: of the log after each of its commits, the first empty


FRAME = 24 + 4096  # bytes of a page in SQLite's log, with its header


def test_a_log_cut_at_any_byte_of_its_last_commits_loses_the_commit_that_was_cut_at_most(torn):
    "Every byte where a page begins or ends, and a sample of those between: a page is checked as a whole"
    last = range(torn.ends[-3], torn.ends[-1] + 1)
    assert (len(torn.log) - 32) % FRAME == 0
    edges = {cut for cut in last if (cut - 32 + 30) % FRAME < 60}
    cuts = edges | {last[0], last[-1]} | {*random.Random(0).sample(last, 150)}
    assert len(edges) > 200
    wrong = [cut for cut in sorted(cuts) if torn.entries_with(torn.log[:cut]) != torn.whole[:3 + sum(end <= cut for end in torn.ends[1:])]]
    assert not wrong


@pytest.mark.parametrize("rest", ["nothing", "zeros", "noise"])
def test_a_log_torn_anywhere_keeps_every_commit_before(rest, torn):
    draw = random.Random(1)
    for cut in range(0, len(torn.log), 397):
        left = len(torn.log) - cut
        after = {"nothing": b"", "zeros": bytes(left), "noise": draw.randbytes(left)}[rest]
        before = sum(size <= cut for size in torn.ends[1:])
        assert torn.entries_with(torn.log[:cut] + after) == torn.whole[:3 + before], cut


def test_a_flipped_byte_in_the_log_gives_no_wrong_entry(torn):
    draw = random.Random(2)
    for _ in range(250):
        at = draw.randrange(len(torn.log))
        damaged = bytearray(torn.log)
        damaged[at] ^= draw.randrange(1, 256)
        found = torn.entries_with(bytes(damaged))
        assert 3 <= len(found) <= 7 and found == torn.whole[:len(found)], at


# A damaged main file

@pytest.fixture
def mixed(fast, capsys):
    "A journal of forty entries in two shards, ten in the main file alone, and a call in flight; nothing is in the log"
    put = [answer(i, "Answer {} " + TEXTS[i % len(TEXTS)], Usage(20 + i, 5, None if i % 5 == 0 else i * 1e-6)) for i in range(50)]
    journal = Journal(fast/"sound"/"journal.sqlite", shard_rows=20)
    for part in (put[:20], put[20:40], put[40:]): journal.put(part)
    journal.write([begin("in flight", digest("flight"), Usage(40, 64, 1e-5))])
    journal.db.execute("pragma wal_checkpoint(truncate)").fetchall()
    shutil.copytree(fast/"sound", fast/"kept", ignore=shutil.ignore_patterns(".*", "*-wal", "*-shm"))
    leave(journal)
    return SimpleNamespace(kept=fast/"kept", folder=fast/"work", put=put, main=(fast/"kept"/"journal.sqlite").read_bytes(), said=lambda: capsys.readouterr().out)


def faults(mixed, damaged):
    "Open a journal whose main file is `damaged`, use it, and say everything that is not as it should be"
    shutil.rmtree(mixed.folder, ignore_errors=True)
    shutil.copytree(mixed.kept, mixed.folder)
    (mixed.folder/"journal.sqlite").write_bytes(damaged)
    before, known = shards(mixed.folder), {e[0]: e for e in mixed.put}
    try: journal = Journal(mixed.folder/"journal.sqlite", shard_rows=20)
    except Exception as e: return [f"does not open: {type(e).__name__}"]  # what it is, is what the test is about
    found = []
    try:
        given = {e[0]: journal.get(e[0]) for e in mixed.put}
        if any(body is not None and body != json.loads(known[id][3]) for id, body in given.items()): found.append("gives a wrong body")
        if any(given[e[0]] is None for e in mixed.put[:40]): found.append("does not give what a shard holds")
        entries = [e for e in contents(journal) if e[2] != "lost"]
        if not {*entries} <= {*mixed.put}: found.append("holds a wrong entry")
        if len({e[0] for e in entries}) < len(entries): found.append("holds an id twice")
        journal.bill(lambda p, c: 0.0)
        journal.put([answer("new")])
        if journal.get(digest("new")) != {"text": "Answer new"}: found.append("does not give what was put in after")
        journal.close()
        if not {*entries} <= {*in_shards(mixed.folder/"shards")}: found.append("wrote a shard that is wrong")
    except Exception as e: found.append(f"breaks in use: {type(e).__name__}")
    finally:
        if not journal.copier._shutdown: leave(journal)
    if not before.items() <= shards(mixed.folder).items(): found.append("changed a shard")
    aside = [f.read_bytes() for f in (mixed.folder/"broken").glob("*-journal.sqlite")]
    if aside not in ([], [damaged]): found.append("did not keep the damaged file as it was")
    if bool(aside) != ("was damaged and is kept" in mixed.said()): found.append("did not say what it did")
    return found


def flips(content, where, n, seed):
    "The content with one byte changed, at `n` places out of `where`"
    draw = random.Random(seed)
    for at in (draw.choice(where) for _ in range(n)):
        damaged = bytearray(content)
        damaged[at] ^= draw.choice([1 << draw.randrange(8), draw.randrange(1, 256)])
        yield at, bytes(damaged)


def cuts(content):
    draw = random.Random(3)
    for at in [0, 1, 15, 16, 99, 100, 101, 511, 512, 4095, 4096, 4097, 8192, *(draw.randrange(len(content)) for _ in range(80))]: yield at, content[:at]
    for at in (draw.randrange(len(content)) for _ in range(30)): yield at, content[:at] + bytes(len(content) - at)


DAMAGE = {
    "cut off": cuts,
    "a byte of the header": lambda c: flips(c, range(100), 200, 4),
    "a byte of the schema": lambda c: flips(c, [i for i in range(100, 4096) if c[i]], 150, 5),
    "a byte in use": lambda c: flips(c, [i for i in range(4096, len(c)) if c[i]], 200, 6),
    "any byte": lambda c: flips(c, range(len(c)), 100, 7),
    "nothing of it": lambda c: [(0, bytes(len(c))), (0, b"not a database"), (0, random.Random(8).randbytes(len(c)))],
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_main_file_gives_nothing_wrong_and_all_that_shards_hold(kind, mixed):
    assert not faults(mixed, mixed.main), "the sound file"
    tried, found = 0, {}
    for at, damaged in DAMAGE[kind](mixed.main):
        tried += 1
        for fault in faults(mixed, damaged): found.setdefault(fault, []).append(at)
    assert not found, f"{tried} tried; " + "; ".join(f"{f}: {len(at)} times, first at byte {at[0]}" for f, at in sorted(found.items(), key=lambda x: -len(x[1])))


def test_the_call_in_flight_is_counted_though_the_main_file_is_damaged(mixed):
    shutil.copytree(mixed.kept, mixed.folder)
    (mixed.folder/"journal.sqlite").write_bytes(mixed.main[:-4096] + bytes(4096))  # the last entries are gone, the note of the call is not
    with Journal(mixed.folder/"journal.sqlite") as journal: assert journal.count("lost") == 1


def test_what_is_put_aside_is_never_overwritten(mixed, monkeypatch):
    "Not even within one second"
    monkeypatch.setattr(time, "strftime", lambda *_: "20260101-000000")
    shutil.copytree(mixed.kept, mixed.folder)
    for i in range(3):
        (mixed.folder/"journal.sqlite").write_bytes(b"not a database, %d" % i)
        with Journal(mixed.folder/"journal.sqlite") as journal: assert journal.count() == 40
    assert sorted(f.read_bytes() for f in (mixed.folder/"broken").iterdir()) == [b"not a database, %d" % i for i in range(3)]


@pytest.mark.parametrize("main", [None, b"", b"x", b"x" * 5000, "half"])
def test_a_log_without_its_main_file_is_not_thrown_away(main, torn):
    "SQLite deletes a log that lies beside an empty file"
    found, broken = torn.entries_with(torn.log, torn.main[:len(torn.main) // 2] if main == "half" else main), torn.file.parent/"broken"
    assert found == torn.whole[:len(found)]
    assert len(found) == 7 or [torn.log] == [f.read_bytes()[:len(torn.log)] for f in broken.glob("*-wal")]


def test_what_cannot_be_a_file_is_said_in_one_sentence(tmp_path):
    (tmp_path/"journal.sqlite").mkdir()
    with pytest.raises(DistillError, match="cannot be opened") as said: Journal(tmp_path/"journal.sqlite")
    assert len(str(said.value).splitlines()) == 1 and list((tmp_path/"journal.sqlite").iterdir()) == []


# Shards

SMALL = [answer(i, text) for i, text in enumerate(["One {}", "মধু {}\u2028", "\ufffd {}", "Last {}"])]


def test_a_shard_cut_at_any_byte_of_its_last_lines_gives_every_line_before(fast):
    shard = write_shard(fast/"shard-00001.jsonl", SMALL)
    whole = shard.read_bytes()
    ends = [i for i, byte in enumerate(whole) if byte == 10]  # the newline of each line; a line is whole without it
    for cut in range(ends[2] + 1, len(whole) + 1):
        shard.write_bytes(whole[:cut])
        found, wrong = read_shard(shard)
        assert found == SMALL[:3 + (cut >= ends[3])], cut
        assert bool(wrong) == (cut < ends[4]) and (not wrong or str(shard) in wrong), cut


def test_one_changed_byte_in_a_shard_never_gives_a_wrong_entry(fast):
    shard = write_shard(fast/"shard-00001.jsonl", SMALL)
    whole, draw = shard.read_bytes(), random.Random(9)
    for at in range(len(whole)):
        for change in {1 << at % 8, *draw.sample(range(1, 256), 8), whole[at] ^ 10 or 1, whole[at] ^ 32 or 1}:
            damaged = bytearray(whole)
            damaged[at] ^= change
            shard.write_bytes(damaged)
            found, wrong = read_shard(shard)
            assert [e for e in SMALL if e in found] == found, (at, change)
            assert wrong or found == SMALL, (at, change)


@pytest.mark.parametrize("content", [b"", b"\n", b"00000000", b"00000000 ", b"00000000 \n", b"\xff\xfe", b"{}", bytes(300), b"\n\n\n"])
def test_what_is_no_shard_gives_no_entry(content, tmp_path):
    (tmp_path/"shard-00001.jsonl").write_bytes(content)
    found, wrong = read_shard(tmp_path/"shard-00001.jsonl")
    assert found == [] and "shard-00001.jsonl" in wrong


def test_shards_are_written_once_and_their_numbers_go_on(tmp_path):
    file, seen, n = tmp_path/"journal.sqlite", {}, 0
    for round in range(4):
        if round == 2:
            for f in tmp_path.glob("journal.sqlite*"): f.unlink()  # the database is lost, the shards are not
        with Journal(file, shard_rows=3) as journal:
            assert [e[0] for e in contents(journal)] == [digest(i) for i in range(n)]
            for _ in range(5): journal.put([answer(n)]); n += 1
        now = shards(tmp_path)
        assert seen.items() <= now.items() and len(now) == len(seen) + 2
        seen = now
    assert numbers(tmp_path/"shards") == [*range(1, 9)]
    assert [e[0] for e in in_shards(tmp_path/"shards")] == [digest(i) for i in range(n)], "each entry once"


def test_a_torn_shard_is_said_and_its_whole_lines_are_restored(tmp_path, capsys):
    with Journal(tmp_path/"a"/"journal.sqlite") as journal: journal.put(SMALL)
    (tmp_path/"b"/"shards").mkdir(parents=True)
    (tmp_path/"b"/"shards"/"shard-00007.jsonl").write_bytes(first_shard(tmp_path/"a"/"shards").read_bytes()[:-200])
    capsys.readouterr()
    with Journal(tmp_path/"b"/"journal.sqlite") as journal:
        assert contents(journal) == SMALL[:2] or contents(journal) == SMALL[:3]
        assert "torn or damaged" in capsys.readouterr().out
        journal.put(SMALL)
    assert numbers(tmp_path/"b"/"shards") == [7, 8]
    with Journal(tmp_path/"b"/"journal.sqlite") as journal: assert {*contents(journal)} == {*SMALL}


def test_a_journal_goes_on_after_its_shards_were_deleted(tmp_path):
    with Journal(tmp_path/"journal.sqlite") as journal: journal.put(SMALL[:2])
    shutil.rmtree(tmp_path/"shards")
    with Journal(tmp_path/"journal.sqlite", shard_rows=1) as journal:
        journal.put(SMALL[2:3])
        journal.put(SMALL[3:])
        assert contents(journal) == SMALL
    assert {*in_shards(tmp_path/"shards")} == {*SMALL}, "the database has them all, so the shards can have them again"


# The copy at a second place

@pytest.fixture(params=["folder", "memory"])
def second(request, tmp_path):
    "A second place: its URL, and what is there"
    if request.param == "folder": return SimpleNamespace(url=str(tmp_path/"second"), files=lambda: {f.name: f.read_bytes() for f in (tmp_path/"second").iterdir()})
    import fsspec
    url = f"memory://{uuid.uuid4().hex}/copy"
    fs, path = fsspec.core.url_to_fs(url)
    return SimpleNamespace(url=url, files=lambda: {Path(f).name: fs.cat_file(f) for f in fs.ls(path, detail=False)})


def test_a_lost_disk_comes_back_from_the_second_place(second, tmp_path, capsys):
    with Journal(tmp_path/"out"/"journal.sqlite", second.url, shard_rows=3) as journal:
        for i in range(7): journal.put([answer(i)])
        entries, bill = contents(journal), journal.bill()
    there = {f.name: f.read_bytes() for f in (tmp_path/"out"/"shards").iterdir()}
    assert second.files() == there and len(there) == 3

    shutil.rmtree(tmp_path/"out")
    with Journal(tmp_path/"out"/"journal.sqlite", second.url, shard_rows=3) as journal:
        assert contents(journal) == entries and journal.bill() == bill
        assert "restored" in capsys.readouterr().out
        journal.put([answer(7)])
    now = second.files()
    assert there.items() <= now.items() and len(now) == 4
    with Journal(tmp_path/"out"/"journal.sqlite", second.url) as journal: assert journal.count() == 8
    assert second.files() == now and "not complete" not in capsys.readouterr().out


def test_shards_of_earlier_runs_go_to_a_second_place_named_later(second, tmp_path):
    with Journal(tmp_path/"out"/"journal.sqlite") as journal: journal.put(SMALL)
    with Journal(tmp_path/"out"/"journal.sqlite", second.url): pass
    shard = first_shard(tmp_path/"out"/"shards")
    assert second.files() == {shard.name: shard.read_bytes()}


def test_a_torn_copy_is_mended_by_the_next_send(tmp_path):
    with Journal(tmp_path/"out"/"journal.sqlite", str(tmp_path/"second"), shard_rows=2) as journal: journal.put(SMALL)
    copy = first_shard(tmp_path/"second")
    whole = copy.read_bytes()
    for cut in (0, 1, len(whole) // 2, len(whole) - 1):
        copy.write_bytes(whole[:cut])
        with Journal(tmp_path/"out"/"journal.sqlite", str(tmp_path/"second")): pass
        assert copy.read_bytes() == whole


def test_a_torn_copy_still_gives_its_whole_lines(tmp_path):
    with Journal(tmp_path/"out"/"journal.sqlite", str(tmp_path/"second")) as journal: journal.put(SMALL)
    copy = first_shard(tmp_path/"second")
    copy.write_bytes(copy.read_bytes()[:-250])
    shutil.rmtree(tmp_path/"out")
    with Journal(tmp_path/"out"/"journal.sqlite", str(tmp_path/"second")) as journal:
        assert 1 <= journal.count() < 4 and contents(journal) == SMALL[:journal.count()]
        journal.put(SMALL)
    shutil.rmtree(tmp_path/"out")
    with Journal(tmp_path/"out"/"journal.sqlite", str(tmp_path/"second")) as journal: assert {*contents(journal)} == {*SMALL}


def test_a_torn_shard_here_never_replaces_the_whole_one_there(tmp_path):
    "Disk and database are hurt at once: the second place is what is left"
    with Journal(tmp_path/"out"/"journal.sqlite", str(tmp_path/"second")) as journal: journal.put(SMALL)
    copy = first_shard(tmp_path/"second")
    whole = copy.read_bytes()
    (tmp_path/"out"/"shards"/copy.name).write_bytes(whole[:300])
    (tmp_path/"out"/"journal.sqlite").write_bytes(b"")
    with Journal(tmp_path/"out"/"journal.sqlite", str(tmp_path/"second")) as journal: found = contents(journal)
    assert copy.read_bytes() == whole, "what was paid for is gone"
    assert found == SMALL


@pytest.mark.parametrize("order", ["at once", "one after the other"])
def test_two_journals_with_one_second_place_do_not_overwrite_each_other(order, tmp_path):
    "Two runs, or two notebooks, that were given the same sync_to; or a run that was given it late"
    journals = [Journal(tmp_path/name/"journal.sqlite", str(tmp_path/"second") if order == "at once" else None) for name in "ab"]
    for i, journal in enumerate(journals): journal.put([answer(f"{i} {n}") for n in range(2 + i)])
    for journal in journals: journal.close()
    if order == "one after the other":
        for name in "ab": Journal(tmp_path/name/"journal.sqlite", str(tmp_path/"second")).close()
    with Journal(tmp_path/"c"/"journal.sqlite", str(tmp_path/"second")) as journal: assert journal.count() == 5


@pytest.mark.parametrize("name", ["shard-00001 (1).jsonl", "shard-old.jsonl", "notes.txt", "shard-00001.jsonl.part", "shard-.jsonl"])
def test_files_of_somebody_else_at_the_second_place_are_left_alone(name, tmp_path):
    "A synchronised drive makes `shard-00001 (1).jsonl` of its own accord"
    with Journal(tmp_path/"out"/"journal.sqlite", str(tmp_path/"second")) as journal: journal.put(SMALL)
    (tmp_path/"second"/name).write_text("mine")
    shutil.rmtree(tmp_path/"out")
    with Journal(tmp_path/"out"/"journal.sqlite", str(tmp_path/"second")) as journal: journal.put([answer("new")])
    assert (tmp_path/"second"/name).read_text() == "mine"
    with Journal(tmp_path/"out"/"journal.sqlite") as journal: assert journal.count() == 5


@pytest.mark.parametrize("place", ["a file", "below a file", "unknown://there"])
def test_a_second_place_that_cannot_be_used_is_said_at_once(place, tmp_path):
    write_text(tmp_path/"file", "mine")
    url = {"a file": str(tmp_path/"file"), "below a file": str(tmp_path/"file"/"folder")}.get(place, place)
    with pytest.raises(DistillError) as said: Journal(tmp_path/"out"/"journal.sqlite", url)
    assert f"sync_to: {url}: cannot be used" in str(said.value) and len(str(said.value).splitlines()) == 1
    with Journal(tmp_path/"out"/"journal.sqlite", str(tmp_path/"second")) as journal: journal.put(SMALL)  # `said` still holds the error, as a notebook does
    assert (tmp_path/"file").read_text() == "mine"


def test_a_copy_that_fails_later_stops_nothing_and_is_said_at_the_end(tmp_path, capsys):
    with Journal(tmp_path/"out"/"journal.sqlite", str(tmp_path/"second"), shard_rows=2) as journal:
        journal.put(SMALL[:2])
        journal.copier.submit(lambda: None).result()  # the copy is made in the background
        shutil.move(tmp_path/"second", tmp_path/"kept")
        write_text(tmp_path/"second", "in the way")
        journal.put(SMALL[2:])
        assert contents(journal) == SMALL
    assert "the copy at the second place is not complete" in capsys.readouterr().out
    (tmp_path/"second").unlink()
    shutil.move(tmp_path/"kept", tmp_path/"second")
    with Journal(tmp_path/"out"/"journal.sqlite", str(tmp_path/"second")): pass
    assert in_shards(tmp_path/"second") == SMALL and "not complete" not in capsys.readouterr().out


# Two writers

HOLD = """
import sys
from distill_nb.teacher.journal import *
journal = Journal(sys.argv[1])
journal.put([entry("answer", "k", {"text": "mine"}, Usage())])
print("open", flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("who", ["this process", "another process"])
def test_a_second_writer_is_refused_in_one_sentence_until_the_first_is_gone(who, tmp_path):
    file = tmp_path/"journal.sqlite"
    first = Journal(file) if who == "this process" else start(HOLD, file)
    if who == "another process": assert first.stdout.readline() == "open\n"
    for _ in range(2):
        with pytest.raises(DistillError, match="another process is writing there") as said: Journal(file)
        assert str(said.value).startswith(f"{file}: ") and len(str(said.value).splitlines()) == 1
    if who == "this process": first.put([entry("answer", "k", {"text": "mine"}, Usage())]); first.close()
    else: first.kill(); first.communicate()
    with Journal(file) as journal: assert journal.get("k") == {"text": "mine"}


# Calls in flight

@pytest.mark.parametrize("cost", [0.25, None])
def test_a_call_in_flight_is_counted_once_at_its_worst_case(cost, tmp_path):
    python("import os, sys, json\nfrom distill_nb.teacher.journal import *\njournal = Journal(sys.argv[1])\n"
           "journal.write([begin(f'try {i}', f'k{i % 2}', Usage(40, 64, json.loads(sys.argv[2]))) for i in range(4)])\n"
           "journal.write([end('try 0'), (INSERT, entry('answer', 'k0', {'text': 'x'}, Usage(20, 5, 0.125)))])\nos._exit(9)", tmp_path/"journal.sqlite", json.dumps(cost))
    for _ in range(3):  # opened again and again, counted once
        with Journal(tmp_path/"journal.sqlite") as journal:
            assert (journal.count(), journal.count("lost")) == (1, 3)
            assert journal.bill() == Usage(20 + 3 * 40, 5 + 3 * 64, None if cost is None else 0.125 + 3 * cost)
            assert sorted(e[1] for e in contents(journal) if e[2] == "lost") == ["k0", "k1", "k1"]
    for f in tmp_path.glob("journal.sqlite*"): f.unlink()
    with Journal(tmp_path/"journal.sqlite") as journal: assert journal.count("lost") == 3, "and from the shards"


def test_an_answer_is_kept_once_and_the_first_stays(tmp_path):
    with Journal(tmp_path/"journal.sqlite") as journal:
        journal.put([answer(1), answer(1, "another {}"), entry("spent", digest(1), {"reason": "empty"}, PRICE), entry("spent", digest(1), {"reason": "empty"}, PRICE)])
        journal.put([answer(1, "late {}")])
        assert journal.get(digest(1)) == {"text": "Answer 1"} and (journal.count(), journal.count("spent")) == (1, 2)
        assert journal.bill() == Usage(60, 15, 3e-6)


def test_the_bill_of_entries_whose_price_is_not_known(tmp_path):
    price = lambda prompt, completion: (prompt + 2 * completion) / 1000
    with Journal(tmp_path/"journal.sqlite") as journal:
        assert journal.bill() == journal.bill(price) == Usage(0, 0, 0.0)
        journal.put([answer(1, usage=Usage(10, 20, 0.5)), answer(2, usage=Usage(1, 2, 0.25))])
        assert journal.bill() == journal.bill(price) == Usage(11, 22, 0.75)
        journal.put([answer(3, usage=Usage(100, 200, None)), entry("spent", "x", {}, Usage(1000, 0, None))])
        assert journal.bill() == Usage(1111, 222, None)
        assert journal.bill(price) == Usage(1111, 222, 0.75 + price(1100, 200))
        assert journal.bill(lambda *_: None) == Usage(1111, 222, None), "a price that is still not known"
    with Journal(tmp_path/"journal.sqlite") as journal: assert journal.bill() == Usage(1111, 222, None)


# Kills

BUSY = """
import asyncio, sys
from distill_nb.teacher.journal import *
async def work(journal, who):
    for i in range(10_000):
        key = f"{sys.argv[2]}-{who}-{i}"
        await journal.commit(begin(key, key, Usage(7, 11, 0.5)))
        print("begun", key, flush=True)
        await journal.commit(end(key), (INSERT, entry("answer", key, {"text": key * 20}, Usage(3, 5, 0.25))))
        print("done", key, flush=True)
async def main():
    with Journal(sys.argv[1], sys.argv[3], shard_rows=20) as journal: await asyncio.gather(*(work(journal, who) for who in range(8)))
asyncio.run(main())
"""


def test_every_commit_that_returned_outlives_a_kill(tmp_path):
    draw, said = random.Random(10), []
    for round in range(10):
        process = start(BUSY, tmp_path/"out"/"journal.sqlite", round, tmp_path/"second")
        with process.stdout as out:
            lines = [out.readline() for _ in range(draw.randrange(1, 600))]
            process.kill()
            lines += out.readlines()
        process.wait()
        said += [line.split() for line in lines if line.startswith(("begun ", "done ")) and line.endswith("\n")]  # the last may be half a line
    begun, done = ({key for what, key in said if what == w} for w in ("begun", "done"))
    assert len(begun) > 500 and done < begun
    with Journal(tmp_path/"out"/"journal.sqlite", str(tmp_path/"second")) as journal:
        entries = contents(journal)
        kinds = {key: kind for _, key, kind, *_ in entries}
        assert len(kinds) == len(entries), "each call is counted once"
        assert begun <= kinds.keys() and {kinds[k] for k in done} == {"answer"}
        assert all(journal.get(k) == {"text": k * 20} for k in done)
        answers, lost = journal.count(), journal.count("lost")
        assert answers + lost == len(entries) and 1 <= lost <= 80
        assert journal.bill() == Usage(3 * answers + 7 * lost, 5 * answers + 11 * lost, 0.25 * answers + 0.5 * lost)
    assert {*in_shards(tmp_path/"out"/"shards")} == {*entries} == {*in_shards(tmp_path/"second")}
    shutil.rmtree(tmp_path/"out")
    with Journal(tmp_path/"out"/"journal.sqlite", str(tmp_path/"second")) as journal: assert {*contents(journal)} == {*entries}


# A full disk

def test_a_full_disk_is_said_and_the_journal_goes_on_when_there_is_room(fast):
    file = fast/"journal.sqlite"
    with Journal(file) as journal:
        journal.put([answer(i) for i in range(5)])
        journal.db.execute(f"pragma max_page_count = {journal.db.execute('pragma page_count').fetchone()[0] + 10}").fetchall()
        with pytest.raises(DistillError, match="database or disk is full") as said:
            for n in itertools.count(5): journal.put([answer(n, "Answer {} " + "x" * 3000)])
        assert str(said.value).startswith(f"{file}: cannot be written") and n > 6 and len(str(said.value).splitlines()) == 1
        async def all_at_once(): return await asyncio.wait_for(asyncio.gather(*(journal.commit((INSERT, answer(1000 + i, "x" * 5000))) for i in range(8)), return_exceptions=True), 60)
        assert all(isinstance(e, DistillError) for e in asyncio.run(all_at_once())), "nobody waits for ever"
        assert [e[0] for e in contents(journal)] == [digest(i) for i in range(n)]
        journal.db.execute("pragma max_page_count = 100000").fetchall()
        assert asyncio.run(all_at_once()) == [None] * 8
        journal.put([answer(n)])
    with Journal(file) as journal: assert journal.count() == n + 9 and journal.get(digest(n)) == {"text": f"Answer {n}"}
    assert len(in_shards(fast/"shards")) == n + 9


LIMITED = """
import json, os, resource, sys
from pathlib import Path
from distill_nb.core import *
from distill_nb.teacher.journal import *
folder = Path(sys.argv[1])
def limit(n): resource.setrlimit(resource.RLIMIT_FSIZE, (n, resource.RLIM_INFINITY))
def tell(what, make):
    try: make(); said = ""
    except Exception as e: said = str(e) if isinstance(e, DistillError) else f"{type(e).__name__}: {e}"
    print(json.dumps([what, said]), flush=True)
def put(journal, i, n): tell(f"put {i}", lambda: journal.put([entry("answer", f"k{i}", {"text": "x" * n}, Usage(1, 1, 1.0))]))
small = entry("answer", "k", {"text": "x" * 50_000}, Usage())

write_text(folder/"text", "before")
limit(1000)
tell("text", lambda: write_text(folder/"text", "x" * 5000))
tell("shard", lambda: write_shard(folder/"shard-00001.jsonl", [small]))
tell("open", lambda: Journal(folder/"unopened"/"journal.sqlite"))
limit(-1)
tell("open again", lambda: Journal(folder/"unopened"/"journal.sqlite").close())
(folder/"restored"/"shards").mkdir(parents=True)
write_shard(folder/"restored"/"shards"/"shard-00001.jsonl", [entry("answer", f"k{i}", {"text": "x" * 50_000}, Usage()) for i in range(9)])
limit(60_000)
tell("restore", lambda: Journal(folder/"restored"/"journal.sqlite"))
limit(-1)
tell("restore again", lambda: Journal(folder/"restored"/"journal.sqlite").close())

journal = Journal(folder/"a"/"journal.sqlite", shard_rows=12)
for i in range(10): put(journal, i, 50_000)
limit(os.path.getsize(folder/"a"/"journal.sqlite-wal") + 50_000)
put(journal, 10, 200_000)
limit(-1)
journal.db.execute("pragma wal_checkpoint(truncate)").fetchall()
put(journal, 11, 10)
limit(400_000)
put(journal, 12, 10)  # there is room for the entry, not for the shard
limit(-1)
put(journal, 13, 10)
journal.close()
"""


def test_real_write_errors_are_said_and_leave_what_was_there(tmp_path):
    "A limit on the size of files makes write() fail as a full disk does"
    said = dict(python(LIMITED, tmp_path))
    assert said["text"].startswith(f"{tmp_path/'text'}: cannot be written") and (tmp_path/"text").read_text() == "before"
    assert said["shard"].startswith(f"{tmp_path/'shard-00001.jsonl'}: cannot be written")
    assert said["open"].startswith(f"{tmp_path/'unopened'/'journal.sqlite'}: ") and said["open again"] == ""
    assert said["restore"].startswith(f"{tmp_path/'restored'/'journal.sqlite'}: ") and said["restore again"] == ""
    with Journal(tmp_path/"restored"/"journal.sqlite") as journal: assert journal.count() == 9
    assert f"{tmp_path/'a'/'journal.sqlite'}: cannot be written" in said["put 10"] and len(said["put 10"].splitlines()) == 1
    assert said["put 11"] == said["put 13"] == "" and "shard-00001" in said["put 12"] and "cannot be written" in said["put 12"]
    assert not list(tmp_path.rglob("*.tmp")), "nothing half written is left"
    with Journal(tmp_path/"a"/"journal.sqlite") as journal: assert [e[0] for e in contents(journal)] == [f"k{i}" for i in (*range(10), 11, 12, 13)]
    assert [e[0] for e in in_shards(tmp_path/"a"/"shards")] == [f"k{i}" for i in (*range(10), 11, 12, 13)]


def test_a_shard_that_cannot_be_written_stops_nobody_for_ever(tmp_path):
    journal = Journal(tmp_path/"journal.sqlite", shard_rows=1)
    shutil.rmtree(tmp_path/"shards")
    write_text(tmp_path/"shards", "in the way")
    async def both(): return await asyncio.gather(*(asyncio.wait_for(journal.commit((INSERT, e)), 10) for e in SMALL[:2]), return_exceptions=True)
    said = asyncio.run(both())
    assert [type(e) for e in said] == [DistillError] * 2, said
    (tmp_path/"shards").unlink()
    assert asyncio.run(both()) == [None] * 2
    journal.close()
    assert in_shards(tmp_path/"shards") == SMALL[:2]


# Time

def test_a_clock_that_goes_backwards_changes_nothing(tmp_path, monkeypatch):
    clock = itertools.count(2_000_000_000, -3600)
    monkeypatch.setattr(time, "time", lambda: float(next(clock)))
    for round in range(3):
        with Journal(tmp_path/"journal.sqlite", str(tmp_path/"second"), shard_rows=2) as journal:
            for i in range(3): journal.put([answer(3 * round + i)])
    with Journal(tmp_path/"journal.sqlite") as journal: entries, bill = contents(journal), journal.bill()
    assert [e[0] for e in entries] == [digest(i) for i in range(9)] and bill.tokens == 9 * PRICE.tokens
    assert sorted((e[-1] for e in entries), reverse=True) == [e[-1] for e in entries], "the times themselves are as the clock gave them"
    assert in_shards(tmp_path/"shards") == entries and numbers(tmp_path/"shards") == [*range(1, 7)]
    with Journal(tmp_path/"new"/"journal.sqlite", str(tmp_path/"second")) as journal: assert (contents(journal), journal.bill()) == (entries, bill)


# Texts

def round_trip(folder, bodies):
    "The same bodies after the journal, after its shard, and after a restore from it"
    entries = [entry("answer", digest(i), body, PRICE) for i, body in enumerate(bodies)]
    with Journal(folder/"a"/"journal.sqlite") as journal:
        journal.put(entries)
        assert [journal.get(e[0]) for e in entries] == bodies
    assert in_shards(folder/"a"/"shards") == entries
    shutil.copytree(folder/"a"/"shards", folder/"b"/"shards")
    with Journal(folder/"b"/"journal.sqlite") as journal: assert contents(journal) == entries and [journal.get(e[0]) for e in entries] == bodies


WHOLE = st.text(st.characters(exclude_categories=["Cs"])) | st.sampled_from(TEXTS)


@many
@given(st.lists(st.dictionaries(WHOLE, WHOLE | st.none() | st.integers() | st.floats(allow_nan=False) | st.lists(WHOLE, max_size=3), max_size=3), min_size=1, max_size=4))
@example([{"text": t} for t in TEXTS])
@example([{"text": ("মধু \0\u2028" * 15_000)[:100_000]}, {"text": "x" * 100_000}, {"sha256": "looks like the end of a shard", "entries": 1}])
def test_any_text_comes_back_as_it_was(fast, bodies):
    folder = fast/uuid.uuid4().hex
    round_trip(folder, bodies)
    shutil.rmtree(folder)


HALF = ["\ud800", "half a character \udfff at the end", "\udc00\ud800", "é\ud83d"]


@many
@given(st.sampled_from(HALF) | st.tuples(WHOLE, st.characters(categories=["Cs"]), WHOLE).map("".join))
def test_half_a_character_is_refused_before_anything_is_written(fast, text):
    folder = fast/uuid.uuid4().hex
    with Journal(folder/"journal.sqlite") as journal:
        journal.put(SMALL[:1])
        with pytest.raises((DistillError, UnicodeEncodeError)): journal.put([SMALL[1], entry("answer", "half", {"text": text}, PRICE), SMALL[2]])
        assert contents(journal) == SMALL[:1]
        with pytest.raises((DistillError, UnicodeEncodeError)): write_shard(folder/"shard-00009.jsonl", [entry("answer", "half", {"text": text}, PRICE)])
        assert not list(folder.glob("*shard*.jsonl*"))
        journal.put(SMALL[3:])
    assert in_shards(folder/"shards") == [SMALL[0], SMALL[3]]
    shutil.rmtree(folder)


@pytest.mark.parametrize("text", HALF)
def test_half_a_character_in_one_commit_neither_stops_nor_loses_the_others(text, tmp_path):
    "A server may send one: JSON can spell it"
    journal = Journal(tmp_path/"journal.sqlite")
    async def together(*entries): return await asyncio.gather(*(asyncio.wait_for(journal.commit((INSERT, e)), 5) for e in entries), return_exceptions=True)
    said = asyncio.run(together(SMALL[0], entry("answer", "half", {"text": text}, PRICE), SMALL[1]))
    assert isinstance(said[1], (DistillError, UnicodeEncodeError)) and said[::2] == [None, None], said
    assert asyncio.run(together(*SMALL[2:])) == [None, None]
    assert {*contents(journal)} == {*SMALL}
    journal.close()
