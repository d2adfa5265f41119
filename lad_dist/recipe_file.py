"""Read recipes from YAML with overrides, reporting all faults at once; write the resolved recipe."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from lad_dist.errors import RecipeError
from lad_dist.methods import preset
from lad_dist.recipe import PROTOCOLS, Recipe

M = TypeVar("M", bound=BaseModel)


_MOST_BYTES = 2**20  # limit on the size of a recipe or profile
_LONGEST_SHOWN = 100  # characters of a value in a message
_DEEPEST, _MOST_ALIASES = 32, 32  # a few hundred bytes of nested aliases can expand beyond any memory


class _Loader(yaml.SafeLoader):
    """Safe YAML loader that refuses duplicate keys, deep nesting and many aliases, and reads numbers as users expect.

    YAML 1.1 reads 1e-5 as text, 010 as 8 and 1:30 as 90: here the first is a number, the others are text.
    """

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self._depth = self._aliases = 0
        self._open: list[str | None] = []  # anchors of the nodes being read

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """Compose a node within limits. Raises MarkedYAMLError beyond them."""
        event = self.peek_event()  # type: ignore[no-untyped-call]
        mark: Any = event.start_mark
        if isinstance(event, yaml.AliasEvent):
            self._aliases += 1
            if event.anchor in self._open:
                raise yaml.MarkedYAMLError(problem=f"*{event.anchor} contains itself", problem_mark=mark)
            if self._aliases > _MOST_ALIASES:
                raise yaml.MarkedYAMLError(
                    problem=f"more than {_MOST_ALIASES} aliases (*{event.anchor})", problem_mark=mark
                )
        self._depth += 1
        if self._depth > _DEEPEST:
            raise yaml.MarkedYAMLError(problem=f"nested more than {_DEEPEST} deep", problem_mark=mark)
        self._open.append(None if isinstance(event, yaml.AliasEvent) else event.anchor)
        try:
            return super().compose_node(parent, index)
        finally:
            self._depth -= 1
            self._open.pop()


def _loaded(text: str) -> Any:
    """Parse YAML. Raises YAMLError for any fault."""
    try:
        return yaml.load(text, Loader=_Loader)  # noqa: S506 - a subclass of SafeLoader
    except (ValueError, OverflowError, RecursionError) as error:  # a number or a date that Python cannot hold
        raise yaml.YAMLError(str(error).partition(";")[0]) from error


def _mapping_without_duplicates(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: dict[Any, int] = {}
    for key_node, _ in node.value:
        key = loader.construct_object(key_node, deep=True)
        if not isinstance(key, str):
            raise yaml.MarkedYAMLError(problem=f"key {key!r} is not text", problem_mark=key_node.start_mark)
        if key in seen:
            raise yaml.MarkedYAMLError(
                problem=f"key {key!r} is given twice (first on line {seen[key]})", problem_mark=key_node.start_mark
            )
        seen[key] = key_node.start_mark.line + 1
    return loader.construct_mapping(node, deep=True)


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping_without_duplicates)
_NUMBERS = {
    "tag:yaml.org,2002:int": r"[-+]?(0|[1-9][0-9_]*)$",
    "tag:yaml.org,2002:float": r"[-+]?(([0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*)([eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+"
    r"|\.(inf|Inf|INF))$|\.(nan|NaN|NAN)$",
}
_BOOL = "tag:yaml.org,2002:bool"  # true and false alone: on, off, yes and no are text
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in (*_NUMBERS, _BOOL)]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


_Loader.add_implicit_resolver(_BOOL, re.compile(r"(true|True|TRUE|false|False|FALSE)$"), list("tTfF"))


class _Dumper(yaml.SafeDumper):
    """Dumper that quotes text which this loader or a YAML 1.1 loader would read as a number."""


for _of in (_Loader, _Dumper):
    for _tag, _pattern in _NUMBERS.items():
        _of.add_implicit_resolver(_tag, re.compile(_pattern), list("-+.0123456789"))


def parse_yaml(text: str, source: str) -> dict[str, Any]:
    """Parse the mapping in ``text``. Raises RecipeError with ``source``, the line and the fault."""
    try:
        doc = _loaded(text)
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        raise RecipeError(f"{source}{line}: not valid YAML: {error.problem}") from None
    except yaml.YAMLError as error:
        raise RecipeError(f"{source}: not valid YAML: {' '.join(str(error).split())}") from None
    if doc is None:
        return {}
    if not isinstance(doc, dict):
        raise RecipeError(f"{source}: holds {type(doc).__name__} where a mapping of fields is valid")
    return doc


def read_document(path: Path) -> dict[str, Any]:
    """Read the mapping in a YAML file. Raises RecipeError where it cannot be read."""
    try:
        with path.open("rb") as file:  # may be a pipe, but not an endless device
            raw = file.read(_MOST_BYTES + 1)
        if len(raw) > _MOST_BYTES:
            raise RecipeError(f"{path}: has more than {_MOST_BYTES:,} bytes; valid: a recipe or profile")
        text = raw.decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = os.strerror(error.errno) if isinstance(error, OSError) and error.errno else "is not UTF-8 text"
        raise RecipeError(f"{path}: cannot be read: {reason}") from None
    document = parse_yaml(text, str(path))
    if not document:  # more likely left by a full disk or a crash than meant as all defaults
        raise RecipeError(f"{path}: is empty; valid: at least one field, for example name: {path.stem}")
    return document


def load(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Load the recipe in ``path`` with ``--set`` overrides (``"a.b=c"``). Raises RecipeError with all faults."""
    return from_document(read_document(path), overrides, str(path))


def from_document(doc: dict[str, Any], overrides: Sequence[str] = (), source: str = "recipe") -> Recipe:
    """Make a recipe from a plain mapping; ``source`` names it in messages."""
    before, protocol, network = doc.get("method"), _protocol(doc), _section(doc, "model").get("network")
    doc, sources, faults = apply_overrides(doc, overrides)
    if "method" in sources:  # lad for an unknown one
        _forget(doc, sources, "distill", {f for m in (before, doc["method"]) for f in preset(m) or preset("lad")})
    if _protocol(doc) != protocol:
        _forget(doc, sources, "evaluate", {f for fields in PROTOCOLS.values() for f in fields})
    changed = network is not None and _section(doc, "model").get("network") != network
    if changed and _section(doc, "evaluate").get("architectures") == [network]:
        _forget(doc, sources, "evaluate", ["architectures"])  # they followed the network of a resolved recipe
    _forget_half_a_bound(doc, sources)
    return validated(Recipe, doc, source, sources, faults)


def _section(doc: dict[str, Any], name: str) -> dict[str, Any]:
    found = doc.get(name)
    return found if isinstance(found, dict) else {}


def _forget_half_a_bound(doc: dict[str, Any], sources: dict[str, str]) -> None:
    """Delete one of start_epoch_max_first and start_epoch_growth without the other from a resolved recipe.

    Older versions accepted it, without effect, and a run folder must still open.
    """
    d, fields = _section(doc, "distill"), ("start_epoch_max_first", "start_epoch_growth")
    overridden = any(f"distill.{field}" in sources for field in fields)
    if all(field in d for field in fields) and (d[fields[0]] is None) != (d[fields[1]] == 0) and not overridden:
        _forget(doc, sources, "distill", fields)


def _protocol(doc: dict[str, Any]) -> object:
    return _section(doc, "evaluate").get("protocol") or "lad"


def _forget(doc: dict[str, Any], sources: dict[str, str], section: str, fields: Iterable[str]) -> None:
    """Delete the fields of a preset that is replaced, except explicitly overridden ones.

    A resolved recipe spells its presets' fields out; another preset must not inherit them.
    """
    if isinstance(doc.get(section), dict):
        for field in fields:
            if f"{section}.{field}" not in sources:
                doc[section].pop(field, None)


def apply_overrides(doc: dict[str, Any], overrides: Sequence[str]) -> tuple[dict[str, Any], dict[str, str], list[str]]:
    """Return a copy of ``doc`` with each ``a.b=c`` set, the option that set each field, and the options' faults."""
    doc = _copied(doc)
    sources: dict[str, str] = {}
    faults: list[str] = []
    for item in overrides:
        field, equals, text = item.partition("=")
        field = field.strip()
        if not equals or not all(field.split(".")):
            faults.append(f"--set {item}: is not of the form field=value, for example distill.iterations=500")
            continue
        try:
            value = _loaded(text)
        except yaml.YAMLError:
            faults.append(f"--set {item}: the value is not valid YAML")
            continue
        *parents, leaf = field.split(".")
        node = doc
        for name in parents:
            if not isinstance(node.get(name), dict):
                node[name] = {}
            node = node[name]
        node[leaf] = value
        sources[field] = f"--set {item}"
    return doc, sources, faults


def _copied(doc: dict[str, Any]) -> dict[str, Any]:
    return {k: _copied(v) if isinstance(v, dict) else v for k, v in doc.items()}


def validated(
    model: type[M], doc: dict[str, Any], source: str, sources: dict[str, str] | None = None, faults: Sequence[str] = ()
) -> M:
    """Validate ``doc`` as ``model``. Raises RecipeError with one line per fault: source, field, fault, valid values."""
    lines = list(faults)
    built: M | None = None
    try:
        built = model.model_validate({k: v for k, v in doc.items() if v is not None})
    except ValidationError as error:
        for detail in error.errors():
            lines.extend(_fault_lines(model, detail, source, sources or {}))
    if lines or built is None:
        raise RecipeError(lines)
    return built


def _fault_lines(model: type[BaseModel], detail: ErrorDetails, source: str, sources: dict[str, str]) -> Iterator[str]:
    field = ".".join(str(part) for part in detail["loc"] if not (isinstance(part, str) and "[" in part))
    where = next((sources[f] for f in sources if field == f or field.startswith(f + ".")), f"{source}: {field}")
    if detail["type"] == "extra_forbidden":
        where = next((sources[f] for f in sources if f.startswith(field + ".")), where)  # an unknown section
        yield f"{where}: unknown key; {_suggestion(model, field)}"
    elif detail["type"] == "value_error" and not field:
        for line in str(detail["ctx"]["error"]).split("\n"):
            owner = sources.get(line.partition(":")[0])
            yield f"{owner}: {line.partition(': ')[2]}" if owner else f"{source}: {line}"
    else:
        message = detail["msg"][0].lower() + detail["msg"][1:]
        yield f"{where}: {_brief(detail['input'])}: {message.replace('input should', 'should')}"


def _brief(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _LONGEST_SHOWN else f"{text[:_LONGEST_SHOWN]}..."


def fields_of(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every dotted field name of a typed document with its pydantic field, depth first."""
    for name, info in model.model_fields.items():
        kind = info.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            yield from fields_of(kind, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", info


def _suggestion(model: type[BaseModel], field: str) -> str:
    known = dict(fields_of(model))
    sections = {name.rpartition(".")[0] for name in known} - {""}
    if "." not in field:
        known.update(dict.fromkeys(sections))
    section, _, leaf = field.rpartition(".")

    def likeness(candidate: str) -> float:
        other_section, _, other = candidate.rpartition(".")
        ratio = difflib.SequenceMatcher(None, leaf, other).ratio()
        within = 0.6 if leaf in other or other in leaf else 0.0
        return max(ratio, within) + (0.2 if section == other_section else 0.0)

    best = max(known, key=likeness)
    info = known[best]
    if info is None:
        return f"did you mean {best}?"
    default = info.get_default(call_default_factory=True)
    return f"did you mean {best} (default {_shown(default)})?"


def _shown(value: Any) -> str:
    return "none" if value is None else str(list(value)) if isinstance(value, tuple) else str(value)


def dump(recipe: BaseModel, header: str = "") -> str:
    """Format the resolved recipe as YAML with all fields; ``header`` becomes comment lines."""
    return as_yaml(recipe.model_dump(mode="json"), header)


def as_yaml(doc: dict[str, Any], header: str = "") -> str:
    """Format a document as YAML; ``header`` becomes comment lines."""
    comment = "".join(f"# {line}\n" for line in header.splitlines())
    return comment + yaml.dump(doc, Dumper=_Dumper, sort_keys=False, allow_unicode=True)
