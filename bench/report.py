"""Tables of results, for results.md of bench/gpu.py and for docs/backends.md.

``python bench/report.py`` rewrites the page's section on speed from the results in bench/results/;
``python bench/report.py FOLDER`` writes tables and pictures of FOLDER/results.json beside it.
"""

from __future__ import annotations

import json
import sys
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from floors import CEILINGS

from vapt_fast.benchmark import LINEAR_PROBE, MODES, Row, Spread

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "backends.md"
RESULTS = ROOT / "bench" / "results"
BEGIN = "<!-- written by bench/report.py from bench/results/ -->\n"
END = "<!-- end of what bench/report.py writes -->\n"

WIDTH = 118  # of the page's lines

OURS = ("triton", "cuda", "auto")
LONGEST = 20  # kernels and operations that are shown of a profile


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *rows))


def paragraph(text: str) -> str:
    return textwrap.fill(text, WIDTH, break_long_words=False, break_on_hyphens=False)


# ---- results.md


def to_markdown(results: dict[str, Any]) -> str:
    """Return all that bench/gpu.py found, whatever is missing of it."""
    environment = results.get("environment", {})
    title = environment.get("gpu", environment.get("cpu", "results"))
    parts = [f"# {title}" + (" (dry run: no figure means anything)" if results["dry"] else "")]
    wrong = results.get("wrong", [])
    parts.append("\n".join(f"- **wrong**: {reason}" for reason in wrong) or "Nothing was found to be wrong.")
    phases = [
        [name, f"{record.get('seconds', '')}", f"{record.get('limit', '')}", str(record.get("error", ""))]
        for name, record in results["phases"].items()
        if "seconds" in record or "error" in record
    ]
    if results.get("missing"):
        parts += ["## Missing here", "\n".join(f"- {sentence}" for sentence in results["missing"])]
    parts += ["## Phases", table(["", "seconds", "limit", "not finished because"], phases)]
    if results.get("gate"):
        parts += ["## Every op against its definition in float64", _gate(results["gate"])]
    for comparison in results["comparisons"]:
        parts += _models(comparison, environment.get("gpu"))
    if results["comparisons"]:
        parts.append(NOTES)
    if "loop" in results:
        parts += _loop(results["loop"])
    for profile in results.get("profile", []):
        parts += _profile(profile)
    if results.get("ops"):
        parts += ["## Ops", _ops(results["ops"])]
    if "tests" in results:
        parts += ["## Tests", *(f"{line}" for line in results["tests"]["summary"])]
    if results.get("sanitizer"):
        parts += ["## compute-sanitizer", table(["tool", "result"], results["sanitizer"].items())]
    facts = environment | {"installation": results.get("installation")}
    parts += ["## Environment", "\n".join(f"- {name}: {value}" for name, value in facts.items())]
    parts.append(f"```\n{results.get('info', '').strip()}\n```")
    return "\n\n".join(parts) + "\n"


NOTES = (
    "Training step: forward, cross-entropy, backward and fused SGD step, all dropouts on, what depends on "
    "learned weights made anew. Forward: inference mode. Loading of data is excluded. Random data; prompts "
    "that are not zero. Everything is timed in turns; medians and quartiles over rounds; speed within a "
    "round, over the table's first row. In the first columns a plain loop calls the model, which uses CUDA "
    "graphs of its own unless the row says otherwise; then the whole step is one CUDA graph, captured by "
    "hand, on all sides. `operations/s` counts what "
    "is executed and `literal` what the literal method would have executed for the same images; only the "
    "first is compared with what the device can do. Error: the largest of logits and gradients, relative to "
    "norm, against the literal method in float32. The linear probe, without prompts and without a backward "
    "pass through the blocks, is a lower bound, no rival."
)


def _models(comparison: dict[str, Any], gpu: str | None) -> list[str]:
    setting, rows = comparison["setting"], [Row.from_dict(row) for row in comparison["rows"]]
    num_prompts = max(row.variant.num_prompts for row in rows)
    parts = []
    for mode in MODES:
        plain, graph = ([r for r in rows if r.mode == mode and r.graph == g] for g in (False, True))
        operations = (comparison["operations_per_image"] or {}).get(mode)
        parts.append(
            f"## {mode.capitalize()}, {setting['model']}, P = {num_prompts}, batch {setting['batch']}"
            + ("" if comparison["set"] == "all" else f" ({comparison['set']})")
        )
        header = ["", "images/s", "speed", "quartiles", "as one CUDA graph: images/s", "speed", "quartiles"]
        header += ["peak MB", "operations/s", "of what is possible", "literal", "error"]
        cells = []
        for one, other in zip(plain, graph, strict=True):
            timed = [_speed(row, of, setting["batch"]) for row, of in ((one, plain), (other, graph))]
            memory = "" if one.peak_memory_mb is None else f"{one.peak_memory_mb:.0f}"
            error = "" if one.largest_error is None else f"{one.largest_error:.0e}"
            counted = _operations(one, other, operations, setting["batch"], gpu)
            cells.append([str(one.variant), *timed[0], *timed[1], memory, *counted, error])
        parts.append(table(header, cells))
        parts += [line for of in (plain, graph) for line in _verdict(of)]
        reasons: dict[str, dict[str, None]] = {}
        for row in (*plain, *graph):
            if row.error is not None:
                reasons.setdefault(row.error, {})[str(row.variant)] = None
        parts.append("\n".join(f"- {reason} ({'; '.join(of)})" for reason, of in reasons.items()))
    return parts


def _speed(row: Row, of: list[Row], batch: int) -> list[str]:
    if not row.seconds:
        return ["-", "", ""]
    first = next(other for other in of if other.seconds)
    ratio = Spread.of_ratio(first.seconds, row.seconds)
    return [
        f"{batch / row.spread.median:.4g}",
        f"{ratio.median:.2f}x",
        f"{ratio.low:.2f} to {ratio.high:.2f}",
    ]


def _operations(
    one: Row, other: Row, operations: dict[str, int] | None, batch: int, gpu: str | None
) -> list[str]:
    """Return executed operations in a second, their share of what is possible, and the literal method's."""
    timed = [row.spread.median for row in (one, other) if row.seconds]
    if operations is None or not timed or one.variant.backend == LINEAR_PROBE:
        return ["", "", ""]
    method = "literal" if one.variant.backend == "reference" else "rewritten"
    executed, literal = (operations[name] * batch / min(timed) for name in (method, "literal"))
    share = ""
    if gpu in CEILINGS and one.variant.precision.startswith("bfloat16"):
        share = f"{executed / CEILINGS[gpu].operations:.0%}"
    return [f"{executed:.3g}", share, f"{literal:.3g}"]


def _verdict(rows: list[Row]) -> list[str]:
    """Compare the fastest of the kernels with the fastest of everything else."""
    timed = [row for row in rows if row.seconds and row.variant.backend != LINEAR_PROBE]
    ours = [row for row in timed if row.variant.backend in OURS]
    rivals = [row for row in timed if row.variant.backend not in OURS]
    if not ours or not rivals:
        return []
    best, rival = (min(some, key=lambda row: row.spread.median) for some in (ours, rivals))
    ratio = Spread.of_ratio(rival.seconds, best.seconds)
    graph = "as CUDA graphs" if best.graph else "without CUDA graphs"
    return [f"Kernels over the best of the rest, {graph}: {best.variant} / {rival.variant}: {ratio}x."]


def _gate(gate: dict[str, dict[str, Any]]) -> str:
    rows = [
        [
            name,
            f"{op['agree']}",
            "; ".join([*op["wrong"], *op["not_run"], *([op["error"]] if "error" in op else [])]),
        ]
        for name, op in gate.items()
    ]
    return table(["", "agree", "wrong, or not run"], rows)


def _loop(loop: dict[str, Any]) -> list[str]:
    """Report bench/loop.py."""
    rows = [
        [
            name,
            f"{1e3 * spread.median:.1f}",
            f"{1e3 * spread.low:.1f} to {1e3 * spread.high:.1f}",
            f"{loop['batch'] / spread.median:.4g}",
            f"{1e3 * row['seconds_of_first_round']:.1f}",
        ]
        for name, row in loop["rows"].items()
        if len(row["seconds"]) >= 2
        for spread in [Spread.of(row["seconds"])]
    ]
    title = f"## A plain training loop, {loop['model']}, P = {loop['prompts']}, batch {loop['batch']}"
    graphs = [f"- {name}: {row['graphs']}" for name, row in loop["rows"].items() if row.get("graphs")]
    return [
        title,
        "\n".join(graphs),
        table(["", "ms a step", "quartiles", "images/s", "ms in the first round"], rows),
    ]


def _profile(profile: dict[str, Any]) -> list[str]:
    """Report the longest of bench/kernel_times.py."""
    title = f"## Where a training step goes: {profile['name']}"
    if "error" in profile:
        return [title, profile["error"]]
    parts = [title]
    for what, rows in (("GPU", profile["kernels"]), ("host, while profiled", profile["host"])):
        total = profile["gpu_us" if what == "GPU" else "host_us"]
        cells = [[f"{r['us']:,.0f}", f"{r['calls']:g}", f"`{r['name'][:90]}`"] for r in rows[:LONGEST]]
        parts.append(table([f"{what}: {total:,.0f} µs", "calls", ""], cells))
    return parts


def _ops(ops: list[dict[str, Any]]) -> str:
    def cell(op: dict[str, Any], name: str, form: str, scale: float = 1.0) -> str:
        return format(scale * op[name], form) if op.get(name) is not None else ""

    header = ["", "microseconds", "bytes/s", "operations/s", "times the floor", "error"]
    rows = [
        [
            op["name"],
            cell(op, "seconds", ".4g", 1e6),
            cell(op, "bytes_per_second", ".3g"),
            cell(op, "operations_per_second", ".3g"),
            cell(op, "times_floor", ".2f"),
            cell(op, "largest_error", ".0e") or op.get("error", ""),
        ]
        for op in ops
    ]
    return table(header, rows)


# ---- the section of the page


def section() -> str:
    """Return the section on speed of docs/backends.md, from what is in bench/results/."""
    reports = {path.stem: json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))}
    cpu = [report for name, report in reports.items() if name.startswith("cpu")]
    gpu = [report for name, report in reports.items() if name.startswith("gpu")]
    parts = _cpu(cpu)
    for report in gpu:
        parts += _gpu(report) if "comparisons" in report else _steps(report)
    parts.append(WHERE)
    return "\n\n".join(parts) + "\n"


def _cpu(reports: list[dict[str, Any]]) -> list[str]:
    """Report the run with the most rounds in full, and the ratios of the others."""
    runs = [[Row.from_dict(row) for row in report["comparisons"][0]["rows"]] for report in reports]
    steps = [
        {(r.variant.backend, r.variant.num_prompts): r for r in run if r.mode == MODES[0]} for run in runs
    ]
    main = max(steps, key=lambda step: len(next(iter(step.values())).seconds))
    others = [step for step in steps if step is not main]
    setting, environment = reports[0]["comparisons"][0]["setting"], reports[0]["environment"]
    numbers = sorted({num_prompts for _, num_prompts in main if num_prompts})

    def speed(step: dict, num_prompts: int) -> Spread:
        literal, rewritten = (step[backend, num_prompts].seconds for backend in ("reference", "torch"))
        return Spread.of_ratio(literal, rewritten)

    rows = []
    for number in numbers:
        literal, rewritten = (main[backend, number] for backend in ("reference", "torch"))
        ratio = speed(main, number)
        rows.append(
            [
                f"P = {number}",
                *(f"{row.spread.median:.2f} s" for row in (literal, rewritten)),
                f"{ratio.median:.2f}x ({ratio.low:.2f} to {ratio.high:.2f})",
                ", ".join(f"{speed(step, number).median:.2f}x" for step in others),
                *(f"{row.peak_memory_mb:,.0f} MB" for row in (literal, rewritten)),
            ]
        )
    header = ["", "reference", "torch", "torch is faster by", "in the other runs"]
    header += ["peak memory, reference", "torch"]
    worst = max(row.largest_error for row in main.values() if row.largest_error)
    growth = {
        backend: Spread.of_ratio(main[backend, numbers[-1]].seconds, main[backend, numbers[0]].seconds).median
        for backend in ("torch", "reference")
    }
    rounds = ", ".join(str(len(next(iter(step.values())).seconds)) for step in (*others, main))
    return [
        paragraph(
            "One training step (forward, loss, backward, SGD; all dropouts on) of "
            f"`{setting['model']}`, batch {setting['batch']}, float32, on {setting['threads']} cores of an "
            f"{environment['cpu']} with {environment['cpu_capability']}, {_pytorch(environment)}. "
            f"The machine is virtual and its speed drifts, so here are {len(steps)} runs of {rounds} "
            "interleaved rounds; medians, with quartiles for the ratios of the last:"
        ),
        table(header, rows),
        paragraph(
            f"Logits and all gradients agreed in the same run, to {worst:.1e}. P = {numbers[-1]} makes a "
            f"step {growth['torch']:.2f} times as long as P = {numbers[0]}, where the literal method's grows "
            f"{growth['reference']:.2f} times. Most of what is left is the backbone's own matrix products."
        ),
    ]


def _gpu(report: dict[str, Any]) -> list[str]:
    """Report images/s of every variant at the smaller batch, without and with CUDA graphs."""
    parts = []
    comparisons = [comparison for comparison in report["comparisons"] if comparison["set"] == "all"]
    batch = min(comparison["setting"]["batch"] for comparison in comparisons)
    for mode in MODES:
        columns: dict[int, dict[str, list[str]]] = {}
        for comparison in comparisons:
            if comparison["setting"]["batch"] == batch:
                rows = [Row.from_dict(row) for row in comparison["rows"] if row["mode"] == mode]
                column = columns.setdefault(max(row.variant.num_prompts for row in rows), {})
                for row in rows:
                    figure = f"{batch / row.spread.median:,.0f}" if row.seconds else "-"
                    column.setdefault(str(row.variant), []).append(figure)
        names = list(dict.fromkeys(name for column in columns.values() for name in column))
        cells = [
            [name, *(" / ".join(columns[number].get(name, ["-"])) for number in sorted(columns))]
            for name in names
        ]
        where = f"one {report['environment']['gpu']}, {_pytorch(report['environment'])}"
        parts += [
            paragraph(
                f"{mode.capitalize()} of `{comparisons[0]['setting']['model']}`, batch {batch}, on {where}, "
                "in images/s without / with a CUDA graph:"
            ),
            table(["", *(f"P = {number}" for number in sorted(columns))], cells),
        ]
    return parts


def _pytorch(environment: dict[str, Any]) -> str:
    return f"PyTorch {environment['torch'].partition('+')[0]}"


def _steps(report: dict[str, Any]) -> list[str]:
    """Report medians of whole steps in which AdaptiveViT used no CUDA graphs of its own."""
    steps = {(row["name"], row["prompts"], row["batch"]): row for row in report["steps"]}

    def ms(name: str, how: str, prompts: int = 50, batch: int = 64, mode: str = MODES[0]) -> str:
        row = steps.get((name, prompts, batch))
        return "-" if row is None else f"{row[mode][how]:.1f}"

    def peak(name: str, mode: str = MODES[0]) -> str:
        return f"{steps[name, 0 if name.startswith(LINEAR_PROBE) else 50, 64][mode]['peak_mb']:,.0f}"

    literal, default, kernels = "reference, bfloat16", "torch, bfloat16", "kernels, bfloat16"
    rival, rival_untuned = "torch, bfloat16-tf32, compiled", "torch, bfloat16, compiled"
    names = [name for name, prompts, batch in steps if (prompts, batch) == (50, 64)]
    names.sort(key=lambda name: -steps[name, 50, 64][MODES[0]]["graph_ms"])
    main = [
        [
            f"`{name}`",
            *(ms(name, how, prompts, mode=mode) for mode in MODES for how in ("eager_ms", "graph_ms")),
        ]
        + [peak(name, mode) for mode in MODES]
        for name, prompts in [*((name, 50) for name in names), (f"{LINEAR_PROBE}, bfloat16", 0)]
    ]
    header = ["", "step: calls", "one graph", "forward: calls", "one graph", "peak MB, step", "forward"]
    others = [
        [f"P = {prompts}, batch {batch}"]
        + [
            f"{ms(name, 'eager_ms', prompts, batch)} / {ms(name, 'graph_ms', prompts, batch)}"
            for name in (literal, default, kernels)
        ]
        for prompts, batch in ((10, 64), (100, 64), (10, 256), (50, 256), (100, 256))
    ]
    gain = steps[literal, 50, 64][MODES[0]]["graph_ms"] / steps[default, 50, 64][MODES[0]]["graph_ms"]
    environment = report["environment"]
    return [
        paragraph(
            f"The same on one {environment['gpu']} ({report['date']}, {_pytorch(environment)}, Triton "
            f"{environment['triton']}, commit {report['commit']}), 50 prompts, batch 64, in ms: called "
            "plainly, each kernel launched by itself, and with the whole step in one CUDA graph, captured by "
            "hand. What has changed since has not been measured: AdaptiveViT had no CUDA graphs of its own, "
            "`auto` was `torch`, and a backend `kernels` took for each op the faster of Triton's and CUDA's."
        ),
        table(header, main),
        paragraph(
            f"Called plainly, the default, `torch`, was slower than the literal method with PyTorch's fused "
            f"attention, {ms(default, 'eager_ms')} ms a step against {ms(literal, 'eager_ms')}, and the "
            f"kernels were slower still ({ms(kernels, 'eager_ms')}): the host could not launch as fast as "
            f"the GPU ran. In one CUDA graph `torch` took {ms(default, 'graph_ms')} ms, {gain:.2f} times as "
            f"fast as the literal method ({ms(literal, 'graph_ms')}), and the kernels "
            f"{ms(kernels, 'graph_ms')}. The strongest rival is the same rewrites, compiled by "
            "inductor: with TF32 for products of float32 "
            f"weights they took {ms(rival, 'graph_ms')} ms, less than the kernels, and without it "
            f"{ms(rival_untuned, 'graph_ms')}; called plainly {ms(rival, 'eager_ms')} and "
            f"{ms(rival_untuned, 'eager_ms')}. A step's peak memory was {peak(kernels)} MB with the kernels, "
            f"{peak(rival)} compiled, {peak(default)} with `torch` and {peak(literal)} with the literal "
            "method. Other sizes of the training step, called plainly / in one CUDA graph:"
        ),
        table(["", "reference", "torch", "kernels"], others),
    ]


WHERE = paragraph(
    "`bench/results` has every timing, `bench/README.md` says what is in them and what is not. `vapt-fast "
    "bench` measures your own model on your own machine; `make gpu OUT=folder` everything on a GPU, against "
    "every rival, and runs the tests that need one."
)


def rewrite(page: str, new: str) -> str:
    """Return ``page`` with ``new`` between the markers."""
    before, rest = page.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n{new}\n{END}{after}"


def main() -> None:
    if len(sys.argv) == 1:
        PAGE.write_text(rewrite(PAGE.read_text(), section()))
        return
    folder = Path(sys.argv[1])
    results = json.loads((folder / "results.json").read_text())
    (folder / "results.md").write_text(to_markdown(results))
    import plots  # the tables are there, even if matplotlib is not

    plots.draw(results, folder)


if __name__ == "__main__":
    main()
