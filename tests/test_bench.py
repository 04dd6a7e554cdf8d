"""The benchmark harness on tiny cases: checks before timing, files that read back, pictures from files, exit codes."""

import dataclasses
import json
import math
import statistics

import pytest
import torch

import mixupe_kernels as mk
from bench import cases, check, cpu, gpu, plot, results, run, timing, workload, workloads
from bench.cases import COPY, COPY_RATE, EAGER, ENQUEUE, FLOAT32, READ_RATE, Bar, Case, Row, Verdict
from mixupe_kernels.ops import LossArguments, backends, reference, registration

TINY = {
    "mix": (4, 3, 5, 5),
    "mix flip": (4, 3, 5, 5),
    "mix out=": (4, 7),
    "mixed and clean out=": (3, 3, 4, 4),
    "uint8 normalise mix": (4, 3, 5, 5),
    "linear loss": (6, 5, 11),
    "compiled step": (8, 5, 11),
}


def identity(function):
    return function


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", workloads.WORKLOADS)
def test_every_contender_of_every_workload_is_right(family, dtype):
    workload = workloads.build(Case(family, TINY.get(family, (6, 11)), dtype), "cpu", ["reference"], identity)
    rows = {name: Row("tiny", name) for name in workload.calls}
    assert set(run.checked(workload, rows)) == set(workload.calls), [row.note for row in rows.values()]
    assert all(row.error <= check.TOLERANCE[torch.bfloat16] for row in rows.values())


@pytest.mark.parametrize("family", workloads.WORKLOADS)
def test_a_wrong_result_is_recorded_and_not_timed(family):
    workload = workloads.build(Case(family, TINY.get(family, (6, 11))), "cpu", ["reference"], identity)
    right = workload.calls[EAGER] if EAGER in workload.calls else workload.calls["reference"]
    workload.calls.clear()
    workload.calls.update(
        near=lambda i: tuple(value * 1.001 for value in right(i)),
        raises=lambda i: 1 / 0,
        shapeless=lambda i: tuple(value.new_zeros(1, 1) for value in right(i)),
    )
    rows = {name: Row("tiny", name) for name in workload.calls}
    assert run.checked(workload, rows) == {}
    assert "deviates from the float64 reference" in rows["near"].note
    assert rows["raises"].note == "ZeroDivisionError: division by zero"
    assert rows["shapeless"].note


def test_nan_counts_as_wrong():
    deviation = check.Deviation()
    deviation.add(torch.tensor([1.0, torch.nan]), torch.tensor([1.0, 2.0]).double())
    deviation.add(torch.ones(2), torch.ones(2).double())
    with pytest.raises(ValueError, match="deviates"):
        workload.within(deviation.value, torch.float32, "result")


def test_checks_in_chunks_agree_with_the_whole(monkeypatch):
    monkeypatch.setattr(check, "CHUNK", 30)
    torch.manual_seed(0)
    workload = workloads.build(Case("mixupe_loss", (10, 11)), "cpu", ["reference"], identity)
    assert len(list(check.chunks(20, 11))) == 10
    _, gradient = workload.calls["reference"](workload.inputs)
    target = workload.inputs.target
    arguments = LossArguments(workload.inputs.eta.double(), workload.inputs.reg_weight.double(), 10, 10)
    rows = check.row_target(target, slice(None))
    loss, *_ = reference.mixupe_loss(workload.inputs.logits.detach().double(), rows, arguments)
    errors = check.mixupe_loss_errors(
        loss, gradient, workload.inputs.logits.detach(), target, workload.inputs.eta, workload.inputs.reg_weight, 10
    )
    assert errors[0] < 1e-14 and errors[1] < 1e-6


def test_fitted_lam_is_found():
    x, partner = torch.randn(6, 5), torch.tensor([1, 2, 3, 4, 5, 0])
    out = mk.mix(x, partner, 0.37)
    torch.testing.assert_close(check.fitted_lam(out, x, partner).item(), 0.37, rtol=1e-5, atol=0)


def test_cpu_cases_are_the_tables():
    speedups = {(case.label, bar.against): bar.value for case in cases.CPU_CASES for bar in case.bars}
    assert speedups["mixupe_loss 256×21841 float32", EAGER] == 4.5
    assert speedups["mix out= 256×3×224×224 float32", COPY] == 1 / 1.05
    for case in (*cases.CPU_CASES, *cases.GPU_CASES):
        assert case.family in workloads.WORKLOADS
    assert all(case.dry_shape for case in cases.GPU_CASES)


def test_measure_times_what_is_right():
    case = Case("mixupe_loss", (8, 5), "bfloat16", bars=(Bar(EAGER, 1e-9), Bar(FLOAT32, 1e9)))
    rows, verdicts = cpu.measure(case, rounds=3, compiler=identity)
    by_provider = {row.provider: row for row in rows}
    assert all(row.seconds > 0 and row.seconds_low <= row.seconds <= row.seconds_high for row in rows)
    assert by_provider[mk.ops.backends.serving("cpu")].speedup == 1
    assert [verdict.met for verdict in verdicts] == [True, False]
    assert verdicts[0].measured == by_provider[EAGER].speedup


@pytest.mark.parametrize(
    "bar, row, measured, met",
    [
        (Bar(COPY_RATE, 0.9), {"bytes_per_second": 80.0}, 0.8, False),
        (Bar(READ_RATE, 0.9), {"bytes_per_second": 80.0}, None, None),
        (Bar(ENQUEUE, 60), {"enqueue_seconds": 50e-6}, 50, True),
        (Bar(cases.LAUNCHES, 5), {"launches": 6}, 6, False),
        (Bar(cases.LAUNCHES, 5), {}, None, None),
        (Bar(EAGER, 5), {"error": 0.0, "seconds": 1.0}, 5.5, True),
        (Bar("absent", 5), {"error": 0.0}, None, None),
    ],
)
def test_bars(bar, row, measured, met):
    rows = {"ours": Row("case", "ours", **row), EAGER: Row("case", EAGER, speedup=5.5)}
    (verdict,) = run.judge(Case("mix", (1,), bars=(bar,)), rows, "ours", {COPY_RATE: 100.0})
    assert verdict.measured == pytest.approx(measured) and verdict.met is met


def test_interleave_takes_turns():
    called = []
    contenders = {name: lambda name=name: called.append(name) for name in "abc"}
    times = timing.interleave(contenders, rounds=40, warmup=0, min_seconds=0)
    assert [len(values) for values in times.values()] == [40] * 3
    rounds = ["".join(called[start : start + 3]) for start in range(3, len(called), 3)]
    assert len(rounds) == 40 and set(rounds) == {"abc", "acb", "bac", "bca", "cab", "cba"}
    assert [order for order in timing.orders(["a", "b", "c"], 40)] == [list(order) for order in rounds]
    assert timing.ratio([2.0, 4.0, 6.0], [1.0, 2.0, 2.0]).median == 2


def test_each_contender_is_timed_between_two_turns_of_the_base(monkeypatch):
    called, clock = [], [0.0]

    def contender(name):
        def call():
            called.append(name)
            clock[0] += len(called) if name == "base" else 1

        return call

    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock[0])
    pairs = timing.interleave_with("base", {name: contender(name) for name in ("base", "a", "b")}, 20, 0, 0)
    assert list(pairs) == ["base", "a", "b"]
    rounds = ["".join(called[start : start + 5]) for start in range(3, len(called), 5)]
    assert set(rounds) == {"baseabasebbase", "basebbaseabase"} and len(rounds) == 20
    first = rounds[0][4]
    assert pairs[first].base[0] == (4 + 6) / 2 and pairs[first].seconds == [1] * 20
    assert pairs["ab".replace(first, "")].base[0] == (6 + 8) / 2
    assert pairs["base"].seconds == pairs["base"].base and pairs["base"].base[0] == (4 + 6 + 8) / 3


def test_a_contender_may_have_several_turns_a_round(monkeypatch):
    called, clock = [], [0.0]

    def contender(name):
        def call():
            called.append(name)
            clock[0] += len(called)

        return call

    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock[0])
    contenders = {name: contender(name) for name in ("base", "a", "b")}
    pairs = timing.interleave_with("base", contenders, 4, 0, 0, turns_a_round={"a": 2})
    rounds = [called[start : start + 7] for start in range(3, len(called), 7)]
    assert len(rounds) == 4 and all(sorted(order) == ["a", "a", "b", *["base"] * 4] for order in rounds)
    # The calls of the first round take 4 to 10 seconds; before them each contender was called once.
    first = [4 + place for place, name in enumerate(rounds[0]) if name == "a"]
    assert pairs["a"].seconds[:2] == pairs["a"].base[:2] == first
    assert {name: [len(figures) for figures in pair] for name, pair in pairs.items()} == {
        "base": [4, 4],
        "a": [8, 8],
        "b": [4, 4],
    }


def test_standard_error_of_a_median_of_ratios_that_share_turns_of_the_base():
    draws = 1 + 0.03 * torch.randn(2000, 2, 102, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    base = (draws[:, 0, 1:] + draws[:, 0, :-1]) / 2
    ratios = [timing.ratio(*pair) for pair in zip(draws[:, 1, 1:].tolist(), base.tolist(), strict=True)]
    spread = statistics.stdev(ratio.median for ratio in ratios)
    assert statistics.mean(ratio.standard_error(101) for ratio in ratios) == pytest.approx(spread, rel=0.05)
    assert math.isnan(ratios[0].standard_error(4))


def test_what_cannot_be_captured_still_has_the_other_figures():
    class Failing(timing.HostTimer):
        def capture(self, calls, pool):
            raise RuntimeError("operation not permitted when stream is capturing")

    failures = {}
    contender = timing.Contender([lambda: None] * 2, run.workloads.contextlib.nullcontext)
    figures = timing.interleave_on_device(Failing(), {"a": contender}, 3, failures.__setitem__)
    assert figures["a"].kernel == [] and len(figures["a"].stream) == len(figures["a"].enqueue) == 3
    assert "capturing" in str(failures["a"])
    row = Row("case", "a", bytes_moved=8)
    gpu.fill(row, figures["a"], figures["a"])
    assert row.seconds is None and row.speedup == 1 and row.note.startswith("speedup by the stream figure")


ROWS = [
    Row("mix 4", "cpp", 1e-3, 0.9e-3, 1.1e-3, 1.0, 1.0, 1.0, bytes_moved=80, bytes_per_second=8e4, error=1e-8),
    Row("mix 4", EAGER, 3e-3, 2e-3, 4e-3, 3.0, 2.5, 3.5, bytes_moved=80, bytes_per_second=3e4, launches=7),
    Row("mix 4", "timm", note='ValueError: a "quoted", comma'),
    Row("ceiling", COPY_RATE, 1e-3, bytes_moved=80, bytes_per_second=9e4),
]
VERDICTS = [
    Verdict("mix 4", EAGER, 2.5, 3.0, True),
    Verdict("mix 4", COPY_RATE, 0.9),
    Verdict("mix 4", COPY, 1, 0.5, False),
]


def test_files_read_back(tmp_path):
    results.write(tmp_path, {"device": "none"}, ROWS, VERDICTS)
    assert results.read_csv(tmp_path / "rows.csv", Row) == ROWS
    assert results.read_csv(tmp_path / "bars.csv", Verdict) == VERDICTS
    everything = json.loads((tmp_path / "results.json").read_text())
    assert everything["machine"] == {"device": "none"}
    assert everything["rows"] == [dataclasses.asdict(row) for row in ROWS]


def test_pictures_come_from_the_files(tmp_path):
    results.write(tmp_path, {}, ROWS, VERDICTS)
    for draw in (plot.speedups, plot.roofline):
        picture = draw(tmp_path, "none")
        assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size > 5000


@pytest.mark.parametrize("rich", [True, False])
def test_table(rich, capsys, monkeypatch):
    if not rich:
        monkeypatch.setattr(results.importlib.util, "find_spec", lambda name: None)
    results.print_table("a title", VERDICTS)
    shown = capsys.readouterr().out
    for text in ("a title", "≥ 2.5× eager", "3×", "not met", "not measured", "≥ 90% of the copy rate"):
        assert text in shown


def test_the_rows_by_size_are_the_faster_backends(monkeypatch):
    """A size is taken over where it saves something; what is written are rows of the table."""
    given = [cases.Case("mix", (rows, 10)) for rows in (1, 10, 100, 1000)]
    times = ((2.0, 1.0), (2.0, 1.0), (1.0, 0.99), (1.0, 2.0))
    rows = [
        cases.Row(case.label, name, stream_seconds=seconds)
        for case, both in zip(given, times, strict=True)
        for name, seconds in zip(("triton", "cuda"), both, strict=True)
    ]
    text = gpu.by_size(given, rows, ["triton", "cuda"])
    table = eval("{" + text + "}", {"From": backends.From})
    assert table == {"mix": (backends.From(10, "cuda"), backends.From(10_000, "triton"))}
    assert set().union(*gpu.OPERATORS.values()) <= set(registration.operators())
    assert gpu.by_size(given, rows[::2], ["triton"]) == "# triton at every size\n"
    assert set(gpu.OPERATORS) <= {case.family for case in cases.GPU_CASES}


def test_gpu_without_a_gpu_says_so(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main([]) == 2 and "no GPU here" in capsys.readouterr().out


@pytest.mark.parametrize(
    "name, expected", [("NVIDIA H200", "nvidia-h200"), ("AMD Instinct (MI300X)", "amd-instinct-mi300x")]
)
def test_slug(name, expected):
    assert gpu.slug(name) == expected


def test_what_was_not_run_has_not_failed():
    ours = {"provider": "reference"}
    rows = [Row("a", error=0.1, **ours), Row("b", note=gpu.NOT_RUN, **ours), Row("c", note="RuntimeError: no", **ours)]
    assert [row.case for row in gpu.failed(rows)] == ["c"]


def test_a_run_leaves_what_it_has_after_every_case(tmp_path, monkeypatch):
    def cut_short(*_):
        yield [Row("a", "reference", error=0.1)], []
        assert [row.case for row in results.read_csv(tmp_path / "rows.csv", Row)] == ["a"]
        yield [Row("b", "reference", error=0.1)], []
        raise KeyboardInterrupt

    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(gpu, "measure_all", cut_short)
    with pytest.raises(KeyboardInterrupt):
        gpu.main(["--dry-run", "--no-tests", "--out", str(tmp_path)])
    assert [row.case for row in results.read_csv(tmp_path / "rows.csv", Row)] == ["a", "b"]


def test_out_of_time_is_not_run(monkeypatch):
    monkeypatch.setattr(gpu.importlib.util, "find_spec", lambda name: None)
    found = list(gpu.measure_all(cases.GPU_CASES[:2], timing.HostTimer(), "cpu", 1, -1.0))
    assert [row.note for rows, _ in found for row in rows] == [f"{gpu.DRY}; {gpu.NOT_RUN}"] * 2
    assert not any(gpu.failed(rows) for rows, _ in found)


def test_headline_losses_come_first():
    quick = [case.quick for case in cases.GPU_CASES]
    assert cases.GPU_CASES[0].family == cases.GPU_CASES[1].family == "mixupe_loss"
    assert quick == sorted(quick, reverse=True)


def test_everything_on_leaves_eight_files_at_most(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu.shutil, "which", lambda name: name)
    monkeypatch.setattr(
        gpu, "run_logged", lambda commands, logs, seconds: [log.write_text("1 passed") and 0 for log in logs]
    )
    gpu.sanitize(tmp_path, 1)
    gpu.gpu_tests(tmp_path, 1)
    results.write(tmp_path, {}, ROWS, VERDICTS)
    for draw in (plot.speedups, plot.roofline):
        draw(tmp_path, "none")
    assert len(list(tmp_path.iterdir())) == 7
