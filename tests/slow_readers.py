"""Every raw format read again, slowly and plainly: what ``tests/fuzz_readers.py`` compares with.

Nothing here is shared with the readers. Text is parsed letter by letter; of Parquet files polars
gives the values alone. A file that breaks a rule raises RefusedError.
"""

import datetime
import gzip
import json
import math
import re
import unicodedata
from collections import defaultdict
from pathlib import Path

import polars as pl

MAX_MS = 10**14
NO_IDS = ("", "nan", "NaN", "NaT", "None", "null", "NULL", "<NA>")
NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)


class RefusedError(Exception):
    """The file breaks a rule."""


def require(holds, *what):
    if not holds:
        raise RefusedError(*what)


class Told:
    """What happened to every user, ids as text.

    - events: user -> [(item, time, target, impressions)] in order
    - searches: user -> [(time, terms, [(item, time)])] in order, each item once
    """

    def __init__(self):
        self.events, self.searches = defaultdict(list), defaultdict(list)
        self._rows, self._found = [], {}

    def event(self, user, item, time, order=0, target=True, impressions=None):
        shown = [str(shown) for shown in impressions or ()]
        self._rows.append((time, order, str(user), (str(item), time, target, shown)))

    def search(self, key, user, time, terms):
        require(key not in self._found, "a key twice", key)
        self._found[key] = (time, str(user), [term for term in terms if term], [])

    def click(self, key, item, time):
        require(key in self._found, "a click without a search", key)
        require(time >= self._found[key][0], "a click before its search")
        self._found[key][3].append((time, str(item)))

    def done(self):
        for _, _, user, event in sorted(self._rows, key=lambda row: row[:2]):
            self.events[user].append(event)
        for time, user, terms, clicks in sorted(self._found.values(), key=lambda s: s[0]):
            first = {}
            for when, item in sorted(clicks, key=lambda click: click[0]):
                first.setdefault(item, when)
            self.searches[user].append((time, terms, list(first.items())))
        return self


# values


def read_text(path):
    content = Path(path).read_bytes()
    if str(path).endswith(".gz"):
        try:
            content = gzip.decompress(content)
        except (OSError, EOFError, ValueError) as error:
            raise RefusedError(error) from None
    return content.removeprefix(b"\xef\xbb\xbf").decode("utf-8", "surrogateescape")


def records(path, separator=",", quote='"'):
    """Split a delimited text into records of fields; a field left empty is None.

    A carriage return before the end of a line is part of it, as is one at the end of any other
    field but a name's.
    """
    text = read_text(path)
    record, field, quoted, inside, names = [], "", False, False, True
    place = 0
    while place < len(text):
        letter = text[place]
        place += 1
        if inside:
            if letter != quote:
                field += letter
            elif text[place : place + 1] == quote:
                field += quote
                place += 1
            else:
                inside = False
        elif letter == quote and not field and not quoted:
            inside = quoted = True
        elif letter in (separator, "\n"):
            if not quoted and not (names and letter == separator):
                field = field.removesuffix("\r")
            record.append(field if quoted or field else None)
            field, quoted = "", False
            if letter == "\n":
                yield record
                record, names = [], False
        elif letter == "\r" and quoted and text[place : place + 1] in ("\n", separator, ""):
            pass
        else:
            require(not quoted, "text behind a quoted field")
            field += letter
    if inside:  # matters where the field is read, as undecodable bytes do
        field += "\ud800"
    if record or field or quoted:
        field = field if quoted else field.removesuffix("\r")
        record.append(field if quoted or field else None)
        yield record


def rows_of(path, wanted, optional=(), separator=",", quote='"'):
    """Read the wanted columns of a delimited text or Parquet file: a dict a row."""
    if ".parquet" in Path(path).suffixes:
        try:
            there = pl.read_parquet_schema(path)
            require(set(wanted) <= there.keys(), "a column is missing")
            columns = [*wanted, *(column for column in optional if column in there)]
            yield from pl.read_parquet(path, columns=columns).to_dicts()
        except (pl.exceptions.PolarsError, pl.exceptions.PanicException) as error:
            raise RefusedError(error) from None
        return
    header, *lines = list(records(path, separator, quote)) or [[]]
    require(all(header.count(column) == 1 for column in wanted), "columns", header)
    columns = [*wanted, *(column for column in optional if column in header)]
    for line in lines:
        require(len(line) <= len(header), "a line is too long")
        values = dict(zip(header, line, strict=False))
        row = {column: values.get(column) for column in columns}
        for value in row.values():
            require(value is None or not re.search("[\ud800-\udfff]", value), "not UTF-8")
        yield row


def distinct(rows):
    """Drop the rows that are there already."""
    seen = set()
    for row in rows:
        key = repr(row)
        if key not in seen:
            seen.add(key)
            yield row


def integer(value):
    if isinstance(value, str):
        require(re.fullmatch("0|-?[1-9][0-9]*", value), value)
        value = int(value)
    if isinstance(value, float):
        require(value.is_integer() and abs(value) <= 2**53, value)
        value = int(value)
    require(type(value) is int and -(2**63) <= value < 2**63, value)
    return value


def number(value, nullable=False):
    missing = value in (None, "", "nan", "NaN") or value != value
    if missing:
        require(nullable, "a number is missing")
        return None
    if isinstance(value, str):
        require(NUMBER.fullmatch(value), value)
        value = float(value)
    require(type(value) in (int, float) and math.isfinite(value), value)
    return value


def an_id(value):
    if not isinstance(value, str):
        require(type(value) in (int, float), value)
        return value if type(value) is int and value >= 2**63 else integer(value)
    # Python takes four separators for spaces, which Unicode does not.
    ends = {letter for letter in value[:1] + value[-1:] if letter.isspace()}
    require(value not in NO_IDS and ends <= set("\x1c\x1d\x1e\x1f"), value)
    require(not re.fullmatch(r"-?[0-9]+\.0+", value), value)
    return value


def milliseconds(value, unit="ms", least=-MAX_MS):
    if isinstance(value, datetime.datetime):
        since = value.replace(tzinfo=None) - datetime.datetime(1970, 1, 1)
        value, unit = since // datetime.timedelta(microseconds=1), "us"
    value = number(value)
    times, divided = {"s": (1000, 1), "ms": (1, 1), "us": (1, 1000), "ns": (1, 10**6)}[unit]
    if isinstance(value, float):
        value = round(value * times / divided)
    else:
        value = (value * times + divided // 2) // divided
    require(least <= value <= MAX_MS, value)
    return value


def text(value, nullable=False):
    if value is None:
        require(nullable, "a text is missing")
    else:
        require(isinstance(value, str) or type(value) is int, value)
    return value if value is None else str(value)


def runs_of(value, member):
    """Cut a text into its longest runs of member letters."""
    runs, run = [], ""
    for letter in value.lower() + " ":
        if member(letter):
            run += letter
        elif run:
            runs.append(run)
            run = ""
    return runs


def is_word(letter):
    return unicodedata.category(letter)[0] in "LN"


def is_han(letter):
    return "\u4e00" <= letter <= "\u9fff" or "\u3400" <= letter <= "\u4dbf"


# formats


def kuaisar(folder):
    told = Told()
    events = []
    fields = ("user_id", "item_id", "timestamp", "click")
    for line, row in enumerate(rows_of(folder / "rec_inter.csv", fields), 1):
        user, item = integer(row["user_id"]), integer(row["item_id"])
        time = milliseconds(row["timestamp"], least=10**11)
        if (click := number(row["click"])) > 0 and (
            same := (user, item, time, click)
        ) not in events:
            events.append(same)
            told.event(user, item, time, line)
    found = {}
    fields = (
        *("user_id", "search_session_id", "search_session_timestamp", "keyword"),
        *("item_id", "click_cnt"),
    )
    for line, row in enumerate(rows_of(folder / "src_inter.csv", fields), 1):
        user, item = integer(row["user_id"]), integer(row["item_id"])
        time = milliseconds(row["search_session_timestamp"], least=10**11)
        words = text(row["keyword"])
        require(re.fullmatch(r"\[\s*([0-9]+\s*(,\s*[0-9]+\s*)*)?\]", words), words)
        session = (user, text(row["search_session_id"]), time, words)
        if session not in found:
            found[session] = line
            told.search(line, user, time, re.findall("[0-9]+", words))
        if number(row["click_cnt"]) > 0:
            told.click(found[session], item, time)
    return told.done()


def trivago(folder):
    told = Told()
    (path,) = folder.iterdir()
    fields = (
        *("user_id", "session_id", "timestamp", "step", "action_type", "reference"),
        "impressions",
    )
    typed = []
    for row in rows_of(path, fields):
        shown = text(row["impressions"], nullable=True)
        require(not shown or re.fullmatch(r"[0-9]+(\|[0-9]+)*", shown), shown)
        typed.append({
            "user": an_id(row["user_id"]), "session": text(row["session_id"]),
            "time": milliseconds(row["timestamp"], "s", least=0), "step": integer(row["step"]),
            "action": text(row["action_type"]), "shown": shown,
            "reference": text(row["reference"], nullable=True),
        })  # fmt: skip
    rows = list(distinct(typed))
    first = {}
    for line, row in enumerate(rows):
        row["line"] = line
        row["visit"] = first.setdefault((row["user"], row["time"], row["session"]), line)
    last = {}
    rows.sort(key=lambda row: tuple(row[name] for name in ("time", "visit", "step", "line")))
    for order, row in enumerate(rows):
        visit = (row["user"], row["session"])
        action, reference = row["action"], row["reference"] or ""
        target = action == "clickout item"
        acted = target or action == "search for item" or action.startswith("interaction item")
        if acted and re.fullmatch("[0-9]+", reference):
            shown = row["shown"].split("|") if target and row["shown"] else None
            told.event(row["user"], reference, row["time"], order, target, shown)
            if visit in last:
                told.click(last[visit], reference, row["time"])
        elif action in ("search for destination", "search for poi") and (
            words := runs_of(reference, is_word)
        ):
            last[visit] = order
            told.search(order, row["user"], row["time"], words)
    return told.done()


def jdsearch(folder, test_query=False):
    told = Told()
    (path,) = folder.iterdir()
    histories = ("history_qry_list", "history_wid_list", "history_type_list", "history_time_list")
    candidates = ("candidate_wid_list", "candidate_label_list")
    names = ("query", *candidates, *histories)
    rows = list(rows_of(path, names, separator="\t", quote=None))
    order, seen = 0, set()
    targets = []
    for user, row in enumerate(rows, 1):
        require(row["query"] is not None and row["history_time_list"] is not None)
        if repr(row) in seen:
            continue
        seen.add(repr(row))
        lists = {name: (row[name] or "").split("_") if row[name] else [] for name in names}
        queries, products, types, intervals = (lists[name] for name in histories)
        require(len(queries) == len(products) == len(types) == len(intervals) - 1, "lengths")
        require(all(re.fullmatch("[0-9]+", product) for product in products), products)
        require(all(re.fullmatch(r"[+-]?[0-9]+", second) for second in intervals), intervals)
        seconds = [int(second) for second in intervals]
        require(all(second >= 0 for second in seconds) and sum(seconds) <= MAX_MS // 1000, seconds)
        now, before, key = 0, None, None
        for query, product, second in zip(queries, products, seconds[:-1], strict=True):
            now += second
            require(all(query.split("\x18")), "an empty term")
            if query == "-1":
                told.event(user, product, now * 1000, order)
            else:
                if query != before:
                    key = order
                    told.search(key, user, now * 1000, query.split("\x18"))
                told.click(key, product, now * 1000)
            before = query
            order += 1
        if test_query:
            shown, labels = (lists[name] for name in candidates)
            require(len(shown) == len(labels), "labels")
            require(all(re.fullmatch("[0-9]+", product) for product in shown), shown)
            labels = [number(label) for label in labels]
            if any(label > 0 for label in labels):
                best = shown[labels.index(max(labels))]
                rest = [item for item, label in zip(shown, labels, strict=True) if label <= 0]
                targets.append((user, best, (now + seconds[-1]) * 1000, rest or None))
    for user, item, time, rest in targets:
        told.event(user, item, time, order + user, True, rest)
    return told.done()


def qilin(folder):
    told = Told()
    order = 0
    for user, _, results in _qilin_rows(folder, "recommendation", (), "rec", "request_timestamp"):
        dated = sorted((r for r in results if r[2] is not None), key=lambda r: r[2])
        chosen = {note for note, click, _ in results if click}
        ignored = list(dict.fromkeys(note for note, _, _ in results if note not in chosen))
        bursts = []
        for note, click, time in dated:
            if not bursts or time - bursts[-1][1] > 1000:
                bursts.append([time, time, []])
            bursts[-1][1] = time
            if click and note not in bursts[-1][2]:
                bursts[-1][2].append(note)
        for first, _, notes in bursts:
            for note in notes:
                told.event(user, note, first, order, True, ignored or None)
                order += 1
    asked = _qilin_rows(folder, "search", ("query",), "search", "search_timestamp")
    for key, (user, query, results) in enumerate(asked):
        times = [time for _, _, time in results if time is not None]
        if not times:
            continue
        terms = []
        for run in runs_of(query or "", is_word):
            spaced = "".join(f" {letter} " if is_han(letter) else letter for letter in run)
            terms += spaced.split()
        told.search(key, user, min(times), terms)
        for note, click, time in results:
            if click and time is not None:
                told.click(key, note, time)
    return told.done()


def _qilin_rows(folder, stream, more, prefix, stamp):
    details = f"{prefix}_result_details_with_idx"
    for part in (f"{stream}_train", f"{stream}_test"):
        for end in ("parquet", "csv"):
            if (path := folder / f"{part}.{end}").exists():
                rows = list(rows_of(path, ("user_idx", *more, details)))
                typed = [_qilin_row(row, details, stamp, end == "csv") for row in rows]
                yield from distinct(typed)
                break


def _qilin_row(row, details, stamp, printed):
    cell = row[details]
    structs = _printed_structs(cell) if printed else cell or []
    results = []
    require(isinstance(structs, list), structs)
    for struct in structs:
        require(isinstance(struct, dict) and {"note_idx", "click", stamp} <= struct.keys(), struct)
        click, time = number(struct["click"], True), number(struct[stamp], True)
        if time is not None:
            time = round(time if time > 1e12 else time * 1000)
            require(0 <= time <= MAX_MS, time)
        results.append((integer(struct["note_idx"]), bool(click and click > 0), time))
    return integer(row["user_idx"]), text(row.get("query"), nullable=True), results


def _printed_structs(cell):
    """Read "[{'a': 1, 'b': 'x'} {...}]" by turning it into JSON."""
    cell = (cell or "[]").strip()
    require(re.fullmatch(r"\[[\s,]*(\{[^{}]*\}[\s,]*)*\]", cell), cell)
    structs = []
    for inner in re.findall(r"\{([^{}]*)\}", cell):
        pairs = []
        while inner.strip():
            found = re.match(r"\s*'(\w+)':\s*('[^']*'|\"[^\"]*\"|[\w.+-]+)\s*(?:,|$)", inner)
            require(found, inner)
            value = found[2]
            pairs.append((found[1], None if value == "None" else value))
            inner = inner[found.end() :]
        require(len(dict(pairs)) == len(pairs), "a name twice")
        structs.append(dict(pairs))
    return structs


def frames(folder):
    told = Told()
    paths = {}
    for path in sorted(folder.iterdir()):
        name = "events" if ".inter" in path.suffixes else path.name.split(".")[0]
        paths[name] = path
    optional = ("order", "target", "impressions")
    for row in _frame_rows(paths["events"], ("user", "item", "time"), optional):
        told.event(
            row["user"], row["item"], row["time"], row["order"], row["target"], row["impressions"]
        )
    if "searches" in paths:
        columns = ("search", "user", "time", "terms")
        for row in _frame_rows(paths["searches"], columns, ("relevant", "topic")):
            told.search(str(row["search"]), row["user"], row["time"], row["terms"] or [])
        for row in _frame_rows(paths["clicks"], ("search", "item", "time"), ()):
            told.click(str(row["search"]), row["item"], row["time"])
    return told.done()


def _frame_rows(path, wanted, optional):
    rules = {
        "user": an_id, "item": an_id, "search": an_id, "order": integer, "target": _flag,
        "time": milliseconds, "terms": _words, "impressions": _ids, "relevant": _label,
        "topic": _label,
    }  # fmt: skip
    names = {name: name for name in (*wanted, *optional)}
    separator, quote = ("\t" if ".tsv" in path.suffixes else ","), '"'
    if ".inter" in path.suffixes:
        separator, quote = "\t", None
        names = {"user": "user_id:token", "item": "item_id:token", "time": "timestamp:float"}
        rules["time"] = lambda value: milliseconds(value, "s")
        optional = ()
    there = [names[name] for name in wanted]
    typed = []
    for line, row in enumerate(rows_of(path, there, optional, separator, quote), 1):
        values = {name: row[names[name]] for name in (*wanted, *optional) if names[name] in row}
        values = {name: rules[name](value) for name, value in values.items()}
        typed.append((line, values))
    seen = set()
    for line, values in typed:
        if (key := repr(values)) not in seen:
            seen.add(key)
            yield {"order": line, "target": True, "impressions": None} | values


def _flag(value):
    if isinstance(value, str):
        flags = {"true": 1, "1": 1, "1.0": 1, "false": 0, "0": 0, "0.0": 0}
        require(value.lower() in flags, value)
        value = flags[value.lower()]
    require(value is not None and value in (0, 1), value)
    return bool(value)


def _label(value):
    return None if value in (None, "", "nan", "NaN") or value != value else integer(value)


def _words(value):
    if isinstance(value, str):
        require(not value.startswith("["), value)
        value = value.split(" ")
    require(value is None or all(type(word) in (str, int, type(None)) for word in value), value)
    words = [str(word) for word in value or [] if word not in (None, "")]
    require(not any("\x1f" in word for word in words), "a term that separates terms")
    return words


def _ids(value):
    if isinstance(value, str):
        require(not value.startswith("["), value)
        if value in ("nan", "NaN", ""):
            return None
        value = [word for word in value.split(" ") if word]
    return None if value is None else [an_id(each) for each in value]


def dumps(told):
    """Print what was told, to see where two readings differ."""
    return json.dumps([told.events, told.searches], indent=1, sort_keys=True, default=str)


READERS = {
    "kuaisar": kuaisar, "trivago": trivago, "jdsearch": jdsearch, "qilin": qilin, "frames": frames,
}  # fmt: skip
