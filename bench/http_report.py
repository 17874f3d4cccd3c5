"""The figures of a load on an HTTP server, under the JSON keys of `vllm bench serve`.

ttft: from when a request was sent (in an open loop: was due) to the first piece of its text; e2el: to the last one;
tpot: (e2el - ttft) / (output tokens - 1); itl: between two pieces, which may hold several tokens. Milliseconds.
"""

import argparse
from dataclasses import dataclass, field

import numpy as np

METRICS = ("ttft", "tpot", "itl", "e2el")


@dataclass
class Outcome:
    """One request. due: when it was sent, or should have been; times: of each piece; error: "" where all went well."""

    due: float
    input_tokens: int
    output_tokens: int = 0
    times: list[float] = field(default_factory=list)
    error: str = ""

    @property
    def ttft(self) -> float:
        return self.times[0] - self.due

    @property
    def e2el(self) -> float:
        return self.times[-1] - self.due

    @property
    def tpot(self) -> float | None:
        return (self.e2el - self.ttft) / (self.output_tokens - 1) if self.output_tokens > 1 else None

    @property
    def itl(self) -> list[float]:
        return [after - before for before, after in zip(self.times, self.times[1:], strict=False)]


def add_report_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the report, under the names of `vllm bench serve`."""
    parser.add_argument(
        "--goodput",
        nargs="+",
        default=[],
        type=bound,
        metavar="METRIC:MS",
        help="bounds that good requests keep, e.g. ttft:500 tpot:50 e2el:9000",
    )
    parser.add_argument(
        "--percentile-metrics", type=metrics, default=",".join(METRICS), help="some of " + ",".join(METRICS)
    )
    parser.add_argument("--metric-percentiles", type=percentiles, default="50,95,99", help="of each metric")
    parser.add_argument("--save-result", help="a file for the JSON document")
    parser.add_argument("--save-detailed", action="store_true", help="add the figures of each request")
    parser.add_argument("--metadata", nargs="*", default=[], metavar="KEY=VALUE", help="entries of the document")


def metrics(text: str) -> str:
    """Names of metrics, "ttft,itl", checked."""
    if unknown := set(text.split(",")) - set(METRICS):
        raise argparse.ArgumentTypeError(f"{', '.join(sorted(unknown))}: not one of {', '.join(METRICS)}")
    return text


def percentiles(text: str) -> str:
    """Percentiles, "50,99.9", checked."""
    if not all(0 <= float(part) <= 100 for part in text.split(",")):
        raise argparse.ArgumentTypeError(f"{text}: not from 0 to 100")
    return text


def bound(text: str) -> tuple[str, float]:
    """ "ttft:500" as (metric, seconds)."""
    name, _, value = text.partition(":")
    if name not in ("ttft", "tpot", "e2el"):
        raise argparse.ArgumentTypeError(f"{name!r} has no bound; ttft, tpot and e2el have")
    return name, float(value) / 1000


def summarise(outcomes: list[Outcome], seconds: float, options: argparse.Namespace) -> dict:
    """The document of one run."""
    good = [o for o in outcomes if not o.error]
    tokens_in, tokens_out = sum(o.input_tokens for o in good), sum(o.output_tokens for o in good)
    met = [o for o in good if all((getattr(o, name) or 0.0) <= most for name, most in options.goodput)]
    found = {
        "duration": seconds,
        "completed": len(good),
        "failed": len(outcomes) - len(good),
        "total_input_tokens": tokens_in,
        "total_output_tokens": tokens_out,
        "request_throughput": len(good) / seconds,
        "request_goodput": len(met) / seconds if options.goodput else None,
        "output_throughput": tokens_out / seconds,
        "total_token_throughput": (tokens_in + tokens_out) / seconds,
        "max_output_tokens_per_s": peak_rate(good),
        "max_concurrent_requests": most_at_once(good),
    }
    for name in options.percentile_metrics.split(","):
        found |= spread(name, values_of(name, good), options.metric_percentiles)
    if options.save_detailed:
        found |= details(outcomes)
    return found


def values_of(name: str, outcomes: list[Outcome]) -> list[float]:
    """A metric's values in seconds."""
    if name == "itl":
        return [gap for o in outcomes for gap in o.itl]
    return [value for o in outcomes if (value := getattr(o, name)) is not None]


def spread(name: str, values: list[float], percentiles: str) -> dict[str, float]:
    """Mean, median, standard deviation and percentiles in milliseconds; zeros where there are no values."""
    ms = 1000 * np.array(values or [0.0])
    found = {f"mean_{name}_ms": ms.mean(), f"median_{name}_ms": np.median(ms), f"std_{name}_ms": ms.std()}
    found |= {f"p{p}_{name}_ms": np.percentile(ms, float(p)) for p in percentiles.split(",")}
    return {key: round(float(value), 3) for key, value in found.items()}


def peak_rate(outcomes: list[Outcome]) -> float:
    """Tokens in the best second after the first piece; a request's are spread evenly over its pieces."""
    pieces = [(time, o.output_tokens / len(o.times)) for o in outcomes for time in o.times]
    if not pieces:
        return 0.0
    times, tokens = np.array(pieces).T
    return round(float(np.bincount((times - times.min()).astype(int), tokens).max()), 3)


def most_at_once(outcomes: list[Outcome]) -> int:
    """The most requests in flight at the same time."""
    changes = sorted([(o.due, 1) for o in outcomes] + [(o.times[-1], -1) for o in outcomes])
    return int(np.cumsum([change for _, change in changes]).max()) if changes else 0


def details(outcomes: list[Outcome]) -> dict[str, list]:
    """The figures of each request, in the order in which they were due."""
    ordered = sorted(outcomes, key=lambda o: o.due)
    return {
        "input_lens": [o.input_tokens for o in ordered],
        "output_lens": [o.output_tokens for o in ordered],
        "ttfts": [0.0 if o.error else o.ttft for o in ordered],
        "itls": [o.itl for o in ordered],
        "latencies": [0.0 if o.error else o.e2el for o in ordered],
        "start_times": [o.due for o in ordered],
        "errors": [o.error for o in ordered],
    }
