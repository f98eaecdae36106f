"""report: one file, from merged data, that needs nothing else and runs nothing."""

import html
import re
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow.parquet as pq
import pytest

from factories import config, job_metadata, make_study
from h200_study import h200_study
from stagebench.errors import MergeError
from stagebench.merge import merge
from stagebench.report import write_report
from stagebench.report.axis_figure import AXIS_FIGURE
from stagebench.report.figures import FIGURES
from stagebench.report.machine_figures import MACHINE_FIGURES
from stagebench.report.page import OPEN_ROWS, _bottlenecks, _headline, _method, _printed, _read
from stagebench.tables import cell, read_table

EVIL = "<script>alert(1)</script><img src=x onerror=alert(2)>"


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")

    def edit(row: dict[str, Any]) -> dict[str, Any]:
        if row["sample"].startswith("seq_03/000002") and row["model"] == "eventgpt":
            return {**row, "status": "error", "reason": EVIL, "total_ms": None}
        return {**row, "text": EVIL, "query": "Is a < b & c?"}

    merge(
        make_study(folder, samples=24, cuda=True, edit=edit, variants={"generate-00000000": {}, "nf4-11111111": {"quantization": "nf4"}}),
        folder,
    )
    write_report(folder)
    return folder


@pytest.fixture(scope="module")
def page(results: Path) -> str:
    return (results / "report.html").read_text(encoding="utf-8")


class Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def read(page: str) -> Reader:
    reader = Reader()
    reader.feed(page)
    return reader


def test_what_data_says_is_shown_and_not_run(page: str) -> None:
    tags = read(page).tags
    assert not [t for t, a in tags if t in ("script", "iframe", "object", "embed", "link", "img")]
    assert not [a for _, a in tags if any(name.startswith("on") for name in a)]
    assert html.escape(EVIL, quote=False)[:20] in page
    assert "Is a &lt; b &amp; c?" in page


def test_needs_nothing_from_outside(page: str, results: Path) -> None:
    assert len(page.encode()) < 3_000_000
    for tag, attributes in read(page).tags:
        for name in ("src", "href", "xlink:href", "action"):
            target = attributes.get(name) or ""
            assert not re.match(r"(?i)[a-z]+:|//", target), f"<{tag} {name}={target}>"
            if name == "href" and target and not target.startswith("#"):
                assert (results / target).is_file(), f"{target} is linked but not there"
    assert "@import" not in page
    assert not re.findall(r"url\((?!#)", page)


def test_ids_are_unique_and_fragments_lead_somewhere(page: str) -> None:
    tags = read(page).tags
    ids = [a["id"] for _, a in tags if "id" in a]
    assert len(ids) == len(set(ids))
    wanted = {a["href"][1:] for _, a in tags if (a.get("href") or "").startswith("#")}  # type: ignore[index]
    wanted |= set(re.findall(r"url\(#([^)]+)\)", page))
    assert wanted <= set(ids)


def test_verdict_comes_first_with_its_reasons(page: str) -> None:
    assert (
        page.index('role="status"')
        < page.index('id="headline"')
        < page.index('id="stages"')
        < page.index('id="figures"')
        < page.index('id="failures"')
    )
    assert "<strong>VALID</strong>" in page
    assert "Random weights: eventgpt, video_llava" in page


def test_every_number_in_a_table_is_in_the_data(page: str, results: Path) -> None:
    known = set()
    for path in (results / "tables").glob("*.parquet"):
        frame = read_table(path).frame
        for column in frame.columns:
            known |= {cell(column, value) for value in frame[column]}
    body = page[page.index('<section id="stages"') : page.index('<section id="answers"')]
    body = re.sub(r"<svg.*?</svg>", "", body, flags=re.S)
    cells = [html.unescape(c) for c in re.findall(r"<td[^>]*>(.*?)</td>", body, flags=re.S)]
    assert len(cells) > 500
    assert set(cells) <= known


def test_figures_are_saved_and_drawn(page: str, results: Path) -> None:
    names = {p.stem for p in (results / "figures").glob("*.svg")}
    assert names == {p.stem for p in (results / "figures").glob("*.pdf")}
    assert names >= {"stages", "ecdf", "forest", "waterfall", "tokens", "run_order", "first_call", "inter_token", "load", "memory"}
    assert page.count("<svg") == len(names)
    assert all((results / "figures" / f"{n}.pdf").read_bytes().startswith(b"%PDF") for n in names)
    for words in ("mean time (ms)", "decode (ms)", "peak device memory (GiB)"):
        assert words in page, "axes name their unit"


def test_a_figure_of_an_earlier_report_does_not_stay(results: Path) -> None:
    old = results / "figures/energy.svg"
    assert not old.exists(), "this study has no energy"
    old.write_text("<svg/>")
    own = results / "figures/mine.svg"
    own.write_text("<svg/>")
    write_report(results)
    assert own.exists(), "somebody's own"
    own.unlink()
    assert not old.exists() and (results / "figures/stages.svg").exists()


def test_keyboard_and_phone(page: str) -> None:
    reader = read(page)
    scrollers = [a for t, a in reader.tags if t == "div" and a.get("class") == "wide"]
    assert scrollers
    assert all(a.get("tabindex") == "0" and a.get("aria-label") for a in scrollers)
    assert any(t == "html" and a.get("lang") for t, a in reader.tags)
    assert any(a.get("name") == "viewport" for _, a in reader.tags)
    assert "prefers-color-scheme: dark" in page


def test_links_have_hashes(page: str, results: Path) -> None:
    import hashlib

    for name in ("tables/stages.csv", "timings.parquet", "legacy_results.json"):
        assert hashlib.sha256((results / name).read_bytes()).hexdigest() in page


def test_an_invalid_study_says_so(tmp_path: Path) -> None:
    merge(make_study(tmp_path, verified=False), tmp_path)
    page = write_report(tmp_path).read_text(encoding="utf-8")
    assert "<strong>INVALID</strong>" in page
    assert "invalid_not_verified" in page


def test_one_model_and_null_columns_still_make_a_page(tmp_path: Path) -> None:
    def bare(row: dict[str, Any]) -> dict[str, Any]:
        return {**row, "token_ms": None, "order": None, "text": None, "status": "capped" if row["length"] == "natural" else "ok"}

    merge(make_study(tmp_path, models={"eventgpt": {}}, samples=2, sequences=1, blocks=1, repeats=1, edit=bare), tmp_path)
    page = write_report(tmp_path).read_text(encoding="utf-8")
    assert "nothing to compare" in page


def test_an_unmerged_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MergeError, match="Merge the study first"):
        write_report(tmp_path)


def test_every_number_on_the_page_is_in_the_data(page: str, results: Path) -> None:
    """Whatever the page prints in words, outside of figures (drawn from the same tables) and of the template's own text."""
    import json
    from importlib.resources import files

    number = re.compile(r"(?<![\w.])\d+(?:\.\d+)?(?![\w]|\.\d)")
    body = re.sub(r"<(svg|style|pre).*?</\1>", " ", page, flags=re.S)
    shown = set(number.findall(html.unescape(re.sub(r"<[^>]*>", " ", body))))
    known = set(number.findall((results / "summary.json").read_text()))
    for path in (results / "tables").glob("*.parquet"):
        table = read_table(path)
        known |= {part for c in table.frame.columns for v in table.frame[c] for part in number.findall(cell(c, v))}
        known |= set(number.findall(" ".join(table.notes)))
    keys = pq.read_table(results / "timings.parquet", columns=["sample"])["sample"].unique().to_pylist()
    known |= set(number.findall(" ".join(keys)))
    known |= {str(n) for n in pq.read_table(results / "timings.parquet", columns=["new_tokens"])["new_tokens"].to_pylist()}  # of answers
    summary = json.loads((results / "summary.json").read_text())
    known |= {f"{100 * row[k]:.1f}" for row in summary["stages"] for k in row if k.endswith("_share") and row[k] is not None}
    known |= {f"{100 * summary['config']['compare']['confidence']:g}"}
    source = files("stagebench.report").joinpath("page.py").read_text(encoding="utf-8")
    known |= set(number.findall(source[source.index("def _method") :]))  # the paragraph's own constants
    known |= {str(n) for n in range(1, len(summary["warnings"]) + 1)}  # how many warnings of a code
    known |= {str(len(read_table(path).frame)) for path in (results / "tables").glob("*.parquet")}  # rows of a folded one
    assert len(shown) > 300
    assert shown <= known, sorted(shown - known)


def test_what_an_interval_rests_on_is_said(results: Path, tmp_path: Path) -> None:
    """A paper that takes the paragraph over must not claim recordings where there was one, nor leave out the batches."""
    folders = {"many": results, "one": tmp_path / "one", "batches": tmp_path / "batches"}
    once = {"repeats": {"min": 1, "max": 1}, "warmup": 1}
    merge(make_study(folders["one"], plan_config=config(timing=once), sequences=1), folders["one"])
    merge(make_study(folders["batches"], plan_config=config(variants={"batch": [1, 2]}), sequences=3), folders["batches"])
    studies = {name: _read(folder) for name, folder in folders.items()}
    alone, batched = "the interval speaks for that recording only", "clustered by recording and by batch"
    method = {name: _method(study.summary) for name, study in studies.items()}
    assert [name for name, text in method.items() if alone in text] == ["one"]
    assert [name for name, text in method.items() if batched in text] == ["batches"]
    assert "ran 1 warm-up sample first, which is excluded;" in method["one"] and "order, each once, decoded" in method["one"]
    assert "warm-up samples first, which are excluded;" in method["many"]
    for name, study in studies.items():
        assert {ratio["alone"] for card in _headline(study) for ratio in card["ratios"] if ratio["bounded"]} == {name == "one"}
    write_report(folders["one"])
    assert ", of one sequence: it speaks for that one only" in (folders["one"] / "report.html").read_text(encoding="utf-8")


def test_an_engine_that_fell_back_is_said(tmp_path: Path) -> None:
    note = "fused falls back to graph: <a family> that it does not know"
    engine = {"name": "fused", "note": note, "prepare_ms": {}, "admission": {"note": note, "shapes": 1}}
    merge(make_study(tmp_path, job=job_metadata(engine=engine), variants={"fused-00000000": {"engine": "fused"}}), tmp_path)
    write_report(tmp_path)
    shown = html.unescape((tmp_path / "report.html").read_text(encoding="utf-8"))
    section = shown[shown.index('<section id="headline"') : shown.index('<section id="stages"')]
    assert section.count(f"eventgpt, engine fused: {note}.") == 1, "once, however many jobs said it"
    assert section.count(f"video_llava, engine fused: {note}.") == 1


def test_columns_that_say_nothing_are_left_out_and_named(page: str, results: Path) -> None:
    shown = page[page.index('<section id="comparison"') : page.index('<section id="decomposition"')]
    header = re.findall(r"<th[^>]*>([^<]*)</th>", shown)
    frame = read_table(results / "tables/comparison.parquet").frame
    for column in ("failed", "discarded", "capped"):
        assert (column in header) == bool(frame[column].sum()), column
        assert (column in shown.split("Left out here")[-1]) != (column in header)
    assert "verdict" in header
    assert f'class="word {frame["verdict"][0].lower()}"' in shown


def test_long_tables_open_on_request(page: str) -> None:
    shown = page[page.index('<section id="distribution"') : page.index('<section id="failures"')]
    assert shown.index("<details>") < shown.index("<table>") < shown.index("</details>")


@pytest.mark.parametrize(("rows", "folded"), [(OPEN_ROWS, False), (OPEN_ROWS + 1, True)])
def test_a_table_that_is_long_in_this_study_does_too(results: Path, rows: int, folded: bool) -> None:
    summary = {"files": {}}
    for name in ("comparison", "stages"):
        table = read_table(results / f"tables/{name}.parquet")
        table = replace(table, frame=pl.concat([table.frame] * rows).head(rows))
        assert _printed(table, summary)["folded"] == (folded and name != "stages")


@pytest.fixture(scope="module")
def h200(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nine series of an H200's values: clocks that are missing in part of the rows, energy of long samples and stages only."""
    folder = tmp_path_factory.mktemp("h200")
    h200_study(folder, samples=12, repeats=2)
    write_report(folder)
    return folder


def specs(folder: Path) -> dict[str, Any]:
    study = _read(folder)
    charts = {figure.name: figure.draw(study) for figure in (*FIGURES, *MACHINE_FIGURES)}
    return {name: chart.to_dict() for name, chart in charts.items() if chart is not None}


def drawn_rows(spec: Any) -> list[dict[str, Any]]:
    """All rows of data anywhere in a chart."""
    if isinstance(spec, dict):
        found = list(spec["data"]["values"]) if isinstance(spec.get("data"), dict) and "values" in spec["data"] else []
        return found + [row for value in spec.values() for row in drawn_rows(value)]
    return [row for value in spec for row in drawn_rows(value)] if isinstance(spec, list) else []


def test_energy_is_divided_among_the_stages_that_are_known(h200: Path) -> None:
    rows = drawn_rows(specs(h200)["energy"])
    stages = read_table(h200 / "tables/stages.parquet").frame.to_dicts()
    known = {(r["model"], r["engine"], r["length"]): r["energy_j"] for r in stages if r["energy_j"] is not None}
    assert 0 < len(known) < len(stages), "some groups have none"
    sums: dict[tuple[str, str], float] = {}
    for row in rows:
        sums[row["series"], row["length"]] = sums.get((row["series"], row["length"]), 0) + row["joule"]
    assert sorted(sums.values()) == pytest.approx(sorted(known.values())), "nothing is lost and nothing invented"
    parts = {row["part"] for row in rows}
    assert parts == {"decode", "not told apart"}, "only stages that are long enough have a share of their own"


def test_stages_energies_are_of_the_samples_that_the_total_is_of(tmp_path: Path) -> None:
    """Most samples have a total only: a bar divides the total of those that have the stages too. A counter's error is not hidden."""

    def counted(row: dict[str, Any]) -> dict[str, Any]:
        whole = {"energy_j": 100.0, "decode_energy_j": 90.0, "prefill_energy_j": 12.0}
        return {**row, **(whole if row["sample"].startswith("seq_00") else {"energy_j": 10.0})}

    merge(make_study(tmp_path, lengths=("16",), edit=counted), tmp_path)
    own = [row for row in drawn_rows(specs(tmp_path)["energy"]) if row["series"].startswith("eventgpt")]
    assert {row["part"]: row["joule"] for row in own} == {"decode": 90, "prefill": 12, "not told apart": -2}
    assert {row["series"] for row in own} == {"eventgpt (n = 3)"}


def test_variants_are_lines_of_their_own_along_an_axis(tmp_path: Path) -> None:
    """Frames at two quantizations: four lines for two models, each with one place a number of frames; and the table says which."""

    def edit(row: dict[str, Any]) -> dict[str, Any]:
        return {**row, "total_ms": row["total_ms"] * (2 if row["quantization"] == "int8" else 1)}

    variants = {f"{q}-f{n}": {"frames": n, "quantization": q} for q in ("none", "int8") for n in (1, 8)}
    study = config(variants={"frames": [1, 8], "quantization": ["none", "int8"]})
    merge(make_study(tmp_path, plan_config=study, variants=variants, lengths=("16",), edit=edit), tmp_path)
    table = read_table(tmp_path / "tables/axis.parquet").frame
    assert set(table["series"]) == {"quantization: none", "quantization: int8"}
    assert "quantization: int8" in (tmp_path / "tables/axis.md").read_text()
    total = AXIS_FIGURE.draw(_read(tmp_path)).to_dict()["vconcat"][0]
    points = {(r["series"], r["place"], r["gmean"]) for r in drawn_rows(total) if r["metric"] == "total"}
    assert len({series for series, _, _ in points}) == 4
    assert len({(series, place) for series, place, _ in points}) == len(points) == 8, "one mean a place on a line"


def test_numbers_along_an_axis_stand_in_their_order_and_lines_are_told_apart(tmp_path: Path) -> None:
    """Batches of 2, 16 and 4 as the config has them; six variants, two models and more lines than colours."""
    engines = ("generate", "static", "graph", "fused")
    variants = {f"{e}-b{n}": {"batch": n, "engine": e} for e in engines for n in (2, 16, 4)}
    study = config(variants={"batch": [2, 16, 4], "engine": list(engines)})
    merge(make_study(tmp_path, plan_config=study, variants=variants, lengths=("16",)), tmp_path)
    found = _read(tmp_path)
    for panel in AXIS_FIGURE.draw(found).to_dict()["vconcat"]:
        for encoding in encodings(panel):
            assert encoding["x"]["sort"] == ["2", "4", "16"]
            marks = [encoding[channel]["scale"]["range"] for channel in ("color", "shape", "strokeDash") if channel in encoding]
            looks = {str(look) for look in zip(*marks, strict=True)}
            assert len(looks) == len(encoding["color"]["scale"]["domain"]) == 8
    drawn = {figure.name: figure.draw(found).to_dict() for figure in FIGURES if figure.name == "first_call"}
    order = drawn["first_call"]["encoding"]["y"]["sort"]
    assert order == [found.series(row) for row in found.tables["stages"].frame.to_dicts()]
    said = _bottlenecks(found)
    assert len(set(said)) == len(said) == 24
    assert all(
        any(f"{model} · {variant} at length 16: " in s for s in said) for model in ("eventgpt", "video_llava") for variant in variants
    )


@pytest.mark.parametrize(("waits", "says"), [(0.0, None), (0.4, "40%")])
def test_a_headline_without_a_clear_word_says_why(tmp_path: Path, waits: float, says: str | None) -> None:
    def edit(row: dict[str, Any]) -> dict[str, Any]:
        return {**row, "cpu_wait_ms": waits * row["total_ms"]}

    merge(make_study(tmp_path, edit=edit), tmp_path)
    ratios = [r for card in _headline(_read(tmp_path)) for r in card["ratios"]]
    assert {r["verdict"] == "AMBIGUOUS" for r in ratios} == {says is not None}
    assert {r["waited"] for r in ratios} == {says}
    page = write_report(tmp_path).read_text(encoding="utf-8")
    assert ("a side waited for a CPU for 40% of its time" in page) == (says is not None)


def test_clock_temperature_and_power_stand_below_the_totals_of_the_same_runs(h200: Path) -> None:
    panels = specs(h200)["run_order"]["vconcat"]
    titles = [p["encoding"]["y"]["title"] for p in panels]
    assert titles == ["total (ms), natural", "total (ms), 45", "SM clock (MHz)", "temperature (°C)", "power (W)"]
    assert len({str(p["encoding"]["x"]["scale"]["domain"]) for p in panels}) == 1, "one axis for all"
    clocks = drawn_rows(panels[2])
    assert clocks and all(row["order"] % 5 for row in clocks), "rows without a reading are not drawn as 0"


def encodings(spec: Any) -> Iterator[dict[str, Any]]:
    if isinstance(spec, dict):
        if "encoding" in spec:
            yield spec["encoding"]
        for value in spec.values():
            yield from encodings(value)
    elif isinstance(spec, list):
        for value in spec:
            yield from encodings(value)


def test_no_two_series_look_alike(h200: Path) -> None:
    """Nine series and seven colours: where colour tells series apart, shape or dash does too, unless their places do."""
    seen = 0
    for name, spec in specs(h200).items():
        for encoding in encodings(spec):
            if encoding.get("color", {}).get("field") != "series" or len(encoding["color"]["scale"]["domain"]) <= 7:
                continue
            marks = [encoding[channel]["scale"]["range"] for channel in ("color", "shape", "strokeDash") if channel in encoding]
            looks = {str(look) for look in zip(*marks, strict=True)}
            fit = encoding.get("detail", {}).get("field") == "fit"  # a line through points that have shapes
            assert fit or len(looks) == len(encoding["color"]["scale"]["domain"]), name
            seen += 1
    assert seen > 4


def test_natural_length_comes_first_and_answers_are_of_it(h200: Path) -> None:
    page = (h200 / "report.html").read_text(encoding="utf-8")
    shown = page[page.index('<section id="answers"') : page.index('<section id="method"')]
    tokens = [int(n) for n in re.findall(r"<dt>video_llava[^<]*, (\d+) tokens</dt>", shown)]
    assert tokens and 45 not in tokens
    assert "(generate-00000000, graph-10000000, fused-20000000)" in html.unescape(shown), "variants that say the same stand together"


def test_a_thousand_samples_stay_below_three_megabytes(tmp_path: Path) -> None:
    h200_study(tmp_path, samples=1000, repeats=1)
    assert write_report(tmp_path).stat().st_size < 3_000_000
