"""What `bench.advise` has to say: plain words, one table, one figure, and the record of all of it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from tabulate import tabulate

from bench.advice.costs import PLAIN, MeasuredCosts
from bench.advice.prediction import Against, Compared, Prediction, Situation
from bench.advice.risk import Elsewhere, Probed
from bench.common.files import read_object
from bench.common.texts import commit_text, machine_text, sentences
from bench.drawing import page
from bench.drawing.styles import method_style
from bench.virtual.scaling import PAYS, bandwidth_text, stretch_text
from ring.cluster import as_table

#: What decides where messages are so small that bytes don't.
STEPS = "an all-gather takes half of the steps of an all-reduce, and what latency does has not been validated"


@dataclass(frozen=True)
class Asked:
    """What is known of a model whatever the cluster.

    Attributes:
        probed: what the probe found, by method.
        probe: what was probed, or why nothing was.
    """

    task: str
    measured: MeasuredCosts
    probed: Mapping[str, Probed]
    probe: str


@dataclass(frozen=True)
class Answer:
    """All that is said about a model on a cluster.

    Attributes:
        ratio: K/d of GradiVeQ.
        computing: where the seconds of computing come from.
        predictions: predictions by method, PLAIN first.
        gains: bandwidths at which a method is faster than plain DDP; pays: by PAYS or more.
        sweep: predictions by method, over the bandwidths.
        elsewhere: what was recorded of other models, by method.
        also: what GradiVeQ compresses besides convolutions.
        searched: the folder in which there are no recorded results; "" if there are some.
    """

    asked: Asked
    situation: Situation
    batch_size: int
    ratio: float
    computing: str
    predictions: Mapping[str, Prediction]
    gains: Mapping[str, list[tuple[float | None, float | None]]]
    pays: Mapping[str, list[tuple[float | None, float | None]]]
    sweep: Mapping[str, Sequence[Compared]]
    elsewhere: Mapping[str, Sequence[Elsewhere]]
    also: Sequence[str] = ()
    searched: str = ""

    @property
    def gbps(self) -> float:
        return self.situation.cluster.link.bandwidth_gbps

    def speedup(self, method: str) -> float:
        return self.predictions[PLAIN].time_s / self.predictions[method].time_s

    def gathers(self, method: str) -> bool:
        return self.asked.measured.costs[method].gathers

    @property
    def by_speed(self) -> list[str]:
        """Methods, the fastest first."""
        return sorted((name for name in self.predictions if name != PLAIN), key=self.speedup, reverse=True)


# --- words and the table ---------------------------------------------------------------------------------------------


def bytes_text(num_bytes: float) -> str:
    """Of 10^6 bytes and the like: "1.88 MB"."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if num_bytes >= size:
            return f"{num_bytes / size:.3g} {unit}" if num_bytes < 999.5 * size else f"{num_bytes / size:.0f} {unit}"
    return f"{num_bytes:.0f} B"


def seconds_text(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds >= 1 else f"{1e3 * seconds:.3g} ms"


def _where(found: Answer, method: str, stretched: Sequence[tuple[float | None, float | None]]) -> str:
    against = Against(found.situation, method)
    return ", ".join(stretch_text(against, ends) for ends in stretched) or "nowhere"


def risk_text(found: Answer, method: str) -> str:
    """What is known of the risk, in few words for the table."""
    seen = found.asked.probed.get(method)
    here = f"loss {seen.loss:.2g} at ratio {seen.ratio:.3g}" if seen is not None and seen.loss is not None else ""
    others = found.elsewhere[method][:1]
    there = f"{others[0].setting}: {others[0].result}" if others else ""
    return "; ".join(text for text in (here, there) if text) or "unknown"


def table(found: Answer, form: str = "simple") -> str:
    """One row per method."""
    rows = []
    for name in (PLAIN, *found.by_speed):
        prediction, cost = found.predictions[name], found.asked.measured.costs[name]
        rows.append(
            [
                name,
                seconds_text(prediction.time_s),
                f"{found.speedup(name):.2f}",
                bytes_text(prediction.bytes_sent),
                bytes_text(cost.extra_bytes(found.situation.cluster.nodes)),
                "-" if name == PLAIN else _where(found, name, found.gains[name]),
                "none" if name == PLAIN else risk_text(found, name),
            ]
        )
    rows += [
        [name, "-", "-", "-", "-", "-", f"not possible: {why}"] for name, why in found.asked.measured.refused.items()
    ]
    heads = ["method", "iteration", "speed-up", "bytes sent", "extra memory", "faster than plain", "accuracy risk"]
    align = ("left", "right", "right", "right", "right", "left", "left")
    widths = [None] * 5 + ([26, 60] if form == "simple" else [None, None])
    return str(tabulate(rows, heads, tablefmt=form, disable_numparse=True, colalign=align, maxcolwidths=widths))


def words(found: Answer) -> list[str]:
    """The answer, then what it rests on; a sentence or some per line."""
    cluster, asked, measured = found.situation.cluster, found.asked, found.asked.measured
    plainly = found.predictions[PLAIN]
    computing_s = found.situation.computing_s
    limit = plainly.time_s / computing_s
    exposed_s = plainly.time_s - computing_s
    lines = [_verdict(found, limit)]
    lines.append(
        f"Plain DDP takes {seconds_text(plainly.time_s)} per iteration, of which {seconds_text(computing_s)} are "
        f"computing. The network is busy for {seconds_text(plainly.compressed.network_s)}; "
        f"{seconds_text(exposed_s)} of an iteration ({exposed_s / plainly.time_s:.0%}) are not hidden behind backward. "
        f"So no method can make it more than {limit:.2f} times as fast."
    )
    lines.append(
        f"{asked.task}: {sum(measured.lengths):,} parameters, {bytes_text(4 * sum(measured.lengths))} of gradient in "
        f"{len(measured.lengths)} bucket{'s' if len(measured.lengths) > 1 else ''}, {found.batch_size} "
        f"examples per node. {cluster.name}: {cluster.nodes} nodes, {bandwidth_text(found.gbps)}, latency "
        f"{cluster.link.latency_us:g} us ({cluster.source or 'no source given'})."
    )
    lines.append(f"Computing: {found.computing}.")
    slower = [name for name in found.by_speed if found.speedup(name) < 1]
    if slower:
        texts = [f"{name} ({found.speedup(name):.2f})" for name in slower]
        lines.append(f"Slower than plain DDP here: {', '.join(texts)}.")
    larger = [
        name
        for name in found.by_speed
        if found.gains[name] and found.gathers(name) and found.predictions[name].bytes_sent >= plainly.bytes_sent
    ]
    if larger:
        lines.append(
            f"No fewer bytes than plain DDP's: {', '.join(larger)}. Where the table calls that faster, it is only "
            f"because {STEPS}."
        )
    lines.append(
        f"Accuracy: the probe was {asked.probe}."
        if not asked.probed
        else f"Accuracy: losses are ||g' - g||^2 / ||g||^2 without error feedback, of {asked.probe}."
    )
    failed = {name: one.why_not for name, one in asked.probed.items() if one.loss is None}
    lines += [f"Not probed: {name}, as {why}." for name, why in failed.items()]
    unknown = [name for name in found.by_speed if risk_text(found, name) == "unknown"]
    if unknown:
        lines.append(f"What these do to accuracy is unknown: {', '.join(unknown)}.")
    sources = sorted({one.source for ones in found.elsewhere.values() for one in ones[:1]})
    if sources:
        lines.append(
            f"What other models came to is from {', '.join(f'results/{one}' for one in sources)}: small sizes, and not "
            "your model."
        )
    if found.searched:
        lines.append(
            f"No results of other models were found in {found.searched}. The project's repository has them in "
            "results/, an installed package hasn't: --results names the folder."
        )
    if any(cost.fit_bytes for cost in measured.costs.values()):
        window = next(iter(found.situation.windows.values()), None)
        if window is not None:
            besides = f", and compresses {', '.join(found.also)} besides convolutions" if found.also else ""
            lines.append(
                f"GradiVeQ has K/d = {found.ratio:g}{besides}. Its iteration is the mean over a window of "
                f"{window.sample} uncompressed and {window.compress} compressed ones; its fits, on a thread of their "
                "own, are not counted."
            )
    text = "Encoding and decoding take what the hook takes on this machine's processor"
    if found.situation.rated:
        text += (
            ", except GradiVeQ's, half's and random k's, which the cluster's own rates say (those for PCA are of the "
            "ring, which projects few slices at a time: the hook's products are larger, and may be faster)"
        )
    lines.append(f"{text}. Copies between a GPU and its host are not counted.")
    return lines


def _verdict(found: Answer, limit: float) -> str:
    best = found.by_speed[0] if found.by_speed else None
    if best is None:
        return "No: none of these methods fits this model."
    if found.speedup(best) < PAYS:
        plainly, network_s = found.predictions[PLAIN], found.predictions[best].compressed.network_s
        saved_s = plainly.compressed.network_s - network_s
        if limit < PAYS:
            why = f"plain DDP loses only {1 - 1 / limit:.1%} of an iteration to communication"
        elif saved_s < (1 - 1 / PAYS) * plainly.time_s:
            why = f"the network is busy for {seconds_text(network_s)} all the same: latency and messages stay"
        else:
            why = "what it saves on the network is hidden behind backward, or lost again by encoding and decoding"
        below = [ends[1] for name in found.pays for ends in found.pays[name] if ends[1] is not None]
        begins = f" Compression would begin to pay below {bandwidth_text(max(below))}." if below else ""
        return (
            f"No: nothing pays here (an iteration {PAYS - 1:.0%} faster or more). The best, {best}, is "
            f"{found.speedup(best):.2f} times as fast, as {why}.{begins}"
        )
    paying = [name for name in found.by_speed if found.speedup(name) >= PAYS]
    by_steps = _paying_by_steps(found, paying)
    best = next((name for name in paying if name not in by_steps), best)
    losses = {name: one.loss for name, one in found.asked.probed.items() if one.loss is not None and name in paying}
    faster = f"{best} makes an iteration {found.speedup(best):.2f} times as fast"
    if best in by_steps:
        text = f"Perhaps: {faster}."
    else:
        text = f"Yes, as far as time goes: {faster}, and pays {_where(found, best, found.pays[best])}."
    text += (
        f" Of {len(found.by_speed)} methods {len(paying)} pay here: "
        f"{', '.join(f'{name} {found.speedup(name):.2f}' for name in paying)}."
    )
    if by_steps:
        texts = [f"{name} {speedup:.2f}" for name, speedup in by_steps.items()]
        which = "That" if len(by_steps) == len(paying) else f"For {', '.join(by_steps)} that"
        text += f" {which} is only because {STEPS}; with as many steps: {', '.join(texts)}."
    if best in losses:
        text += f" {best} loses {losses[best]:.2g} of a gradient's squared norm before any error feedback."
    if losses:
        gentle = min(losses, key=losses.__getitem__)
        text += f" The least is lost by {gentle} ({losses[gentle]:.2g}), {found.speedup(gentle):.2f} times as fast."
    elif "half" in paying:
        text += f" half rounds and leaves nothing out: {found.speedup('half'):.2f} times as fast."
    return text


def _paying_by_steps(found: Answer, paying: Sequence[str]) -> dict[str, float]:
    """Speed-ups of those paying methods that wouldn't pay if an all-gather had as many steps as an all-reduce.

    Whatever saves bytes saves them in as many steps too, so these pay by nothing else.
    """
    even, plain_s = found.situation.with_even_steps(), found.predictions[PLAIN].time_s
    speedups = {name: plain_s / even.predict(name).time_s for name in paying if found.gathers(name)}
    return {name: speedup for name, speedup in speedups.items() if speedup < PAYS}


# --- figure and record -----------------------------------------------------------------------------------------------


def draw(record: Mapping[str, Any]) -> Figure:
    """Seconds per iteration against bandwidth, the cluster's marked; of what `record` holds."""
    cluster, about, methods = record["cluster"], record["environment"], record["methods"]
    names = [name for name in methods if name != PLAIN]
    machine = machine_text(about, about)
    caption = [
        record["words"][0],
        sentences(
            [
                f"{record['batch_size']} examples per node; computing: {record['computing']}",
                f"cluster: {cluster.get('source') or 'no source given'}; {cluster['nodes']} nodes, latency "
                f"{cluster['link']['latency_us']:g} us",
                *(
                    [f"methods measured on {machine}, inputs and weights by seed {about['seed']}"]
                    if "seed" in about
                    else []
                ),
                commit_text(about),
                f"command: {about['command']}",
            ]
        ),
    ]
    title = f"Time per iteration under DDP against bandwidth: {record['model']} on {cluster['name']}"
    with page.figure_style():
        figure = page.new_figure(9.5, 4.8, title, "\n".join(caption))
        axis = figure.subplots()
        plain_style = method_style("rar") | {"label": PLAIN, "linewidth": 2.6}
        for name in [PLAIN, *names] if names else ():
            style = plain_style if name == PLAIN else method_style(name, names)
            points = methods[name]["by_bandwidth"]
            axis.plot([one["gbps"] for one in points], [one["iteration_s"] for one in points], **style)
        axis.axhline(record["computing_s"], color="#888888", linestyle=":", linewidth=1.2, label="computing alone")
        gbps = cluster["link"]["bandwidth_gbps"]
        axis.axvline(gbps, color="#BBBBBB", linewidth=1.2, zorder=0.5)
        axis.annotate(
            f" {cluster['name']}",
            (gbps, 1),
            xycoords=("data", "axes fraction"),
            va="top",
            fontsize=8.5,
            color="#666666",
        )
        axis.set(xscale="log", yscale="log", xlabel="bandwidth of a link", ylabel="seconds per iteration")
        decades = math.log10(axis.get_ylim()[1] / axis.get_ylim()[0])
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if decades < 2 else (1,)))
        axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.yaxis.set_minor_formatter(NullFormatter())
        axis.xaxis.set_major_formatter(FuncFormatter(lambda x, _: bandwidth_text(float(x))))
        axis.xaxis.set_minor_formatter(NullFormatter())
        page.add_legend(axis)
    return figure


def redraw(path: Path) -> list[Path]:
    """The figure again, of the record.json at `path`.

    Raises:
        LookupError, TypeError, ValueError: the record isn't as it should be.
    """
    return [page.write_figure(draw(read_object(path)), path.with_name("figure.png"))]


def record(found: Answer, lines: Sequence[str], about: Mapping[str, Any]) -> dict[str, Any]:
    """What record.json holds."""
    asked, measured = found.asked, found.asked.measured

    def of(name: str) -> dict[str, Any]:
        prediction, cost = found.predictions[name], measured.costs[name]
        entry = {
            "iteration_s": prediction.time_s,
            "speedup": found.speedup(name),
            "bytes_sent": prediction.bytes_sent,
            "compressed_iteration_s": prediction.compressed.time_s,
            "waiting_s": prediction.compressed.exposed_s,
            "network_s": prediction.compressed.network_s,
            "exchanges_s": prediction.compressed.exchanges,
            "memory_bytes": cost.memory_bytes,
            "fit_bytes": cost.fit_bytes,
            "extra_bytes": cost.extra_bytes(found.situation.cluster.nodes),
            "encode_s": [[one.compute_s for one in bucket.rounds] for bucket in cost.buckets],
            "decode_s": [bucket.decoding_s(found.situation.cluster.nodes) for bucket in cost.buckets],
            "payload_bytes": cost.payload_bytes,
        }
        if name == PLAIN:
            points = next(iter(found.sweep.values()), ())
            entry["by_bandwidth"] = [{"gbps": point.x, "iteration_s": point.plain_s} for point in points]
        else:
            probed = asked.probed.get(name)
            entry |= {
                "gains_gbps": found.gains[name],
                "pays_gbps": found.pays[name],
                "probed": None if probed is None else probed._asdict(),
                "elsewhere": [one._asdict() for one in found.elsewhere[name]],
                "by_bandwidth": [{"gbps": point.x, "iteration_s": point.time_s} for point in found.sweep[name]],
            }
        return entry

    profiled = found.situation.profile
    return {
        "environment": about,
        "words": lines,
        "model": asked.task,
        "batch_size": found.batch_size,
        "computing_s": found.situation.computing_s,
        "parameters": sum(measured.lengths),
        "bucket_bytes": [4 * length for length in measured.lengths],
        "cluster": as_table(found.situation.cluster),
        "computing": found.computing,
        "forward_s": profiled.forward_s,
        "backward_s": profiled.backward_s,
        "update_s": profiled.update_s,
        "ready_s": found.situation.ready_s,
        "measured": {
            "batch_size": measured.profile.batch_size,
            "forward_s": measured.profile.forward_s,
            "backward_s": measured.profile.backward_s,
            "update_s": measured.profile.update_s,
            "flops": measured.profile.flops,
            "threads": torch.get_num_threads(),
        },
        "refused": measured.refused,
        "probe": asked.probe,
        "methods": {name: of(name) for name in found.predictions},
    }
