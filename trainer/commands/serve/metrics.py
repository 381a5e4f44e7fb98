"""Counters of the server in Prometheus' text format.

https://prometheus.io/docs/instrumenting/exposition_formats/
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

PREFIX = "promptshard_serve_"
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Metrics:
    """Counts since the start. Used in the event loop's thread only.

    Attributes:
        responses: finished HTTP requests by (path, status).
        choices: finished answers by (model, finish reason).
        open_requests: HTTP requests that are being answered.
        input_tokens: tokens of inputs, without virtual tokens.
        seconds: sum of the durations of answers, and their number, by model.
        first_token_seconds: the same until the first token, of answers that are streamed.
    """

    def __init__(self) -> None:
        self.responses: Counter[tuple[str, str]] = Counter()
        self.choices: Counter[tuple[str, str]] = Counter()
        self.open_requests = self.input_tokens = 0
        self.seconds: dict[str, tuple[float, int]] = {}
        self.first_token_seconds: dict[str, tuple[float, int]] = {}

    def note_answer(self, model: str, seconds: float, until_first_token: float | None) -> None:
        """Count an answer that has ended; None: it was not streamed."""
        for sums, value in (
            (self.seconds, seconds),
            (self.first_token_seconds, until_first_token),
        ):
            if value is not None:
                total, count = sums.get(model, (0.0, 0))
                sums[model] = total + value, count + 1

    def text(
        self, gauges: Mapping[str, tuple[str, float]], counters: Mapping[str, tuple[str, float]]
    ) -> str:
        """Write all metrics.

        Args:
            gauges: further values by name: description and value.
            counters: the same for values that only grow.
        """
        lines: list[str] = []

        def write(name: str, kind: str, text: str, values: Mapping[str, float]) -> None:
            lines.append(f"# HELP {PREFIX}{name} {text}")
            lines.append(f"# TYPE {PREFIX}{name} {kind}")
            lines.extend(f"{PREFIX}{name}{labels} {value}" for labels, value in values.items())

        responses = {_labels(path=p, status=s): n for (p, s), n in self.responses.items()}
        write("http_requests_total", "counter", "Finished HTTP requests.", responses)
        choices = {_labels(model=m, finish_reason=f): n for (m, f), n in self.choices.items()}
        write("answers_total", "counter", "Finished answers.", choices)
        write(
            "input_tokens_total",
            "counter",
            "Tokens of inputs, without virtual tokens.",
            {"": self.input_tokens},
        )
        for name, (text, value) in counters.items():
            write(name, "counter", text, {"": value})
        write("open_requests", "gauge", "HTTP requests in progress.", {"": self.open_requests})
        for name, (text, value) in gauges.items():
            write(name, "gauge", text, {"": value})
        for name, text, sums in (
            ("answer_seconds", "Duration of answers.", self.seconds),
            (
                "first_token_seconds",
                "Time to the first token of streamed answers.",
                self.first_token_seconds,
            ),
        ):
            lines.append(f"# HELP {PREFIX}{name} {text}")
            lines.append(f"# TYPE {PREFIX}{name} summary")
            for model, (total, count) in sums.items():
                lines.append(f"{PREFIX}{name}_sum{_labels(model=model)} {total}")
                lines.append(f"{PREFIX}{name}_count{_labels(model=model)} {count}")
        return "\n".join(lines) + "\n"


def _labels(**labels: str) -> str:
    return "{" + ",".join(f'{name}="{_escaped(value)}"' for name, value in labels.items()) + "}"


def _escaped(value: str) -> str:
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
