"""Reads the JSON that people edit by hand: what hands do is forgiven or named, and everything has its place.

Read with a small grammar rather than `json`, so that every key and value knows its line and column,
and so that what hands do is either forgiven (`//` and `/* */` comments, a trailing comma, a byte order
mark) or named (a missing comma, single quotes, `True`). All faults are told at once.

`read_text` reads a file; the rest is pure.
"""

from __future__ import annotations

import difflib
import functools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from lark import Lark, Token, Transformer, UnexpectedCharacters, UnexpectedInput, UnexpectedToken

from worker_agent import plain_files

MAX_FILE_BYTES = 1024 * 1024
MAX_DEPTH = 32  # no schema of ours needs more than five; the bound keeps hostile nesting off our own stack
MAX_FAULTS = 50  # of one file; more is not a list that anybody reads


# Faults ...


class Place(NamedTuple):
    """Where something begins in a text; both count from 1, columns in characters."""

    line: int
    column: int


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing that is wrong with a file, and what was expected there."""

    name: str
    place: Place | None
    """None: the fault is of the file as a whole."""
    sentence: str

    def __str__(self) -> str:
        where = f":{self.place.line}:{self.place.column}" if self.place else ""
        return f"{self.name}{where}: {self.sentence}"


class ConfigFaults(Exception):
    """Everything that is wrong with a configuration file, one line each, in the order of the file."""

    def __init__(self, faults: Sequence[Fault]) -> None:
        self.faults = tuple(faults)
        lines = [str(fault) for fault in self.faults[:MAX_FAULTS]]
        if len(self.faults) > MAX_FAULTS:
            lines.append(f"... and {len(self.faults) - MAX_FAULTS} more faults")
        super().__init__("\n".join(lines))


Complaint: TypeAlias = tuple[Place, str]
"""A fault of a text that has no name yet."""


# From a file to nodes ...


def read_text(path: Path) -> str:
    """The file's text. Raises `ConfigFaults` for one that is missing, cannot be read, is too long, or is not
    UTF-8."""
    name = str(path)
    try:
        data = plain_files.read(path, MAX_FILE_BYTES + 1)
    except FileNotFoundError:
        raise ConfigFaults([Fault(name, None, "there is no such file")]) from None
    except OSError as error:
        raise ConfigFaults([Fault(name, None, f"cannot be read: {error.strerror or error}")]) from error
    if len(data) > MAX_FILE_BYTES:
        raise ConfigFaults([Fault(name, None, f"longer than {MAX_FILE_BYTES} bytes")])
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        before = data[: error.start].decode("utf-8").removeprefix("\ufeff")
        place = Place(before.count("\n") + 1, len(before) - before.rfind("\n"))
        sentence = f"byte 0x{data[error.start]:02x} is not UTF-8: save the file in that encoding"
        raise ConfigFaults([Fault(name, place, sentence)]) from None


@dataclass(frozen=True, slots=True)
class Scalar:
    token: Token
    depth: int = 1


@dataclass(frozen=True, slots=True)
class Object:
    token: Token
    members: tuple[tuple[Token, Node], ...]
    depth: int


@dataclass(frozen=True, slots=True)
class Array:
    token: Token
    items: tuple[Node, ...]
    depth: int


Node: TypeAlias = Scalar | Object | Array


def tree(text: str, faults: list[Complaint], *, instead: str) -> Node | None:
    """The text as nodes; None where it cannot be read any further. What is wrong is added to `faults`.
    `instead`: what an empty text is advised to hold."""
    text = text.removeprefix("\ufeff")
    if len(text) > MAX_FILE_BYTES:
        faults.append((Place(1, 1), f"longer than {MAX_FILE_BYTES} characters"))
        return None
    try:
        # With the transformer built in, the parser hands over the root node, not a tree.
        root: object = _grammar().parse(text, on_error=functools.partial(_bridged, faults))
    except UnexpectedInput as error:
        faults.append(_syntax(error, text, instead))
        return None
    return root if isinstance(root, Scalar | Object | Array) else None


def _bridged(faults: list[Complaint], error: UnexpectedInput) -> bool:
    """Reads on over a missing comma, the commonest slip, so that the rest is checked too."""
    if not isinstance(error, UnexpectedToken) or "COMMA" not in error.accepts:
        return False
    token = error.token
    if token.type not in _VALUE_TERMINALS or len(faults) >= MAX_FAULTS:
        return False
    try:
        error.interactive_parser.feed_token(Token("COMMA", ","))
        error.interactive_parser.feed_token(token)
    except UnexpectedToken:  # `{"a": 1 {` needs more than a comma
        return False
    faults.append((place_of(token), f"expected a comma before {_shown_token(token)}"))
    return True


# The grammar reads more than JSON: what is nearly right becomes a node, and then one precise fault.
_GRAMMAR = r"""
start: value
?value: mapping | sequence | scalar
mapping: LBRACE (pair (COMMA pair)* COMMA?)? RBRACE
sequence: LBRACKET (value (COMMA value)* COMMA?)? RBRACKET
pair: key COLON value
key: STRING | SINGLE | NAME
scalar: STRING | SINGLE | NUMBER | NAME

LBRACE: "{"
RBRACE: "}"
LBRACKET: "["
RBRACKET: "]"
COMMA: ","
COLON: ":"
STRING: /"(?:[^"\\\n]|\\[^\n])*"/
SINGLE: /'(?:[^'\\\n]|\\[^\n])*'/
NUMBER: /[-+.0-9][-+.0-9A-Za-z_]*/
NAME: /[A-Za-z_$][A-Za-z0-9_$]*/
%ignore /[ \t\r\n]+/
%ignore /\/\/[^\n]*/
%ignore /\/\*[\s\S]*?\*\//
"""
_VALUE_TERMINALS = frozenset({"STRING", "SINGLE", "NUMBER", "NAME", "LBRACE", "LBRACKET"})


class _Nodes(Transformer[Token, Any]):
    """Builds nodes while the parser reduces, so that no recursion depends on the text's depth."""

    def start(self, children: list[Node]) -> Node:
        return children[0]

    def scalar(self, children: list[Token]) -> Node:
        return Scalar(children[0])

    def key(self, children: list[Token]) -> Token:
        return children[0]

    def pair(self, children: list[Any]) -> tuple[Token, Node]:
        return children[0], children[2]

    def mapping(self, children: list[Any]) -> Node:
        members = tuple(child for child in children if isinstance(child, tuple))
        depth = 1 + max((node.depth for _, node in members), default=0)
        # Beyond the bound the content is dropped and only the depth carried on.
        return Object(children[0], members if depth <= MAX_DEPTH else (), depth)

    def sequence(self, children: list[Any]) -> Node:
        items = tuple(child for child in children if isinstance(child, Scalar | Object | Array))
        depth = 1 + max((node.depth for node in items), default=0)
        return Array(children[0], items if depth <= MAX_DEPTH else (), depth)


@functools.cache
def _grammar() -> Lark:
    return Lark(_GRAMMAR, parser="lalr", transformer=_Nodes(), maybe_placeholders=False)


def place_of(token: Token) -> Place:
    """Where it begins."""
    return Place(token.line or 1, token.column or 1)


# From nodes to values; what is nearly JSON is named here ...


def plain(node: Node, faults: list[Complaint]) -> object:
    """As `json` would have it, but with tuples for lists. What is wrong is added to `faults`."""
    if node.depth > MAX_DEPTH:
        faults.append((place_of(node.token), f"nested more than {MAX_DEPTH} levels deep"))
        return None
    match node:
        case Scalar(token):
            try:
                return value_of(token)
            except ValueError as error:
                faults.append((place_of(token), str(error)))
                return None
        case Array(_, items):
            return tuple(plain(item, faults) for item in items)
        case Object(_, members):
            return _plain_object(members, faults)


def _plain_object(members: Iterable[tuple[Token, Node]], faults: list[Complaint]) -> dict[str, object]:
    found: dict[str, object] = {}
    first: dict[str, Place] = {}
    for token, node in members:
        value = plain(node, faults)
        try:
            key = key_of(token)
        except ValueError as error:
            faults.append((place_of(token), str(error)))
            continue
        if token.type != "STRING":
            faults.append((place_of(token), f"expected double quotes around a key: {shown(key)}"))
        if key in first:
            line = first[key].line
            faults.append((place_of(token), f"{shown(key)} stands in line {line} already: expected it once"))
        else:
            first[key] = place_of(token)
            found[key] = value
    return found


def key_of(token: Token) -> str:
    """What is meant, even without the right quotes; raises `ValueError` with the sentence for the user."""
    match token.type:
        case "STRING":
            return _text(token)
        case "SINGLE":
            return token[1:-1]
    return str(token)


_NUMBER = re.compile(r"-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][-+]?[0-9]+)?")
_WORDS: Mapping[str, bool | None] = {"true": True, "false": False, "null": None}


def value_of(token: Token) -> object:
    """Raises `ValueError` with the sentence for the user."""
    match token.type:
        case "STRING":
            return _text(token)
        case "SINGLE":
            raise ValueError(f"expected double quotes: {shown(token[1:-1])}")
        case "NUMBER":
            if len(token) > 40 or not _NUMBER.fullmatch(token):
                raise ValueError(
                    f"{_shown_token(token)} is not a number of JSON: expected one like 5 or 0.25"
                )
            return json.loads(token)
    if token in _WORDS:
        return _WORDS[token]
    lowered = {"none": "null", "nil": "null", "yes": "true", "no": "false"}.get(token.lower(), token.lower())
    meant = lowered if lowered in _WORDS else shown(token)
    raise ValueError(f"{_shown_token(token)} is not a value of JSON, did you mean {meant}?")


def _text(token: Token) -> str:
    """Raises `ValueError` with the sentence for the user."""
    try:
        text: str = json.loads(token, strict=False)
    except json.JSONDecodeError as error:
        escape = token[error.pos : error.pos + 2]
        raise ValueError(
            rf"{shown(escape)} is not an escape that JSON knows: write \\ for one backslash"
        ) from None
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise ValueError("half of a surrogate pair: expected a whole character")
    return text


def _syntax(error: UnexpectedInput, text: str, instead: str) -> Complaint:
    if isinstance(error, UnexpectedCharacters):
        place = Place(error.line, error.column)
        rest = text[error.pos_in_stream or 0 :][:2]
        if rest[:1] in ("'", '"'):
            return place, f"the text that begins here has no closing {rest[:1]} in its line"
        if rest == "/*":
            return place, "the comment that begins here has no end: expected */"
        return place, f"{shown(rest[:1])} does not belong here: {_wanted(error.allowed or ())}"
    if isinstance(error, UnexpectedToken):
        token = error.token
        if token.type != "$END":
            return place_of(token), f"{_shown_token(token)} does not belong here: {_wanted(error.accepts)}"
        if token.end_line is None or token.end_column is None:
            return Place(1, 1), f"nothing in here: expected {instead}"
        place = Place(token.end_line, token.end_column)
        return place, f"the file ends here too early: {_wanted(error.accepts)}"
    return Place(1, 1), f"cannot be read: {error}"  # lark has no third kind of unexpected input


_SIGNS = {"LBRACE": "{", "RBRACE": "}", "LBRACKET": "[", "RBRACKET": "]", "COMMA": "a comma", "COLON": ":"}


def _wanted(terminals: Iterable[str]) -> str:
    names = set(terminals)
    if "NUMBER" in names:  # wherever a number may stand, any value may
        names -= _VALUE_TERMINALS
        wanted = ["a value"]
    elif "STRING" in names:
        names -= _VALUE_TERMINALS
        wanted = ["a key in double quotes"]
    else:
        wanted = []
    wanted += [_SIGNS[name] for name in sorted(names) if name in _SIGNS]
    return f"expected {' or '.join(wanted)}" if wanted else "expected the end of the file"


# Places and words ...


def find(root: Node, loc: Sequence[str | int], *, key: bool) -> Place:
    """Where the value at `loc` begins, or with `key` its key; for what is missing, where it would belong."""
    node, place = root, place_of(root.token)
    for part in loc:
        if isinstance(node, Array) and isinstance(part, int):
            node = node.items[part]
            place = place_of(node.token)
        elif isinstance(node, Object):
            member = next((pair for pair in node.members if is_key(pair[0], part)), None)
            if member is None:
                break
            node = member[1]
            place = place_of(member[0] if key else node.token)
    return place


def is_key(token: Token, key: str | int) -> bool:
    """Whether it is meant for that key; False for a text that cannot be read."""
    try:
        return key_of(token) == key
    except ValueError:
        return False


def did_you_mean(word: str, known: Sequence[str], *, listed: bool = True) -> str:
    """The end of a sentence about a word that nobody knows; with `listed`, where nothing is close, all that
    is known."""
    simple = word.lower().replace("-", "_").replace(" ", "_")
    close = difflib.get_close_matches(simple, known, n=1) or [one for one in known if one.lower() == simple]
    if close:
        return f", did you mean {shown(close[0])}?"
    return f": expected one of {', '.join(known)}" if listed else ""


def shown(value: object) -> str:
    """A value as JSON would have it, printable and short."""
    match value:
        case Mapping():
            return "an object"
        case list() | tuple():
            return "a list"
        case str():
            text = json.dumps(value, ensure_ascii=not value.isprintable())
        case _:
            text = json.dumps(value, default=str)
    return text if len(text) <= 60 else text[:57] + "..."


def shown_kind(value: object) -> str:
    """The same of what may be a secret, or hold one: what it is, and not what it says."""
    return f"a text of {len(value)} characters" if isinstance(value, str) else shown(value)


def _shown_token(token: Token) -> str:
    text = str(token)
    if not text.isprintable():
        text = text.encode("ascii", "backslashreplace").decode("ascii")
    return text if len(text) <= 60 else text[:57] + "..."
