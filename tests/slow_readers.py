"""Every raw format read again, slowly and plainly: what ``tests/fuzz_readers.py`` compares with.

Nothing here is shared with the readers. Text is parsed letter by letter; of Parquet files polars
gives the values alone. A file that breaks a rule raises RefusedError.
"""

import calendar
import datetime
import decimal
import gzip
import json
import math
import re
import unicodedata
import zlib
from collections import defaultdict
from pathlib import Path

import polars as pl

MAX_MS = 10**14
NO_IDS = ("", "nan", "NaN", "NaT", "None", "null", "NULL", "<NA>", "NA", "\\N")
NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)


class Single(float):
    """A float of 32 bits: nobody knows which number it was before, beyond 2**24."""


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

    def done(self, common_clock=True):
        searched = [(time, clicks) for time, _, _, clicks in self._found.values()]
        for times in (
            [time for time, *_ in self._rows],
            [time for time, _ in searched],
            [time for _, clicks in searched for time, _ in clicks],
        ):
            low, high = ([t for t in times if (t < 10**11) == is_low] for is_low in (True, False))
            leap = low and high and max(low) * 100 <= min(high)
            require(not (common_clock and leap), "two magnitudes")
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
    """Read the wanted columns of a delimited text, or Parquet file or folder: a dict a row."""
    if Path(path).is_dir():
        parts = sorted(Path(path).iterdir())
        try:
            named = [pl.read_parquet_schema(part).keys() for part in parts]
        except (pl.exceptions.PolarsError, pl.exceptions.PanicException) as error:
            raise RefusedError(error) from None
        columns = {*wanted, *optional} & {column for names in named for column in names}
        require(set(wanted) <= columns, "a column is missing")
        for part, names in zip(parts, named, strict=True):
            lacked = columns - names
            require(lacked <= {"terms", "impressions", "relevant", "topic"}, "a column is missing")
            for row in rows_of(part, sorted(columns & names)):
                yield dict.fromkeys(lacked) | row
        return
    if ".parquet" in Path(path).suffixes:
        try:
            there = pl.read_parquet_schema(path)
            require(set(wanted) <= there.keys(), "a column is missing")
            columns = [*wanted, *(column for column in optional if column in there)]
            singles = {c for c in columns if there[c] == pl.Float32}
            for row in pl.read_parquet(path, columns=columns).to_dicts():
                yield {c: _plain(value, c in singles) for c, value in row.items()}
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


def _plain(value, single):
    if isinstance(value, decimal.Decimal):
        return int(value) if value == int(value) else float(value)
    return Single(value) if single and value is not None else value


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
        most = 2**24 if isinstance(value, Single) else 2**53
        require(value.is_integer() and abs(value) <= most, value)
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
        require(type(value) in (int, float, Single), value)
        return value if type(value) is int and value >= 2**63 else integer(value)
    # Python takes four separators for spaces, which Unicode does not.
    ends = {letter for letter in value[:1] + value[-1:] if letter.isspace()}
    require(value not in NO_IDS and ends <= set("\x1c\x1d\x1e\x1f"), value)
    require(not re.fullmatch(r"-?[0-9]+\.0+|-?[0-9]+(\.[0-9]+)?[eE][+][0-9]+", value), value)
    return one_line(value)


def one_line(value):
    require(not value or not re.search("[\t\r\n\0]", value), value)
    return value


def milliseconds(value, unit="ms", least=-MAX_MS, days=False):
    if days and type(value) is datetime.date:
        value = datetime.datetime(value.year, value.month, value.day)
    if isinstance(value, datetime.datetime):
        since = value.replace(tzinfo=None) - datetime.datetime(1970, 1, 1)
        value, unit = since // datetime.timedelta(microseconds=1), "us"
    require(not isinstance(value, Single), value)
    value = number(value)
    times, divided = {"s": (1000, 1), "ms": (1, 1), "us": (1, 1000), "ns": (1, 10**6)}[unit]
    if isinstance(value, float):
        value = math.floor(value * times / divided + 0.5)
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


def terms_of(value, han_alone=True):
    """Cut a text into words of letters and digits with their marks; Han letters stand alone."""
    words, run, joined = [], "", ""
    plain = "".join(letter for letter in value.lower() if letter not in "\xad\u2060\ufeff")
    for letter in unicodedata.normalize("NFC", plain) + " ":
        kind = unicodedata.category(letter)[0]
        alone = han_alone and is_han(letter)
        after_han = run and han_alone and is_han(run[0])
        if run and letter in "\u200c\u200d" and not after_han:
            joined += letter
            continue
        if run and (kind not in "LNM" or alone or (after_han and kind != "M")):
            last = joined[:1] if unicodedata.category(run[-1])[0] == "M" else ""
            words.append(run + last.replace("\u200c", ""))
            run = joined = ""
        if run or kind in "LN":
            run, joined = run + joined + letter, ""
    return words


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
        words = text(row["keyword"], nullable=True)
        listed = r"\[\s*([0-9]+\s*(,\s*[0-9]+\s*)*)?\]"
        require(words is None or re.fullmatch(listed, words), words)
        session = (user, one_line(text(row["search_session_id"])), time, words)
        if session not in found:
            found[session] = line
            told.search(line, user, time, re.findall("[0-9]+", words or ""))
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
            "user": an_id(row["user_id"]), "session": one_line(text(row["session_id"])),
            "time": milliseconds(row["timestamp"], "s", least=0), "step": integer(row["step"]),
            "action": one_line(text(row["action_type"])), "shown": shown,
            "reference": one_line(text(row["reference"], nullable=True)),
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
            words := terms_of(reference, han_alone=False)
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
                targets.append((user, best, (now + seconds[-1]) * 1000, rest and [*rest, best]))
    for user, item, time, rest in targets:
        told.event(user, item, time, order + user, True, rest)
    return told.done(common_clock=False)


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
                told.event(user, note, first, order, True, ignored and [*ignored, note])
                order += 1
    asked = _qilin_rows(folder, "search", ("query",), "search", "search_timestamp")
    for key, (user, query, results) in enumerate(asked):
        times = [time for _, _, time in results if time is not None]
        if not times:
            continue
        told.search(key, user, min(times), terms_of(query or ""))
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
        "time": lambda value: milliseconds(value, days=True), "terms": _words,
        "impressions": _ids, "relevant": _label, "topic": _label,
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
        at = values["time"]
        values = {name: rules[name](value) for name, value in values.items()}
        typed.append((line, repr((values, at)), values))
    seen = set()
    for line, key, values in typed:
        if key not in seen:
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
        require(not (value.startswith("[") and value.endswith("]")), value)
        value = value.split(" ")
    require(value is None or all(type(word) in (str, int, type(None)) for word in value), value)
    words = [one_line(str(word)) for word in value or [] if word not in (None, "")]
    require(not any("\x1f" in word for word in words), "a term that separates terms")
    return words


def _ids(value):
    if isinstance(value, str):
        require(not (value.startswith("[") and value.endswith("]")), value)
        if value in ("nan", "NaN", ""):
            return None
        value = [word for word in value.split(" ") if word]
    return None if value is None else [an_id(each) for each in value]


def date_time(value):
    if isinstance(value, datetime.datetime):
        return milliseconds(value)
    require(isinstance(value, str) and len(value) == 19 and value[0] in "123456789", value)
    try:
        found = datetime.datetime.strptime(value, "%Y-%m-%d %H:%M:%S")
    except ValueError:
        raise RefusedError(value) from None
    require(found.strftime("%Y-%m-%d %H:%M:%S") == value, value)
    return milliseconds(found)


def codes(value):
    if isinstance(value, str):
        require(re.fullmatch(r"\[[ \n]*[0-9]+([ \n,]+[0-9]+)*[ \n]*\]", value, re.ASCII), value)
        numbers = re.findall("[0-9]+", value)
        require(all(str(int(number)) == number for number in numbers), value)
        value = [int(number) for number in numbers]
    require(isinstance(value, list) and value, value)
    require(all(type(code) is int and 0 <= code <= 255 for code in value), value)
    return value


def synerise(folder, targets=("add_to_cart",)):
    told, events, number = Told(), [], 0
    for action in ("add_to_cart", "product_buy"):
        rows = list(rows_of(folder / f"{action}.parquet", ("client_id", "timestamp", "sku")))
        seen = set()
        for row in rows:
            number += 1
            event = integer(row["client_id"]), date_time(row["timestamp"]), integer(row["sku"])
            if event not in seen:
                seen.add(event)
                events.append((*event, number, action in targets))
    users = {user for user, *_ in events}
    names = ("client_id", "timestamp", "query")
    searches, seen = [], set()
    for line, row in enumerate(rows_of(folder / "search_query.parquet", names), 1):
        search = integer(row["client_id"]), date_time(row["timestamp"]), codes(row["query"])
        if search[0] not in users:
            continue
        require(not searches or len(search[2]) == len(searches[0][2]), "codes", search)
        if repr(search) not in seen:
            seen.add(repr(search))
            searches.append((*search, line))
    for user, time, query, line in searches:
        told.search(line, user, time, [f"{place}:{code}" for place, code in enumerate(query)])
    for user, time, item, order, target in sorted(events, key=lambda event: (event[1], event[3])):
        told.event(user, item, time, order, target)
        asked = [(t, k) for u, t, _, k in searches if u == user and time - 1_800_000 <= t <= time]
        if asked:
            told.click(max(asked)[1], item, time)
    return told.done()


def _once(pairs):
    names = [name for name, _ in pairs]
    require(len(set(names)) == len(names), "a key twice", names)
    require(all(not isinstance(v, float) or math.isfinite(v) for _, v in pairs), pairs)
    return dict(pairs)


def _no_constant(text):
    raise ValueError(text)


def whole(value):
    require(type(value) in (int, float), value)
    return integer(value)


def json_id(value, nullable=False):
    """Give an id as text; 7 and "7" are one."""
    if value is None or (nullable and value == ""):
        require(nullable, "an id is missing")
        return None
    require(type(value) in (int, str), value)
    require(type(value) is int or not re.search("[\ud800-\udfff]", value), "half a letter")
    return an_id(str(value))


def amazon(folder):
    told = Told()
    (reviews,) = (path for path in folder.iterdir() if path.name.startswith("reviews_"))
    rows, first = [], {}
    for line, row in enumerate(_lines(reviews), 1):
        if row is None:
            continue
        time = whole(row.get("unixReviewTime"))
        require(0 <= time <= MAX_MS // 1000, time)
        review = json_id(row.get("reviewerID")), json_id(row.get("asin")), time * 1000
        if review not in rows:
            rows.append(review)
            told.event(*review, line)
            first.setdefault(review[:2], (line, review[2]))
    text = read_text(folder / "query_text.txt")
    require(not re.search("[\ud800-\udfff]", text), "not UTF-8")
    queries = text.removesuffix("\n").split("\n") if text else []
    asked = {}
    for name in ("train.qrels", "test.qrels"):
        path = folder / name
        require(path.exists() or name == "test.qrels", "no file")
        text = read_text(path) if path.exists() else ""
        require(not re.search("[\ud800-\udfff]", text), "not UTF-8")
        for line in text.removesuffix("\n").split("\n") if text else ():
            fields = [field for field in re.split("[ \t]+", line.strip(" \t\r")) if field]
            require(len(fields) == 4 and fields[3] in ("0", "1"), line)
            require(not re.search(r"\s", "".join(fields), re.ASCII), line)
            user, _, query = fields[0].rpartition("_")
            require(user and re.fullmatch("0|[1-9][0-9]*", query), line)
            require(int(query) < len(queries), "no such query", line)
            if fields[3] == "1":
                lot = zlib.crc32(f"{fields[0]} {fields[2]}".encode()), int(query)
                asked.setdefault((user, fields[2]), []).append(lot)
    for (user, item), (line, time) in first.items():
        if lots := asked.get((user, item)):
            terms = re.split("[ \t]", queries[min(lots)[1]].strip())
            told.search(line, user, time, terms)
            told.click(line, item, time)
    return told.done()


def _lines(path):
    """Read the objects of a JSON file, one a line, None for a blank line."""
    text = read_text(path)
    require(not re.search("[\ud800-\udfff]", text), "not UTF-8")
    for line in text.split("\n"):
        if not line or line.isspace():
            yield None
            continue
        try:
            value = json.loads(line, object_pairs_hook=_once, parse_constant=_no_constant)
        except (ValueError, RecursionError) as error:
            raise RefusedError(error) from None
        require(isinstance(value, dict), "no object")
        yield value


def instant(value):
    if not isinstance(value, str):
        ms = whole(value)
        require(10**11 <= ms <= MAX_MS, ms)
        return ms
    found = re.fullmatch(
        r"([0-9-]{10})[T ]([0-9:]{8})(\.[0-9]{1,9})?(Z|[+-][0-9]{2}:?[0-9]{2})?", value
    )
    require(found, value)
    day, clock, fraction, zone = found.groups()
    try:
        at = datetime.datetime.strptime(f"{day} {clock}", "%Y-%m-%d %H:%M:%S")
        require(at.strftime("%Y-%m-%d %H:%M:%S") == f"{day} {clock}".lstrip("0"), value)
    except ValueError:
        raise RefusedError(value) from None
    ms = calendar.timegm(at.timetuple()) * 1000
    if zone not in (None, "Z"):
        hours, minutes = int(zone[1:3]), int(zone[-2:])
        require(hours < 24 and minutes < 60, value)
        ms -= int(f"{zone[0]}1") * (hours * 60 + minutes) * 60_000
    digits = (fraction or ".0")[1:].ljust(9, "0")
    ms += int(digits[:6]) // 1000 + (int(digits[3:]) >= 500_000)
    require(0 <= ms <= MAX_MS, value)
    return ms


def ubi(folder, targets=("click", "click_through")):
    told = Told()
    tables, start = {"ubi_queries": [], "ubi_events": []}, 0
    for path in sorted(folder.iterdir()):
        own, row, following = _ubi_index(path.name), 0, None
        for row, document in enumerate(_lines(path), 1):
            if document is None:
                continue
            about = next(iter(document.values()), None)
            bulk = len(document) == 1 and next(iter(document)) in ("index", "create")
            if bulk and isinstance(about, dict) and set(about) <= {"_index", "_id"}:
                following = _ubi_index(str(about.get("_index", "")))
                continue
            index, following = following or own, None
            if isinstance(document.get("_source"), dict):
                index = _ubi_index(str(document.get("_index", ""))) or index
                document = document["_source"]
            require(index, "of no index")
            tables[index].append((start + row, document))
        start += row
    require(all(tables.values()), "an index without a document")
    queries, results = {}, {}
    hits = ("query_response_hit_ids", "query_response_object_ids", "query_response_objects_ids")
    for row, document in tables["ubi_queries"]:
        query, user, time = _ubi_base(document)
        text = document.get("user_query")
        require(text is None or isinstance(text, str), text)
        require(not text or not re.search("[\ud800-\udfff]", text), "half a letter")
        found = None
        for name in hits:
            listed = document.get(name)
            require(listed in (None, "") or isinstance(listed, list), listed)
            listed = None if listed in (None, "") else [json_id(each) for each in listed]
            found = listed if found is None else found
        if user is None:
            continue
        if query is not None:
            queries.setdefault((user, query), []).append((time, row, text or ""))
        if found:
            results.setdefault((user, query), []).append((row, found))
    events, seen = [], set()
    for row, document in tables["ubi_events"]:
        query, user, time = _ubi_base(document)
        action = document.get("action_name")
        require(isinstance(action, str), action)
        require(not re.search("[\ud800-\udfff]", action), "half a letter")
        item = document
        for name in ("event_attributes", "object", "object_id"):
            require(item is None or isinstance(item, dict), item)
            item = None if item is None else item.get(name)
        item = json_id(item, nullable=True)
        event = (action, user, time, query, item)
        if user is not None and event not in seen:
            seen.add(event)
            events.append((row, *event))
    acted = [e for e in events if e[5] is not None and (e[1] in UBI_ACTIONS or e[1] in targets)]
    require(any(action in targets for _, action, *_ in acted), "no target")
    shown = {}
    for _, action, user, _, query, item in events:
        if action == "impression" and item is not None and query is not None:
            shown.setdefault((user, query), []).append(item)
    items = {event[5] for event in events if event[5] is not None}
    listed = {key: [i for _, ids in sorted(found) for i in ids] for key, found in results.items()}
    listed = {key: ids for key, ids in listed.items() if key[1] is not None and items & set(ids)}
    began = {}
    for key, rows in queries.items():
        time, row, text = min(rows)
        if terms := terms_of(text):
            began[key] = row, time
            told.search(row, key[0], time, terms)
    for row, action, user, time, query, item in acted:
        seen, hits = shown.get((user, query), []), listed.get((user, query), [])
        among = next((ids for ids in (seen, hits) if action in targets and item in ids), [])
        told.event(user, item, time, row, action in targets, list(dict.fromkeys(among)) or None)
        known = [*seen, *hits]
        if query is not None and (user, query) in began and (item in known or not known):
            search, asked = began[user, query]
            told.click(search, item, max(asked, time))
    return told.done()


UBI_ACTIONS = ("click", "click_through", "view", "watch", "add_to_cart", "purchase")


def _ubi_index(name):
    if name.startswith("ubi_queries_events"):
        return None
    return next((index for index in ("ubi_queries", "ubi_events") if name.startswith(index)), None)


def _ubi_base(document):
    query = json_id(document.get("query_id"), nullable=True)
    return (
        query,
        json_id(document.get("client_id"), nullable=True),
        instant(document.get("timestamp")),
    )


def dumps(told):
    """Print what was told, to see where two readings differ."""
    return json.dumps([told.events, told.searches], indent=1, sort_keys=True, default=str)


READERS = {
    "kuaisar": kuaisar, "trivago": trivago, "jdsearch": jdsearch, "qilin": qilin, "frames": frames,
    "synerise": synerise, "ubi": ubi, "amazon": amazon,
}  # fmt: skip
