"""Python types of arguments: `typed` holds the public functions to their annotations."""

import dataclasses
import functools
import inspect
import numbers
import types
import typing
from collections.abc import Callable, Sequence

import numpy as np
import torch

HALF_DTYPES = (torch.float16, torch.bfloat16)


def typed(function: Callable) -> Callable:
    """Decorate a public function: an argument that is not what its annotation says raises a TypeError with its name.

    Numbers of numpy become Python's; a float that happens to be whole is no integer. Under autocast half-precision
    tensors become float32, and the function runs without it.
    """
    parameters = inspect.signature(function).parameters.values()
    rules = {p.name: _rule(p.annotation) for p in parameters if p.annotation is not p.empty}
    names = tuple(p.name for p in parameters if p.kind is not p.KEYWORD_ONLY)
    exact = tuple(rules[name].exact if name in rules else _Anything() for name in names)
    exact_by_name = {name: rule.exact for name, rule in rules.items()}

    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        if torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda"):
            with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
                return wrapper(*map(_widened, args), **{name: _widened(value) for name, value in kwargs.items()})
        for value, types_ in zip(args, exact):
            if type(value) not in types_:
                break
        else:
            for name, value in kwargs.items():
                if name in exact_by_name and type(value) not in exact_by_name[name]:
                    break
            else:
                return function(*args, **kwargs)
        named = [rules[name](name, value) if name in rules else value for name, value in zip(names, args)]
        args = (*named, *args[len(names) :])
        kwargs = {name: rules[name](name, value) if name in rules else value for name, value in kwargs.items()}
        return function(*args, **kwargs)

    return wrapper


class _Anything:
    def __contains__(self, item: type) -> bool:
        return True


def _widened(value):
    if isinstance(value, torch.Tensor):
        return value.float() if value.dtype in HALF_DTYPES else value
    if isinstance(value, tuple) and hasattr(value, "_fields"):  # a NamedTuple stays one
        return type(value)(*map(_widened, value))
    return [_widened(item) for item in value] if isinstance(value, (list, tuple)) else value


@dataclasses.dataclass(frozen=True)
class _Rule:
    """What one argument may be.

    words: for the message; exact: types that are fine without a look; convert: (name, value) -> the value to pass on,
    or NotImplemented where it is of another type.
    """

    words: str
    exact: frozenset[type]
    convert: Callable

    def __call__(self, name: str, value):
        if type(value) in self.exact:
            return value
        converted = self.convert(name, value)
        if converted is NotImplemented:
            raise TypeError(f"{name}: expected {self.words}, got {said(value)}")
        return converted


def said(value) -> str:
    """What came, for a message: the value where it is short, otherwise its type."""
    plain = value is None or isinstance(value, (str, bool, numbers.Number)) or (
        isinstance(value, (list, tuple)) and all(isinstance(item, (str, numbers.Number)) for item in value))
    text = repr(value) if plain else ""
    return text if 0 < len(text) <= 60 else type(value).__name__


def _rule(hint) -> _Rule:
    """The rule of one annotation."""
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return _union([_rule(part) for part in parts])
    if origin is tuple:
        items = [_rule(part) for part in parts]
        count = ("no", "one", "two", "three", "four")[len(items)]
        return _Rule(f"{count} {_plural(items[0])}", frozenset(), functools.partial(_items, items))
    if origin is Sequence:
        item = _rule(parts[0])
        return _Rule(f"a sequence of {_plural(item)}", frozenset(), functools.partial(_items, item))
    if hint in _SIMPLE:
        return _SIMPLE[hint]
    hint = origin or hint
    if hint is Callable:
        return _Rule("a function", frozenset(), lambda name, value: value if callable(value) else NotImplemented)
    has_fields = dataclasses.is_dataclass(hint) or getattr(hint, "_is_protocol", False)
    fields = typing.get_type_hints(hint) if has_fields else {}
    fields = {name: _rule(part) for name, part in fields.items() if torch.Tensor in (part, *typing.get_args(part))}
    words = f"a {hint.__name__}"
    if not fields:
        return _Rule(words, frozenset((hint,)), _instance(hint))
    return _Rule(words, frozenset(), functools.partial(_with_fields, hint, fields))


def _plural(rule: _Rule) -> str:
    return rule.words.removeprefix("an ").removeprefix("a ") + "s"


def _union(rules: list[_Rule]) -> _Rule:
    def convert(name, value):
        for rule in rules:
            converted = rule.convert(name, value)
            if converted is not NotImplemented:
                return converted
        return NotImplemented

    return _Rule(" or ".join(rule.words for rule in rules), frozenset().union(*(rule.exact for rule in rules)), convert)


def _items(rules: _Rule | list[_Rule], name: str, value):
    is_sequence = isinstance(value, Sequence) and not isinstance(value, (str, bytes))
    if not is_sequence and not (isinstance(value, np.ndarray) and value.ndim == 1):
        return NotImplemented
    if isinstance(rules, list):
        if len(value) != len(rules):
            return NotImplemented
        return tuple(rule(f"{name}[{i}]", item) for i, (rule, item) in enumerate(zip(rules, value)))
    return [rules(f"{name}[{i}]", item) for i, item in enumerate(value)]


def _with_fields(hint: type, fields: dict[str, _Rule], name: str, value):
    if not getattr(hint, "_is_protocol", False) and not isinstance(value, hint):
        return NotImplemented
    for field, rule in fields.items():
        item = getattr(value, field, NotImplemented)
        if item is NotImplemented:
            return NotImplemented
        if type(item) not in rule.exact:
            rule(f"{name}.{field}", item)
    return value


def _instance(*kinds: type) -> Callable:
    return lambda name, value: value if isinstance(value, kinds) else NotImplemented


def _number(name: str, value):
    if isinstance(value, (torch.SymFloat, torch.SymInt)):
        return value
    is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    return float(value) if is_number else NotImplemented


def _integer(name: str, value):
    if isinstance(value, torch.SymInt):
        return value
    is_integer = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    return int(value) if is_integer else NotImplemented


def _truth(name: str, value):
    return bool(value) if type(value).__name__ in ("bool", "bool_") else NotImplemented  # numpy's too


_SIMPLE = {
    torch.Tensor: _Rule("a tensor", frozenset((torch.Tensor, torch.nn.Parameter)), _instance(torch.Tensor)),
    float: _Rule("a number", frozenset((float, int)), _number),
    int: _Rule("an integer", frozenset((int,)), _integer),
    bool: _Rule("True or False", frozenset((bool,)), _truth),
    str: _Rule("a string", frozenset((str,)), _instance(str)),
    type(None): _Rule("None", frozenset((type(None),)), _instance(type(None))),
    torch.dtype: _Rule("a torch.dtype", frozenset((torch.dtype,)), _instance(torch.dtype)),
    torch.device: _Rule("a torch.device", frozenset((torch.device,)), _instance(torch.device)),
}
