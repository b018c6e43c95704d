"""What scripts/top makes of given replies, without a server: which rows, in which order, with
which numbers. That a real server gives such replies is shown by tests/top.rs."""

import importlib.machinery
import importlib.util
import io
import pathlib
import sys
import unittest
import unittest.mock

import redis
from rich.console import Console

sys.dont_write_bytecode = True
SCRIPT = str(pathlib.Path(__file__).parents[2] / "scripts" / "top")
loader = importlib.machinery.SourceFileLoader("top", SCRIPT)
top = importlib.util.module_from_spec(importlib.util.spec_from_loader("top", loader))
loader.exec_module(top)

FIELDS = (
    "held waiting next_lapse_ms acquired refreshed denied released lapsed waits wait_timeouts"
    " wait_ms_total wait_ms_max"
).split()
IDLE = {"next_lapse_ms": -1}


class Server:
    """Answers as a server with these limiters; `facts` may change between two looks."""

    def __init__(self, facts):
        self.facts = facts
        self.scans = 0

    def scan(self, cursor, count, _type):
        self.scans += 1
        assert (cursor, _type) == (0, "zset")
        return 0, list(self.facts)

    def pipeline(self, transaction):
        return Pipeline(self.facts)


class Pipeline:
    def __init__(self, facts):
        self.facts = facts
        self.replies = []

    def execute_command(self, command, prefix):
        assert command == "LIMITER.INFO"
        facts = self.facts.get(prefix, IDLE)
        if isinstance(facts, Exception):
            self.replies.append(facts)
        else:
            pairs = [(field.encode(), facts.get(field, 0)) for field in FIELDS]
            self.replies.append([part for pair in pairs for part in pair])

    def execute(self, raise_on_error):
        assert not raise_on_error
        return self.replies


def lines(table):
    """A table as it is printed where there is no terminal, cut into cells."""
    out = io.StringIO()
    Console(file=out, width=10_000).print(table)
    rows = out.getvalue().splitlines()
    return [[cell for cell in row.strip().split("  ") if cell] for row in rows]


def cells(table):
    return [[cell.strip() for cell in row] for row in lines(table)[1:]]


class Tables(unittest.TestCase):
    def setUp(self):
        self.now = 0.0
        self.addCleanup(setattr, top.time, "monotonic", top.time.monotonic)
        top.time.monotonic = lambda: self.now

    def test_a_limiter_is_a_row_and_those_with_a_line_come_first(self):
        facts = {
            b"calm": {"held": 7, "next_lapse_ms": 45_000, "acquired": 7},
            b"busy": {"held": 2, "waiting": 3, "next_lapse_ms": 900, "wait_ms_max": 61_500},
            b"idle": IDLE,
        }
        table = top.Watch(Server(facts), ["idle", "calm", "busy"]).look()
        self.assertEqual(
            [cell.strip() for cell in lines(table)[0]],
            ["prefix", "held", "waiting", "next lapse", "acquired/s", "denied/s", "lapsed/s"]
            + ["longest wait"],
        )
        self.assertEqual(
            cells(table),
            [
                ["busy", "2", "3", "0.9s", "-", "-", "-", "1m 01s"],
                ["calm", "7", "0", "45s", "-", "-", "-", "0.0s"],
                ["idle", "0", "0", "-", "-", "-", "-", "0.0s"],
            ],
        )

    def test_rates_are_what_counters_grew_by_a_second_and_begin_anew_with_them(self):
        facts = {b"p": {"acquired": 100, "denied": 5, "lapsed": 0}}
        watch = top.Watch(Server(facts), ["p"])
        watch.look()
        self.now = 2.0
        facts[b"p"] = {"acquired": 130, "denied": 5, "lapsed": 1}
        self.assertEqual(cells(watch.look())[0][4:7], ["15.0", "0.0", "0.5"])
        self.now = 3.0
        facts[b"p"] = {"acquired": 4}  # Forgotten, or the server started anew.
        self.assertEqual(cells(watch.look())[0][4:7], ["4.0", "0.0", "0.0"])

    def test_other_sorted_sets_that_scan_finds_are_left_out_and_named_ones_shown(self):
        facts = {
            b"held": {"held": 1, "next_lapse_ms": 5},
            b"used": {"denied": 1, "next_lapse_ms": -1},
            b"scores": {"held": 0, "next_lapse_ms": -1},
            b"times-in-ms": {"held": 9, "next_lapse_ms": 1_700_000_000_000_000},
            b"never-lapses": {"held": 9, "next_lapse_ms": -1},
        }
        found = cells(top.Watch(Server(facts), []).look())
        self.assertEqual([row[0] for row in found], ["held", "used"])
        named = cells(top.Watch(Server(facts), ["scores", "never-lapses"]).look())
        self.assertEqual([row[0] for row in named], ["never-lapses", "scores"])
        self.assertEqual(cells(top.Watch(Server({}), []).look()), [["(no limiters)"]])

    def test_the_search_is_bounded(self):
        server = Server({})
        endless = iter(range(1, 10**9))
        calls = []

        def scan(cursor, count, _type):
            calls.append(cursor)
            return next(endless), [b"%d" % next(endless) for _ in range(count)]

        server.scan = scan
        prefixes = top.Prefixes([])
        for _ in range(3):
            self.assertLessEqual(len(prefixes.look(server)), top.KNOWN)
        self.assertLessEqual(len(calls), 3 * top.SCANS)
        self.assertEqual(len(set(calls)), len(calls), "it goes on where it left off")

    def test_there_are_no_more_rows_than_a_screen_bears(self):
        facts = {b"%03d" % n: {"held": n + 1, "next_lapse_ms": 9} for n in range(top.ROWS + 3)}
        shown = cells(top.Watch(Server(facts), []).look())
        self.assertEqual(len(shown), top.ROWS + 1)
        self.assertEqual(shown[0][:2], ["052", "53"])
        self.assertEqual(shown[-1], ["and 3 more"])

    def test_a_prefix_is_any_bytes_and_never_speaks_to_the_terminal(self):
        odd = [b"\x1b[2J", b"\xff", "größe".encode(), b"[red]x[/red]"]
        facts = {prefix: {"held": 1, "next_lapse_ms": 5} for prefix in odd}
        names = [row[0] for row in cells(top.Watch(Server(facts), []).look())]
        self.assertEqual(sorted(names), sorted([r"\x1b[2J", r"\xff", "größe", "[red]x[/red]"]))

    def test_a_named_key_of_another_type_is_a_row_that_says_so(self):
        facts = {b"text": redis.ResponseError("WRONGTYPE Operation against a key"), b"p": {}}
        shown = cells(top.Watch(Server(facts), ["text", "p"]).look())
        self.assertEqual(shown[0][0], "p")
        self.assertEqual(shown[1], ["text: WRONGTYPE Operation against a key"])

    def test_on_a_terminal_it_goes_on_until_ctrl_c_even_while_the_server_is_away(self):
        server = Server({b"p": {"held": 1, "next_lapse_ms": 5}})
        scan = server.scan
        looks = []

        def sleep(seconds):
            looks.append(terminal.file.getvalue())
            self.now += seconds
            if len(looks) == 1:
                server.scan = unittest.mock.Mock(side_effect=redis.ConnectionError("it is away"))
            elif len(looks) == 2:
                server.scan = scan
                server.facts[b"p"]["held"] = 1234
            else:
                raise KeyboardInterrupt

        self.addCleanup(setattr, top.time, "sleep", top.time.sleep)
        top.time.sleep = sleep
        terminal = Console(file=io.StringIO(), force_terminal=True, width=120, height=30)
        with self.assertRaises(KeyboardInterrupt):
            top.run(top.Watch(server, []), terminal, 1.0)
        first, second, third = looks[0], looks[1][len(looks[0]) :], looks[2][len(looks[1]) :]
        self.assertIn("longest wait", first)
        self.assertIn("it is away", second)
        self.assertIn("1234", third)
        left = terminal.file.getvalue()[len(looks[2]) :]
        self.assertIn("\x1b[?1049l", left, "the terminal is as it was")

    def test_times_are_for_people(self):
        shown = [top.seconds(ms) for ms in (-1, 0, 9_949, 10_000, 59_999, 60_000, 7_500_000)]
        self.assertEqual(shown, ["-", "0.0s", "9.9s", "10s", "59s", "1m 00s", "2h 05m"])


if __name__ == "__main__":
    unittest.main()
