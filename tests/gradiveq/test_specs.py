"""Methods as texts: what each part means, and what is refused with which words."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import pytest

from gradiveq.compressors import COMPRESSORS
from gradiveq.compressors.half import Half
from gradiveq.compressors.identity import Identity
from gradiveq.compressors.sign import Sign
from gradiveq.compressors.threshold import Threshold
from gradiveq.compressors.topk import TopK
from gradiveq.exchange.error_memory import ErrorFeedback
from gradiveq.methods import Accordion, AutoThreshold, Compressed, GradiVeQ, Plain, QSGDRing
from gradiveq.powersgd import PowerSGD
from gradiveq.specs import describe, known_names, parse, settled

EF = ErrorFeedback()


@pytest.mark.parametrize(
    ("text", "method"),
    [
        ("rar", Plain()),
        ("qsgd", QSGDRing()),
        ("gradiveq", GradiVeQ()),
        ("topk:0.02", Compressed(TopK(0.02))),
        ("topk:ratio=0.02@layer", Compressed(TopK(0.02))),
        ("topk:count=7@model", Compressed(TopK(count=7), "model")),
        ("topk:2e-2+ef", Compressed(TopK(0.02), feedback=EF)),
        ("threshold:1e+1@model+ef-scaled", Compressed(Threshold(10.0), "model", feedback=ErrorFeedback("scaled"))),
        ("hard-threshold:0.5", Compressed(Threshold(0.5))),
        ("threshold-v:0.5", Compressed(Threshold(0.5))),
        ("half:dtype=bfloat16:workers=8", Compressed(Half("bfloat16", 8))),
        ("half:collective=all_reduce", Compressed(Half())),
        (
            "topk/*.bias=identity/fc.*=half:bfloat16+ef",
            Compressed(TopK(), overrides=(("*.bias", Identity()), ("fc.*", Half("bfloat16"))), feedback=EF),
        ),
        ("topk@layer1.*|layer[23].*", Compressed(TopK(), ("layer1.*", "layer[23].*"))),
        ("topk:0.1+ef^topk:0.2", Compressed(TopK(0.1), feedback=EF, master=TopK(0.2))),
        ("sign:mean@model^sign", Compressed(Sign("mean"), "model", master=Sign())),
        ("powersgd", PowerSGD(4)),
        ("powersgd:2@layer+ef", PowerSGD(2)),
        (
            "powersgd:rank=2:error_feedback=false:warm_start=false:min_compression_rate=2",
            PowerSGD(2, False, False, 2.0),
        ),
        (
            "threshold:auto:0.01@model+ef",
            AutoThreshold("auto", 0.01, applied=Compressed(Threshold(), "model", feedback=EF)),
        ),
        (
            "hard-threshold:auto:warmup=50/*.bias=identity",
            AutoThreshold(warmup=50, applied=Compressed(Threshold(), overrides=(("*.bias", Identity()),))),
        ),
        (
            "threshold:simple:count=70^half",
            AutoThreshold("simple", count=70, applied=Compressed(Threshold(), master=Half())),
        ),
        (
            "accordion:topk:0.1|topk:0.01+ef",
            Accordion(Compressed(TopK(0.1), feedback=EF), Compressed(TopK(0.01), feedback=EF)),
        ),
        (
            "accordion:eta=0.3:interval=50:window=7:powersgd:4|powersgd:1",
            Accordion(PowerSGD(4), PowerSGD(1), 50, 7, 0.3),
        ),
        (
            "accordion:interval=30:identity/fc=half|topk:count=3@a.*|b.*+ef",
            Accordion(
                Compressed(Identity(), ("a.*", "b.*"), (("fc", Half()),), EF),
                Compressed(TopK(count=3), ("a.*", "b.*"), feedback=EF),
                30,
                3,
            ),
        ),
        (
            "accordion:half|topk@model^half",
            Accordion(Compressed(Half(), "model", master=Half()), Compressed(TopK(), "model", master=Half())),
        ),
    ],
)
def test_what_a_spec_means(text: str, method: object) -> None:
    assert parse(text) == method


def test_momentum_is_that_of_update_compression() -> None:
    for text, momentum in (("topk+ef", 0.0), ("topk+ef-scaled", 0.0), ("topk+ef-update", 0.9)):
        method = parse(text, momentum=0.9)
        assert isinstance(method, Compressed)
        assert method.feedback is not None
        assert method.feedback.momentum == momentum


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("foo", r"unknown method 'foo', known are rar, qsgd, gradiveq, .*identity, .*topk"),
        ("topk:a", "`ratio` must be a number, got 'a'"),
        ("topk:count=1.5", "`count` must be a whole number or none, got '1.5'"),
        ("topk:2", r"`ratio` .* in \(0, 1\], got 2\.0"),
        ("topk:0.1:7", "it takes ratio, count as FIELD=VALUE, got '7'"),
        ("topk:levels=7", "it has no 'levels', only ratio, count"),
        ("topk:0.1:ratio=0.1", "`ratio` is given twice"),
        ("natural:7", "it has no settings, got '7'"),
        ("sign:rule=both", "`rule` must be vote or mean or scaled, got 'both'"),
        ("randomk:unbiased=1", "`unbiased` must be true or false, got '1'"),
        (
            "topk:collective=all_reduce",
            "topk can't be added as they are, so all_gather is what fits; all_reduce is that of identity, .*half",
        ),
        ("half:collective=all_gather", "half are added on their way, so all_reduce is what fits"),
        ("half:collective=broadcast", "`collective` must be all_reduce or all_gather, got 'broadcast'"),
        ("topk+ef-nag", r"must be one of \+ef, \+ef-scaled, \+ef-update, got \+ef-nag"),
        ("topk+ef+ef", "comes once"),
        ("topk^topk+ef", r"the order is NAME, .*, \^MASTER"),
        ("topk@model/fc=half", "the order is NAME, settings, /PATTERN"),
        ("topk@", "after @ comes layer, model, or patterns"),
        ("topk@a||b", "after @ comes layer, model, or patterns"),
        ("topk/fc", "after / comes PATTERN=COMPRESSOR, got 'fc'"),
        ("topk/fc=half@model", "`overrides` must be empty with granularity 'model', .* 'layer' fits"),
        ("topk^rar", "rar is no compressor; these are identity"),
        ("qsgd+ef", "quantises, at each hop, the sum .* qsgd-gather is the compressor"),
        ("qsgd@layer", "or sees a layer by itself; qsgd-gather is the compressor"),
        ("qsgd:8", "qsgd takes its settings from options of its own"),
        ("rar+ef", "leaves nothing out"),
        ("gradiveq^half", "GradiVeQ has its own bases"),
        ("sign+ef", r"\(a majority\).* no `feedback` fits it. sign:scaled"),
        ("topk/fc.*=sign+ef", r"sign makes something else .* no `feedback` fits it"),
        ("sign^identity", "no `master` fits it. sign:mean"),
        ("powersgd@model", "an entire model or a group of layers has no rows and columns"),
        ("powersgd@a.*|b.*", "powersgd:RANK is all that it takes"),
        ("powersgd+ef-scaled", r"error feedback is that of gradients \(\+ef\)"),
        ("powersgd:error_feedback=false+ef", "contradict each other"),
        ("powersgd/fc=identity", "layer by layer"),
        ("powersgd^half", "for which no master is needed"),
        ("powersgd:0", "`rank` must be a whole number of at least 1, got 0"),
        ("threshold:auto:k=3", "it has no 'k', only formula, ratio, count, warmup"),
        ("threshold:simple:2", r"`ratio` must be above 0 and at most 1, got 2\.0"),
        ("threshold:auto:0.1:count=3", "by `ratio` or `count`, not both"),
        ("topk^threshold:auto", "`value` must be a number, got 'auto'"),
        ("accordion", "it takes two methods, the lower compression first"),
        ("accordion:topk:0.1", "it takes two methods, .* before them interval=, window=, eta="),
        ("accordion:topk|rar", "between compressors or between ranks of powersgd, not rar"),
        ("accordion:threshold:auto|topk", "not auto-threshold"),
        ("accordion:topk|powersgd", "`low` and `high` must both be Compressed or both PowerSGD"),
        ("accordion:powersgd:1|powersgd:4", "`low` must have the larger rank, got 1 and 4"),
        ("accordion:topk+ef|topk", "`feedback` must be the same in both settings"),
        ("accordion:eta=x:topk|topk", "`eta` must be a number, got 'x'"),
        ("accordion:interval=5:window=6:topk|topk", r"`window` must be a .* 1 to 5 \(the interval\), got 6"),
        ("accordion:interval=5:interval=6:topk|topk", "`interval` is given twice"),
    ],
)
def test_what_is_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        parse(text)
    assert str(caught.value).startswith(f"method {text!r}: ")
    assert "\n" not in str(caught.value)


def test_all_compressors_are_described_by_specs_that_are_right() -> None:
    specs = [spec for spec, _ in describe()]
    assert [spec.split(":")[0] for spec in specs] == list(COMPRESSORS)
    for spec, text in describe():
        method = parse(spec)
        assert isinstance(method, Compressed)
        assert method == parse(spec.split(":")[0])
        assert text
    assert len(set(known_names())) == len(known_names())


@dataclass(frozen=True)
class Anything:
    size: int | Literal["auto", "none"] = 3
    share: float = 0.5
    name: str = ""


def test_settings_of_any_dataclass() -> None:
    assert settled(Anything, ["auto", "share=1", "name=a=b"]) == Anything("auto", 1.0, "a=b")
    assert settled(Anything, ["5"]) == Anything(5)
    with pytest.raises(ValueError, match="`size` must be a whole number or auto or none, got 'x'"):
        settled(Anything, ["x"])


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"compressor": "topk"}, TypeError, "`compressor` must be a Compressor, got 'topk'"),
        ({"overrides": (("fc", None),)}, TypeError, "`compressor` must be a Compressor, got None"),
        ({"master": "topk"}, TypeError, "`master` must be a Compressor, got 'topk'"),
        ({"granularity": "group"}, ValueError, "`granularity` must be 'layer', 'model' or a tuple .* got 'group'"),
        ({"granularity": ()}, ValueError, "at least one pattern, got none"),
    ],
)
def test_invalid_compressed(arguments: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Compressed(**{"compressor": TopK(), **arguments})  # type: ignore[arg-type]
