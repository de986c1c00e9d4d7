"""Methods as short texts, for `--methods` and records: "topk:0.01@layer+ef".

    SPEC      NAME SETTINGS [/PATTERN=NAME SETTINGS ...] [@WHERE] [+FEEDBACK] [^NAME SETTINGS]
    SETTINGS  [:VALUE] [:FIELD=VALUE ...]       VALUE alone is that of the first field
    /         layers whose name matches the pattern have another compressor; identity to leave them alone
    WHERE     layer (the default, as in the papers' code), model, or groups of layers: PATTERN[|PATTERN ...]
    FEEDBACK  ef (gradients, Algorithm 2 of Sahu et al. 2021), ef-scaled (Algorithm 1), ef-update (Algorithm 3)
    ^         compresses the mean at a master, on its way back (Algorithm 1 of Dutta et al. 2020)

    topk:0.01                             1% of each layer
    topk:0.01@model+ef                    1% of the model, with error feedback
    topk:count=100/*.bias=identity+ef     100 elements of each layer, biases as they are
    half@layer1.*|layer2.*                two groups, and the other layers each by itself
    topk:0.01^topk:0.05                   both ways

A name is that of a compressor (`gradiveq.compressors`) or of another method (`gradiveq.methods`). Three have more to
say:

    powersgd:4                            rank 4, always by layer; with error feedback unless error_feedback=false
    threshold:auto:0.001@model+ef         hard-threshold, λ from a warm-up; fields as of `methods.AutoThreshold`
    threshold:simple:count=1000+ef        λ = 1/(2√1000)
    accordion:topk:0.1|topk:0.01+ef       the lower and the higher compression; what follows the higher one's
    accordion:eta=0.3:powersgd:4|powersgd:1        settings is of both. interval=, window= and eta= come first
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from gradiveq.compressors import COMPRESSORS, Compressor
from gradiveq.compressors.threshold import Threshold
from gradiveq.exchange.error_memory import ErrorFeedback, Form
from gradiveq.methods import METHODS, Accordion, AutoThreshold, Compressed, GradiVeQ, Method
from gradiveq.powersgd import PowerSGD

T = TypeVar("T")

#: Other names of compressors.
ALIASES = {"hard-threshold": "threshold", "threshold-v": "threshold"}
FEEDBACKS: dict[str, Form] = {"ef": "gradient", "ef-scaled": "scaled", "ef-update": "update"}
#: What doesn't go with a method that is no compressor: why, and what would fit.
UNFIT = {
    "rar": (
        "plain ring all-reduce leaves nothing out and has no parts",
        "identity is the compressor that does nothing",
    ),
    "qsgd": (
        "QSGD in the ring quantises, at each hop, the sum that it has so far of the whole vector: no worker knows what "
        "was left out of its own gradient, or sees a layer by itself",
        "qsgd-gather is the compressor",
    ),
    "gradiveq": (
        "GradiVeQ has its own bases for each convolution and sends what it can't compress as it is",
        "powersgd is another method of low rank, with error feedback",
    ),
    "powersgd": (
        "PowerSGD approximates matrices, layer by layer: an entire model or a group of layers has no rows and columns, "
        "a worker's error feedback is that of gradients (+ef), and P and Q are sums already, for which no master is "
        "needed",
        "powersgd:RANK is all that it takes; for others topk is a compressor",
    ),
}
#: Methods whose settings are other options of a command.
WITHOUT_SETTINGS = ("rar", "qsgd", "gradiveq")
#: ACCORDION's settings, which come before its two methods.
REGIME_SETTINGS = ("interval=", "window=", "eta=")


def parse(text: str, *, momentum: float = 0.0) -> Method:
    """The method that a spec says.

    Args:
        momentum: of error feedback of the form "update", whose momentum is the workers'.
    Raises:
        ValueError: one line, with the spec, what is wrong with it, and what would fit.
    """
    try:
        return _parse(text, momentum)
    except (TypeError, ValueError) as error:
        raise ValueError(f"method {text!r}: {error}") from error


def known_names() -> list[str]:
    return [*METHODS, Accordion.name, *COMPRESSORS]


def describe() -> list[tuple[str, str]]:
    """A spec of every compressor with all fields and their defaults, and the first line that says what it is."""
    found = []
    for name, kind in COMPRESSORS.items():
        fields = [f"{field.name}={str(field.default).lower()}" for field in _fields(kind)]
        found.append((":".join([name, *fields]), (kind.__doc__ or "").strip().splitlines()[0]))
    return found


def _parse(text: str, momentum: float) -> Method:
    if text.split(":")[0] == Accordion.name:
        return _accordion(text, momentum)
    rest, caret, master = text.partition("^")
    feedback = None
    found = re.search(r"\+(ef[^+]*)$", rest)
    if found:
        if found[1] not in FEEDBACKS:
            raise ValueError(f"error feedback must be one of +{', +'.join(FEEDBACKS)}, got +{found[1]}")
        form = FEEDBACKS[found[1]]
        feedback = ErrorFeedback(form, momentum if form == "update" else 0.0)
        rest = rest[: found.start()]
    rest, at, where = rest.partition("@")
    if "+ef" in rest + where + master or "/" in where + master or "@" in where + master:
        raise ValueError("the order is NAME, settings, /PATTERN=…, @WHERE, +ef…, ^MASTER, and +ef… comes once")
    first, *overrides = rest.split("/")
    name = first.split(":")[0]
    if name == PowerSGD.name and where in ("", "layer") and feedback in (None, ErrorFeedback()):
        if feedback is not None and "error_feedback=false" in first.split(":"):
            raise ValueError("error_feedback=false and +ef contradict each other")
        at, feedback = "", None
    if name == GradiVeQ.name and feedback == ErrorFeedback() and not (overrides or at or caret):
        return GradiVeQ(error_feedback=True)
    if name in METHODS:
        if overrides or at or caret or feedback is not None:
            why, fitting = UNFIT.get(name, (f"{name} has no layers, feedback or master to choose", "its settings do"))
            raise ValueError(f"{why}; {fitting}")
        return _method(name, first.split(":")[1:])
    granularity: Any = where if where in ("layer", "model") else tuple(where.split("|"))
    if at and not all(granularity):
        raise ValueError("after @ comes layer, model, or patterns of layers' names separated by |")
    formula = first.split(":")[1:2]
    decided = ALIASES.get(name, name) == Threshold.name and formula in (["auto"], ["simple"])
    applied = Compressed(
        Threshold() if decided else _compressor(first),
        granularity if at else "layer",
        tuple(_override(one) for one in overrides),
        feedback,
        _compressor(master) if caret else None,
    )
    return _auto_threshold(first.split(":")[1:], applied) if decided else applied


def _accordion(text: str, momentum: float) -> Accordion:
    """What comes after the second method's settings is of both."""
    body = text.split(":")[1:]
    settings = []
    while body and body[0].startswith(REGIME_SETTINGS):
        settings.append(body.pop(0))
    low, bar, high = ":".join(body).partition("|")
    if not bar:
        raise ValueError(
            "it takes two methods, the lower compression first: accordion:topk:0.1|topk:0.01+ef; before them "
            f"{', '.join(REGIME_SETTINGS)}"
        )
    common = re.search(r"@|\+ef|\^", high)
    methods = [_parse(one, momentum) for one in (low + (high[common.start() :] if common else ""), high)]
    for method in methods:
        if not isinstance(method, Compressed | PowerSGD):
            raise ValueError(f"it switches between compressors or between ranks of powersgd, not {method.name}")
    return settled(Accordion, settings, {"low": methods[0], "high": methods[1]})


def _auto_threshold(settings: Sequence[str], applied: Compressed) -> AutoThreshold:
    """Its formula comes first; a value alone after it is the ratio."""
    formula, *rest = settings
    if rest and "=" not in rest[0]:
        rest[0] = f"ratio={rest[0]}"
    return settled(AutoThreshold, [f"formula={formula}", *rest], {"applied": applied})


def _method(name: str, settings: Sequence[str]) -> Method:
    if settings and name in WITHOUT_SETTINGS:
        raise ValueError(f"{name} takes its settings from options of its own, not from :{':'.join(settings)}")
    return settled(METHODS[name], settings)


def _override(text: str) -> tuple[str, Compressor]:
    pattern, equals, spec = text.partition("=")
    if not (pattern and equals):
        raise ValueError(f"after / comes PATTERN=COMPRESSOR, got {text!r}")
    return pattern, _compressor(spec)


def _compressor(text: str) -> Compressor:
    name, *settings = text.split(":")
    name = ALIASES.get(name, name)
    if name not in COMPRESSORS:
        if name in METHODS:
            raise ValueError(f"{name} is no compressor; these are {', '.join(COMPRESSORS)}")
        raise ValueError(f"unknown method {name!r}, known are {', '.join(known_names())}")
    kind = COMPRESSORS[name]
    collectives = [setting.removeprefix("collective=") for setting in settings if setting.startswith("collective=")]
    if collectives and collectives != [kind.collective]:
        others = [other for other, one in COMPRESSORS.items() if one.collective == collectives[0]]
        if not others:
            raise ValueError(f"`collective` must be all_reduce or all_gather, got {collectives[0]!r}")
        reason = "can't be added as they are" if kind.collective == "all_gather" else "are added on their way"
        raise ValueError(
            f"payloads of {name} {reason}, so {kind.collective} is what fits; {collectives[0]} is that of "
            f"{', '.join(others)}"
        )
    return settled(kind, [setting for setting in settings if not setting.startswith("collective=")])


def settled(kind: type[T], settings: Sequence[str], given: Mapping[str, Any] | None = None) -> T:
    """An object of a dataclass from texts "VALUE" (of its first field, and only first) and "FIELD=VALUE".

    Args:
        given: fields that no text says.
    Raises:
        ValueError: there is no such field, or the text is none of its values.
    """
    given = given or {}
    names = [field.name for field in _fields(kind) if field.name not in given]
    hints = get_type_hints(kind)
    values: dict[str, Any] = {}
    for place, setting in enumerate(settings):
        name, equals, value = setting.partition("=")
        if not equals:
            if place or not names:
                takes = f"takes {', '.join(names)} as FIELD=VALUE" if names else "has no settings"
                raise ValueError(f"it {takes}, got {setting!r}")
            name, value = names[0], setting
        if name not in names:
            raise ValueError(f"it has no {name!r}, only {', '.join(names) or 'a name'}")
        if name in values:
            raise ValueError(f"`{name}` is given twice")
        values[name] = _value(name, value, hints[name])
    return kind(**values, **given)


def _fields(kind: type[Any]) -> Sequence[dataclasses.Field[Any]]:
    return dataclasses.fields(kind) if dataclasses.is_dataclass(kind) else ()


#: How the values of a type are said.
_READ: Mapping[Any, Any] = {
    int: int,
    float: float,
    str: str,
    bool: {"true": True, "false": False}.__getitem__,
    NoneType: {"none": None}.__getitem__,
}


def _value(name: str, text: str, hint: Any) -> Any:
    """What a text says, of a type that is one of `_READ`, a Literal, or a union of these."""
    kinds = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    expected = []
    for kind in kinds:
        if get_origin(kind) is Literal:
            if text in get_args(kind):
                return text
            expected += list(get_args(kind))
            continue
        try:
            return _READ[kind](text)
        except (KeyError, ValueError):
            shown = {int: "a whole number", float: "a number", bool: "true or false", NoneType: "none"}
            expected.append(shown.get(kind, str(kind)))
    raise ValueError(f"`{name}` must be {' or '.join(expected)}, got {text!r}")
